//! Private Ethernet: one broadcast domain per network and job.
//!
//! ```text
//!  namespace of the host (or the cell)          namespace of the network, pnl3-0
//!    vm0 ── ptl3-0 ┐                              ┌ guests   gateway address, DHCP, DNS
//!    vm1 ── ptl3-1 ┴ pbl3-0 ── pgl3-0 ═══ veth ═══╡ NAT
//!                                                 └ uplink
//!    outside ── NAT ────────── pvl3-0 ═══ veth ═════╛ a /31 of ext_network
//! ```
//!
//! L2 is the first line alone. Names are of job `l3` and its network of index 0; taps
//! are counted over all networks of the job. Each L3 network has a namespace of its
//! own, so that a job's networks may use the same addresses, and one is no way into
//! another.
//!
//! Where guests of the network run on other hosts, too, `pxl3-0` is one more port of its
//! bridge: the [tunnel](super::fabric) to them.
//!
//! This module decides and changes nothing: the journal applies the plan, and undoes
//! it in reverse.
//!
//! # What holds
//!
//! - Planning twice gives the same plan: it looks at neither the host nor the clock.
//! - Every name carries the job, every link its group, so that what is found on a
//!   host tells whose it is.
//! - Tables come first in the plan and taps last: at no time can a guest send
//!   unchecked. Undoing deletes all links by group first.
//! - Nothing of the guests' addresses is in the host's routing.
//! - The host's `ip_forward` is switched on where it is off, and left on: by the time
//!   a job ends others may forward too, and which of them asked first is not known.
//!   In a cell it ends with the cell.
//!
//! # Changing it
//!
//! `tests/golden/plans/*.json` show whole plans: read one first.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::fabric::{self, Far, Tunnel};
use super::gateway;
use super::ipv6;
use super::ovs;
use super::router::{self, GUESTS, Uplink};
use super::switch::{self, MAX_PORTS, Port};
use super::{Guest, L3, NetworkPlan, Request, Switch, VmNetworks};
use crate::config::{Ethernet, Layer, Network};
use crate::error::{Error, Result};
use crate::host::journal::Plan;
use crate::host::nft::Table;
use crate::host::step::Step;
use crate::model::address::Mac;
use crate::model::prefix::Prefix64;
use crate::model::vm::{Nic, NicIpv4, NicIpv6};

/// How many L3 networks one job may have on a host; each takes a /31 of its slot.
pub const MAX_UPLINKS: u32 = 8;

/// The domain of guests' names where none is configured.
/// ICANN has set `internal` aside for private use; `local` is multicast DNS.
const DOMAIN: &str = "pavo.internal";

/// The longest name of a link.
const MAX_NAME: usize = 15;

/// One network of the job that is in use, with everything it is made of.
pub(super) struct Segment<'a> {
    pub index: u32,
    pub name: &'a str,
    pub config: &'a Ethernet,
    pub bridge: String,
    /// Of the guests and everything between them.
    pub mtu: u16,
    /// Of the VMs on it, in the order of ranks.
    pub ports: Vec<Port>,
    /// On L3.
    pub uplink: Option<Uplink>,
    /// On L3, where guests have IPv6 addresses.
    pub prefix6: Option<Prefix64>,
    /// Where it has guests on other hosts.
    pub tunnel: Option<Tunnel>,
}

/// See [`network::plan`](super::plan).
pub fn plan(request: &Request) -> Result<NetworkPlan> {
    fabric::check(request)?;
    let mut segments = segments(request)?;
    let nics = plug(request, &mut segments)?;
    for segment in &segments {
        let others = usize::from(segment.uplink.is_some()) + usize::from(segment.tunnel.is_some());
        if segment.ports.len() + others > MAX_PORTS {
            let text = format!("more than {MAX_PORTS} ports on network `{}`", segment.name);
            return Err(Error::usage(text).help("spread the VMs over more hosts or networks"));
        }
    }
    if request.switch != Switch::Linux && segments.len() > ovs::MAX_NETWORKS {
        let text = format!("more than {} networks in one job", ovs::MAX_NETWORKS);
        return Err(Error::usage(text));
    }
    let l3 = segments.iter().filter_map(|segment| describe(request, segment)).collect();
    let plan =
        Plan { owner: request.owner, keeper: request.keeper, steps: steps(request, &segments) };
    Ok(NetworkPlan { plan, nics, l3 })
}

