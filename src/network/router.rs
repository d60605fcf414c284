//! Where packets of an L3 network may go: the job's namespace, and the way out.
//!
//! ```text
//!  namespace of the network (pn…)              namespace of the host, or the cell
//!  guests ──── filter ──── uplink ════ veth ════ pv… ──── filter ──── outside
//!  gateway     NAT: guests' addresses            /31      NAT: the /31 becomes the
//!  address     become this end of the /31                 host's, ports ≥ 1024
//! ```
//!
//! The inner table decides what guests may do and hides their addresses, so that jobs
//! may use the same ones. The outer one trusts nothing that comes from inside, and
//! keeps the host, and other jobs, out of reach. Each drop moves a named counter.
//!
//! # What holds
//!
//! - In the namespace, guests reach DHCP, DNS and echo at the gateway; nothing else.
//! - What leaves it carries the job's own address of the /31, or is dropped.
//! - The host forwards it, but delivers none of it to itself, none to addresses of
//!   other jobs, and none to pasta's gateway.
//! - Into the namespace come only answers.
//! - Guests never get a source port below 1024 on the host's address: servers such as
//!   NFS take those for root's.
//! - Guests send nothing to the port of VXLAN: NAT would make it the host's, which other
//!   hosts believe.
//! - Tables of others are not touched; where one drops forwarded packets, that wins.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use super::Outside;
use super::ruleset::*;
use crate::config::Ethernet;
use crate::host::nft::{Family, Table};
use crate::host::tunnel;
use crate::model::address::Subnet;
use crate::model::owner::Owner;

/// The link in the network's namespace that guests reach.
pub const GUESTS: &str = "guests";
/// The link in the network's namespace that leads out.
pub const UPLINK: &str = "uplink";

/// Before conntrack and NAT.
const RAW: i32 = -300;
const FILTER: i32 = 0;
const SOURCE_NAT: i32 = 100;

/// The rules of the inner table that drop, by the names of their counters.
pub const INNER_DROPS: [&str; 4] = ["gateway-service", "outbound", "forward", "stray-ipv6"];
/// The rules of the outer table that drop, by the names of their counters.
pub const OUTER_DROPS: [&str; 7] = [
    "source-address",
    "other-jobs",
    "host-service",
    "unsolicited",
    "pasta-gateway",
    "stray-ipv6",
    "vxlan",
];

/// An L3 network's way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// The link on the host's side.
    pub link: String,
    /// The host's end of the /31.
    pub outer: Ipv4Addr,
    /// The job's end of the /31.
    pub inner: Ipv4Addr,
    /// What the /31 was taken from.
    pub ext_network: Subnet,
}

/// The table in the network's namespace.
pub fn inner_table(owner: Owner, config: &Ethernet, uplink: &Uplink) -> Table {
    let subnet = config.int_network;
    let from = |link: &str| eq(meta("iifname"), link);
    let from_guest = || [from(GUESTS), eq(meta("oifname"), UPLINK)];
    let service = |protocol: &str, port: u16| {
        rule("input", &[from(GUESTS), eq(field(protocol, "dport"), port), accept()])
    };
    let outbound = if config.allow_outbound {
        let [a, b] = from_guest();
        rule("forward", &[a, b, within(field("ip", "saddr"), subnet), accept()])
    } else {
        dropped("forward", &from_guest(), "outbound")
    };
    let mut objects: Vec<Value> = INNER_DROPS.iter().map(|name| counter(name)).collect();
    objects.extend([
        hook("filter", "input", FILTER, "drop"),
        rule("input", &[from("lo"), accept()]),
        rule("input", &[is_reply(), accept()]),
        service("udp", 67),
        service("udp", 53),
        service("tcp", 53),
        rule("input", &[from(GUESTS), eq(field("icmp", "type"), "echo-request"), accept()]),
    ]);
    if config.int_network6.is_some() {
        objects.extend(services6());
    }
    objects.extend([
        dropped("input", &[is_ipv6()], "stray-ipv6"),
        dropped("input", &[], "gateway-service"),
        hook("filter", "forward", FILTER, "drop"),
        rule("forward", &[is_reply(), accept()]),
        outbound,
        dropped("forward", &[], "forward"),
        hook("nat", "postrouting", SOURCE_NAT, "accept"),
        rule(
            "nat-postrouting",
            &[
                eq(meta("oifname"), UPLINK),
                within(field("ip", "saddr"), subnet),
                json!({ "snat": { "family": "ip", "addr": uplink.inner } }),
            ],
        ),
    ]);
    table(owner, objects)
}

