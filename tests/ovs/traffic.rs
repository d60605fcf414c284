//! What guests can send, and whom they can reach, over two hosts.

use pavo::config::Layer;

use super::lab::{in_netns, sh};
use super::world::*;

#[test]
fn guests_of_two_hosts_are_on_one_network_at_full_mtu() {
    in_netns(|lab| {
        let nodes = two_hosts(lab);
        let jobs = nodes.each_ref().map(|node| job(node, Layer::L3));
        for (node, job) in nodes.iter().zip(&jobs) {
            node.apply(&job.plan).unwrap();
        }
        let a = Machine::boot(lab, &nodes[0], &jobs[0].nics[0]);
        let a1 = Machine::boot(lab, &nodes[0], &jobs[0].nics[1]);
        let b = Machine::boot(lab, &nodes[1], &jobs[1].nics[1]);
        let ip = |job: &Job, index: usize| job.nics[index].ipv4.as_ref().unwrap().address;
        let _ = (&a1, &b);
        for to in [ip(&jobs[0], 1), ip(&jobs[1], 1), [10, 200, 255, 254].into()] {
            a.sh(&format!("ping -q -c 2 -i 0.1 -W 1 {to} || ping -q -c 3 -W 1 -M do -s 1472 {to}"));
            a.sh(&format!("ping -q -c 3 -i 0.1 -W 2 -M do -s 1472 {to}"));
        }
        let _ = sh(None, "true");
    });
}
