//! What guests can send, and whom they can reach, over two hosts.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use pavo::host::netns;
use pavo::model::address::Mac;
use pavo::network::Switch;

use super::lab::*;
use super::world::*;

#[test]
fn guests_of_two_hosts_are_on_one_network_at_full_mtu() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("net", l3())]);
        let a = Machine::boot(lab, &nodes[0], &jobs[0].nics[0]);
        let near = Machine::boot(lab, &nodes[0], &jobs[0].nics[1]);
        let far = Machine::boot(lab, &nodes[1], &jobs[1].nics[1]);
        let gateway = nodes[0].host.netns(NAMESPACE);
        for to in [near.ip, far.ip, GATEWAY] {
            // The first one is lost while the hosts find each other on the underlay.
            a.sh(&format!("ping -q -c 1 -w 10 {to}"));
            a.sh(&format!("ping -q -c 3 -i 0.1 -W 5 -M do -s 1472 {to}"));
        }
        for (netns, to) in [(&near.netns, near.ip), (&far.netns, far.ip)] {
            transfer(&a.netns, netns, to);
        }
        transfer(&a.netns, &gateway, GATEWAY);
        transfer(&gateway, &a.netns, a.ip);
        // Nobody but the bridges answered ARP, and all of them the truth.
        let neighbours = a.sh("ip -4 neigh show dev eth0");
        for (address, mac) in [(near.ip, &near.mac), (far.ip, &far.mac)] {
            let line = format!("{address} lladdr {mac}");
            assert!(neighbours.contains(&line), "{line}: {neighbours}");
        }
    });
}

#[test]
fn hosts_have_found_each_other_before_a_guest_sends() {
    with_ovs(|lab| {
        let (nodes, _) = started(lab, &[("net", l3())]);
        for (node, other) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
            let control = node.host.ovs_dir().join("vswitchd.ctl");
            let ask = format!("ovs-appctl -t {} tnl/neigh/show", control.display());
            let other = other.address().to_string();
            eventually(|| node.sh(&ask).split_whitespace().any(|w| w == other).then_some(()));
        }
    });
}

#[test]
fn a_host_with_the_linux_bridge_is_a_peer_like_any_other() {
    with_ovs(|lab| {
        let nodes = wired(lab);
        nodes[0].underlay();
        nodes[1].sh("ip link set eth1 up; ip addr add 10.98.0.2/24 dev eth1");
        // Real links finish checksums that the kernel leaves to them.
        nodes[1].sh("ethtool -K eth1 tx off");
        let networks = [("net", l3())];
        let jobs = [job(&nodes[0], &networks), job_on(&nodes[1], &networks, Switch::Linux)];
        for (node, job) in nodes.iter().zip(&jobs) {
            node.apply(&job.plan).unwrap();
        }
        let a = Machine::boot(lab, &nodes[0], &jobs[0].nics[0]);
        let b = Machine::boot(lab, &nodes[1], &jobs[1].nics[0]);
        for (from, to) in [(&a, &b), (&b, &a)] {
            from.sh(&format!("ping -q -c 1 -w 10 {}", to.ip));
            from.sh(&format!("ping -q -c 3 -i 0.1 -W 5 -M do -s 1472 {}", to.ip));
            transfer(&from.netns, &to.netns, to.ip);
        }
        // What is for all is for those, too.
        for (from, to) in [(&a, &b), (&b, &a)] {
            let bind = || std::net::UdpSocket::bind("0.0.0.0:7000").unwrap();
            let [sender, heard] = [from, to].map(|m| netns::with_netns(&m.netns, bind).unwrap());
            sender.set_broadcast(true).unwrap();
            sender.send_to(b"to all", "10.200.255.255:7000").unwrap();
            heard.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            assert_eq!(heard.recv_from(&mut [0; 10]).unwrap().0, 6);
        }
    });
}

