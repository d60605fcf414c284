//! One job on several hosts: namespaces that a switch joins, the underlay.

use std::net::{Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pavo::config::{Ethernet, Layer};
use pavo::host::netns;
use pavo::model::owner::Owner;
use pavo::network::{NetworkPlan, Request, plan};

use super::lab::*;

pub(super) const JOB: u32 = 3;
/// That of job 3 on its first network.
pub(super) const KEY: u32 = 0x301;

/// A namespace with a journal of its own.
pub(super) struct Node {
    pub(super) netns: PathBuf,
    dir: PathBuf,
}

/// Hosts 192.0.2.1, .2 …, and a stranger, .99.
pub(super) struct Wire {
    pub(super) nodes: Vec<Node>,
    pub(super) stranger: PathBuf,
    /// Where their links meet: all that is sent can be seen.
    netns: PathBuf,
}

impl Wire {
    pub(super) fn new(lab: &Lab, hosts: u8) -> Self {
        let namespace = |name: &str| {
            let path = lab.host.netns(name);
            netns::create(&path).unwrap();
            sh(Some(&path), "ip link set lo up");
            path
        };
        let wire = namespace("wire");
        sh(Some(&wire), "ip link add wire type bridge; ip link set wire up");
        let join = |name: &str, number: u8| {
            let path = namespace(name);
            let make = format!(
                "ip link add underlay type veth peer name {name}
                 ip link set {name} netns {}
                 ip addr add 192.0.2.{number}/24 dev underlay; ip link set underlay up",
                wire.display()
            );
            sh(Some(&path), &make);
            sh(Some(&wire), &format!("ip link set {name} up master wire"));
            path
        };
        let node = |number: u8| {
            let netns = join(&format!("n{number}"), number + 1);
            Node { netns, dir: lab.dir.join(format!("n{number}")) }
        };
        Self { nodes: (0..hosts).map(node).collect(), stranger: join("stranger", 99), netns: wire }
    }

    /// Starts a job with so many VMs on each host; its plans and guests, in the order of ranks.
    pub(super) fn start(
        &self,
        job: u32,
        network: &Ethernet,
        vms: &[u32],
    ) -> (Vec<NetworkPlan>, Vec<Guest>) {
        let (mut plans, mut guests) = (Vec::new(), Vec::new());
        for (this, node) in self.nodes.iter().enumerate().take(vms.len()) {
            let request = request(job, 0, &[("net", network.clone())]);
            let plan = node.start(&across(request, this, vms));
            guests.extend(node.on(|_| {
                plan.nics.iter().map(|(_, nics)| Guest::plug(&nics[0])).collect::<Vec<_>>()
            }));
            plans.push(plan);
        }
        (plans, guests)
    }

    /// Counts frames in VXLAN packets on the wire whose bits at an offset, counted from the
    /// UDP header, are so.
    fn watch(&self, what: &[(&str, u32, u32, u64)]) {
        let rules: Vec<_> = what
            .iter()
            .map(|(name, offset, length, value)| {
                format!(
                    "add counter bridge watch {name}
                     add rule bridge watch f udp dport 4789 @th,{offset},{length} {value} counter name {name}"
                )
            })
            .collect();
        let table = format!(
            "nft -f - <<'END'
             add table bridge watch
             add chain bridge watch f {{ type filter hook forward priority 0; }}
             {}\nEND",
            rules.join("\n")
        );
        sh(Some(&self.netns), &table);
    }

    fn watched(&self) -> Counters {
        counters(Some(&self.netns), "bridge", "watch")
    }
}

impl Node {
    fn on<T: Send>(&self, work: impl FnOnce(&Lab) -> T + Send) -> T {
        netns::with_netns(&self.netns, || work(&Lab::new(&self.dir))).unwrap()
    }

    fn start(&self, request: &Request) -> NetworkPlan {
        let plan = plan(request).unwrap();
        self.on(|lab| lab.apply(&plan.plan)).unwrap();
        plan
    }

    /// What a job counted, on the underlay (`ip`) or in its switch (`bridge`).
    pub(super) fn counters(&self, family: &str, job: u32) -> Counters {
        counters(Some(&self.netns), family, &format!("pavo_{}", Owner::local(job)))
    }
}

/// The counters that grew, but for what kernels say to each other on their own.
fn faults(before: &Counters, after: &Counters) -> Counters {
    let mut grown = grown(before, after);
    grown.retain(|name, _| !["to-host", "from-host", "to-others"].contains(&name.as_str()));
    grown
}

pub(super) fn hello(from: &Guest, to: &Guest, text: &str) -> Vec<u8> {
    let packet = ipv4(from.ip, to.ip, 17, &udp(1000, 1000, text.as_bytes()));
    ethernet(to.mac, from.mac, 0x0800, &packet)
}

/// A VXLAN packet's payload.
pub(super) fn vxlan(key: u32, frame: &[u8]) -> Vec<u8> {
    let [_, key @ ..] = key.to_be_bytes();
    [&[8, 0, 0, 0][..], &key, &[0], frame].concat()
}

pub(super) fn socket(netns: &Path, address: [u8; 4], port: u16) -> UdpSocket {
    let bind = || UdpSocket::bind((Ipv4Addr::from(address), port));
    netns::with_netns(netns, bind).unwrap().unwrap()
}

/// Bits of a frame in a VXLAN packet, counted from the UDP header.
const TARGET: (u32, u32) = (128, 48);
const SOURCE: (u32, u32) = (176, 48);
const ETHERTYPE: (u32, u32) = (224, 16);
/// Of IPv4 without options, and UDP in it.
const TO_PORT: (u32, u32) = (128 + 112 + 160 + 16, 16);

fn number(mac: [u8; 6]) -> u64 {
    mac.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[test]
fn guests_of_three_hosts_reach_each_other_with_full_packets() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 3);
        let before: Vec<_> = wire.nodes.iter().map(|node| node.on(Lab::traces)).collect();
        for layer in [Layer::L3, Layer::L2] {
            let network = Ethernet { layer, ..Ethernet::default() };
            let (plans, guests) = wire.start(JOB, &network, &[2, 1, 1]);
            let counted: Vec<_> = wire.nodes.iter().map(|n| n.counters("ip", JOB)).collect();
            for from in &guests {
                for to in guests.iter().filter(|to| to.mac != from.mac) {
                    // 1450 bytes of packet: 20 and 8 of headers.
                    let text = format!("{:?} to {:?} {}", from.mac, to.mac, "x".repeat(1450));
                    to.until(from, &hello(from, to, &text[..1422]));
                }
            }
            for (node, counted) in wire.nodes.iter().zip(counted) {
                assert_eq!(grown(&counted, &node.counters("ip", JOB)), [].into());
            }
            assert!(plans.iter().flat_map(|plan| &plan.nics).all(|(_, nics)| nics[0].mtu == 1450));
            for (node, plan) in wire.nodes.iter().zip(&plans) {
                node.on(|lab| lab.undo(plan.plan.owner)).unwrap();
            }
            let after: Vec<_> = wire.nodes.iter().map(|node| node.on(Lab::traces)).collect();
            assert_eq!(before, after);
        }
    });
}

