//! Guests with IPv6: addresses, names, and each other.

use std::net::Ipv6Addr;

use serde_json::Value;

use super::world::{World, world};

const NETWORKS: &str = "
nat:
  type: ethernet
  settings:
    network-layer: L3
    int-network6: auto
    reverse-nat: {vm-port: 22, min-host-port: 60222, max-host-port: 60999}
";

#[test]
fn guests_have_addresses_that_are_known_and_reach_each_other_by_name() {
    world(|world| {
        world.write("site/networks.yaml", NETWORKS);
        let words = ["tiny:2", "--mem", "128", "--wait", "ssh", "-E", "sleep 600"];
        let alloc = world.alloc(&words);
        alloc.wait_for("vm[0-1] answer ssh\n");
        let addresses = known(world);
        let [a, b] = &addresses;
        assert_eq!(a.octets()[0], 0xfd, "{a}");
        assert_eq!(a.segments()[..4], b.segments()[..4]);
        assert_eq!(
            (a.segments()[4..] == [0, 0, 0, 1], b.segments()[4..] == [0, 0, 0, 2]),
            (true, true)
        );
        for (vm, address) in ["vm0", "vm1"].into_iter().zip(&addresses) {
            // It looks for a second whether nobody else has it.
            let expected = format!("inet6 {address}/64 scope global");
            let ask = "ip -6 -o addr show eth0 scope global";
            world.until(&expected, || {
                let said = guest(world, vm, ask);
                assert_eq!(said.lines().count(), 1, "no other: {said}");
                said.contains(&expected) && !said.contains("tentative")
            });
        }
        reach_each_other(world, &addresses);
        what_the_gateway_says(world, &addresses);
        // The way out, names' servers and ssh stay as they were.
        assert!(guest(world, "vm0", "ip route").contains("default via 10.200.255.254"));
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

fn guest(world: &World, vm: &str, command: &str) -> String {
    world.ok(&["ssh", vm, command])
}

/// What `pavo status` tells.
fn known(world: &World) -> [Ipv6Addr; 2] {
    let status: Value = serde_json::from_str(&world.ok(&["status", "-o", "json"])).unwrap();
    [0, 1].map(|vm: usize| {
        let addresses = status[vm]["addresses"].as_array().unwrap();
        assert_eq!(addresses[0], format!("10.200.0.{}", vm + 1));
        assert_eq!(addresses.len(), 2, "{status}");
        addresses[1].as_str().unwrap().parse().unwrap()
    })
}

fn reach_each_other(world: &World, [a, b]: &[Ipv6Addr; 2]) {
    guest(world, "vm0", "ping -6 -c 1 -W 9 vm1");
    guest(world, "vm1", "ping -6 -c 1 -W 9 vm0.pavo.internal");
    guest(world, "vm0", &format!("ping -6 -c 1 -W 9 {b}"));
    let banner = guest(world, "vm1", &format!("nc -w 9 {a} 22 </dev/null | head -n 1"));
    assert!(banner.starts_with("SSH-2.0"), "{banner}");
    // In another's name nothing arrives.
    let mut other = a.octets();
    other[15] = 9;
    let other = Ipv6Addr::from(other);
    let forged = format!(
        "echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip -6 addr add {other}/64 dev eth0
        ping -c 1 -W 3 -I {other} {b}; ip -6 addr del {other}/64 dev eth0"
    );
    let said = guest(world, "vm0", &forged);
    assert!(said.contains("100% packet loss"), "{said}");
}

fn what_the_gateway_says(world: &World, [_, b]: &[Ipv6Addr; 2]) {
    let said = guest(world, "vm0", "nslookup -type=aaaa vm1.pavo.internal 10.200.255.254");
    assert!(said.contains(&b.to_string()), "{said}");
    let said = guest(world, "vm0", &format!("nslookup {b} 10.200.255.254"));
    assert!(said.contains("vm1.pavo.internal"), "{said}");
    let said = guest(world, "vm0", "ping -6 -c 1 -W 9 gateway.pavo.internal");
    assert!(said.contains("ffff:fffe"), "{said}");
    // Its advertisement was heard, as the first solicitation was, and offers no way by it.
    let counters = "grep -E 'Icmp6(In|Out)Router' /proc/net/snmp6";
    world.until("the advertisement", || {
        let said = guest(world, "vm0", counters);
        said.lines()
            .any(|line| line.starts_with("Icmp6InRouterAdvertisements") && !line.ends_with("\t0"))
    });
    let routes = guest(world, "vm0", "ip -6 route");
    assert!(!routes.contains("default"), "{routes}");
}
