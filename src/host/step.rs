//! The primitive, reversible changes a job may make to a host.
//!
//! A step is plain data: it can be printed, compared with a golden file, and written
//! to the journal before it happens. Both directions are idempotent, because a crash
//! may leave a step done, half done or not done, and the next run cannot tell which.
//!
//! Links are known as ours by their group, not by their name alone: applying refuses
//! a foreign link of the same name, undoing leaves it alone.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};

use super::Host;
use super::crash;
use super::file;
use super::netlink::{LinkSettings, Netlink, VethPeer, silence};
use super::netns;
use super::nft::{self, Table};
use super::offload;
use super::ovs::{self, flows::FlowTable};
use super::tap::Tap;
use super::tunnel::VxlanSettings;
use crate::error::{Context, Error, Result};
use crate::model::address::Mac;
use crate::model::owner::Owner;

/// Taps made at once. Each holds a descriptor until the batch is done.
const TAP_BATCH: usize = 64;

/// Whether an operation found something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Changed,
    AlreadySo,
}

/// One change to the host. Add a variant only for a new kind of kernel object; a new
/// network type is a new list of existing steps. `namespace` is a name below
/// [`Host::netns_dir`]; without it the host's own is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Step {
    /// A named network namespace.
    Namespace { name: String },
    /// A kernel setting below `/proc/sys`, such as `net/ipv4/ip_forward`.
    ///
    /// Without `before` it is not put back: in a namespace of ours it ends with it, and on
    /// the host somebody else may have come to rely on it since, whom no old value of ours
    /// knows about.
    Sysctl {
        namespace: Option<String>,
        key: String,
        value: String,
        /// What it was, put back unless somebody has changed it since. Only for what
        /// belongs to the host and to no job.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        before: Option<String>,
    },
    /// A folder. Undoing leaves it if there is something in it.
    Folder { path: PathBuf, mode: u32 },
    /// A folder mounted on itself, so that mounts below it appear in all mount namespaces.
    /// Undoing leaves it while there is something in it.
    SharedFolder { path: PathBuf },
    /// Whole tables, which appear and disappear together.
    NftTables { namespace: Option<String>, tables: Vec<Table> },
    /// A Linux bridge of the job's own.
    Bridge {
        name: String,
        mtu: u16,
        group: u32,
        alias: String,
        /// Without it the bridge takes the lowest of its ports', and forgets all
        /// neighbours whenever that changes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mac: Option<Mac>,
    },
    /// A pair of links, from the host (there perhaps a port of `bridge`) into a
    /// namespace.
    Veth {
        name: String,
        mtu: u16,
        group: u32,
        alias: String,
        bridge: Option<String>,
        peer: String,
        peer_namespace: String,
        peer_mac: Option<Mac>,
    },
    /// An address of a link, with the route to its network.
    Address { namespace: Option<String>, link: String, address: IpAddr, bits: u8 },
    /// Who has which address on a link, known from the start: nobody has to be asked by
    /// ARP or neighbour discovery, and nobody can answer for another.
    Neighbours {
        namespace: Option<String>,
        link: String,
        /// The link's, where it is not in a namespace of ours.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        group: Option<u32>,
        known: Vec<(IpAddr, Mac)>,
    },
    /// The default route.
    Route { namespace: Option<String>, gateway: Ipv4Addr },
    /// A link that exists anyway (`lo`) is switched on.
    LinkUp { namespace: Option<String>, link: String },
    /// A VXLAN device that is a port of `bridge` and sends from `local`. It learns nothing,
    /// and gets no frame for a MAC that [`Forwarding`](Self::Forwarding) does not know.
    Vxlan {
        name: String,
        key: u32,
        local: Ipv4Addr,
        mtu: u16,
        group: u32,
        alias: String,
        bridge: String,
        /// The bridge answers ARP for guests behind it, from its own neighbours.
        answers_arp: bool,
    },
    /// The host behind which each MAC is, seen from a VXLAN device, and the hosts that get
    /// what is for all.
    Forwarding { link: String, group: u32, known: Vec<(Mac, Ipv4Addr)>, all: Vec<Ipv4Addr> },
    /// A link's frames leave it with their checksums and no larger than its MTU.
    NoOffloads { namespace: Option<String>, link: String },
    /// All bridges of an owner on Open vSwitch.
    OvsBridges { owner: Owner, bridges: Vec<ovs::Bridge> },
    /// What these bridges do with frames. It goes with them.
    OvsFlows { tables: Vec<FlowTable> },
    /// TAP devices that `owner` may open, all ports of `bridge`. Undoing deletes every
    /// link of the group, by one message: keep it last in a plan, but for what is made
    /// of them.
    Taps {
        bridge: Option<String>,
        mtu: u16,
        group: u32,
        alias: String,
        owner: u32,
        names: Vec<String>,
        /// Those of them with several queues.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        several_queues: Vec<String>,
    },
}

