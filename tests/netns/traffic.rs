//! What guests can send, and whom they can reach: raw frames from a tap's other end.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use pavo::config::{Ethernet, Layer};
use pavo::host::netns;
use pavo::model::owner::Owner;
use pavo::network::{NetworkPlan, Outside, Request, plan};

use super::lab::*;

const JOB: u32 = 3;

fn owner() -> Owner {
    Owner::local(JOB)
}

fn start(lab: &Lab, request: &Request) -> NetworkPlan {
    let plan = plan(request).unwrap();
    lab.apply(&plan.plan).unwrap();
    plan
}

/// The guests of a plan on its first network.
fn guests(plan: &NetworkPlan) -> Vec<Guest> {
    plan.nics.iter().map(|(_, nics)| Guest::plug(&nics[0])).collect()
}

/// Two guests that have been heard by each other.
fn pair(lab: &Lab, network: Ethernet) -> (Guest, Guest) {
    let plan = start(lab, &request(JOB, 2, &[("net", network)]));
    let [a, b] = <[Guest; 2]>::try_from(guests(&plan)).ok().unwrap();
    let (to_b, to_a) = (hello(&a, &b, "ready"), hello(&b, &a, "ready"));
    b.until(&a, &to_b);
    a.until(&b, &to_a);
    (a, b)
}

/// A datagram from one guest to another, as it must be.
fn hello(from: &Guest, to: &Guest, text: &str) -> Vec<u8> {
    let packet = ipv4(from.ip, to.ip, 17, &udp(1000, 1000, text.as_bytes()));
    ethernet(to.mac, from.mac, 0x0800, &packet)
}

/// The counters that grew, but for what kernels say to each other on their own.
fn faults(before: &Counters, after: &Counters) -> Counters {
    let mut grown = grown(before, after);
    grown.retain(|name, _| !["to-host", "from-host", "stray-ipv6"].contains(&name.as_str()));
    grown
}

const MULTICAST: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const FORGED: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];

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
        ("a router advertisement", "ipv6", router_advertisement),
        ("a VLAN tag", "vlan", tagged(0x8100, &datagram(b.ip, 1, 1))),
        ("a service tag", "vlan", tagged(0x88a8, &datagram(b.ip, 1, 1))),
        ("another protocol", "ethertype", ethernet(b.mac, a.mac, 0x88b5, b"x")),
    ]
}

#[test]
fn spoofed_frames_never_arrive_and_their_counter_says_so() {
    in_netns(|lab| {
        let (a, b) = pair(lab, Ethernet::default());
        for (what, rule, frame) in spoofed(&a, &b) {
            let before = lab.counters(None, "bridge", owner());
            a.send(&frame);
            // Frames keep their order: what was sent first would be here first.
            let marker = hello(&a, &b, what);
            let seen = b.until(&a, &marker);
            assert!(!seen.contains(&frame), "{what} arrived");
            let grown = faults(&before, &lab.counters(None, "bridge", owner()));
            // By rule, and by guest: `ptl3-0` is the sender's.
            let expected = [(rule.to_owned(), 1), ("ptl3-0".to_owned(), 1)];
            assert_eq!(grown, expected.into(), "{what}");
        }
    });
}

#[test]
fn what_a_guest_may_send_arrives() {
    in_netns(|lab| {
        let (a, b) = pair(lab, Ethernet::default());
        let before = lab.counters(None, "bridge", owner());
        let zero = Ipv4Addr::UNSPECIFIED;
        let discover = ipv4(zero, Ipv4Addr::BROADCAST, 17, &udp(68, 67, b"discover"));
        let legal = [
            arp(1, a.mac, a.mac, a.ip, BROADCAST, b.ip),
            arp(2, a.mac, a.mac, a.ip, b.mac, b.ip),
            arp(1, a.mac, a.mac, zero, BROADCAST, a.ip),
            ethernet(BROADCAST, a.mac, 0x0800, &discover),
            ethernet(b.mac, a.mac, 0x0800, &ipv4(a.ip, b.ip, 6, &[0; 20])),
            ethernet(
                BROADCAST,
                a.mac,
                0x0800,
                &ipv4(a.ip, [10, 200, 255, 255].into(), 17, &[0; 8]),
            ),
        ];
        for frame in legal {
            b.until(&a, &frame);
        }
        assert_eq!(faults(&before, &lab.counters(None, "bridge", owner())), [].into());
    });
}

