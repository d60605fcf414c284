//! What root remembers of a cluster's set-up on this host, beside the journal.
//!
//! A folder per cluster, `/run/pavo/<job>.<step>/`:
//!
//! ```text
//! state.json   root's: the ask, who keeps it alive, the guard     0600
//! essence      root's: the most needed of it, once more
//! host.json    the user's: interfaces and ports of the local VMs  0400
//! dial-NETWORK the user's: where connections to guests are asked for
//! ```
//!
//! It is made before anything of the cluster exists and removed after everything is
//! gone, so that what was left half done is always found by it. It comes and goes by
//! being renamed: `.new-<job>.<step>` and `.old-<job>.<step>` are of those who were
//! killed meanwhile.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::ask::Ask;
use super::wreck::Wreck;
use crate::error::{Context, Error, Result};
use crate::host::crash;
use crate::host::file::write_atomically;
use crate::host::process::{self, ProcessId};

/// Where the folders are.
pub const RUN_DIR: &str = "/run/pavo";
/// Where clusters' disks are while they run, a folder of the user's for each. On a disk:
/// overlays may grow to the size of the images.
pub const SCRATCH_DIR: &str = "/var/lib/pavo/run";

const PAUSE: Duration = Duration::from_millis(5);

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
    /// Nothing of it is left on this host, but its keys in the store could not be deleted
    /// yet.
    #[serde(default)]
    pub undone: bool,
    /// The set-up has not come to its end: other hosts wait for this one.
    #[serde(default)]
    pub pending: bool,
    /// Seconds of the epoch.
    #[serde(default)]
    pub since: u64,
}

/// Keeps other set-ups from choosing the same slot; ends with its holder.
///
/// The file that is locked holds Slurm's names of this host, a line each: by them control
/// groups are known as ours, also when nothing else is left.
#[derive(Debug)]
pub struct Claim {
    lock: Flock<File>,
}

/// Keeps others from removing the same cluster; ends with its holder.
#[derive(Debug)]
pub struct Removing {
    _lock: Flock<File>,
}

impl Claim {
    /// Waits for the lock; it is held for milliseconds.
    pub fn wait(patience: Duration) -> Result<Self> {
        let doing = || format!("locking `{RUN_DIR}`");
        make_dir(Path::new(RUN_DIR), 0o755)?;
        let path = Path::new(RUN_DIR).join("lock");
        let mut open = OpenOptions::new();
        let open = open.create(true).truncate(false).read(true).write(true).mode(0o600);
        let mut file = open.open(&path).while_doing(doing)?;
        let end = Instant::now() + patience;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self { lock }),
                Err((back, Errno::EWOULDBLOCK)) if Instant::now() < end => file = back,
                Err((_, Errno::EWOULDBLOCK)) => return Err(held(&path, patience)),
                Err((_, error)) => return Err(error).while_doing(doing),
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Remembers a name that Slurm has for this host.
    fn note(&mut self, node: &str) -> Result<()> {
        let mut known = String::new();
        let mut note = || {
            self.lock.rewind()?;
            self.lock.read_to_string(&mut known)?;
            if known.lines().any(|line| line == node) {
                return Ok(());
            }
            self.lock.write_all(format!("{node}\n").as_bytes())
        };
        note().while_doing(|| "noting the name of this host".into())
    }

    /// Removes what those left who were killed while a holding came or went.
    pub fn tidy(&self) -> Result<()> {
        for name in names()? {
            let half = [".new-", ".old-"].iter().any(|prefix| name.starts_with(prefix));
            let empty =
                parse(&name).is_some() && !Path::new(RUN_DIR).join(&name).join(STATE).exists();
            if half || empty {
                remove_tree(&Path::new(RUN_DIR).join(name))?;
            }
        }
        Ok(())
    }
}

