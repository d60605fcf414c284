//! How a process learns of the changes of others without asking for them.
//!
//! After each commit its writer sets the times of `store.db`; the kernel tells all
//! watches, of all processes, by inotify (`IN_ATTRIB`). Writes to the WAL would be no
//! such sign: the last of them comes before a commit can be seen. A watch first empties
//! its queue of signs, then reads: a commit it does not see yet will be announced after.
//!
//! A writer killed between commit and sign leaves a change that nobody was told of: a
//! watch looks by itself every [`FALLBACK`], no more often, and when a lease runs out,
//! where it also does the deletion that no writer came to do.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::super::{Revision, Seen, Watch};
use super::{Db, table};
use crate::error::{Context, Result};

/// How often a watch looks without having been told.
const FALLBACK: Duration = Duration::from_secs(30);

/// The same where the user has no inotify instance left (128 by default).
const FALLBACK_ALONE: Duration = Duration::from_secs(1);

/// Starts a watch; a change from now on is not missed, wherever it is made.
pub fn start(db: Arc<Db>, prefix: &str, after: Revision) -> Result<Watch> {
    let signs = Signs::of(&db).while_doing(|| format!("watching `{}`", db.file.display()));
    let signs = signs.inspect_err(|error| warn!("{error:?}")).ok();
    let prefix = prefix.to_owned();
    let watcher = Watcher { db, prefix, after, signs, ready: VecDeque::new() };
    let stream = stream::unfold(Some(watcher), |watcher| async {
        let mut watcher = watcher?;
        let seen = watcher.next().await;
        let over = matches!(seen, Err(_) | Ok(Seen::HistoryLost));
        Some((seen, (!over).then_some(watcher)))
    });
    Ok(stream.boxed())
}

struct Watcher {
    db: Arc<Db>,
    prefix: String,
    after: Revision,
    signs: Option<Signs>,
    ready: VecDeque<Seen>,
}

impl Watcher {
    async fn next(&mut self) -> Result<Seen> {
        loop {
            if let Some(seen) = self.ready.pop_front() {
                return Ok(seen);
            }
            let (db, prefix, after) = (&self.db, &self.prefix, self.after);
            let news = db
                .run(|connection| table::news(connection, &db.boot, prefix, after))
                .await
                .while_doing(|| format!("watching `{prefix}`"))?;
            self.after = news.after;
            self.ready = news.seen.into();
            if !self.ready.is_empty() {
                continue;
            }
            match news.expiry {
                Some(Duration::ZERO) => {
                    db.write(|connection| table::expire(connection, &db.boot)).await?;
                }
                expiry => self.wait(expiry).await?,
            }
        }
    }

    /// Waits for a sign, or until it is time to look anyway.
    async fn wait(&self, expiry: Option<Duration>) -> Result<()> {
        let fallback = if self.signs.is_some() { FALLBACK } else { FALLBACK_ALONE };
        let patience = expiry.map_or(fallback, |expiry| expiry.min(fallback));
        let sign = async {
            match &self.signs {
                Some(signs) => signs.next().await,
                None => std::future::pending().await,
            }
        };
        if let Ok(sign) = tokio::time::timeout(patience, sign).await {
            sign.while_doing(|| format!("watching `{}`", self.db.file.display()))?;
        }
        self.db.check_still_there()
    }
}

/// What the kernel tells of the file: each event is a sign, whatever it says.
struct Signs(AsyncFd<OwnedFd>);

impl Signs {
    fn of(db: &Db) -> Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .while_doing(|| "making an inotify instance".into())?;
        inotify
            .add_watch(&db.file, AddWatchFlags::IN_ATTRIB)
            .while_doing(|| format!("asking for signs of `{}`", db.file.display()))?;
        #[expect(unsafe_code)]
        // SAFETY: an `OwnedFd` gives the same number always, and keeps it open as long as it lives.
        let fd = unsafe { AsyncFd::register_with_interest(inotify.into(), Interest::READABLE) };
        fd.map(Self).while_doing(|| "waiting on inotify".into())
    }

    /// Waits for a sign, and takes all that have come.
    async fn next(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        let mut buffer = [0; 4096];
        loop {
            match ready.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), &mut buffer)?)) {
                Ok(read) => read.map(drop)?,
                Err(_would_block) => return Ok(()),
            }
        }
    }
}
