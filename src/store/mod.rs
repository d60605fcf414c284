//! What is known of jobs: a small, versioned map of keys that many processes share.
//!
//! [`Store`] is the part of etcd v3 that pavo needs, and no more: reads, pages of a
//! prefix, one conditional commit, watches that resume, leases. There are two: one
//! machine uses [`embedded`], a site [`etcd`]. Everything above is written to the trait,
//! and `tests/store` holds what both must pass.
//!
//! # What holds
//!
//! - There is one [`Revision`] for the whole store; each commit that changes something
//!   takes the next, and all its changes carry it.
//! - A commit happens whole, or not at all, and only if its checks hold. That is the
//!   only lock: a holder that was paused too long finds its revision gone and changes
//!   nothing.
//! - A watch gives every change once, in order, commit by commit; resumed with the last
//!   revision it gave, it goes on behind it.
//! - An entry with a lease is gone, for every reader at once, when the lease has run out
//!   (in etcd up to some seconds later, never earlier).
//! - etcd's limits are kept everywhere ([`MAX_OPERATIONS`], [`MAX_COMMIT_BYTES`],
//!   [`MAX_PAGE`]), so that what works on a laptop works at a site.
//!
//! Only [`keys`] builds keys. Numbers that must be unique come from [`pool`]. What lets
//! a person into a site's store is a [`secret`].

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Kind, Result};

pub mod embedded;
pub mod etcd;
pub mod keys;
pub mod pool;
pub mod secret;

/// Counts the commits of a store.
pub type Revision = u64;

/// The most checks, and the most changes, of one commit (etcd's `--max-txn-ops`).
pub const MAX_OPERATIONS: usize = 128;

/// The most bytes of keys and values in one commit: etcd's `--max-request-bytes`
/// (1.5 MiB) less what encoding adds.
pub const MAX_COMMIT_BYTES: usize = 1_500_000;

/// The most entries of one page.
pub const MAX_PAGE: usize = 1000;

/// The version of what the keys mean. A store with a newer one is refused.
pub const SCHEMA: u32 = 1;

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    /// Of the last change.
    pub revision: Revision,
    /// Of the change that made it appear.
    pub created: Revision,
    /// With which it disappears.
    pub lease: Option<LeaseId>,
}

impl Entry {
    /// The value, read as JSON.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.value)
            .while_doing(|| format!("reading the stored `{}`", self.key))
    }
}

/// What a commit requires of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// The key does not exist.
    Absent(String),
    /// The key exists, and this was its last change.
    Revision(String, Revision),
    Exists(String),
}

impl Check {
    pub fn key(&self) -> &str {
        let (Self::Absent(key) | Self::Revision(key, _) | Self::Exists(key)) = self;
        key
    }

    /// Whether all hold where what they concern is as in `entries`.
    pub fn all_hold(checks: &[Self], entries: &[Entry]) -> bool {
        checks.iter().all(|check| {
            let entry = entries.iter().find(|entry| entry.key == check.key());
            match check {
                Self::Absent(_) => entry.is_none(),
                Self::Exists(_) => entry.is_some(),
                Self::Revision(_, revision) => entry.is_some_and(|e| e.revision == *revision),
            }
        })
    }

    /// Requires that `key` is still as it was read.
    pub fn unchanged(key: &str, read: Option<&Entry>) -> Self {
        match read {
            Some(entry) => Self::Revision(key.into(), entry.revision),
            None => Self::Absent(key.into()),
        }
    }
}

/// One change of a commit. No two changes of a commit may concern one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Put {
        key: String,
        value: Vec<u8>,
        /// Without one, the entry stays until it is deleted.
        lease: Option<LeaseId>,
    },
    /// Deleting what does not exist changes nothing.
    Delete { key: String },
    /// Deletes all below a prefix that ends in `/`.
    DeletePrefix { prefix: String },
}

impl Change {
    /// Puts a value as JSON.
    pub fn put_json<T: Serialize + ?Sized>(key: impl Into<String>, value: &T) -> Result<Self> {
        let key = key.into();
        let value = serde_json::to_vec(value).while_doing(|| format!("writing `{key}` as JSON"))?;
        Ok(Self::Put { key, value, lease: None })
    }