/// The names that Slurm has had for this host since it booted.
pub fn node_names() -> Vec<String> {
    let text = fs::read_to_string(Path::new(RUN_DIR).join("lock")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// That another does not let go of a lock.
fn held(path: &Path, patience: Duration) -> Error {
    let (path, seconds) = (path.display(), patience.as_secs());
    Error::system(format!("another process of pavo has held `{path}` for {seconds} s"))
        .help(format!("an administrator sees which: `fuser -v {path}` there"))
}

/// In the folder of a step.
pub const STATE: &str = "state.json";
/// The same for who cannot read [`STATE`]: the slot, and the keeper's id and start time. Its
/// form never changes.
pub const ESSENCE: &str = "essence";

/// Reads an [`ESSENCE`].
pub fn parse_essence(text: &str) -> Option<(u32, ProcessId)> {
    let mut fields = text.split_ascii_whitespace();
    let slot = fields.next()?.parse().ok()?;
    let keeper =
        ProcessId { pid: fields.next()?.parse().ok()?, start_time: fields.next()?.parse().ok()? };
    Some((slot, keeper))
}

impl Holding {
    /// Notes that `ask` is about to be carried out, and chooses its slot below `slots`.
    ///
    /// # Errors
    /// When the job has a cluster already, or all slots are taken.
    pub fn begin(claim: &mut Claim, ask: &Ask, user: &str, slots: u32) -> Result<Self> {
        claim.note(&ask.node)?;
        let holding = Self::wanted(ask, user, slots)?;
        let new = Path::new(RUN_DIR).join(format!(".new-{}.{}", ask.job, ask.step));
        remove_tree(&new)?;
        make_dir(&new, 0o711)?;
        let essence =
            format!("{} {} {}\n", holding.slot, holding.keeper.pid, holding.keeper.start_time);
        let path = new.join(ESSENCE);
        // Nobody sees the folder before it has its name.
        fs::write(&path, essence).while_doing(|| format!("writing `{}`", path.display()))?;
        holding.write(&new)?;
        let dir = holding.dir();
        fs::rename(&new, &dir).while_doing(|| format!("creating `{}`", dir.display()))?;
        Ok(holding)
    }

    /// What [`begin`](Self::begin) would note.
    pub fn wanted(ask: &Ask, user: &str, slots: u32) -> Result<Self> {
        let keeper = process::identify(ask.keeper)
            .ok_or_else(|| Error::system(format!("the process of {ask} has ended")))?;
        let others = Self::all()?;
        if let Some(other) = others.iter().find(|other| other.ask.job == ask.job) {
            return Err(other.refuses(ask));
        }
        let wrecks = Wreck::all()?;
        if let Some(wreck) = wrecks.iter().find(|wreck| wreck.job == ask.job) {
            return Err(wreck.error());
        }
        let taken = others.iter().filter(|other| !other.undone).map(|other| other.slot);
        let taken: BTreeSet<u32> =
            taken.chain(wrecks.iter().filter_map(|wreck| wreck.slot)).collect();
        let slot = (0..slots).find(|slot| !taken.contains(slot)).ok_or_else(|| {
            Error::system(format!("{slots} clusters are on this host already")).help(
                "widen `ext-network` in networks.yaml, or `responder-uids` in batch.yaml: there \
                     is none left for another",
            )
        })?;
        let (ask, user) = (ask.clone(), user.to_owned());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (guard, stored, undone, since) = (None, false, false, now.as_secs());
        Ok(Self { ask, user, keeper, slot, guard, stored, undone, pending: true, since })
    }

    /// Why another step of the same job gets no cluster.
    fn refuses(&self, ask: &Ask) -> Error {
        let (job, step) = (ask.job, self.ask.step);
        if self.undone {
            return Error::system(format!("keys of step {job}.{step} are still in etcd"))
                .help("etcd did not answer when the step ended; start another job");
        }
        Error::usage(format!("job {job} has a cluster already, in its step {step}"))
            .help("a job has one cluster at a time; start another job for another cluster")
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
        self.write(&self.dir())
    }

    fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).expect("a holding is always valid JSON");
        write_atomically(&dir.join(STATE), &text, 0o600)
    }

    /// Waits for the right to remove it, and reads it again; `None` if somebody else has
    /// removed it meanwhile, and perhaps the step's next start has its place.
    pub async fn remove(&self, patience: Duration) -> Result<Option<(Self, Removing)>> {
        let dir = self.dir();
        let doing = || format!("locking `{}`", dir.display());
        let mut file = match File::open(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.while_doing(doing)?,
        };
        let end = Instant::now() + patience;
        let lock = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err((back, Errno::EWOULDBLOCK)) if Instant::now() < end => file = back,
                Err((_, Errno::EWOULDBLOCK)) => return Err(held(&dir, patience)),
                Err((_, error)) => return Err(error).while_doing(doing),
            }
            tokio::time::sleep(PAUSE).await;
        };
        let now = Self::of(self.ask.job, self.ask.step)?;
        let same = now.filter(|now| now.keeper == self.keeper && now.ask == self.ask);
        Ok(same.map(|now| (now, Removing { _lock: lock })))
    }

    /// The holding of a step, if it has one.
    pub fn of(job: u32, step: u32) -> Result<Option<Self>> {
        read(&run_dir(job, step))
    }

    /// Every holding on this host that can be read; of the others there is a [`Wreck`].
    pub fn all() -> Result<Vec<Self>> {
        let steps = steps()?.into_iter();
        Ok(steps.filter_map(|(job, step)| Self::of(job, step).ok().flatten()).collect())
    }

    /// Whether the step still runs here.
    pub fn alive(&self) -> bool {
        process::alive(&self.keeper)
    }

    /// Forgets it: everything else is gone.
    pub fn forget(&self) -> Result<()> {
        forget(self.ask.job, self.ask.step)
    }
}

