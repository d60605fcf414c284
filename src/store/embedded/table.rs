//! The tables of the embedded store, and each operation as one transaction on them.
//!
//! ```text
//! entry    what there is                     state   the revision, and where history begins
//! change   the latest changes, for watches   lease   until when entries live
//! ```
//!
//! Readers do not see entries whose lease has run out; the next writer, whoever it is,
//! first deletes them, as a commit of its own. So a writer sees only live leases.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use rusqlite::{Connection, OptionalExtension, Result, Row, Transaction, TransactionBehavior};

use super::super::{Change, Check, Entry, Event, LeaseId, Page, Revision, Seen};

/// "pavo", in the file's header.
pub const APPLICATION: u32 = 0x7061_766f;

/// The version of the tables, in the file's header.
pub const LAYOUT: u32 = 1;

/// How many commits, and how many bytes of them, a watch may lag behind.
const HISTORY: i64 = 4096;
const HISTORY_BYTES: i64 = 4 << 20;

/// A page, or what a watch reads at once, ends after so many bytes: an answer of etcd
/// may have 4 MiB, and a single value can have 1.5.
const ANSWER_BYTES: usize = 1 << 20;

/// What a row of `change` takes beyond its key and value, roughly.
const CHANGE_BYTES: usize = 48;

const TABLES: &str = "
    CREATE TABLE entry (
        key TEXT NOT NULL PRIMARY KEY, value BLOB NOT NULL,
        revision INTEGER NOT NULL, created INTEGER NOT NULL, lease INTEGER);
    CREATE INDEX entry_lease ON entry (lease) WHERE lease IS NOT NULL;
    -- value NULL: deleted. upto: all bytes that were ever written, up to this row.
    CREATE TABLE change (
        revision INTEGER NOT NULL, seq INTEGER NOT NULL, upto INTEGER NOT NULL,
        key TEXT NOT NULL, created INTEGER, lease INTEGER, value BLOB,
        PRIMARY KEY (revision, seq)) WITHOUT ROWID;
    -- expires, ttl: milliseconds. AUTOINCREMENT: no id is used again.
    CREATE TABLE lease (
        id INTEGER PRIMARY KEY AUTOINCREMENT, boot TEXT NOT NULL,
        expires INTEGER NOT NULL, ttl INTEGER NOT NULL);
    -- compacted: changes up to this revision are forgotten.
    CREATE TABLE state (
        one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL,
        compacted INTEGER NOT NULL, written INTEGER NOT NULL);
    INSERT INTO state VALUES (1, 0, 0, 0);";

/// Whether an entry is there at the time ?2 of the boot ?1.
macro_rules! entries_where {
    ($rest:literal) => {
        concat!(
            "SELECT key, value, revision, created, lease FROM entry WHERE (lease IS NULL OR lease",
            " IN (SELECT id FROM lease WHERE boot = ?1 AND expires > ?2)) AND ",
            $rest
        )
    };
}

/// What an operation gave, and whether watches have something to see.
#[derive(Debug)]
pub struct Written<T> {
    pub outcome: T,
    pub changed: bool,
}

#[derive(Debug)]
pub enum Outcome {
    Done(Revision),
    Conflict(Vec<Entry>),
    LeaseOver(LeaseId),
}

/// What a watch reads at once.
#[derive(Debug)]
pub struct News {
    pub seen: Vec<Seen>,
    /// From where to read next.
    pub after: Revision,
    /// When the next lease runs out, if somebody else does not keep it.
    pub expiry: Option<Duration>,
}

/// Writes the file itself, which is an error where there is no room. WAL comes last: what
/// lay in the log would be copied to the file at closing, where SQLite tells of no failure.
pub fn create(connection: &Connection) -> Result<()> {
    connection.pragma_update(None, "journal_mode", "MEMORY")?;
    connection.execute_batch(&format!(
        "BEGIN; {TABLES} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {LAYOUT}; COMMIT;"
    ))?;
    connection.pragma_update(None, "journal_mode", "WAL")
}

