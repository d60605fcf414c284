//! Packets of a job that somebody else writes, on a host of the job.
//!
//! The kernel cuts a datagram of UDP_SEGMENT into many behind all rules, which see the first
//! only. What it looks like must not decide.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use pavo::config::Ethernet;
use pavo::host::netns;

use super::fabric::*;
use super::lab::*;

/// Whether a link hands such a datagram on whole, as between namespaces, or in pieces, as most
/// real ones do.
const LINKS: [&str; 2] = ["on", "off"];
const FIRST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 4789);

/// Two hosts with a guest each, who reach each other.
fn two_hosts(lab: &Lab) -> (Wire, Guest, Guest) {
    let wire = Wire::new(lab, 2);
    let (_, guests) = wire.start(JOB, &Ethernet::default(), &[1, 1]);
    let [a, b] = <[Guest; 2]>::try_from(guests).ok().unwrap();
    a.until(&b, &hello(&b, &a, "ready"));
    (wire, a, b)
}

/// Nobody's packet, and behind it one that `b` seems to have sent to `a`.
fn forged(a: &Guest, b: &Guest) -> [Vec<u8>; 2] {
    let frame = hello(b, a, "forged");
    [vxlan(0x77, &frame), vxlan(KEY, &frame)]
}

/// All that has been sent so far to `a` has arrived, and nothing of it was forged.
fn unharmed(a: &Guest, b: &Guest) {
    let seen = a.until(b, &hello(b, a, "end"));
    assert!(!seen.iter().any(|frame| frame.ends_with(b"forged")), "{seen:02x?}");
}

fn bind(address: [u8; 4]) -> UdpSocket {
    UdpSocket::bind((Ipv4Addr::from(address), 0)).unwrap()
}

#[test]
fn a_program_that_lets_the_kernel_cut_its_packets_writes_none_of_a_job() {
    in_netns(|lab| {
        let (wire, a, b) = two_hosts(lab);
        let (here, there) = (&wire.nodes[0], &wire.nodes[1]);
        for whole in LINKS {
            sh(Some(&there.netns), &format!("ethtool -K underlay tx-udp-segmentation {whole}"));
            let [first, second] = forged(&a, &b);
            // From another host of the job, and from this one.
            for (node, address) in [(there, [192, 0, 2, 2]), (here, [192, 0, 2, 1])] {
                let before = node.counters("ip", JOB);
                let send = || send_in_one(&bind(address), &[&first, &second], FIRST);
                let Some(sent) = as_user(&node.netns, send) else { return };
                unharmed(&a, &b);
                sent.unwrap_err();
                let grown = grown(&before, &node.counters("ip", JOB));
                assert_eq!(grown, [("vxlan-forged".to_owned(), 1)].into());
            }
        }
    });
}

#[test]
fn what_comes_from_a_port_of_users_is_not_believed() {
    in_netns(|lab| {
        let (wire, a, b) = two_hosts(lab);
        // As if its host let everything out.
        let there = &wire.nodes[1].netns;
        sh(Some(there), "nft delete table ip pavo_l3; ethtool -K underlay tx-udp-segmentation off");
        let before = wire.nodes[0].counters("ip", JOB);
        let [first, second] = forged(&a, &b);
        let user = netns::with_netns(there, || bind([192, 0, 2, 2])).unwrap();
        user.send_to(&second, FIRST).unwrap();
        send_in_one(&user, &[&first, &second], FIRST).unwrap();
        unharmed(&a, &b);
        let grown = grown(&before, &wire.nodes[0].counters("ip", JOB));
        assert_eq!(grown, [("vxlan-forged".to_owned(), 2)].into());
    });
}

/// A namespace whose packets a host passes on in its own name, as containers' are.
fn container(lab: &Lab, node: &Node) -> PathBuf {
    let path = lab.host.netns("container");
    netns::create(&path).unwrap();
    let make = format!(
        "ip link add box type veth peer name eth0; ip link set eth0 netns {}
         ip addr add 198.51.100.1/24 dev box; ip link set box up
         sysctl -qw net.ipv4.ip_forward=1
         nft add table ip site
         nft 'add chain ip site nat {{ type nat hook postrouting priority 100; }}'
         nft add rule ip site nat ip saddr 198.51.100.0/24 masquerade",
        path.display()
    );
    sh(Some(&node.netns), &make);
    sh(
        Some(&path),
        "ip addr add 198.51.100.2/24 dev eth0; ip link set eth0 up
         ip route add default via 198.51.100.1",
    );
    path
}

