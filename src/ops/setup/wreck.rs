//! Clusters of which cannot be read what was noted of them ([`holding`](super::holding)): the
//! file was damaged, or another version of pavo has written it.
//!
//! They are in nobody's way. What else tells of them is enough to leave a living one alone
//! and to remove a dead one: the names of folders, what of the file can be read, a second
//! file with the most needed, and the journal's plan.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::grave;
use super::holding::{self, ESSENCE, Holding, SCRATCH_DIR, STATE, node_names, run_dir};
use super::{lost, release};
use crate::error::{Error, Result};
use crate::host::journal::Journal;
use crate::host::process::{self, ProcessId};
use crate::host::{Host, cgroup};
use crate::model::owner::{Manager, Owner};
use crate::ops::cleanup::{JOURNAL_DIR, NETNS_DIR};

/// What is known all the same.
#[derive(Debug)]
pub struct Wreck {
    pub job: u32,
    pub step: u32,
    /// What is wrong with the file.
    pub why: Error,
    pub slot: Option<u32>,
    pub keeper: Option<ProcessId>,
    guard: Option<ProcessId>,
}

impl Wreck {
    /// All on this host.
    pub fn all() -> Result<Vec<Self>> {
        let steps = holding::steps()?.into_iter();
        Ok(steps.filter_map(|(job, step)| Self::of(job, step)).collect())
    }

    /// What is left of a step whose file cannot be read.
    pub fn of(job: u32, step: u32) -> Option<Self> {
        let why = Holding::of(job, step).err()?;
        let dir = run_dir(job, step);
        let state = std::fs::read(dir.join(STATE)).unwrap_or_default();
        let state: Value = serde_json::from_slice(&state).unwrap_or_default();
        let process = |name: &str| serde_json::from_value(state[name].clone()).ok();
        let essence = std::fs::read_to_string(dir.join(ESSENCE)).unwrap_or_default();
        let essence = holding::parse_essence(&essence);
        let slot = essence.map(|(slot, _)| slot);
        let slot = slot.or_else(|| state["slot"].as_u64()?.try_into().ok());
        let keeper = essence.map(|(_, keeper)| keeper).or_else(|| process("keeper"));
        let planned = || Journal::peek(JOURNAL_DIR).read(owner(job)).ok()?.map(|plan| plan.keeper);
        let keeper = keeper.or_else(planned);
        Some(Self { job, step, why, slot, keeper, guard: process("guard") })
    }

    pub fn owner(&self) -> Owner {
        owner(self.job)
    }

    /// Whether its step still runs here. Of what nobody has noted a process, nothing was
    /// made on the host, or nothing is left.
    pub fn alive(&self) -> bool {
        self.keeper.as_ref().is_some_and(process::alive)
    }

    fn scratch(&self) -> PathBuf {
        Path::new(SCRATCH_DIR).join(format!("{}.{}", self.job, self.step))
    }

    /// What is wrong, and what to do.
    pub fn error(&self) -> Error {
        let Self { job, step, .. } = self;
        let error = Error::system(format!("what is noted of step {job}.{step} cannot be read"));
        let sweep = "`pavo internal setup sweep`";
        let error = error.because(Error::from(self.why.to_wire()));
        if self.alive() {
            error.help(format!(
                "its cluster runs on; when it has ended (`scancel {job}`), {sweep} removes it"
            ))
        } else {
            error.help(format!("{sweep} removes what is left of it"))
        }
    }

    /// What [`clear`](Self::clear) does, a line each, beside the journal's plan.
    pub fn lines(&self) -> Vec<String> {
        let guard = self.guard.as_ref().filter(|guard| process::alive(guard));
        let guard =
            guard.map(|guard| format!("end process {}, which answers the guests", guard.pid));
        let folders = [self.scratch(), run_dir(self.job, self.step)];
        let folders = folders.iter().map(|path| format!("delete `{}`", path.display()));
        guard.into_iter().chain(folders).collect()
    }

    /// Removes all that is known of it on this host. What it has in the site's store is
    /// looked for as after a boot.
    pub async fn clear(&self) -> Result<()> {
        if let Some(guard) = self.guard.as_ref().filter(|guard| **guard != process::current()) {
            release::end(guard).await;
        }
        let journal = Journal::open(JOURNAL_DIR)?;
        journal.undo(self.owner(), &Host::new(NETNS_DIR.into())).await?;
        grave::bury(&self.scratch())?;
        for node in node_names() {
            let name = cgroup::step_group(&node, self.job, self.step);
            cgroup::leave(&name);
            // A guard of which nothing is known ends with the step, and removes it then.
            cgroup::remove(&name);
        }
        lost::look_again()?;
        holding::forget(self.job, self.step)
    }
}

/// Set-ups are made for steps of Slurm's.
fn owner(job: u32) -> Owner {
    Owner { manager: Manager::Slurm, job }
}
