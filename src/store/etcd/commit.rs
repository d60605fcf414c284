//! Changes that are made exactly once although answers get lost.
//!
//! ```text
//!   if   fence is at revision 17, and all checks hold
//!   then write a new mark to the fence, make all changes
//!   else read the fence and what was checked
//! ```
//!
//! The fence is a key of this handle (of few handles: [`SLOTS`] per user). An attempt
//! whose answer was lost is repeated with the same mark and the same revision of the
//! fence: at most one of them is ever done. Whether one was, the fence tells: it holds
//! the mark, or held it when it was last at that revision's successor.
//!
//! Only commits that are sure to change something have a fence: one that deletes what
//! does not exist leaves the store's revision as it is, and a mark would change it.

use std::hash::{BuildHasher, Hasher, RandomState};

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse,
    TxnResponse,
};
use tokio::sync::Mutex;

use super::explain;
use super::link::{Failure, Link, Patience};
use super::{Login, MAX_ANSWER, NODE, end, entry, keys, signed, unsigned};
use crate::error::{Error, Result};
use crate::store::{Change, Check, Commit, Entry, MAX_OPERATIONS, Revision};

/// How many fences a user has at most. Handles that share one only get into each
/// other's way.
const SLOTS: u64 = 1024;

/// How often a commit is repeated because another handle moved the fence.
const ATTEMPTS: u32 = 200;

/// The key that orders the commits of a handle.
pub struct Fence {
    key: String,
    /// Its last revision that is known. Held during a commit: one at a time.
    known: Mutex<Revision>,
}

impl Fence {
    /// One of those that the user may write.
    pub fn new(login: &Login) -> Self {
        let user = match login {
            Login::Password { user, .. } => user.as_str(),
            Login::Certificate { .. } => NODE,
            Login::None => "",
        };
        let slot = u32::try_from(random() % SLOTS).unwrap_or(0);
        Self { key: keys::fence(user, slot), known: Mutex::new(0) }
    }
}

impl Fence {
    /// Reads it, which spares the first commit an attempt.
    pub async fn read(link: &Link) -> Result<()> {
        let key = link.fence.key.as_str();
        let get = |client: Client| async move { client.kv_client().get(key, None).await };
        let answer = link.call(get).await?;
        let revision = answer.kvs().first().map_or(0, |kv| unsigned(kv.mod_revision()));
        *link.fence.known.lock().await = revision;
        Ok(())
    }
}

pub async fn commit(link: &Link, checks: &[Check], changes: &[Change]) -> Result<Commit> {
    let most = checks.len().max(changes.len());
    if is_sure_to_change(checks, changes) && most < MAX_OPERATIONS {
        Fenced::new(link, checks, changes).commit().await
    } else {
        unfenced(link, checks, changes).await
    }
}

fn is_sure_to_change(checks: &[Check], changes: &[Change]) -> bool {
    let exists = |key: &String| {
        let holds = |check: &Check| !matches!(check, Check::Absent(_)) && check.key() == key;
        checks.iter().any(holds)
    };
    changes.iter().any(|change| match change {
        Change::Put { .. } => true,
        Change::Delete { key } => exists(key),
        Change::DeletePrefix { .. } => false,
    })
}

/// A commit that may change nothing, or is too large for a fence.
async fn unfenced(link: &Link, checks: &[Check], changes: &[Change]) -> Result<Commit> {
    let txn = transaction(checks, changes, None);
    let (mut patience, mut unknown) = (Patience::new(), false);
    loop {
        match link.attempt(|client| send(client, txn.clone())).await {
            Ok(answer) if answer.succeeded() => return Ok(Commit::Done(revision(&answer))),
            Ok(_) if unknown => return Err(outcome_unknown()),
            Ok(answer) => return Ok(Commit::Conflict(found(&answer))),
            Err(failure) => {
                unknown |= matches!(failure, Failure::Lost { perhaps_done: true, .. });
                patience.wait(failure).await?;
            }
        }
    }
}

/// A commit with its fence.
struct Fenced<'c> {
    link: &'c Link,
    checks: &'c [Check],
    changes: &'c [Change],
    /// Of this commit, the same in each attempt.
    mark: Vec<u8>,
    /// The fence's revision in attempts that may have been done, or may still be.
    lost: Option<Revision>,
}

impl<'c> Fenced<'c> {
    fn new(link: &'c Link, checks: &'c [Check], changes: &'c [Change]) -> Self {
        Self { link, checks, changes, mark: mark(), lost: None }
    }

    async fn commit(mut self) -> Result<Commit> {
        let mut known = self.link.fence.known.lock().await;
        let mut patience = Patience::new();
        for _ in 0..ATTEMPTS {
            let fence = Mark { key: &self.link.fence.key, known: *known, mark: &self.mark };
            let txn = transaction(self.checks, self.changes, Some(&fence));
            let answer = match self.link.attempt(|client| send(client, txn.clone())).await {
                Ok(answer) => answer,
                Err(failure) => {
                    if let Failure::Lost { perhaps_done: true, .. } = failure {
                        self.lost = Some(*known);
                    }
                    patience.wait(failure).await?;
                    continue;
                }
            };
            if answer.succeeded() {
                *known = revision(&answer);
                return Ok(Commit::Done(*known));
            }
            let (fence, entries) = found_with_fence(&answer);
            let now = fence.as_ref().map_or(0, |fence| fence.revision);
            if let Some(done) = self.was_done(fence.as_ref()).await? {
                *known = now;
                return Ok(Commit::Done(done));
            }
            if now != *known {
                // What was lost checks for the fence as it was: it will never be done.
                (*known, self.lost) = (now, None);
            }
            if !Check::all_hold(self.checks, &entries) {
                if self.lost.is_some() {
                    // It may be on its way still, and its checks hold when it arrives.
                    *known = self.outrun(*known).await?;
                }
                return Ok(Commit::Conflict(entries));
            }
        }
        Err(Error::system(format!("others were faster {ATTEMPTS} times")).help("try again"))
    }

