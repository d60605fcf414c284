//! `pavo alloc` on a login host.

use super::world::Site;

#[test]
fn a_cluster_on_one_host_answers_ssh_and_leaves_nothing() {
    let site = Site::up(1);
    let argv = ["pavo", "alloc", "-c1", "--wait", "ssh", "-E", "pavo ssh vm1 hostname", "tiny:2"];
    let output = site.run("alice", &argv);
    eprintln!("{output:?}");
    assert_eq!(output.stdout, "vm1\n");
}

#[test]
fn a_cluster_on_two_hosts_is_one_network() {
    let site = Site::up(2);
    let script =
        "pavo ssh vm0 ping -c1 -W5 vm1 && pavo status && pavo ps && pavo console -l vm1 | tail -3";
    let argv = ["pavo", "alloc", "-c1", "-N2", "--wait", "ssh", "-E", script, "tiny:2"];
    let output = site.run("alice", &argv);
    eprintln!("{}\n{}", output.stdout, output.stderr);
    assert!(output.status.success());
}