#[test]
fn arp_is_answered_by_the_own_host_and_never_on_the_wire() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 2);
        let (_, guests) = wire.start(JOB, &Ethernet::default(), &[2, 1]);
        let [a, near, far] = <[Guest; 3]>::try_from(guests).ok().unwrap();
        wire.watch(&[
            ("an-arp", ETHERTYPE.0, ETHERTYPE.1, 0x0806),
            ("an-ip", ETHERTYPE.0, ETHERTYPE.1, 0x0800),
        ]);
        let answers = |asked: &Guest| {
            let (mac, ip) = (asked.mac, asked.ip.octets());
            move |got: &[u8]| got[12..14] == [8, 6] && got[22..28] == mac && got[28..32] == ip
        };
        // A port with the lowest of all MACs: bridges like to take it for their own, and then
        // forget whom they answer for.
        let low =
            "ip link add low address 00:00:00:00:00:02 type veth; ip link set low master pbl3-0 up";
        sh(Some(&wire.nodes[0].netns), low);
        // By broadcast as the first time, or by unicast to see whether it is still there.
        for to in [BROADCAST, far.mac] {
            a.exchange(&arp(1, a.mac, a.mac, a.ip, to, far.ip), answers(&far));
        }
        // In nobody's name, and for nobody: not answered, and it stays here.
        a.send(&arp(1, a.mac, a.mac, Ipv4Addr::UNSPECIFIED, BROADCAST, a.ip));
        a.send(&arp(1, a.mac, a.mac, a.ip, BROADCAST, [10, 200, 0, 77].into()));
        near.send(&arp(2, near.mac, near.mac, near.ip, BROADCAST, near.ip));
        a.ping_gateway();
        let seen = far.until(&a, &hello(&a, &far, "end"));
        assert!(!seen.iter().any(|frame| frame[12..14] == [8, 6]), "{seen:02x?}");
        let watched = wire.watched();
        assert_eq!(watched["an-arp"], 0);
        assert!(watched["an-ip"] > 0, "the watch sees what passes");
    });
}

