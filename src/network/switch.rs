//! The Linux bridge as a switch that guests cannot abuse.
//!
//! Each network is a bridge of the job's own, each NIC a port. One table of the
//! `bridge` family per job looks at every frame as it comes out of a guest, before
//! the bridge learns from it or forwards it:
//!
//! ```text
//! prerouting ── right in every way: passes, with one look into a set
//!            ── by port ──┬─ l2: source MAC
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
//! - On L3 there is IPv6 only where the network has it (`switch6`): else guests' link-local
//!   addresses, which are their own choice, could not be told from forged ones, and router
//!   advertisements or DHCPv6 answers would lead other guests astray.
//! - What a rule lets through is matched by what it must be, never by what it must
//!   not be: a truncated header matches nothing, and what matches nothing is dropped.
//! - Frames to the host's own stack (to the bridge's MAC, or broadcast) end here.
//!
//! Frames of the gateway come in by its veth and are not looked at.
//!
//! # With other hosts
//!
//! The tunnel to the job's other hosts is a port with many guests behind it, looked at in
//! the same way: what comes out of it has the MAC, and on L3 the address, of one of them.
//! And what goes into it is looked at, too:
//!
//! ```text
//! prerouting ── gateway: nothing for MACs of the tunnel
//!            ── tunnel: nothing for the gateway's MAC
//! forward ── IPv4 to one MAC: passes
//!         ── by port ──┬─ tunnel, l3: nothing of the gateway, no ARP or DHCP
//!                      ├─ tunnel: for all, so many frames a second of each guest
//!                      └─ gateway: nothing of the tunnel
//! ```
//!
//! - Each host is the gateway of its own guests: between gateway and tunnel nothing passes,
//!   either way.
//! - On L3 no ARP passes: the bridge answers for far guests. It does so for broadcasts only,
//!   so a guest's unicast question about a far one becomes a broadcast before the bridge
//!   sees it.
//! - What should stay on this host moves the counter `to-others`; it is nobody's fault.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use super::fabric::Tunnel;
use super::ruleset::*;
use super::switch6;
use crate::config::Layer;
use crate::host::nft::{Family, Table};
use crate::model::address::Mac;
use crate::model::owner::Owner;
use crate::model::prefix::Prefix64;

/// The most ports a Linux bridge takes.
pub const MAX_PORTS: usize = 1023;

/// What guests should not send, by the names of its counters.
pub const DROPS: [&str; 7] =
    ["source-mac", "vlan", "arp", "source-address", "dhcp-server", "ipv6", "ethertype"];
const TO_HOST: &str = "to-host";
const FROM_HOST: &str = "from-host";

/// The drops that only a job of several hosts has.
pub const FABRIC_DROPS: [&str; 1] = ["broadcast"];
pub(super) const TO_OTHERS: &str = "to-others";

/// How many frames a second, and at once, one guest may send to all guests on other hosts.
pub const BROADCASTS: u32 = 1000;

/// Before everything else, also before conntrack.
const FIRST: i32 = -300;

/// A guest's end of the switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub tap: String,
    pub rank: u32,
    pub mac: Mac,
    pub queues: u32,
    /// On L3, the one address it may use.
    pub address: Option<Ipv4Addr>,
    /// On L3 with IPv6, the one it may use beside that which follows from its MAC.
    pub address6: Option<Ipv6Addr>,
}

/// The names of those that are meant.
pub fn taps(ports: &[Port], which: impl Fn(&Port) -> bool) -> Vec<String> {
    ports.iter().filter(|port| which(port)).map(|port| port.tap.clone()).collect()
}

/// One network's part of the switch.
#[derive(Clone, Copy, Debug)]
pub struct Network<'a> {
    pub layer: Layer,
    pub ports: &'a [Port],
    /// The link of the gateway, and its MAC.
    pub gateway: Option<(&'a str, Mac)>,
    /// Where guests have IPv6 addresses.
    pub prefix6: Option<Prefix64>,
    pub tunnel: Option<&'a Tunnel>,
}

