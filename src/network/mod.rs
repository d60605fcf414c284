//! Networks of a cluster: from configuration to a plan for one host.
//!
//! [`plan`] decides and changes nothing; the [journal](crate::host::journal) applies
//! what it returns. What each part of a plan is for:
//!
//! | file | decides |
//! |---|---|
//! | [`ethernet`] | names, addresses, the order of steps |
//! | [`fabric`] | how the hosts of a job reach each other |
//! | [`switch`] | what guests may send: the Linux bridge and its rules |
//! | [`ovs`] | the same by Open vSwitch: its bridge and flows |
//! | `gateway` | the namespace of an L3 network |
//! | `ipv6`, `switch6` | what is more where guests have IPv6 addresses, too |
//! | [`router`] | where guests' packets may go: NAT and rules of an L3 network |
//! | [`ruleset`] | how rules are written down |

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::config::{Layer, Network, ReverseNat};
use crate::error::Result;
use crate::host::journal::Plan;
use crate::host::ovs::Datapath;
use crate::model::address::{Mac, Subnet};
use crate::model::job::ProcessId;
use crate::model::owner::Owner;
use crate::model::prefix::Prefix64;
use crate::model::vm::Nic;

pub mod ethernet;
pub mod fabric;
mod gateway;
mod ipv6;
pub mod ovs;
pub mod responder;
pub mod router;
pub mod ruleset;
pub mod switch;
mod switch6;

/// What one job needs of one host.
#[derive(Clone, Debug)]
pub struct Request {
    pub switch: Switch,
    pub owner: Owner,
    /// The process the network is made for.
    pub keeper: ProcessId,
    /// Who may open the guests' TAP devices, as seen in the namespace of the plan.
    pub tap_uid: u32,
    pub outside: Outside,
    /// A number no other job on this host has: it chooses the job's pairs of
    /// addresses in `ext_network`.
    pub uplink_slot: u32,
    /// The job's networks by name; an index in this list is part of kernel names.
    pub networks: Vec<(String, Network)>,
    /// The VMs that run on this host.
    pub vms: Vec<VmNetworks>,
    /// Absent where the job has this host only.
    pub fabric: Option<Fabric>,
}

impl Request {
    /// The network by which a VM's packets leave: the first L3 one of its interfaces.
    fn default_network<'a>(&self, vm: &'a VmNetworks) -> Option<&'a str> {
        let is_l3 = |name: &&String| {
            self.networks.iter().any(|(known, network)| {
                let layer = match network {
                    Network::Ethernet(ethernet) => Some(ethernet.layer),
                    Network::Unsupported { .. } => None,
                };
                known == *name && layer == Some(Layer::L3)
            })
        };
        vm.networks.iter().find(is_l3).map(String::as_str)
    }
}

/// How the job's hosts reach each other.
#[derive(Clone, Debug)]
pub struct Fabric {
    /// The VXLAN key of each network, in the order of [`Request::networks`]: 24 bits.
    pub keys: Vec<u32>,
    /// This host's address on the underlay.
    pub address: Ipv4Addr,
    /// The link that has it.
    pub link: String,
    /// The link's.
    pub mtu: u16,
    pub peers: Vec<Peer>,
}

/// Another host of the job.
#[derive(Clone, Debug)]
pub struct Peer {
    pub node: String,
    /// On the underlay.
    pub address: Ipv4Addr,
    pub switch: SwitchKind,
    /// The VMs that run there.
    pub vms: Vec<VmNetworks>,
}

/// One VM's interfaces.
#[derive(Clone, Debug)]
pub struct VmNetworks {
    pub rank: u32,
    /// QEMU's device, such as `virtio-net`.
    pub nic_model: String,
    /// How many queues each interface has.
    pub nic_queues: u32,
    /// Names of networks, in the order in which the guest sees the interfaces.
    pub networks: Vec<String>,
}

/// What carries the frames of guests on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// The kernel's bridge.
    Linux,
    /// Open vSwitch, with this datapath.
    Ovs(Datapath),
}

