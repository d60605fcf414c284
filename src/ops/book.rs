//! The launcher's book: the job's record and the states of its VMs.
//!
//! The launcher is their single writer. On one machine the store is there before
//! anything else; at a site it is there once the person is known to it. What is written
//! meanwhile is kept, and stored then.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use tokio::time::{Instant, sleep_until};

use super::reach::Secrets;
use crate::error::{Context, Error, Result};
use crate::host::process;
use crate::model::job::{JobRecord, VmRecord, VmReport, VmState, VmStatus};
use crate::model::owner::Owner;
use crate::store::{Change, Check, Commit, Store, keys};

/// Who starts the job, and where.
#[derive(Clone, Debug)]
pub struct Place {
    pub user: String,
    /// Where jobs' directories are made.
    pub tmp: PathBuf,
    pub host: String,
}

/// See the module.
pub struct Book {
    store: Option<Arc<dyn Store>>,
    pub record: JobRecord,
    pub states: Vec<VmStatus>,
    /// The error a VM's process reported, by rank.
    failures: BTreeMap<u32, Error>,
    /// What is wrong with the surroundings of VMs that go on, by rank.
    troubles: BTreeMap<u32, String>,
    begun: bool,
    /// At a site, what changes is stored as a whole, now and then: a thousand VMs are not a
    /// thousand commits.
    site: bool,
    dirty: bool,
    flush_at: Option<Instant>,
}

impl std::fmt::Debug for Book {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "book of job {}", self.record.owner)
    }
}

/// How often what has changed is stored, at most; and for each VM as much longer: the record of
/// a thousand is large, and they take a while to start.
const FLUSH: Duration = Duration::from_millis(500);
const FLUSH_PER_VM: Duration = Duration::from_millis(3);

/// When that is tried again where the store was away.
const AGAIN: Duration = Duration::from_secs(5);