/// Two megabytes each way.
fn transfer(client: &Path, server: &Path, to: Ipv4Addr) {
    const SIZE: usize = 2 << 20;
    let limit = Some(Duration::from_secs(20));
    let listener = netns::with_netns(server, || TcpListener::bind((to, 53))).unwrap().unwrap();
    let serve = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(limit).unwrap();
        stream.set_write_timeout(limit).unwrap();
        let mut got = vec![0; SIZE];
        stream.read_exact(&mut got).unwrap();
        stream.write_all(&got).unwrap();
    });
    let address = SocketAddr::from((to, 53));
    let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(20));
    let mut stream = netns::with_netns(client, connect).unwrap().unwrap();
    stream.set_read_timeout(limit).unwrap();
    stream.set_write_timeout(limit).unwrap();
    let sent: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8).collect();
    stream.write_all(&sent).unwrap();
    let mut back = vec![0; SIZE];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(sent, back);
    serve.join().unwrap();
}

const MULTICAST: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const FORGED: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];

/// A datagram from one guest to another, as it must be.
fn hello(from: &Guest, to: &Guest, text: &str) -> Vec<u8> {
    let packet = ipv4(from.ip, to.ip, 17, &udp(1000, 1000, text.as_bytes()));
    ethernet(to.mac, from.mac, 0x0800, &packet)
}

/// A fragment: its offset in units of eight bytes, and whether more follow.
fn fragment(mut packet: Vec<u8>, offset: u16, more: bool) -> Vec<u8> {
    let field = offset | if more { 0x2000 } else { 0 };
    packet[6..8].copy_from_slice(&field.to_be_bytes());
    packet[10..12].fill(0);
    let words = packet[..20].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Frames that must not leave the guest `a`, each with the rule that stops it.
fn spoofed(a: &Guest, b: &Guest) -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let other: Ipv4Addr = [10, 200, 0, 99].into();
    let zero = Ipv4Addr::UNSPECIFIED;
    let datagram = |from, sport, dport| ipv4(from, b.ip, 17, &udp(sport, dport, b"x"));
    let to_b = |mac, payload: &[u8]| ethernet(b.mac, mac, 0x0800, payload);
    let tagged = |kind: u16, inner: &[u8]| {
        ethernet(b.mac, a.mac, kind, &[&[0, 7, 8, 0][..], inner].concat())
    };
    let router_advertisement = {
        let payload = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        let link_local = |last| [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
        let head = [&[0x60, 0, 0, 0, 0, 16, 58, 255][..], &link_local(1), &link_local(2)];
        ethernet(MULTICAST, a.mac, 0x86dd, &[head.concat(), payload.to_vec()].concat())
    };
    let mut long_arp = arp(1, a.mac, a.mac, a.ip, BROADCAST, b.ip);
    long_arp[18] = 8;
    let answer_in_parts = fragment(datagram(a.ip, 67, 68), 0, true);
    vec![
        ("another's MAC", "source-mac", to_b(b.mac, &datagram(a.ip, 1, 1))),
        ("a made-up MAC", "source-mac", to_b(FORGED, &datagram(a.ip, 1, 1))),
        ("the gateway's MAC", "source-mac", to_b(a.gateway_mac, &datagram(a.ip, 1, 1))),
        ("another's address", "source-address", to_b(a.mac, &datagram(b.ip, 1, 1))),
        ("a made-up address", "source-address", to_b(a.mac, &datagram(other, 1, 1))),
        ("the gateway's address", "source-address", to_b(a.mac, &datagram(a.gateway, 1, 1))),
        ("no address, but not DHCP", "source-address", to_b(a.mac, &datagram(zero, 1, 1))),
        ("no address, DHCP to one guest", "source-address", to_b(a.mac, &datagram(zero, 68, 67))),
        ("half an IPv4 header", "source-address", to_b(a.mac, &[0x45; 6])),
        ("ARP for another's address", "arp", arp(2, a.mac, a.mac, b.ip, BROADCAST, b.ip)),
        ("ARP for the gateway", "arp", arp(2, a.mac, a.mac, a.gateway, b.mac, b.ip)),
        ("ARP with another's MAC inside", "arp", arp(1, a.mac, b.mac, a.ip, BROADCAST, b.ip)),
        ("a probe with another's MAC", "arp", arp(1, a.mac, b.mac, zero, BROADCAST, b.ip)),
        ("an answer without address", "arp", arp(2, a.mac, a.mac, zero, b.mac, b.ip)),
        ("ARP of odd lengths", "arp", long_arp),
        ("ARP in a forged frame", "source-mac", arp(1, FORGED, FORGED, a.ip, BROADCAST, b.ip)),
        ("a DHCP answer", "dhcp-server", to_b(a.mac, &datagram(a.ip, 67, 68))),
        ("a DHCP answer from another port", "dhcp-server", to_b(a.mac, &datagram(a.ip, 5, 68))),
        ("a DHCP server's relay", "dhcp-server", to_b(a.mac, &datagram(a.ip, 67, 67))),
        ("a DHCP answer in fragments", "dhcp-server", to_b(a.mac, &answer_in_parts)),
        ("a router advertisement", "ipv6", router_advertisement),
        ("a VLAN tag", "vlan", tagged(0x8100, &datagram(b.ip, 1, 1))),
        ("a service tag", "vlan", tagged(0x88a8, &datagram(b.ip, 1, 1))),
        ("another protocol", "ethertype", ethernet(b.mac, a.mac, 0x88b5, b"x")),
    ]
}

/// Waits until these counters, and no others, have grown by so much: ovs-vswitchd counts now
/// and then.
fn grows(node: &Node, before: &Counters, expected: &[(&str, u64)]) {
    let quiet = ["gateway", "unknown-address"];
    let expected: Counters =
        expected.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let mut grown = grown(before, &node.counters());
        grown.retain(|name, _| !quiet.contains(&name.as_str()));
        if grown == expected {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{grown:?} is not {expected:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The guests of both hosts: of the first, of the second.
fn guests(nodes: &[Node; 2], jobs: &[Job; 2]) -> Vec<Guest> {
    let plug = |(node, job): (&Node, &Job)| {
        job.nics.iter().map(|nic| node.inside(|| Guest::plug(nic))).collect::<Vec<_>>()
    };
    nodes.iter().zip(jobs).flat_map(plug).collect()
}

#[test]
fn spoofed_frames_never_arrive_and_their_counter_says_so() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("net", l3())]);
        let all = guests(&nodes, &jobs);
        let (a, near, far) = (&all[0], &all[1], &all[2]);
        let ready = [hello(a, near, "ready"), hello(a, far, "ready")];
        near.until(a, &ready[0]);
        far.until(a, &ready[1]);

        let before = nodes[0].counters();
        let mut expected: Counters = Counters::new();
        let mut frames = Vec::new();
        for b in [near, far] {
            for (_, rule, frame) in spoofed(a, b) {
                a.send(&frame);
                *expected.entry(rule.to_owned()).or_default() += 1;
                *expected.entry("pt42-0".to_owned()).or_default() += 1;
                frames.push(frame);
            }
            // Frames keep their order: what was sent first would be here first.
            let seen = b.until(a, &hello(a, b, "end"));
            for frame in frames.drain(..) {
                assert!(!seen.contains(&frame), "{frame:02x?} arrived");
            }
        }
        let expected: Vec<_> =
            expected.iter().map(|(name, count)| (name.as_str(), *count)).collect();
        grows(&nodes[0], &before, &expected);
    });
}

