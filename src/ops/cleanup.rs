//! Removing what a job left: its files, its record, its objects on the host.
//!
//! The launcher does it at the end, the cell if the launcher is gone, and every
//! command that looks at jobs if both are. All of it is idempotent: several may do
//! it at once.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::reach::is_ours;
use crate::error::{Context, Result};
use crate::host::{Host, journal::Journal, process};
use crate::model::job::JobRecord;
use crate::model::owner::Owner;
use crate::store::{Change, Check, Commit, Store, embedded, get_json, keys};

/// Where root's plans are remembered, and namespaces named.
pub const JOURNAL_DIR: &str = "/run/pavo/journal";
pub const NETNS_DIR: &str = "/run/netns";

/// What of a job lies in files and in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFiles {
    pub owner: Owner,
    pub user: String,
    pub dir: PathBuf,
    pub store: PathBuf,
}

/// Removes the job's directory, then its record: while there is a file there is a
/// record that leads to it.
pub async fn remove(files: &JobFiles) -> Result<()> {
    remove_dir(&files.dir)?;
    match embedded::open_existing(&files.store).await? {
        Some(store) => forget_all(&store, &files.user, files.owner).await,
        None => Ok(()),
    }
}

/// Deletes what is stored of a job, but for its claims to persistent drives. Those end with
/// their lease: on a host that nobody reaches any more its guests may still write.
pub async fn forget(store: &dyn Store, user: &str, owner: Owner) -> Result<()> {
    let prefix = keys::job(user, owner);
    store.commit(&[], &[Change::DeletePrefix { prefix }]).await.map(drop)
}

/// As [`forget`], but only what this start of the job has stored: the scheduler may have begun
/// it again under the same id.
pub async fn forget_start(store: &dyn Store, job: &JobRecord) -> Result<()> {
    let key = keys::job_record(&job.user, job.owner);
    loop {
        let Some((stored, revision)) = get_json::<JobRecord>(store, &key).await? else {
            return Ok(());
        };
        if (&stored.host, stored.launcher) != (&job.host, job.launcher) {
            return Ok(());
        }
        let ours = [Check::Revision(key.clone(), revision)];
        let prefix = keys::job(&job.user, job.owner);
        match store.commit(&ours, &[Change::DeletePrefix { prefix }]).await? {
            Commit::Done(_) => return Ok(()),
            // Changed meanwhile: by whom?
            Commit::Conflict(_) => {}
        }
    }
}

/// Deletes all that is stored of a job of this machine: its guests ended with its launcher.
async fn forget_all(store: &dyn Store, user: &str, owner: Owner) -> Result<()> {
    let places = [keys::job(user, owner), keys::job_drives(user, owner)];
    let changes = places.map(|prefix| Change::DeletePrefix { prefix });
    store.commit(&[], &changes).await.map(drop)
}

/// Removes a job's directory, whoever else does.
pub fn remove_dir(dir: &Path) -> Result<()> {
    // Two that clean at once trip over each other's deletions: try again.
    for _ in 0..20 {
        match std::fs::remove_dir_all(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound && !dir.exists() => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
            Err(error) => {
                return Err(error).while_doing(|| format!("removing `{}`", dir.display()));
            }
        }
    }
    Ok(())
}

/// How old a folder is before its launcher must have locked it, or is dead.
const SETTLED: Duration = Duration::from_secs(60);

/// Removes what killed launchers of ours left beside `dir`, a job's directory: each holds a
/// lock on its own. Trouble is not the caller's.
pub fn sweep_dirs(dir: &Path) {
    let entries = dir.parent().and_then(|tmp| std::fs::read_dir(tmp).ok()).into_iter().flatten();
    for entry in entries.flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_str().is_some_and(is_job_dir) && is_ours(&path);
        let age = entry.metadata().and_then(|about| about.modified()).map(|at| at.elapsed());
        if !ours || !matches!(age, Ok(Ok(age)) if age > SETTLED) {
            continue;
        }
        remove_unlocked(&path);
    }
}

