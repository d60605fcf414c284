//! Open vSwitch as a switch that guests cannot abuse.
//!
//! Each network is a bridge of the job's own. Nothing is learned or flooded: who is where
//! is known, and a frame that no flow expects is dropped. Flows are in six tables:
//!
//! ```text
//!          ┌ guest: source MAC ── L3: VLAN tag, ARP, source address, DHCP ─┐
//! IN ──────┼ gateway: its own MAC ─────────────────────────────────────────┤
//!          └ tunnel: peer and MAC (on L3 the address) belong together ─────┤
//!                                                                          │
//! ARP ◄── requests: answered here, by the bridge itself ───────────────────┤
//! LOCAL ◄──────────────────────────────────────────────────────────────────┘
//!   guests of this host; broadcast to all of them
//!   REMOTE ── the gateway; guests of peers, each by the tunnel to its host
//! DROPPED ── what a guest should not have sent, by guest
//! ```
//!
//! Each rule that drops has a cookie, by which its packets are counted ([`RULES`]); what a
//! guest should not have sent counts by the guest's port as well, under the same names as on
//! the [Linux bridge](super::switch).
//!
//! # What holds
//!
//! - All that [`switch`](super::switch) says of a guest's frames.
//! - On L3, ARP requests are answered by the bridge; none leaves the host, nor does DHCP or
//!   anything of the gateway.
//! - A frame from a tunnel comes from the peer that has the VM with its source MAC (on L3,
//!   and its source address), and goes to guests of this host only: never into another
//!   tunnel, never to the gateway.
//! - There are as many flows as VMs in the cluster times three, and eight for each VM here.
//! - Where ovs-vswitchd itself is the datapath, the host's own stack sees what comes out of
//!   the links too. [`guard`] drops it there, and keeps the stack silent on them; it does no
//!   harm with the kernel's datapath, where it holds while a link is not yet a port.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde_json::json;

use super::ruleset::{count, counter, drop, eq, hook, meta, rule, set};
use super::switch::{DROPS, Port};
use crate::config::Layer;
use crate::error::Result;
use crate::host::Host;
use crate::host::nft::{Family, Table};
use crate::host::ovs::flows::{self, FlowTable};
use crate::host::ovs::{Bridge, Datapath, Facts, Tunnel};
use crate::model::address::Mac;
use crate::model::owner::Owner;

/// The rules that drop, by the names of their counters. The first are those of guests.
pub const RULES: [&str; 12] = [
    DROPS[0],
    DROPS[1],
    DROPS[2],
    DROPS[3],
    DROPS[4],
    DROPS[5],
    DROPS[6],
    "tunnel-source",
    "tunnel-destination",
    "gateway",
    "unknown-destination",
    "unknown-address",
];

/// "pavo", in the upper half of all our cookies.
const COOKIE: u64 = 0x7061_766f_0000_0000;
/// The lower half counts rules from 1, ports from here.
const PORTS: u64 = 0x1_0000;

const IN: u8 = 0;
const L3: u8 = 10;
const ARP: u8 = 20;
const LOCAL: u8 = 30;
const REMOTE: u8 = 40;
const DROPPED: u8 = 50;

/// Broadcast and multicast.
const TO_MANY: &str = "dl_dst=01:00:00:00:00:00/01:00:00:00:00:00";
/// The actions after which a packet counts as a guest's fault.
const FAULT: &str = "goto_table:50";

/// One network on this host, as the bridge sees it.
#[derive(Clone, Debug)]
pub struct Network<'a> {
    pub layer: Layer,
    pub bridge: &'a str,
    pub datapath: Datapath,
    /// Guests on this host.
    pub ports: &'a [Port],
    /// On L3.
    pub gateway: Option<Gateway<'a>>,
    pub tunnel: Option<Tunnel>,
    pub peers: Vec<Peer>,
}

/// The gateway's link on this host.
#[derive(Clone, Debug)]
pub struct Gateway<'a> {
    pub link: &'a str,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// Another host of the network.
#[derive(Clone, Debug)]
pub struct Peer {
    /// At its end of the tunnel.
    pub address: Ipv4Addr,
    /// Its guests, on L3 with their addresses.
    pub guests: Vec<(Mac, Option<Ipv4Addr>)>,
}

