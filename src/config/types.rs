//! The typed values that configuration files become.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

use crate::error::Error;
use crate::model::address::{MacPrefix, Subnet};
use crate::model::prefix::Prefix64;
use crate::model::vm::{DiskCache, DiskFormat, DiskModel, Firmware, MountKind, RemoteDisplay};

/// Everything that was configured, checked as a whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    pub batch: Batch,
    /// By name.
    pub networks: BTreeMap<String, Network>,
    pub resource_sets: BTreeMap<String, ResourceSet>,
    /// The resource set of templates that name none.
    pub default_resource_set: Option<String>,
    /// By name, inheritance already applied.
    pub templates: BTreeMap<String, Template>,
    /// In order of priority: the user's before the site's.
    pub repos: Vec<Repo>,
    pub image_cache: Option<ImageCache>,
    pub daemon: Daemon,
}

/// `batch.yaml`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub manager: BatchManager,
    /// Arguments given to every salloc and sbatch.
    pub batch_args: Vec<String>,
    pub etcd: Option<Etcd>,
    pub switch: SwitchChoice,
    pub responder_uids: ServiceUsers,
}

/// Users without a name, as whom responders run: those of each cluster on a host as another,
/// so that none can do anything to another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceUsers {
    first: u32,
    last: u32,
}

/// Systemd leaves this range alone, it lies above what `adduser` gives to people, and Debian
/// has given nothing in it away.
impl Default for ServiceUsers {
    fn default() -> Self {
        Self { first: 60_578, last: 61_183 }
    }
}

impl ServiceUsers {
    /// How many there are: as many clusters a host has at once.
    pub fn count(self) -> u32 {
        self.last - self.first + 1
    }

    /// The user, and the group, of the cluster with this number on its host.
    pub fn of(self, cluster: u32) -> (u32, u32) {
        let uid = self.first + cluster % self.count();
        (uid, uid)
    }
}

impl FromStr for ServiceUsers {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let ends = text.split_once('-');
        let ends = ends.and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
        let Some((first, last)) = ends.filter(|(first, last): &(u32, u32)| first <= last) else {
            return Err(Error::config("expected two user ids, such as `60578-61183`"));
        };
        let all = first..=last;
        // Root, nobody, and what system calls take for `as it is`.
        match [0, 65_534, 65_535, u32::MAX].into_iter().find(|uid| all.contains(uid)) {
            Some(uid) => Err(Error::config(format!("the user id {uid} has a meaning of its own"))),
            None => Ok(Self { first, last }),
        }
    }
}

/// What carries guests' frames on the hosts of a site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SwitchChoice {
    /// Open vSwitch on hosts where it can, else the Linux bridge.
    #[default]
    Auto,
    Linux,
    Ovs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BatchManager {
    #[default]
    Local,
    Slurm,
}

/// How the site's etcd is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Etcd {
    pub servers: Vec<String>,
    pub client_port: u16,
    /// `http` or `https`.
    pub protocol: String,
    pub ca_cert: Option<PathBuf>,
    /// `password`, `munge` or `none`.
    pub auth_type: String,
}

/// `daemon.yaml`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Whether the site says that it has one.
    pub is_configured: bool,
    /// Where it listens on its own host; who may change what is known by their user.
    pub socket: PathBuf,
    /// Where it listens for others, with tokens over TLS.
    pub listen: Option<SocketAddr>,
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// Whose members may change what it keeps.
    pub admin_group: String,
    /// Its keys, tokens, log-in to etcd; where there is no etcd, its store.
    pub state: PathBuf,
    /// Where other hosts find it, `https://HOST:PORT`.
    pub address: Option<String>,
    /// The authority of its certificate, if that is not one of the machine's.
    pub ca_cert: Option<PathBuf>,
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            is_configured: false,
            socket: "/run/pavo-daemon/socket".into(),
            listen: None,
            certificate: None,
            key: None,
            admin_group: "pavo-admin".into(),
            state: "/var/lib/pavo-daemon".into(),
            address: None,
            ca_cert: None,
        }
    }
}

