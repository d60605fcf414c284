//! IPv6 on L3: raw frames from a tap's other end, hostile ones too.

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, sockopt};
use pavo::config::{Ethernet, Network6};
use pavo::host::netns;
use pavo::model::owner::Owner;
use pavo::model::prefix::link_local;
use pavo::network::{NetworkPlan, plan};

use packets::*;

use super::fabric::{KEY, Wire, vxlan};
use super::lab::*;

mod packets;
mod spoofed;

const JOB: u32 = 3;
const FORGED: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];
const NONE: Ipv6Addr = Ipv6Addr::UNSPECIFIED;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const ALL_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
const LISTENERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);
/// What a system makes up that tells nobody its MAC.
const MADE_UP: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x1234, 0x5678, 0x9abc, 0xdef0);

/// A guest with its addresses.
struct Six {
    guest: Guest,
    mac: [u8; 6],
    ip: Ipv6Addr,
    own_link: Ipv6Addr,
    gateway: Ipv6Addr,
}

impl Six {
    fn of(guest: Guest, nic: &pavo::model::vm::Nic) -> Self {
        let ipv6 = nic.ipv6.expect("the network has it");
        Self {
            mac: guest.mac,
            ip: ipv6.address,
            own_link: link_local(nic.mac),
            gateway: ipv6.prefix.gateway(),
            guest,
        }
    }

    fn to(&self, mac: [u8; 6], packet: &[u8]) -> Vec<u8> {
        ethernet(mac, self.mac, 0x86dd, packet)
    }

    fn to_gateway(&self, packet: &[u8]) -> Vec<u8> {
        self.to(self.guest.gateway_mac, packet)
    }

    /// Everything up to what the gateway says to our echo request.
    fn ping_gateway(&self) -> Vec<Vec<u8>> {
        let request = self.to_gateway(&icmp(self.ip, self.gateway, 128, &[0, 0, 0, 0, 1, 2, 3, 4]));
        let gateway = self.gateway.octets();
        self.guest.exchange(&request, move |got| {
            got.len() >= 58
                && got[12..14] == [0x86, 0xdd]
                && got[22..38] == gateway
                && got[54] == 129
        })
    }
}

fn network() -> Ethernet {
    Ethernet { int_network6: Some(Network6::Auto), ..Ethernet::default() }
}

fn start(lab: &Lab, network: &Ethernet, vms: u32) -> (NetworkPlan, Vec<Six>) {
    let plan = plan(&request(JOB, vms, &[("net", network.clone())])).unwrap();
    lab.apply(&plan.plan).unwrap();
    let six = |(_, nics): &(u32, Vec<_>)| Six::of(Guest::plug(&nics[0]), &nics[0]);
    let guests = plan.nics.iter().map(six).collect();
    (plan, guests)
}

/// Two guests that have been heard by each other.
fn pair(lab: &Lab) -> (Six, Six) {
    let (_, guests) = start(lab, &network(), 2);
    let [a, b] = <[Six; 2]>::try_from(guests).ok().unwrap();
    b.guest.until(&a.guest, &hello(&a, &b, "ready"));
    a.guest.until(&b.guest, &hello(&b, &a, "ready"));
    (a, b)
}

fn faults(before: &Counters, after: &Counters) -> Counters {
    let mut grown = grown(before, after);
    let innocent = ["to-host", "from-host", "to-others", "stray-ipv6", "listener"];
    grown.retain(|name, _| !innocent.contains(&name.as_str()));
    grown
}

fn mac(bytes: [u8; 6]) -> pavo::model::address::Mac {
    pavo::model::address::Mac(bytes)
}

#[test]
fn spoofed_frames_never_arrive_and_their_counter_says_so() {
    in_netns(|lab| {
        let (a, b) = pair(lab);
        for (what, rule, frame) in spoofed::frames(&a, &b) {
            let before = lab.counters(None, "bridge", Owner::local(JOB));
            a.guest.send(&frame);
            // Frames keep their order: what was sent first would be here first.
            let seen = b.guest.until(&a.guest, &hello(&a, &b, what));
            assert!(!seen.contains(&frame), "{what} arrived");
            let grown = faults(&before, &lab.counters(None, "bridge", Owner::local(JOB)));
            let expected = [(rule.to_owned(), 1), ("ptl3-0".to_owned(), 1)];
            assert_eq!(grown, expected.into(), "{what}");
        }
    });
}

