//! What can be done to hosts and daemons, and that it is felt.

use std::path::Path;
use std::time::{Duration, Instant};

use pavo_lab::{Etcd, Host, Lab, Options, can_run};

fn reaches(from: &Host, to: &Host) -> bool {
    let address = to.address().to_string();
    from.run(None, &["ping", "-c1", "-W1", &address]).unwrap().status.success()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_host_is_cut_off_and_comes_back() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { ovs: true, ..Options::default() }).unwrap();
    let (n1, n2) = (lab.host("n1"), lab.host("n2"));
    n1.cut_off().unwrap();
    assert!(!reaches(n1, n2) && !reaches(n2, n1));
    let under = n1.underlay().unwrap().to_string();
    assert!(n2.run(None, &["ping", "-c1", "-W1", &under]).unwrap().ok().is_err());
    assert!(reaches(n2, lab.host("n3")), "others are not");
    assert!(n1.service("slurmd").unwrap().pid().is_some(), "it goes on");

    n1.reconnect().unwrap();
    until("it is not back", || reaches(n2, n1));
    n2.run(None, &["ping", "-c1", "-W5", &under]).unwrap().ok().unwrap();
    lab.login().run(Some("alice"), &["srun", "-N3", "true"]).unwrap().ok().unwrap();
}

#[test]
fn a_host_dies_and_restarts_as_after_a_reboot() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { ovs: true, ..Options::default() }).unwrap();
    let n1 = lab.host("n1");
    n1.sh("touch /run/fresh /tmp/fresh /var/kept").unwrap();
    let mut sleep = n1.command(Some("alice"), &["sleep", "1000"]).unwrap().spawn().unwrap();
    let old = n1.pid().unwrap();

    n1.kill().unwrap();
    assert!(!n1.is_up() && n1.processes().is_err());
    assert!(!Path::new(&format!("/proc/{old}")).exists());
    assert!(!sleep.wait().unwrap().success());
    assert!(!reaches(lab.host("n2"), n1));
    assert!(n1.run(None, &["true"]).unwrap_err().to_string().ends_with("n1 is down"));

    n1.restart().unwrap();
    assert_eq!(
        n1.sh("ls /run/fresh /tmp/fresh /var/kept 2>/dev/null; true").unwrap(),
        "/var/kept\n"
    );
    until("it is not reached", || reaches(lab.host("n2"), n1));
    lab.wait_idle().unwrap();
    lab.login().run(Some("alice"), &["srun", "-N3", "true"]).unwrap().ok().unwrap();
    let under = n1.underlay().unwrap().to_string();
    lab.host("n2").run(None, &["ping", "-c1", "-W5", &under]).unwrap().ok().unwrap();
    n1.restart().unwrap();
}

#[test]
fn nothing_of_a_job_is_left_on_a_host_that_died_with_it() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { hosts: 1, ..Options::default() }).unwrap();
    let n1 = lab.host("n1");
    let before = lab.leaks("n1").unwrap();
    let argv = ["srun", "-N1", "sh", "-c", "touch /tmp/left; sleep 1000"];
    let mut srun = lab.login().command(Some("alice"), &argv).unwrap().spawn().unwrap();
    let file = n1.root().unwrap().join("tmp/left");
    until("the job does not start", || file.exists());
    n1.kill().unwrap();
    // Slurm would find out in half a minute.
    lab.login().sh(&format!("scontrol update node={} state=down reason=dead", n1.name())).unwrap();
    lab.wait_state("n1", &["down"]).unwrap();
    until("the job goes on without the host", || srun.try_wait().unwrap().is_some());
    n1.restart().unwrap();
    lab.settled("n1", &before, Duration::from_secs(60)).unwrap();
    lab.wait_idle().unwrap();
}

