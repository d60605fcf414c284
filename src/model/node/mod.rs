//! Machines below the clusters: what the inventory knows of nodes.
//!
//! What is known of a node, a group or a profile is [`Settings`]; networks, password records
//! and projects are [`records`] of their own. A node has its own settings, and
//! what it does not say comes from its groups, in their order, and then from its profiles
//! ([`Inventory::effective`](inventory::Inventory::effective)). The names of all settings,
//! and what they may be, are one table: [`schema`].
//!
//! ```text
//! control/bmc_address=10.0.0.1          set
//! control/bmc_address=                  remove, so that it is inherited again
//! tags+=gpu  tags-=gpu                  add to a list, take from it
//! nics/eth0/ip=10.1.{n/250}.{n%250+1}   by the name of the interface; other for each node
//! ```
//!
//! - [`schema`]: the settings there are; checks of a tree of them, all mistakes at once;
//! - [`template`]: values that differ from node to node;
//! - [`edit`]: changes, as `path=value`;
//! - [`packed`]: settings as they lie in memory, and `glance`, what is often looked at of them;
//! - [`inventory`]: all nodes, groups, profiles, networks, password records, projects;
//! - [`names`]: what the text of a set stands for, in an inventory;
//! - [`uses`]: what records name others, and what is wrong with that;
//! - [`claims`]: what is one node's alone;
//! - [`request`]: what is asked of an inventory;
//! - [`operation`]: what is told of a change that takes long.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Context, Result};

pub mod claims;
pub mod edit;
mod glance;
pub mod inventory;
pub mod kinds;
pub mod names;
mod nics;
pub mod operation;
pub mod packed;
pub mod records;
pub mod request;
pub mod schema;
pub mod template;
pub mod uses;

pub use nics::Nics;
pub use packed::Packed;

/// Settings as a tree, as they are edited, imported and merged.
pub type Tree = Map<String, Value>;

/// What a node, a group or a profile says; what is absent is inherited.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    /// How it is managed: the driver of power and boot device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mgt: Option<String>,
    /// How it boots from the network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netboot: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    #[serde(skip_serializing_if = "is_default")]
    pub control: Control,
    #[serde(skip_serializing_if = "is_default")]
    pub console: Console,
    #[serde(skip_serializing_if = "Nics::is_empty")]
    pub nics: Nics,
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub tags: BTreeSet<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
    /// Whose it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// In the order in which they are asked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<String>,
}

/// How a node's power and boot device are reached.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_username: Option<String>,
    /// Sealed, as are all secrets here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_password: Option<String>,
    /// Who is believed to be a Redfish service: `system` (the default: of an authority that this
    /// machine trusts), a file with authorities, `sha256:…` of its certificate, `anybody`, or
    /// `plain` without TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_trust: Option<String>,
    /// Which system of a Redfish service it is, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_system: Option<String>,
    /// The controller's own key of IPMI ("Kg"), sealed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_key: Option<String>,
    /// The cipher suite of IPMI, where the best that there is does not do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_cipher: Option<String>,
    /// What a session of IPMI may do: `operator`, if it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_privilege: Option<String>,
    /// Its firmware is UEFI, and the controller wants to know that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bmc_efi: Option<bool>,
    /// The socket of the QEMU that the node is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qmp_socket: Option<String>,
    /// The ids of QEMU's devices to boot from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qmp_net: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qmp_disk: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qmp_cdrom: Option<String>,
    /// A program of the site that controls it, and its arguments, with blanks between them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exec: Option<String>,
    /// The name of a password record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passwd: Option<String>,
    /// The host of a virtual node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_username: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_virt_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_key_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_key_contents: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_password: Option<String>,
}

/// How a node's console is reached.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Console {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<bool>,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nic {
    /// As [`schema`] writes it: `42:87:0a:05:00:01`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netmask: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The one that the node boots from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary: Option<bool>,
    /// What others keep there.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub extra: Tree,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Settings {
    /// As a tree.
    ///
    /// # Errors
    /// Never for what was read.
    pub fn tree(&self) -> Result<Tree> {
        match serde_json::to_value(self).while_doing(|| "writing a node's settings".into())? {
            Value::Object(tree) => Ok(tree),
            _ => Ok(Tree::new()),
        }
    }

    /// From a tree that [`schema::check`] has found right.
    ///
    /// # Errors
    /// When it is not right.
    pub fn from_tree(tree: Tree) -> Result<Self> {
        serde_json::from_value(Value::Object(tree))
            .while_doing(|| "reading a node's settings".into())
    }
}

#[cfg(test)]
mod tests;