fn removed() -> Error {
    Error::system("the job's record was removed").help("was the job ended by another process?")
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Book {
    /// A book of a job of which nothing exists yet. Without a store it is a site's, whose
    /// store may be [attached](Self::attach).
    pub fn new(
        store: Option<Arc<dyn Store>>,
        owner: Owner,
        place: &Place,
        name: &str,
        definition: String,
        time_limit: Option<u64>,
    ) -> Result<Self> {
        let dir = format!("pavo-{}-{:08x}", owner.job, random()? as u32);
        let record = JobRecord {
            version: JobRecord::VERSION,
            owner,
            name: name.into(),
            user: place.user.clone(),
            definition,
            started: now(),
            time_limit,
            launcher: process::current(),
            dir: place.tmp.join(dir),
            host: place.host.clone(),
            vms: Vec::new(),
        };
        let (states, failures) = (Vec::new(), BTreeMap::new());
        let site = store.is_none();
        Ok(Self {
            store,
            record,
            states,
            failures,
            troubles: BTreeMap::new(),
            begun: false,
            site,
            dirty: false,
            flush_at: None,
        })
    }

    /// Where it writes, if that is known yet.
    pub fn store(&self) -> Option<Arc<dyn Store>> {
        self.store.clone()
    }

    /// Says which VMs there are. Each waits.
    pub fn describe(&mut self, vms: Vec<VmRecord>) {
        let waiting = VmStatus { state: VmState::Waiting, since: now(), detail: String::new() };
        self.states = vec![waiting; vms.len()];
        self.record.vms = vms;
    }

    /// Writes the record of a job that must be new.
    pub async fn begin(&mut self) -> Result<()> {
        let key = keys::job_record(&self.record.user, self.record.owner);
        self.commit(&[Check::Absent(key.clone())], &[Change::put_json(key, &self.record)?]).await?;
        self.begun = true;
        Ok(())
    }

    async fn commit(&self, checks: &[Check], changes: &[Change]) -> Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        match store.commit(checks, changes).await? {
            Commit::Done(_) => Ok(()),
            Commit::Conflict(_) if !self.begun => {
                Err(Error::bug(format!("job {} exists already", self.record.owner.job)))
            }
            Commit::Conflict(_) => Err(removed()),
        }
    }

    /// Records what a VM's process reported, here and in the store.
    pub async fn report(&mut self, report: VmReport) -> Result<u32> {
        let status = VmStatus { state: report.state, since: now(), detail: report.detail };
        if let Some(error) = report.error {
            self.failures.insert(report.rank, error.into());
        }
        self.set_state(report.rank, status).await?;
        Ok(report.rank)
    }

    /// Records a VM's state, here and in the store.
    pub async fn set_state(&mut self, rank: u32, status: VmStatus) -> Result<()> {
        let key = keys::vm_status(&self.record.user, self.record.owner, rank);
        let mut status = status;
        if let (Some(trouble), true) = (self.troubles.get(&rank), status.detail.is_empty()) {
            status.detail.clone_from(trouble);
        }
        let change = Change::put_json(key, &status)?;
        self.states[rank as usize] = status;
        if self.site {
            self.touch();
            return Ok(());
        }
        // Who took the record away has ended the job: nothing may be written behind it.
        let check = Check::Exists(keys::job_record(&self.record.user, self.record.owner));
        self.commit(&[check], &[change]).await
    }

    /// Records what is wrong with a VM's surroundings, and says it, once for all VMs.
    pub fn trouble(&mut self, rank: u32, error: &Error) {
        let text = error.to_string();
        if !self.troubles.values().any(|told| *told == text) {
            tracing::warn!("{}", error.report());
        }
        if let Some(status) = self.states.get_mut(rank as usize) {
            if !status.state.is_over() {
                status.detail.clone_from(&text);
            }
            self.touch();
        }
        self.troubles.insert(rank, text);
    }

    /// Says why a VM that waits cannot begin yet.
    pub fn hold_up(&mut self, rank: u32, why: String) {
        match self.states.get_mut(rank as usize) {
            Some(status) if status.detail != why => status.detail = why,
            _ => return,
        }
        self.touch();
    }

    /// Begins to write to the site's store. What an earlier job of the same id has left
    /// there is removed first.
    pub async fn attach(&mut self, store: Arc<dyn Store>, secrets: &Secrets) -> Result<()> {
        let (user, owner) = (&self.record.user, self.record.owner);
        super::cleanup::forget(&*store, user, owner).await?;
        let record = keys::job_record(user, owner);
        let changes = [
            Change::put_json(record.clone(), &self.record)?,
            Change::put_json(keys::vm_states(user, owner), &self.states)?,
            Change::put_json(keys::job_secrets(user, owner), secrets)?,
        ];
        self.store = Some(store);
        self.commit(&[Check::Absent(record)], &changes).await?;
        self.begun = true;
        self.dirty = false;
        Ok(())
    }

    /// Something in the record, or in a state, has changed.
    pub fn touch(&mut self) {
        self.dirty = true;
        let vms = u32::try_from(self.states.len()).unwrap_or(u32::MAX);
        self.flush_at.get_or_insert_with(|| Instant::now() + FLUSH + FLUSH_PER_VM * vms.min(4096));
    }

    /// When [`flush`](Self::flush) is due; pending while nothing has changed.
    pub async fn due(&self) {
        match self.flush_at {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Stores all that has changed since the last time. A store that is away is no reason to
    /// end a cluster: it is tried again later.
    ///
    /// Who is interrupted does it again.
    pub async fn flush(&mut self) -> Result<()> {
        if !self.site || !self.dirty || !self.begun {
            self.flush_at = None;
            return Ok(());
        }
        let (user, owner) = (&self.record.user, self.record.owner);
        let record = keys::job_record(user, owner);
        let changes = [
            Change::put_json(record.clone(), &self.record)?,
            Change::put_json(keys::vm_states(user, owner), &self.states)?,
        ];
        let Some(store) = &self.store else { return Ok(()) };
        match store.commit(&[Check::Exists(record)], &changes).await {
            Ok(Commit::Done(_)) => (self.flush_at, self.dirty) = (None, false),
            Ok(Commit::Conflict(_)) => return Err(removed()),
            Err(error) => {
                tracing::warn!("{}", error.report());
                self.flush_at = Some(Instant::now() + AGAIN);
            }
        }
        Ok(())
    }

    /// Removes what this start of the job has stored.
    pub async fn forget(&self) -> Result<()> {
        match &self.store {
            Some(store) => super::cleanup::forget_start(&**store, &self.record).await,
            None => Ok(()),
        }
    }

    /// Takes the error of the first VM that failed, if one did.
    pub fn take_failure(&mut self) -> Option<(u32, Error)> {
        let (rank, error) = self.failures.pop_first()?;
        Some((rank, Err::<(), _>(error).while_doing(|| format!("running vm{rank}")).unwrap_err()))
    }

    /// Whether every VM has ended.
    pub fn is_over(&self) -> bool {
        self.states.iter().all(|status| status.state.is_over())
    }

    /// Whether every guest has ended; some VMs may be kept.
    pub fn is_down(&self) -> bool {
        self.states.iter().all(|status| status.state.is_down())
    }
}

/// The job's directory, held.
#[derive(Debug)]
pub struct JobDir {
    /// Cleaners of temporary folders (systemd-tmpfiles) leave alone what is locked.
    _lock: Flock<std::fs::File>,
}

impl JobDir {
    pub fn make(dir: &Path) -> Result<Self> {
        let made = std::fs::DirBuilder::new().mode(0o700).create(dir);
        made.while_doing(|| format!("creating `{}`", dir.display()))
            .map_err(|error| error.help("set PAVO_TMPDIR to a folder that you can write to"))?;
        let lock = std::fs::File::open(dir)
            .and_then(|dir| Ok(Flock::lock(dir, FlockArg::LockShared).map_err(|(_, e)| e)?));
        Ok(Self { _lock: lock.while_doing(|| format!("locking `{}`", dir.display()))? })
    }
}

/// 64 random bits.
pub fn random() -> Result<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .while_doing(|| "reading `/dev/urandom`".into())?;
    Ok(u64::from_ne_bytes(bytes))
}