    /// Makes a put die with `lease`.
    #[must_use]
    pub fn with_lease(mut self, id: LeaseId) -> Self {
        if let Self::Put { lease, .. } = &mut self {
            *lease = Some(id);
        }
        self
    }

    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }
}

/// How a commit ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a commit may have changed nothing"]
pub enum Commit {
    /// Everything was changed, at this revision. A commit that had nothing to change
    /// gives the store's current one.
    Done(Revision),
    /// A check failed and nothing was changed: the checked keys that exist, as they are.
    Conflict(Vec<Entry>),
}

/// Entries in the order of their keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    pub entries: Vec<Entry>,
    /// Of the store when it was read. To follow a list, watch after the revision of
    /// its *first* page.
    pub revision: Revision,
    /// There is more after the last entry. A page may hold fewer than were asked for.
    pub more: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Put(Entry),
    Delete { key: String, revision: Revision },
}

/// What a watch saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// All changes below the prefix that one commit made, in its order. Never half a
    /// commit, so that `revision` is where a later watch resumes.
    Changes { revision: Revision, events: Vec<Event> },
    /// The store no longer knows what followed the revision that was asked for: list
    /// again and watch from there. Nothing comes after.
    HistoryLost,
}

/// A stream that ends with [`Seen::HistoryLost`] or an error, else never.
pub type Watch = BoxStream<'static, Result<Seen>>;

/// A promise to be alive. Never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId(pub i64);

/// A shared map of keys. Prefixes end in `/`.
///
/// A store hides failures as long as it is sensible to. Behind an error of a commit, it
/// may have been done nevertheless, or may still be: repeat only commits whose checks
/// would then fail.
pub trait Store: Send + Sync + std::fmt::Debug {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>>;

    /// A page of what is below `prefix`, behind the key `after`: at most `limit`
    /// entries, at most [`MAX_PAGE`]. [`list_all`] turns the pages.
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page>>;

    /// Makes all changes if all checks hold.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when a put names a lease that has run out;
    /// [`Kind::Bug`] when the commit is larger than any store takes.
    fn commit<'a>(
        &'a self,
        checks: &'a [Check],
        changes: &'a [Change],
    ) -> BoxFuture<'a, Result<Commit>>;

    /// All changes below `prefix` that come after the revision `after`. Its first item
    /// waits for a change if there was none yet. Await it on the runtime that reads it.
    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch>>;

    /// A lease that runs out `ttl` after its last [`keep_alive`](Self::keep_alive); time
    /// in suspend counts. A store may round `ttl` up to whole seconds.
    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>>;

    /// Lets the lease begin anew; `false` when it had run out already.
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<bool>>;

    /// Ends the lease and deletes its entries. One that is over already is no error.
    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>>;
}

/// All entries below `prefix`, and the revision after which a watch continues them.
/// Entries that change meanwhile may be seen as they were on either side.
pub async fn list_all(store: &dyn Store, prefix: &str) -> Result<(Vec<Entry>, Revision)> {
    let mut page = store.list(prefix, None, MAX_PAGE).await?;
    let revision = page.revision;
    let mut all = page.entries;
    while page.more {
        let last = all.last().map(|entry| entry.key.as_str());
        page = store.list(prefix, last, MAX_PAGE).await?;
        all.append(&mut page.entries);
    }
    Ok((all, revision))
}

/// A value that was stored as JSON, and the revision to check before changing it.
pub async fn get_json<T: DeserializeOwned>(
    store: &dyn Store,
    key: &str,
) -> Result<Option<(T, Revision)>> {
    let entry = store.get(key).await?;
    entry.map(|entry| Ok((entry.json()?, entry.revision))).transpose()
}

/// Stores a value as JSON, whatever was there: only for keys with a single writer.
pub async fn put_json<T: Serialize + ?Sized>(
    store: &dyn Store,
    key: &str,
    value: &T,
) -> Result<Revision> {
    match store.commit(&[], &[Change::put_json(key, value)?]).await? {
        Commit::Done(revision) => Ok(revision),
        Commit::Conflict(_) => Err(Error::bug("a commit without checks had a conflict")),
    }
}

/// The value at [`keys::schema`].
#[derive(Debug, Serialize, Deserialize)]
struct Schema {
    version: u32,
}