impl Step {
    /// Makes the change, or what is missing of it.
    pub async fn apply(&self, host: &Host) -> Result<Outcome> {
        crash::step("apply", self.kind())?;
        let outcome = self.ensure(host).await.while_doing(|| format!("creating {self}"))?;
        crash::step("applied", self.kind())?;
        Ok(outcome)
    }

    /// Takes the change back. What is already gone is not an error.
    pub async fn undo(&self, host: &Host) -> Result<Outcome> {
        crash::step("undo", self.kind())?;
        let outcome = self.ensure_not(host).await.while_doing(|| format!("deleting {self}"))?;
        crash::step("undone", self.kind())?;
        Ok(outcome)
    }

    async fn ensure(&self, host: &Host) -> Result<Outcome> {
        let place = self.namespace().map(|name| host.netns(name));
        let place = place.as_deref();
        match self {
            Self::Namespace { name } => netns::create(&host.netns(name)),
            Self::Sysctl { key, value, .. } => match place {
                Some(path) => netns::with_netns(path, || set_sysctl(key, value))?,
                None => set_sysctl(key, value),
            },
            Self::Folder { path, mode } => file::ensure_folder(path, *mode),
            Self::SharedFolder { path } => netns::share_folder(path),
            Self::NftTables { tables, .. } => {
                nft::replace(place, tables).await?;
                Ok(Outcome::Changed)
            }
            Self::Bridge { name, mtu, group, alias, mac } => {
                let link = LinkSettings { name, mtu: *mtu, group: *group, alias, bridge: None };
                Netlink::open(None)?.ensure_bridge(&link, *mac).await
            }
            Self::Veth { name, mtu, group, alias, bridge, peer, peer_namespace, peer_mac } => {
                let netlink = Netlink::open(None)?;
                let bridge = match bridge {
                    Some(bridge) => Some(netlink.require_link(bridge).await?.index),
                    None => None,
                };
                let link = LinkSettings { name, mtu: *mtu, group: *group, alias, bridge };
                let namespace = &host.netns(peer_namespace);
                let peer = VethPeer { name: peer, namespace, mac: *peer_mac };
                netlink.ensure_veth(&link, &peer).await
            }
            Self::Vxlan { name, key, local, mtu, group, alias, bridge, answers_arp } => {
                let netlink = Netlink::open(None)?;
                let bridge = Some(netlink.require_link(bridge).await?.index);
                let link = LinkSettings { name, mtu: *mtu, group: *group, alias, bridge };
                let (key, local, answers_arp) = (*key, *local, *answers_arp);
                netlink.ensure_vxlan(&link, &VxlanSettings { key, local, answers_arp }).await
            }
            Self::Forwarding { link, group, known, all } => {
                let netlink = Netlink::open(None)?;
                let index = require_own(&netlink, link, Some(*group)).await?;
                netlink.add_forwarding(index, known, all).await
            }
            Self::Address { link, address, bits, .. } => {
                Netlink::open(place)?.add_address(link, *address, *bits).await
            }
            Self::Neighbours { link, group, known, .. } => {
                let netlink = Netlink::open(place)?;
                let index = require_own(&netlink, link, *group).await?;
                netlink.add_neighbours(index, known).await
            }
            Self::Route { gateway, .. } => Netlink::open(place)?.add_default_route(*gateway).await,
            Self::LinkUp { link, .. } => Netlink::open(place)?.set_up(link, true).await,
            Self::NoOffloads { link, .. } => match place {
                Some(path) => netns::with_netns(path, || offload::switch_off(link))?,
                None => offload::switch_off(link),
            },
            Self::OvsBridges { owner, bridges } => ovs::ensure(host, *owner, bridges).await,
            Self::OvsFlows { tables } => {
                try_join_all(tables.iter().map(|table| ovs::flows::replace(host, table))).await?;
                Ok(Outcome::Changed)
            }
            Self::Taps { bridge, mtu, group, alias, owner, names, several_queues } => {
                let netlink = Netlink::open(None)?;
                let bridge = match bridge {
                    Some(bridge) => Some(netlink.require_link(bridge).await?.index),
                    None => None,
                };
                let link = LinkSettings { name: "", mtu: *mtu, group: *group, alias, bridge };
                ensure_taps(&netlink, &link, *owner, (names, several_queues)).await
            }
        }
    }

