//! Guests with several networks, and what DHCP tells them of each.

use super::world::{World, world};

const NETWORKS: &str = "
front:
  type: ethernet
  settings:
    network-layer: L3
    int-network: 10.202.0.0/16
    allow-outbound: none
    domain-name: front.test
    dns-search: [a.test, b.test]
    ntp-server: 192.0.2.123
    reverse-nat: {vm-port: 22, min-host-port: 60222, max-host-port: 60999}
lan:
  type: ethernet
  settings: {network-layer: L2, mac-prefix: '52:54:01'}
back:
  type: ethernet
  settings: {network-layer: L3, int-network: 10.203.0.0/16, domain-name: back.test}
";
const RESOURCES: &str = "
forth: {networks: [lan, front, back], default: true}
back: {networks: [back, lan, front]}
";

#[test]
fn the_first_network_with_addresses_is_the_way_out_and_each_has_its_names() {
    world(|world| {
        world.write("site/networks.yaml", NETWORKS);
        world.write("site/resources.yaml", RESOURCES);
        world.template("other", "resource-set: back");
        let words = ["tiny:1,other:1", "--mem", "128", "--wait", "ssh", "-E", "sleep 600"];
        let alloc = world.alloc(&words);
        alloc.wait_for("vm[0-1] answer ssh\n");
        interfaces_are_in_order(world);
        what_dhcp_tells(world);
        names_and_frames_go_where_they_belong(world);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

fn guest(world: &World, vm: &str, command: &str) -> String {
    world.ok(&["ssh", vm, command])
}

fn interfaces_are_in_order(world: &World) {
    for (vm, addresses, default) in [
        ("vm0", ["", "10.202.0.1/16", "10.203.0.1/16"], "via 10.202.255.254 dev eth1"),
        ("vm1", ["10.203.0.2/16", "", "10.202.0.2/16"], "via 10.203.255.254 dev eth0"),
    ] {
        // ssh answers once the first interface has asked.
        for (index, expected) in addresses.iter().enumerate().filter(|(_, it)| !it.is_empty()) {
            let ask = format!("ip -4 -o addr show eth{index}");
            world.until(expected, || guest(world, vm, &ask).contains(&format!("inet {expected} ")));
        }
        let routes = guest(world, vm, "ip route");
        let defaults: Vec<_> = routes.lines().filter(|line| line.starts_with("default")).collect();
        assert_eq!(defaults.len(), 1, "{vm}: {routes}");
        assert!(defaults[0].contains(default), "{vm}: {routes}");
        let bare = addresses.iter().position(|it| it.is_empty()).unwrap();
        assert_eq!(guest(world, vm, &format!("ip -4 -o addr show eth{bare}")), "", "{vm}");
    }
}

fn what_dhcp_tells(world: &World) {
    let script = "printf '#!/bin/sh\\n[ $1 = bound ] && env\\n' >/tmp/show; chmod +x /tmp/show
        udhcpc -f -q -n -i eth1 -O ntpsrv -O search -s /tmp/show 2>/dev/null";
    let told = guest(world, "vm0", script);
    for line in [
        "ntpsrv=192.0.2.123",
        "search=a.test b.test",
        "domain=front.test",
        "dns=10.202.255.254",
        "router=10.202.255.254",
    ] {
        assert!(told.lines().any(|said| said == line), "{line}: {told}");
    }
    let told = guest(world, "vm0", &script.replace("eth1", "eth2"));
    assert!(told.contains("domain=back.test\n"), "{told}");
    assert!(!told.contains("router="), "{told}");
}

fn names_and_frames_go_where_they_belong(world: &World) {
    for (server, name, address) in [
        ("10.202.255.254", "vm1.front.test", "10.202.0.2"),
        ("10.203.255.254", "vm1.back.test", "10.203.0.2"),
    ] {
        let said = guest(world, "vm0", &format!("nslookup {name} {server}"));
        assert!(said.contains(address), "{said}");
        guest(world, "vm0", &format!("ping -c 1 -W 5 {address}"));
    }
    // Nothing outside has a name where there is no way out.
    let outside = world.pavo(&["ssh", "vm0", "nslookup example.org 10.202.255.254"]);
    assert_ne!(outside.code, Some(0), "{outside}");
    assert!(outside.stdout.contains("REFUSED"), "{outside}");
    // What has no addresses is a wire of its own.
    guest(world, "vm0", "ip addr add 192.168.7.1/24 dev eth0");
    guest(world, "vm1", "ip addr add 192.168.7.2/24 dev eth1; ip link set eth1 up");
    guest(world, "vm0", "ip link set eth0 up; ping -c 1 -W 5 192.168.7.2");
    // Any port, also where it is not the first network that listens.
    let banner = world.pavo(&["nc", "vm1", "22"]);
    assert!(banner.stdout.starts_with("SSH-2.0"), "{banner}");
}
