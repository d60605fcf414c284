//! Networks, password records and projects; and what a record of any kind is.

use std::net::IpAddr;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::request::Noun;
use super::{Packed, Settings, Tree, is_default, kinds};
use crate::error::{Context, Error, Result};

/// A network of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netmask: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dhcpserver: Option<String>,
    /// Addresses for who is not known yet: `10.0.0.100-10.0.0.200`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dynamic_range: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ntpservers: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
}

/// An account's name and password, for BMCs or for nodes (`system`: their root).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Passwd {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// Sealed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// How it is written down on nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crypt_method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
}

/// Whose nodes may be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Project {
    /// Users.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<String>,
    /// That its nodes may be in.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<String>,
    /// Whether its members may change what is not their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<bool>,
    #[serde(skip_serializing_if = "is_default")]
    pub quota: Quota,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
}

/// What a project has at most.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u32>,
}

/// A record of any kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// Of a node, a group or a profile.
    Settings(Packed),
    Network(Arc<Network>),
    Passwd(Arc<Passwd>),
    Project(Arc<Project>),
}

impl From<&Settings> for Record {
    fn from(settings: &Settings) -> Self {
        Self::Settings(settings.into())
    }
}

impl Record {
    /// One that says nothing.
    pub fn empty(noun: Noun) -> Self {
        match noun {
            Noun::Node | Noun::Group | Noun::Profile => Self::Settings(Packed::default()),
            Noun::Net => Self::Network(Arc::default()),
            Noun::Passwd => Self::Passwd(Arc::default()),
            Noun::Project => Self::Project(Arc::default()),
        }
    }

    /// As a tree.
    ///
    /// # Errors
    /// Never for what was read.
    pub fn tree(&self) -> Result<Tree> {
        let value = match self {
            Self::Settings(record) => return record.tree(),
            Self::Network(record) => serde_json::to_value(&**record),
            Self::Passwd(record) => serde_json::to_value(&**record),
            Self::Project(record) => serde_json::to_value(&**record),
        };
        match value.while_doing(|| "writing a record".into())? {
            Value::Object(tree) => Ok(tree),
            _ => Ok(Tree::new()),
        }
    }

    /// From a tree that [`schema::check`](super::schema::check) has found right.
    ///
    /// # Errors
    /// When it is not right.
    pub fn from_tree(noun: Noun, tree: Tree) -> Result<Self> {
        fn read<T: DeserializeOwned>(tree: Tree) -> Result<T> {
            let read = serde_json::from_value(Value::Object(tree));
            read.while_doing(|| "reading a record".into())
        }
        Ok(match noun {
            Noun::Node | Noun::Group | Noun::Profile => {
                Self::Settings(Packed::from(&read::<Settings>(tree)?))
            }
            Noun::Net => Self::Network(Arc::new(read(tree)?)),
            Noun::Passwd => Self::Passwd(Arc::new(read(tree)?)),
            Noun::Project => Self::Project(Arc::new(read(tree)?)),
        })
    }

    /// As it is stored.
    ///
    /// # Errors
    /// Never for what was read.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let json = match self {
            Self::Settings(record) => return Ok(record.json().into()),
            Self::Network(record) => serde_json::to_vec(&**record),
            Self::Passwd(record) => serde_json::to_vec(&**record),
            Self::Project(record) => serde_json::to_vec(&**record),
        };
        json.while_doing(|| "writing a record".into())
    }

    /// As it was stored.
    ///
    /// # Errors
    /// When it is none of this kind.
    pub fn from_json(noun: Noun, json: &[u8]) -> Result<Self> {
        fn read<T: DeserializeOwned>(json: &[u8]) -> Result<Arc<T>> {
            serde_json::from_slice(json).map(Arc::new).while_doing(|| "reading a record".into())
        }
        Ok(match noun {
            Noun::Node | Noun::Group | Noun::Profile => Self::Settings(Packed::read(json)?),
            Noun::Net => Self::Network(read(json)?),
            Noun::Passwd => Self::Passwd(read(json)?),
            Noun::Project => Self::Project(read(json)?),
        })
    }

    /// What a node, a group or a profile says.
    pub fn settings(&self) -> Option<&Packed> {
        match self {
            Self::Settings(settings) => Some(settings),
            _ => None,
        }
    }
}