#[test]
fn arp_is_answered_by_the_bridge_and_heard_by_nobody() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("net", l3())]);
        let all = guests(&nodes, &jobs);
        let (a, near, far) = (&all[0], &all[1], &all[2]);
        let zero = Ipv4Addr::UNSPECIFIED;
        let gateway = (a.gateway, a.gateway_mac);
        for (address, mac) in [(near.ip, near.mac), (far.ip, far.mac), gateway] {
            for (asker, to) in [(a.ip, BROADCAST), (a.ip, mac), (zero, BROADCAST)] {
                let answer = arp(2, mac, mac, address, a.mac, asker);
                a.exchange(&arp(1, a.mac, a.mac, asker, to, address), |got| got == answer);
            }
        }
        // About itself, and about nobody: an answer would come before the one after.
        a.send(&arp(1, a.mac, a.mac, a.ip, BROADCAST, a.ip));
        a.send(&arp(1, a.mac, a.mac, zero, BROADCAST, a.ip));
        a.send(&arp(1, a.mac, a.mac, a.ip, BROADCAST, [10, 200, 0, 77].into()));
        let answer = arp(2, near.mac, near.mac, near.ip, a.mac, a.ip);
        let seen = a.exchange(&arp(1, a.mac, a.mac, a.ip, BROADCAST, near.ip), |got| got == answer);
        let about_others =
            |frame: &&Vec<u8>| frame[12..14] == [8, 6] && frame[28..32] != answer[28..32];
        assert_eq!(seen.iter().filter(about_others).count(), 0, "{seen:02x?}");
        for b in [near, far] {
            let seen = b.until(a, &hello(a, b, "end"));
            assert!(seen.iter().all(|frame| frame[12..14] != [8, 6]), "{seen:02x?}");
        }
    });
}

