//! `pavo alloc` on a login host.

use std::fs;

use pavo_lab::Options;

use super::world::Site;

#[test]
fn a_cluster_on_one_host_answers_ssh_and_leaves_nothing() {
    let site = Site::up(1);
    let before = site.snapshot();
    let argv = ["pavo", "alloc", "-c1", "--wait", "ssh", "-E", "pavo ssh vm1 hostname", "tiny:2"];
    let output = site.run("alice", &argv);
    assert_eq!(output.stdout, "vm1\n", "{output:?}");
    assert!(output.status.success(), "{output:?}");
    site.nothing_left(&before);
}

#[test]
fn a_cluster_on_two_hosts_is_one_network() {
    let site = Site::up(2);
    let before = site.snapshot();
    let script = "set -e; pavo ssh vm0 ping -c1 -W5 vm1 | grep -q '1 packets received'
        pavo status -o json; pavo ps -o ndjson; pavo console -l vm1 | grep -c root; pavo reset vm1";
    let argv = ["pavo", "alloc", "-c1", "-N2", "--wait", "ssh", "-E", script, "tiny:2"];
    let output = site.run("alice", &argv);
    assert!(output.status.success(), "{output:?}");
    let prefix = site.lab.prefix();
    for expected in
        ["\"state\": \"ssh\"", &format!("\"host\": \"{prefix}n2\""), "\"definition\":\"tiny:2\""]
    {
        assert!(output.stdout.contains(expected), "{expected} in {}", output.stdout);
    }
    site.nothing_left(&before);
}

#[test]
fn open_vswitch_carries_a_cluster_over_two_hosts() {
    let site = Site::with(Options { hosts: 2, ovs: true, ..Options::default() });
    let before = site.snapshot();
    // OVS's own datapath drops what it sends to a host whose MAC it does not know yet.
    let script = "pavo ssh vm0 'ping -c1 vm1 >/dev/null; ping -c1 -W5 vm1; nc vm1 22 < /dev/null | head -c 4'";
    let argv = ["pavo", "alloc", "-c1", "-N2", "--wait", "ssh", "-E", script, "tiny:2"];
    let output = site.run("alice", &argv);
    assert!(output.stdout.contains("1 packets received"), "{output:?}");
    assert!(output.stdout.ends_with("SSH-"), "{output:?}");
    site.nothing_left(&before);
    // It cannot be done without where the site demands it.
    site.lab.host("n2").service("ovsdb-server").unwrap().stop().unwrap();
    let batch = fs::read_to_string(site.lab.etc_pavo().join("batch.yaml")).unwrap();
    site.write("batch.yaml", &(batch + "  switch: ovs\n"));
    let output = site.run("alice", &["pavo", "alloc", "-c1", "-N2", "-E", "true", "tiny:2"]);
    assert!(!output.status.success(), "{output:?}");
    assert!(output.stderr.contains("no Open vSwitch"), "{}", output.stderr);
}

#[test]
fn a_host_that_cannot_be_set_up_says_why_and_the_next_job_runs() {
    let site = Site::up(2);
    let before = site.snapshot();
    // Root cannot write there: nothing can be begun.
    site.lab.host("n2").sh("mount -t tmpfs -o ro none /run/pavo").unwrap();
    let argv = ["pavo", "alloc", "-c1", "-N2", "-E", "true", "tiny:2"];
    let output = site.run("alice", &argv);
    assert!(!output.status.success(), "{output:?}");
    let host = format!("host {}n2", site.lab.prefix());
    for expected in [&*host, "/run/pavo", "Read-only file system"] {
        assert!(output.stderr.contains(expected), "{expected} in {}", output.stderr);
    }
    site.lab.host("n2").sh("umount /run/pavo").unwrap();
    site.nothing_left(&before);
    let output = site.run("alice", &["pavo", "alloc", "-c1", "-N2", "-E", "true", "tiny:2"]);
    assert!(output.status.success(), "{output:?}");
    site.nothing_left(&before);
}

#[test]
fn when_salloc_is_killed_the_job_is_given_back() {
    let site = Site::up(1);
    let before = site.snapshot();
    // Between salloc and the launcher, which runs the script, is the supervisor.
    let script = "parent=$(ps -o ppid= -p $PPID); kill -9 $(ps -o ppid= -p $parent); sleep 600";
    let alloc = format!("exec pavo alloc -c1 -E '{script}' tiny:1 2>said");
    let output = site.run("alice", &["sh", "-c", &alloc]);
    assert!(!output.status.success(), "{output:?}");
    site.until("alice", "cat said", "Terminating the cluster (salloc was killed");
    let start = std::time::Instant::now();
    while !site.run("alice", &["squeue", "-h"]).stdout.is_empty() {
        assert!(start.elapsed().as_secs() < 30, "the job is still there");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    site.nothing_left(&before);
}
