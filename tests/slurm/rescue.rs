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
