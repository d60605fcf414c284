//! The only layer that changes a machine.
//!
//! A set-up is a [`Plan`](journal::Plan): a list of [`Step`](step::Step)s, plain
//! data. The [`Journal`](journal::Journal) writes it down, applies it and undoes it.
//! Below them is one file per protocol or kernel facility: [`netlink`] (links,
//! addresses, routes), [`tunnel`], [`tap`] and [`offload`] (ioctl), [`cgroup`], [`nft`],
//! [`ovs`], [`netns`], [`process`], [`cmd`] (other programs) and [`file`](mod@file).
//! [`firewall`] only looks at the rules of others.
//!
//! "The host's namespace" is always the network namespace of the calling thread: a
//! machine's own for root, the cell's for an ordinary user. Nothing here can tell.

use std::path::{Path, PathBuf};

pub mod blobs;
pub mod cgroup;
pub mod cmd;
pub mod crash;
pub mod file;
pub mod firewall;
pub mod journal;
pub mod limits;
pub mod netlink;
pub mod netns;
mod nfnetlink;
pub mod nft;
pub mod offload;
pub mod ovs;
pub mod process;
pub mod qcow2;
pub mod spawn;
pub mod step;
pub mod tap;
pub mod tunnel;

/// The machine, or the part of it, that steps change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    netns_dir: PathBuf,
    ovs_dir: PathBuf,
}

/// Where Open vSwitch has its sockets.
const OVS_DIR: &str = "/run/openvswitch";

impl Host {
    /// `netns_dir` is where named network namespaces are mounted: `/run/netns` as
    /// root (where `ip netns` looks), a folder of the job in a cell.
    pub fn new(netns_dir: PathBuf) -> Self {
        Self { netns_dir, ovs_dir: OVS_DIR.into() }
    }

    /// The same with the sockets of Open vSwitch in another folder.
    #[must_use]
    pub fn with_ovs_dir(self, ovs_dir: PathBuf) -> Self {
        Self { ovs_dir, ..self }
    }

    /// Where Open vSwitch has its sockets.
    pub fn ovs_dir(&self) -> &Path {
        &self.ovs_dir
    }

    /// The socket of ovsdb-server.
    pub fn ovs_db(&self) -> PathBuf {
        self.ovs_dir.join("db.sock")
    }

    /// Where named network namespaces are mounted.
    pub fn netns_dir(&self) -> &Path {
        &self.netns_dir
    }

    /// The file of the namespace of this name, whether or not it exists.
    pub fn netns(&self, name: &str) -> PathBuf {
        self.netns_dir.join(name)
    }
}