    async fn ensure_not(&self, host: &Host) -> Result<Outcome> {
        let place = self.namespace().map(|name| host.netns(name));
        let place = place.as_deref();
        if place.is_some_and(|path| !netns::is_netns(path)) {
            // It went with its namespace.
            return Ok(Outcome::AlreadySo);
        }
        match self {
            Self::Namespace { name } => netns::delete(&host.netns(name)),
            Self::Sysctl { before: None, .. } | Self::NoOffloads { .. } | Self::OvsFlows { .. } => {
                Ok(Outcome::AlreadySo)
            }
            Self::OvsBridges { owner, .. } => ovs::delete(host, *owner).await,
            Self::Sysctl { key, value, before: Some(before), .. } => match place {
                Some(path) => netns::with_netns(path, || reset_sysctl(key, value, before))?,
                None => reset_sysctl(key, value, before),
            },
            Self::Folder { path, .. } => file::remove_empty_folder(path),
            Self::SharedFolder { path } => netns::unshare_folder(path),
            Self::NftTables { tables, .. } => nft::delete(place, tables).await,
            Self::Bridge { name, group, .. }
            | Self::Veth { name, group, .. }
            | Self::Vxlan { name, group, .. } => Netlink::open(None)?.delete(name, *group).await,
            Self::Forwarding { link, group, known, all } => {
                let netlink = Netlink::open(None)?;
                match own(&netlink, link, Some(*group)).await? {
                    Some(index) => netlink.delete_forwarding(index, known, all).await,
                    None => Ok(Outcome::AlreadySo),
                }
            }
            Self::Address { link, address, bits, .. } => {
                Netlink::open(place)?.delete_address(link, *address, *bits).await
            }
            Self::Neighbours { link, group, known, .. } => {
                let netlink = Netlink::open(place)?;
                match own(&netlink, link, *group).await? {
                    Some(index) => netlink.delete_neighbours(index, known).await,
                    None => Ok(Outcome::AlreadySo),
                }
            }
            Self::Route { gateway, .. } => {
                Netlink::open(place)?.delete_default_route(*gateway).await
            }
            Self::LinkUp { link, .. } => {
                let netlink = Netlink::open(place)?;
                match netlink.link(link).await? {
                    Some(_) => netlink.set_up(link, false).await,
                    None => Ok(Outcome::AlreadySo),
                }
            }
            Self::Taps { group, .. } => Netlink::delete_group(*group).await,
        }
    }

    /// What kind of object it concerns, as the journal names it.
    fn kind(&self) -> &'static str {
        match self {
            Self::Namespace { .. } => "namespace",
            Self::Folder { .. } => "folder",
            Self::SharedFolder { .. } => "shared-folder",
            Self::Sysctl { .. } => "sysctl",
            Self::NftTables { .. } => "nft-tables",
            Self::Bridge { .. } => "bridge",
            Self::Veth { .. } => "veth",
            Self::Address { .. } => "address",
            Self::Neighbours { .. } => "neighbours",
            Self::Route { .. } => "route",
            Self::LinkUp { .. } => "link-up",
            Self::Vxlan { .. } => "vxlan",
            Self::Forwarding { .. } => "forwarding",
            Self::NoOffloads { .. } => "no-offloads",
            Self::OvsBridges { .. } => "ovs-bridges",
            Self::OvsFlows { .. } => "ovs-flows",
            Self::Taps { .. } => "taps",
        }
    }

    /// The namespace the step happens in, unless it is the host's own.
    pub fn namespace(&self) -> Option<&str> {
        match self {
            Self::Sysctl { namespace, .. }
            | Self::NftTables { namespace, .. }
            | Self::Address { namespace, .. }
            | Self::Neighbours { namespace, .. }
            | Self::NoOffloads { namespace, .. }
            | Self::Route { namespace, .. }
            | Self::LinkUp { namespace, .. } => namespace.as_deref(),
            Self::Namespace { .. }
            | Self::Folder { .. }
            | Self::SharedFolder { .. }
            | Self::Bridge { .. }
            | Self::Veth { .. }
            | Self::Vxlan { .. }
            | Self::Forwarding { .. }
            | Self::OvsBridges { .. }
            | Self::OvsFlows { .. }
            | Self::Taps { .. } => None,
        }
    }
}

/// The index of a link, if it exists and is of this group, where one is given.
async fn own(netlink: &Netlink, link: &str, group: Option<u32>) -> Result<Option<u32>> {
    let found = netlink.link(link).await?;
    Ok(found.filter(|found| group.is_none_or(|group| found.group == group)).map(|l| l.index))
}

/// The same, where it must be there.
async fn require_own(netlink: &Netlink, link: &str, group: Option<u32>) -> Result<u32> {
    let found = own(netlink, link, group).await?;
    found.ok_or_else(|| Error::system(format!("there is no link `{link}` of this job")))
}

