//! How jobs end, pause and come again, and what is known of them then.

use pavo_lab::{Etcd, Options};

use super::terminal::Terminal;
use super::world::{Before, Site};

/// The launcher on a host, as that host numbers it: the younger one, where it has a supervisor.
const LAUNCHER: &str = "pgrep -nf '^[^ ]*pavo internal launcher'";
const SUPERVISOR: &str = "pgrep -of '^[^ ]*pavo internal launcher'";

#[test]
fn a_job_is_suspended_requeued_and_cancelled() {
    let site = Site::up(2);
    let before = site.snapshot();
    let job = site.batch("alice", "-c1 -N2 tiny:2");
    site.until("alice", "pavo status", "vm1");
    site.sh("alice", "pavo wait --for ssh");
    let root = |script: &str| site.lab.login().sh(script).unwrap();

    root(&format!("scontrol suspend {job}"));
    let counted = "pavo status | grep -c 'paused.*the job is suspended'";
    site.until("alice", &format!("{counted}; true"), "2");
    site.until("alice", "pavo ps", "\tsuspended\t");
    root(&format!("scontrol resume {job}"));
    site.until("alice", "pavo status", "vm1\trunning");
    assert_eq!(site.sh("alice", "pavo ssh vm1 hostname"), "vm1\n");

    // The guests shut down by ACPI, and nothing tells that they were there.
    site.sh("alice", "pavo console -f vm1 >console 2>&1 & sleep 1");
    // Its signal is often there before the word that says why.
    site.lab.host("n1").sh(&format!("kill -TERM $({LAUNCHER})")).unwrap();
    site.sh("alice", &format!("scontrol requeue {job}"));
    site.until("alice", "pavo ps", "\tpending\t(BeginTime)\t");
    assert!(site.until("alice", "cat console", "reboot: Power down").contains("vm1 ready"));
    let said = site.sh("alice", &format!("cat job-{job}; pavo status 2>&1 || true"));
    assert!(said.contains("error: the job was put back into the queue"), "{said}");
    let waits = format!("error: job {job} waits in Slurm's queue (pending: BeginTime)");
    assert!(said.contains(&waits), "{said}");

    // It comes again, and its first run's files are gone. It is cancelled while guests boot.
    // Slurm itself would wait longer: what still ends of the first run would end the second.
    site.lab.wait_idle().unwrap();
    site.sh("alice", &format!("scontrol update jobid={job} StartTime=now"));
    site.until("alice", "pavo status", "vm1\trunning");
    let count = "pavo ssh-config >/dev/null; ls ~/.pavo/jobs | wc -l";
    assert_eq!(site.sh("alice", count), "1\n");
    site.sh("alice", "scancel -n pavo");
    site.ended(job);
    let said = site.sh("alice", &format!("cat job-{job}; pavo status 2>&1 || pavo ps"));
    // By whom it heard of it first.
    assert!(
        ["(cancelled)", "(the job was cancelled)"].iter().any(|why| said.contains(why)),
        "{said}"
    );
    assert!(!said.contains("tiny"), "{said}");
    site.nothing_left(&before);
}

#[test]
fn a_killed_launcher_takes_its_cluster_along() {
    let site = Site::up(1);
    let before = site.snapshot();
    site.batch("alice", "tiny");
    site.until("alice", "pavo status", "vm0\trunning");
    let kill = format!("kill -9 $({LAUNCHER})");
    site.lab.host("n1").sh(&kill).unwrap();
    site.ended(1);
    let said = site.sh("alice", "pavo status 2>&1 || true; pavo ps");
    assert!(said.starts_with("error: you have no running cluster"), "{said}");
    assert!(!said.contains("tiny"), "{said}");
    nothing_left_of_killed(&site, "n1", &before);

    let mut alloc = Terminal::open(&site, "pavo alloc -E 'exec sleep 600' tiny");
    site.until("alice", "pavo status", "vm0\trunning");
    let login = site.lab.login();
    login.sh(&kill).unwrap();
    assert_eq!(alloc.ends(), 137, "{}", alloc.said());
    let said = alloc.said();
    let expected = "error: the launcher of job 2 was killed (signal: 9 (SIGKILL))";
    assert!(said.contains(expected) && said.contains("`dmesg`"), "{said}");
    site.ended(2);
    // Its folder is gone at once, its record with the next command.
    assert_eq!(login.sh("ls /tmp | grep '^pavo-' || true").unwrap(), "");
    site.sh("alice", "pavo status 2>&1 || true");
    site.nothing_left(&before);
}

#[test]
fn the_supervisor_passes_on_what_is_meant_for_the_launcher() {
    let site = Site::up(1);
    let before = site.snapshot();
    let login = site.lab.login();
    let argv = ["pavo", "alloc", "-E", "exec sleep 600", "tiny"];
    let noted = ["sh", "-c", "exec pavo alloc -E 'exec sleep 600' tiny 2>said"];
    std::thread::scope(|scope| {
        let alloc = scope.spawn(|| site.run("alice", &argv));
        site.until("alice", "pavo status", "vm0\trunning");
        // All that it has of its own, in KiB.
        let rollup = "awk '/^Private_Dirty/ { print $2 }' /proc/$pid/smaps_rollup";
        let own = login.sh(&format!("pid=$({SUPERVISOR}); {rollup}")).unwrap();
        assert!(own.trim().parse::<u32>().unwrap() < 1024, "{own}");
        login.sh(&format!("kill $({SUPERVISOR})")).unwrap();
        let output = alloc.join().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        assert!(output.stderr.contains("Terminating the cluster (cancelled)"), "{output:?}");
        assert!(!output.stderr.contains("was killed"), "{output:?}");

        // Killed itself: salloc knows nothing of it, and the launcher says it, perhaps later.
        let alloc = scope.spawn(|| site.run("alice", &noted));
        site.until("alice", "pavo status", "vm0\trunning");
        login.sh(&format!("kill -9 $({SUPERVISOR})")).unwrap();
        alloc.join().unwrap();
        let expected = "Terminating the cluster (salloc was killed, or what it had started)";
        site.until("alice", "cat said", expected);
    });
    site.nothing_left(&before);
}

