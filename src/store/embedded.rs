//! The store of one user on one machine: a SQLite file in WAL mode.
//!
//! Several processes use it at once. Calls run inline on the calling thread: a commit
//! takes well under a millisecond, waits for other writers are as short, and a thread of
//! its own would cost more than it saves.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::time::{ClockId, clock_gettime};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use super::schema::{self, explain};
use super::watch::Watcher;
use super::{
    Change, Check, Commit, Entry, LeaseId, MAX_PAGE, Page, Revision, Store, Watch, prefix_end,
    within_limits,
};
use crate::error::{Context, Error, Result};

/// How many revisions back a watch may resume.
const HISTORY: u64 = 20_000;
/// History is pruned at every so many revisions.
const PRUNE_EVERY: u64 = 500;

/// A handle on the store's file.
pub struct Embedded {
    dir: PathBuf,
    connection: Mutex<Connection>,
    /// Tells a lease of this boot from one before it.
    boot: String,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "store in {}", self.dir.display())
    }
}

/// Opens the store in `dir`, making both if there is none.
///
/// # Errors
/// The directory is not ours alone or lies on a network file system; the file is
/// damaged, of a newer version, or held by a stopped process; the disk is full.
pub async fn open(dir: &Path) -> Result<Embedded> {
    let connection = schema::connect(dir, true)?;
    Embedded::new(dir, connection.ok_or_else(|| Error::bug("a store was not created"))?)
}

/// Opens the store in `dir` if there is one; creates nothing.
pub async fn open_existing(dir: &Path) -> Result<Option<Embedded>> {
    schema::connect(dir, false)?.map(|connection| Embedded::new(dir, connection)).transpose()
}

/// Whether a store may lie on the file system of `path`.
pub fn is_local(path: &Path) -> bool {
    matches!(schema::network_file_system_of(path), Ok(None))
}

