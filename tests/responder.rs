//! The responder as a process, over real sockets, between namespaces that nothing joins
//! but what it should.
//!
//! ```text
//!   outside                    cluster                 guest
//!   lo: name server, clients   gw ───────── veth ───── eth0
//! ```
//!
//! Run as root, or as anyone with `unshare -rn cargo test --test responder`.

#[path = "responder/connections.rs"]
mod connections;
#[path = "responder/world/mod.rs"]
mod world;

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use dhcproto::v4::{DhcpOption, MessageType, OptionCode};
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, RecordType};
use pavo::network::responder::Answer;
use world::{GATEWAY, GUEST, World, ask, ask_by_stream, client, dhcp, on_one_host, option};

#[test]
fn a_guest_gets_its_address_name_and_mtu_by_dhcp() {
    let Some(world) = World::new() else { return };
    let _running = world.start(|_| {});
    world.guest.run(|| {
        let socket = client();
        let offer = socket.exchange(&dhcp(MessageType::Discover, &[])).unwrap();
        assert_eq!(offer.opts().msg_type(), Some(MessageType::Offer));
        assert_eq!(offer.yiaddr(), GUEST);

        let chosen = [DhcpOption::RequestedIpAddress(GUEST), DhcpOption::ServerIdentifier(GATEWAY)];
        let ack = socket.exchange(&dhcp(MessageType::Request, &chosen)).unwrap();
        assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
        assert_eq!(option(&ack, OptionCode::Router), DhcpOption::Router(vec![GATEWAY]));
        assert_eq!(option(&ack, OptionCode::InterfaceMtu), DhcpOption::InterfaceMtu(1450));
        assert_eq!(option(&ack, OptionCode::Hostname), DhcpOption::Hostname("vm0".into()));
    });
}

#[test]
fn a_guest_with_ipv6_hears_of_dhcpv6_and_gets_its_address_by_it() {
    let Some(world) = World::new() else { return };
    let six = world::with_ipv6(&world);
    let _running = world.start(|draft| {
        draft.ipv6 = Some(six);
        for (rank, guest) in (0..).zip(&mut draft.guests) {
            guest.address6 = six.prefix.guest(rank);
        }
    });
    world.guest.run(|| {
        // The kernel's own client: what it makes of the advertisement, and what not.
        let prefix = six.prefix.to_string();
        let routes = world::until_route(&prefix);
        assert!(!routes.contains("default"), "{routes}");
        assert_eq!(world::addresses6(), "", "none made of the prefix");
        // As which guest it asks, the switch says.
        for rank in [0, 1_u16] {
            let reply = world::solicit(20_000 + rank);
            let address = six.prefix.guest(rank.into()).unwrap().octets();
            assert!(reply.windows(16).any(|bytes| bytes == address), "{rank}: {reply:02x?}");
            assert_eq!(reply[..4], [2, 7, 7, 7]);
        }
    });
}

#[test]
fn what_asks_for_no_router_does_not_wait_where_routers_are_asked_for() {
    let Some(world) = World::new() else { return };
    let six = world::with_ipv6(&world);
    let running = world.start(|draft| draft.ipv6 = Some(six));
    world.guest.run(|| world::until_route(&six.prefix.to_string()));
    let asleep = running.stop();
    let (before, after) = (world.waiting_solicitations(), {
        world.guest.run(world::ping_all_nodes);
        world.waiting_solicitations()
    });
    drop(asleep);
    assert_eq!((before, after), (0, 0));
}

#[test]
fn one_round_trip_is_enough_for_who_asks_for_it() {
    let Some(world) = World::new() else { return };
    let _running = world.start(|_| {});
    world.guest.run(|| {
        let discover = dhcp(MessageType::Discover, &[DhcpOption::RapidCommit]);
        let ack = client().exchange(&discover).unwrap();
        assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
        assert_eq!(ack.yiaddr(), GUEST);
    });
}

#[test]
fn a_renewal_is_answered_to_the_address_itself() {
    let Some(world) = World::new() else { return };
    let _running = world.start(|_| {});
    world.guest.run(|| {
        let socket = client();
        world::configure_guest();
        let mut renewal = dhcp(MessageType::Request, &[]);
        renewal.set_ciaddr(GUEST);
        let ack = socket.exchange(&renewal).unwrap();
        assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    });
}

#[test]
fn another_address_is_refused_and_a_stranger_not_answered() {
    let Some(world) = World::new() else { return };
    let _running = world.start(|_| {});
    world.guest.run(|| {
        let socket = client();
        let mut stranger = dhcp(MessageType::Discover, &[]);
        stranger.set_chaddr(&[0x52, 0x54, 0, 0xde, 0xad, 1]);
        socket.send(&stranger);
        // Packets stay in order: the next answer is the first there is.
        let wrong = [DhcpOption::RequestedIpAddress(Ipv4Addr::new(10, 200, 0, 99))];
        let request = dhcp(MessageType::Request, &wrong);
        let nak = socket.exchange(&request).unwrap();
        assert_eq!(nak.opts().msg_type(), Some(MessageType::Nak));
        assert_eq!(nak.xid(), request.xid());
    });
}

