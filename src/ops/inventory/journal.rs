//! How far a change is that takes several commits: a record that each of them changes, so
//! that it is true whatever happens in between.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Book, Failure, crowded, pages};
use crate::error::{Error, Result};
use crate::host::{crash, process};
use crate::model::node::operation::{Operation, State, Writer};
use crate::store::{Change, Entry, Store, keys};

/// Numbers for operations: of changes and of orders alike, in one process.
#[derive(Clone, Debug, Default)]
pub struct Ids(Arc<AtomicU64>);

impl Ids {
    /// One that was not given away.
    pub fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// There is one of this number.
    pub(super) fn seen(&self, id: u64) {
        self.0.fetch_max(id, Ordering::Relaxed);
    }
}

/// How many operations are remembered.
const KEPT: usize = 100;

/// All that the store remembers.
pub(super) async fn load(store: &dyn Store) -> Result<BTreeMap<u64, Operation>> {
    let mut ops = BTreeMap::new();
    let mut take = |entry: &Entry| {
        let operation: Operation = entry.json()?;
        ops.insert(operation.id, operation);
        Ok(())
    };
    pages(store, &keys::ops(), &mut take).await?;
    Ok(ops)
}

/// In seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |it| it.as_secs())
}

fn this_boot() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    boot.trim().to_owned()
}

/// Says that all is done.
pub(super) fn finish(operation: &mut Operation) {
    end(operation, State::Done, None);
}

fn end(operation: &mut Operation, state: State, reason: Option<String>) {
    operation.state = state;
    operation.reason = reason;
    operation.ended = Some(now());
    operation.writer = None;
}

impl Book {
    /// The latest operations, the oldest first.
    pub fn ops(&self) -> impl DoubleEndedIterator<Item = &Operation> {
        self.ops.values()
    }

    /// A new operation, and what its first commit changes besides.
    pub(super) fn begin(&self, what: String, total: usize) -> (Operation, Vec<Change>) {
        let operation = Operation {
            id: self.ids.next(),
            what,
            user: self.user.clone(),
            total,
            done: 0,
            failed: 0,
            order: None,
            state: State::Running,
            begun: now(),
            ended: None,
            reason: None,
            stopped_by: None,
            writer: Some(Writer { boot: this_boot(), process: process::current() }),
        };
        (operation, self.too_old().into_iter().map(|id| Change::delete(keys::op(id))).collect())
    }

    /// The operations that are forgotten when there is a new one; a few at a time.
    fn too_old(&self) -> Vec<u64> {
        let many = (self.ops.len() + 1).saturating_sub(KEPT).min(8);
        let over = self.ops.values().filter(|it| it.state != State::Running);
        over.map(|it| it.id).take(many).collect()
    }

    /// Remembers what was stored of an operation; at its first time forgets others.
    pub(super) fn note(&mut self, operation: &Operation, first: bool) {
        if first {
            self.too_old().iter().for_each(|id| drop(self.ops.remove(id)));
        }
        self.ops.insert(operation.id, operation.clone());
    }

    /// An operation cannot go on: says so where that can still be said. Gives the error.
    pub(super) async fn stop(&mut self, operation: Operation, failure: Failure) -> Error {
        let error = match failure {
            Failure::Conflict => crowded(),
            Failure::Other(error) => error,
        };
        if self.settle().await.is_ok() {
            // What the last commit did may be known only now.
            let mut operation = self.ops.get(&operation.id).cloned().unwrap_or(operation);
            if operation.state == State::Running {
                end(
                    &mut operation,
                    State::Failed,
                    Some(error.report().trim_start_matches("error: ").to_owned()),
                );
                self.tell(&operation).await;
            }
        }
        error.help("some of it is done: the same command does the rest")
    }

    /// Operations whose writers are gone are over.
    pub(super) async fn bury(&mut self) {
        let boot = this_boot();
        let lives = |writer: &Writer| {
            writer.boot == boot
                && writer.process != process::current()
                && process::alive(&writer.process)
        };
        // Who has a fence is the only one who writes.
        let lives = |it: &Operation| self.fence.is_none() && it.writer.as_ref().is_some_and(lives);
        let dead = self.ops.values().filter(|it| it.state == State::Running && !lives(it));
        for mut operation in dead.cloned().collect::<Vec<_>>() {
            end(&mut operation, State::Interrupted, None);
            if crash::point("inventory.buried").is_err() {
                return;
            }
            self.tell(&operation).await;
        }
    }

    /// Stores how an operation ended. If that cannot be, it is said at the next opportunity.
    async fn tell(&mut self, operation: &Operation) {
        let Ok(put) = Change::put_json(keys::op(operation.id), operation) else { return };
        if self.commit(vec![put]).await.is_ok() {
            self.ops.insert(operation.id, operation.clone());
        } else {
            // The inventory itself may be used as soon as it is known again.
            let _ = self.settle().await;
        }
    }
}