/// Marks a new store with [`SCHEMA`]; refuses one that a newer pavo has marked.
pub async fn adopt(store: &dyn Store) -> Result<()> {
    let key = keys::schema();
    if !check_schema(store).await? {
        let mark = Change::put_json(&key, &Schema { version: SCHEMA })?;
        if let Commit::Conflict(_) = store.commit(&[Check::Absent(key)], &[mark]).await? {
            check_schema(store).await?;
        }
    }
    Ok(())
}

/// Refuses a store of a newer pavo; says whether it is marked at all.
pub async fn check_schema(store: &dyn Store) -> Result<bool> {
    match get_json::<Schema>(store, &keys::schema()).await? {
        Some((schema, _)) if schema.version > SCHEMA => Err(newer(schema.version, SCHEMA)),
        schema => Ok(schema.is_some()),
    }
}

fn newer(found: u32, known: u32) -> Error {
    Error::system(format!(
        "the store was written by a newer pavo (schema {found}; this one knows {known})"
    ))
    .help("run the newer pavo; its clusters have to end before an older one can be used again")
}

/// Refuses, before any store is asked, a commit that one of them would refuse.
fn validate(checks: &[Check], changes: &[Change]) -> Result<()> {
    let wrong = |what: String| Err(Error::new(Kind::Bug, what));
    if checks.len().max(changes.len()) > MAX_OPERATIONS {
        return wrong(format!(
            "a commit of {} checks and {} changes; {MAX_OPERATIONS} each is the limit",
            checks.len(),
            changes.len()
        ));
    }
    let (mut bytes, mut changed, mut cleared) = (0, Vec::new(), Vec::new());
    for change in changes {
        match change {
            Change::Put { key, value, .. } => {
                bytes += value.len();
                changed.push(key.as_str());
            }
            Change::Delete { key } => changed.push(key),
            Change::DeletePrefix { prefix } => {
                validate_prefix(prefix)?;
                cleared.push(prefix.as_str());
            }
        }
    }
    let keys = checks.iter().map(Check::key).chain(changed.iter().copied());
    bytes += keys.chain(cleared.iter().copied()).map(str::len).sum::<usize>();
    if bytes > MAX_COMMIT_BYTES {
        return wrong(format!("a commit of {bytes} bytes; {MAX_COMMIT_BYTES} is the limit"));
    }
    changed.extend(&cleared);
    changed.sort_unstable();
    let twice = changed.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
    let below = |prefix: &&str| changed.iter().any(|key| key != prefix && key.starts_with(*prefix));
    match twice.or_else(|| cleared.iter().copied().find(below)) {
        Some(key) => wrong(format!("a commit changes `{key}`, or a key below it, twice")),
        None => Ok(()),
    }
}

fn validate_prefix(prefix: &str) -> Result<()> {
    if prefix.ends_with('/') {
        return Ok(());
    }
    Err(Error::bug(format!("the prefix `{prefix}` does not end in `/`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, bytes: usize) -> Change {
        Change::Put { key: key.into(), value: vec![0; bytes], lease: None }
    }

    fn clear(prefix: &str) -> Change {
        Change::DeletePrefix { prefix: prefix.into() }
    }

    #[test]
    fn a_commit_that_etcd_would_refuse_is_refused_by_all() {
        let many: Vec<Change> = (0..=MAX_OPERATIONS).map(|n| put(&format!("k/{n}"), 1)).collect();
        validate(&[], &many[1..]).unwrap();
        for (changes, why) in [
            (many, "129 changes; 128 each is the limit"),
            (vec![put("k", MAX_COMMIT_BYTES)], "1500001 bytes; 1500000 is the limit"),
            (vec![put("k", 1), Change::delete("k")], "changes `k`, or"),
            (vec![put("a/b", 1), clear("a/")], "changes `a/`, or"),
            (vec![clear("a/b/"), clear("a/")], "changes `a/`, or"),
            (vec![clear("a")], "does not end in `/`"),
        ] {
            let error = validate(&[], &changes).unwrap_err();
            assert!(error.to_string().contains(why), "{error}: {why}");
            assert_eq!(error.kind(), Kind::Bug);
        }
        validate(&[], &[put("a", 1), put("ab/c", 1), clear("a/"), clear("b/")]).unwrap();
    }
}
