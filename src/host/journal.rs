//! Remembers, across crashes and reboots, what each job changes on this host.
//!
//! A job's whole plan is written, atomically, before its first step is applied. That
//! is enough: undoing a step that never ran is harmless, so undoing a job is its
//! plan, backwards, however far it got. Nothing else on the host decides what to
//! clean.
//!
//! Set-ups and removals wait for each other at a lock in the journal's folder, which
//! ends with its holder.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::Host;
use super::crash;
use super::file::write_atomically;
use super::netlink::Netlink;
use super::process::{self, ProcessId};
use super::step::Step;
use crate::error::{Context, Error, Result};
use crate::model::owner::Owner;

/// How long others' set-ups may take before we give up: half of what Slurm's plugin gives a
/// set-up, so that its user is told the reason.
pub const LOCK_LIMIT: Duration = Duration::from_secs(30);
/// How often a lock that is held is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Everything one job changes on this host, in order, with no hole left to fill
/// while it is applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub owner: Owner,
    /// The process the changes are made for: when it is gone they are leftovers.
    pub keeper: ProcessId,
    pub steps: Vec<Step>,
}

/// The plans in force on this host, a file each.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    patience: Duration,
}

impl Journal {
    /// Opens the journal in this folder, which is made if need be.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        fs::create_dir_all(&dir).while_doing(|| format!("creating `{}`", dir.display()))?;
        Ok(Self { dir, patience: LOCK_LIMIT })
    }

    /// Names the journal in this folder without making anything: for who only reads.
    pub fn peek(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), patience: LOCK_LIMIT }
    }

    /// Waits no longer than this for others.
    #[must_use]
    pub fn patient(self, patience: Duration) -> Self {
        Self { patience: patience.min(LOCK_LIMIT), ..self }
    }

    /// Sets a job up entirely, or not at all: if a step fails, what precedes it is
    /// undone and the step's error returned.
    pub async fn apply(&self, plan: &Plan, host: &Host) -> Result<()> {
        let _lock = self.lock().await?;
        // An older plan of the owner may hold what the new one lacks.
        if self.read(plan.owner)?.is_some_and(|old| old.steps != plan.steps) {
            self.undo_locked(plan.owner, host).await?;
        }
        crash::point("journal.apply")?;
        self.write(plan)?;
        crash::point("journal.written")?;
        for step in &plan.steps {
            if let Err(error) = step.apply(host).await {
                // The step's error is the one that helps; what could not be undone
                // stays in the journal for the next sweep.
                if let Err(leftover) = self.undo_locked(plan.owner, host).await {
                    warn!("{}", leftover.report());
                }
                return Err(error);
            }
        }
        crash::point("journal.applied")
    }

    /// Brings what an owner has from its old plan to this one: undoes what only the old
    /// one has, and leaves what both have as it is, for it may be in use.
    ///
    /// # Errors
    /// What was made by then stays, and is known here.
    pub async fn update(&self, plan: &Plan, host: &Host) -> Result<()> {
        let _lock = self.lock().await?;
        let old = self.read(plan.owner)?.map(|old| old.steps).unwrap_or_default();
        let (old, _): (Vec<_>, Vec<_>) =
            old.into_iter().partition(|step| !plan.steps.contains(step));
        let both = old.iter().chain(&plan.steps).cloned().collect();
        self.write(&Plan { steps: both, ..plan.clone() })?;
        for step in old.iter().rev() {
            step.undo(host).await?;
        }
        for step in &plan.steps {
            step.apply(host).await?;
        }
        self.write(plan)
    }

    /// Removes the journal's folder, unless there is a plan in it. Whoever waits for its
    /// lock at this moment fails.
    pub async fn close(self) -> Result<()> {
        let _lock = self.lock().await?;
        if !self.owners()?.is_empty() {
            return Ok(());
        }
        let doing = || format!("removing `{}`", self.dir.display());
        fs::remove_file(self.dir.join("lock")).while_doing(doing)?;
        super::file::remove_empty_folder(&self.dir).map(drop)
    }

    /// Undoes a job, going on past failures. Its plan is forgotten only once nothing
    /// of it is left, so that the next [`sweep`](Self::sweep) retries.
    pub async fn undo(&self, owner: Owner, host: &Host) -> Result<()> {
        let _lock = self.lock().await?;
        self.undo_locked(owner, host).await
    }

    /// Undoes every job whose keeper is gone, going on past failures, and returns
    /// those of which nothing is left.
    ///
    /// # Errors
    /// The last failure, after all were tried.
    pub async fn sweep(&self, host: &Host) -> Result<Vec<Owner>> {
        let _lock = self.lock().await?;
        self.tidy()?;
        let (mut swept, mut failure) = (Vec::new(), None);
        for owner in self.owners()? {
            match self.sweep_one(owner, host).await {
                Ok(true) => swept.push(owner),
                Ok(false) => {}
                Err(error) => {
                    warn!("{}", error.report());
                    failure = Some(error);
                }
            }
        }
        failure.map_or(Ok(swept), Err)
    }

    /// The jobs that have a plan here.
    pub fn owners(&self) -> Result<BTreeSet<Owner>> {
        let listing = || format!("listing `{}`", self.dir.display());
        let mut owners = BTreeSet::new();
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(owners),
            entries => entries.while_doing(listing)?,
        };
        for entry in entries {
            let name = entry.while_doing(listing)?.file_name();
            let owner = name.to_str().and_then(|name| name.strip_suffix(".json"));
            owners.extend(owner.and_then(|owner| owner.parse::<Owner>().ok()));
        }
        Ok(owners)
    }

    /// Removes plans that were never written to their end. Whoever writes has the lock.
    fn tidy(&self) -> Result<()> {
        let listing = || format!("listing `{}`", self.dir.display());
        for entry in fs::read_dir(&self.dir).while_doing(listing)? {
            let entry = entry.while_doing(listing)?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                let path = entry.path();
                fs::remove_file(&path).while_doing(|| format!("removing `{}`", path.display()))?;
            }
        }
        Ok(())
    }

    async fn sweep_one(&self, owner: Owner, host: &Host) -> Result<bool> {
        match self.read(owner)? {
            Some(plan) if !process::alive(&plan.keeper) => {
                self.undo_locked(owner, host).await.map(|()| true)
            }
            _ => Ok(false),
        }
    }

    async fn undo_locked(&self, owner: Owner, host: &Host) -> Result<()> {
        let Some(plan) = self.read(owner)? else { return Ok(()) };
        crash::point("journal.undo")?;
        let ends_with = |name: &str| {
            let is_it = |step: &Step| matches!(step, Step::Namespace { name: n } if n == name);
            plan.steps.iter().any(is_it)
        };
        // What is in a namespace of the plan's own goes with it.
        let alone = |step: &&Step| !step.namespace().is_some_and(ends_with);
        let steps: Vec<&Step> = plan.steps.iter().rev().filter(alone).collect();
        let failure = match silenced(&steps).await {
            // Tables guard links that are no way for anything any more.
            true => {
                let (tables, rest): (Vec<&Step>, Vec<&Step>) =
                    steps.into_iter().partition(|step| matches!(step, Step::NftTables { .. }));
                let (tables, rest) = tokio::join!(undo_all(&tables, host), undo_all(&rest, host));
                tables.or(rest)
            }
            false => undo_all(&steps, host).await,
        };
        crash::point("journal.undone")?;
        match failure {
            Some(error) => Err(error).while_doing(|| format!("cleaning up after job {owner}")),
            None => fs::remove_file(self.path(owner))
                .while_doing(|| format!("forgetting the plan of job {owner}")),
        }
    }

    /// The plan of an owner, if it has one.
    pub fn read(&self, owner: Owner) -> Result<Option<Plan>> {
        let path = self.path(owner);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).while_doing(|| format!("reading `{}`", path.display()));
            }
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| {
            Error::system(format!("`{}` is not a plan of this version", path.display()))
                .because(error)
                .help("remove the job's links and tables by hand, then the file")
        })
    }

    fn write(&self, plan: &Plan) -> Result<()> {
        let text = serde_json::to_vec(plan).expect("a plan is always valid JSON");
        write_atomically(&self.path(plan.owner), &text, 0o600)
    }

    fn path(&self, owner: Owner) -> PathBuf {
        self.dir.join(format!("{owner}.json"))
    }

    async fn lock(&self) -> Result<Flock<File>> {
        let path = self.dir.join("lock");
        // 0600: who may read a file may lock it, and so keep every set-up away.
        let open =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let mut file = open.while_doing(|| format!("opening `{}`", path.display()))?;
        let deadline = tokio::time::Instant::now() + self.patience;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((back, Errno::EWOULDBLOCK)) if tokio::time::Instant::now() < deadline => {
                    file = back;
                }
                Err((_, Errno::EWOULDBLOCK)) => {
                    let seconds = self.patience.as_secs();
                    let path = path.display();
                    let text = format!("another set-up has held `{path}` for {seconds} s");
                    return Err(Error::system(text)
                        .help(format!("an administrator sees who: `fuser -v {path}` there")));
                }
                Err((_, error)) => {
                    return Err(error).while_doing(|| format!("locking `{}`", path.display()));
                }
            }
            tokio::time::sleep(LOCK_PAUSE).await;
        }
    }
}