/// Sets what SQLite does not keep in the file; returns what its header says.
pub fn configure(connection: &Connection) -> Result<(u32, u32)> {
    // Waiting is the caller's: it does not block.
    connection.busy_timeout(Duration::ZERO)?;
    // 256 KiB of pages: the store is small, and so are we.
    connection.execute_batch("PRAGMA synchronous = NORMAL; PRAGMA cache_size = -256;")?;
    let header = |name| connection.pragma_query_value(None, name, |row| row.get(0));
    Ok((header("application_id")?, header("user_version")?))
}

pub fn get(connection: &Connection, boot: &str, key: &str) -> Result<Option<Entry>> {
    connection
        .prepare_cached(entries_where!("key = ?3"))?
        .query_row((boot, now(), key), entry)
        .optional()
}

pub fn list(
    connection: &mut Connection,
    boot: &str,
    prefix: &str,
    after: &str,
    limit: usize,
) -> Result<Page> {
    let tx = connection.transaction()?;
    let revision = State::read(&tx)?.revision;
    let mut page = Page { entries: Vec::new(), revision: unsigned(revision), more: false };
    let mut statement = tx.prepare_cached(entries_where!("key > ?3 AND key < ?4 ORDER BY key"))?;
    let mut rows = statement.query((boot, now(), after, end(prefix)))?;
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        if page.entries.len() == limit || bytes > ANSWER_BYTES {
            page.more = true;
            break;
        }
        let entry = entry(row)?;
        bytes += entry.key.len() + entry.value.len();
        page.entries.push(entry);
    }
    Ok(page)
}

pub fn commit(
    connection: &mut Connection,
    boot: &str,
    checks: &[Check],
    changes: &[Change],
) -> Result<Written<Outcome>> {
    let mut writer = Writer::begin(connection, boot)?;
    let mut failed = false;
    let mut current = Vec::new();
    for check in checks {
        let entry = get(&writer.tx, boot, check.key())?;
        failed |= match check {
            Check::Absent(_) => entry.is_some(),
            Check::Exists(_) => entry.is_none(),
            Check::Revision(_, revision) => entry.as_ref().map(|e| e.revision) != Some(*revision),
        };
        current.extend(entry);
    }
    if failed {
        current.sort_by(|a, b| a.key.cmp(&b.key));
        current.dedup_by(|a, b| a.key == b.key);
        return writer.finish(Outcome::Conflict(current));
    }
    for change in changes {
        if let Change::Put { lease: Some(lease), .. } = change
            && !writer.knows(*lease)?
        {
            return writer.finish(Outcome::LeaseOver(*lease));
        }
    }
    writer.begin_commit();
    for change in changes {
        match change {
            Change::Put { key, value, lease } => writer.put(key, value, *lease)?,
            Change::Delete { key } => writer.delete(key)?,
            Change::DeletePrefix { prefix } => writer.delete_prefix(prefix)?,
        }
    }
    writer.end_commit();
    let revision = unsigned(writer.state.revision);
    writer.finish(Outcome::Done(revision))
}

pub fn news(
    connection: &mut Connection,
    boot: &str,
    prefix: &str,
    after: Revision,
) -> Result<News> {
    let tx = connection.transaction()?;
    let state = State::read(&tx)?;
    if signed(after) < state.compacted || signed(after) > state.revision {
        return Ok(News { seen: vec![Seen::HistoryLost], after, expiry: None });
    }
    let mut news =
        News { seen: Vec::new(), after: unsigned(state.revision), expiry: next_expiry(&tx, boot)? };
    let mut statement = tx.prepare_cached(
        "SELECT key, value, revision, created, lease FROM change \
         WHERE revision > ?1 AND key > ?2 AND key < ?3 ORDER BY revision, seq",
    )?;
    let mut rows = statement.query((signed(after), prefix, end(prefix)))?;
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        let key: String = row.get(0)?;
        let value: Option<Vec<u8>> = row.get(1)?;
        let this = unsigned(row.get(2)?);
        let size = key.len() + value.as_ref().map_or(0, Vec::len);
        let event = match value {
            Some(_) => Event::Put(entry(row)?),
            None => Event::Delete { key, revision: this },
        };
        match news.seen.last_mut() {
            Some(Seen::Changes { revision, events }) if *revision == this => events.push(event),
            Some(Seen::Changes { revision, .. }) if bytes > ANSWER_BYTES => {
                news.after = *revision;
                break;
            }
            _ => news.seen.push(Seen::Changes { revision: this, events: vec![event] }),
        }
        bytes += size;
    }
    Ok(news)
}

