//! What a checkpoint holds: a whole cluster at one moment, in one folder. And what a snapshot
//! does: one VM, from which any number of others begin.
//!
//! ```text
//! DIR/manifest.json    all that is here said of it, written last; keys are in it: 0600
//! DIR/vm0.memory.zst   what the guest had in memory and its devices, as QEMU writes it
//! DIR/vm0.disk.zst     what the VM had written to its disk
//! DIR/vm0.seed.zst     what it was told at its first boot
//! DIR/unfinished       only as long as the manifest is not there
//! ```
//!
//! A snapshot's manifest is `snapshot.json`, and it has no seed: each VM that begins from it has
//! one of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::vm::{Accel, HostKey, Nic, VmSpec};

/// The file that makes a folder a checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// The file that makes a folder a snapshot.
pub const SNAPSHOT: &str = "snapshot.json";
/// The longest one that is written, or read.
pub const MAX_MANIFEST: u64 = 64 << 20;
/// The file that says that it is none yet.
pub const UNFINISHED: &str = "unfinished";

/// A checkpoint, whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this record's shape; readers refuse newer ones.
    pub version: u32,
    /// The pavo that wrote it.
    pub pavo: String,
    /// Seconds since the epoch: the moment that it is of.
    pub taken: u64,
    /// Of the cluster.
    pub name: String,
    pub definition: String,
    /// The key that logs in to the guests.
    pub key: HostKey,
    /// The job's script, if the agent in vm0 has it and keeps it for who comes back.
    #[serde(default)]
    pub script: Option<String>,
    /// By rank.
    pub vms: Vec<SavedVm>,
    /// The files of images whose names do not say what they hold, by image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, Vec<Layer>>,
}

/// A file below a VM's disk, as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub name: String,
    pub bytes: u64,
    /// When it was written: seconds since the epoch, and nanoseconds.
    pub modified: (i64, i64),
}

impl Manifest {
    pub const VERSION: u32 = 2;
}

/// A snapshot, whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The version of this record's shape; readers refuse newer ones.
    pub version: u32,
    /// The pavo that wrote it.
    pub pavo: String,
    /// Seconds since the epoch: the moment that it is of.
    pub taken: u64,
    pub vm: SavedVm,
    /// As of a [`Manifest`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, Vec<Layer>>,
}

impl Snapshot {
    pub const VERSION: u32 = 1;
}

/// One VM of a checkpoint, as its process has written it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedVm {
    /// As it was run, with what its guest was told at its first boot.
    pub spec: VmSpec,
    /// The image below its disk, with its revision.
    pub image: Option<String>,
    /// Whether its guest stood still before.
    pub paused: bool,
    pub machine: Machine,
    pub memory: Stored,
    pub disk: Option<Stored>,
    pub seed: Option<Stored>,
    /// How large the volume of its seed is, which a guest does not ask twice.
    #[serde(default)]
    pub seed_bytes: u64,
}

/// What a guest's memory can be read into again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// QEMU's version.
    pub qemu: [u32; 3],
    /// The machine type with its version, `pc-q35-7.2`.
    pub kind: String,
    pub accel: Accel,
    /// The host's processor, where the guest has seen it.
    pub processor: Option<Processor>,
    /// What its model of a processor has, and the guest's had not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacking: Vec<Features>,
    /// The guest's processors.
    pub cores: u32,
    /// The guest's NUMA nodes, if it has some: the first CPU and the last one, and MiB.
    #[serde(default)]
    pub nodes: Vec<(u32, u32, u64)>,
    /// Whether it has the port of pcocc's agent: machines of version 1 have none.
    #[serde(default)]
    pub pcocc: bool,
}

/// Some features of a processor: as they are asked for by `CPUID`, and their bits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Features {
    pub cpuid_register: String,
    pub cpuid_input_eax: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpuid_input_ecx: Option<i64>,
    pub features: i64,
}

/// A host's processor, as Linux describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    pub model: String,
    pub flags: Vec<String>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// In the checkpoint's folder.
    pub name: String,
    pub bytes: u64,
    /// Hexadecimal.
    pub sha256: String,
}

/// What a VM is to go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The checkpoint's folder, absolute.
    pub dir: PathBuf,
    pub paused: bool,
    pub machine: Machine,
    pub memory: Stored,
    pub disk: Option<Stored>,
    pub seed: Option<Stored>,
    /// Who its guest was, where it is to be another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub former: Option<Former>,
}

/// What a guest remembers of who it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Former {
    pub nics: Vec<Nic>,
    /// Public keys that may log in.
    pub authorized_keys: Vec<String>,
    pub seed_bytes: u64,
}

impl SavedVm {
    /// The same as an order.
    pub fn restore(&self, dir: &Path) -> Restore {
        Restore {
            dir: dir.into(),
            paused: self.paused,
            machine: self.machine.clone(),
            memory: self.memory.clone(),
            disk: self.disk.clone(),
            seed: self.seed.clone(),
            former: None,
        }
    }

    /// An order to begin another VM from it.
    pub fn clone_order(&self, dir: &Path) -> Restore {
        let seed = self.spec.seed.as_ref();
        let former = Former {
            nics: self.spec.nics.clone(),
            authorized_keys: seed.map(|seed| seed.authorized_keys.clone()).unwrap_or_default(),
            seed_bytes: self.seed_bytes,
        };
        Restore { seed: None, former: Some(former), ..self.restore(dir) }
    }
}

impl Restore {
    /// All files of it.
    pub fn files(&self) -> impl Iterator<Item = &Stored> {
        [Some(&self.memory), self.disk.as_ref(), self.seed.as_ref()].into_iter().flatten()
    }
}