#[test]
fn broadcast_reaches_all_guests_once_and_dhcp_the_own_gateway_only() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("net", l3())]);
        let all = guests(&nodes, &jobs);
        let a = &all[0];
        let servers = nodes.each_ref().map(|node| {
            let bind = || std::net::UdpSocket::bind("0.0.0.0:67");
            let server = netns::with_netns(&node.host.netns(NAMESPACE), bind).unwrap().unwrap();
            server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            server
        });
        all[1..].iter().for_each(|b| drop(b.until(a, &hello(a, b, "ready"))));
        let discover = |from| {
            let packet = ipv4(from, Ipv4Addr::BROADCAST, 17, &udp(68, 67, b"discover"));
            ethernet(BROADCAST, a.mac, 0x0800, &packet)
        };
        let to_all = |text: &str| {
            let packet =
                ipv4(a.ip, [10, 200, 255, 255].into(), 17, &udp(1000, 1000, text.as_bytes()));
            ethernet(BROADCAST, a.mac, 0x0800, &packet)
        };
        // Without an address yet, and when a lease is to be renewed by anybody.
        a.send(&discover(Ipv4Addr::UNSPECIFIED));
        a.send(&discover(a.ip));
        a.send(&to_all("once"));
        for b in &all[1..] {
            let seen = b.until(a, &to_all("end"));
            let text = |frame: &&Vec<u8>| frame.ends_with(b"once");
            assert_eq!(seen.iter().filter(text).count(), 1, "{seen:02x?}");
            assert!(!seen.iter().any(|frame| frame.ends_with(b"discover")), "{seen:02x?}");
        }
        for _ in 0..2 {
            let mut buffer = [0; 100];
            let (length, _) = servers[0].recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"discover");
        }
        servers[1].set_nonblocking(true).unwrap();
        servers[1].recv_from(&mut [0; 100]).expect_err("the other host's server heard of it");
    });
}

/// A frame in VXLAN, as a program on host 2 would send it to host 1.
fn inject(nodes: &[Node; 2], from: Ipv4Addr, key: u32, frame: &[u8]) -> std::io::Result<usize> {
    let socket = nodes[1].inside(|| std::net::UdpSocket::bind((from, 0))).unwrap();
    socket.send_to(&in_vxlan(key, frame), (nodes[0].address(), 4789))
}

fn in_vxlan(key: u32, frame: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0][..], &(key << 8).to_be_bytes(), frame].concat()
}