/// What guests reach at the gateway by IPv6: DHCP, echo, and what tells its MAC. The latter
/// has crossed no router (RFC 4861).
fn services6() -> [Value; 3] {
    let from_guest = || eq(meta("iifname"), GUESTS);
    let kind = || field("icmpv6", "type");
    let talk = json!({ "set": [
        "nd-router-solicit", "nd-neighbor-solicit", "nd-neighbor-advert",
    ] });
    [
        rule("input", &[is_ipv6(), from_guest(), eq(field("udp", "dport"), 547), accept()]),
        rule("input", &[from_guest(), eq(kind(), "echo-request"), accept()]),
        rule(
            "input",
            &[from_guest(), eq(kind(), talk), eq(field("ip6", "hoplimit"), 255), accept()],
        ),
    ]
}

/// The table outside, for all uplinks of the job.
pub fn outer_table(owner: Owner, uplinks: &[Uplink], outside: &Outside) -> Table {
    let sources: Vec<_> =
        uplinks.iter().map(|up| tuple(&[json!(up.link), json!(up.inner)])).collect();
    let addresses: Vec<_> = uplinks.iter().map(|up| json!(up.inner)).collect();
    let mut networks: Vec<_> = uplinks.iter().map(|up| up.ext_network).collect();
    networks.sort();
    networks.dedup();

    // By the part of their names that is the job's: for each of the host's packets that costs
    // less than a look into a set.
    let uplinks = format!("{}-*", owner.name('v'));
    let from_job = || eq(meta("iifname"), &uplinks);
    let to_job = || eq(meta("oifname"), &uplinks);
    let source = tuple(&[meta("iifname"), field("ip", "saddr")]);
    let mut objects: Vec<Value> = OUTER_DROPS.iter().map(|name| counter(name)).collect();
    objects.extend([
        set("sources", &["ifname", "ipv4_addr"], &sources),
        set("addresses", &["ipv4_addr"], &addresses),
        chain("from-job"),
        chain("from-uplink"),
        rule("from-uplink", &[eq(source, "@sources"), goto("from-job")]),
        dropped("from-uplink", &[is_ipv6()], "stray-ipv6"),
        dropped("from-uplink", &[], "source-address"),
        // Fragments have been put together: NAT needs that.
        dropped("from-job", &[eq(field("udp", "dport"), tunnel::PORT)], "vxlan"),
        // All packets of the host come by here: one look for those of others.
        hook("filter", "prerouting", RAW, "accept"),
        rule("prerouting", &[from_job(), goto("from-uplink")]),
    ]);
    objects.extend(networks.into_iter().map(|network| {
        dropped("from-job", &[within(field("ip", "daddr"), network)], "other-jobs")
    }));
    objects.extend([
        hook("filter", "input", FILTER, "accept"),
        dropped("input", &[from_job()], "host-service"),
        hook("filter", "forward", FILTER, "accept"),
        rule("forward", &[to_job(), is_reply(), accept()]),
        dropped("forward", &[to_job()], "unsolicited"),
    ]);
    if let Outside::Pasta { link, gateway } = outside {
        objects.push(hook("filter", "postrouting", FILTER, "accept"));
        let to_gateway = [eq(meta("oifname"), link), eq(field("ip", "daddr"), gateway)];
        objects.push(dropped("postrouting", &to_gateway, "pasta-gateway"));
    }
    let leaving = || [eq(field("ip", "saddr"), "@addresses"), ne(meta("oifname"), &uplinks)];
    let [a, b] = leaving();
    let [c, d] = leaving();
    let ports = json!({ "masquerade": { "port": { "range": [1024, 65535] } } });
    objects.extend([
        hook("nat", "postrouting", SOURCE_NAT, "accept"),
        rule("nat-postrouting", &[a, b, eq(meta("l4proto"), any(&["tcp", "udp"])), ports]),
        rule("nat-postrouting", &[c, d, json!({ "masquerade": null })]),
    ]);
    table(owner, objects)
}

fn table(owner: Owner, objects: Vec<Value>) -> Table {
    Table { family: Family::Inet, name: format!("pavo_{owner}"), objects }
}

/// Both kernels at the ends of a veth speak IPv6 on their own; it is not counted as
/// anything a guest did.
fn is_ipv6() -> Value {
    eq(meta("nfproto"), "ipv6")
}

/// A rule that drops what matches, counted.
fn dropped(chain: &str, matches: &[Value], name: &str) -> Value {
    let mut words = matches.to_vec();
    words.extend([count(name), drop()]);
    rule(chain, &words)
}