#[test]
fn what_a_guest_may_send_arrives() {
    in_netns(|lab| {
        let (a, b) = pair(lab);
        let before = lab.counters(None, "bridge", Owner::local(JOB));
        let echo = [0, 0, 0, 0, 1, 2, 3, 4];
        let own = option(2, a.mac);
        let to_b = |packet: &[u8]| a.to(b.mac, packet);
        let everybody = [0x33, 0x33, 0, 0, 0, 1];
        let legal = [
            to_b(&icmp(a.ip, b.ip, 128, &echo)),
            to_b(&icmp(a.own_link, b.own_link, 129, &echo)),
            to_b(&icmp(a.ip, b.ip, 1, &echo)),
            to_b(&ipv6(a.ip, b.ip, 6, &[0; 20])),
            to_b(&ipv6(a.ip, b.ip, 132, &[0; 20])),
            to_b(&datagram(a.own_link, b.own_link, (5353, 5353), b"x")),
            solicitation(&a, a.ip, b.ip, &option(1, a.mac)),
            solicitation(&a, a.own_link, b.own_link, &option(1, a.mac)),
            to_b(&icmp(a.ip, b.ip, 135, &[&[0; 4][..], &b.ip.octets()].concat())),
            to_b(&advertisement(a.ip, b.ip, a.ip, &own)),
            to_b(&advertisement(a.own_link, b.ip, a.ip, &[])),
            to_b(&advertisement(a.own_link, b.own_link, a.own_link, &own)),
            a.to(everybody, &advertisement(a.ip, ALL_NODES, a.ip, &own)),
            to_b(&fragmented(&a, &b, 17, 0, &udp(1000, 1000, b"x"))),
            to_b(&fragmented(&a, &b, 17, 3, &udp(547, 546, b"no ports are here"))),
            to_b(&fragmented(&a, &b, 58, 0, &icmp(a.ip, b.ip, 128, &echo)[40..])),
        ];
        for frame in legal {
            b.guest.until(&a.guest, &frame);
        }
        assert_eq!(faults(&before, &lab.counters(None, "bridge", Owner::local(JOB))), [].into());
    });
}

#[test]
fn who_has_no_address_yet_is_heard_by_the_gateway_only() {
    in_netns(|lab| {
        let (a, b) = pair(lab);
        let inside = lab.host.netns("pnl3-0");
        let server = socket(&inside, (NONE, 547));
        server.join_multicast_v6(&ALL_SERVERS, index(&inside)).unwrap();
        let router = raw(&inside);
        let before = lab.counters(None, "bridge", Owner::local(JOB));
        let group = |mac, packet: &[u8]| a.to(mac, packet);
        let (routers, servers) = ([0x33, 0x33, 0, 0, 0, 2], [0x33, 0x33, 0, 1, 0, 2]);
        let probe = option(14, [7; 6]);
        for source in [a.ip, a.own_link, MADE_UP, NONE] {
            a.guest.send(&group(routers, &icmp(source, ALL_ROUTERS, 133, &[0; 4])));
        }
        let solicited = [(); 4].map(|()| next_of(&router, 133));
        assert_eq!(solicited, [a.ip, a.own_link, MADE_UP, NONE]);
        // To where a guest would hear it, if the switch let it.
        a.guest.send(&a.to(b.mac, &icmp(MADE_UP, b.own_link, 133, &[0; 4])));
        a.guest.send(&solicitation(&a, NONE, b.ip, &[]));
        a.guest.send(&solicitation(&a, NONE, a.ip, &probe));
        a.guest.send(&solicitation(&a, MADE_UP, b.ip, &option(1, a.mac)));
        for (source, text) in [(a.own_link, "own"), (MADE_UP, "made up")] {
            a.guest
                .send(&group(servers, &datagram(source, ALL_SERVERS, (546, 547), text.as_bytes())));
            let (heard, from) = heard(&server);
            assert_eq!((heard.as_str(), from.ip()), (text, source.into()));
            // Who it is, it does not say itself.
            assert_eq!(from.port(), 20_000);
        }
        b.guest.send(&b.to(servers, &datagram(MADE_UP, ALL_SERVERS, (546, 547), b"b")));
        assert_eq!(heard(&server).1.port(), 20_001);
        // Listeners' reports end, whatever they say.
        for source in [a.own_link, NONE, MADE_UP] {
            let report = icmp(source, LISTENERS, 143, &[0; 4])[40..].to_vec();
            a.guest.send(
                &a.to([0x33, 0x33, 0, 0, 0, 0x16], &behind(0, source, LISTENERS, 58, &report)),
            );
        }
        let seen = b.guest.until(&a.guest, &hello(&a, &b, "end"));
        let from_a: Vec<_> = seen.iter().filter(|frame| frame[6..12] == a.mac).collect();
        assert!(from_a.is_empty(), "{from_a:02x?}");
        let after = lab.counters(None, "bridge", Owner::local(JOB));
        assert_eq!(faults(&before, &after), [].into());
        assert_eq!(grown(&before, &after)["listener"], 3);
    });
}

