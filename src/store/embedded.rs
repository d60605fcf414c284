//! The store of one machine: SQLite in WAL mode, one file per user, no daemon.
//!
//! ```text
//! <dir>/store.db         0600, in a directory 0700 of the caller; mtime: its last change
//! <dir>/store.db-wal     SQLite's, while somebody has the store open
//! <dir>/store.db-shm
//! ```
//!
//! Every process opens the file itself. [`table`] holds the SQL, [`watch`] what tells
//! processes of each other's changes, [`place`] where a store may lie.
//!
//! # Blocking
//!
//! SQLite is called inline, on the runtime's own thread: an operation takes tens of
//! microseconds, less than handing it to another thread and waking up for its answer.
//! Nothing waits inside: a lock that another process holds is tried again
//! from a timer, for [`PATIENCE`] at most, so that the runtime goes on meanwhile.
//!
//! # Durability
//!
//! `synchronous=NORMAL`: a process killed at any moment loses nothing that was
//! committed; a power cut may lose the last commits, along with the clusters they
//! are about. In exchange no commit waits for the disk.
//!
//! # Time
//!
//! Leases count on `CLOCK_BOOTTIME`, which all processes share, nobody sets and suspend
//! does not stop; with the boot's id, so that a lease never outlives its boot.

use std::fs::{self, OpenOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::{
    Change, Check, Commit, Entry, LeaseId, MAX_PAGE, Page, Revision, Store, Watch, adopt,
    check_schema, validate, validate_prefix,
};
use crate::error::{Context, Error, Result};
use table::{Outcome, Written};

mod place;
mod table;
mod watch;

pub use place::is_local;

const FILE: &str = "store.db";

/// How long a lock of another process is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// A handle of the store of one machine. Clones share its connection.
#[derive(Clone, Debug)]
pub struct Embedded(Arc<Db>);

#[derive(Debug)]
struct Db {
    connection: Mutex<Connection>,
    file: PathBuf,
    /// By which a file that was replaced is told from the one that is open.
    inode: u64,
    /// The id of this boot.
    boot: String,
}

/// Opens the store in `dir`; makes both if they do not exist.
///
/// # Errors
/// When `dir` belongs to somebody else, or others may write to it; when it lies on a
/// network file system; when the store is damaged, or of a newer pavo.
pub async fn open(dir: &Path) -> Result<Embedded> {
    let open = async {
        let dir = std::path::absolute(dir)?;
        place::prepare(&dir)?;
        let file = dir.join(FILE);
        if !file.try_exists()? {
            create(&file)?;
        }
        let store = Embedded(Arc::new(Db::open(file).await?));
        adopt(&store).await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(store)
    };
    open.await.while_doing(|| opening(dir))
}

/// Opens the store in `dir` if there is one; creates nothing else.
///
/// # Errors
/// Those of [`open`].
pub async fn open_existing(dir: &Path) -> Result<Option<Embedded>> {
    let open = async {
        let dir = std::path::absolute(dir)?;
        let file = dir.join(FILE);
        if !place::check(&dir)? || !file.try_exists()? {
            return Ok(None);
        }
        let store = Embedded(Arc::new(Db::open(file).await?));
        check_schema(&store).await?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Some(store))
    };
    open.await.while_doing(|| opening(dir))
}

fn opening(dir: &Path) -> String {
    format!("opening the store in `{}`", dir.display())
}

/// Makes an empty store. It is built aside and appears whole: whoever sees the
/// file can use it, and of several makers one wins.
fn create(file: &Path) -> Result<()> {
    let aside = file.with_extension(format!("db.{}.{}", std::process::id(), random()));
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)
        .while_doing(|| format!("creating `{}`", aside.display()))
        .and_then(|made| {
            drop(made);
            Connection::open(&aside)
                .and_then(|connection| table::create(&connection))
                .map_err(|error| explain(error, &aside))
        });
    let made = made.and_then(|()| match fs::hard_link(&aside, file) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).while_doing(|| format!("creating `{}`", file.display()))
        }
        _ => Ok(()),
    });
    for name in [aside.clone(), beside(&aside, "-wal"), beside(&aside, "-shm")] {
        // SQLite has removed its own; after a failure whatever is there is of no use.
        let _ = fs::remove_file(name);
    }
    made
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