#[test]
fn the_login_host_restarts_and_jobs_are_remembered() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { hosts: 1, ..Options::default() }).unwrap();
    let job = ["sbatch", "-o", "said", "--wrap", "sleep 1000"];
    lab.login().run(Some("alice"), &job).unwrap().ok().unwrap();
    lab.wait_state("n1", &["mix", "alloc"]).unwrap();
    // Not killed: the controller would not have written what it knows.
    lab.login().restart().unwrap();
    lab.wait_state("n1", &["mix", "alloc"]).unwrap();
    let queue = lab.login().run(None, &["squeue", "-h", "-o", "%u %T"]).unwrap().ok().unwrap();
    assert_eq!(queue.trim(), "alice RUNNING");
}

#[test]
fn a_host_that_hangs_does_nothing_until_it_goes_on() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { hosts: 2, ..Options::default() }).unwrap();
    let n1 = lab.host("n1");
    let beat = "while :; do date +%s%N >/tmp/beat; sleep 0.02; done";
    let mut beating = n1.command(None, &["sh", "-c", beat]).unwrap().spawn().unwrap();
    let file = n1.root().unwrap().join("tmp/beat");
    let read = || std::fs::read_to_string(&file).unwrap_or_default();
    until("no beat", || !read().is_empty());

    n1.pause().unwrap();
    let last = read();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(read(), last);
    n1.resume().unwrap();
    until("it does not go on", || read() != last);
    beating.kill().unwrap();
    beating.wait().unwrap();
    until("it outlives its command", || {
        n1.processes().unwrap().iter().all(|process| process.name != "sh")
    });

    // One that is paused can die, too.
    n1.pause().unwrap();
    n1.kill().unwrap();
}

#[test]
fn daemons_are_killed_paused_and_started_again() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { hosts: 1, ovs: true, ..Options::default() }).unwrap();
    let n1 = lab.host("n1");
    for (host, name) in [
        (lab.login(), "slurmctld"),
        (n1, "slurmd"),
        (n1, "munged"),
        (n1, "ovs-vswitchd"),
        (n1, "ovsdb-server"),
    ] {
        let service = host.service(name).unwrap();
        let first = service.pid().unwrap();
        assert!(service.start().is_err(), "{name} runs twice");
        service.kill().unwrap();
        assert_eq!(service.pid(), None);
        assert!(service.stop().is_err());
        service.start().unwrap();
        assert_ne!(service.pid().unwrap(), first);
        service.restart().unwrap();
    }
    lab.wait_idle().unwrap();
    lab.login().run(Some("alice"), &["srun", "true"]).unwrap().ok().unwrap();

    let controller = lab.login().service("slurmctld").unwrap();
    controller.pause().unwrap();
    let patience = Duration::from_secs(1);
    assert!(lab.login().run_within(patience, None, &["sinfo"]).is_err());
    controller.resume().unwrap();
    lab.login().run(None, &["sinfo"]).unwrap().ok().unwrap();
    assert!(n1.service("slurmctld").is_err(), "it is not there");
}

#[test]
fn the_store_outlives_one_member_but_not_two() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { hosts: 0, etcd: Etcd::Three, slurmd: false, ..Options::default() })
        .unwrap();
    // Each its own key: what nobody waited for any longer may still be written later.
    let put = |key| lab.etcdctl(&["--command-timeout=1s", "put", key, "written"]);
    put("1").unwrap();

    lab.host("e1").kill().unwrap();
    until("no new leader", || put("2").is_ok());
    lab.host("e2").cut_off().unwrap();
    assert!(put("3").is_err());
    lab.host("e1").restart().unwrap();
    until("no majority", || put("4").is_ok());
    lab.host("e2").reconnect().unwrap();
    lab.wait_store().unwrap();

    let etcd = lab.host("e3").service("etcd").unwrap();
    etcd.pause().unwrap();
    until("no majority", || put("5").is_ok());
    etcd.resume().unwrap();
    lab.wait_store().unwrap();
    assert_eq!(lab.etcdctl(&["get", "--print-value-only", "5"]).unwrap(), "written\n");
}
