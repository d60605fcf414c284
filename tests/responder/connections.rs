//! Connections to guests: at published ports, and those that the cluster's user dials.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use pavo::network::responder::Published;

use super::world::{self, Dial, GATEWAY, GUEST, World, on_one_host};

#[test]
fn a_published_port_carries_both_ways_until_both_sides_end() {
    let Some(world) = World::new() else { return };
    let echo = world.guest.run(|| {
        world::configure_guest();
        world::listen((GUEST, 22).into())
    });
    let (listener, address) = world.outside.run(on_one_host);
    let _running = world.start(|spec| {
        let listener = spec.inherit(listener);
        spec.publish.push(Published { listener, address: GUEST, port: 22 });
    });

    let mut client = world.connect(address);
    let (mut server, peer) = echo.accept().unwrap();
    assert_eq!(peer.ip(), GATEWAY, "the guest sees its gateway");
    let text = vec![b'x'; 300_000];
    let writer = std::thread::spawn(move || {
        client.write_all(&text).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        client
    });
    let mut received = Vec::new();
    server.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 300_000, "the client's half-close came through");
    server.write_all(b"still open the other way").unwrap();
    drop(server);
    let mut answer = String::new();
    writer.join().unwrap().read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "still open the other way");
}

#[test]
fn a_guest_that_is_not_up_yet_closes_the_published_port_at_once() {
    let Some(world) = World::new() else { return };
    world.guest.run(world::configure_guest);
    let (listener, address) = world.outside.run(on_one_host);
    let _running = world.start(|spec| {
        let listener = spec.inherit(listener);
        spec.publish.push(Published { listener, address: GUEST, port: 22 });
    });
    assert_eq!(world.connect(address).read(&mut [0; 1]).unwrap(), 0);
}

/// What it loses while it boots is not only sent again when the kernel thinks it is time.
#[test]
fn a_guest_that_does_not_answer_is_asked_anew() {
    let Some(world) = World::new() else { return };
    let (listener, address) = world.outside.run(on_one_host);
    let _running = world.start(|spec| {
        let listener = spec.inherit(listener);
        spec.publish.push(Published { listener, address: GUEST, port: 22 });
    });
    // Its link is there, its address is not yet.
    world.cluster.run(world::know_the_guests_link);
    let heard = world.guest.run(world::packets);
    let mut client = world.connect(address);
    let mut asked_from = BTreeSet::new();
    while asked_from.len() < 3 {
        asked_from.extend(world::first_of_a_connection(&heard));
    }
    let server = world.guest.run(|| {
        world::configure_guest();
        world::listen((GUEST, 22).into())
    });
    server.accept().unwrap().0.write_all(b"!").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

#[test]
fn connections_beyond_the_limit_wait_for_their_turn() {
    let Some(world) = World::new() else { return };
    let server = world.guest.run(|| {
        world::configure_guest();
        world::listen((GUEST, 22).into())
    });
    let (listener, address) = world.outside.run(on_one_host);
    let _running = world.start(|spec| {
        let listener = spec.inherit(listener);
        spec.publish.push(Published { listener, address: GUEST, port: 22 });
    });
    let limit = pavo::network::responder::publish::PER_PORT;
    let mut clients: Vec<TcpStream> = (0..=limit).map(|_| world.connect(address)).collect();
    let mut servers: Vec<TcpStream> = (0..limit).map(|_| server.accept().unwrap().0).collect();
    server.set_nonblocking(true).unwrap();
    assert!(server.accept().is_err(), "{limit} at once");
    server.set_nonblocking(false).unwrap();
    drop((clients.remove(0), servers.remove(0)));
    let (mut last, _) = server.accept().unwrap();
    last.write_all(b"!").unwrap();
    clients.last_mut().unwrap().read_exact(&mut [0]).unwrap();
}

#[test]
fn who_dials_gets_to_ports_of_guests_here_and_nowhere_else() {
    let Some(world) = World::new() else { return };
    world.join_outside();
    let echo = world.guest.run(|| {
        world::configure_guest();
        world::listen((GUEST, 80).into())
    });
    let _elsewhere = world.outside.run(|| world::listen(([192, 0, 2, 2], 80).into()));
    let mut dial = None;
    let _running = world.start(|spec| {
        dial = Some(Dial::of(spec));
        spec.drop_to = world::unprivileged();
    });
    let dial = dial.unwrap();

    let mut caller = dial.ask("10.200.0.1 80\nearly");
    let (mut server, peer) = echo.accept().unwrap();
    assert_eq!(peer.ip(), GATEWAY, "the guest sees its gateway");
    server.read_exact(&mut [0; 5]).unwrap();
    caller.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0]).unwrap(), 0, "the half-close came through");
    server.write_all(b"late").unwrap();
    drop(server);
    let mut said = String::new();
    caller.read_to_string(&mut said).unwrap();
    assert_eq!(said, "connected\nlate");

    let long = "1".repeat(100);
    for (request, answer) in [
        ("10.200.0.1 81\n", "refused\n"),
        // Guests of other hosts, the gateway, what lies outside.
        ("10.200.0.8 80\n", "unknown\n"),
        ("10.200.255.254 53\n", "unknown\n"),
        ("192.0.2.2 80\n", "unknown\n"),
        ("127.0.0.1 80\n", "unknown\n"),
        ("vm0 80\n", ""),
        (&long, ""),
    ] {
        let mut said = String::new();
        // What was not read is told by a reset.
        let _ = dial.ask(request).read_to_string(&mut said);
        assert_eq!(said, answer, "{request}");
    }
}

#[test]
fn who_dials_beyond_the_limit_is_told_so_and_others_are_served() {
    let Some(world) = World::new() else { return };
    let [server, other] = world.guest.run(|| {
        world::configure_guest();
        world::ip("addr add 10.200.0.2/16 dev eth0");
        [GUEST, [10, 200, 0, 2].into()].map(|address| world::listen((address, 80).into()))
    });
    let mut socket = None;
    let _running = world.start(|spec| socket = Some(Dial::of(spec)));
    let socket = socket.unwrap();
    let dial = |request: &str, answer: &str| {
        let mut caller = socket.ask(request);
        let mut said = vec![0; answer.len()];
        caller.read_exact(&mut said).unwrap();
        assert_eq!(String::from_utf8_lossy(&said), answer);
        caller
    };
    let limit = pavo::model::dial::PER_GUEST;
    let open: Vec<(UnixStream, TcpStream)> = (0..limit)
        .map(|_| (dial("10.200.0.1 80\n", "connected\n"), server.accept().unwrap().0))
        .collect();
    dial("10.200.0.1 80\n", "busy\n");
    dial("10.200.0.2 80\n", "connected\n");
    other.accept().unwrap();
    drop(open);
    // The places are free as soon as their ends were seen.
    let end = Instant::now() + world::LIMIT;
    loop {
        let mut said = [0; 4];
        socket.ask("10.200.0.1 80\n").read_exact(&mut said).unwrap();
        match &said {
            b"conn" => break,
            said => assert_eq!(said, b"busy"),
        }
        assert!(Instant::now() < end, "the places stay taken");
    }
}
