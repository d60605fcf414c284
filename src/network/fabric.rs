//! Between the hosts of a job: VXLAN, to known hosts and for known guests.
//!
//! ```text
//!  pbl3-0 ── pxl3-0 ── UDP 4789, key of the network ── underlay ── another host's
//! ```
//!
//! Ranks tell every guest's MAC and address, and the job's hosts tell each other where
//! they run: so nothing is learned, and nobody has to be asked. A guest's ARP is answered
//! by its own bridge; unicast goes to the one host where its MAC is; what is for all goes
//! to the job's hosts, a copy each.
//!
//! The underlay belongs to no job, so both ends check. The table of the `ip` family sees
//! packets with a key of this job, and no others:
//!
//! - one that **arrives** comes from a host of the job, with a frame whose source is a guest
//!   that runs there ([`switch`](super::switch) then checks what is in the frame);
//! - one that **leaves**, sent here or passed on, is from the kernel's own VXLAN device. Those
//!   send from ports that only root has, and guests of any job get others by NAT: without
//!   this, any user's program on one host of the job could write frames for all others. On
//!   [Open vSwitch](super::ovs) they have a mark instead.
//!
//! What leaves cannot be told by its key alone: of a datagram that the kernel cuts into many
//! (UDP_SEGMENT), here is seen the first only, and the others say what they like. So
//!
//! - nothing for the port of VXLAN leaves **in the name of this host** but what a VXLAN device
//!   sends, or root: no user's program, no packet passed on behind NAT. A VXLAN of the site's
//!   own goes on, of its users' packets too: these keep their socket, but come from a device;
//! - whoever has the Linux switch sends from **ports that only root has**, and is not believed
//!   from others. Open vSwitch sends from any, and all depends on the host that sends.
//!
//! Tunnels are IPv4; what comes by IPv6 no device of ours takes.
//!
//! Key, port and addresses are not secret, and nothing is encrypted: who can send with
//! a host's address on the underlay is trusted.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use super::ruleset::*;
use super::{Fabric, Request, Switch, SwitchKind};
use crate::error::{Error, Result};
use crate::host::nft::{Family, Table};
use crate::host::ovs;
use crate::host::tunnel::{PORT, SOURCE_PORTS};
use crate::model::address::{Mac, MacPrefix};
use crate::model::owner::Owner;

/// What VXLAN over IPv4 adds to a packet: two Ethernet headers' worth and 22 bytes.
const OVERHEAD: u16 = 50;
/// The smallest MTU of IPv4.
const MIN_MTU: u16 = 68;
/// One more than the largest key.
const KEYS: u32 = 1 << 24;

/// What is dropped, by the names of its counters.
pub const DROPS: [&str; 3] = ["vxlan-host", "vxlan-guest", "vxlan-forged"];

/// Before everything else.
const FIRST: i32 = -300;
/// After NAT, which may make a packet look like this host's.
const LAST: i32 = 300;

/// A network's way to the job's other hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    pub link: String,
    pub key: u32,
    pub guests: Vec<Far>,
}

/// A guest on another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Far {
    pub rank: u32,
    pub mac: Mac,
    /// On L3.
    pub address: Option<Ipv4Addr>,
    /// On L3 with IPv6.
    pub address6: Option<Ipv6Addr>,
    /// Its host's, on the underlay.
    pub host: Ipv4Addr,
}

impl Tunnel {
    /// The hosts behind it, each once.
    pub fn hosts(&self) -> Vec<Ipv4Addr> {
        let hosts: BTreeSet<_> = self.guests.iter().map(|guest| guest.host).collect();
        hosts.into_iter().collect()
    }

    /// A MAC for the network's bridge that no guest has: the bridge keeps who far guests are
    /// only as long as its own MAC stays.
    pub fn bridge_mac(&self, guests: &MacPrefix) -> Mac {
        // Both are for local use (IEEE 802).
        let first = if guests.gateway().0[0] == 0x02 { 0x06 } else { 0x02 };
        let [_, key @ ..] = self.key.to_be_bytes();
        Mac([first, b'p', b'v', key[0], key[1], key[2]])
    }
}

/// The MTU of guests: all of what is configured, as far as it fits the underlay.
pub fn mtu(configured: u16, fabric: Option<&Fabric>) -> u16 {
    fabric.map_or(configured, |fabric| configured.min(fabric.mtu.saturating_sub(OVERHEAD)))
}

/// # Errors
/// When hosts, guests or keys of the fabric are there twice, or it carries no packets.
pub fn check(request: &Request) -> Result<()> {
    let Some(fabric) = &request.fabric else { return Ok(()) };
    if fabric.mtu < MIN_MTU + OVERHEAD {
        let (link, mtu) = (&fabric.link, fabric.mtu);
        return Err(Error::system(format!("the MTU of `{link}`, {mtu}, is too small for VXLAN"))
            .help(format!("ip link set {link} mtu 1500")));
    }
    let keys: BTreeSet<_> = fabric.keys.iter().filter(|key| (1..KEYS).contains(*key)).collect();
    if keys.len() != request.networks.len() || keys.len() != fabric.keys.len() {
        return Err(Error::bug("each network needs a VXLAN key of its own"));
    }
    let hosts = fabric.peers.iter().map(|peer| peer.address);
    let mut seen = BTreeSet::from([fabric.address]);
    if let Some(twice) = hosts.into_iter().find(|host| !seen.insert(*host)) {
        return Err(Error::system(format!("two hosts of the job have the address {twice}"))
            .help("give each compute node an address of its own on the underlay"));
    }
    let vms = request.vms.iter().chain(fabric.peers.iter().flat_map(|peer| &peer.vms));
    let mut seen = BTreeSet::new();
    match vms.into_iter().find(|vm| !seen.insert(vm.rank)) {
        Some(vm) => Err(Error::bug(format!("vm{} runs on two hosts", vm.rank))),
        None => Ok(()),
    }
}

