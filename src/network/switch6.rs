//! What guests with IPv6 may send: the part of the [`switch`](super::switch) for it.
//!
//! ```text
//! l3 ── own address ── ipv6-own ─┬─ TCP, UDP, other transports: pass
//!                                ├─ DHCPv6 ── ask-dhcp ── the gateway's alone
//!                                ├─ ICMPv6 ── icmpv6: errors, echo; neighbour discovery
//!                                │            about itself; router solicitations
//!                                └─ ipv6-rest: fragments of these; else dropped
//!    ── other ────── ipv6 ─┬─ link-local, of nobody ── DHCPv6 and neighbour discovery,
//!                          ├─ none (::) ──────────────  to the gateway alone, not too often
//!                          └─ dropped
//! ```
//!
//! # What holds
//!
//! - A guest sends with its own address, and with the link-local one of its MAC.
//! - It cannot say that another has its MAC, nor that it has another's address: what it says
//!   of itself (RFC 4861, options of source and target) is the only option, and its own MAC.
//! - Router advertisements, redirects and DHCPv6 answers of guests are dropped. They cannot
//!   hide: behind an extension header, but that of a fragment, nothing passes; in fragments
//!   neither ICMPv6 but echo, nor the ports of DHCPv6.
//! - A guest whose system makes a link-local address up (RFC 7217) can have it: with it, and
//!   without any, it reaches the gateway only. Such a frame gets the gateway's MAC, whatever
//!   it had; so no other guest, here or on other hosts, hears it.
//! - It does so [so often](ASKS), for each such address is an entry in the kernel's table of
//!   neighbours, of which all jobs and the host have one. Its own are known for good.
//! - A guest looks whether its addresses are taken (RFC 4862) in vain: nobody else hears of it.
//! - Which guest asks by DHCPv6, its packet says in the source port that it gets here
//!   ([`PORTS`](super::responder::dhcp6::PORTS)): its identifiers could be anybody's.
//! - Who listens to which multicast group nobody wants to know: it goes to all. These reports
//!   end here, and are nobody's fault.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use serde_json::{Value, json};

use super::responder::dhcp6;
use super::ruleset::*;
use super::switch::{Network, Port, TO_OTHERS, dropped};
use crate::model::address::Mac;
use crate::model::prefix::link_local;

/// The drops that only a job with IPv6 has, by the names of their counters.
pub const DROPS: [&str; 3] = ["router", "neighbour", "too-often"];
const LISTENER: &str = "listener";

/// How often a second one guest may ask for routers, or its gateway by an address that it made
/// up; and at once.
pub const ASKS: u32 = 2;
pub const ASKS_AT_ONCE: u32 = 16;

// Types of ICMPv6.
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Errors, and echo.
const HARMLESS: [u8; 6] = [1, 2, 3, 4, 128, 129];
const ECHO: [u8; 2] = [128, 129];

// Protocols, and headers between.
const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
/// GRE, ESP, SCTP.
const TRANSPORTS: [u8; 3] = [47, 50, 132];

/// Solicitation or advertisement, and no more (RFC 4861, 4.3 and 4.4).
const BARE: u8 = 24;
/// The same with one option of 8 bytes.
const WITH_OPTION: u8 = 32;
/// Kinds of options with their length.
const SOURCE: u16 = 0x0101;
const TARGET: u16 = 0x0201;
const NONCE: u16 = 0x0e01;

/// A guest of a network with IPv6, behind a port.
struct Sender<'a> {
    link: &'a str,
    mac: Mac,
    address: Ipv6Addr,
}