/// The networks that VMs use, still without ports.
fn segments(request: &Request) -> Result<Vec<Segment<'_>>> {
    let used: BTreeSet<&str> =
        request.vms.iter().flat_map(|vm| &vm.networks).map(String::as_str).collect();
    if let Some(missing) =
        used.iter().find(|name| !request.networks.iter().any(|(known, _)| known == *name))
    {
        return Err(Error::config(format!("there is no network `{missing}`")));
    }
    let mut uplinks = 0;
    let mut segments = Vec::new();
    for (index, (name, network)) in (0..).zip(&request.networks) {
        if !used.contains(name.as_str()) {
            continue;
        }
        let config = match network {
            Network::Ethernet(config) => config,
            Network::Unsupported { kind } => {
                return Err(Error::config(format!(
                    "network `{name}` has the type `{kind}`, which this version does not run"
                ))
                .help("use a network of `type: ethernet`"));
            }
        };
        let uplink = match config.layer {
            Layer::L2 => None,
            Layer::L3 => {
                uplinks += 1;
                Some(uplink(request, index, name, config, uplinks - 1)?)
            }
        };
        let bridge = kernel_name(request, 'b', index)?;
        let prefix6 = ipv6::prefix(request, index, config);
        let tunnel = tunnel(request, index, name, config)?;
        let across = request.fabric.as_ref().filter(|_| tunnel.is_some());
        let mtu = fabric::mtu(config.mtu, across);
        if prefix6.is_some() {
            ipv6::check(request, name, mtu)?;
        }
        let ports = Vec::new();
        segments.push(Segment { index, name, config, bridge, mtu, ports, uplink, prefix6, tunnel });
    }
    Ok(segments)
}

/// Takes the job's `number`-th /31.
fn uplink(
    request: &Request,
    index: u32,
    name: &str,
    config: &Ethernet,
    number: u32,
) -> Result<Uplink> {
    if config.int_network.overlaps(&config.ext_network) {
        return Err(Error::config(format!(
            "`int-network` {} and `ext-network` {} of network `{name}` overlap",
            config.int_network, config.ext_network
        )));
    }
    if number >= MAX_UPLINKS {
        let text = format!("a job may use {MAX_UPLINKS} L3 networks on a host, not more");
        return Err(Error::usage(text));
    }
    let first = u64::from(request.uplink_slot) * u64::from(MAX_UPLINKS) + u64::from(number);
    let nth = |number: u64| config.ext_network.nth(number.try_into().ok()?);
    let (Some(outer), Some(inner)) = (nth(2 * first), nth(2 * first + 1)) else {
        return Err(Error::config(format!(
            "`ext-network` {} of network `{name}` has no addresses left for one more job",
            config.ext_network
        ))
        .help("give it a larger network"));
    };
    let link = kernel_name(request, 'v', index)?;
    Ok(Uplink { link, outer, inner, ext_network: config.ext_network })
}

/// The way to the guests of a network on other hosts, if there are any.
fn tunnel(request: &Request, index: u32, name: &str, config: &Ethernet) -> Result<Option<Tunnel>> {
    let Some(fabric) = &request.fabric else { return Ok(None) };
    let mut guests = Vec::new();
    for peer in &fabric.peers {
        for vm in peer.vms.iter().filter(|vm| vm.networks.iter().any(|n| n == name)) {
            let (mac, address) = addresses(name, config, vm.rank)?;
            let address6 = ipv6::prefix(request, index, config).and_then(|p| p.guest(vm.rank));
            guests.push(Far { rank: vm.rank, mac, address, address6, host: peer.address });
        }
    }
    if guests.is_empty() {
        return Ok(None);
    }
    guests.sort_by_key(|guest| guest.rank);
    let link = kernel_name(request, 'x', index)?;
    Ok(Some(Tunnel { link, key: fabric.keys[index as usize], guests }))
}

