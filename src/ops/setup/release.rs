//! Taking back what a set-up made on this host.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::timeout;

use super::ask::Ask;
use super::fabric;
use super::holding::{Holding, remove_tree};
use super::site_config;
use crate::error::Result;
use crate::host::Host;
use crate::host::journal::Journal;
use crate::host::process::{self, ProcessId};
use crate::model::owner::Owner;
use crate::ops::cleanup::{JOURNAL_DIR, NETNS_DIR};
use crate::ops::site;
use crate::store::etcd::Etcd;

/// How long a guard may take to end before it is killed.
const GUARD_LIMIT: Duration = Duration::from_secs(2);

/// `pavo internal setup delete`: removes what `create` made for the same ask. Nothing to
/// remove is no error.
pub async fn delete(ask: &Ask) -> Result<()> {
    match Holding::of(ask.job, ask.step)? {
        Some(holding) => {
            if let Some(guard) = &holding.guard {
                end(guard).await;
            }
            release(&holding).await
        }
        None => Ok(()),
    }
}

/// Removes everything of a cluster on this host: its network, its files, what the site's
/// store holds for it. Several may do it at once.
pub async fn release(holding: &Holding) -> Result<()> {
    let journal = Journal::open(JOURNAL_DIR)?;
    let undone = journal.undo(holding.ask.owner(), &Host::new(NETNS_DIR.into())).await;
    remove_tree(&holding.scratch())?;
    undone?;
    if holding.stored {
        leave_store(holding).await?;
    }
    holding.forget()
}

/// Takes back what this host has in the site's store. Where the store does not answer,
/// the holding stays, and the next sweep tries again.
async fn leave_store(holding: &Holding) -> Result<()> {
    let Some(etcd) = site_config()?.batch.etcd else { return Ok(()) };
    let store = Etcd::connect(&site::as_node(&etcd)?).await?;
    fabric::leave(&store, holding).await
}

/// Ends a guard: politely, then surely.
async fn end(guard: &ProcessId) {
    let Ok(pid) = i32::try_from(guard.pid).map(Pid::from_raw) else { return };
    if process::alive(guard) {
        let _ = kill(pid, Signal::SIGTERM);
        if !matches!(timeout(GUARD_LIMIT, process::ended(guard)).await, Ok(Ok(()))) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Removes what no living step owns on this host; returns whose it was.
///
/// # Errors
/// The last failure, after all were tried.
pub async fn sweep() -> Result<Vec<Owner>> {
    let (mut swept, mut failure) = (Vec::new(), None);
    for holding in Holding::all()?.into_iter().filter(|holding| !holding.alive()) {
        if let Some(guard) = &holding.guard {
            end(guard).await;
        }
        match release(&holding).await {
            Ok(()) => swept.push(holding.ask.owner()),
            Err(error) => {
                tracing::warn!("{}", error.report());
                failure = Some(error);
            }
        }
    }
    let journal = Journal::open(JOURNAL_DIR)?;
    swept.extend(journal.sweep(&Host::new(NETNS_DIR.into())).await?);
    failure.map_or(Ok(swept), Err)
}