#[test]
fn the_gateway_answers_and_is_not_fooled() {
    in_netns(|lab| {
        let (a, b) = pair(lab, Ethernet::default());
        a.ping_gateway();
        b.ping_gateway();
        // In the name of `b`, an echo request that the gateway would answer to `b`.
        let echo = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
        let packet = ipv4(b.ip, b.gateway, 1, &echo);
        a.send(&ethernet(a.gateway_mac, a.mac, 0x0800, &packet));
        a.ping_gateway();
        let marker = hello(&a, &b, "end");
        let seen = b.until(&a, &marker);
        assert!(!seen.iter().any(|frame| frame[23] == 1 && frame[34] == 0), "{seen:02x?}");
        let neighbours = sh(Some(&lab.host.netns("pnl3-0")), "ip neigh show dev guests");
        let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        assert!(neighbours.contains(&format!("{} lladdr {}", a.ip, mac(a.mac))), "{neighbours}");
        assert!(neighbours.contains(&format!("{} lladdr {}", b.ip, mac(b.mac))), "{neighbours}");
    });
}

#[test]
fn guests_reach_no_other_service_of_the_gateway() {
    in_netns(|lab| {
        let (a, _) = pair(lab, Ethernet::default());
        let inside = lab.host.netns("pnl3-0");
        let listen = |port: u16| socket(&inside, (Ipv4Addr::UNSPECIFIED, port));
        let (dns, ssh) = (listen(53), listen(22));
        a.ping_gateway();
        let before = lab.counters(Some("pnl3-0"), "inet", owner());
        a.send(&a.to_gateway(a.gateway, 17, &udp(1000, 22, b"forbidden")));
        a.send(&a.to_gateway(a.gateway, 17, &udp(1000, 53, b"allowed")));
        assert_eq!(datagram(&dns).0, "allowed");
        nothing(&ssh);
        let after = lab.counters(Some("pnl3-0"), "inet", owner());
        assert_eq!(faults(&before, &after), [("gateway-service".to_owned(), 1)].into());
        // Nor its loopback, by an address that should never be on a wire.
        let lo = socket(&inside, (Ipv4Addr::LOCALHOST, 1053));
        a.send(&a.to_gateway(Ipv4Addr::LOCALHOST, 17, &udp(1000, 1053, b"loopback")));
        a.ping_gateway();
        nothing(&lo);
    });
}

#[test]
fn two_jobs_with_the_same_addresses_reach_the_world_and_not_each_other() {
    in_netns(|lab| {
        let world = lab.world("out0", "192.0.2.1/24", "192.0.2.2/24");
        let server = socket(&world, ([192, 0, 2, 2].into(), 7000));
        let plans: Vec<_> = [JOB, 4]
            .map(|job| start(lab, &request(job, 1, &[("net", Ethernet::default())])))
            .into();
        let all: Vec<Guest> = plans.iter().flat_map(guests).collect();
        assert_eq!(all[0].ip, all[1].ip);
        all.iter().for_each(|guest| drop(guest.ping_gateway()));

        for (job, guest) in [JOB, 4].into_iter().zip(&all) {
            let text = format!("job {job}");
            // A port that belongs to root on the host.
            guest.send(&guest.to_gateway(
                [192, 0, 2, 2].into(),
                17,
                &udp(700, 7000, text.as_bytes()),
            ));
            let (heard, from) = datagram(&server);
            assert_eq!(heard, text);
            assert_eq!(from.ip(), Ipv4Addr::new(192, 0, 2, 1));
            assert!(from.port() >= 1024, "{from}");
            server.send_to(b"answer", from).unwrap();
            let marker = guest.to_gateway([192, 0, 2, 2].into(), 17, &udp(700, 7001, b"again"));
            let ip = guest.ip.octets();
            guest.exchange(&marker, |frame| frame.ends_with(b"answer") && frame[30..34] == ip);
        }

        // The other job: both ends of its /31, and whatever is behind.
        let inside = socket(&lab.host.netns("pnl4-0"), (Ipv4Addr::UNSPECIFIED, 7000));
        let on_host = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 7000)).unwrap();
        let before = lab.counters(None, "inet", owner());
        let theirs = |name: &str| {
            let text = sh(None, &format!("ip -4 -o addr show dev {name}"));
            let word = text.split_whitespace().nth(3).unwrap();
            word.split('/').next().unwrap().parse::<Ipv4Addr>().unwrap()
        };
        let outer = theirs("pvl4-0");
        let inner = Ipv4Addr::from(u32::from(outer) + 1);
        for to in [outer, inner, [192, 0, 2, 1].into()] {
            all[0].send(&all[0].to_gateway(to, 17, &udp(1000, 7000, b"forbidden")));
        }
        all[0].send(&all[0].to_gateway([192, 0, 2, 2].into(), 17, &udp(1, 7000, b"end")));
        assert_eq!(datagram(&server).0, "end");
        [&inside, &on_host].into_iter().for_each(nothing);
        let after = lab.counters(None, "inet", owner());
        let expected = [("other-jobs".to_owned(), 2), ("host-service".to_owned(), 1)];
        assert_eq!(faults(&before, &after), expected.into());
    });
}