/// Makes the taps that are missing, and makes all of them as `like` says.
async fn ensure_taps(
    netlink: &Netlink,
    like: &LinkSettings<'_>,
    owner: u32,
    (names, several_queues): (&[String], &[String]),
) -> Result<Outcome> {
    let mut outcome = Outcome::AlreadySo;
    for batch in names.chunks(TAP_BATCH) {
        let mut new = Vec::new();
        for name in batch {
            match Tap::create(name, owner, several_queues.contains(name))? {
                Some(tap) => {
                    silence(name)?;
                    new.push(tap);
                }
                None => drop(netlink.own_link(name, like.group).await?),
            }
        }
        let links: Vec<_> =
            batch.iter().map(|name| LinkSettings { name, ..like.clone() }).collect();
        netlink.configure(&links).await?;
        // Only now, in the owner's group, can they be found again after a crash.
        crash::point("taps.made")?;
        for tap in new {
            tap.keep().while_doing(|| "keeping a TAP device".into())?;
            outcome = Outcome::Changed;
        }
    }
    Ok(outcome)
}

/// A kernel setting below `/proc/sys/net`, as it is now.
pub fn sysctl(key: &str) -> Result<String> {
    let path = sysctl_path(key)?;
    let text = fs::read_to_string(&path).while_doing(|| format!("reading `{}`", path.display()))?;
    Ok(text.trim().to_owned())
}

fn sysctl_path(key: &str) -> Result<PathBuf> {
    if !key.starts_with("net/") || key.split('/').any(|part| part == "..") {
        return Err(Error::bug(format!("`{key}` is not a network setting")));
    }
    Ok(PathBuf::from("/proc/sys").join(key))
}

/// Writes a setting only if it differs: some act on being written.
fn set_sysctl(key: &str, value: &str) -> Result<Outcome> {
    if sysctl(key)? == value {
        return Ok(Outcome::AlreadySo);
    }
    let path = sysctl_path(key)?;
    fs::write(&path, value).while_doing(|| format!("writing `{}`", path.display()))?;
    Ok(Outcome::Changed)
}

/// Puts a setting back, if it still has the value that it was given.
fn reset_sysctl(key: &str, given: &str, before: &str) -> Result<Outcome> {
    if sysctl(key)? == given { set_sysctl(key, before) } else { Ok(Outcome::AlreadySo) }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace { name } => write!(f, "namespace `{name}`"),
            Self::Sysctl { key, value, before: Some(before), .. } => {
                write!(f, "setting `{key}` = {value} (was {before})")
            }
            Self::Sysctl { key, value, .. } => write!(f, "setting `{key}` = {value}"),
            Self::Folder { path, .. } => write!(f, "folder `{}`", path.display()),
            Self::SharedFolder { path } => write!(f, "shared mount `{}`", path.display()),
            Self::NftTables { tables, .. } => {
                let names: Vec<_> = tables
                    .iter()
                    .map(|table| format!("`{} {}`", table.family.as_str(), table.name))
                    .collect();
                write!(f, "nftables {}", names.join(", "))
            }
            Self::Bridge { name, .. } => write!(f, "bridge `{name}`"),
            Self::Veth { name, peer, .. } => write!(f, "veth pair `{name}`, `{peer}`"),
            Self::Address { link, address, bits, .. } => {
                write!(f, "address {address}/{bits} on `{link}`")
            }
            Self::Neighbours { link, known, .. } => {
                write!(f, "{} neighbours on `{link}`", known.len())
            }
            Self::Route { gateway, .. } => write!(f, "default route by {gateway}"),
            Self::LinkUp { link, .. } => write!(f, "the up state of `{link}`"),
            Self::Vxlan { name, key, .. } => write!(f, "VXLAN device `{name}` of key {key}"),
            Self::Forwarding { link, known, .. } => {
                write!(f, "the ways to {} guests by `{link}`", known.len())
            }
            Self::NoOffloads { link, .. } => write!(f, "the frames of `{link}` in full"),
            Self::OvsBridges { bridges, .. } => {
                let names: Vec<_> =
                    bridges.iter().map(|bridge| format!("`{}`", bridge.name)).collect();
                write!(f, "Open vSwitch bridges {}", names.join(", "))
            }
            Self::OvsFlows { tables } => {
                let count: usize = tables.iter().map(|table| table.flows.len()).sum();
                write!(f, "{count} flows of Open vSwitch")
            }
            Self::Taps { bridge: Some(bridge), names, .. } => {
                write!(f, "{} TAP devices on `{bridge}`", names.len())
            }
            Self::Taps { names, .. } => write!(f, "{} TAP devices", names.len()),
        }?;
        match self.namespace() {
            Some(name) => write!(f, " in namespace `{name}`"),
            None => Ok(()),
        }
    }
}
