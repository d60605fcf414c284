//! The Linux bridge as a switch that guests cannot abuse.
//!
//! Each network is a bridge of the job's own, each NIC a port. One table of the
//! `bridge` family per job looks at every frame as it comes out of a guest, before
//! the bridge learns from it or forwards it:
//!
//! ```text
//! prerouting ── by port ──┬─ l2: source MAC
//!                         └─ l3: VLAN tag, source MAC ─┬─ arp:  sender MAC and address
//!                                                      ├─ ipv4: source address, DHCP
//!                                                      └─ IPv6, anything else: dropped
//! input, output ── by port: nothing between guests and the host's own stack
//! ```
//!
//! Sets and maps are keyed by port, so that a frame costs the same with one guest or
//! a thousand. What a guest should not have sent moves two named counters: one with the
//! name of its TAP device, one with the name of the rule ([`DROPS`]). Frames between
//! guests and the host's own stack are nobody's fault (broadcasts go there too): they
//! are counted by direction only.
//!
//! # What holds
//!
//! - A guest sends with its own MAC address only, so it cannot attract others' frames.
//! - On L3 it sends with its own IPv4 address only, in ARP too; without one it can
//!   only probe for an address and ask for a lease. It cannot answer DHCP.
//! - On L3 there is no IPv6: the network offers none yet, guests' link-local addresses
//!   are their own choice and could not be told from forged ones, and router
//!   advertisements or DHCPv6 answers would lead other guests astray.
//! - What a rule lets through is matched by what it must be, never by what it must
//!   not be: a truncated header matches nothing, and what matches nothing is dropped.
//! - Frames to the host's own stack (to the bridge's MAC, or broadcast) end here.
//!
//! Frames of the gateway come in by its veth and are not looked at.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use super::ruleset::*;
use crate::config::Layer;
use crate::host::nft::{Family, Table};
use crate::model::address::Mac;
use crate::model::owner::Owner;

/// The most ports a Linux bridge takes.
pub const MAX_PORTS: usize = 1023;

/// What guests should not send, by the names of its counters.
pub const DROPS: [&str; 7] =
    ["source-mac", "vlan", "arp", "source-address", "dhcp-server", "ipv6", "ethertype"];
const TO_HOST: &str = "to-host";
const FROM_HOST: &str = "from-host";

/// Before everything else, also before conntrack.
const FIRST: i32 = -300;

/// A guest's end of the switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub tap: String,
    pub mac: Mac,
    /// On L3, the one address it may use.
    pub address: Option<Ipv4Addr>,
}

/// The table that guards all ports of a job.
pub fn table(owner: Owner, networks: &[(Layer, Vec<Port>)]) -> Table {
    let ports = || networks.iter().flat_map(|(_, ports)| ports);
    let mut objects: Vec<Value> = DROPS.iter().map(|name| counter(name)).collect();
    objects.extend([TO_HOST, FROM_HOST].map(counter));
    objects.extend(ports().map(|port| counter(&port.tap)));
    let by_tap: Vec<_> = ports().map(|port| (json!(port.tap), json!(port.tap))).collect();
    let macs: Vec<_> = ports().map(|port| tuple(&[json!(port.tap), json!(port.mac)])).collect();
    let addresses: Vec<_> = ports()
        .filter_map(|port| Some(tuple(&[json!(port.tap), json!(port.mac), json!(port.address?)])))
        .collect();
    objects.extend([
        map("drops", "ifname", "counter", &by_tap),
        set("macs", &["ifname", "ether_addr"], &macs),
        set("addresses", &["ifname", "ether_addr", "ipv4_addr"], &addresses),
    ]);
    objects.extend(["l2", "l3", "arp", "ipv4", "ipv4-own"].map(chain));
    let taps: Vec<_> = ports().map(|port| json!(port.tap)).collect();
    objects.push(set("taps", &["ifname"], &taps));
    let dispatch: Vec<_> = networks
        .iter()
        .flat_map(|(layer, ports)| ports.iter().map(move |port| (layer, port)))
        .map(|(layer, port)| (json!(port.tap), goto(if *layer == Layer::L2 { "l2" } else { "l3" })))
        .collect();
    objects.push(map("ports", "ifname", "verdict", &dispatch));
    objects.extend(rules());
    Table { family: Family::Bridge, name: format!("pavo_{owner}"), objects }
}