impl Db {
    async fn open(file: PathBuf) -> Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection =
            Connection::open_with_flags(&file, flags).map_err(|error| explain(error, &file))?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .while_doing(|| "reading the id of this boot".into())?;
        let inode =
            fs::metadata(&file).while_doing(|| format!("looking at `{}`", file.display()))?.ino();
        let db =
            Self { connection: Mutex::new(connection), inode, boot: boot.trim().to_owned(), file };
        let (application, layout) = db.run(|connection| table::configure(connection)).await?;
        if application != table::APPLICATION {
            return Err(damaged(&db.file, "it was not written by pavo"));
        }
        if layout > table::LAYOUT {
            return Err(super::newer(layout, table::LAYOUT));
        }
        Ok(db)
    }

    /// Does `operation`, again while another process holds the lock it needs.
    async fn run<T>(
        &self,
        mut operation: impl FnMut(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A panic elsewhere has rolled its transaction back.
            let outcome =
                operation(&mut self.connection.lock().unwrap_or_else(PoisonError::into_inner));
            match outcome {
                Err(error) if is_busy(&error) && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_micros(500 + random() % 4000)).await;
                }
                outcome => return outcome.map_err(|error| explain(error, &self.file)),
            }
        }
    }

    /// [`run`](Self::run) for what may change the store: tells all watches.
    async fn write<T>(
        &self,
        mut operation: impl FnMut(&mut Connection) -> rusqlite::Result<Written<T>>,
    ) -> Result<T> {
        let written = self.run(&mut operation).await?;
        if written.changed {
            self.announce()?;
        }
        Ok(written.outcome)
    }

    /// Touches the file, which wakes who watches it ([`watch`]). By its name: closing a
    /// descriptor of the file would drop SQLite's locks on it.
    fn announce(&self) -> Result<()> {
        self.check_still_there()?;
        let now = TimeSpec::UTIME_NOW;
        let follow = UtimensatFlags::FollowSymlink;
        utimensat(nix::fcntl::AT_FDCWD, &self.file, &now, &now, follow)
            .while_doing(|| format!("announcing a change of `{}`", self.file.display()))
    }

    /// SQLite goes on with a file that was deleted, where nobody else sees it.
    fn check_still_there(&self) -> Result<()> {
        if fs::metadata(&self.file).is_ok_and(|found| found.ino() == self.inode) {
            return Ok(());
        }
        Err(Error::system(format!("the store `{}` was deleted while in use", self.file.display()))
            .help("end the clusters that still run, then start again"))
    }
}

impl Store for Embedded {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        let db = &self.0;
        let get = async move {
            db.run(|connection| table::get(connection, &db.boot, key))
                .await
                .while_doing(|| format!("reading `{key}`"))
        };
        get.boxed()
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page>> {
        let db = &self.0;
        let list = async move {
            validate_prefix(prefix)?;
            let (after, limit) = (after.unwrap_or(prefix).max(prefix), limit.clamp(1, MAX_PAGE));
            db.run(|connection| table::list(connection, &db.boot, prefix, after, limit))
                .await
                .while_doing(|| format!("listing `{prefix}`"))
        };
        list.boxed()
    }

    fn commit<'a>(
        &'a self,
        checks: &'a [Check],
        changes: &'a [Change],
    ) -> BoxFuture<'a, Result<Commit>> {
        let db = &self.0;
        let commit = async move {
            validate(checks, changes)?;
            let outcome = db
                .write(|connection| table::commit(connection, &db.boot, checks, changes))
                .await
                .while_doing(|| "changing the store".into())?;
            match outcome {
                Outcome::Done(revision) => Ok(Commit::Done(revision)),
                Outcome::Conflict(entries) => Ok(Commit::Conflict(entries)),
                Outcome::LeaseOver(LeaseId(id)) => {
                    Err(Error::not_found(format!("lease {id} has run out")))
                }
            }
        };
        commit.boxed()
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch>> {
        let watch = async move {
            validate_prefix(prefix)?;
            watch::start(self.0.clone(), prefix, after)
        };
        watch.boxed()
    }

    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>> {
        let db = &self.0;
        let lease = async move {
            db.run(|connection| table::lease(connection, &db.boot, ttl))
                .await
                .while_doing(|| "taking a lease".into())
        };
        lease.boxed()
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<bool>> {
        let db = &self.0;
        let keep = async move {
            db.run(|connection| table::keep_alive(connection, &db.boot, lease))
                .await
                .while_doing(|| "keeping a lease".into())
        };
        keep.boxed()
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>> {
        let db = &self.0;
        let revoke = async move {
            db.write(|connection| table::revoke(connection, &db.boot, lease))
                .await
                .while_doing(|| "ending a lease".into())
        };
        revoke.boxed()
    }
}

/// Spreads those who try again. Not for secrets.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

/// What SQLite's error means to the user of the store.
fn explain(error: rusqlite::Error, file: &Path) -> Error {
    let path = file.display();
    let dir = file.parent().unwrap_or(file).display();
    // SQLite has a code of its own for a full disk, but not where it grows the index of
    // the WAL (SQLITE_IOERR_SHMSIZE).
    let no_room_for_index = error.sqlite_error().is_some_and(|e| e.extended_code == 4874);
    let (what, help) = match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => (
            format!("`{path}` has been locked by another process for {} s", PATIENCE.as_secs()),
            format!("find a process that hangs: `fuser -v {path}`"),
        ),
        Some(ErrorCode::DiskFull) => (
            format!("no space is left for `{path}`"),
            format!("free some space where it lies: `df -h {dir}`"),
        ),
        Some(ErrorCode::SystemIoFailure) if no_room_for_index => (
            format!("no space is left beside `{path}`"),
            format!("free some space where it lies: `df -h {dir}`"),
        ),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            return damaged(file, "its contents make no sense").because(error);
        }
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => (
            format!("`{path}` cannot be written"),
            format!("see who may write there: `ls -la {dir}`"),
        ),
        Some(ErrorCode::SystemIoFailure) => (
            format!("the disk refused to read or write `{path}`"),
            format!("look for a full quota (`quota`) and at the disk (`dmesg`); or move `{dir}`"),
        ),
        _ => return Error::bug(format!("the store `{path}` misunderstood us")).because(error),
    };
    Error::system(what).help(help).because(error)
}

fn damaged(file: &Path, how: &str) -> Error {
    let path = file.display();
    Error::system(format!("`{path}` is damaged: {how}")).help(format!(
        "end your clusters, then put it aside and start with an empty store: `mv {path} {path}.bad`"
    ))
}

#[cfg(test)]
mod tests;