/// Removes the folders in `tmp` of a job whose launcher has just died.
pub fn remove_dirs_of(job: u32, tmp: &Path) {
    let prefix = format!("pavo-{job}-");
    for entry in std::fs::read_dir(tmp).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_it = |name: &str| name.starts_with(&prefix) && is_job_dir(name);
        if name.to_str().is_some_and(is_it) && is_ours(&entry.path()) {
            remove_unlocked(&entry.path());
        }
    }
}

/// Removes a job's directory if no launcher has locked it. Trouble is not the caller's.
fn remove_unlocked(dir: &Path) {
    let Ok(file) = std::fs::File::open(dir) else { return };
    if Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok() {
        if let Err(error) = remove_dir(dir) {
            tracing::info!("{}", error.report());
        }
    }
}

/// Whether this is the name of a job's directory, `pavo-42-0123abcd`.
fn is_job_dir(name: &str) -> bool {
    let parts = name.strip_prefix("pavo-").and_then(|rest| rest.split_once('-'));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    parts.is_some_and(|(job, nonce)| {
        digits(job) && nonce.len() == 8 && nonce.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

/// Removes every job of `user` whose launcher is gone, and returns the others.
pub async fn sweep(store: &dyn Store, user: &str) -> Result<Vec<JobRecord>> {
    let mut alive = Vec::new();
    for job in super::jobs::stored(store, user).await? {
        let remains = &job.remains;
        if process::alive(&remains.launcher) {
            alive.push(job.record()?);
        } else {
            tracing::info!("removing what job {} left", remains.owner.job);
            remove_dir(&remains.dir)?;
            forget_all(store, user, remains.owner).await?;
        }
    }
    Ok(alive)
}

/// As root: undoes the plans of jobs whose launcher is gone.
pub async fn sweep_host() -> Result<()> {
    let journal = Journal::open(JOURNAL_DIR)?;
    journal.sweep(&Host::new(NETNS_DIR.into())).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_start_that_ends_late_leaves_the_next_one_its_record() {
        let temp = tempfile::tempdir().unwrap();
        let store = embedded::open(&temp.path().join("state")).await.unwrap();
        let owner = Owner::local(3);
        let start = |pid: i32| -> JobRecord {
            let record = serde_json::json!({
                "version": 1, "owner": owner, "name": "x", "user": "alice", "definition": "tiny",
                "started": 1, "time_limit": null, "launcher": { "pid": pid, "start_time": 1 },
                "dir": temp.path(), "host": "login", "vms": [],
            });
            serde_json::from_value(record).unwrap()
        };
        let [earlier, later] = [7, 8].map(start);
        let key = keys::job_record("alice", owner);
        let put = Change::put_json(key.clone(), &later).unwrap();
        assert!(matches!(store.commit(&[], &[put]).await.unwrap(), Commit::Done(_)));
        forget_start(&store, &earlier).await.unwrap();
        assert!(store.get(&key).await.unwrap().is_some());
        forget_start(&store, &later).await.unwrap();
        assert!(store.get(&key).await.unwrap().is_none());
        // Once more is no error.
        forget_start(&store, &later).await.unwrap();
    }

    #[tokio::test]
    async fn what_a_job_of_another_version_left_is_removed() {
        let temp = tempfile::tempdir().unwrap();
        let store = embedded::open(&temp.path().join("state")).await.unwrap();
        let dir = temp.path().join("job");
        std::fs::create_dir(&dir).unwrap();
        let (owner, dead) = (Owner::local(3), serde_json::json!({ "pid": 1, "start_time": 1 }));
        let record =
            serde_json::json!({ "version": 9, "owner": owner, "launcher": dead, "dir": dir });
        let key = keys::job_record("alice", owner);
        let put = Change::put_json(key, &record).unwrap();
        let done = store.commit(&[], &[put]).await.unwrap();
        assert!(matches!(done, crate::store::Commit::Done(_)));
        assert!(sweep(&store, "alice").await.unwrap().is_empty());
        assert!(!dir.exists());
        assert!(super::super::jobs::stored(&store, "alice").await.unwrap().is_empty());
    }
}
