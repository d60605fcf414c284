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
