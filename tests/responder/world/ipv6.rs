//! What a guest does by IPv6, and what the gateway has for it.

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use pavo::model::prefix::Prefix64;
use pavo::network::responder::Ipv6;

use super::{LIMIT, World, ip};

/// Gives the gateway what it has of IPv6 where the network does.
pub fn with_ipv6(world: &World) -> Ipv6 {
    let prefix: Prefix64 = "fd12:3456:789a:1::/64".parse().unwrap();
    world.cluster.run(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/gw/accept_dad", "0").unwrap();
        ip(&format!("addr add {}/64 dev gw nodad", prefix.gateway()));
        let text = output("link show dev gw");
        let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        Ipv6 { prefix, gateway_mac: mac.parse().unwrap() }
    })
}

fn output(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The guest's routes, once there is one to this network. It asks for a router when its link
/// comes up.
pub fn until_route(network: &str) -> String {
    let end = Instant::now() + LIMIT;
    loop {
        ip("link set eth0 down");
        ip("link set eth0 up");
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(5) {
            let routes = output("-6 route show dev eth0");
            if routes.contains(network) {
                return routes;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(Instant::now() < end, "no advertisement");
    }
}

/// The addresses that the guest has, but for its link's.
pub fn addresses6() -> String {
    output("-6 -o addr show dev eth0 scope global")
}

/// Sends echo requests to all on the link, in the guest, until one is answered.
pub fn ping_all_nodes() {
    const ALL: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let (kind, protocol) = (SockType::Raw, Some(SockProtocol::IcmpV6));
    let socket = socket(AddressFamily::Inet6, kind, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_multicast_loop_v6(false).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let to = SocketAddrV6::new(ALL, 0, 0, nix::net::if_::if_nametoindex("eth0").unwrap());
    let end = Instant::now() + LIMIT;
    let mut buffer = [0; 1500];
    loop {
        // Its address may still be looked at.
        let _ = socket.send_to(&[128, 0, 0, 0, 0, 7, 0, 1], to);
        if socket.recv(&mut buffer).is_ok() && buffer[0] == 129 {
            return;
        }
        assert!(Instant::now() < end, "no answer");
    }
}

/// What a server says to a first message from this port.
pub fn solicit(port: u16) -> Vec<u8> {
    const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
    let identifier = [0, 1, 0, 7, 0, 2, 0, 0, 0, 9, 9];
    let association = [0, 3, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    let message = [&[1, 7, 7, 7][..], &identifier, &association].concat();
    let index = nix::net::if_::if_nametoindex("eth0").unwrap();
    let bind = |port| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap();
    let (client, asking) = (bind(546), bind(port));
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut buffer = [0; 1500];
    let end = Instant::now() + LIMIT;
    loop {
        // Its address may still be looked at.
        let _ = asking.send_to(&message, SocketAddrV6::new(SERVERS, 547, 0, index));
        match client.recv(&mut buffer) {
            Ok(length) => return buffer[..length].to_vec(),
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    }
}