/// Gives each VM its NICs and each network its ports.
fn plug(request: &Request, segments: &mut [Segment<'_>]) -> Result<Vec<(u32, Vec<Nic>)>> {
    let mut next_tap = 0;
    let mut all = Vec::new();
    for vm in &request.vms {
        let mut nics: Vec<Nic> = Vec::new();
        for name in &vm.networks {
            if nics.iter().any(|nic| nic.network == *name) {
                let text = format!("network `{name}` is listed twice for one VM");
                return Err(Error::config(text));
            }
            let segment = segments
                .iter_mut()
                .find(|segment| segment.name == name)
                .ok_or_else(|| Error::bug(format!("network `{name}` was not planned")))?;
            let tap = kernel_name(request, 't', next_tap)?;
            next_tap += 1;
            let nic = nic(vm, segment, tap, request.switch.takes_offloads())?;
            segment.ports.push(Port {
                tap: nic.tap.clone(),
                rank: vm.rank,
                mac: nic.mac,
                queues: nic.queues,
                address: nic.ipv4.as_ref().map(|ipv4| ipv4.address),
                address6: nic.ipv6.as_ref().map(|ipv6| ipv6.address),
            });
            nics.push(nic);
        }
        all.push((vm.rank, nics));
    }
    Ok(all)
}

fn nic(vm: &VmNetworks, segment: &Segment<'_>, tap: String, offloads: bool) -> Result<Nic> {
    let (mac, address) = addresses(segment.name, segment.config, vm.rank)?;
    let subnet = segment.config.int_network;
    let domain = || domain(segment.config);
    let ipv4 = address.map(|address| {
        let (gateway, domain) = (subnet.gateway(), domain());
        NicIpv4 { address, subnet, gateway, domain }
    });
    let ipv6 = segment
        .prefix6
        .and_then(|prefix| Some(NicIpv6 { address: prefix.guest(vm.rank)?, prefix }));
    let (network, model) = (segment.name.to_owned(), vm.nic_model.clone());
    let (mtu, queues) = (segment.mtu, vm.nic_queues);
    Ok(Nic { network, tap, mac, model, queues, mtu, ipv4, ipv6, offloads })
}

/// The MAC of a VM on a network, and its address there on L3.
fn addresses(name: &str, config: &Ethernet, rank: u32) -> Result<(Mac, Option<Ipv4Addr>)> {
    let number = config.mac_start_offset.checked_add(rank);
    let mac = number.and_then(|number| config.mac_prefix.nth(number));
    // On L3 the prefix also holds the gateway's address.
    let mac = mac.filter(|mac| *mac != config.mac_prefix.gateway()).ok_or_else(|| {
        Error::config(format!("network `{name}` has no MAC address for vm{rank}"))
            .help("choose a shorter `mac-prefix`, or a smaller `mac-start-offset`")
    })?;
    if config.layer == Layer::L2 {
        return Ok((mac, None));
    }
    let subnet = config.int_network;
    let address = subnet.guest(rank).ok_or_else(|| {
        let guests = subnet.guests();
        let text = format!("network `{name}` ({subnet}) has no address for vm{rank}");
        Error::config(text).help(format!("its `int-network` holds {guests} VMs"))
    })?;
    Ok((mac, Some(address)))
}

fn describe(request: &Request, segment: &Segment<'_>) -> Option<L3> {
    segment.uplink.as_ref()?;
    let config = segment.config;
    let guest = |(vm, port): (&VmNetworks, &Port)| {
        let default_route = request.default_network(vm) == Some(segment.name);
        let (rank, mac, address6) = (vm.rank, port.mac, port.address6);
        Some(Guest { rank, mac, address: port.address?, address6, default_route })
    };
    let far = |far: &Far| {
        let (rank, mac, address, address6) = (far.rank, far.mac, far.address?, far.address6);
        Some(Guest { rank, mac, address, address6, default_route: false })
    };
    let others = segment.tunnel.iter().flat_map(|tunnel| &tunnel.guests).filter_map(far);
    let on_it = request.vms.iter().filter(|vm| vm.networks.iter().any(|n| n == segment.name));
    Some(L3 {
        network: segment.name.to_owned(),
        namespace: request.owner.indexed('n', segment.index),
        interface: GUESTS.to_owned(),
        gateway: config.int_network.gateway(),
        gateway_mac: config.mac_prefix.gateway(),
        subnet: config.int_network,
        prefix6: segment.prefix6,
        mtu: segment.mtu,
        domain: domain(config),
        allow_outbound: config.allow_outbound,
        dns_search: config.dns_search.clone(),
        dns_server: config.dns_server,
        ntp_server: config.ntp_server,
        guests: on_it.zip(&segment.ports).filter_map(guest).collect(),
        others: others.collect(),
        reverse_nat: config.reverse_nat.clone(),
    })
}

fn steps(request: &Request, segments: &[Segment<'_>]) -> Vec<Step> {
    if segments.is_empty() {
        return Vec::new();
    }
    let mut steps = vec![Step::NftTables { namespace: None, tables: tables(request, segments) }];
    if segments.iter().any(|segment| segment.uplink.is_some()) {
        steps.push(gateway::switch_on(None, "net/ipv4/ip_forward"));
    }
    let linux = request.switch == Switch::Linux;
    for segment in segments {
        if linux {
            let tunnel = segment.tunnel.as_ref();
            steps.push(Step::Bridge {
                name: segment.bridge.clone(),
                mtu: segment.mtu,
                group: request.owner.link_group(),
                alias: alias(request, segment),
                mac: tunnel.map(|tunnel| tunnel.bridge_mac(&segment.config.mac_prefix)),
            });
        }
        if let Some(uplink) = &segment.uplink {
            steps.extend(gateway::steps(request, segment, uplink));
        }
        if let (true, Some(fabric), Some(tunnel)) = (linux, &request.fabric, &segment.tunnel) {
            steps.extend(tunnel_steps(request, segment, fabric.address, tunnel));
        }
    }
    steps.extend(segments.iter().map(|segment| Step::Taps {
        bridge: linux.then(|| segment.bridge.clone()),
        mtu: segment.mtu,
        group: request.owner.link_group(),
        alias: alias(request, segment),
        owner: request.tap_uid,
        names: switch::taps(&segment.ports, |_| true),
        several_queues: switch::taps(&segment.ports, |port| port.queues > 1),
    }));
    if let Switch::Ovs(datapath) = request.switch {
        let (owner, networks) = (request.owner, ovs_networks(request, segments));
        let bridge = ovs::bridge(owner, datapath, request.fabric.as_ref(), &networks);
        let table = ovs::flow_table(owner, &networks);
        steps.push(Step::OvsBridges { owner, bridges: vec![bridge] });
        steps.push(Step::OvsFlows { tables: vec![table] });
    }
    steps
}

/// The networks as Open vSwitch sees them.
fn ovs_networks<'a>(request: &Request, segments: &'a [Segment<'_>]) -> Vec<ovs::Network<'a>> {
    let network = |segment: &'a Segment<'_>| ovs::Network {
        layer: segment.config.layer,
        ports: &segment.ports,
        gateway: segment.uplink.as_ref().map(|_| ovs::Gateway {
            link: gateway_link(request, segment),
            mac: segment.config.mac_prefix.gateway(),
            address: segment.config.int_network.gateway(),
        }),
        tunnel: segment.tunnel.as_ref(),
    };
    segments.iter().map(network).collect()
}

/// All rules of the job in the host's namespace.
fn tables(request: &Request, segments: &[Segment<'_>]) -> Vec<Table> {
    let gateways: Vec<_> = segments.iter().map(|segment| gateway_link(request, segment)).collect();
    let networks: Vec<_> = segments
        .iter()
        .zip(&gateways)
        .map(|(segment, gateway)| switch::Network {
            layer: segment.config.layer,
            ports: &segment.ports,
            gateway: segment
                .uplink
                .as_ref()
                .map(|_| (gateway.as_str(), segment.config.mac_prefix.gateway())),
            prefix6: segment.prefix6,
            tunnel: segment.tunnel.as_ref(),
        })
        .collect();
    let mut tables = match request.switch {
        Switch::Linux => vec![switch::table(request.owner, &networks)],
        Switch::Ovs(_) => ovs::guard(request.owner, &ovs::links(&ovs_networks(request, segments))),
    };
    let uplinks: Vec<_> = segments.iter().filter_map(|segment| segment.uplink.clone()).collect();
    if !uplinks.is_empty() {
        tables.push(router::outer_table(request.owner, &uplinks, &request.outside));
    }
    let tunnels: Vec<_> = segments.iter().filter_map(|segment| segment.tunnel.as_ref()).collect();
    if let (Some(fabric), false) = (&request.fabric, tunnels.is_empty()) {
        tables.push(fabric::table(request.owner, fabric, &tunnels, request.switch));
    }
    tables
}

/// The link by which the gateway of a network is a port of its bridge.
pub(super) fn gateway_link(request: &Request, segment: &Segment<'_>) -> String {
    request.owner.indexed('g', segment.index)
}

/// The tunnel of a network, and who is behind it.
fn tunnel_steps(
    request: &Request,
    segment: &Segment<'_>,
    local: Ipv4Addr,
    tunnel: &Tunnel,
) -> Vec<Step> {
    let known: Vec<_> =
        tunnel.guests.iter().filter_map(|g| Some((g.address?.into(), g.mac))).collect();
    let mut steps = vec![
        Step::Vxlan {
            name: tunnel.link.clone(),
            key: tunnel.key,
            local,
            mtu: segment.mtu,
            group: request.owner.link_group(),
            alias: alias(request, segment),
            bridge: segment.bridge.clone(),
            answers_arp: !known.is_empty(),
        },
        Step::Forwarding {
            link: tunnel.link.clone(),
            group: request.owner.link_group(),
            known: tunnel.guests.iter().map(|guest| (guest.mac, guest.host)).collect(),
            all: tunnel.hosts(),
        },
    ];
    if !known.is_empty() {
        // Of these the bridge tells who asks by ARP.
        let (link, group) = (segment.bridge.clone(), Some(request.owner.link_group()));
        steps.push(Step::Neighbours { namespace: None, link, group, known });
    }
    steps
}

/// What a person sees beside the link's name. The kernel takes 255 bytes.
pub(super) fn alias(request: &Request, segment: &Segment<'_>) -> String {
    let name: String = segment.name.chars().filter(char::is_ascii_graphic).take(200).collect();
    format!("pavo: job {}, network {name}", request.owner)
}

fn domain(config: &Ethernet) -> String {
    config.domain_name.clone().unwrap_or_else(|| DOMAIN.to_owned())
}

/// The name of the job's object of a kind, if the kernel can take it.
fn kernel_name(request: &Request, kind: char, index: u32) -> Result<String> {
    let name = request.owner.indexed(kind, index);
    if name.len() <= MAX_NAME {
        return Ok(name);
    }
    let text = format!("`{name}` is longer than the {MAX_NAME} characters of a link's name");
    Err(Error::usage(text).help("use fewer VMs or networks in one job"))
}