/// The table that guards all ports of a job.
pub fn table(owner: Owner, networks: &[Network<'_>]) -> Table {
    let tunnels = networks.iter().any(|network| network.tunnel.is_some());
    let links = links(networks);
    let mut objects: Vec<Value> = DROPS.iter().map(|name| counter(name)).collect();
    objects.extend([TO_HOST, FROM_HOST].map(counter));
    objects.extend(links.iter().map(|link| counter(link.name)));
    let by_link: Vec<_> = links.iter().map(|link| (json!(link.name), json!(link.name))).collect();
    let macs: Vec<_> = senders(networks).map(|(link, mac, _)| tuple(&[link, mac])).collect();
    let addresses: Vec<_> = senders(networks)
        .filter_map(|(link, mac, address)| Some(tuple(&[link, mac, json!(address?)])))
        .collect();
    objects.extend([
        map("drops", "ifname", "counter", &by_link),
        set("macs", &["ifname", "ether_addr"], &macs),
        set("addresses", &["ifname", "ether_addr", "ipv4_addr"], &addresses),
    ]);
    objects.extend(["l2", "l3", "arp", "ipv4", "ipv4-own"].map(chain));
    objects.extend(switch6::objects(networks));
    if tunnels {
        objects.extend(fabric(networks));
    }
    let names: Vec<_> = links.iter().map(|link| json!(link.name)).collect();
    objects.push(set("taps", &["ifname"], &names));
    let dispatch: Vec<_> = links.iter().map(|link| (json!(link.name), goto(link.chain))).collect();
    let gateways = across(networks).filter_map(|(network, _)| network.gateway);
    let dispatch: Vec<_> = dispatch
        .into_iter()
        .chain(gateways.map(|(link, _)| (json!(link), goto("from-gateway"))))
        .collect();
    objects.push(map("ports", "ifname", "verdict", &dispatch));
    objects.push(hook("filter", "prerouting", FIRST, "accept"));
    objects.extend(short_way(networks));
    objects.extend(rules(switch6::near_rules(networks)));
    Table { family: Family::Bridge, name: format!("pavo_{owner}"), objects }
}

/// A port whose frames are looked at.
struct Link<'a> {
    name: &'a str,
    /// Where.
    chain: &'static str,
}

fn links<'a>(networks: &[Network<'a>]) -> Vec<Link<'a>> {
    let mut links = Vec::new();
    for network in networks {
        let (near, far) = if network.layer == Layer::L2 { ("l2", "l2") } else { ("l3", "far") };
        links.extend(network.ports.iter().map(|port| Link { name: &port.tap, chain: near }));
        links.extend(network.tunnel.map(|tunnel| Link { name: &tunnel.link, chain: far }));
    }
    links
}

/// Who may send by which port: the port, the MAC, on L3 the address.
fn senders<'a>(
    networks: &'a [Network<'_>],
) -> impl Iterator<Item = (Value, Value, Option<Ipv4Addr>)> + 'a {
    networks.iter().flat_map(|network| {
        let near = network.ports.iter().map(|p| (json!(p.tap), json!(p.mac), p.address));
        let far = network.tunnel.iter().flat_map(|tunnel| {
            tunnel.guests.iter().map(|g| (json!(tunnel.link), json!(g.mac), g.address))
        });
        near.chain(far)
    })
}

