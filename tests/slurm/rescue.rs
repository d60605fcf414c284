//! Clusters that are written down by themselves before their job has to end, and go on.

use super::world::Site;

/// Counts in vm0, slowly, and says in which boot.
const SCRIPT: &str = "boot() { cut -c1-8 /proc/sys/kernel/random/boot_id; }
    echo boot-$(boot)
    i=0; while [ $i -lt 40 ]; do i=$((i + 1)); echo tick-$i; sleep 0.5; done
    echo boot-$(boot); echo end >&2; exit 7";

fn script(site: &Site, text: &str) {
    site.sh("alice", &format!("cat >script <<'EOF'\n{text}\nEOF"));
}

/// What Slurm does some time before the end.
fn warn(site: &Site, job: u32) {
    site.sh("alice", &format!("scancel --batch --signal=USR2 {job}"));
}

/// Lets a requeued job begin at once: what still ends of its first run would end the second.
fn begin_again(site: &Site, job: u32) {
    site.until("alice", &format!("squeue -h -j {job} -o %T/%r"), "PENDING/BeginTime");
    site.lab.wait_idle().unwrap();
    for host in site.lab.computes() {
        host.sh("for i in $(seq 600); do pgrep slurmstepd >/dev/null || exit 0; sleep 0.1; done; exit 1").unwrap();
    }
    // slurmctld may have word of the first run's end still before it, and Slurm's own two minutes
    // of waiting are cut short here: nothing tells when it has read it.
    std::thread::sleep(std::time::Duration::from_secs(5));
    let now = format!("scontrol update jobid={job} StartTime=now; squeue -h -j {job} -o %T");
    site.until("alice", &now, "RUNNING");
}

#[test]
fn a_job_that_is_warned_is_requeued_and_its_script_goes_on() {
    let site = Site::up(2);
    let before = site.snapshot();
    script(&site, SCRIPT);
    let line = "-c1 -N2 -t5 --requeue --ckpt-on-signal saved -b script tiny:2";
    let job = site.batch("alice", line);
    let wish = site.sh("alice", &format!("scontrol show job {job}"));
    assert!(wish.contains("Requeue=1"), "{wish}");
    let said = format!("cat job-{job}");
    for (tick, number) in [(5, 1), (15, 2_usize)] {
        site.until("alice", &format!("{said} || true"), &format!("tick-{tick}\n"));
        warn(&site, job);
        let again = "is in the queue again, and goes on from there";
        site.until("alice", &format!("{said} | grep -c '{again}' || true"), &number.to_string());
        let text = site.sh("alice", &said);
        assert_eq!(text.matches("MiB); it ends\n").count(), number, "{text}");
        assert_eq!(site.sh("alice", "ls saved | cut -d. -f2"), format!("{number}\n"));
        begin_again(&site, job);
    }
    site.until("alice", &format!("scontrol show job {job}"), "ExitCode=7:0");
    let text = site.sh("alice", &said);
    assert_eq!(text.matches("Going on from the checkpoint").count(), 2, "{text}");
    // What it wrote is there as if it had never stopped; a line in the moment of the end may
    // be there twice.
    let mut lines: Vec<&str> = text
        .lines()
        .filter(|line| ["tick-", "boot-", "end"].iter().any(|it| line.starts_with(it)))
        .collect();
    lines.dedup();
    let ticks: Vec<String> = (1..=40).map(|tick| format!("tick-{tick}")).collect();
    assert_eq!(lines[1..41], ticks, "{text}");
    assert_eq!(lines[0], lines[41], "{text}");
    assert_eq!(lines[42..], ["end"], "{text}");
    site.nothing_left(&before);
}

#[test]
fn a_preempted_job_is_written_down_and_one_that_was_interrupted_is_not_gone_on_from() {
    let site = Site::up(1);
    let before = site.snapshot();
    let host = site.lab.host("n1");
    site.lab.login().sh("scontrol update partition=low GraceTime=100").unwrap();
    let job = site.batch("alice", "-p low --exclusive --ckpt-on-signal saved tiny");
    site.sh("alice", &format!("pavo wait -j {job} --for agent"));
    site.sh("alice", "pavo run sh -c 'cat /proc/sys/kernel/random/boot_id > boot'");
    let boot = site.sh("alice", "pavo run cat boot");
    // The VMs' step alone is told, long before the job.
    site.sh("bob", "sbatch --exclusive -o other --wrap true");
    let said = format!("cat job-{job}");
    let again = "is in the queue again, and goes on from there";
    site.until("alice", &said, again);
    site.until("bob", "test -z \"$(squeue -h -u bob)\" && echo over || true", "over");
    begin_again(&site, job);
    site.until("alice", &format!("pavo status -j {job} || true"), "vm0\trunning");
    let now = "pavo run cat boot /proc/sys/kernel/random/boot_id";
    assert_eq!(site.sh("alice", now), format!("{boot}{boot}"));

    // Its launcher is killed while another is written.
    let stop = "until pid=$(pgrep -nx zstd); do sleep 0.01; done; kill -STOP $pid";
    let stopped = std::thread::scope(|scope| {
        let stopped = scope.spawn(|| host.sh(stop));
        warn(&site, job);
        stopped.join().unwrap()
    });
    stopped.unwrap();
    host.sh("kill -9 $(pgrep -nf '^[^ ]*pavo internal launcher')").unwrap();
    site.ended(job);
    assert_eq!(site.sh("alice", "ls saved | cut -d. -f2 | xargs"), "1 2\n");
    site.sh("alice", &format!("scontrol requeue {job}"));
    begin_again(&site, job);
    let text = site.until("alice", &said, "it is not finished");
    assert!(text.contains(".2`\n"), "{text}");
    // For a minute the record of the killed one might be this one's.
    site.until("alice", &format!("{now} || true"), &format!("{boot}{boot}"));
    // And who cancels it wants no more of it.
    site.sh("alice", &format!("scancel {job}"));
    site.ended(job);
    assert_eq!(site.sh("alice", "ls saved | cut -d. -f2 | xargs"), "1 2\n");
    host.sh("touch -d '2 minutes ago' /tmp/pavo-* || true").unwrap();
    site.on("n1", "alice", &["pavo", "status"]);
    site.nothing_left(&before);
}

#[test]
fn slurms_own_warning_comes_in_time_and_mistakes_before_there_is_a_job() {
    let site = Site::up(1);
    let before = site.snapshot();
    for (line, code, expected) in [
        ("pavo batch --ckpt-on-signal s --signal=KILL@9 tiny", 2, "by which a checkpoint could"),
        ("pavo batch --ckpt-on-signal /nowhere/s tiny", 5, "creating the folder of checkpoints"),
        ("pavo alloc --ckpt-on-signal s tiny", 2, "is for jobs that nobody waits for"),
    ] {
        let output = site.run("alice", &["sh", "-c", line]);
        assert_eq!(output.status.code(), Some(code), "{line}: {output:?}");
        assert!(output.stderr.contains(expected), "{line}: {output:?}");
    }
    // The user's own, without a word of whom it is for.
    let job = site.batch("alice", "-t1 --signal=USR1@40 --ckpt-on-signal saved tiny");
    let said = site.until("alice", &format!("cat job-{job} || true"), "`pavo batch -r ");
    assert!(said.contains("error: the cluster was written down, and has ended"), "{said}");
    site.ended(job);
    let job = site.batch("alice", "-r saved/* tiny");
    site.sh("alice", &format!("pavo wait -j {job} --for agent; pavo cancel {job}"));
    site.nothing_left(&before);
}