    /// The revision at which an attempt was done whose answer was lost; `fence` is as it
    /// is now.
    async fn was_done(&self, fence: Option<&Entry>) -> Result<Option<Revision>> {
        let Some(since) = self.lost else { return Ok(None) };
        let mut fence = fence.cloned();
        loop {
            match fence {
                Some(entry) if entry.revision > since => {
                    if entry.value == self.mark {
                        return Ok(Some(entry.revision));
                    }
                    fence = self.fence_at(entry.revision - 1).await?;
                }
                _ => return Ok(None),
            }
        }
    }

    /// The fence as it was at that revision.
    async fn fence_at(&self, revision: Revision) -> Result<Option<Entry>> {
        let key = self.link.fence.key.as_str();
        let request = |client: Client| async move {
            let options = GetOptions::new().with_revision(signed(revision));
            match client.kv_client().get(key, Some(options)).await {
                Err(error) if explain::is_compacted(&error) => Ok(None),
                outcome => outcome.map(Some),
            }
        };
        match self.link.call(request).await? {
            Some(answer) => Ok(answer.kvs().first().map(entry)),
            None => Err(outcome_unknown()),
        }
    }

    /// Moves the fence, so that no attempt before this is done any more.
    async fn outrun(&self, known: Revision) -> Result<Revision> {
        let (mark, key) = (mark(), &self.link.fence.key);
        let fence = Mark { key, known, mark: &mark };
        let txn = transaction(&[], &[], Some(&fence));
        let answer = self.link.call(|client| send(client, txn.clone())).await?;
        if answer.succeeded() {
            return Ok(revision(&answer));
        }
        let (fence, _) = found_with_fence(&answer);
        match self.was_done(fence.as_ref()).await? {
            Some(_) => Err(outcome_unknown()),
            None => Ok(fence.map_or(0, |fence| fence.revision)),
        }
    }
}

fn outcome_unknown() -> Error {
    Error::system("etcd's answer was lost, and whether the change was made is unknown")
        .help("try again")
}

/// The fence of one attempt.
struct Mark<'m> {
    key: &'m str,
    known: Revision,
    mark: &'m [u8],
}

async fn send(client: Client, txn: Txn) -> Result<TxnResponse, etcd_client::Error> {
    client.kv_client().max_decoding_message_size(MAX_ANSWER).txn(txn).await
}

fn transaction(checks: &[Check], changes: &[Change], fence: Option<&Mark>) -> Txn {
    let mut when: Vec<Compare> = checks.iter().map(compare).collect();
    let mut then: Vec<TxnOp> = changes.iter().map(operation).collect();
    let mut read: Vec<&str> = checks.iter().map(Check::key).collect();
    read.sort_unstable();
    read.dedup();
    if let Some(fence) = fence {
        when.push(Compare::mod_revision(fence.key, CompareOp::Equal, signed(fence.known)));
        then.push(TxnOp::put(fence.key, fence.mark, None));
        read.push(fence.key);
    }
    let read: Vec<TxnOp> = read.into_iter().map(|key| TxnOp::get(key, None)).collect();
    Txn::new().when(when).and_then(then).or_else(read)
}

fn compare(check: &Check) -> Compare {
    match check {
        Check::Absent(key) => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Check::Exists(key) => Compare::create_revision(key.as_str(), CompareOp::Greater, 0),
        // A key that does not exist is at 0 for etcd.
        Check::Revision(key, 0) => Compare::mod_revision(key.as_str(), CompareOp::Less, 0),
        Check::Revision(key, revision) => {
            Compare::mod_revision(key.as_str(), CompareOp::Equal, signed(*revision))
        }
    }
}

fn operation(change: &Change) -> TxnOp {
    match change {
        Change::Put { key, value, lease } => {
            let lease = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key.as_str(), value.as_slice(), lease)
        }
        Change::Delete { key } => TxnOp::delete(key.as_str(), None),
        Change::DeletePrefix { prefix } => {
            let options = DeleteOptions::new().with_range(end(prefix));
            TxnOp::delete(format!("{prefix}\0"), Some(options))
        }
    }
}

fn revision(answer: &TxnResponse) -> Revision {
    unsigned(answer.header().map_or(0, |header| header.revision()))
}

/// What an attempt that changed nothing read: an answer for each key, in order.
fn found_each(answer: &TxnResponse) -> Vec<Option<Entry>> {
    let read = answer.op_responses().into_iter().map(|answer| match answer {
        TxnOpResponse::Get(get) => get.kvs().first().map(entry),
        _ => None,
    });
    read.collect()
}

fn found(answer: &TxnResponse) -> Vec<Entry> {
    found_each(answer).into_iter().flatten().collect()
}

fn found_with_fence(answer: &TxnResponse) -> (Option<Entry>, Vec<Entry>) {
    let mut read = found_each(answer);
    let fence = read.pop().flatten();
    (fence, read.into_iter().flatten().collect())
}

fn mark() -> Vec<u8> {
    format!("{:016x}{:016x}", random(), random()).into_bytes()
}

/// Spreads and tells apart. Not for secrets.
pub fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