#[test]
fn each_host_is_the_gateway_of_its_own_guests_only() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 2);
        let (plans, guests) = wire.start(JOB, &Ethernet::default(), &[1, 1]);
        let [a, b] = <[Guest; 2]>::try_from(guests).ok().unwrap();
        b.until(&a, &hello(&a, &b, "ready"));
        let gateway = number(a.gateway_mac);
        wire.watch(&[
            ("of-gateway", SOURCE.0, SOURCE.1, gateway),
            ("to-gateway", TARGET.0, TARGET.1, gateway),
            ("to-dhcp", TO_PORT.0, TO_PORT.1, 67),
        ]);
        a.ping_gateway();
        b.ping_gateway();
        // Without an address yet, and later to renew it.
        let zero = Ipv4Addr::UNSPECIFIED;
        let discover = ipv4(zero, Ipv4Addr::BROADCAST, 17, &udp(68, 67, b"discover"));
        let server = socket(&a_gateway(&wire, &plans), [0, 0, 0, 0], 67);
        server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        a.send(&ethernet(BROADCAST, a.mac, 0x0800, &discover));
        let length = server.recv(&mut [0; 2000]).unwrap();
        assert_eq!(length, "discover".len());
        // The gateway's own broadcast is for its own guests.
        server.set_broadcast(true).unwrap();
        server.send_to(b"offer", "10.200.255.255:68").unwrap();
        a.exchange(&hello(&a, &b, "x"), |got| got.ends_with(b"offer"));
        let seen = b.until(&a, &hello(&a, &b, "end"));
        assert!(
            !seen.iter().any(|frame| frame.ends_with(b"discover") || frame.ends_with(b"offer"))
        );
        assert_eq!(wire.watched().values().sum::<u64>(), 0, "{:?}", wire.watched());
        // Names are known of all, leases are for the own.
        let l3 = &plans[0].l3[0];
        let ranks =
            |guests: &[pavo::network::Guest]| guests.iter().map(|g| g.rank).collect::<Vec<_>>();
        assert_eq!((ranks(&l3.guests), ranks(&l3.others)), (vec![0], vec![1]));
        assert_eq!(l3.others[0].address, b.ip);
    });
}

/// The namespace of the first host's gateway.
fn a_gateway(wire: &Wire, plans: &[NetworkPlan]) -> PathBuf {
    wire.nodes[0].dir.join("netns").join(&plans[0].l3[0].namespace)
}

#[test]
fn broadcasts_reach_all_hosts_of_the_job_but_not_without_end() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 3);
        for layer in [Layer::L3, Layer::L2] {
            let network = Ethernet { layer, ..Ethernet::default() };
            let (plans, guests) = wire.start(JOB, &network, &[1, 1, 1]);
            let [a, b, c] = <[Guest; 3]>::try_from(guests).ok().unwrap();
            let packet = ipv4(a.ip, Ipv4Addr::BROADCAST, 17, &udp(1000, 1000, b"to all"));
            let frame = ethernet(BROADCAST, a.mac, 0x0800, &packet);
            b.until(&a, &frame);
            c.until(&a, &frame);
            let before = wire.nodes[0].counters("bridge", JOB);
            let grown = eventually(|| {
                (0..3000).for_each(|_| a.send(&frame));
                let grown = faults(&before, &wire.nodes[0].counters("bridge", JOB));
                grown.contains_key("broadcast").then_some(grown)
            });
            assert_eq!(grown["broadcast"], grown["ptl3-0"]);
            // It did itself no good, and others no harm.
            b.until(&a, &hello(&a, &b, "end"));
            b.until(&c, &hello(&c, &b, "end"));
            for (node, plan) in wire.nodes.iter().zip(&plans) {
                node.on(|lab| lab.undo(plan.plan.owner)).unwrap();
            }
        }
    });
}

