//! What is ordered of many machines, and what came of it.

use serde::{Deserialize, Serialize};

use super::node::operation::Operation;
use super::node::request::Outcome;

/// What machines are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    Status,
    On,
    Off,
    Soft,
    Reset,
    Cycle,
    Boot,
    /// Says what it boots from.
    Bootdev,
    Net,
    Disk,
    Cdrom,
    Bios,
    Default,
}

impl Wanted {
    /// The command that does it.
    pub fn verb(self) -> String {
        let word = serde_json::to_value(self).unwrap_or_default();
        let word = word.as_str().unwrap_or_default();
        match self {
            Self::Bootdev => "bootdev status".into(),
            Self::Net | Self::Disk | Self::Cdrom | Self::Bios | Self::Default => {
                format!("bootdev {word}")
            }
            _ => format!("power {word}"),
        }
    }
}

/// What is ordered of machines, and how it is gone about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    pub names: String,
    pub action: Wanted,
    /// Boots from the device from now on, not once.
    #[serde(default)]
    pub always: bool,
    #[serde(default = "defaults::fanout")]
    pub fanout: usize,
    /// Seconds for an answer of a controller.
    #[serde(default = "defaults::timeout")]
    pub timeout: u64,
    #[serde(default = "defaults::retries")]
    pub retries: u32,
    /// Seconds until a machine is in the state that it was told to go to.
    #[serde(default = "defaults::settle")]
    pub settle: u64,
    /// So many start in each interval.
    #[serde(default)]
    pub window: Option<usize>,
    #[serde(default = "defaults::interval")]
    pub interval: u64,
    /// `10`, or `5%`.
    #[serde(default)]
    pub fail_limit: Option<String>,
    #[serde(default)]
    pub dry_run: bool,
    /// Nodes on which jobs run, too.
    #[serde(default)]
    pub force: bool,
}

/// As the commands have them.
mod defaults {
    pub fn fanout() -> usize {
        256
    }

    pub fn timeout() -> u64 {
        5
    }

    pub fn retries() -> u32 {
        1
    }

    pub fn settle() -> u64 {
        120
    }

    pub fn interval() -> u64 {
        10
    }
}

impl Order {
    /// The usual one.
    pub fn new(names: String, action: Wanted) -> Self {
        Self {
            names,
            action,
            always: false,
            fanout: defaults::fanout(),
            timeout: defaults::timeout(),
            retries: defaults::retries(),
            settle: defaults::settle(),
            window: None,
            interval: defaults::interval(),
            fail_limit: None,
            dry_run: false,
            force: false,
        }
    }

    /// Whether nodes on which something runs are to be left alone.
    pub fn spares_the_busy(&self) -> bool {
        !self.force && !matches!(self.action, Wanted::Status | Wanted::Bootdev)
    }
}

/// The latest operations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operations {
    pub operations: Vec<Operation>,
}

/// An operation, and what came of nodes behind those that were known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Results {
    pub operation: Operation,
    pub results: Vec<Outcome>,
}