#[test]
fn the_gateway_answers_is_not_fooled_and_routes_nothing() {
    in_netns(|lab| {
        let (a, b) = pair(lab);
        let inside = lab.host.netns("pnl3-0");
        a.ping_gateway();
        // It tells its MAC.
        let gateway = a.gateway.octets();
        let told = |got: &[u8]| {
            got.len() >= 86
                && got[54] == 136
                && got[62..78] == gateway
                && got[80..86] == a.guest.gateway_mac
        };
        for source in [a.ip, a.own_link] {
            let ask = solicitation(&a, source, a.gateway, &option(1, a.mac));
            a.guest.exchange(&ask, told);
        }
        // A link-local address that was made up it asks for first: the question has no MAC.
        let asked = std::cell::Cell::new(false);
        let asked_first = |got: &[u8]| {
            if got.len() >= 78 && got[54] == 135 && got[62..78] == MADE_UP.octets() {
                let asker: [u8; 16] = got[22..38].try_into().unwrap();
                let said = advertisement(MADE_UP, asker.into(), MADE_UP, &option(2, a.mac));
                a.guest.send(&a.to_gateway(&said));
                asked.set(true);
            }
            // It answers one alone without its MAC, which that one knows.
            got.len() >= 78
                && got[54] == 136
                && got[38..54] == MADE_UP.octets()
                && got[62..78] == gateway
        };
        let ask = icmp(MADE_UP, a.gateway, 135, &[&[0; 4][..], &gateway].concat());
        a.guest.exchange(&a.to_gateway(&ask), asked_first);
        assert!(asked.get(), "it knew");
        // Every guest's address is known for good, and what one says of another's not believed.
        let said = advertisement(MADE_UP, a.gateway, MADE_UP, &option(2, a.mac));
        a.guest.send(&a.to_gateway(&said));
        a.guest.send(&a.to_gateway(&advertisement(a.ip, a.gateway, b.ip, &option(2, a.mac))));
        a.ping_gateway();
        let neighbours = sh(Some(&inside), "ip -6 neigh show dev guests");
        let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        for guest in [&a, &b] {
            for address in [guest.ip, guest.own_link] {
                let line = format!("{address} lladdr {} PERMANENT", text(guest.mac));
                assert!(neighbours.contains(&line), "{line}: {neighbours}");
            }
        }
        // No other service, and no way on.
        let ssh = socket(&inside, (NONE, 22));
        let counters = || lab.counters(Some("pnl3-0"), "inet", Owner::local(JOB));
        let before = counters();
        a.guest.send(&a.to_gateway(&datagram(a.ip, a.gateway, (1000, 22), b"forbidden")));
        a.guest.send(&a.to_gateway(&datagram(
            a.ip,
            "2001:db8::1".parse().unwrap(),
            (1000, 7),
            b"x",
        )));
        a.ping_gateway();
        ssh.set_nonblocking(true).unwrap();
        assert!(ssh.recv_from(&mut [0; 99]).is_err());
        assert!(grown(&before, &counters())["stray-ipv6"] >= 1);
        assert_eq!(sh(Some(&inside), "cat /proc/sys/net/ipv6/conf/all/forwarding").trim(), "0");
        assert_eq!(sh(Some(&inside), "ip -6 route show default").trim(), "");
    });
}