#[test]
fn the_world_cannot_come_in() {
    in_netns(|lab| {
        let world = lab.world("out0", "192.0.2.1/24", "192.0.2.2/24");
        sh(Some(&world), "ip route add default via 192.0.2.1");
        let plan = start(lab, &request(JOB, 1, &[("net", Ethernet::default())]));
        let guest = guests(&plan).remove(0);
        guest.ping_gateway();
        let before = lab.counters(None, "inet", owner());
        let inside = socket(&lab.host.netns("pnl3-0"), (Ipv4Addr::UNSPECIFIED, 7000));
        let inner: Ipv4Addr = [10, 201, 0, 49].into();
        let sender = socket(&world, ([192, 0, 2, 2].into(), 0));
        sender.send_to(b"forbidden", (inner, 7000)).unwrap();
        guest.ping_gateway();
        nothing(&inside);
        let after = lab.counters(None, "inet", owner());
        assert_eq!(faults(&before, &after), [("unsolicited".to_owned(), 1)].into());
    });
}

#[test]
fn a_job_cannot_use_an_address_that_is_not_its_own() {
    in_netns(|lab| {
        lab.world("out0", "192.0.2.1/24", "192.0.2.2/24");
        start(lab, &request(JOB, 1, &[("net", Ethernet::default())]));
        let before = lab.counters(None, "inet", owner());
        // Even something that runs in the network's namespace as its root.
        let inside = lab.host.netns("pnl3-0");
        sh(Some(&inside), "ip addr add 203.0.113.9/32 dev uplink");
        let sender = socket(&inside, ([203, 0, 113, 9].into(), 0));
        sender.send_to(b"forged", ("192.0.2.2", 7000)).unwrap();
        let after = lab.counters(None, "inet", owner());
        assert_eq!(faults(&before, &after), [("source-address".to_owned(), 1)].into());
    });
}

#[test]
fn without_outbound_nothing_leaves_and_is_counted() {
    in_netns(|lab| {
        let world = lab.world("out0", "192.0.2.1/24", "192.0.2.2/24");
        let server = socket(&world, ([192, 0, 2, 2].into(), 7000));
        let (a, _) = pair(lab, Ethernet { allow_outbound: false, ..Ethernet::default() });
        let before = lab.counters(Some("pnl3-0"), "inet", owner());
        a.send(&a.to_gateway([192, 0, 2, 2].into(), 17, &udp(1000, 7000, b"forbidden")));
        a.ping_gateway();
        nothing(&server);
        let after = lab.counters(Some("pnl3-0"), "inet", owner());
        assert_eq!(faults(&before, &after), [("outbound".to_owned(), 1)].into());
    });
}

#[test]
fn behind_pasta_everything_is_reached_but_its_gateway() {
    in_netns(|lab| {
        let world = lab.world("pasta0", "10.250.0.2/30", "10.250.0.1/30");
        sh(Some(&world), "ip addr add 198.51.100.2/32 dev lo");
        sh(None, "ip route add default via 10.250.0.1");
        let far = socket(&world, ([198, 51, 100, 2].into(), 7000));
        let near = socket(&world, ([10, 250, 0, 1].into(), 7000));
        let gateway = [10, 250, 0, 1].into();
        let outside = Outside::Pasta { link: "pasta0".into(), gateway };
        let request = Request { outside, ..request(JOB, 1, &[("net", Ethernet::default())]) };
        let guest = guests(&start(lab, &request)).remove(0);
        guest.ping_gateway();
        let before = lab.counters(None, "inet", owner());
        guest.send(&guest.to_gateway(gateway, 17, &udp(1000, 7000, b"forbidden")));
        let ours = UdpSocket::bind("0.0.0.0:0").unwrap();
        // A packet dropped on its way out is an error for its sender.
        ours.send_to(b"forbidden", (gateway, 7000)).unwrap_err();
        guest.send(&guest.to_gateway([198, 51, 100, 2].into(), 17, &udp(1000, 7000, b"allowed")));
        let (text, from) = datagram(&far);
        assert_eq!((text.as_str(), from.ip()), ("allowed", Ipv4Addr::new(10, 250, 0, 2).into()));
        nothing(&near);
        let after = lab.counters(None, "inet", owner());
        assert_eq!(faults(&before, &after), [("pasta-gateway".to_owned(), 2)].into());
    });
}