/// Undoes these steps in turn, going on past failures; returns the last one.
async fn undo_all(steps: &[&Step], host: &Host) -> Option<Error> {
    let mut failure = None;
    for step in steps {
        if let Err(error) = step.undo(host).await {
            warn!("{}", error.report());
            failure = Some(error);
        }
    }
    failure
}

/// Switches the guests' links off, if there are any; whether that is so.
async fn silenced(steps: &[&Step]) -> bool {
    let group = steps.iter().find_map(|step| match step {
        Step::Taps { group, .. } => Some(*group),
        _ => None,
    });
    match group {
        Some(group) => Netlink::set_group_down(group).await.is_ok(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[tokio::test]
    async fn who_waits_too_long_is_told_for_what() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let _lock = journal.lock().await.unwrap();
        let waiting = Journal::open(dir.path()).unwrap().patient(Duration::from_millis(1100));
        let start = std::time::Instant::now();
        let report = waiting.undo(Owner::local(1), &Host::new(dir.path().into())).await;
        let report = report.unwrap_err().report();
        assert!(start.elapsed() < Duration::from_secs(10));
        assert!(report.contains("another set-up has held `"), "{report}");
        assert!(report.contains("/lock` for 1 s"), "{report}");
        assert!(report.contains("help: an administrator sees who: `fuser -v /"), "{report}");
    }

    #[tokio::test]
    async fn others_can_neither_read_the_lock_nor_hold_it() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let _lock = journal.lock().await.unwrap();
        let lock = fs::metadata(dir.path().join("lock")).unwrap();
        assert_eq!(lock.mode() & 0o777, 0o600);
    }
}