/// A command on the host of a killed launcher removes its folder, once that is of an age to
/// be told from one that is being made.
#[track_caller]
fn nothing_left_of_killed(site: &Site, host: &str, before: &Before) {
    let age = "touch -d '2 minutes ago' /tmp/pavo-*";
    site.lab.host(host).sh(age).unwrap();
    let output = site.on(host, "alice", &["pavo", "status"]);
    assert!(output.stderr.starts_with("error: you have no running cluster"), "{output:?}");
    site.nothing_left(before);
}

#[test]
fn at_a_terminal_there_is_a_prompt_and_ctrl_c_ends_what_is_not_there_yet() {
    let site = Site::up(1);
    let before = site.snapshot();
    // Tasks of an array, each with a cluster of its own, until their time is up.
    let array = site.batch("bob", "-t1 -a 1-2 tiny");

    let mut shell = Terminal::open(&site, "pavo alloc -J mine -c1 tiny");
    shell.sees("(pavo/");
    shell.types("echo id=$PAVO_JOB_ID; pavo status | cat; exit 5\n");
    shell.sees("vm0\trunning");
    assert_eq!(shell.ends(), 5, "{}", shell.said());

    let mut booting = Terminal::open(&site, "pavo alloc --wait ssh -c1 tiny");
    booting.sees("to boot and answer ssh");
    booting.types("\x03");
    assert_eq!(booting.ends(), 130, "{}", booting.said());
    assert!(booting.said().contains("interrupted"), "{}", booting.said());

    let mut queued = Terminal::open(&site, "pavo alloc -c8 tiny");
    queued.sees("waiting for resources");
    let said = site.sh("alice", "pavo ps; pavo ps -a; pavo ps -u bob");
    assert_eq!(said.matches("\tpending\t(Resources)\t").count(), 2, "{said}");
    assert_eq!(said.matches("\tbob\ttiny:1\t1\trunning\t").count(), 4, "{said}");
    queued.types("\x03");
    assert_ne!(queued.ends(), 0, "{}", queued.said());

    // What waits is taken back, by who has submitted it.
    let held = site.batch("alice", "-H -J held tiny");
    let stranger = site.run("bob", &["pavo", "cancel", &held.to_string()]);
    assert_eq!(stranger.status.code(), Some(4), "{stranger:?}");
    let output = site.run("alice", &["pavo", "cancel", "-J", "held"]);
    assert!(output.status.success(), "{output:?}");
    let expected = format!("Job {held} is cancelled; it had waited (pending: JobHeldUser).\n");
    assert!(output.stderr.ends_with(&expected), "{output:?}");
    assert_eq!(site.sh("alice", "squeue -h -u alice -t PENDING"), "");

    let over = "cat job-*; squeue -h";
    let said = site.until("bob", over, "error: the job's time limit was reached");
    let status = site.run("bob", &["sh", "-c", &format!("ls job-* | wc -l; {over}")]).stdout;
    assert!(status.starts_with("2\n"), "{array}: {said} {status}");
    site.ended(array);
    site.nothing_left(&before);
}

#[test]
fn a_job_id_that_comes_again_finds_nothing_of_the_first() {
    let slurm = ["FirstJobId=1", "MaxJobId=2", "MinJobAge=2"].map(String::from).to_vec();
    let site = Site::with(Options { hosts: 1, etcd: Etcd::One, slurm, ..Options::default() });
    let before = site.snapshot();
    site.batch("alice", "-J first tiny");
    site.until("alice", "pavo status", "vm0\trunning");
    let host = site.lab.host("n1");
    host.sh(&format!("kill -9 $({LAUNCHER})")).unwrap();
    site.ended(1);
    host.sh("rm -r /tmp/pavo-1-*").unwrap();
    // Nobody has looked since: the record is still there.
    assert!(site.lab.etcdctl(&["get", "--prefix", "/pavo/v1/job/"]).unwrap().contains("first"));
    let second = site.batch("alice", "-H -J second tiny");
    let job = match second {
        1 => 1,
        _ => {
            let held = "pavo batch --parsable -o job-%j -H -J third tiny || true";
            site.until("alice", held, "1").trim().parse().unwrap()
        }
    };
    assert_eq!(job, 1);
    let said = site.sh("alice", "pavo status -j 1 2>&1 || true; pavo ps");
    assert!(said.starts_with("error: job 1 waits in Slurm's queue (pending: JobHeld"), "{said}");
    site.sh("alice", "scontrol release 1");
    let said = site.until("alice", "pavo status -j 1 -o ndjson", "running");
    assert!(!said.contains("first"), "{said}");
    site.sh("alice", "scancel -u alice");
    site.ended(1);
    // The site kills before guests that are booting have ended, and the launcher with them.
    site.sh("alice", "pavo status 2>&1 || true");
    site.nothing_left(&before);
}

#[test]
fn without_a_controller_the_list_says_so() {
    let site = Site::with(Options { hosts: 1, etcd: Etcd::One, ..Options::default() });
    site.lab.login().service("slurmctld").unwrap().stop().unwrap();
    let output = site.run("alice", &["pavo", "ps"]);
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    for expected in ["asking Slurm with `squeue`", "scontrol ping"] {
        assert!(output.stderr.contains(expected), "{output:?}");
    }
}