#[test]
fn packets_of_strangers_and_frames_of_the_wrong_guests_are_dropped_and_counted() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 3);
        let (_, guests) = wire.start(JOB, &Ethernet::default(), &[2, 1, 1]);
        let [a, near, b, c] = <[Guest; 4]>::try_from(guests).ok().unwrap();
        let node = &wire.nodes[0];
        a.until(&b, &hello(&b, &a, "ready"));
        // What root of the host may do, there and elsewhere.
        let peer = socket(&wire.nodes[1].netns, [192, 0, 2, 2], 600);
        let stranger = socket(&wire.stranger, [192, 0, 2, 99], 600);
        let with = |mac, ip| {
            ethernet(a.mac, mac, 0x0800, &ipv4(ip, a.ip, 17, &udp(1000, 1000, b"forged")))
        };
        let dhcp = ipv4(b.ip, a.ip, 17, &udp(67, 68, b"forged"));
        let tagged = [&[0, 7, 8, 0][..], &ipv4(b.ip, a.ip, 17, b"forged")].concat();
        let (host, inside) = ("vxlan-host", "vxlan-guest");
        let cases: [(&str, &UdpSocket, &[&str], Vec<u8>); 12] = [
            ("a stranger's", &stranger, &[host], hello(&b, &a, "forged")),
            ("half a frame", &peer, &[inside], hello(&b, &a, "")[..9].to_vec()),
            ("a local guest's MAC", &peer, &[inside], with(near.mac, near.ip)),
            ("its own MAC", &peer, &[inside], with(a.mac, a.ip)),
            ("the gateway's MAC", &peer, &[inside], with(a.gateway_mac, a.gateway)),
            ("a guest's of another host", &peer, &[inside], with(c.mac, c.ip)),
            ("a made-up MAC", &peer, &[inside], with([0x52, 0x54, 0, 1, 2, 3], b.ip)),
            ("another's address", &peer, &["source-address", "pxl3-0"], with(b.mac, c.ip)),
            ("the gateway's address", &peer, &["source-address", "pxl3-0"], with(b.mac, a.gateway)),
            ("ARP", &peer, &["arp", "pxl3-0"], arp(2, b.mac, b.mac, b.ip, a.mac, a.ip)),
            (
                "a DHCP answer",
                &peer,
                &["dhcp-server", "pxl3-0"],
                ethernet(a.mac, b.mac, 0x0800, &dhcp),
            ),
            ("a VLAN tag", &peer, &["vlan", "pxl3-0"], ethernet(a.mac, b.mac, 0x8100, &tagged)),
        ];
        for (what, sender, rules, frame) in cases {
            let count = || [node.counters("ip", JOB), node.counters("bridge", JOB)];
            let before = count();
            sender.send_to(&vxlan(KEY, &frame), "192.0.2.1:4789").unwrap();
            let marker = hello(&b, &a, what);
            let seen = a.until(&b, &marker);
            assert!(!seen.contains(&frame), "{what} arrived");
            let after = count();
            let mut grown = faults(&before[0], &after[0]);
            grown.extend(faults(&before[1], &after[1]));
            let expected = rules.iter().map(|rule| ((*rule).to_owned(), 1)).collect();
            assert_eq!(grown, expected, "{what}");
        }
        // Right in every way: that the cases fail for their reason.
        let right = hello(&b, &a, "as it must be");
        peer.send_to(&vxlan(KEY, &right), "192.0.2.1:4789").unwrap();
        a.exchange(&hello(&a, &b, "x"), |got| got == right);
        // To the other host's gateway, as if it were one's own.
        let before = node.counters("bridge", JOB);
        let echo = b.to_gateway(b.gateway, 1, &[8, 0, 0xf7, 0xfd, 0, 1, 0, 1]);
        peer.send_to(&vxlan(KEY, &echo), "192.0.2.1:4789").unwrap();
        a.until(&b, &hello(&b, &a, "end"));
        assert_eq!(grown(&before, &node.counters("bridge", JOB))["to-others"], 1);
    });
}

#[test]
fn neither_users_nor_guests_of_a_host_write_packets_of_a_job() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 2);
        let (_, guests) = wire.start(JOB, &Ethernet::default(), &[1, 1]);
        let (_, others) = wire.start(4, &Ethernet::default(), &[1, 1]);
        let [a, b] = <[Guest; 2]>::try_from(guests).ok().unwrap();
        let [_, hostile] = <[Guest; 2]>::try_from(others).ok().unwrap();
        a.until(&b, &hello(&b, &a, "ready"));
        hostile.ping_gateway();
        let forged = vxlan(KEY, &hello(&b, &a, "forged"));
        let node = &wire.nodes[1];
        let before = node.counters("ip", JOB);
        // A user's program: what it sends carries the host's address.
        let user = socket(&node.netns, [192, 0, 2, 2], 0);
        user.send_to(&forged, "192.0.2.1:4789").unwrap_err();
        // A guest of another job, by its gateway: NAT would give it the host's address.
        let packet = udp(600, 4789, &forged);
        hostile.send(&hostile.to_gateway([192, 0, 2, 1].into(), 17, &packet));
        hostile.ping_gateway();
        // Where the kernel shows bridged frames to these rules, the guest's ends there.
        let forged = grown(&before, &node.counters("ip", JOB))["vxlan-forged"];
        assert_eq!(forged + node.counters("inet", 4)["vxlan"], 2);
        let seen = a.until(&b, &hello(&b, &a, "end"));
        assert!(!seen.iter().any(|frame| frame.ends_with(b"forged")), "{seen:02x?}");
    });
}