/// Nearly all frames of a job that computes, with one look into one set: right in every way,
/// and of no protocol, nor for a guest, that asks for more.
fn short_way(networks: &[Network<'_>]) -> Option<Value> {
    if networks.iter().all(|network| network.layer == Layer::L2) {
        return None;
    }
    let sender = [meta("iifname"), field("ether", "saddr"), field("ip", "saddr")];
    let mut words = vec![eq(field("ether", "type"), "ip"), ne(field("ip", "protocol"), "udp")];
    words.extend(gateways(networks).into_iter().map(|mac| ne(field("ether", "daddr"), mac)));
    words.extend([eq(tuple(&sender), "@addresses"), accept()]);
    Some(rule("prerouting", &words))
}

/// The networks with guests on other hosts.
fn across<'a>(
    networks: &'a [Network<'a>],
) -> impl Iterator<Item = (&'a Network<'a>, &'a Tunnel)> + 'a {
    networks.iter().filter_map(|network| Some((network, network.tunnel?)))
}

/// The gateways that other hosts' guests must not reach.
fn gateways(networks: &[Network<'_>]) -> BTreeSet<Mac> {
    across(networks).filter_map(|(network, _)| Some(network.gateway?.1)).collect()
}

/// What a job of several hosts has in addition.
fn fabric(networks: &[Network<'_>]) -> Vec<Value> {
    let gateway_macs: Vec<_> = gateways(networks).into_iter().map(|mac| json!(mac)).collect();
    let across = || across(networks);
    let taps = || across().flat_map(|(network, _)| network.ports).map(|port| &port.tap);
    let limits: Vec<_> = taps().map(|tap| (json!(tap), json!(tap))).collect();
    let far: BTreeSet<_> =
        across().flat_map(|(_, tunnel)| &tunnel.guests).map(|guest| guest.mac).collect();
    let far: Vec<_> = far.into_iter().map(|mac| json!(mac)).collect();
    let tunnels: Vec<_> = across().map(|(_, tunnel)| json!(tunnel.link)).collect();
    let gateways: Vec<_> = across().filter_map(|(n, _)| Some(json!(n.gateway?.0))).collect();
    let across_to: Vec<_> = across()
        .map(|(network, tunnel)| {
            let chain = if network.layer == Layer::L2 { "leave-l2" } else { "leave-l3" };
            (json!(tunnel.link), goto(chain))
        })
        .chain(across().filter_map(|(n, _)| Some((json!(n.gateway?.0), goto("to-gateway")))))
        .collect();
    let mut objects: Vec<Value> = FABRIC_DROPS.iter().map(|name| counter(name)).collect();
    objects.push(counter(TO_OTHERS));
    objects.extend(taps().map(|tap| limit(tap, BROADCASTS, BROADCASTS)));
    objects.extend([
        map("limits", "ifname", "limit", &limits),
        set("far-macs", &["ether_addr"], &far),
        set("tunnels", &["ifname"], &tunnels),
        set("gateways", &["ifname"], &gateways),
        set("gateway-macs", &["ether_addr"], &gateway_macs),
    ]);
    objects.extend(["far", "far-own", "from-gateway", "to-gateway"].map(chain));
    objects.extend(["leave-l2", "leave-l3", "broadcast", "broadcast-l3"].map(chain));
    objects.push(map("across", "ifname", "verdict", &across_to));
    objects.extend(fabric_rules(switch6::far_rules(networks)));
    objects
}

/// The rules for IPv6 among them come with the other networks.
fn fabric_rules(far6: Vec<Value>) -> Vec<Value> {
    let ethertype = |value: &str| eq(field("ether", "type"), value);
    let port = || meta("iifname");
    let sender = || tuple(&[port(), field("ether", "saddr")]);
    let source = || tuple(&[port(), field("ether", "saddr"), field("ip", "saddr")]);
    let stays = |chain: &str, matches: &[Value]| {
        rule(chain, &[matches, &[count(TO_OTHERS), drop()]].concat())
    };
    let for_all = {
        let group = json!({ "&": [field("ether", "daddr"), "01:00:00:00:00:00"] });
        move || ne(group.clone(), "00:00:00:00:00:00")
    };
    let by_limit = json!({ "limit": { "map": { "key": port(), "data": "@limits" } } });
    let dhcp = json!({ "set": [67, 68] });
    let mut rules = vec![
        rule(
            "arp",
            &[
                eq(field("ether", "daddr"), "@far-macs"),
                eq(field("arp", "operation"), "request"),
                write(field("ether", "daddr"), "ff:ff:ff:ff:ff:ff"),
            ],
        ),
        // From other hosts' guests, who have been checked there.
        rule("far", &[ethertype("ip"), eq(source(), "@addresses"), goto("far-own")]),
        dropped("far", &[eq(field("ether", "type"), any(&["8021q", "8021ad"]))], "vlan"),
        dropped("far", &[ne(sender(), "@macs")], "source-mac"),
        dropped("far", &[ethertype("arp")], "arp"),
        dropped("far", &[ethertype("ip")], "source-address"),
    ];
    rules.extend(far6);
    rules.extend([
        dropped("far", &[ethertype("ip6")], "ipv6"),
        dropped("far", &[], "ethertype"),
        stays("far-own", &[eq(field("ether", "daddr"), "@gateway-macs")]),
        rule("far-own", &[goto("ipv4-own")]),
        // To other hosts' guests.
        stays("from-gateway", &[eq(field("ether", "daddr"), "@far-macs")]),
        rule("leave-l2", &[for_all(), goto("broadcast")]),
        rule("leave-l2", &[accept()]),
        stays("leave-l3", &[eq(port(), "@gateways")]),
        stays("leave-l3", &[ethertype("arp")]),
        rule("leave-l3", &[for_all(), goto("broadcast-l3")]),
        rule("leave-l3", &[accept()]),
        // Sent to one guest it does no harm: none can answer.
        stays("broadcast-l3", &[ethertype("ip"), eq(field("udp", "dport"), dhcp)]),
        rule("broadcast-l3", &[goto("broadcast")]),
        rule("broadcast", &[by_limit, accept()]),
        dropped("broadcast", &[], "broadcast"),
        hook("filter", "forward", FIRST, "accept"),
        // All that is left to look at is for many, or no IPv4. Both were found out when the
        // frame arrived, and are not read from it again; that ARP has become a broadcast since
        // does not show, but neither is it IPv4.
        rule("forward", &[eq(meta("protocol"), "ip"), eq(meta("pkttype"), "other"), accept()]),
        rule("forward", &[json!({ "vmap": { "key": meta("oifname"), "data": "@across" } })]),
        stays("to-gateway", &[eq(port(), "@tunnels")]),
    ]);
    rules
}

fn rules(near6: Vec<Value>) -> Vec<Value> {
    let port = || meta("iifname");
    let ethertype = |value: &str| eq(field("ether", "type"), value);
    let own_mac = |mac: Value| eq(tuple(&[port(), mac]), "@macs");
    let own_address = |mac, ip| eq(tuple(&[port(), mac, ip]), "@addresses");
    let by_port = json!({ "vmap": { "key": port(), "data": "@ports" } });
    let arp_mac = || field("arp", "saddr ether");
    let arp_ip = || field("arp", "saddr ip");
    let mut rules = vec![
        rule("prerouting", &[by_port]),
        // Layer 2: all protocols, VLAN tags too, but only the guest's own MAC.
        rule("l2", &[own_mac(field("ether", "saddr")), accept()]),
        dropped("l2", &[], "source-mac"),
        // Layer 3. Nearly all frames end with the first rule: a frame with a VLAN tag has
        // another type.
        rule(
            "l3",
            &[
                ethertype("ip"),
                own_address(field("ether", "saddr"), field("ip", "saddr")),
                goto("ipv4-own"),
            ],
        ),
        // The tag before the rest, which would look behind it.
        dropped("l3", &[eq(field("ether", "type"), any(&["8021q", "8021ad"]))], "vlan"),
        dropped("l3", &[ne(tuple(&[port(), field("ether", "saddr")]), "@macs")], "source-mac"),
        rule("l3", &[ethertype("arp"), goto("arp")]),
        rule("l3", &[ethertype("ip"), goto("ipv4")]),
    ];
    rules.extend(near6);
    rules.extend([
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
        dropped("ipv4", &[], "source-address"),
        rule("ipv4-own", &[eq(field("ip", "protocol"), "tcp"), accept()]),
        dropped("ipv4-own", &[eq(field("udp", "sport"), 67)], "dhcp-server"),
        dropped("ipv4-own", &[eq(field("udp", "dport"), 68)], "dhcp-server"),
        rule("ipv4-own", &[accept()]),
        hook("filter", "input", FIRST, "accept"),
        rule("input", &[eq(port(), "@taps"), count(TO_HOST), drop()]),
        hook("filter", "output", FIRST, "accept"),
        rule("output", &[eq(meta("oifname"), "@taps"), count(FROM_HOST), drop()]),
    ]);
    rules
}

/// A rule that drops what matches, counted for the guest and for the rule.
pub(super) fn dropped(chain: &str, matches: &[Value], name: &str) -> Value {
    let by_port = json!({ "counter": { "map": { "key": meta("iifname"), "data": "@drops" } } });
    let mut words = matches.to_vec();
    words.extend([by_port, count(name), drop()]);
    rule(chain, &words)
}
