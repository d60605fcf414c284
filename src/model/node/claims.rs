//! What is one node's alone: MAC addresses, addresses, controllers.
//!
//! Kept beside the nodes, so that a change of one node costs no look at all others.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::Settings;

/// Of IPMI, and of Redfish.
const DEFAULT_PORTS: [u16; 2] = [623, 443];

/// Something that no two nodes have.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    Mac(Box<str>),
    Address(IpAddr),
    /// Address of a controller, port and which of its systems.
    Bmc(Box<str>),
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mac(mac) => write!(f, "the MAC address {mac}"),
            Self::Address(ip) => write!(f, "the address {ip}"),
            Self::Bmc(bmc) => write!(f, "the BMC {bmc}"),
        }
    }
}

/// What a node claims. A MAC address is there twice if two of its interfaces have it.
pub fn of(node: &Settings) -> impl Iterator<Item = Claim> {
    let macs = node.nics.values().filter_map(|nic| nic.mac.as_deref());
    let macs = macs.map(|mac| Claim::Mac(mac.into()));
    // Two interfaces of a node may share an address.
    let mut addresses: Vec<IpAddr> = node.nics.values().filter_map(|nic| nic.ip).collect();
    let of = &node.control;
    let plain =
        of.bmc_system.is_none() && of.bmc_port.is_none_or(|port| DEFAULT_PORTS.contains(&port));
    if let Some(ip) = of.bmc_address.as_deref().filter(|_| plain) {
        addresses.extend(ip.parse::<IpAddr>());
    }
    addresses.sort_unstable();
    addresses.dedup();
    let bmc = of.bmc_address.as_deref().map(|address| {
        let mut name = match address.parse::<IpAddr>() {
            Ok(ip) => ip.to_string(),
            Err(_) => address.to_lowercase(),
        };
        // One controller, whichever of its protocols is spoken.
        if let Some(port) = of.bmc_port.filter(|port| !DEFAULT_PORTS.contains(port)) {
            name += &format!(" port {port}");
        }
        // A service of several systems: each is another machine.
        if let Some(system) = &of.bmc_system {
            name += &format!(" system {system}");
        }
        Claim::Bmc(name.into())
    });
    macs.chain(addresses.into_iter().map(Claim::Address)).chain(bmc)
}

/// Whose what is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims(HashMap<Claim, Arc<str>>);

impl Claims {
    /// The node that has it.
    pub fn holder(&self, claim: &Claim) -> Option<&str> {
        self.0.get(claim).map(|name| &**name)
    }

    pub(super) fn add(&mut self, name: &str, node: &Settings) {
        let name: Arc<str> = name.into();
        self.0.extend(of(node).map(|claim| (claim, name.clone())));
    }

    pub(super) fn remove(&mut self, name: &str, node: &Settings) {
        for claim in of(node) {
            if self.holder(&claim) == Some(name) {
                self.0.remove(&claim);
            }
        }
    }
}