/// The bridge of a network.
pub fn bridge(network: &Network<'_>) -> Bridge {
    let guests = network.ports.iter().map(|port| port.tap.clone());
    let gateway = network.gateway.iter().map(|gateway| gateway.link.to_owned());
    Bridge {
        name: network.bridge.to_owned(),
        datapath: network.datapath,
        links: guests.chain(gateway).collect(),
        tunnel: network.tunnel.clone(),
    }
}

/// The flows of a network's bridge.
pub fn flow_table(network: &Network<'_>) -> FlowTable {
    let mut flows = Flows(Vec::new());
    from_tunnel(&mut flows, network);
    from_gateway(&mut flows, network);
    from_guests(&mut flows, network);
    match network.layer {
        Layer::L2 => {}
        Layer::L3 => {
            own_address(&mut flows, network);
            arp(&mut flows, network);
        }
    }
    to_local(&mut flows, network);
    to_remote(&mut flows, network);
    for (number, port) in (0..).zip(network.ports) {
        flows.add(DROPPED, 100, PORTS + number, &from(&port.tap), "drop");
    }
    flows.add(DROPPED, 0, 0, "", "drop");
    FlowTable { bridge: network.bridge.to_owned(), flows: flows.0 }
}

/// Keeps the host's own stack away from these links of the job.
pub fn guard(owner: Owner, links: &[String]) -> Vec<Table> {
    let table = |family, first: &str| {
        let links: Vec<_> = links.iter().map(|link| json!(link)).collect();
        let on = |key: &str| eq(meta(key), "@ports");
        let objects = vec![
            counter("to-host"),
            counter("from-host"),
            set("ports", &["ifname"], &links),
            hook("filter", first, -300, "accept"),
            rule(first, &[on("iifname"), count("to-host"), drop()]),
            hook("filter", "output", -300, "accept"),
            rule("output", &[on("oifname"), count("from-host"), drop()]),
        ];
        Table { family, name: format!("pavo_{owner}_ports"), objects }
    };
    vec![table(Family::Arp, "input"), table(Family::Inet, "prerouting")]
}

/// The packets that each rule of a bridge dropped, and each guest's faults by the name of
/// its port: those of [`Network::ports`], in their order.
pub async fn counters(
    host: &Host,
    bridge: &str,
    ports: &[String],
) -> Result<BTreeMap<String, u64>> {
    let found = flows::counters(host, bridge).await?;
    let names = (1..).zip(RULES.map(str::to_owned)).chain((PORTS..).zip(ports.iter().cloned()));
    let packets = |number: u64| {
        let of_rule = found.iter().filter(|((_, cookie), _)| *cookie == (COOKIE | number));
        of_rule.map(|(_, packets)| packets).sum()
    };
    Ok(names.map(|(number, name)| (name, packets(number))).collect())
}

/// Whether a host can use Open vSwitch, with which datapath, and why.
///
/// `facts` is what [`probe`](crate::host::ovs::probe) found, `link` the one that holds the
/// underlay address.
pub fn choose(facts: &Result<Facts>, link: &str) -> (Option<Datapath>, String) {
    match facts {
        Err(error) => (None, format!("{error}")),
        Ok(Facts { kernel: true, version, .. }) => {
            (Some(Datapath::System), format!("Open vSwitch {version} with the kernel's datapath"))
        }
        Ok(Facts { bridges, version, .. }) => match bridges.get(link).map(String::as_str) {
            Some("netdev") => (
                Some(Datapath::Netdev),
                format!("Open vSwitch {version}, itself the datapath, has the underlay `{link}`"),
            ),
            _ => (
                None,
                format!(
                    "Open vSwitch {version} has no module in the kernel, and the underlay \
                     `{link}` is no bridge of its own datapath"
                ),
            ),
        },
    }
}

/// Flows, as they grow.
struct Flows(Vec<String>);

impl Flows {
    fn add(&mut self, table: u8, priority: u16, number: u64, matches: &str, actions: &str) {
        let comma = if matches.is_empty() { "" } else { "," };
        let cookie = COOKIE | number;
        self.0.push(format!(
            "cookie={cookie:#x},table={table},priority={priority}{comma}{matches} actions={actions}"
        ));
    }