/// One entry of `networks.yaml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    Ethernet(Ethernet),
    /// A type that pcocc has and this version does not run yet; refused, with
    /// its name, by the first cluster that uses it.
    Unsupported {
        kind: String,
    },
}

/// Private Ethernet (`type: ethernet`, or pcocc's older `nat` and `pv`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ethernet {
    pub layer: Layer,
    /// Names the bridge `PREFIX_xbr` of an L3 network, which each host has from its start.
    pub dev_prefix: Option<String>,
    /// Guests' addresses, the same in every cluster.
    pub int_network: Subnet,
    /// Guests' IPv6 addresses on L3, if they have any.
    pub int_network6: Option<Network6>,
    /// Where each job's uplink on a host takes its pair of addresses from.
    pub ext_network: Subnet,
    pub mac_prefix: MacPrefix,
    pub mac_start_offset: u32,
    /// Makes a host's name that of its address on the network that carries tunnels.
    pub host_if_suffix: Option<String>,
    /// Of the underlay. On one host the guests get all of it.
    pub mtu: u16,
    pub domain_name: Option<String>,
    pub dns_search: Vec<String>,
    pub dns_server: Option<std::net::Ipv4Addr>,
    pub ntp_server: Option<std::net::Ipv4Addr>,
    /// Ports of each VM that are published on the host.
    pub reverse_nat: Vec<ReverseNat>,
    pub allow_outbound: bool,
    /// Slurm's licence that a job with this network takes.
    pub license: Option<String>,
}

impl Default for Ethernet {
    fn default() -> Self {
        Self {
            layer: Layer::L3,
            dev_prefix: None,
            int_network: "10.200.0.0/16".parse().expect("a network"),
            int_network6: None,
            ext_network: "10.201.0.0/16".parse().expect("a network"),
            mac_prefix: MacPrefix::default(),
            mac_start_offset: 0,
            host_if_suffix: None,
            mtu: 1500,
            domain_name: None,
            dns_search: Vec::new(),
            dns_server: None,
            ntp_server: None,
            reverse_nat: Vec::new(),
            allow_outbound: true,
            license: None,
        }
    }
}

/// Which IPv6 addresses the guests of a network have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network6 {
    /// Local ones, of another network in each job.
    Auto,
    /// The same in every cluster.
    Given(Prefix64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    L2,
    L3,
}

/// A VM port published at a free host port of a range (both ends included).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReverseNat {
    pub vm_port: u16,
    pub min_host_port: u16,
    pub max_host_port: u16,
}

/// One entry of `resources.yaml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceSet {
    /// In the order in which the guest sees the interfaces.
    pub networks: Vec<String>,
    /// How many queues each interface has.
    pub nic_queues: u32,
}

impl Default for ResourceSet {
    fn default() -> Self {
        Self { networks: Vec::new(), nic_queues: 1 }
    }
}

/// One kind of VM, with what it inherits already filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    pub name: String,
    /// Where it was defined: a file, or `image user:tiny` for the template that
    /// every image becomes.
    pub origin: String,
    /// `REPO:IMAGE[@REV]`, `IMAGE`, or (older form, with a `/`) a folder.
    pub image: Option<String>,
    pub resource_set: String,
    pub inherits: Option<String>,
    pub description: String,
    pub user_data: Option<UserData>,
    pub instance_id: Option<String>,
    pub mount_points: BTreeMap<String, MountPoint>,
    pub persistent_drives: Vec<PersistentDrive>,
    pub custom_args: Vec<String>,
    pub qemu_bin: PathBuf,
    pub nic_model: String,
    /// Where it is not said: as many as the resource set gives.
    pub nic_queues: Option<u32>,
    pub machine_type: String,
    pub cpu_model: Option<String>,
    pub disk_model: DiskModel,
    pub disk_cache: DiskCache,
    pub emulator_cores: u32,
    /// Where it is not said: if CPUs were allotted.
    pub bind_vcpus: Option<bool>,
    pub full_node: bool,
    pub remote_display: Option<RemoteDisplay>,
    pub kernel: Option<PathBuf>,
    /// What its VMs begin from, instead of booting.
    pub snapshot: Option<PathBuf>,
    pub firmware: Firmware,
    pub iothreads: u32,
    pub huge_pages: bool,
    pub tpm: bool,
    pub sensitive: bool,
    /// Whether guests get our agent at their first start, because their image has none.
    pub inject_agent: bool,
    /// Where each setting that is given stands, as `FILE:LINE`; those inherited, too.
    pub places: BTreeMap<String, String>,
}

