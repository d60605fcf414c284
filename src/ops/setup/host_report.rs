//! What root tells the VMs' processes of a host, and nobody else: `host.json`.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::holding::run_dir;
use crate::error::{Context, Error, Result};
use crate::model::job::PublishedPort;
use crate::model::vm::Nic;
use crate::vm::channel::Identity;

/// What was made for the local VMs of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    pub version: u32,
    /// Slurm's name of the host.
    pub node: String,
    /// Where other hosts reach this one.
    pub address: Ipv4Addr,
    /// A folder of the user's for the VMs' disks, which goes with the cluster.
    pub scratch: PathBuf,
    pub vms: Vec<LocalVm>,
    /// What the launcher has sealed for them; `None` where the site has no key to seal with.
    #[serde(default)]
    pub identity: Option<Identity>,
}

/// One VM's share of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalVm {
    pub rank: u32,
    pub nics: Vec<Nic>,
    pub ports: Vec<PublishedPort>,
}

impl HostReport {
    pub const VERSION: u32 = 1;

    /// Reads the report of this host about a step.
    pub fn read(job: u32, step: u32) -> Result<Self> {
        let path = run_dir(job, step).join("host.json");
        let doing = || format!("reading `{}`", path.display());
        let text = std::fs::read(&path).while_doing(doing).map_err(|error| {
            error.help("has this step the option `--vm`, and is pavo's plugin in plugstack.conf?")
        })?;
        let report: Self = serde_json::from_slice(&text).while_doing(doing)?;
        if report.version != Self::VERSION {
            return Err(Error::system("it was written by another version of pavo"))
                .while_doing(doing);
        }
        Ok(report)
    }
}