#[test]
fn a_tunnel_takes_frames_of_its_peers_guests_only_and_only_for_guests_here() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("net", l3())]);
        let all = guests(&nodes, &jobs);
        let (a, far) = (&all[0], &all[2]);
        a.until(far, &hello(far, a, "ready"));
        let stranger = Ipv4Addr::new(10, 98, 0, 99);
        nodes[1].sh("ip addr add 10.98.0.99/24 dev br-phy");
        let peer = nodes[1].address();
        let before = nodes[0].counters();
        let wrong = |mac, ip, text: &str| {
            ethernet(a.mac, mac, 0x0800, &ipv4(ip, a.ip, 17, &udp(1, 1, text.as_bytes())))
        };
        let good = |text: &str| hello(far, a, text);
        // No program on a host of the job can write frames of the job …
        for from in [peer, stranger] {
            let refused = inject(&nodes, from, KEY, &good("forged")).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        }
        // … nor hide them behind one of nobody's, for the kernel to cut …
        let parts = [KEY + 9, KEY].map(|key| in_vxlan(key, &good("forged")));
        let to = std::net::SocketAddrV4::new(nodes[0].address(), 4789);
        let cut = || {
            let socket = std::net::UdpSocket::bind((peer, 0)).unwrap();
            send_in_one(&socket, &[&parts[0], &parts[1]], to)
        };
        let refused = as_user(&nodes[1].netns, cut).unwrap().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        // … but another host could, and this one, were it not of the job.
        nodes[1].sh("nft delete table ip pavo_42");
        inject(&nodes, stranger, KEY, &good("wrong host")).unwrap();
        inject(&nodes, peer, KEY + 1, &good("wrong key")).unwrap();
        inject(&nodes, peer, KEY, &wrong(FORGED, far.ip, "wrong MAC")).unwrap();
        inject(&nodes, peer, KEY, &wrong(all[1].mac, all[1].ip, "a guest of this host")).unwrap();
        inject(&nodes, peer, KEY, &wrong(far.mac, all[3].ip, "wrong address")).unwrap();
        inject(&nodes, peer, KEY, &arp(2, far.mac, far.mac, far.ip, a.mac, a.ip)).unwrap();
        let tagged = [&[0, 7, 8, 0][..], &good("tagged")[14..]].concat();
        inject(&nodes, peer, KEY, &ethernet(a.mac, far.mac, 0x8100, &tagged)).unwrap();
        let dhcp = ipv4(far.ip, a.ip, 17, &udp(67, 68, b"dhcp"));
        inject(&nodes, peer, KEY, &ethernet(a.mac, far.mac, 0x0800, &dhcp)).unwrap();
        let to_gateway = ipv4(far.ip, a.gateway, 17, &udp(1, 53, b"gateway"));
        inject(&nodes, peer, KEY, &ethernet(a.gateway_mac, far.mac, 0x0800, &to_gateway)).unwrap();
        // Host 1 would send it back to host 2.
        inject(&nodes, peer, KEY, &hello(far, &all[3], "through")).unwrap();
        let seen = a.until(far, &good("end"));
        assert_eq!(seen.len(), 0, "{seen:02x?}");
        let expected = [("tunnel-source", 7), ("tunnel-destination", 2)];
        grows(&nodes[0], &before, &expected);
        let seen = all[3].until(far, &hello(far, &all[3], "end"));
        assert!(!seen.iter().any(|frame| frame.ends_with(b"through")), "{seen:02x?}");
    });
}

#[test]
fn layer_2_carries_any_protocol_between_hosts_but_pins_the_mac() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("raw", l2())]);
        let all = guests(&nodes, &jobs);
        let (a, near, far) = (&all[0], &all[1], &all[2]);
        let plain = |to: [u8; 6], text: &str| ethernet(to, a.mac, 0x88b5, text.as_bytes());
        near.until(a, &plain(near.mac, "ready"));
        far.until(a, &plain(far.mac, "ready"));
        let before = nodes[0].counters();
        for b in [near, far] {
            a.send(&ethernet(b.mac, b.mac, 0x88b5, b"forged"));
            a.send(&ethernet(b.mac, FORGED, 0x88b5, b"forged"));
        }
        a.send(&plain(FORGED, "to nobody"));
        for b in [near, far] {
            b.until(a, &ethernet(b.mac, a.mac, 0x8100, &[0, 7, 0x88, 0xb5, 1, 2, 3]));
        }
        for b in &all[1..] {
            let seen = b.until(a, &plain(b.mac, "end"));
            assert!(!seen.iter().any(|frame| frame.ends_with(b"forged")), "{seen:02x?}");
            assert!(!seen.iter().any(|frame| frame.ends_with(b"nobody")), "{seen:02x?}");
        }
        let faults = [("source-mac", 4), ("pt42-0", 4), ("unknown-destination", 1)];
        grows(&nodes[0], &before, &faults);
        for to in [BROADCAST, MULTICAST] {
            a.send(&plain(to, "once"));
            for b in &all[1..] {
                let seen = b.until(a, &plain(b.mac, "end"));
                let once = seen.iter().filter(|frame| frame.ends_with(b"once"));
                assert_eq!(once.count(), 1, "{seen:02x?}");
            }
        }
    });
}