/// The table that guards the keys of a job on the underlay.
pub fn table(owner: Owner, fabric: &Fabric, tunnels: &[&Tunnel], switch: Switch) -> Table {
    let hosts: BTreeSet<_> = tunnels.iter().flat_map(|tunnel| tunnel.hosts()).collect();
    let keys: Vec<u32> = tunnels.iter().map(|tunnel| wire(tunnel.key)).collect();
    let is_ours = || [eq(field("udp", "dport"), PORT), eq(key(), json!({ "set": keys }))];
    let from = |host: &Ipv4Addr| format!("from-{host}");
    let linux = |host: &Ipv4Addr| {
        fabric.peers.iter().any(|peer| peer.address == *host && peer.switch == SwitchKind::Linux)
    };
    let mut objects: Vec<Value> = DROPS.iter().map(|name| counter(name)).collect();
    for host in &hosts {
        let chain_name = from(host);
        objects.push(chain(&chain_name));
        for tunnel in tunnels {
            let guests = tunnel.guests.iter().filter(|guest| guest.host == *host);
            let macs: Vec<u64> = guests.map(|guest| number(guest.mac)).collect();
            if !macs.is_empty() {
                let mut words = vec![eq(source(), json!({ "set": macs })), accept()];
                // One key alone has been looked at.
                if tunnels.len() > 1 {
                    words.insert(0, eq(key(), wire(tunnel.key)));
                }
                if linux(host) {
                    words.insert(0, eq(field("udp", "sport"), ports_of_root()));
                }
                objects.push(rule(&chain_name, &words));
            }
        }
        if linux(host) {
            objects.push(forged(&chain_name, &[ne(field("udp", "sport"), ports_of_root())]));
        }
        objects.push(dropped(&chain_name, "vxlan-guest"));
    }
    let by_host: Vec<_> = hosts.iter().map(|host| (json!(host), goto(&from(host)))).collect();
    let judged = |hook: &str, to: &str| {
        let [port, key] = is_ours();
        rule(hook, &[port, key, goto(to)])
    };
    let untracked = |hook: &str| {
        let [port, key] = is_ours();
        rule(hook, &[port, key, json!({ "notrack": null })])
    };
    objects.extend([
        map("hosts", "ipv4_addr", "verdict", &by_host),
        chain("arriving"),
        rule("arriving", &[json!({ "vmap": { "key": field("ip", "saddr"), "data": "@hosts" } })]),
        dropped("arriving", "vxlan-host"),
        // At this hook fragments have been put together.
        hook("filter", "input", FIRST, "accept"),
        judged("input", "arriving"),
        // Other rules of the host track connections; of these there is nothing to know.
        hook("filter", "prerouting", FIRST, "accept"),
        untracked("prerouting"),
        hook("filter", "output", FIRST, "accept"),
        untracked("output"),
    ]);
    objects.extend(leaving(owner, fabric.address, &keys, switch));
    Table { family: Family::Ip, name: format!("pavo_{owner}"), objects }
}

/// What may leave for the port of VXLAN.
fn leaving(owner: Owner, address: Ipv4Addr, keys: &[u32], switch: Switch) -> Vec<Value> {
    let own = || eq(field("ip", "saddr"), address);
    // All tunnels of the job.
    let tunnels = format!("{}-*", owner.name('x'));
    let mut objects = vec![
        chain("leaving"),
        hook("filter", "postrouting", LAST, "accept"),
        rule("postrouting", &[eq(field("udp", "dport"), PORT), goto("leaving")]),
    ];
    let mut add = |words: &[Value]| objects.push(rule("leaving", words));
    match switch {
        // By our device, or by nobody's: a program, or a kernel that does not say which.
        Switch::Linux => {
            let by_root = || eq(field("udp", "sport"), ports_of_root());
            add(&[eq(meta("iifname"), &tunnels), own(), by_root(), accept()]);
            add(&[eq(meta("iif"), 0), own(), by_root(), accept()]);
        }
        // Open vSwitch that is its own datapath sends past this table.
        Switch::Ovs(_) => add(&[eq(meta("mark"), ovs::MARK), own(), accept()]),
    }
    objects.push(forged("leaving", &[eq(key(), json!({ "set": keys }))]));
    let mut add = |words: &[Value]| objects.push(rule("leaving", words));
    add(&[eq(meta("iifkind"), "vxlan"), accept()]);
    // Nobody believes these, but for this host itself.
    add(&[ne(field("ip", "saddr"), address), ne(meta("oifname"), "lo"), accept()]);
    add(&[eq(meta("skuid"), 0), accept()]);
    objects.push(dropped("leaving", "vxlan-forged"));
    objects
}

fn ports_of_root() -> Value {
    json!({ "range": [SOURCE_PORTS.0, SOURCE_PORTS.1] })
}

/// The key in a VXLAN header, which follows the UDP header, as [`wire`] writes it. The kernel
/// reads a whole word of a packet much faster than three bytes.
fn key() -> Value {
    masked(raw("th", 96, 32), 0xffff_ff00)
}

/// A key as it is in the header: a reserved byte follows it.
fn wire(key: u32) -> u32 {
    key << 8
}

/// The source of the frame behind it.
fn source() -> Value {
    raw("th", 176, 48)
}

fn number(Mac(mac): Mac) -> u64 {
    mac.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A rule that drops what somebody's program wrote.
fn forged(chain: &str, matches: &[Value]) -> Value {
    rule(chain, &[matches, &[count("vxlan-forged"), drop()]].concat())
}

fn dropped(chain: &str, name: &str) -> Value {
    rule(chain, &[count(name), drop()])
}