impl Embedded {
    fn new(dir: &Path, connection: Connection) -> Result<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .while_doing(|| "reading the boot id".into())?;
        let boot = boot.trim().to_owned();
        Ok(Self { dir: dir.to_owned(), connection: Mutex::new(connection), boot })
    }

    pub(super) fn connection(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere leaves a rolled-back connection, which is fit for use.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another handle on the same file.
    pub(super) fn reopen(&self) -> Result<Self> {
        let connection = schema::connect(&self.dir, false)?;
        let gone = || Error::system(format!("the store in `{}` is gone", self.dir.display()));
        Self::new(&self.dir, connection.ok_or_else(gone)?)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Deletes what hangs on expired leases, so that watches see it go.
    pub(super) fn expire(&self) -> Result<()> {
        let expired: bool = self
            .connection()
            .query_row(
                "SELECT EXISTS (SELECT 1 FROM leases WHERE boot <> ?1 OR expires <= ?2)",
                params![self.boot, uptime()?],
                |row| row.get(0),
            )
            .map_err(explain)?;
        if expired { self.write(|_, _| Ok(true)).map(drop) } else { Ok(()) }
    }

    /// Runs `change` in a transaction at a fresh revision, after expired leases are gone.
    /// It says whether it did anything (`false` rolls back).
    fn write(
        &self,
        change: impl FnOnce(&Transaction<'_>, &mut Log<'_>) -> Result<bool>,
    ) -> Result<Option<Revision>> {
        let mut connection = self.connection();
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(explain)?;
        let last = counter(&transaction, "revision")?;
        let mut log = Log { transaction: &transaction, revision: last + 1, number: 0 };
        log.delete_expired(&self.boot)?;
        if !change(&transaction, &mut log)? {
            return Ok(None);
        }
        let revision = log.revision;
        let done = if log.number > 0 { revision } else { last };
        if done == revision {
            set_counter(&transaction, "revision", revision)?;
            if revision % PRUNE_EVERY == 0 {
                prune(&transaction, revision)?;
            }
        }
        transaction.commit().map_err(explain)?;
        Ok(Some(done))
    }

    fn read_page(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page> {
        let mut connection = self.connection();
        // One transaction, so that the entries and the revision belong together.
        let transaction = connection.transaction().map_err(explain)?;
        let revision = counter(&transaction, "revision")?;
        let limit = limit.min(MAX_PAGE);
        let end = prefix_end(prefix).and_then(|end| String::from_utf8(end).ok());
        let mut statement = transaction
            .prepare_cached(
                "SELECT key, value, revision, created, lease FROM entries
                 WHERE key >= ?1 AND key > ?2 AND (?3 IS NULL OR key < ?3)
                   AND (lease IS NULL OR lease IN
                        (SELECT id FROM leases WHERE boot = ?4 AND expires > ?5))
                 ORDER BY key LIMIT ?6",
            )
            .map_err(explain)?;
        let from = after.unwrap_or("");
        let most = i64::try_from(limit + 1).unwrap_or(i64::MAX);
        let rows = statement
            .query_map(params![prefix, from, end, self.boot, uptime()?, most], entry)
            .map_err(explain)?;
        let mut entries = rows.collect::<Result<Vec<_>, _>>().map_err(explain)?;
        let more = entries.len() > limit;
        entries.truncate(limit);
        Ok(Page { entries, more, revision })
    }

    fn read(&self, key: &str) -> Result<Option<Entry>> {
        self.connection()
            .prepare_cached(
                "SELECT key, value, revision, created, lease FROM entries WHERE key = ?1
                   AND (lease IS NULL OR lease IN
                        (SELECT id FROM leases WHERE boot = ?2 AND expires > ?3))",
            )
            .and_then(|mut statement| {
                let now = uptime().unwrap_or(i64::MAX);
                statement.query_row(params![key, self.boot, now], entry).optional()
            })
            .map_err(explain)
    }

    fn try_commit(&self, checks: &[Check], changes: &[Change]) -> Result<Commit> {
        within_limits(checks, changes)?;
        let mut found = Vec::new();
        let done = self.write(|transaction, log| {
            let mut hold = true;
            for check in checks {
                let now = current(transaction, check.key())?;
                hold &= match check {
                    Check::Absent(_) => now.is_none(),
                    Check::Exists(_) => now.is_some(),
                    Check::Revision(_, at) => now.as_ref().is_some_and(|e| e.revision == *at),
                };
                found.extend(now);
            }
            if hold {
                for change in changes {
                    log.apply(change)?;
                }
            }
            Ok(hold)
        })?;
        Ok(done.map_or(Commit::Conflict(found), Commit::Done))
    }
}

/// Writes entries and the history of it, under one revision.
struct Log<'a> {
    transaction: &'a Transaction<'a>,
    revision: Revision,
    number: u64,
}

impl Log<'_> {
    fn apply(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::Put { key, value, lease } => self.put(key, value, *lease),
            Change::Delete { key } => self.delete(key),
            Change::DeletePrefix { prefix } => {
                let end = prefix_end(prefix).and_then(|end| String::from_utf8(end).ok());
                let keys = self.keys(
                    "SELECT key FROM entries WHERE key >= ?1 AND (?2 IS NULL OR key < ?2)",
                    params![prefix, end],
                )?;
                keys.iter().try_for_each(|key| self.delete(key))
            }
        }
    }

    fn put(&mut self, key: &str, value: &[u8], lease: Option<LeaseId>) -> Result<()> {
        if let Some(LeaseId(id)) = lease {
            let exists = self
                .transaction
                .query_row("SELECT 1 FROM leases WHERE id = ?1", [id], |_| Ok(()))
                .optional()
                .map_err(explain)?;
            if exists.is_none() {
                return Err(expired(LeaseId(id)));
            }
        }
        let before = current(self.transaction, key)?;
        let created = before.map_or(self.revision, |entry| entry.created);
        let lease = lease.map(|lease| lease.0);
        let (revision, made) = (signed(self.revision), signed(created));
        self.transaction
            .prepare_cached("INSERT OR REPLACE INTO entries VALUES (?1, ?2, ?3, ?4, ?5)")
            .and_then(|mut put| put.execute(params![key, value, revision, made, lease]))
            .map_err(explain)?;
        self.record(key, Some(value), Some(made), lease)
    }

    fn delete(&mut self, key: &str) -> Result<()> {
        let deleted = self
            .transaction
            .prepare_cached("DELETE FROM entries WHERE key = ?1")
            .and_then(|mut delete| delete.execute([key]))
            .map_err(explain)?;
        if deleted == 0 { Ok(()) } else { self.record(key, None, None, None) }
    }

    fn record(
        &mut self,
        key: &str,
        value: Option<&[u8]>,
        created: Option<i64>,
        lease: Option<i64>,
    ) -> Result<()> {
        self.number += 1;
        self.transaction
            .prepare_cached("INSERT INTO changes VALUES (?1, ?2, ?3, ?4, ?5, ?6)")
            .and_then(|mut insert| {
                let (revision, number) = (signed(self.revision), signed(self.number));
                insert.execute(params![revision, number, key, value, created, lease])
            })
            .map_err(explain)
            .map(drop)
    }

    fn keys(&self, query: &str, values: impl rusqlite::Params) -> Result<Vec<String>> {
        let mut statement = self.transaction.prepare_cached(query).map_err(explain)?;
        let rows = statement.query_map(values, |row| row.get(0)).map_err(explain)?;
        rows.collect::<Result<_, _>>().map_err(explain)
    }

    fn delete_expired(&mut self, boot: &str) -> Result<()> {
        let over = "SELECT id FROM leases WHERE boot <> ?1 OR expires <= ?2";
        let now = uptime()?;
        let keys = self.keys(
            &format!("SELECT key FROM entries WHERE lease IN ({over})"),
            params![boot, now],
        )?;
        keys.iter().try_for_each(|key| self.delete(key))?;
        self.transaction
            .execute("DELETE FROM leases WHERE boot <> ?1 OR expires <= ?2", params![boot, now])
            .map_err(explain)
            .map(drop)
    }
}

