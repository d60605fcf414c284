//! Of several daemons one writes; the others wait, each with its name among the services.
//!
//! ```text
//!   alive (a lease, a record of us) ──> waiting ──(nobody holds the lock)──> leading
//!     ^──────────────(the lease ran out, or the store took it)────────────────┘
//! ```
//!
//! The lock dies with its holder's lease. A holder that was stopped longer than that, and
//! goes on, changes nothing: each of its commits requires that the lock is the one it took.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::error::{Error, Result};
use crate::model::api::Service;
use crate::store::{Change, Check, Commit, LeaseId, Store, get_json, keys};

/// How long a daemon that says nothing is believed to live.
pub const LIFE: Duration = Duration::from_secs(15);

/// How often a waiting daemon looks, should the store's word of the lock's end get lost.
const LOOK: Duration = Duration::from_secs(5);

/// Makes our record among the services, for as long as the lease is kept.
///
/// # Errors
/// When the store does not answer.
pub async fn enlist(store: &dyn Store, me: &Service) -> Result<LeaseId> {
    let lease = store.lease(LIFE).await?;
    record(store, me, lease).await?;
    Ok(lease)
}

/// Writes our record.
///
/// # Errors
/// When the store does not answer, or the lease has run out.
pub async fn record(store: &dyn Store, me: &Service, lease: LeaseId) -> Result<()> {
    let key = keys::service(&me.kind, &format!("{}.{}", me.host, me.pid));
    let put = Change::put_json(key, me)?.with_lease(lease);
    match store.commit(&[], &[put]).await? {
        Commit::Done(_) => Ok(()),
        Commit::Conflict(_) => Err(Error::bug("a commit without checks had a conflict")),
    }
}

/// Keeps the lease until it is lost; gives the reason.
pub async fn keep(store: &dyn Store, lease: LeaseId) -> Error {
    let mut heard = Instant::now();
    loop {
        sleep(LIFE / 5).await;
        let why = match timeout(LIFE, store.keep_alive(lease)).await {
            Ok(Ok(true)) => {
                heard = Instant::now();
                continue;
            }
            Ok(Ok(false)) => return Error::system("the store took this daemon for dead"),
            Ok(Err(error)) => error,
            Err(_) => Error::system("the store does not answer"),
        };
        // A little before the store may give the lock to another.
        if heard.elapsed() + LIFE / 5 > LIFE {
            return why;
        }
    }
}

/// Waits for the lock and takes it. What it gives holds for as long as we have the lock.
///
/// # Errors
/// When the store does not answer.
pub async fn lead(
    store: &dyn Store,
    me: &Service,
    lease: LeaseId,
    waits_for: &mut (dyn FnMut(&Service) + Send),
) -> Result<Check> {
    let key = keys::daemon_leader();
    loop {
        let put = Change::put_json(&key, me)?.with_lease(lease);
        let outcome = store.commit(&[Check::Absent(key.clone())], &[put]).await;
        // Behind an error it may have been done: then the lock names us.
        match (outcome, get_json::<Service>(store, &key).await?) {
            (_, Some((holder, revision))) if holder == *me => {
                return Ok(Check::Revision(key, revision));
            }
            (_, Some((holder, _))) => waits_for(&holder),
            (Err(error), None) => return Err(error),
            (Ok(_), None) => {}
        }
        released(store, &key).await?;
    }
}

/// Ends when the lock may be free.
async fn released(store: &dyn Store, key: &str) -> Result<()> {
    use futures_util::StreamExt;
    let page = store.list(&keys::locks(), None, crate::store::MAX_PAGE).await?;
    if !page.entries.iter().any(|entry| entry.key == key) {
        return Ok(());
    }
    let mut watch = store.watch(&keys::locks(), page.revision).await?;
    // Whatever it says, or nothing for a while: the lock is looked at.
    let _ = timeout(LOOK, watch.next()).await;
    Ok(())
}