    /// Frames go on.
    fn pass(&mut self, table: u8, priority: u16, matches: &str, actions: &str) {
        self.add(table, priority, 0, matches, actions);
    }

    /// Frames end here, counted for this rule.
    fn refuse(&mut self, table: u8, priority: u16, matches: &str, name: &str) {
        let index = RULES.iter().position(|rule| *rule == name).expect("a rule of the list");
        let actions = if index < DROPS.len() { FAULT } else { "drop" };
        self.add(table, priority, index as u64 + 1, matches, actions);
    }
}

fn from(link: &str) -> String {
    format!("in_port=\"{link}\"")
}

fn output(links: impl Iterator<Item = impl AsRef<str>>) -> String {
    links.map(|link| format!("output:\"{}\"", link.as_ref())).collect::<Vec<_>>().join(",")
}

fn go(table: u8) -> String {
    format!("goto_table:{table}")
}

fn from_tunnel(flows: &mut Flows, network: &Network<'_>) {
    let Some(tunnel) = &network.tunnel else { return };
    let port = from(&tunnel.name);
    if network.layer == Layer::L3 {
        flows.refuse(IN, 300, &format!("{port},vlan_tci=0x1000/0x1000"), "tunnel-source");
        for dhcp in ["tp_src=67", "tp_dst=68"] {
            flows.refuse(IN, 300, &format!("{port},udp,{dhcp}"), "tunnel-source");
        }
    }
    for peer in &network.peers {
        for (mac, address) in &peer.guests {
            let owner = format!("{port},tun_src={},dl_src={mac}", peer.address);
            let matches = match address {
                Some(address) => format!("{owner},ip,nw_src={address}"),
                None => owner,
            };
            flows.pass(IN, 200, &matches, &go(LOCAL));
        }
    }
    flows.refuse(IN, 100, &port, "tunnel-source");
}

fn from_gateway(flows: &mut Flows, network: &Network<'_>) {
    let Some(gateway) = &network.gateway else { return };
    let port = from(gateway.link);
    let own = format!("{port},dl_src={}", gateway.mac);
    flows.pass(IN, 200, &format!("{own},arp"), &go(ARP));
    flows.pass(IN, 200, &format!("{own},ip"), &go(LOCAL));
    // The kernel there speaks IPv6 on its own.
    flows.refuse(IN, 100, &port, "gateway");
}

fn from_guests(flows: &mut Flows, network: &Network<'_>) {
    let next = if network.layer == Layer::L3 { L3 } else { LOCAL };
    for port in network.ports {
        let matches = format!("{},dl_src={}", from(&port.tap), port.mac);
        flows.pass(IN, 200, &matches, &go(next));
    }
    // The bridge's own link, which is down.
    flows.pass(IN, 100, "in_port=LOCAL", "drop");
    flows.refuse(IN, 0, "", "source-mac");
}

/// What may be in a frame of a guest on L3. Its MAC is its own.
fn own_address(flows: &mut Flows, network: &Network<'_>) {
    // The tag first: what follows would look behind it.
    flows.refuse(L3, 900, "vlan_tci=0x1000/0x1000", "vlan");
    for port in network.ports {
        let mac = port.mac;
        // RFC 5227: is the address taken?
        let probe = format!("arp,dl_src={mac},arp_sha={mac},arp_op=1,arp_spa=0.0.0.0");
        flows.pass(L3, 800, &probe, &go(ARP));
        let Some(address) = port.address else { continue };
        let arp = format!("arp,dl_src={mac},arp_sha={mac},arp_spa={address}");
        flows.pass(L3, 800, &arp, &go(ARP));
        flows.pass(L3, 750, &format!("ip,dl_src={mac},nw_src={address}"), &go(LOCAL));
    }
    // A DHCP client that has no address yet.
    let discover = "udp,nw_src=0.0.0.0,nw_dst=255.255.255.255,tp_src=68,tp_dst=67";
    flows.pass(L3, 800, discover, &go(LOCAL));
    flows.refuse(L3, 780, "udp,tp_src=67", "dhcp-server");
    flows.refuse(L3, 780, "udp,tp_dst=68", "dhcp-server");
    flows.refuse(L3, 700, "arp", "arp");
    flows.refuse(L3, 600, "ip", "source-address");
    flows.refuse(L3, 500, "ipv6", "ipv6");
    flows.refuse(L3, 0, "", "ethertype");
}

