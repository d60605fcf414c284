//! What a hostile guest sends.

use std::net::Ipv6Addr;

use super::packets::*;
use super::*;

/// Frames that must not leave the guest `a`, each with the rule that stops it.
pub fn frames(a: &Six, b: &Six) -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let other: Ipv6Addr = "2001:db8::1".parse().unwrap();
    let neighbour = Ipv6Addr::from(u128::from(a.ip) + 77);
    let text = |from| a.to(b.mac, &datagram(from, b.ip, (1, 1), b"x"));
    let ports = |sport, dport| a.to(b.mac, &datagram(a.ip, b.ip, (sport, dport), b"x"));
    let router = [0; 12];
    let advertised = |from| a.to([0x33, 0x33, 0, 0, 0, 1], &icmp(from, ALL_NODES, 134, &router));
    let said =
        |source, target, options: &[u8]| a.to(b.mac, &advertisement(source, b.ip, target, options));
    let source = |mac| option(1, mac);
    let target = |mac| option(2, mac);
    let twice = [target(a.mac), target(b.mac)].concat();
    let hidden = icmp(a.ip, b.ip, 134, &router)[40..].to_vec();
    let fragment = |next, part: &[u8]| a.to(b.mac, &behind(44, a.ip, b.ip, next, part));
    vec![
        ("another's MAC", "source-mac", ethernet(b.mac, FORGED, 0x86dd, &hello(a, b, "x")[14..])),
        ("another's address", "source-address", text(b.ip)),
        ("a neighbour's address", "source-address", text(neighbour)),
        ("an address of elsewhere", "source-address", text(other)),
        ("the gateway's address", "source-address", text(a.gateway)),
        ("the gateway's own link's", "source-address", text(link_local(mac(a.guest.gateway_mac)))),
        ("another's link-local", "source-address", text(b.own_link)),
        ("a made-up link-local to a guest", "source-address", text(MADE_UP)),
        ("no address", "source-address", text(NONE)),
        ("half a header", "source-address", a.to(b.mac, &[0x60; 20])),
        ("a router's advertisement", "router", advertised(a.own_link)),
        ("the same of its address", "router", advertised(a.ip)),
        ("the same of a made-up one", "source-address", advertised(MADE_UP)),
        (
            "the same of the gateway",
            "source-address",
            advertised(link_local(mac(a.guest.gateway_mac))),
        ),
        ("the same behind options", "ipv6", a.to(b.mac, &behind(60, a.ip, b.ip, 58, &hidden))),
        ("the same behind a hop", "ipv6", a.to(b.mac, &behind(0, a.ip, b.ip, 58, &hidden))),
        ("the same behind a route", "ipv6", a.to(b.mac, &behind(43, a.ip, b.ip, 58, &hidden))),
        ("the same in a fragment", "ipv6", a.to(b.mac, &fragmented(a, b, 58, 0, &hidden))),
        ("options in a fragment", "ipv6", fragment(60, &[58, 0, 1, 4, 0, 0, 0, 0])),
        ("a redirect", "router", a.to(b.mac, &icmp(a.own_link, b.own_link, 137, &[0; 36]))),
        ("another's address is here", "neighbour", said(a.ip, a.gateway, &target(a.mac))),
        ("the same of its link", "neighbour", said(a.own_link, b.own_link, &target(a.mac))),
        ("the same without a word", "neighbour", said(a.ip, a.gateway, &[])),
        ("its address is elsewhere", "neighbour", said(a.ip, a.ip, &target(FORGED))),
        ("the same, in the second place", "neighbour", said(a.ip, a.ip, &twice)),
        ("another asks, it says", "neighbour", solicitation(a, a.ip, b.ip, &source(b.mac))),
        (
            "two words in one",
            "neighbour",
            solicitation(a, a.ip, b.ip, &[source(a.mac), source(b.mac)].concat()),
        ),
        ("the target's option", "neighbour", solicitation(a, a.ip, b.ip, &target(a.mac))),
        (
            "asked for nobody with a MAC",
            "source-address",
            solicitation(a, NONE, b.ip, &source(a.mac)),
        ),
        (
            "made up, with another's MAC",
            "neighbour",
            solicitation(a, MADE_UP, b.ip, &source(b.mac)),
        ),
        ("made up, about a guest", "source-address", said(MADE_UP, b.own_link, &target(a.mac))),
        ("made up, about an address", "source-address", said(MADE_UP, a.gateway, &target(a.mac))),
        ("a DHCPv6 answer", "dhcp-server", ports(547, 546)),
        ("a DHCPv6 answer from elsewhere", "dhcp-server", ports(5, 546)),
        ("a DHCPv6 server's", "dhcp-server", ports(547, 547)),
        (
            "a DHCPv6 answer of its link's",
            "dhcp-server",
            a.to(b.mac, &datagram(a.own_link, b.own_link, (547, 546), b"x")),
        ),
        (
            "a DHCPv6 answer made up",
            "source-address",
            a.to(b.mac, &datagram(MADE_UP, b.own_link, (547, 546), b"x")),
        ),
        (
            "the same in a fragment",
            "dhcp-server",
            a.to(b.mac, &fragmented(a, b, 17, 0, &udp(547, 546, b"x"))),
        ),
        ("a tunnel", "ipv6", a.to(b.mac, &ipv6(a.ip, b.ip, 41, &[0x60; 60]))),
        ("an authenticated one", "ipv6", a.to(b.mac, &ipv6(a.ip, b.ip, 51, &[58; 60]))),
        (
            "a VLAN tag",
            "vlan",
            ethernet(
                b.mac,
                a.mac,
                0x8100,
                &[&[0, 7, 0x86, 0xdd][..], &hello(a, b, "x")[14..]].concat(),
            ),
        ),
    ]
}