#[test]
fn layer_2_carries_any_protocol_but_pins_the_mac() {
    in_netns(|lab| {
        let (a, b) = pair(lab, Ethernet { layer: Layer::L2, ..Ethernet::default() });
        let before = lab.counters(None, "bridge", owner());
        a.send(&ethernet(b.mac, b.mac, 0x88b5, b"forged"));
        a.send(&ethernet(b.mac, FORGED, 0x88b5, b"forged"));
        let own = ethernet(b.mac, a.mac, 0x88b5, b"own");
        let seen = b.until(&a, &own);
        assert!(!seen.iter().any(|frame| frame.windows(6).any(|w| w == b"forged")), "{seen:02x?}");
        let tagged = ethernet(b.mac, a.mac, 0x8100, &[0, 7, 0x88, 0xb5, 1, 2, 3]);
        b.until(&a, &tagged);
        let grown = faults(&before, &lab.counters(None, "bridge", owner()));
        assert_eq!(grown, [("source-mac".to_owned(), 2), ("ptl3-0".to_owned(), 2)].into());
    });
}

#[test]
fn a_vm_on_two_networks_keeps_them_apart() {
    in_netns(|lab| {
        let twice = [("left", Ethernet::default()), ("right", Ethernet::default())];
        let plan = start(lab, &request(JOB, 2, &twice));
        let mut nics = plan.nics.iter().map(|(_, nics)| nics);
        let [l0, r0] = nics.next().unwrap().each_guest();
        let [l1, r1] = nics.next().unwrap().each_guest();

        let (on_left, on_right) = (hello(&l0, &l1, "left"), hello(&r0, &r1, "right"));
        l1.until(&l0, &on_left);
        let seen = r1.until(&r0, &on_right);
        assert!(!seen.contains(&on_left));
        l0.ping_gateway();
        r0.ping_gateway();
    });
}

#[test]
fn links_have_the_networks_mtu_and_the_host_is_out_of_reach() {
    in_netns(|lab| {
        let (a, _) = pair(lab, Ethernet { mtu: 9000, ..Ethernet::default() });
        let big = [&[8, 0][..], &[0; 8000]].concat();
        let mut echo = big;
        let words = echo.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
        let sum = !words.sum::<u32>() as u16;
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
        let frame = a.to_gateway(a.gateway, 1, &echo);
        a.exchange(&frame, |got| got.len() > 8000 && got[34] == 0);

        // To the bridge itself, which has no address but a host behind it.
        let text = sh(None, "cat /sys/class/net/lo/mtu; ip -o link show pbl3-0");
        let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let mac: pavo::model::address::Mac = mac.parse().unwrap();
        let host = UdpSocket::bind("0.0.0.0:7000").unwrap();
        let before = lab.counters(None, "bridge", owner());
        sh(None, "ip addr add 192.0.2.1/32 dev lo; ip link set lo up");
        let packet = ipv4(a.ip, [192, 0, 2, 1].into(), 17, &udp(1000, 7000, b"forbidden"));
        a.send(&ethernet(mac.0, a.mac, 0x0800, &packet));
        a.ping_gateway();
        nothing(&host);
        let grown = grown(&before, &lab.counters(None, "bridge", owner()));
        assert!(grown["to-host"] >= 1, "{grown:?}");
    });
}

/// A UDP socket that lives in another namespace.
fn socket(netns: &Path, address: (Ipv4Addr, u16)) -> UdpSocket {
    netns::with_netns(netns, || UdpSocket::bind(address)).unwrap().unwrap()
}

/// The next datagram, which must come.
fn datagram(socket: &UdpSocket) -> (String, SocketAddr) {
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut buffer = [0; 2000];
    let (length, from) = socket.recv_from(&mut buffer).expect("a datagram");
    (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
}

/// Nothing waits here. What was sent before something that arrived elsewhere would.
fn nothing(socket: &UdpSocket) {
    socket.set_nonblocking(true).unwrap();
    let mut buffer = [0; 2000];
    let error = socket.recv_from(&mut buffer).expect_err("nothing");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

/// Two NICs of one VM, opened.
trait EachGuest {
    fn each_guest(&self) -> [Guest; 2];
}

impl EachGuest for Vec<pavo::model::vm::Nic> {
    fn each_guest(&self) -> [Guest; 2] {
        [Guest::plug(&self[0]), Guest::plug(&self[1])]
    }
}
