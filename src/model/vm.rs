//! What one virtual machine is: everything decided, nothing left to interpret.
//!
//! The launcher resolves templates, images, networks and resources into one
//! [`VmSpec`] per VM and hands it to the VM's process as JSON. The process looks
//! nothing up.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::address::{Mac, Subnet};
use super::checkpoint::Restore;
use super::owner::Owner;
use super::prefix::Prefix64;

/// One VM, resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    pub owner: Owner,
    pub rank: u32,
    /// The template it was made from, for people to read.
    pub template: String,
    /// The VM's own directory: its process creates it, 0700. Holds disk, seed,
    /// logs and sockets, and goes with the job.
    pub dir: PathBuf,
    /// The folder with the sockets of [`dial`](super::dial); absent, the one that `dir` is in.
    #[serde(default)]
    pub dial: Option<PathBuf>,
    pub cores: u32,
    pub memory_mib: u64,
    pub accel: Accel,
    pub qemu_bin: PathBuf,
    /// QEMU machine type without options, such as `q35`.
    pub machine_type: String,
    pub cpu_model: Option<String>,
    pub disk: Option<Disk>,
    pub nics: Vec<Nic>,
    pub seed: Option<Seed>,
    /// Direct kernel boot.
    pub kernel: Option<Kernel>,
    /// Appended to QEMU's arguments as they are.
    pub custom_args: Vec<String>,
    /// Do not start the guest's CPUs (`-S` and no `cont`): for benches.
    #[serde(default)]
    pub paused: bool,
    #[serde(default)]
    pub extras: Extras,
    /// What it goes on from, if it does not begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<Box<Restore>>,
}

impl VmSpec {
    /// `vm0`, `vm1`, …
    pub fn name(&self) -> String {
        format!("vm{}", self.rank)
    }

    /// Whether it has the port of pcocc's agent; one that goes on has the ports that it had.
    pub fn has_pcocc_port(&self) -> bool {
        self.restore.as_ref().is_none_or(|restore| restore.machine.pcocc)
    }

    /// Where a setting of the template stands, for an error: `` `tpm` of template `a`
    /// (templates.yaml:3) ``.
    pub fn setting(&self, key: &str) -> String {
        let place = self.extras.places.get(key).map(|place| format!(" ({place})"));
        format!("`{key}` of template `{}`{}", self.template, place.unwrap_or_default())
    }
}

/// What a VM may have beside disk, interfaces and seed; without it, it has none of it. Paths
/// are those of the VM's host, where they are opened as the user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Extras {
    /// Disks that outlive the VM, behind the main one.
    pub drives: Vec<Drive>,
    /// Folders of the host.
    pub mounts: Vec<Mount>,
    pub firmware: Firmware,
    /// Threads of QEMU that serve disks.
    pub iothreads: u32,
    /// Whether the guest's memory is huge pages of the host.
    pub huge_pages: bool,
    /// Whether there is a TPM 2.0, new with each VM.
    pub tpm: bool,
    /// How its screen is shown, if it has one.
    pub display: Option<RemoteDisplay>,
    /// Whether the seed brings our agent.
    pub inject_agent: bool,
    pub cpus: Cpus,
    /// Where copies of its image are kept.
    pub node_cache: Option<NodeCache>,
    /// Where settings of the template stand, as `FILE:LINE`, by their keys.
    pub places: BTreeMap<String, String>,
}

/// Copies of images on a disk of the VM's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeCache {
    /// The user's own folder.
    pub path: PathBuf,
    /// How many bytes one user's copies may take.
    pub bytes: u64,
    /// The image's layers, the lowest first; each is named by its hash.
    pub layers: Vec<PathBuf>,
}

/// A disk that outlives the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// Absolute.
    pub path: PathBuf,
    /// As it was given. Never found out from what the guest may have written.
    pub format: Option<DiskFormat>,
    pub cache: DiskCache,
    /// Whether other VMs may write to it at the same time.
    pub shared: bool,
}

impl Drive {
    /// As it was given, or by the name.
    pub fn format(&self) -> DiskFormat {
        let named = self.path.extension().is_some_and(|extension| extension == "qcow2");
        self.format.unwrap_or(if named { DiskFormat::Qcow2 } else { DiskFormat::Raw })
    }
}

