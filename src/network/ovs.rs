//! Open vSwitch as a switch that guests cannot abuse.
//!
//! A job has one bridge, and each of its networks tables of its own there: ports and tunnel
//! keys decide which, and no flow leads from one network to another. Nothing is learned or
//! flooded: who is where is known, and a frame that no flow expects is dropped.
//!
//! ```text
//!          ┌ guest: source MAC ── L3: VLAN tag, ARP, source address, DHCP ─┐
//! IN ──────┼ gateway: its own MAC ─────────────────────────────────────────┤
//!          └ tunnel: host and MAC (on L3 the address) belong together ─────┤
//!                                                                          │
//! ARP ◄── requests: answered here, by the bridge itself ───────────────────┤
//! LOCAL ◄──────────────────────────────────────────────────────────────────┘
//!   guests of this host; broadcast to all of them
//!   REMOTE ── the gateway; guests of other hosts, each by the tunnel to its host
//!     ALL ── broadcast, so many a second of each guest, to all these hosts
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
//! - A frame from a tunnel comes from the host that has the guest with its source MAC (on L3,
//!   and its source address), and goes to guests of this host only: never into another
//!   tunnel, never to the gateway.
//! - There are three flows for each VM of the cluster, and nine for each VM here.
//! - Where ovs-vswitchd itself is the datapath, the host's own stack sees what comes out of
//!   the links too. [`guard`] drops it there, and keeps the stack silent on them; it does no
//!   harm with the kernel's datapath, where it holds while a link is not yet a port.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde_json::json;

use super::fabric::Tunnel;
use super::ruleset::{count, counter, drop, eq, hook, meta, rule, set};
use super::switch::{BROADCASTS, DROPS, FABRIC_DROPS, Port};
use super::{Fabric, Switch};
use crate::config::Layer;
use crate::error::Result;
use crate::host::Host;
use crate::host::nft::{Family, Table};
use crate::host::ovs::flows::{self, FlowTable};
use crate::host::ovs::{self, Bridge, Datapath, Facts};
use crate::host::tunnel;
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
/// The lower half counts rules from 1; these are faults by port.
const BY_PORT: u64 = 0x1_0000;

/// Where frames come in.
const IN: u8 = 0;
/// The tables of the first network; those of the next follow. Frames only ever go to a
/// table of a higher number.
const L3: u8 = 1;
const ARP: u8 = 2;
const LOCAL: u8 = 3;
const REMOTE: u8 = 4;
const ALL: u8 = 5;
const TABLES: u8 = 5;
const DROPPED: u8 = 250;

/// How many networks a bridge can hold.
pub const MAX_NETWORKS: usize = 49;

/// Broadcast and multicast.
const TO_MANY: &str = "dl_dst=01:00:00:00:00:00/01:00:00:00:00:00";

/// One network on this host, as the bridge sees it.
#[derive(Clone, Debug)]
pub struct Network<'a> {
    pub layer: Layer,
    /// Guests on this host.
    pub ports: &'a [Port],
    /// On L3.
    pub gateway: Option<Gateway>,
    pub tunnel: Option<&'a Tunnel>,
}