/// What is told to all guests as the responder does it, the host does not take for itself; nor
/// can who is on the host speak through the job's links.
#[test]
fn the_host_has_no_part_in_it() {
    in_netns(|lab| {
        // As hosts are that learn their routes.
        let conf = "/proc/sys/net/ipv6/conf/default";
        sh(None, &format!("echo 0 >{conf}/disable_ipv6; echo 1 >{conf}/accept_ra"));
        let (a, _) = pair(lab);
        let inside = lab.host.netns("pnl3-0");
        let network = Ipv6Addr::from(u128::from(a.ip) >> 64 << 64);
        let prefix = [&[3, 4, 64, 0x80][..], &[0xff; 8], &[0; 4], &network.octets()].concat();
        let packet = [&[134, 0, 0, 0, 64, 0x80][..], &[0; 10], &prefix].concat();
        let to = SocketAddrV6::new(ALL_NODES, 0, 0, index(&inside));
        raw(&inside).send_to(&packet, to).unwrap();
        let ping = a.to_gateway(&icmp(a.ip, a.gateway, 128, &[0; 4]));
        a.guest.exchange(&ping, |got| {
            got.len() >= 70 && got[12..14] == [0x86, 0xdd] && got[54] == 134
        });
        for link in ["pbl3-0", "pgl3-0", "ptl3-0", "ptl3-1"] {
            let what = format!("ip -6 addr show dev {link}; ip -6 route show table all dev {link}");
            assert_eq!(sh(None, &what), "", "{link}");
        }
        a.ping_gateway();
    });
}

/// The kernel's table of neighbours is one for all jobs and the host, and holds 1024. (Fewer
/// sources here than would fill it: others run beside this test.)
#[test]
fn one_guest_cannot_fill_the_table_of_neighbours() {
    in_netns(|lab| {
        let (a, b) = pair(lab);
        let inside = lab.host.netns("pnl3-0");
        let server = socket(&inside, (NONE, 547));
        server.join_multicast_v6(&ALL_SERVERS, index(&inside)).unwrap();
        let begin = Instant::now();
        let before = lab.counters(None, "bridge", Owner::local(JOB));
        for number in 0..300 {
            let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x1234, 0, 1, number);
            let ask = datagram(source, ALL_SERVERS, (546, 547), b"x");
            a.guest.send(&solicitation(&a, source, a.gateway, &option(1, a.mac)));
            a.guest.send(&a.to([0x33, 0x33, 0, 1, 0, 2], &ask));
        }
        // Frames keep their order; and its own address is not counted against it.
        a.ping_gateway();
        let seconds = begin.elapsed().as_secs() + 1;
        let may = 16 + 2 * usize::try_from(seconds).unwrap();
        let neighbours = sh(Some(&inside), "ip -6 neigh show dev guests");
        let made_up = neighbours.lines().filter(|line| line.contains("fe80::1234:0:1:")).count();
        server.set_nonblocking(true).unwrap();
        let heard = std::iter::from_fn(|| server.recv_from(&mut [0; 99]).ok()).count();
        assert!(made_up > 0 && heard > 0 && made_up + heard <= may, "{made_up}, {heard}, {may}");
        let grown = faults(&before, &lab.counters(None, "bridge", Owner::local(JOB)));
        assert!(grown["too-often"] as usize >= 600 - may, "{grown:?}");
        // The others may ask as before, and so may this one in a while.
        let gateway = a.gateway.octets();
        for guest in [&b, &a] {
            let ask = solicitation(guest, MADE_UP, a.gateway, &option(1, guest.mac));
            guest
                .guest
                .exchange(&ask, |got| got.len() >= 86 && got[54] == 136 && got[62..78] == gateway);
        }
    });
}

