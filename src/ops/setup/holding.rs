//! What root remembers of a cluster's set-up on this host, beside the journal.
//!
//! A folder per cluster, `/run/pavo/<job>.<step>/`:
//!
//! ```text
//! state.json   root's: the ask, who keeps it alive, the guard     0600
//! host.json    the user's: interfaces and ports of the local VMs  0400
//! ```
//!
//! It is made before anything of the cluster exists and removed after everything is
//! gone, so that what was left half done is always found by it.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::ask::Ask;
use crate::error::{Context, Error, Result};
use crate::host::file::write_atomically;
use crate::host::process::{self, ProcessId};

/// Where the folders are.
pub const RUN_DIR: &str = "/run/pavo";
/// Where clusters' disks are while they run, a folder of the user's for each. On a disk:
/// overlays may grow to the size of the images.
pub const SCRATCH_DIR: &str = "/var/lib/pavo/run";

/// A cluster that holds something on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    pub ask: Ask,
    /// The name of the ask's user.
    pub user: String,
    /// The process of the step on this host. When it is gone, so is the cluster.
    pub keeper: ProcessId,
    /// Which pairs of uplink addresses are its.
    pub slot: u32,
    /// Holds the responders.
    pub guard: Option<ProcessId>,
    /// Whether something of it may be in the site's store.
    pub stored: bool,
}

/// Keeps other set-ups from choosing the same slot; ends with its holder.
#[derive(Debug)]
pub struct Claim {
    _lock: Flock<File>,
}

impl Claim {
    /// Waits for the lock; it is held for milliseconds.
    pub fn wait() -> Result<Self> {
        let doing = || format!("locking `{RUN_DIR}`");
        make_dir(Path::new(RUN_DIR), 0o755)?;
        let path = Path::new(RUN_DIR).join("lock");
        let mut open = OpenOptions::new();
        let open = open.create(true).truncate(false).write(true).mode(0o600);
        let file = open.open(path).while_doing(doing)?;
        let lock = Flock::lock(file, FlockArg::LockExclusive);
        lock.map(|lock| Self { _lock: lock }).map_err(|(_, error)| error).while_doing(doing)
    }
}

impl Holding {
    /// Notes that `ask` is about to be carried out, and chooses its slot below `slots`.
    ///
    /// # Errors
    /// When the job has a cluster already, or all slots are taken.
    pub fn begin(_claim: &Claim, ask: &Ask, user: &str, slots: u32) -> Result<Self> {
        let keeper = process::identify(ask.keeper)
            .ok_or_else(|| Error::system(format!("the process of {ask} has ended")))?;
        let others = Self::all()?;
        if let Some(other) = others.iter().find(|other| other.ask.job == ask.job) {
            return Err(Error::usage(format!(
                "job {} has a cluster already, in its step {}",
                ask.job, other.ask.step
            ))
            .help("a job has one cluster at a time; start another job for another cluster"));
        }
        let taken: BTreeSet<u32> = others.iter().map(|other| other.slot).collect();
        let slot = (0..slots).find(|slot| !taken.contains(slot)).ok_or_else(|| {
            Error::system(format!("{slots} clusters are on this host already"))
                .help("`ext-network` in networks.yaml has no addresses for another: widen it")
        })?;
        let (ask, user) = (ask.clone(), user.to_owned());
        let holding = Self { ask, user, keeper, slot, guard: None, stored: false };
        make_dir(&holding.dir(), 0o711)?;
        holding.save()?;
        Ok(holding)
    }

    pub fn dir(&self) -> PathBuf {
        run_dir(self.ask.job, self.ask.step)
    }

    /// Where the VMs of this host have their disks.
    pub fn scratch(&self) -> PathBuf {
        Path::new(SCRATCH_DIR).join(format!("{}.{}", self.ask.job, self.ask.step))
    }

    /// Writes it down.
    pub fn save(&self) -> Result<()> {
        let text = serde_json::to_vec(self).expect("a holding is always valid JSON");
        write_atomically(&self.dir().join("state.json"), &text, 0o600)
    }

    /// The holding of a step, if it has one.
    pub fn of(job: u32, step: u32) -> Result<Option<Self>> {
        read(&run_dir(job, step))
    }

    /// Every holding on this host.
    pub fn all() -> Result<Vec<Self>> {
        let doing = || format!("listing `{RUN_DIR}`");
        let mut all = Vec::new();
        let entries = match fs::read_dir(RUN_DIR) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(all),
            entries => entries.while_doing(doing)?,
        };
        for entry in entries {
            let name = entry.while_doing(doing)?.file_name();
            let Some((job, step)) = name.to_str().and_then(|name| name.split_once('.')) else {
                continue;
            };
            if let (Ok(job), Ok(step)) = (job.parse(), step.parse()) {
                all.extend(Self::of(job, step)?);
            }
        }
        Ok(all)
    }

    /// Whether the step still runs here.
    pub fn alive(&self) -> bool {
        process::alive(&self.keeper)
    }

    /// Forgets it: everything else is gone.
    pub fn forget(&self) -> Result<()> {
        remove_tree(&self.dir())
    }
}

/// The folder of a step.
pub fn run_dir(job: u32, step: u32) -> PathBuf {
    Path::new(RUN_DIR).join(format!("{job}.{step}"))
}

/// A folder that may be there already.
pub fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(path);
    made.while_doing(|| format!("creating `{}`", path.display()))
}

/// Removes a folder below one of root's, whatever its owner has put there: the standard
/// library follows no link, also none that appears meanwhile.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.while_doing(|| format!("removing `{}`", path.display())),
    }
}

fn read(dir: &Path) -> Result<Option<Holding>> {
    let path = dir.join("state.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // Begun and ended in the same moment: there is only the folder.
            return fs::remove_dir(dir).map_or(Ok(None), |()| Ok(None));
        }
        Err(error) => return Err(error).while_doing(|| format!("reading `{}`", path.display())),
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        Error::system(format!("`{}` is not of this version of pavo", path.display()))
            .because(error)
            .help("end the job, remove its links by hand, then that folder")
    })
}