#[test]
fn a_container_on_a_host_of_a_job_writes_no_packets_of_it() {
    in_netns(|lab| {
        let (wire, a, b) = two_hosts(lab);
        let [first, second] = forged(&a, &b);
        for whole in LINKS {
            let node = &wire.nodes[1];
            let inside = container(lab, node);
            sh(Some(&node.netns), &format!("ethtool -K underlay tx-udp-segmentation {whole}"));
            let before = node.counters("ip", JOB);
            // Its root has ports that users of hosts do not have.
            let socket = socket(&inside, [198, 51, 100, 2], 600);
            socket.send_to(b"here I am", (FIRST.ip().to_owned(), 9)).unwrap();
            send_in_one(&socket, &[&first, &second], FIRST).unwrap();
            unharmed(&a, &b);
            assert_eq!(grown(&before, &node.counters("ip", JOB)).values().sum::<u64>(), 1);
            sh(Some(&node.netns), "ip link del box; nft delete table ip site");
            netns::delete(&inside).unwrap();
        }
    });
}

#[test]
fn a_guest_sends_no_vxlan_to_the_outside() {
    in_netns(|lab| {
        let (wire, a, b) = two_hosts(lab);
        let (_, others) = wire.start(4, &Ethernet::default(), &[1, 1]);
        let node = &wire.nodes[1];
        let [_, hostile] = <[Guest; 2]>::try_from(others).ok().unwrap();
        hostile.ping_gateway();
        let before = node.counters("inet", 4);
        // What it says is not looked at.
        let packet = udp(600, 4789, &vxlan(0x77, &hello(&b, &a, "forged")));
        let whole = hostile.to_gateway(*FIRST.ip(), 17, &packet);
        hostile.send(&whole);
        // Cut behind the UDP header.
        for (part, offset) in [(&packet[..8], 0x2000), (&packet[8..], 1_u16)] {
            hostile.send(&fragment(&hostile, part, offset));
        }
        hostile.ping_gateway();
        unharmed(&a, &b);
        assert_eq!(grown(&before, &node.counters("inet", 4))["vxlan"], 2);
    });
}

/// A part of a packet of the guest's to the first host: the flags and offset of its header.
fn fragment(guest: &Guest, part: &[u8], field: u16) -> Vec<u8> {
    let mut packet = ipv4(guest.ip, *FIRST.ip(), 17, part);
    packet[4..8].copy_from_slice(&[&[7, 7][..], &field.to_be_bytes()].concat());
    packet[10..12].fill(0);
    let words = packet[..20].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    ethernet(guest.gateway_mac, guest.mac, 0x0800, &packet)
}

#[test]
fn a_vxlan_of_the_sites_own_carries_everybodys_packets_on() {
    in_netns(|lab| {
        let (wire, ..) = two_hosts(lab);
        for (node, this, other) in [(0, 1, 2), (1, 2, 1)] {
            let make = format!(
                "ip link add site type vxlan id 77 remote 192.0.2.{other} dstport 4789 \
                   local 192.0.2.{this}
                 ip addr add 198.51.100.{this}/24 dev site; ip link set site up"
            );
            sh(Some(&wire.nodes[node].netns), &make);
        }
        let listen = || TcpListener::bind("198.51.100.1:7000").unwrap();
        let listener = netns::with_netns(&wire.nodes[0].netns, listen).unwrap();
        let before: Vec<_> = wire.nodes.iter().map(|node| node.counters("ip", JOB)).collect();
        let limit = Some(Duration::from_secs(20));
        // Much at once: the kernel cuts these, too.
        const SIZE: usize = 1 << 20;
        let client = || {
            let mut stream = TcpStream::connect("198.51.100.1:7000").unwrap();
            stream.set_read_timeout(limit).unwrap();
            stream.set_write_timeout(limit).unwrap();
            stream.write_all(&vec![7; SIZE]).unwrap();
            stream.read_exact(&mut [0; 2]).unwrap();
        };
        std::thread::scope(|scope| {
            let serve = scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(limit).unwrap();
                stream.read_exact(&mut vec![0; SIZE]).unwrap();
                stream.write_all(b"ok").unwrap();
            });
            if as_user(&wire.nodes[1].netns, client).is_some() {
                serve.join().unwrap();
            }
        });
        for (node, before) in wire.nodes.iter().zip(&before) {
            assert_eq!(grown(before, &node.counters("ip", JOB)), [].into());
        }
    });
}