#[test]
fn without_the_key_there_is_none_and_beside_one_that_has_it_neither() {
    in_netns(|lab| {
        let networks = [("six", network()), ("four", Ethernet::default())];
        let plan = plan(&request(JOB, 2, &networks)).unwrap();
        lab.apply(&plan.plan).unwrap();
        let nics: Vec<_> = plan.nics.iter().map(|(_, nics)| nics).collect();
        let six = [0, 1].map(|vm| Six::of(Guest::plug(&nics[vm][0]), &nics[vm][0]));
        let four = [0, 1].map(|vm: usize| Guest::plug(&nics[vm][1]));
        assert_eq!(nics[0][1].ipv6, None);
        six[1].guest.until(&six[0].guest, &hello(&six[0], &six[1], "ready"));
        // Guests have the same MACs on both networks: all that is right on the one.
        let forged = [
            hello(&six[0], &six[1], "forged"),
            solicitation(&six[0], NONE, six[0].ip, &[]),
            six[0].to(BROADCAST, &datagram(MADE_UP, ALL_SERVERS, (546, 547), b"x")),
        ];
        let before = lab.counters(None, "bridge", Owner::local(JOB));
        let end = ethernet(
            four[1].mac,
            four[0].mac,
            0x0800,
            &ipv4(four[0].ip, four[1].ip, 17, &udp(1000, 1000, b"end")),
        );
        for frame in &forged {
            four[0].send(frame);
        }
        let seen = four[1].until(&four[0], &end);
        assert!(!seen.iter().any(|frame| forged.contains(frame)), "{seen:02x?}");
        let grown = faults(&before, &lab.counters(None, "bridge", Owner::local(JOB)));
        assert_eq!(grown, [("ipv6".to_owned(), 3), ("ptl3-1".to_owned(), 3)].into());
    });
}

#[test]
fn guests_of_two_hosts_find_and_reach_each_other_and_nobody_speaks_for_them() {
    in_netns(|lab| {
        let wire = Wire::new(lab, 2);
        let (plans, guests) = wire.start(JOB, &network(), &[1, 1]);
        let nics = plans.iter().map(|plan| &plan.nics[0].1[0]);
        let guests: Vec<Six> =
            guests.into_iter().zip(nics).map(|(g, nic)| Six::of(g, nic)).collect();
        let [a, b] = <[Six; 2]>::try_from(guests).ok().unwrap();
        assert_eq!(a.gateway, b.gateway, "one network");
        b.guest.until(&a.guest, &solicitation(&a, a.ip, b.ip, &option(1, a.mac)));
        a.guest.until(&b.guest, &b.to(a.mac, &advertisement(b.ip, a.ip, b.ip, &option(2, b.mac))));
        a.guest.until(&b.guest, &hello(&b, &a, "ready"));
        // Each has its own host's gateway, which answers nobody else.
        a.ping_gateway();
        b.ping_gateway();
        // As if the other host did not look: what arrives is looked at again.
        let there = &wire.nodes[1];
        sh(Some(&there.netns), "nft delete table bridge pavo_l3");
        let before = wire.nodes[0].counters("bridge", JOB);
        let far = [
            b.to(a.mac, &datagram(a.gateway, a.ip, (1, 1), b"forged")),
            b.to(a.mac, &datagram(a.ip, a.ip, (1, 1), b"forged")),
            b.to(a.mac, &datagram(MADE_UP, a.own_link, (1, 1), b"forged")),
            b.to(a.mac, &icmp(b.own_link, ALL_NODES, 134, &[0; 12])),
            b.to(a.mac, &advertisement(b.ip, a.ip, a.gateway, &option(2, b.mac))),
            solicitation(&b, b.ip, a.ip, &option(1, FORGED)),
            b.to(a.mac, &datagram(b.own_link, a.own_link, (547, 546), b"forged")),
            b.to(a.mac, &datagram(b.own_link, ALL_SERVERS, (546, 547), b"forged")),
            b.to(a.mac, &icmp(b.own_link, ALL_ROUTERS, 133, &[0; 4])),
        ];
        for frame in &far {
            b.guest.send(frame);
        }
        let seen = a.guest.until(&b.guest, &hello(&b, &a, "end"));
        for frame in &far {
            assert!(!seen.contains(frame), "{frame:02x?}");
        }
        let grown = faults(&before, &wire.nodes[0].counters("bridge", JOB));
        let count = |rule: &str| grown.get(rule).copied().unwrap_or_default();
        assert_eq!(
            [count("ipv6"), count("router"), count("neighbour"), count("dhcp-server")],
            [3, 1, 3, 2],
            "{grown:?}"
        );
        // Nobody outside of the job is believed.
        let stranger = netns::with_netns(&wire.stranger, || UdpSocket::bind("192.0.2.99:600"));
        let stranger = stranger.unwrap().unwrap();
        stranger.send_to(&vxlan(KEY, &hello(&b, &a, "stranger")), "192.0.2.1:4789").unwrap();
        let seen = a.guest.until(&b.guest, &hello(&b, &a, "end again"));
        assert!(!seen.iter().any(|frame| frame.ends_with(b"stranger")));
    });
}

