//! The gateway of an L3 network: the namespace in which it is, and the ways in.

use std::net::Ipv4Addr;

use super::ethernet::{Segment, alias, gateway_link};
use super::ipv6;
use super::router::{self, GUESTS, UPLINK, Uplink};
use super::{Request, Switch};
use crate::host::step::Step;

/// The namespace of an L3 network, and its two ways in.
pub(super) fn steps(request: &Request, segment: &Segment<'_>, uplink: &Uplink) -> Vec<Step> {
    let config = segment.config;
    let name = request.owner.indexed('n', segment.index);
    let namespace = || Some(name.clone());
    let veth = |link: String, bridge, peer: &str, peer_mac| Step::Veth {
        name: link,
        mtu: segment.mtu,
        group: request.owner.link_group(),
        alias: alias(request, segment),
        bridge,
        peer: peer.to_owned(),
        peer_namespace: name.clone(),
        peer_mac,
    };
    let address = |namespace, link: &str, address: Ipv4Addr, bits| Step::Address {
        namespace,
        link: link.to_owned(),
        address: address.into(),
        bits,
    };
    let subnet = config.int_network;
    let bridge = (request.switch == Switch::Linux).then(|| segment.bridge.clone());
    let table = router::inner_table(request.owner, config, uplink);
    let gateway_link = gateway_link(request, segment);
    let known = segment.ports.iter().filter_map(|port| Some((port.address?.into(), port.mac)));
    let mut steps = vec![
        Step::Namespace { name: name.clone() },
        Step::NftTables { namespace: namespace(), tables: vec![table] },
        switch_on(namespace(), "net/ipv4/ip_forward"),
        // A guest's address cannot come in by the uplink, nor the other way round …
        switch_on(namespace(), "net/ipv4/conf/all/rp_filter"),
        // … and neither side learns of the other's by ARP.
        switch_on(namespace(), "net/ipv4/conf/all/arp_ignore"),
        Step::LinkUp { namespace: namespace(), link: "lo".into() },
    ];
    if segment.prefix6.is_some() {
        steps.extend(ipv6::settings(&name));
    }
    steps.extend([
        veth(gateway_link, bridge, GUESTS, Some(config.mac_prefix.gateway())),
        address(namespace(), GUESTS, subnet.gateway(), subnet.bits()),
        // A guest that boots is asked for by ARP once a second: seconds of waiting saved.
        Step::Neighbours {
            namespace: namespace(),
            link: GUESTS.into(),
            group: None,
            known: known.collect(),
        },
        veth(uplink.link.clone(), None, UPLINK, None),
        address(None, &uplink.link, uplink.outer, 31),
        address(namespace(), UPLINK, uplink.inner, 31),
        Step::Route { namespace: namespace(), gateway: uplink.outer },
    ]);
    if let Some(prefix) = segment.prefix6 {
        steps.extend(ipv6::addresses(&name, segment, prefix));
    }
    if !request.switch.takes_offloads() {
        steps.push(Step::NoOffloads { namespace: namespace(), link: GUESTS.into() });
    }
    steps
}

pub(super) fn switch_on(namespace: Option<String>, key: &str) -> Step {
    set(namespace, key, "1")
}

pub(super) fn set(namespace: Option<String>, key: &str, value: &str) -> Step {
    Step::Sysctl { namespace, key: key.to_owned(), value: value.to_owned(), before: None }
}