#[test]
fn two_jobs_on_the_same_hosts_with_the_same_addresses_do_not_meet() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 2);
        let jobs = [JOB, 4].map(|job| wire.start(job, &Ethernet::default(), &[1, 1]).1);
        let [[a, b], [c, d]] = jobs.map(|guests| <[Guest; 2]>::try_from(guests).ok().unwrap());
        assert_eq!((a.mac, b.ip), (c.mac, d.ip));
        b.until(&a, &hello(&a, &b, "in job 3"));
        let seen = d.until(&c, &hello(&c, &d, "in job 4"));
        assert!(!seen.contains(&hello(&a, &b, "in job 3")));
        let packet = ipv4(a.ip, Ipv4Addr::BROADCAST, 17, &udp(1000, 1000, b"to all"));
        let broadcast = ethernet(BROADCAST, a.mac, 0x0800, &packet);
        b.until(&a, &broadcast);
        let seen = d.until(&c, &hello(&c, &d, "end"));
        assert!(!seen.contains(&broadcast));
        // A host of one job is a stranger to the other.
        let nodes = &wire.nodes;
        let third = request(5, 0, &[("net", Ethernet::default())]);
        let alone = Wire::new_request(third);
        let plan = nodes[0].start(&alone);
        let before = nodes[0].counters("ip", 5);
        let peer = socket(&nodes[1].netns, [192, 0, 2, 2], 600);
        peer.send_to(&vxlan(0x501, &hello(&b, &a, "forged")), "192.0.2.1:4789").unwrap();
        a.until(&b, &hello(&b, &a, "end"));
        let after = nodes[0].counters("ip", 5);
        assert_eq!(grown(&before, &after), [("vxlan-host".to_owned(), 1)].into());
        nodes[0].on(|lab| lab.undo(plan.plan.owner)).unwrap();
    });
}

impl Wire {
    /// A job on the first host and on one that is not here, 192.0.2.3.
    fn new_request(request: Request) -> Request {
        let mut request = across(request, 0, &[1, 0, 1]);
        request.fabric.as_mut().unwrap().peers.remove(0);
        request
    }
}

#[test]
fn layer_2_carries_any_protocol_between_hosts_but_pins_the_mac() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 2);
        let network = Ethernet { layer: Layer::L2, ..Ethernet::default() };
        let (_, guests) = wire.start(JOB, &network, &[1, 1]);
        let [a, b] = <[Guest; 2]>::try_from(guests).ok().unwrap();
        b.until(&a, &ethernet(b.mac, a.mac, 0x88b5, b"own"));
        b.until(&a, &arp(1, a.mac, a.mac, [10, 0, 0, 1].into(), BROADCAST, [10, 0, 0, 2].into()));
        let tagged = ethernet(b.mac, a.mac, 0x8100, &[0, 7, 0x88, 0xb5, 1, 2, 3]);
        b.until(&a, &tagged);
        // Neither by a guest nor by its host.
        let before = wire.nodes[0].counters("bridge", JOB);
        a.send(&ethernet(b.mac, b.mac, 0x88b5, b"forged"));
        let peer = socket(&wire.nodes[0].netns, [192, 0, 2, 1], 600);
        let underlay = wire.nodes[1].counters("ip", JOB);
        let forged = ethernet(b.mac, b.mac, 0x88b5, b"forged");
        peer.send_to(&vxlan(KEY, &forged), "192.0.2.2:4789").unwrap();
        let seen = b.until(&a, &ethernet(b.mac, a.mac, 0x88b5, b"end"));
        assert!(!seen.iter().any(|frame| frame.ends_with(b"forged")), "{seen:02x?}");
        let grown_here = faults(&before, &wire.nodes[0].counters("bridge", JOB));
        assert_eq!(grown_here, [("source-mac".to_owned(), 1), ("ptl3-0".to_owned(), 1)].into());
        let grown_there = grown(&underlay, &wire.nodes[1].counters("ip", JOB));
        assert_eq!(grown_there, [("vxlan-guest".to_owned(), 1)].into());
    });
}