fn senders<'a>(networks: &'a [Network<'_>]) -> impl Iterator<Item = Sender<'a>> {
    let with = networks.iter().filter(|network| network.prefix6.is_some());
    with.flat_map(|network| {
        let near = network.ports.iter().map(|port| (port.tap.as_str(), port.mac, port.address6));
        let far = network.tunnel.iter().flat_map(|tunnel| {
            tunnel.guests.iter().map(|guest| (tunnel.link.as_str(), guest.mac, guest.address6))
        });
        near.chain(far).flat_map(|(link, mac, address)| {
            let own = [address, Some(link_local(mac))];
            own.into_iter().flatten().map(move |address| Sender { link, mac, address })
        })
    })
}

/// The ports of guests on this host, with their gateway.
fn near<'a>(networks: &'a [Network<'_>]) -> impl Iterator<Item = (&'a Port, Mac)> {
    let with = networks.iter().filter(|network| network.prefix6.is_some());
    with.filter_map(|network| Some((network.ports, network.gateway?.1)))
        .flat_map(|(ports, gateway)| ports.iter().map(move |port| (port, gateway)))
}

/// All addresses that somebody has.
fn known(networks: &[Network<'_>]) -> BTreeSet<Ipv6Addr> {
    let gateways = networks
        .iter()
        .filter_map(|network| Some([network.prefix6?.gateway(), link_local(network.gateway?.1)]));
    senders(networks).map(|sender| sender.address).chain(gateways.flatten()).collect()
}

/// Counters, sets, maps and chains, and all rules but those of the chains `l3` and `far`, which
/// come later; nothing where no network has IPv6.
pub fn objects(networks: &[Network<'_>]) -> Vec<Value> {
    if senders(networks).next().is_none() {
        return Vec::new();
    }
    let mut objects: Vec<Value> = DROPS.iter().map(|name| counter(name)).collect();
    objects.push(counter(LISTENER));
    let addresses: Vec<_> = senders(networks)
        .map(|s| tuple(&[json!(s.link), json!(s.mac), json!(s.address)]))
        .collect();
    let known: Vec<_> = known(networks).into_iter().map(|address| json!(address)).collect();
    let gateways: Vec<_> =
        near(networks).map(|(port, gateway)| (json!(port.tap), json!(gateway))).collect();
    let dhcp: Vec<_> = near(networks)
        .filter_map(|(port, _)| Some((json!(port.tap), json!(dhcp6::port_of(port.rank)?))))
        .collect();
    let ports: Vec<_> = near(networks).map(|(port, _)| json!(port.tap)).collect();
    let limit_of = |port: &Port| format!("{}-asks", port.tap);
    objects.extend(near(networks).map(|(port, _)| limit(&limit_of(port), ASKS, ASKS_AT_ONCE)));
    let asks: Vec<_> =
        near(networks).map(|(port, _)| (json!(port.tap), json!(limit_of(port)))).collect();
    objects.extend([
        set("addresses6", &["ifname", "ether_addr", "ipv6_addr"], &addresses),
        set("known6", &["ipv6_addr"], &known),
        set("ports6", &["ifname"], &ports),
        map("gateways6", "ifname", "ether_addr", &gateways),
        map("dhcp6", "ifname", "inet_service", &dhcp),
        map("asks6", "ifname", "limit", &asks),
    ]);
    let chains = ["ipv6", "link-local", "unspecified", "ipv6-own", "icmpv6", "ipv6-rest"];
    objects.extend(chains.map(chain));
    objects.extend(["fragment", "ask-dhcp", "ask-gateway", "ask", "seldom"].map(chain));
    objects.extend(tests(networks));
    objects.extend(own_rules());
    objects.extend(rest_rules());
    objects.extend(other_rules());
    objects
}

/// The rules of the chain `l3` for frames of IPv6: VLAN tag and MAC have been looked at.
pub fn near_rules(networks: &[Network<'_>]) -> Vec<Value> {
    if senders(networks).next().is_none() {
        return Vec::new();
    }
    let is_guests = eq(meta("iifname"), "@ports6");
    vec![
        rule("l3", &[is_ipv6(), own(), goto("ipv6-own")]),
        rule("l3", &[is_ipv6(), is_guests, goto("ipv6")]),
    ]
}

/// The rules of the chain `far` for such frames from other hosts' guests, and what they need.
pub fn far_rules(networks: &[Network<'_>]) -> Vec<Value> {
    if senders(networks).next().is_none() {
        return Vec::new();
    }
    let to_gateway = eq(field("ether", "daddr"), "@gateway-macs");
    vec![
        chain("far-own6"),
        rule("far-own6", &[to_gateway, count(TO_OTHERS), drop()]),
        rule("far-own6", &[goto("ipv6-own")]),
        rule("far", &[is_ipv6(), own(), goto("far-own6")]),
    ]
}

fn is_ipv6() -> Value {
    eq(field("ether", "type"), "ip6")
}

/// Port, MAC and address belong to one guest.
fn own() -> Value {
    eq(tuple(&[meta("iifname"), field("ether", "saddr"), field("ip6", "saddr")]), "@addresses6")
}

fn next(header: u8) -> Value {
    eq(field("ip6", "nexthdr"), header)
}

fn kind(kind: u8) -> Value {
    eq(field("icmpv6", "type"), kind)
}

fn one_of(left: Value, values: impl Into<Value>) -> Value {
    eq(left, json!({ "set": values.into() }))
}

fn length(length: u8) -> Value {
    eq(field("ip6", "length"), length)
}

/// The option behind a solicitation or advertisement is of this kind, and the only one.
fn option(kind: u16) -> [Value; 2] {
    [length(WITH_OPTION), eq(raw("th", 192, 16), kind)]
}

/// Chains that come back if a packet is as it must be, and drop it else. Sets of what has no
/// type have no names: each is in one rule.
fn tests(networks: &[Network<'_>]) -> [Value; 9] {
    // The MAC in an option is that of the frame, which is the guest's.
    let macs: BTreeSet<Mac> = senders(networks).map(|sender| sender.mac).collect();
    let macs = macs.into_iter().map(|mac| tuple(&[json!(mac), json!(hex(mac))]));
    let own_mac = tuple(&[field("ether", "saddr"), raw("th", 208, 48)]);
    // It is about an address of the guest's own.
    let own: Vec<_> = senders(networks)
        .map(|s| tuple(&[json!(s.link), json!(s.mac), json!(number(s.address))]))
        .collect();
    let itself = tuple(&[meta("iifname"), field("ether", "saddr"), raw("th", 64, 128)]);
    // It is about an address that was made up, and that nobody has.
    let known: Vec<_> = known(networks).into_iter().map(|it| json!(number(it))).collect();
    let link_local = eq(raw("th", 64, 64), "0xfe80000000000000");
    let nobodys = ne(raw("th", 64, 128), json!({ "set": known }));
    [
        chain("own-mac"),
        rule("own-mac", &[one_of(own_mac, macs.collect::<Vec<_>>()), back()]),
        dropped("own-mac", &[], "neighbour"),
        chain("itself"),
        rule("itself", &[one_of(itself, own), back()]),
        dropped("itself", &[], "neighbour"),
        chain("made-up"),
        rule("made-up", &[link_local, nobodys, back()]),
        dropped("made-up", &[], "source-address"),
    ]
}

fn hex(Mac(mac): Mac) -> String {
    mac.iter().fold("0x".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

fn number(address: Ipv6Addr) -> String {
    format!("{:#034x}", u128::from(address))
}

/// With an address of its own.
fn own_rules() -> Vec<Value> {
    let nd = |kind_of: u8, more: &[Value], then: Value| {
        rule("icmpv6", &[&[next(ICMPV6), kind(kind_of)], more, &[then]].concat())
    };
    vec![
        rule("ipv6-own", &[next(TCP), accept()]),
        dropped("ipv6-own", &[eq(field("udp", "sport"), dhcp6::SERVER)], "dhcp-server"),
        dropped("ipv6-own", &[eq(field("udp", "dport"), dhcp6::CLIENT)], "dhcp-server"),
        rule("ipv6-own", &[next(UDP), eq(field("udp", "dport"), dhcp6::SERVER), goto("ask-dhcp")]),
        rule("ipv6-own", &[next(UDP), accept()]),
        rule("ipv6-own", &[next(ICMPV6), goto("icmpv6")]),
        rule("ipv6-own", &[goto("ipv6-rest")]),
        rule("icmpv6", &[one_of(field("icmpv6", "type"), HARMLESS.to_vec()), accept()]),
        nd(NEIGHBOUR_ADVERTISEMENT, &[], jump("itself")),
        nd(NEIGHBOUR_SOLICITATION, &option(SOURCE), jump("own-mac")),
        nd(NEIGHBOUR_ADVERTISEMENT, &option(TARGET), jump("own-mac")),
        nd(NEIGHBOUR_SOLICITATION, &option(SOURCE), accept()),
        nd(NEIGHBOUR_ADVERTISEMENT, &option(TARGET), accept()),
        nd(NEIGHBOUR_SOLICITATION, &[length(BARE)], accept()),
        nd(NEIGHBOUR_ADVERTISEMENT, &[length(BARE)], accept()),
        nd(ROUTER_SOLICITATION, &[], goto("ask")),
        dropped("icmpv6", &[kind(ROUTER_ADVERTISEMENT)], "router"),
        dropped("icmpv6", &[kind(REDIRECT)], "router"),
        dropped("icmpv6", &[], "neighbour"),
    ]
}

/// Neither TCP nor UDP nor ICMPv6, as far as the first header says.
fn rest_rules() -> Vec<Value> {
    // Of the header behind the first: what follows it, and where in the whole this part lies.
    let inner = || raw("nh", 320, 8);
    let later = ne(masked(raw("nh", 336, 16), 0xfff8), 0);
    let dhcp = || json!({ "set": [dhcp6::CLIENT, dhcp6::SERVER] });
    vec![
        rule("ipv6-rest", &[one_of(field("ip6", "nexthdr"), TRANSPORTS.to_vec()), accept()]),
        rule("ipv6-rest", &[next(FRAGMENT), goto("fragment")]),
        listener("ipv6-rest"),
        dropped("ipv6-rest", &[], "ipv6"),
        rule("fragment", &[later, one_of(inner(), vec![TCP, UDP, ICMPV6]), accept()]),
        rule("fragment", &[eq(inner(), TCP), accept()]),
        rule(
            "fragment",
            &[
                eq(inner(), UDP),
                ne(raw("nh", 384, 16), dhcp()),
                ne(raw("nh", 400, 16), dhcp()),
                accept(),
            ],
        ),
        rule(
            "fragment",
            &[eq(inner(), ICMPV6), one_of(raw("nh", 384, 8), ECHO.to_vec()), accept()],
        ),
        dropped("fragment", &[], "ipv6"),
    ]
}

/// With an address that nobody is known to have, or with none.
fn other_rules() -> Vec<Value> {
    let saddr = || field("ip6", "saddr");
    let nd = |chain: &str, kind_of: u8, more: &[Value], then: Value| {
        rule(chain, &[&[next(ICMPV6), kind(kind_of)], more, &[then]].concat())
    };
    let ask = || goto("ask");
    let no_entry = || goto("ask-gateway");
    let dhcp = [
        next(UDP),
        eq(field("udp", "sport"), dhcp6::CLIENT),
        eq(field("udp", "dport"), dhcp6::SERVER),
    ];
    let fe80 = json!({ "prefix": { "addr": "fe80::", "len": 64 } });
    let by_port = |map: &str| json!({ "map": { "key": meta("iifname"), "data": map } });
    let to_gateway = || write(field("ether", "daddr"), by_port("@gateways6"));
    vec![
        dropped("ipv6", &[eq(saddr(), "@known6")], "source-address"),
        rule("ipv6", &[eq(saddr(), fe80), goto("link-local")]),
        rule("ipv6", &[eq(saddr(), "::"), goto("unspecified")]),
        dropped("ipv6", &[], "source-address"),
        rule("link-local", &[&dhcp[..], &[jump("seldom")]].concat()),
        rule("link-local", &[&dhcp[..], &[goto("ask-dhcp")]].concat()),
        nd("link-local", ROUTER_SOLICITATION, &[], ask()),
        nd("link-local", NEIGHBOUR_ADVERTISEMENT, &[], jump("made-up")),
        nd("link-local", NEIGHBOUR_SOLICITATION, &option(SOURCE), jump("own-mac")),
        nd("link-local", NEIGHBOUR_ADVERTISEMENT, &option(TARGET), jump("own-mac")),
        nd("link-local", NEIGHBOUR_SOLICITATION, &option(SOURCE), ask()),
        nd("link-local", NEIGHBOUR_ADVERTISEMENT, &option(TARGET), ask()),
        nd("link-local", NEIGHBOUR_SOLICITATION, &[length(BARE)], ask()),
        nd("link-local", NEIGHBOUR_ADVERTISEMENT, &[length(BARE)], ask()),
        listener("link-local"),
        dropped("link-local", &[], "source-address"),
        nd("unspecified", ROUTER_SOLICITATION, &[], ask()),
        nd("unspecified", NEIGHBOUR_SOLICITATION, &[length(BARE)], no_entry()),
        nd("unspecified", NEIGHBOUR_SOLICITATION, &option(NONCE), no_entry()),
        listener("unspecified"),
        dropped("unspecified", &[], "source-address"),
        rule(
            "ask-dhcp",
            &[write(field("udp", "sport"), by_port("@dhcp6")), to_gateway(), accept()],
        ),
        // A tunnel has no gateway: what comes by it is for guests.
        dropped("ask-dhcp", &[], "dhcp-server"),
        rule("ask", &[jump("seldom")]),
        rule("ask", &[goto("ask-gateway")]),
        rule("seldom", &[json!({ "limit": by_port("@asks6") }), back()]),
        dropped("seldom", &[eq(meta("iifname"), "@ports6")], "too-often"),
        rule("ask-gateway", &[to_gateway(), accept()]),
        dropped("ask-gateway", &[], "neighbour"),
    ]
}

/// Reports of multicast listeners (RFC 3810) come behind a header of their own.
fn listener(chain: &str) -> Value {
    let group = json!({ "prefix": { "addr": "ff02::", "len": 16 } });
    rule(chain, &[next(HOP_BY_HOP), eq(field("ip6", "daddr"), group), count(LISTENER), drop()])
}