/// Deletes what leases that have run out held.
pub fn expire(connection: &mut Connection, boot: &str) -> Result<Written<()>> {
    Writer::begin(connection, boot)?.finish(())
}

pub fn lease(connection: &Connection, boot: &str, ttl: Duration) -> Result<LeaseId> {
    let ttl = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
    let expires = now().saturating_add(ttl);
    connection.execute(
        "INSERT INTO lease (boot, expires, ttl) VALUES (?1, ?2, ?3)",
        (boot, expires, ttl),
    )?;
    Ok(LeaseId(connection.last_insert_rowid()))
}

pub fn keep_alive(connection: &Connection, boot: &str, lease: LeaseId) -> Result<bool> {
    let kept = connection.execute(
        "UPDATE lease SET expires = ?2 + ttl WHERE id = ?3 AND boot = ?1 AND expires > ?2",
        (boot, now(), lease.0),
    )?;
    Ok(kept == 1)
}

pub fn revoke(connection: &mut Connection, boot: &str, lease: LeaseId) -> Result<Written<()>> {
    let mut writer = Writer::begin(connection, boot)?;
    writer.drop_leases(&[lease.0])?;
    writer.finish(())
}

/// A transaction that changes the store.
struct Writer<'c> {
    tx: Transaction<'c>,
    /// As it was when the transaction began.
    before: State,
    state: State,
    /// How many changes the commit in the making has.
    seq: i64,
}

impl<'c> Writer<'c> {
    fn begin(connection: &'c mut Connection, boot: &str) -> Result<Self> {
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let state = State::read(&tx)?;
        let mut writer = Self { tx, before: state, state, seq: 0 };
        // The time is taken now, with the lock held: a lease that is alive for this
        // writer was alive for all before it.
        let over: Vec<i64> = writer
            .tx
            .prepare_cached("SELECT id FROM lease WHERE boot <> ?1 OR expires <= ?2")?
            .query_map((boot, now()), |row| row.get(0))?
            .collect::<Result<_>>()?;
        writer.drop_leases(&over)?;
        Ok(writer)
    }

    fn begin_commit(&mut self) {
        self.seq = 0;
    }

    fn end_commit(&mut self) {
        self.state.revision += i64::from(self.seq > 0);
    }

    fn knows(&self, lease: LeaseId) -> Result<bool> {
        self.tx.prepare_cached("SELECT 1 FROM lease WHERE id = ?1")?.exists([lease.0])
    }

    fn drop_leases(&mut self, leases: &[i64]) -> Result<()> {
        self.begin_commit();
        for lease in leases {
            let keys = self
                .tx
                .prepare_cached("DELETE FROM entry WHERE lease = ?1 RETURNING key")?
                .query_map([lease], |row| row.get(0))?
                .collect::<Result<Vec<String>>>()?;
            self.record_deleted(keys)?;
            self.tx.execute("DELETE FROM lease WHERE id = ?1", [lease])?;
        }
        self.end_commit();
        Ok(())
    }

    fn put(&mut self, key: &str, value: &[u8], lease: Option<LeaseId>) -> Result<()> {
        let lease = lease.map(|lease| lease.0);
        let created = self
            .tx
            .prepare_cached(
                "INSERT INTO entry (key, value, revision, created, lease) \
                 VALUES (?1, ?2, ?3, ?3, ?4) ON CONFLICT (key) DO UPDATE SET \
                 value = excluded.value, revision = excluded.revision, lease = excluded.lease \
                 RETURNING created",
            )?
            .query_row((key, value, self.state.revision + 1, lease), |row| row.get(0))?;
        self.record(key, Some(value), Some(created), lease)
    }

    fn delete(&mut self, key: &str) -> Result<()> {
        let deleted = self.tx.prepare_cached("DELETE FROM entry WHERE key = ?1")?.execute([key])?;
        if deleted == 0 { Ok(()) } else { self.record(key, None, None, None) }
    }

