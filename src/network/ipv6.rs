//! IPv6 on L3 networks, beside IPv4: which addresses, and the gateway's side of it.
//!
//! ```text
//!  guest     prefix::(rank + 1)   told by DHCPv6, and to cloud-init by the seed
//!  gateway   prefix::ffff:fffe    advertises itself as a way to nowhere
//! ```
//!
//! Guests reach each other and their gateway. Nothing is routed: neither in the namespace of
//! the network nor on the host is forwarding of IPv6 switched on, which would make a host deaf
//! to its own routers' advertisements. The way out is that of IPv4.
//!
//! Guests make no addresses of their own (the prefix is advertised without the A flag): those
//! that change, or follow from a secret (RFC 7217, RFC 8981), could not be told from forged
//! ones. Link-local ones that do not follow from the MAC reach the gateway and nobody else
//! ([`switch6`](super::switch6)).

use std::net::IpAddr;

use super::ethernet::Segment;
use super::gateway::set;
use super::router::GUESTS;
use super::{Request, SwitchKind};
use crate::config::{Ethernet, Layer, Network6};
use crate::error::{Error, Result};
use crate::host::step::Step;
use crate::model::prefix::{Prefix64, link_local};

/// The smallest MTU of IPv6 (RFC 8200, 5).
const MIN_MTU: u16 = 1280;

/// The prefix of the job's network of this index, if it has one.
pub fn prefix(request: &Request, index: u32, config: &Ethernet) -> Option<Prefix64> {
    match config.int_network6.filter(|_| config.layer == Layer::L3)? {
        Network6::Auto => Some(Prefix64::of_job(request.owner, index)),
        Network6::Given(prefix) => Some(prefix),
    }
}

/// # Errors
/// When the job's hosts cannot carry IPv6 as it must be.
pub fn check(request: &Request, name: &str, mtu: u16) -> Result<()> {
    let peers = request.fabric.iter().flat_map(|fabric| &fabric.peers);
    let mut switches = peers.map(|peer| peer.switch).chain([request.switch.kind()]);
    if switches.any(|switch| switch == SwitchKind::Ovs) {
        let text = format!("Open vSwitch does not carry IPv6 yet, which network `{name}` has");
        return Err(Error::config(text).help(
            "write `switch: linux` in batch.yaml, or take `int-network6` out of networks.yaml",
        ));
    }
    if mtu < MIN_MTU {
        let text = format!("guests of network `{name}` have an MTU of {mtu}, too small for IPv6");
        return Err(Error::config(text).help(format!(
            "it takes {MIN_MTU}: `mtu` in networks.yaml, and that of the underlay"
        )));
    }
    Ok(())
}

/// What the namespace is told before it has links.
pub fn settings(namespace: &str) -> Vec<Step> {
    let of_new_links = |key: &str, value| {
        set(Some(namespace.to_owned()), &format!("net/ipv6/conf/default/{key}"), value)
    };
    vec![
        // A host that wants no IPv6 may have it off for all namespaces.
        of_new_links("disable_ipv6", "0"),
        // Its addresses are its own: it need not wait for a second to see whether they are.
        of_new_links("accept_dad", "0"),
        of_new_links("accept_ra", "0"),
    ]
}

/// The gateway's addresses, and who has the others.
pub fn addresses(namespace: &str, segment: &Segment<'_>, prefix: Prefix64) -> Vec<Step> {
    let gateway_mac = segment.config.mac_prefix.gateway();
    let address = |address| Step::Address {
        namespace: Some(namespace.to_owned()),
        link: GUESTS.to_owned(),
        address: IpAddr::V6(address),
        bits: Prefix64::BITS,
    };
    let known = segment.ports.iter().flat_map(|port| {
        let own = [port.address6, Some(link_local(port.mac))];
        own.into_iter().flatten().map(|address| (IpAddr::V6(address), port.mac))
    });
    vec![
        address(link_local(gateway_mac)),
        address(prefix.gateway()),
        Step::Neighbours {
            namespace: Some(namespace.to_owned()),
            link: GUESTS.to_owned(),
            group: None,
            known: known.collect(),
        },
    ]
}
