//! What is known of jobs: a small store of keys with revisions.
//!
//! [`Store`] is what etcd offers, no more: conditional commits, lists by prefix in
//! pages, watches that resume from a revision, leases. [`embedded`] keeps it in a SQLite
//! file of one user on one machine. `tests/store.rs` is the contract every
//! implementation passes.
//!
//! # What holds
//!
//! - Every commit that changes something has a revision of its own, one more than the last.
//! - No lock without fencing: a write names the revision it was decided on ([`Check`]),
//!   so a holder that slept too long writes nothing.
//! - A key under an expired lease is invisible from that moment on, whoever deletes it.
//! - etcd's limits are everybody's: [`MAX_OPERATIONS`] and [`MAX_BYTES`] a commit, pages for
//!   lists.

pub mod embedded;
pub mod keys;
pub mod pool;
mod schema;
mod watch;

use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Counts commits; 0 is before the first.
pub type Revision = u64;

/// A lease, to hang keys on that die with their holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId(pub i64);

/// etcd's default limit of operations (checks and changes each) in a transaction.
pub const MAX_OPERATIONS: usize = 128;
/// etcd's default limit of a request, in bytes.
pub const MAX_BYTES: usize = 1_500_000;
/// The most entries of a page.
pub const MAX_PAGE: usize = 1000;

/// A key and what is under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    /// Of its last change.
    pub revision: Revision,
    /// Of its creation.
    pub created: Revision,
    pub lease: Option<LeaseId>,
}

/// What must hold for a commit to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    Absent(String),
    Exists(String),
    /// The key was last changed at this revision.
    Revision(String, Revision),
}

impl Check {
    pub fn key(&self) -> &str {
        match self {
            Self::Absent(key) | Self::Exists(key) | Self::Revision(key, _) => key,
        }
    }
}

/// What a commit changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Put { key: String, value: Vec<u8>, lease: Option<LeaseId> },
    Delete { key: String },
    DeletePrefix { prefix: String },
}

impl Change {
    /// A change that puts JSON under a key.
    pub fn put_json<T: Serialize>(key: String, value: &T) -> Self {
        let value = serde_json::to_vec(value).expect("a stored value is always valid JSON");
        Self::Put { key, value, lease: None }
    }
}

/// What became of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Commit {
    /// Made, at this revision (the current one if nothing changed).
    Done(Revision),
    /// A check failed, nothing was changed: the entries now under the keys checked.
    Conflict(Vec<Entry>),
}

impl Commit {
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }
}

/// Part of a list, ascending by key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    pub entries: Vec<Entry>,
    /// Whether there is more after the last entry.
    pub more: bool,
    /// The store's revision when it was read.
    pub revision: Revision,
}

/// One change, as a watch tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Put(Entry),
    Delete { key: String, revision: Revision },
}

impl Event {
    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.revision,
            Self::Delete { revision, .. } => *revision,
        }
    }

    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// Events under a prefix, in order, each once.
pub trait Watch: Send {
    /// The next event. Safe to drop and call again.
    ///
    /// # Errors
    /// When the history it stands at was pruned (the reader fell too far behind): list
    /// again and watch from there.
    fn next(&mut self) -> BoxFuture<'_, Result<Event>>;
}

/// A store of keys. Object-safe; one handle may be shared.
pub trait Store: Send + Sync {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>>;

    /// Entries whose key starts with `prefix`, after the key `after`, at most `limit`
    /// ([`MAX_PAGE`] at most).
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page>>;

    /// Makes all changes, if all checks hold.
    fn commit<'a>(
        &'a self,
        checks: &'a [Check],
        changes: &'a [Change],
    ) -> BoxFuture<'a, Result<Commit>>;

    /// Changes of keys under `prefix` at revisions after `after`.
    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn Watch>>>;

    /// A new lease that lasts `ttl` from now.
    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>>;

    /// Lets a lease last its whole time again from now.
    ///
    /// # Errors
    /// [`Kind::NotFound`](crate::error::Kind::NotFound) if it has expired.
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>>;

    /// Ends a lease and deletes its keys.
    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>>;
}

/// Refuses what etcd would refuse.
pub(crate) fn within_limits(checks: &[Check], changes: &[Change]) -> Result<()> {
    let key = |change: &Change| match change {
        Change::Put { key, value, .. } => key.len() + value.len(),
        Change::Delete { key } => key.len(),
        Change::DeletePrefix { prefix } => prefix.len(),
    };
    let bytes: usize = checks.iter().map(|check| check.key().len()).sum::<usize>()
        + changes.iter().map(key).sum::<usize>();
    if checks.len() > MAX_OPERATIONS || changes.len() > MAX_OPERATIONS || bytes > MAX_BYTES {
        return Err(Error::bug(format!(
            "a commit of {} checks, {} changes and {bytes} bytes is too large",
            checks.len(),
            changes.len()
        )));
    }
    Ok(())
}

/// The smallest string greater than every string that starts with `prefix`, if any.
pub(crate) fn prefix_end(prefix: &str) -> Option<Vec<u8>> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}