    fn delete_prefix(&mut self, prefix: &str) -> Result<()> {
        let keys = self
            .tx
            .prepare_cached("DELETE FROM entry WHERE key > ?1 AND key < ?2 RETURNING key")?
            .query_map((prefix, end(prefix)), |row| row.get(0))?
            .collect::<Result<Vec<String>>>()?;
        self.record_deleted(keys)
    }

    fn record_deleted(&mut self, mut keys: Vec<String>) -> Result<()> {
        keys.sort_unstable();
        keys.iter().try_for_each(|key| self.record(key, None, None, None))
    }

    /// Keeps a change for watches.
    fn record(
        &mut self,
        key: &str,
        value: Option<&[u8]>,
        created: Option<i64>,
        lease: Option<i64>,
    ) -> Result<()> {
        let bytes = key.len() + value.map_or(0, <[u8]>::len) + CHANGE_BYTES;
        self.state.written += i64::try_from(bytes).unwrap_or(i64::MAX);
        self.tx
            .prepare_cached(
                "INSERT INTO change (revision, seq, upto, key, created, lease, value) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute((
                self.state.revision + 1,
                self.seq,
                self.state.written,
                key,
                created,
                lease,
                value,
            ))?;
        self.seq += 1;
        Ok(())
    }

    fn finish<T>(mut self, outcome: T) -> Result<Written<T>> {
        let changed = self.state.revision != self.before.revision;
        if changed {
            self.forget()?;
            self.tx
                .prepare_cached("UPDATE state SET revision = ?1, compacted = ?2, written = ?3")?
                .execute((self.state.revision, self.state.compacted, self.state.written))?;
        }
        self.tx.commit()?;
        Ok(Written { outcome, changed })
    }

    /// Forgets what is older than the history that is kept, at every 64th commit and
    /// every MiB.
    fn forget(&mut self) -> Result<()> {
        let due = |state: &State| (state.revision / 64, state.written >> 20);
        if due(&self.before) == due(&self.state) {
            return Ok(());
        }
        let too_large: Option<i64> = self
            .tx
            .query_row(
                "SELECT revision FROM change WHERE upto <= ?1 \
                 ORDER BY revision DESC, seq DESC LIMIT 1",
                [self.state.written - HISTORY_BYTES],
                |row| row.get(0),
            )
            .optional()?;
        let upto = too_large.unwrap_or(0).max(self.state.revision - HISTORY);
        if upto > self.state.compacted {
            self.tx.execute("DELETE FROM change WHERE revision <= ?1", [upto])?;
            self.state.compacted = upto;
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct State {
    revision: i64,
    compacted: i64,
    written: i64,
}

impl State {
    fn read(connection: &Connection) -> Result<Self> {
        connection
            .prepare_cached("SELECT revision, compacted, written FROM state")?
            .query_row((), |row| {
                Ok(Self { revision: row.get(0)?, compacted: row.get(1)?, written: row.get(2)? })
            })
    }
}

fn next_expiry(connection: &Connection, boot: &str) -> Result<Option<Duration>> {
    // A lease of an earlier boot is over now.
    let at: Option<i64> = connection
        .prepare_cached("SELECT min(iif(boot = ?1, expires, 0)) FROM lease")?
        .query_row([boot], |row| row.get(0))?;
    let left = |at: i64| Duration::from_millis(at.saturating_sub(now()).try_into().unwrap_or(0));
    Ok(at.map(left))
}

fn entry(row: &Row) -> Result<Entry> {
    Ok(Entry {
        key: row.get(0)?,
        value: row.get(1)?,
        revision: unsigned(row.get(2)?),
        created: unsigned(row.get(3)?),
        lease: row.get::<_, Option<i64>>(4)?.map(LeaseId),
    })
}

/// The first text behind all that is below the prefix: `0` follows `/` in ASCII.
fn end(prefix: &str) -> String {
    format!("{}0", prefix.strip_suffix('/').unwrap_or(prefix))
}

/// Milliseconds since the boot, suspend included.
fn now() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME");
    now.tv_sec() * 1000 + now.tv_nsec() / 1_000_000
}

fn signed(revision: Revision) -> i64 {
    revision.try_into().unwrap_or(i64::MAX)
}

fn unsigned(revision: i64) -> Revision {
    revision.try_into().unwrap_or(0)
}