/// A folder of the host that the guest may mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What the guest mounts it by.
    pub tag: String,
    /// Absolute.
    pub path: PathBuf,
    pub readonly: bool,
    pub kind: MountKind,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountKind {
    #[default]
    #[serde(rename = "virtio-9p")]
    Virtio9p,
    VirtioFs,
}

impl MountKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Virtio9p => "virtio-9p",
            Self::VirtioFs => "virtio-fs",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    #[default]
    Bios,
    Uefi,
}

/// What viewers of the guest's screen speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RemoteDisplay {
    Spice,
    Vnc,
}

impl RemoteDisplay {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spice => "spice",
            Self::Vnc => "vnc",
        }
    }
}

/// Which of the host's CPUs the VM runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpus {
    /// Those beside [`VmSpec::cores`] on which QEMU runs what is not the guest.
    pub emulator: u32,
    pub bind: Bind,
    /// All CPUs of the host are the guest's, whatever was allotted.
    pub full_node: bool,
}

/// Whether each of the guest's CPUs stays on one of the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bind {
    /// If as many were allotted to the VM, and no others.
    #[default]
    Allotted,
    /// On those that this process may use, from this one on.
    From(u32),
    No,
}

/// How guest code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    Kvm,
    Tcg,
}

/// The VM's main disk: an ephemeral overlay on an image that is never written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The image's top layer, absolute.
    pub backing: PathBuf,
    pub backing_format: DiskFormat,
    /// Bytes, a multiple of 512.
    pub virtual_size: u64,
    pub model: DiskModel,
    pub cache: DiskCache,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Qcow2,
    Raw,
}

impl DiskFormat {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskModel {
    #[default]
    Virtio,
    VirtioScsi,
    Ide,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    Writeback,
    None,
    /// The overlay dies with the VM: flushing it would only cost time.
    #[default]
    Unsafe,
    Writethrough,
    Directsync,
}

/// A network interface, in the order the guest sees them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The network's name in `networks.yaml`.
    pub network: String,
    /// The TAP device, already made, that QEMU opens.
    pub tap: String,
    pub mac: Mac,
    /// QEMU's device, such as `virtio-net`.
    pub model: String,
    /// More than one only of virtio-net; then the TAP device is of the kind that has several.
    #[serde(default = "one_queue")]
    pub queues: u32,
    pub mtu: u16,
    /// On an L3 network, what DHCP will tell the guest.
    pub ipv4: Option<NicIpv4>,
    /// Where the network has IPv6 addresses, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<NicIpv6>,
    /// Whether the switch takes frames with half a checksum, and larger than the MTU.
    /// Open vSwitch outside of the kernel does not.
    #[serde(default = "offloads")]
    pub offloads: bool,
}

fn one_queue() -> u32 {
    1
}

impl Nic {
    /// Those that the guest has, or will be told.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let ipv4 = self.ipv4.as_ref().map(|ipv4| ipv4.address.into());
        ipv4.into_iter().chain(self.ipv6.map(|ipv6| ipv6.address.into()))
    }
}

fn offloads() -> bool {
    true
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicIpv4 {
    pub address: Ipv4Addr,
    pub subnet: Subnet,
    pub gateway: Ipv4Addr,
    /// The domain of the cluster's names, such as `pavo.internal`.
    pub domain: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicIpv6 {
    pub address: Ipv6Addr,
    pub prefix: Prefix64,
}

/// What cloud-init (or the demo image) is told at first boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    pub instance_id: String,
    /// `vm0`
    pub hostname: String,
    pub domain: Option<String>,
    /// The user's own user-data, text as it was read.
    pub user_data: Option<String>,
    /// Public keys (OpenSSH lines) that may log in.
    pub authorized_keys: Vec<String>,
    /// The VM's ed25519 host key.
    pub host_key: HostKey,
}

/// An ed25519 key pair. The spec that carries it is only ever written to pipes
/// and 0600 files of its user.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostKey {
    /// 32 bytes, hexadecimal.
    pub seed: String,
    /// 32 bytes, hexadecimal.
    pub public: String,
    /// The private key in OpenSSH's PEM form.
    pub openssh_private: String,
    /// `ssh-ed25519 AAAA…`
    pub openssh_public: String,
}

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostKey({})", self.openssh_public)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    pub path: PathBuf,
    pub append: String,
}