/// ARP of guests that say nothing but the truth, and of the gateway.
fn arp(flows: &mut Flows, network: &Network<'_>) {
    let here = network.ports.iter().map(|port| (port.mac, port.address));
    let there = network.peers.iter().flat_map(|peer| peer.guests.iter().copied());
    let gateway = network.gateway.iter().map(|gateway| (gateway.mac, Some(gateway.address)));
    for (mac, address) in here.clone().chain(gateway.clone()) {
        let Some(address) = address else { continue };
        // "I have it" and "has anybody?": an answer would look like somebody had.
        flows.pass(ARP, 300, &format!("arp,dl_src={mac},arp_op=1,arp_tpa={address}"), "drop");
    }
    for (mac, address) in here.chain(there).chain(gateway) {
        let Some(address) = address else { continue };
        let answer = format!(
            "move:NXM_OF_ETH_SRC[]->NXM_OF_ETH_DST[],set_field:{mac}->eth_src,\
             set_field:2->arp_op,\
             move:NXM_NX_ARP_SHA[]->NXM_NX_ARP_THA[],set_field:{mac}->arp_sha,\
             move:NXM_OF_ARP_SPA[]->NXM_OF_ARP_TPA[],set_field:{address}->arp_spa,in_port"
        );
        flows.pass(ARP, 200, &format!("arp,arp_op=1,arp_tpa={address}"), &answer);
    }
    flows.pass(ARP, 100, "arp,arp_op=2", &go(LOCAL));
    flows.refuse(ARP, 0, "", "unknown-address");
}

fn to_local(flows: &mut Flows, network: &Network<'_>) {
    let everybody = output(network.ports.iter().map(|port| &port.tap));
    if let Some(tunnel) = &network.tunnel {
        let matches = format!("{},{TO_MANY}", from(&tunnel.name));
        flows.pass(LOCAL, 300, &matches, &everybody);
    }
    if let Some(gateway) = &network.gateway {
        let to_server = "udp,dl_dst=ff:ff:ff:ff:ff:ff,tp_dst=67";
        flows.pass(LOCAL, 250, to_server, &output([gateway.link].iter()));
    }
    for port in network.ports {
        let matches = format!("dl_dst={}", port.mac);
        flows.pass(LOCAL, 200, &matches, &output([&port.tap].into_iter()));
    }
    flows.pass(LOCAL, 150, TO_MANY, &format!("{everybody},{}", go(REMOTE)));
    flows.pass(LOCAL, 0, "", &go(REMOTE));
}

fn to_remote(flows: &mut Flows, network: &Network<'_>) {
    // What is for all has arrived at those of this host.
    flows.pass(REMOTE, 100, TO_MANY, "drop");
    if let Some(gateway) = &network.gateway {
        flows.refuse(REMOTE, 300, &from(gateway.link), "gateway");
        let matches = format!("dl_dst={}", gateway.mac);
        flows.pass(REMOTE, 200, &matches, &output([gateway.link].iter()));
    }
    if let Some(tunnel) = &network.tunnel {
        flows.refuse(REMOTE, 310, &from(&tunnel.name), "tunnel-destination");
        let by =
            |peer: &Peer| format!("set_field:{}->tun_dst,output:\"{}\"", peer.address, tunnel.name);
        for peer in &network.peers {
            for (mac, _) in &peer.guests {
                flows.pass(REMOTE, 200, &format!("dl_dst={mac}"), &by(peer));
            }
        }
        if !network.peers.is_empty() {
            let all: Vec<_> = network.peers.iter().map(by).collect();
            flows.pass(REMOTE, 150, TO_MANY, &all.join(","));
        }
    }
    flows.refuse(REMOTE, 0, "", "unknown-destination");
}