impl Template {
    /// A template with every setting at its default.
    pub fn new(name: impl Into<String>, origin: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            origin: origin.into(),
            image: None,
            resource_set: "default".into(),
            inherits: None,
            description: String::new(),
            user_data: None,
            instance_id: None,
            mount_points: BTreeMap::new(),
            persistent_drives: Vec::new(),
            custom_args: Vec::new(),
            qemu_bin: "qemu-system-x86_64".into(),
            nic_model: "virtio-net".into(),
            nic_queues: None,
            machine_type: "q35".into(),
            cpu_model: None,
            disk_model: DiskModel::default(),
            disk_cache: DiskCache::default(),
            emulator_cores: 0,
            bind_vcpus: None,
            full_node: false,
            remote_display: None,
            kernel: None,
            snapshot: None,
            firmware: Firmware::default(),
            iothreads: 0,
            huge_pages: false,
            tpm: false,
            sensitive: false,
            inject_agent: false,
            places: BTreeMap::new(),
        }
    }

    /// A setting and where it stands, for an error: `` `tpm` (templates.yaml:3) ``.
    pub fn setting(&self, key: &str) -> String {
        let place = self.places.get(key).map(|place| format!(" ({place})"));
        format!("`{key}`{}", place.unwrap_or_default())
    }
}

/// `user-data`: a file to read when the cluster starts, or text given inline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserData {
    File(PathBuf),
    /// Already rendered, with its `#cloud-config` line.
    Inline(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    pub path: String,
    pub readonly: bool,
    pub kind: MountKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersistentDrive {
    pub path: String,
    /// As it is given; otherwise the name says it.
    pub format: Option<DiskFormat>,
    pub mmp: Mmp,
    pub cache: DiskCache,
    pub backup: Option<String>,
}

/// Who else may have a persistent drive at the same time (multiple-mount protection).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mmp {
    /// No VM.
    #[default]
    Yes,
    /// VMs of the same cluster.
    Cluster,
    /// Anybody.
    No,
}

/// One image repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    pub name: String,
    pub path: PathBuf,
}

/// Where hosts keep copies of images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageCache {
    pub path: PathBuf,
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn responders_of_two_clusters_are_two_users_of_the_sites_choice() {
        for (text, count) in [("60578-61183", 606), ("70000-70001", 2), ("7-7", 1)] {
            let users: ServiceUsers = text.parse().unwrap();
            assert_eq!(users.count(), count);
            let all: BTreeSet<_> = (0..count).map(|cluster| users.of(cluster)).collect();
            assert_eq!(all.len(), count as usize);
            assert!(all.iter().all(|(uid, gid)| uid == gid), "{all:?}");
            assert!(all.contains(&users.of(u32::MAX)));
        }
        let usual: ServiceUsers = "60578-61183".parse().unwrap();
        assert_eq!(usual, ServiceUsers::default());
        for wrong in ["", "7", "9-8", "-1-5", "0-5", "60000-70000", "65534-65534", "8-4294967295"] {
            assert!(wrong.parse::<ServiceUsers>().is_err(), "{wrong}");
        }
    }
}
