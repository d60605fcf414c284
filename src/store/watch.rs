//! Watching the embedded store: the kernel tells when its file is written to.
//!
//! Other processes' commits append to the write-ahead log, which inotify reports; then
//! the history is read from where this watch stands. A slow tick besides sees leases
//! expire, which nobody writes.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rusqlite::{Row, params};
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::embedded::{Embedded, counter, signed, unsigned};
use super::schema::explain;
use super::{Entry, Event, LeaseId, Revision, Watch, prefix_end};
use crate::error::{Context, Error, Result};

/// How late the end of a lease may be told.
const TICK: Duration = Duration::from_secs(1);
/// Events read at a time.
const BATCH: i64 = 1000;

/// A place in the history of a store.
pub(super) struct Watcher {
    store: Embedded,
    prefix: String,
    /// The revision up to which all is read.
    at: Revision,
    read: VecDeque<Event>,
    changed: AsyncFd<OwnedFd>,
    inotify: Inotify,
}

impl Watcher {
    pub(super) fn new(store: Embedded, prefix: &str, after: Revision) -> Result<Self> {
        let doing = || format!("watching the store in `{}`", store.dir().display());
        let inotify =
            Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).while_doing(doing)?;
        // The directory, not the log: SQLite removes and makes that as handles come and go.
        inotify
            .add_watch(store.dir(), AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE)
            .while_doing(doing)?;
        let fd = inotify.as_fd().try_clone_to_owned().while_doing(doing)?;
        #[expect(unsafe_code)]
        // SAFETY: an owned descriptor stays open, and the same one, as long as it is owned.
        let changed = unsafe { AsyncFd::register(fd) }.while_doing(doing)?;
        let read = VecDeque::new();
        Ok(Self { store, prefix: prefix.to_owned(), at: after, read, changed, inotify })
    }

    /// Reads what has come since; whole revisions only.
    fn read_on(&mut self) -> Result<()> {
        let mut connection = self.store.connection();
        let transaction = connection.transaction().map_err(explain)?;
        if counter(&transaction, "pruned")? > self.at {
            return Err(Error::system("the history that was to be watched is gone")
                .help("list again, and watch from there"));
        }
        let last = counter(&transaction, "revision")?;
        if last <= self.at {
            return Ok(());
        }
        let end = prefix_end(&self.prefix).and_then(|end| String::from_utf8(end).ok());
        let mut statement = transaction
            .prepare_cached(
                "SELECT key, value, revision, created, lease FROM changes
                 WHERE revision > ?1 AND key >= ?2 AND (?3 IS NULL OR key < ?3)
                 ORDER BY revision, number LIMIT ?4",
            )
            .map_err(explain)?;
        let rows = statement
            .query_map(params![signed(self.at), self.prefix, end, BATCH], event)
            .map_err(explain)?;
        let mut events = rows.collect::<Result<Vec<_>, _>>().map_err(explain)?;
        self.at = last;
        if i64::try_from(events.len()) == Ok(BATCH) {
            // The last revision may be cut in two: leave it for the next time. One commit
            // has far fewer changes than a batch, unless it deletes a large prefix.
            let cut = events.last().map_or(0, Event::revision);
            let whole = events.iter().take_while(|event| event.revision() < cut).count();
            if whole > 0 {
                events.truncate(whole);
                self.at = cut - 1;
            } else {
                return Err(Error::system("one commit changed more than a watch can tell")
                    .help("list again, and watch from there"));
            }
        }
        self.read.extend(events);
        Ok(())
    }

    async fn wait(&mut self) -> Result<()> {
        if let Ok(ready) = timeout(TICK, self.changed.readable()).await {
            ready.while_doing(|| "watching the store".into())?.clear_ready();
            // Only that something was written matters, not what.
            while self.inotify.read_events().is_ok() {}
            Ok(())
        } else {
            self.store.expire()
        }
    }
}

fn event(row: &Row<'_>) -> rusqlite::Result<Event> {
    let (key, revision) = (row.get(0)?, unsigned(row.get(2)?));
    Ok(match row.get::<_, Option<Vec<u8>>>(1)? {
        None => Event::Delete { key, revision },
        Some(value) => Event::Put(Entry {
            key,
            value,
            revision,
            created: unsigned(row.get(3)?),
            lease: row.get::<_, Option<i64>>(4)?.map(LeaseId),
        }),
    })
}

impl Watch for Watcher {
    fn next(&mut self) -> BoxFuture<'_, Result<Event>> {
        Box::pin(async move {
            loop {
                if let Some(event) = self.read.pop_front() {
                    return Ok(event);
                }
                self.read_on()?;
                if self.read.is_empty() {
                    self.wait().await?;
                }
            }
        })
    }
}
