//! What is one node's alone: MAC addresses, addresses, controllers.
//!
//! Kept beside the nodes, so that a change of one node costs no look at all others.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::glance::Glance;
use super::kinds;

/// Of IPMI, and of Redfish.
const DEFAULT_PORTS: [u16; 2] = [623, 443];

/// Something that no two nodes have.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    Mac([u8; 6]),
    Address(IpAddr),
    /// Address of a controller, port and which of its systems.
    Bmc(IpAddr),
    /// One with a port of its own or several systems, or one by name.
    OtherBmc(Box<str>),
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mac(mac) => write!(f, "the MAC address {}", kinds::mac_text(*mac)),
            Self::Address(ip) => write!(f, "the address {ip}"),
            Self::Bmc(bmc) => write!(f, "the BMC {bmc}"),
            Self::OtherBmc(bmc) => write!(f, "the BMC {bmc}"),
        }
    }
}

/// What a node claims. A MAC address is there twice if two of its interfaces have it.
pub(super) fn of(node: &Glance<'_>) -> Vec<Claim> {
    let nics = || node.nics.0.iter().map(|(_, nic)| nic);
    let mut addresses: Vec<IpAddr> = nics().filter_map(|nic| nic.ip).collect();
    let mut claims = Vec::with_capacity(4);
    claims.extend(nics().filter_map(|nic| kinds::mac(nic.mac.as_deref()?)).map(Claim::Mac));
    let mut bmc = None;
    if let Some(address) = node.control.bmc_address.as_deref() {
        let of = &node.control;
        let ip = address.parse::<IpAddr>().ok();
        // One controller, whichever of its protocols is spoken.
        let port = of.bmc_port.filter(|port| !DEFAULT_PORTS.contains(port));
        match ip.filter(|_| port.is_none() && of.bmc_system.is_none()) {
            Some(ip) => {
                addresses.push(ip);
                bmc = Some(Claim::Bmc(ip));
            }
            None => {
                let mut name = ip.map_or_else(|| address.to_lowercase(), |ip| ip.to_string());
                if let Some(port) = port {
                    name += &format!(" port {port}");
                }
                // A service of several systems: each is another machine.
                if let Some(system) = of.bmc_system.as_deref() {
                    name += &format!(" system {system}");
                }
                bmc = Some(Claim::OtherBmc(name.into()));
            }
        }
    }
    // Two interfaces of a node may share an address.
    addresses.sort_unstable();
    addresses.dedup();
    claims.extend(addresses.into_iter().map(Claim::Address));
    claims.extend(bmc);
    claims
}

/// Whose what is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims(HashMap<Claim, Arc<str>>);

impl Claims {
    /// The node that has it.
    pub fn holder(&self, claim: &Claim) -> Option<&str> {
        self.0.get(claim).map(|name| &**name)
    }

    pub(super) fn add(&mut self, name: &Arc<str>, node: &Glance<'_>) {
        self.0.extend(of(node).into_iter().map(|claim| (claim, name.clone())));
    }

    pub(super) fn remove(&mut self, name: &str, node: &Glance<'_>) {
        for claim in of(node) {
            if self.holder(&claim) == Some(name) {
                self.0.remove(&claim);
            }
        }
    }
}