fn rules() -> Vec<Value> {
    let port = || meta("iifname");
    let ethertype = |value: &str| eq(field("ether", "type"), value);
    let own_mac = |mac: Value| eq(tuple(&[port(), mac]), "@macs");
    let own_address = |mac, ip| eq(tuple(&[port(), mac, ip]), "@addresses");
    let by_port = json!({ "vmap": { "key": port(), "data": "@ports" } });
    let arp_mac = || field("arp", "saddr ether");
    let arp_ip = || field("arp", "saddr ip");
    vec![
        hook("filter", "prerouting", FIRST, "accept"),
        rule("prerouting", &[by_port]),
        // Layer 2: all protocols, VLAN tags too, but only the guest's own MAC.
        rule("l2", &[own_mac(field("ether", "saddr")), accept()]),
        dropped("l2", &[], "source-mac"),
        // Layer 3. The tag first: what follows would look behind it.
        dropped("l3", &[eq(field("ether", "type"), any(&["8021q", "8021ad"]))], "vlan"),
        dropped("l3", &[ne(tuple(&[port(), field("ether", "saddr")]), "@macs")], "source-mac"),
        rule("l3", &[ethertype("arp"), goto("arp")]),
        rule("l3", &[ethertype("ip"), goto("ipv4")]),
        dropped("l3", &[ethertype("ip6")], "ipv6"),
        dropped("l3", &[], "ethertype"),
        // ARP: only Ethernet and IPv4, only about itself.
        rule(
            "arp",
            &[
                eq(field("arp", "htype"), 1),
                eq(field("arp", "ptype"), "ip"),
                eq(field("arp", "hlen"), 6),
                eq(field("arp", "plen"), 4),
                own_address(arp_mac(), arp_ip()),
                accept(),
            ],
        ),
        // RFC 5227: is the address taken?
        rule(
            "arp",
            &[
                eq(field("arp", "operation"), "request"),
                eq(arp_ip(), "0.0.0.0"),
                own_mac(arp_mac()),
                accept(),
            ],
        ),
        dropped("arp", &[], "arp"),
        // A DHCP client that has no address yet.
        rule(
            "ipv4",
            &[
                eq(field("ip", "saddr"), "0.0.0.0"),
                eq(field("ip", "daddr"), "255.255.255.255"),
                eq(field("udp", "sport"), 68),
                eq(field("udp", "dport"), 67),
                accept(),
            ],
        ),
        rule(
            "ipv4",
            &[own_address(field("ether", "saddr"), field("ip", "saddr")), goto("ipv4-own")],
        ),
        dropped("ipv4", &[], "source-address"),
        dropped("ipv4-own", &[eq(field("udp", "sport"), 67)], "dhcp-server"),
        dropped("ipv4-own", &[eq(field("udp", "dport"), 68)], "dhcp-server"),
        rule("ipv4-own", &[accept()]),
        hook("filter", "input", FIRST, "accept"),
        rule("input", &[eq(port(), "@taps"), count(TO_HOST), drop()]),
        hook("filter", "output", FIRST, "accept"),
        rule("output", &[eq(meta("oifname"), "@taps"), count(FROM_HOST), drop()]),
    ]
}

/// A rule that drops what matches, counted for the guest and for the rule.
fn dropped(chain: &str, matches: &[Value], name: &str) -> Value {
    let by_port = json!({ "counter": { "map": { "key": meta("iifname"), "data": "@drops" } } });
    let mut words = matches.to_vec();
    words.extend([by_port, count(name), drop()]);
    rule(chain, &words)
}