fn expired(lease: LeaseId) -> Error {
    Error::not_found(format!("lease {} has expired", lease.0))
}

/// The entry under a key inside a transaction, where expired ones are gone already.
fn current(transaction: &Transaction<'_>, key: &str) -> Result<Option<Entry>> {
    transaction
        .prepare_cached("SELECT key, value, revision, created, lease FROM entries WHERE key = ?1")
        .and_then(|mut statement| statement.query_row([key], entry).optional())
        .map_err(explain)
}

pub(super) fn entry(row: &Row<'_>) -> rusqlite::Result<Entry> {
    Ok(Entry {
        key: row.get(0)?,
        value: row.get(1)?,
        revision: unsigned(row.get(2)?),
        created: unsigned(row.get(3)?),
        lease: row.get::<_, Option<i64>>(4)?.map(LeaseId),
    })
}

/// SQLite's integers are signed; a revision never gets that far.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(super) fn counter(connection: &Connection, name: &str) -> Result<u64> {
    connection
        .prepare_cached("SELECT value FROM counters WHERE name = ?1")
        .and_then(|mut get| get.query_row([name], |row| row.get::<_, i64>(0)))
        .map(unsigned)
        .map_err(explain)
}

fn set_counter(transaction: &Transaction<'_>, name: &str, value: u64) -> Result<()> {
    transaction
        .execute("UPDATE counters SET value = ?2 WHERE name = ?1", params![name, signed(value)])
        .map_err(explain)
        .map(drop)
}

fn prune(transaction: &Transaction<'_>, revision: Revision) -> Result<()> {
    let keep_after = revision.saturating_sub(HISTORY);
    transaction
        .execute("DELETE FROM changes WHERE revision <= ?1", [signed(keep_after)])
        .map_err(explain)?;
    set_counter(transaction, "pruned", keep_after)
}

/// Milliseconds since boot, sleep included: the same for all processes, and no clock
/// that anybody sets.
fn uptime() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).while_doing(|| "reading the clock".into())?;
    Ok(now.tv_sec() * 1000 + now.tv_nsec() / 1_000_000)
}

fn milliseconds(ttl: Duration) -> i64 {
    i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX / 2).clamp(1, i64::MAX / 2)
}

impl Store for Embedded {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        Box::pin(async move { self.read(key) })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page>> {
        Box::pin(async move { self.read_page(prefix, after, limit) })
    }

    fn commit<'a>(
        &'a self,
        checks: &'a [Check],
        changes: &'a [Change],
    ) -> BoxFuture<'a, Result<Commit>> {
        Box::pin(async move { self.try_commit(checks, changes) })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn Watch>>> {
        Box::pin(async move {
            let watcher = Watcher::new(self.reopen()?, prefix, after)?;
            Ok(Box::new(watcher) as Box<dyn Watch>)
        })
    }

    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>> {
        Box::pin(async move {
            let (now, ttl) = (uptime()?, milliseconds(ttl));
            let connection = self.connection();
            connection
                .execute(
                    "INSERT INTO leases (boot, ttl, expires) VALUES (?1, ?2, ?3)",
                    params![self.boot, ttl, now.saturating_add(ttl)],
                )
                .map_err(explain)?;
            Ok(LeaseId(connection.last_insert_rowid()))
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let kept = self
                .connection()
                .execute(
                    "UPDATE leases SET expires = ?2 + ttl
                     WHERE id = ?1 AND boot = ?3 AND expires > ?2",
                    params![lease.0, uptime()?, self.boot],
                )
                .map_err(explain)?;
            if kept == 1 { Ok(()) } else { Err(expired(lease)) }
        })
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.write(|transaction, log| {
                let keys =
                    log.keys("SELECT key FROM entries WHERE lease = ?1", params![lease.0])?;
                keys.iter().try_for_each(|key| log.delete(key))?;
                transaction
                    .execute("DELETE FROM leases WHERE id = ?1", [lease.0])
                    .map_err(explain)?;
                Ok(true)
            })
            .map(drop)
        })
    }
}