#[test]
fn guests_find_each_other_by_name() {
    let Some(world) = World::new() else { return };
    let _running = world.start(|_| {});
    world.guest.run(|| {
        world::configure_guest();
        for name in ["vm1", "VM1.pavo.local."] {
            let answer = ask(name, RecordType::A);
            assert_eq!(answer.answers()[0].data(), &RData::A(A::new(10, 200, 0, 2)), "{name}");
        }
        let answer = ask("vm7", RecordType::A);
        assert_eq!(answer.answers()[0].data(), &RData::A(A::new(10, 200, 0, 8)), "another host's");
        assert_eq!(ask("vm9.pavo.local.", RecordType::A).response_code(), ResponseCode::NXDomain);
        let answer = ask("1.0.200.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(answer.answers()[0].data().to_string(), "vm0.pavo.local.");
        let answer = ask_by_stream("vm0", RecordType::A);
        assert_eq!(answer.answers()[0].data(), &RData::A(GUEST.into()));
        // Without a name server outside, the rest is refused rather than left to time out.
        assert_eq!(ask("example.org.", RecordType::A).response_code(), ResponseCode::Refused);
    });
}

#[test]
fn only_the_guests_side_is_answered() {
    let Some(world) = World::new() else { return };
    let _running = world.start(|_| {});
    world.join_outside();
    let refused = world.outside.run(|| TcpStream::connect((GATEWAY, 53))).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn names_outside_are_asked_in_the_namespace_of_the_inherited_socket() {
    let Some(world) = World::new() else { return };
    let (server, socket) = world.outside.run(world::name_server);
    let _running = world.start(|spec| spec.inherit_upstream(socket));
    world.guest.run(|| {
        world::configure_guest();
        let answer = ask("example.org.", RecordType::A);
        assert_eq!(answer.answers()[0].data(), &RData::A(A::new(192, 0, 2, 80)));
        // Too much for a datagram: truncated, and then whole by TCP.
        let answer = ask("many.example.org.", RecordType::A);
        assert!(answer.truncated() && answer.answers().is_empty());
        let answer = ask_by_stream("many.example.org.", RecordType::A);
        assert_eq!(answer.answers().len(), 60);
        assert!(answer.extensions().is_none(), "nobody asked for EDNS");
    });
    drop(server);
}

#[test]
fn one_guest_cannot_take_all_connections() {
    let Some(world) = World::new() else { return };
    let _running = world.start(|_| {});
    world.guest.run(|| {
        world::configure_guest();
        let connect = |_| {
            let stream = TcpStream::connect((GATEWAY, 53)).unwrap();
            stream.set_read_timeout(Some(world::LIMIT)).unwrap();
            stream
        };
        let mut open: Vec<TcpStream> = (0..5).map(connect).collect();
        assert_eq!(open[4].read(&mut [0]).unwrap(), 0, "the fifth is closed");
        open.remove(0);
        // The place is free as soon as its end was seen.
        let end = Instant::now() + world::LIMIT;
        while world::try_ask_by_stream("vm0", RecordType::A).is_err() {
            assert!(Instant::now() < end, "the place stays taken");
        }
    });
}

#[test]
fn a_name_server_that_is_down_is_passed_over_and_told_at_once() {
    let Some(world) = World::new() else { return };
    let (server, up) = world.outside.run(world::name_server);
    let down = || world.outside.run(world::dead_name_server);
    let running = world.start(|spec| {
        spec.inherit_upstream(down());
        spec.inherit_upstream(up);
    });
    world.guest.run(|| {
        world::configure_guest();
        assert_eq!(ask("example.org.", RecordType::A).answers().len(), 1);
    });
    drop((running, server));
    let _running = world.start(|spec| spec.inherit_upstream(down()));
    world.guest.run(|| {
        assert_eq!(ask("example.org.", RecordType::A).response_code(), ResponseCode::ServFail);
    });
}

#[test]
fn it_keeps_no_right_and_ends_with_its_life_line() {
    let Some(world) = World::new() else { return };
    for drop_to in [None, world::unprivileged()] {
        let mut running = world.start(|spec| spec.drop_to = drop_to);
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(running.status(set), ["0000000000000000"], "{set}");
        }
        assert_eq!(running.status("NoNewPrivs:"), ["1"]);
        assert_eq!(running.status("Seccomp:"), ["2"]);
        assert_eq!(running.status("Threads:"), ["1"]);
        if let Some((uid, gid)) = drop_to {
            assert_eq!(running.status("Uid:"), vec![uid.to_string(); 4]);
            assert_eq!(running.status("Gid:"), vec![gid.to_string(); 4]);
            assert!(running.status("Groups:").is_empty());
        }
        assert!(running.ends_with_life_line(Duration::from_secs(10)).success());
    }
}

#[test]
fn what_keeps_it_from_starting_is_told_over_the_life_line() {
    let Some(world) = World::new() else { return };
    let (mut child, answer) = world.try_start(|spec| spec.interface = "absent0".into());
    let Answer::Error(error) = answer else { panic!("{answer:?}") };
    assert_eq!(error.what, "listening for DNS on 10.200.255.254:53/udp of `absent0`");
    assert!(error.because[0].contains("No such device"), "{error:?}");
    assert_eq!(child.wait().unwrap().code(), Some(5));
}

#[test]
fn a_descriptor_that_is_not_what_was_said_is_refused() {
    let Some(world) = World::new() else { return };
    let (listener, _): (TcpListener, SocketAddr) = world.outside.run(on_one_host);
    let (mut child, answer) = world.try_start(|spec| {
        let number = spec.inherit(listener);
        spec.upstream.push(number);
    });
    assert!(matches!(answer, Answer::Error(_)), "{answer:?}");
    assert_eq!(child.wait().unwrap().code(), Some(70));
}