/// Removes the folder of a step.
pub fn forget(job: u32, step: u32) -> Result<()> {
    let dir = run_dir(job, step);
    let old = Path::new(RUN_DIR).join(format!(".old-{job}.{step}"));
    remove_tree(&old)?;
    match fs::rename(&dir, &old) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        moved => moved.while_doing(|| format!("removing `{}`", dir.display()))?,
    }
    crash::point("release.forgotten")?;
    remove_tree(&old)
}

/// The jobs and steps that have a folder.
pub fn steps() -> Result<Vec<(u32, u32)>> {
    Ok(names()?.iter().filter_map(|name| parse(name)).collect())
}

/// What is in [`RUN_DIR`].
fn names() -> Result<Vec<String>> {
    names_in(Path::new(RUN_DIR))
}

/// What is in a folder that need not exist.
fn names_in(dir: &Path) -> Result<Vec<String>> {
    let doing = || format!("listing `{}`", dir.display());
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.while_doing(doing)?,
    };
    let name = |entry: std::io::Result<fs::DirEntry>| {
        entry.map(|entry| entry.file_name().to_string_lossy().into_owned()).while_doing(doing)
    };
    entries.map(name).collect()
}

/// Clusters' folders on the disk that no holding knows: of those who were running when the
/// host lost its power.
pub fn lost_scratch() -> Result<Vec<PathBuf>> {
    let dir = Path::new(SCRATCH_DIR);
    let steps = names_in(dir)?.into_iter().filter_map(|name| Some((parse(&name)?, name)));
    // A holding is there before its folder, and after it.
    let lost = steps.filter(|((job, step), _)| !run_dir(*job, *step).exists());
    Ok(lost.map(|(_, name)| dir.join(name)).collect())
}

/// Reads `<job>.<step>`.
fn parse(name: &str) -> Option<(u32, u32)> {
    let (job, step) = name.split_once('.')?;
    Some((job.parse().ok()?, step.parse().ok()?))
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
fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.while_doing(|| format!("removing `{}`", path.display())),
    }
}

fn read(dir: &Path) -> Result<Option<Holding>> {
    let path = dir.join(STATE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).while_doing(|| format!("reading `{}`", path.display())),
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        Error::system(format!("`{}` is damaged, or of another version of pavo", path.display()))
            .because(error)
    })
}