impl Switch {
    pub fn kind(self) -> SwitchKind {
        match self {
            Self::Linux => SwitchKind::Linux,
            Self::Ovs(_) => SwitchKind::Ovs,
        }
    }

    /// Whether it takes frames whose checksums and segments are left to the hardware.
    pub fn takes_offloads(self) -> bool {
        self != Self::Ovs(Datapath::Netdev)
    }
}

/// What the job's other hosts have to know of a host's switch: [`fabric`] says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SwitchKind {
    Linux,
    Ovs,
}

/// What lies beyond the namespace in which the plan is applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outside {
    /// That of a cell: the link that pasta made, and the gateway address it shows.
    /// Packets to that address would leave pasta towards whatever has it out there:
    /// none is sent.
    Pasta { link: String, gateway: Ipv4Addr },
    /// The host's own links and routes.
    Host,
}

/// Everything decided about a job's networks on one host.
#[derive(Clone, Debug)]
pub struct NetworkPlan {
    pub plan: Plan,
    /// The interfaces of each VM, by rank.
    pub nics: Vec<(u32, Vec<Nic>)>,
    /// One for each L3 network: what its responder has to know.
    pub l3: Vec<L3>,
}

/// An L3 network, as its DHCP and DNS responder sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L3 {
    /// The network's name in the configuration.
    pub network: String,
    /// The name, below [`Host::netns_dir`](crate::host::Host::netns_dir), of the
    /// namespace in which the responder listens.
    pub namespace: String,
    /// The link in it that holds the gateway's address.
    pub interface: String,
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    pub gateway_mac: Mac,
    pub subnet: Subnet,
    /// Where guests have IPv6 addresses, too.
    pub prefix6: Option<Prefix64>,
    pub mtu: u16,
    pub domain: String,
    pub allow_outbound: bool,
    pub dns_search: Vec<String>,
    pub dns_server: Option<Ipv4Addr>,
    pub ntp_server: Option<Ipv4Addr>,
    /// Those on this host: they get leases, and ask for names.
    pub guests: Vec<Guest>,
    /// Those on the job's other hosts: they have names.
    pub others: Vec<Guest>,
    pub reverse_nat: Vec<ReverseNat>,
}

/// A guest of an L3 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub rank: u32,
    pub mac: Mac,
    pub address: Ipv4Addr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<Ipv6Addr>,
    /// Whether what it sends elsewhere leaves by this network; of guests on other hosts no
    /// matter here.
    pub default_route: bool,
}

/// How many jobs at once, at most, find a pair of addresses for their uplinks in every
/// `ext_network` of these. At least 1; where none of them has an uplink nothing bounds them.
pub fn uplink_slots(networks: &[(String, Network)]) -> u32 {
    let slots = networks.iter().filter_map(|(_, network)| match network {
        Network::Ethernet(ethernet) if ethernet.layer == Layer::L3 => {
            let pairs = 1_u32 << (31 - u32::from(ethernet.ext_network.bits()).min(31));
            Some(pairs / ethernet::MAX_UPLINKS)
        }
        _ => None,
    });
    slots.min().unwrap_or(u32::MAX).max(1)
}

/// Plans the networks of a job on one host. Pure: the same request gives the same
/// plan.
///
/// # Errors
/// [`Kind::Config`](crate::error::Kind::Config) when a VM names a network that is
/// not in the request, or of a type that does not run yet, or the configured
/// addresses do not suffice.
pub fn plan(request: &Request) -> Result<NetworkPlan> {
    ethernet::plan(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_without_an_uplink_bound_no_number_of_clusters() {
        let network = |layer| {
            let ethernet = crate::config::Ethernet { layer, ..Default::default() };
            ("net".to_owned(), Network::Ethernet(ethernet))
        };
        let slots = uplink_slots(&[network(Layer::L3)]);
        assert!((2..u32::MAX).contains(&slots), "{slots}");
        assert_eq!(uplink_slots(&[network(Layer::L3), network(Layer::L2)]), slots);
        assert_eq!(uplink_slots(&[network(Layer::L2)]), u32::MAX);
    }
}