/// The gateway's link on this host.
#[derive(Clone, Debug)]
pub struct Gateway {
    pub link: String,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// The name of a job's bridge.
pub fn bridge_name(owner: Owner) -> String {
    owner.name('b')
}

/// The bridge of a job.
pub fn bridge(
    owner: Owner,
    datapath: Datapath,
    fabric: Option<&Fabric>,
    networks: &[Network<'_>],
) -> Bridge {
    let mut bridge =
        Bridge { name: bridge_name(owner), datapath, links: links(networks), tunnels: Vec::new() };
    let tunnels = networks.iter().filter_map(|network| network.tunnel);
    for (tunnel, fabric) in tunnels.zip(fabric.into_iter().cycle()) {
        bridge.tunnels.push(ovs::Tunnel {
            name: tunnel.link.clone(),
            key: tunnel.key,
            local: fabric.address,
            udp_port: tunnel::PORT,
            hosts: tunnel.hosts(),
        });
    }
    bridge
}

/// The links of a job that are ports of its bridge.
pub fn links(networks: &[Network<'_>]) -> Vec<String> {
    let of = |network: &Network<'_>| {
        let guests = network.ports.iter().map(|port| port.tap.clone());
        guests.chain(network.gateway.iter().map(|gateway| gateway.link.clone())).collect::<Vec<_>>()
    };
    networks.iter().flat_map(of).collect()
}

/// The flows of a job's bridge.
pub fn flow_table(owner: Owner, networks: &[Network<'_>]) -> FlowTable {
    let mut flows = Vec::new();
    let mut ports = 0;
    for (index, network) in (0..).zip(networks) {
        let mut flows = Flows { lines: &mut flows, first: index * TABLES, network };
        flows.tunnel_in();
        flows.gateway_in();
        flows.guests_in();
        if network.layer == Layer::L3 {
            flows.own_address();
            flows.arp();
        }
        flows.local_out();
        flows.remote_out(ports);
        ports += network.ports.len() as u32;
    }
    let mut flows = Flows { lines: &mut flows, first: 0, network: &networks[0] };
    // The bridge's own link, which is down.
    flows.pass(IN, 100, "in_port=LOCAL", "drop");
    flows.refuse(IN, 0, "", "source-mac");
    flows.pass(DROPPED, 0, "", "drop");
    let across = networks.iter().any(|network| network.tunnel.is_some());
    FlowTable {
        bridge: bridge_name(owner),
        meters: vec![BROADCASTS; if across { ports as usize } else { 0 }],
        flows: std::mem::take(flows.lines),
    }
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

/// The packets that each rule of a job's bridge dropped, and each guest's faults by the name of
/// its TAP device.
pub async fn counters(host: &Host, owner: Owner) -> Result<BTreeMap<String, u64>> {
    let found = flows::counters(host, &bridge_name(owner)).await?;
    let names = (1..).zip(RULES);
    let of_rule = |cookie: u64| {
        let those = found.flows.iter().filter(|flow| flow.cookie == COOKIE | cookie);
        those.map(|flow| flow.packets).sum()
    };
    let mut counters: BTreeMap<_, _> =
        names.map(|(number, name)| (name.to_owned(), of_rule(number))).collect();
    counters.insert(FABRIC_DROPS[0].to_owned(), found.metered);
    for flow in found.flows.iter().filter(|flow| flow.cookie == COOKIE | BY_PORT) {
        counters.extend(flow.in_port.clone().map(|port| (port, flow.packets)));
    }
    Ok(counters)
}

/// [`choose`], after a look at the host.
pub async fn decide(host: &Host, underlay: Option<&str>) -> (Switch, String) {
    choose(&ovs::probe(host).await, underlay)
}

/// The switch for jobs of a host, and why: Open vSwitch where it answers and can reach other
/// hosts.
///
/// `facts` is what [`probe`](ovs::probe) found, `underlay` the link with this host's address
/// there; without one the job has no other hosts.
pub fn choose(facts: &Result<Facts>, underlay: Option<&str>) -> (Switch, String) {
    let facts = match facts {
        Ok(facts) => facts,
        Err(error) => return (Switch::Linux, error.to_string()),
    };
    let name = format!("Open vSwitch {}", facts.version);
    if facts.kernel {
        return (Switch::Ovs(Datapath::System), format!("{name} with the kernel's datapath"));
    }
    let Some(link) = underlay else {
        return (Switch::Ovs(Datapath::Netdev), format!("{name}, itself the datapath"));
    };
    if facts.bridges.get(link).is_some_and(|datapath| datapath == "netdev") {
        let why = format!("{name}, itself the datapath, has the underlay `{link}`");
        return (Switch::Ovs(Datapath::Netdev), why);
    }
    let why = format!(
        "{name} has no module in the kernel, and the underlay `{link}` is no bridge of its own \
         datapath"
    );
    (Switch::Linux, why)
}

/// Flows of a network, as they grow.
struct Flows<'a> {
    lines: &'a mut Vec<String>,
    /// By how much the numbers of its tables are higher than those of the first network.
    first: u8,
    network: &'a Network<'a>,
}

impl Flows<'_> {
    fn add(&mut self, table: u8, priority: u16, cookie: u64, matches: &str, actions: &str) {
        let comma = if matches.is_empty() { "" } else { "," };
        let (cookie, table) = (COOKIE | cookie, self.number(table));
        self.lines.push(format!(
            "cookie={cookie:#x},table={table},priority={priority}{comma}{matches} actions={actions}"
        ));
    }

    fn number(&self, table: u8) -> u8 {
        if [IN, DROPPED].contains(&table) { table } else { table + self.first }
    }

    fn go(&self, table: u8) -> String {
        format!("goto_table:{}", self.number(table))
    }

    /// Frames go on.
    fn pass(&mut self, table: u8, priority: u16, matches: &str, actions: &str) {
        self.add(table, priority, 0, matches, actions);
    }

    /// Frames go on in another table.
    fn hand(&mut self, table: u8, priority: u16, matches: &str, next: u8) {
        let actions = self.go(next);
        self.pass(table, priority, matches, &actions);
    }

    /// Frames end here, counted for this rule.
    fn refuse(&mut self, table: u8, priority: u16, matches: &str, name: &str) {
        let index = RULES.iter().position(|rule| *rule == name).expect("a rule of the list");
        let actions = if index < DROPS.len() { self.go(DROPPED) } else { "drop".to_owned() };
        self.add(table, priority, index as u64 + 1, matches, &actions);
    }

    fn tunnel_in(&mut self) {
        let Some(tunnel) = self.network.tunnel else { return };
        let port = from(&tunnel.link);
        if self.network.layer == Layer::L3 {
            self.refuse(IN, 300, &format!("{port},vlan_tci=0x1000/0x1000"), "tunnel-source");
            for dhcp in ["tp_src=67", "tp_dst=68"] {
                self.refuse(IN, 300, &format!("{port},udp,{dhcp}"), "tunnel-source");
            }
        }
        for guest in &tunnel.guests {
            let owner = format!("{port},tun_src={},dl_src={}", guest.host, guest.mac);
            let matches = match guest.address {
                Some(address) => format!("{owner},ip,nw_src={address}"),
                None => owner,
            };
            self.hand(IN, 200, &matches, LOCAL);
        }
        self.refuse(IN, 100, &port, "tunnel-source");
    }

    fn gateway_in(&mut self) {
        let Some(gateway) = &self.network.gateway else { return };
        let port = from(&gateway.link);
        let own = format!("{port},dl_src={}", gateway.mac);
        self.hand(IN, 200, &format!("{own},arp"), ARP);
        self.hand(IN, 200, &format!("{own},ip"), LOCAL);
        // The kernel there speaks IPv6 on its own.
        self.refuse(IN, 100, &port, "gateway");
    }

    fn guests_in(&mut self) {
        let next = if self.network.layer == Layer::L3 { L3 } else { LOCAL };
        for port in self.network.ports {
            let link = from(&port.tap);
            self.hand(IN, 200, &format!("{link},dl_src={}", port.mac), next);
            self.add(DROPPED, 100, BY_PORT, &link, "drop");
        }
    }

    /// What may be in a frame of a guest on L3. Its MAC is its own.
    fn own_address(&mut self) {
        // The tag first: what follows would look behind it.
        self.refuse(L3, 900, "vlan_tci=0x1000/0x1000", "vlan");
        for port in self.network.ports {
            let mac = port.mac;
            // RFC 5227: is the address taken?
            let probe = format!("arp,dl_src={mac},arp_sha={mac},arp_op=1,arp_spa=0.0.0.0");
            self.hand(L3, 800, &probe, ARP);
            let Some(address) = port.address else { continue };
            let arp = format!("arp,dl_src={mac},arp_sha={mac},arp_spa={address}");
            self.hand(L3, 800, &arp, ARP);
            self.hand(L3, 750, &format!("ip,dl_src={mac},nw_src={address}"), LOCAL);
        }
        // A DHCP client that has no address yet.
        let discover = "udp,nw_src=0.0.0.0,nw_dst=255.255.255.255,tp_src=68,tp_dst=67";
        self.hand(L3, 800, discover, LOCAL);
        self.refuse(L3, 780, "udp,tp_src=67", "dhcp-server");
        self.refuse(L3, 780, "udp,tp_dst=68", "dhcp-server");
        self.refuse(L3, 700, "arp", "arp");
        self.refuse(L3, 600, "ip", "source-address");
        self.refuse(L3, 500, "ipv6", "ipv6");
        self.refuse(L3, 0, "", "ethertype");
    }

    /// ARP of guests that say nothing but the truth, and of the gateway.
    fn arp(&mut self) {
        let network = self.network;
        let here = network.ports.iter().map(|port| (port.mac, port.address));
        let gateway = network.gateway.iter().map(|gateway| (gateway.mac, Some(gateway.address)));
        let here = here.chain(gateway);
        let far = network.tunnel.iter().flat_map(|tunnel| &tunnel.guests);
        for (mac, address) in here.clone() {
            let Some(address) = address else { continue };
            // "I have it" and "has anybody?": an answer would look like somebody had.
            let own = format!("arp,dl_src={mac},arp_op=1,arp_tpa={address}");
            self.pass(ARP, 300, &own, "drop");
        }
        for (mac, address) in here.chain(far.map(|guest| (guest.mac, guest.address))) {
            let Some(address) = address else { continue };
            let answer = format!(
                "move:NXM_OF_ETH_SRC[]->NXM_OF_ETH_DST[],set_field:{mac}->eth_src,\
                 set_field:2->arp_op,\
                 move:NXM_NX_ARP_SHA[]->NXM_NX_ARP_THA[],set_field:{mac}->arp_sha,\
                 move:NXM_OF_ARP_SPA[]->NXM_OF_ARP_TPA[],set_field:{address}->arp_spa,in_port"
            );
            self.pass(ARP, 200, &format!("arp,arp_op=1,arp_tpa={address}"), &answer);
        }
        self.hand(ARP, 100, "arp,arp_op=2", LOCAL);
        self.refuse(ARP, 0, "", "unknown-address");
    }

    fn local_out(&mut self) {
        let network = self.network;
        let everybody: Vec<_> = network.ports.iter().map(|port| output(&port.tap)).collect();
        let everybody = everybody.join(",");
        if let Some(tunnel) = network.tunnel {
            let matches = format!("{},{TO_MANY}", from(&tunnel.link));
            self.pass(LOCAL, 300, &matches, &everybody);
        }
        if let Some(gateway) = &network.gateway {
            let to_server = "udp,dl_dst=ff:ff:ff:ff:ff:ff,tp_dst=67";
            self.pass(LOCAL, 250, to_server, &output(&gateway.link));
        }
        for port in network.ports {
            self.pass(LOCAL, 200, &format!("dl_dst={}", port.mac), &output(&port.tap));
        }
        let further = self.go(REMOTE);
        self.pass(LOCAL, 150, TO_MANY, &format!("{everybody},{further}"));
        self.hand(LOCAL, 0, "", REMOTE);
    }

    /// `ports` networks before this one have so many, each with a meter.
    fn remote_out(&mut self, ports: u32) {
        let network = self.network;
        if let Some(gateway) = &network.gateway {
            self.refuse(REMOTE, 300, &from(&gateway.link), "gateway");
            self.pass(REMOTE, 200, &format!("dl_dst={}", gateway.mac), &output(&gateway.link));
        }
        if let Some(tunnel) = network.tunnel {
            let by = |host| format!("set_field:{host}->tun_dst,{}", output(&tunnel.link));
            self.refuse(REMOTE, 300, &from(&tunnel.link), "tunnel-destination");
            for guest in &tunnel.guests {
                self.pass(REMOTE, 200, &format!("dl_dst={}", guest.mac), &by(guest.host));
            }
            for (meter, port) in (ports + 1..).zip(network.ports) {
                let actions = format!("meter:{meter},{}", self.go(ALL));
                let matches = format!("{},{TO_MANY}", from(&port.tap));
                self.pass(REMOTE, 150, &matches, &actions);
            }
            let all: Vec<_> = tunnel.hosts().into_iter().map(by).collect();
            self.pass(ALL, 0, "", &all.join(","));
        }
        // What is for all has arrived at those of this host.
        self.pass(REMOTE, 100, TO_MANY, "drop");
        self.refuse(REMOTE, 0, "", "unknown-destination");
    }
}

fn from(link: &str) -> String {
    format!("in_port=\"{link}\"")
}

fn output(link: &str) -> String {
    format!("output:\"{link}\"")
}