#[test]
fn what_is_made_twice_is_there_once_and_goes() {
    in_netns(|lab| {
        let before = lab.traces();
        let plan = plan(&request(JOB, 2, &[("net", network())])).unwrap().plan;
        lab.apply(&plan).unwrap();
        let made = |what: &str| sh(Some(&lab.host.netns("pnl3-0")), what);
        let addresses = || made("ip -6 -o addr show dev guests; ip -6 neigh show dev guests");
        let once = addresses();
        assert!(!once.contains("tentative"), "{once}");
        assert_eq!(once.lines().count(), 2 + 4, "{once}");
        for step in &plan.steps {
            lab.run(step.apply(&lab.host)).unwrap();
        }
        assert_eq!(addresses(), once);
        // One by one, as after a crash in the middle; and again.
        for step in plan.steps.iter().rev().chain(plan.steps.iter().rev()) {
            lab.run(step.undo(&lab.host)).unwrap();
        }
        lab.undo(plan.owner).unwrap();
        assert_eq!(lab.traces(), before);
    });
}

fn socket(netns: &Path, address: (Ipv6Addr, u16)) -> UdpSocket {
    netns::with_netns(netns, || UdpSocket::bind(address)).unwrap().unwrap()
}

/// Hears and says what a router does, at the guests' side.
fn raw(netns: &Path) -> UdpSocket {
    let open = || {
        let (kind, protocol) = (SockType::Raw, Some(SockProtocol::IcmpV6));
        let socket =
            nix::sys::socket::socket(AddressFamily::Inet6, kind, SockFlag::SOCK_CLOEXEC, protocol);
        let socket = socket.unwrap();
        setsockopt(&socket, sockopt::Ipv6MulticastHops, &255).unwrap();
        UdpSocket::from(socket)
    };
    let socket = netns::with_netns(netns, open).unwrap();
    socket.join_multicast_v6(&ALL_ROUTERS, index(netns)).unwrap();
    socket
}

/// From whom the next ICMPv6 of a kind is.
fn next_of(raw: &UdpSocket, kind: u8) -> Ipv6Addr {
    raw.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    loop {
        let mut buffer = [0; 2000];
        let (_, from) = raw.recv_from(&mut buffer).expect("a packet");
        match from {
            SocketAddr::V6(from) if buffer[0] == kind => return *from.ip(),
            _ => {}
        }
    }
}

/// The number of the link at which guests are.
fn index(netns: &Path) -> u32 {
    let index = || nix::net::if_::if_nametoindex("guests").unwrap();
    netns::with_netns(netns, index).unwrap()
}

/// The next datagram, which must come.
fn heard(socket: &UdpSocket) -> (String, SocketAddr) {
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut buffer = [0; 2000];
    let (length, from) = socket.recv_from(&mut buffer).expect("a datagram");
    (String::from_utf8_lossy(&buffer[..length]).into_owned(), from)
}