#[test]
fn a_vm_on_two_networks_keeps_them_apart() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("left", l3()), ("right", l3())]);
        let all = guests(&nodes, &jobs);
        // Of each VM its NIC on the left, then the one on the right, with the same addresses.
        let [near, far] = [(&all[2], &all[3]), (&all[4], &all[5])];
        for (left, right) in [near, far] {
            let (to_left, to_right) =
                (hello(&all[0], left, "left"), hello(&all[1], right, "right"));
            left.until(&all[0], &to_left);
            let seen = right.until(&all[1], &to_right);
            assert!(!seen.contains(&to_left), "{seen:02x?}");
            let seen = left.until(&all[0], &hello(&all[0], left, "end"));
            assert!(!seen.contains(&to_right), "{seen:02x?}");
        }
    });
}

#[test]
fn nobody_floods_the_other_hosts() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("raw", l2())]);
        let all = guests(&nodes, &jobs);
        let (a, far) = (&all[0], &all[2]);
        far.until(a, &ethernet(far.mac, a.mac, 0x88b5, b"ready"));
        let flood = ethernet(BROADCAST, a.mac, 0x88b5, b"flood");
        eventually(|| {
            for _ in 0..500 {
                a.send(&flood);
            }
            (nodes[0].counters()["broadcast"] > 0).then_some(())
        });
        // To one guest it may still talk.
        far.until(a, &ethernet(far.mac, a.mac, 0x88b5, b"end"));
        assert_eq!(nodes[0].counters()["pt42-0"], 0);
    });
}

#[test]
fn the_hosts_own_stack_neither_hears_guests_nor_talks_to_them() {
    with_ovs(|lab| {
        let (nodes, jobs) = started(lab, &[("net", l3())]);
        let node = &nodes[0];
        let all = guests(&nodes, &jobs);
        let (a, near) = (&all[0], &all[1]);
        near.until(a, &hello(a, near, "ready"));
        node.sh("ip addr add 192.0.2.1/32 dev lo");
        let server = node.inside(|| std::net::UdpSocket::bind("0.0.0.0:7000")).unwrap();
        let text = node.sh("ip -o link show pt42-0");
        let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let mac: Mac = mac.parse().unwrap();
        // As on any link: to the host by its MAC, and the question who has its address.
        for to in [Ipv4Addr::new(192, 0, 2, 1), node.address()] {
            let packet = ipv4(a.ip, to, 17, &udp(1000, 7000, b"forbidden"));
            a.send(&ethernet(mac.0, a.mac, 0x0800, &packet));
            a.send(&ethernet(BROADCAST, a.mac, 0x0800, &packet));
            a.send(&arp(1, a.mac, a.mac, a.ip, BROADCAST, to));
        }
        // Nor does it route for them what is not for itself.
        let outside = ipv4(a.ip, nodes[1].address(), 17, &udp(1000, 7000, b"forbidden"));
        node.sh("sysctl -qw net.ipv4.ip_forward=1");
        let other = nodes[1].inside(|| std::net::UdpSocket::bind("0.0.0.0:7000")).unwrap();
        a.send(&ethernet(mac.0, a.mac, 0x0800, &outside));
        let answer = arp(2, near.mac, near.mac, near.ip, a.mac, a.ip);
        let seen = a.exchange(&arp(1, a.mac, a.mac, a.ip, BROADCAST, near.ip), |got| got == answer);
        assert!(seen.iter().all(|frame| *frame == answer), "{seen:02x?}");
        near.until(a, &hello(a, near, "end"));
        for socket in [server, other] {
            socket.set_nonblocking(true).unwrap();
            socket.recv_from(&mut [0; 100]).expect_err("it was heard");
        }
        let dropped = node.sh("nft list counters table inet pavo_42_ports");
        let dropped = dropped.split("to-host").nth(1).unwrap().split_whitespace();
        let packets: u32 =
            dropped.skip_while(|word| *word != "packets").nth(1).unwrap().parse().unwrap();
        assert!(packets >= 5, "{packets}");
    });
}
