//! What others write into the inventory, while we keep it in memory: a watch of its records.
//!
//! Nobody should: changes are the daemon's. But etcd lets in its administrators, whose tools
//! put back a backup, and what they did is told from then on, and is what later changes begin
//! with.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use tokio::time::sleep;

use super::Active;
use super::metrics::Metrics;
use crate::error::{Error, Result};
use crate::model::node::request::Noun;
use crate::store::{Event, Revision, Seen, Store, keys};

/// How long the store is left alone after a watch has ended.
const REST: Duration = Duration::from_secs(2);

/// From where a watch does not miss what is read after this.
///
/// # Errors
/// When the store does not answer.
pub async fn now(store: &dyn Store) -> Result<Revision> {
    Ok(store.list(&keys::records(Noun::Node), None, 1).await?.revision)
}

/// Keeps what is in memory as the store has it, from this revision on, for ever.
pub async fn others(store: &dyn Store, active: &Arc<Active>, metrics: &Metrics, from: Revision) {
    let mut from = Some(from);
    loop {
        let ended = match from {
            Some(revision) => watch(store, active, metrics, revision).await,
            None => Ok(()),
        };
        if let Err(error) = ended {
            let report = error.report();
            let report = report.trim_start_matches("error: ");
            tracing::warn!("what others write is not heard of: {report}");
        }
        sleep(REST).await;
        // Something may have been missed: all of it is read.
        from = reread(store, active, metrics).await.ok();
    }
}

async fn reread(store: &dyn Store, active: &Arc<Active>, metrics: &Metrics) -> Result<Revision> {
    let from = now(store).await?;
    let mut book = active.book.lock().await;
    book.reread().await?;
    active.publish(&book);
    metrics.nodes(book.inventory.nodes.len());
    Ok(from)
}

/// Until the store has forgotten what followed.
async fn watch(
    store: &dyn Store,
    active: &Arc<Active>,
    metrics: &Metrics,
    from: Revision,
) -> Result<()> {
    let mut all = SelectAll::new();
    for noun in Noun::ALL {
        let watch = store.watch(&keys::records(noun), from).await?;
        all.push(watch.map(move |seen| (noun, seen)));
    }
    while let Some((noun, seen)) = all.next().await {
        let (revision, events) = match seen? {
            Seen::Changes { revision, events } => (revision, events),
            Seen::HistoryLost => return Ok(()),
        };
        let key = |event: Event| match event {
            Event::Put(entry) => entry.key,
            Event::Delete { key, .. } => key,
        };
        let changed: Vec<String> = events.into_iter().map(key).collect();
        let mut book = active.book.lock().await;
        if book.heed(noun, revision, &changed).await? {
            active.publish(&book);
            metrics.nodes(book.inventory.nodes.len());
            let what = noun.plural();
            tracing::info!(records = changed.len(), what, "others have changed the inventory");
        }
    }
    Err(Error::bug("a watch has ended without a word"))
}