/// The address as a number, with how many bits it has.
fn bits(ip: IpAddr) -> (u128, u32) {
    match ip {
        IpAddr::V4(ip) => (ip.to_bits().into(), 32),
        IpAddr::V6(ip) => (ip.to_bits(), 128),
    }
}

impl Network {
    /// Whether an address is in it; `None` where it does not say what is.
    pub fn holds(&self, ip: IpAddr) -> Option<bool> {
        let (subnet, netmask) = (self.subnet?, self.netmask?);
        let (mask, of) = (bits(netmask).0, bits(subnet).0);
        Some(subnet.is_ipv4() == ip.is_ipv4() && bits(ip).0 & mask == of & mask)
    }

    /// Whether an address is for who is not known yet.
    pub fn is_dynamic(&self, ip: IpAddr) -> bool {
        let range = self.dynamic_range.as_deref().and_then(kinds::range);
        range.is_some_and(|(first, last)| {
            first.is_ipv4() == ip.is_ipv4() && (first..=last).contains(&ip)
        })
    }

    /// All that is wrong with it in itself.
    pub fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let (subnet, netmask) = match (self.subnet, self.netmask) {
            (Some(subnet), Some(netmask)) => (subnet, netmask),
            (None, None) => return wrong,
            (Some(_), None) => return vec!["`subnet` without `netmask`".into()],
            (None, Some(_)) => return vec!["`netmask` without `subnet`".into()],
        };
        let (mask, length) = bits(netmask);
        if subnet.is_ipv4() != netmask.is_ipv4() {
            return vec![format!("`{netmask}` is no mask of `{subnet}`: one is IPv4, one IPv6")];
        }
        let whole = u128::MAX >> (128 - length);
        // Ones, and then zeros only.
        let rest = !mask & whole;
        if rest & rest.wrapping_add(1) != 0 {
            return vec![format!("`{netmask}` is not a netmask")];
        }
        if bits(subnet).0 & rest != 0 {
            wrong.push(format!("`{subnet}` is not where a subnet of `{netmask}` begins"));
        }
        let outside = |ip: IpAddr| self.holds(ip) == Some(false);
        if let Some(gateway) = self.gateway.filter(|it| outside(*it)) {
            wrong.push(format!("the gateway {gateway} is not in {subnet}/{}", mask.count_ones()));
        }
        if let Some((first, last)) = self.dynamic_range.as_deref().and_then(kinds::range) {
            if outside(first) || outside(last) {
                let range = format!("{first}-{last}");
                let what = format!("`{range}` is not all in {subnet}/{}", mask.count_ones());
                wrong.push(what);
            }
        }
        wrong
    }
}

impl Project {
    /// The error of more nodes than it may have.
    pub fn too_many(&self, nodes: usize) -> Option<String> {
        let most = self.quota.nodes? as usize;
        (nodes > most).then(|| format!("it would have {nodes} nodes, and may have {most}"))
    }
}

/// What cannot be the name of a record of a kind, and why.
///
/// # Errors
/// Saying what is wrong with it.
pub fn check_name(noun: Noun, name: &str) -> Result<()> {
    use crate::model::nodeset::name::wrong_with;
    let wrong = match noun {
        Noun::Node => wrong_with(name).map(|(_, what)| what),
        _ if name == "all" => Some("it means all of them".to_owned()),
        Noun::Group if kinds::is_group(name) => None,
        Noun::Group => Some("a group's name is of letters, digits and `-_+`".to_owned()),
        _ if super::schema::is_name(name) && !name.starts_with('@') => None,
        _ => Some("a name is of letters, digits and `-_.+:@`".to_owned()),
    };
    match wrong {
        None => Ok(()),
        Some(what) => {
            let shown: String = name.chars().take(60).collect();
            let noun = noun.what();
            Err(Error::usage(format!(
                "`{}` cannot be a {noun}'s name: {what}",
                shown.escape_debug()
            )))
        }
    }
}
