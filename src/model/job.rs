//! What is known of a running cluster: the record in the store, and VM states.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::owner::Owner;

/// A running cluster, as stored under its user and job. Resolved: a reader
/// never needs the configuration it was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobRecord {
    /// The version of this record's shape; readers refuse newer ones.
    pub version: u32,
    pub owner: Owner,
    pub name: String,
    pub user: String,
    /// The definition as it was asked for, `tiny:2`.
    pub definition: String,
    /// Seconds since the epoch.
    pub started: u64,
    /// Seconds the job may take, if there is a limit.
    pub time_limit: Option<u64>,
    /// The process that owns the job, by which others tell whether it lives.
    pub launcher: ProcessId,
    /// The job's directory (sockets, logs, ssh key), 0700.
    pub dir: PathBuf,
    pub host: String,
    pub vms: Vec<VmRecord>,
}

impl JobRecord {
    pub const VERSION: u32 = 1;
}

/// A process, unmistakably: ids are used again, a start time with it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: u32,
    /// Clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

/// A VM of the cluster, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    pub rank: u32,
    pub template: String,
    /// The image it runs, resolved: `user:tiny@0`.
    pub image: Option<String>,
    pub cores: u32,
    pub memory_mib: u64,
    pub host: String,
    /// Its address on each L3 network; where it has two, that of IPv6 second.
    pub addresses: Vec<IpAddr>,
    /// Ports of this VM that are reachable from the host.
    pub ports: Vec<PublishedPort>,
    pub ssh_user: String,
    /// Its persistent drives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<DriveRecord>,
    /// Where commands reach its process from other hosts; absent on one machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<SocketAddr>,
}

/// A persistent drive of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveRecord {
    /// The image that it is saved to where nobody says otherwise.
    pub backup: Option<String>,
}

/// A port of a VM, reachable at `host_address:host_port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    pub vm_port: u16,
    pub host_address: Ipv4Addr,
    pub host_port: u16,
}

/// The state of one VM, with its proof.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    pub state: VmState,
    /// Seconds since the epoch.
    pub since: u64,
    /// What is waited for, or why it ended.
    pub detail: String,
}

/// How far a VM is. Each state says what was *seen*, not what is hoped for.
///
/// ```text
/// waiting ─► preparing ─► starting ─► running ─► agent, ssh
///    │           │            │          │  ▲     │
///    │           │            │          ▼  │     │
///    │           │            │         paused    │
///    └───────────┴────────────┴──────────┴────────┴─► off ─► stopping ─► stopped | failed
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Its process has not reported yet.
    Waiting,
    /// Disk and seed are being made.
    Preparing,
    /// QEMU was started; QMP has not answered `running` yet.
    Starting,
    /// QMP says so.
    Running,
    /// The guest's CPUs stand still.
    Paused,
    /// The guest's agent has answered.
    Agent,
    /// An ssh banner was read.
    Ssh,
    /// The guest has powered itself off; its disk can still be saved.
    Off,
    /// It was told to end.
    Stopping,
    /// It ended as it should.
    Stopped,
    /// It ended otherwise; the detail says how.
    Failed,
}

impl VmState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Preparing => "preparing",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Agent => "agent",
            Self::Ssh => "ssh",
            Self::Off => "off",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    /// Whether the VM has ended, one way or the other.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed)
    }

    /// Whether the guest has ended: whether by itself, or with the VM.
    pub fn is_down(self) -> bool {
        self == Self::Off || self.is_over()
    }

    /// Whether the guest's CPUs run, as far as is known.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Agent | Self::Ssh)
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a VM's process tells its launcher, one JSON value a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    pub rank: u32,
    pub state: VmState,
    pub detail: String,
    /// With [`VmState::Failed`]: the whole error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<crate::error::WireError>,
}
