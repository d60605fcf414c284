//! Packets of IPv6, and of what it is asked and told by (RFC 8200, 4443, 4861).

use std::net::Ipv6Addr;

use super::{Six, udp};

pub fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [0x60, 0, 0, 0, length[0], length[1], next, 255];
    [&head[..], &from.octets(), &to.octets(), payload].concat()
}

/// The checksum of a payload.
pub fn sum(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> [u8; 2] {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut all = [&from.octets()[..], &to.octets(), &length, &[0, 0, 0, next], payload].concat();
    all.resize(all.len().next_multiple_of(2), 0);
    let mut sum: u32 = all.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!sum as u16).to_be_bytes()
}

/// ICMPv6, with all behind its checksum.
pub fn icmp(from: Ipv6Addr, to: Ipv6Addr, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut payload = [&[kind, 0, 0, 0][..], body].concat();
    let sum = sum(from, to, 58, &payload);
    payload[2..4].copy_from_slice(&sum);
    ipv6(from, to, 58, &payload)
}

pub fn datagram(from: Ipv6Addr, to: Ipv6Addr, ports: (u16, u16), text: &[u8]) -> Vec<u8> {
    let mut payload = udp(ports.0, ports.1, text);
    let sum = sum(from, to, 17, &payload);
    payload[6..8].copy_from_slice(&sum);
    ipv6(from, to, 17, &payload)
}

pub fn hello(from: &Six, to: &Six, text: &str) -> Vec<u8> {
    from.to(to.mac, &datagram(from.ip, to.ip, (1000, 1000), text.as_bytes()))
}

/// The group at which who has an address is asked for it, and that group's MAC.
pub fn solicited(target: Ipv6Addr) -> (Ipv6Addr, [u8; 6]) {
    let [.., a, b, c] = target.octets();
    let group = u128::from(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0));
    let low = u128::from(u32::from_be_bytes([0, a, b, c]));
    ((group | low).into(), [0x33, 0x33, 0xff, a, b, c])
}

pub fn option(kind: u8, mac: [u8; 6]) -> Vec<u8> {
    [&[kind, 1][..], &mac].concat()
}

/// Who has `target`? Asked by multicast.
pub fn solicitation(from: &Six, source: Ipv6Addr, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let (group, mac) = solicited(target);
    let body = [&[0; 4][..], &target.octets(), options].concat();
    from.to(mac, &icmp(source, group, 135, &body))
}

/// `target` is at …
pub fn advertisement(source: Ipv6Addr, to: Ipv6Addr, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let body = [&[0x60, 0, 0, 0][..], &target.octets(), options].concat();
    icmp(source, to, 136, &body)
}

/// A header between, of 8 bytes.
pub fn behind(header: u8, from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let between = [&[next, 0, 1, 4, 0, 0, 0, 0][..], payload].concat();
    ipv6(from, to, header, &between)
}

/// A part of a packet, at an offset in units of 8 bytes; more follow.
pub fn fragmented(from: &Six, to: &Six, next: u8, offset: u16, part: &[u8]) -> Vec<u8> {
    let place = (offset << 3 | 1).to_be_bytes();
    let head = [next, 0, place[0], place[1], 0, 0, 0, 9];
    ipv6(from.ip, to.ip, 44, &[&head[..], part].concat())
}
