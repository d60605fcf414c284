//! What hosts that died left in the site's store.
//!
//! A host that comes back, with nothing in `/run`, takes back what it had said of jobs
//! before ([`forget_lost`]): it knows its own addresses. For hosts that never come back,
//! the administrator frees what belongs to jobs that are gone for certain
//! ([`free_ids`]): Slurm's queue does not know the job, and each host that the job had
//! been on is down, or has no record left. A host that is up is left to itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;

use serde::Deserialize;

use super::fabric::{HostRecord, KEYS, POOL, leave_job};
use super::holding::{Holding, RUN_DIR};
use super::wreck::Wreck;
use crate::config;
use crate::error::{Context, Result};
use crate::host::file::write_atomically;
use crate::model::owner::{Manager, Owner};
use crate::ops::queue::{self, Whose};
use crate::ops::site;
use crate::store::etcd::Etcd;
use crate::store::keys::{self, HostKey};
use crate::store::pool::Pool;
use crate::store::{Change, Check, Entry, Store, list_all};

/// In [`RUN_DIR`]: what was in the store before the host booted is taken back.
pub const MARK: &str = "store-checked";

/// Once after each boot: takes back what this host had said before.
pub async fn forget_lost(etcd: &config::Etcd) -> Result<()> {
    let mark = Path::new(RUN_DIR).join(MARK);
    if mark.exists() {
        return Ok(());
    }
    let store = Etcd::connect(&site::as_node(etcd)?).await?;
    let (entries, _) = list_all(&store, &keys::all_hosts()).await?;
    // Read after the records: a holding is there before its record.
    let (known, wrecks) = (Holding::all()?, Wreck::all()?);
    let own = addresses()?;
    for (entry, owner, record) in entries.iter().filter_map(record) {
        let is_known = known.iter().any(|holding| {
            holding.ask.owner() == owner
                && (holding.ask.step, holding.ask.restart) == (record.step, record.restart)
        }) || wrecks.iter().any(|wreck| wreck.owner() == owner);
        if own.contains(&record.address) && !is_known {
            forget_record(&store, entry, owner).await?;
        }
    }
    write_atomically(&mark, b"", 0o600)
}

/// Lets the next sweep look as after a boot.
pub fn look_again() -> Result<()> {
    let mark = Path::new(RUN_DIR).join(MARK);
    match std::fs::remove_file(&mark) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.while_doing(|| format!("removing `{}`", mark.display())),
    }
}

async fn forget_record(store: &dyn Store, entry: &Entry, owner: Owner) -> Result<()> {
    let check = Check::Revision(entry.key.clone(), entry.revision);
    // Changed meanwhile: it is the job's next start that has.
    let _ = store.commit(&[check], &[Change::delete(entry.key.clone())]).await?;
    match keys::step_hosts_of(&entry.key) {
        Some(prefix) => leave_job(store, &prefix, owner).await,
        None => Ok(()),
    }
}

/// A host's record; one of a failure goes with its lease.
fn record(entry: &Entry) -> Option<(&Entry, Owner, HostRecord)> {
    let (owner, HostKey::Record { .. }) = keys::parse_host_key(&entry.key)? else { return None };
    let record = entry.json::<HostRecord>().ok().filter(|record| record.failure.is_none());
    record.map(|record| (entry, owner, record))
}

/// Which host it is that wrote a record, of whatever version of pavo. What says nothing
/// of a host can be asked of none.
fn node(entry: &Entry) -> Option<(Owner, String)> {
    #[derive(Deserialize)]
    struct Named {
        node: String,
        failure: Option<serde::de::IgnoredAny>,
    }
    let (owner, HostKey::Record { .. }) = keys::parse_host_key(&entry.key)? else { return None };
    let named = entry.json::<Named>().ok().filter(|named| named.failure.is_none());
    named.map(|named| (owner, named.node))
}

fn addresses() -> Result<BTreeSet<Ipv4Addr>> {
    let all = nix::ifaddrs::getifaddrs().while_doing(|| "listing this host's addresses".into())?;
    let address =
        |interface: nix::ifaddrs::InterfaceAddress| Some(interface.address?.as_sockaddr_in()?.ip());
    Ok(all.filter_map(address).filter(|address| !address.is_loopback()).collect())
}

/// What was found to be freed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Jobs that are gone, and how many ids each had.
    pub freed: BTreeMap<Owner, usize>,
    /// Jobs that are gone, but for these hosts that are up and have not said so.
    pub waiting: BTreeMap<Owner, BTreeSet<String>>,
}

/// Frees the ids of jobs that are gone for certain; with `pretend` it only says which.
pub async fn free_ids(etcd: &config::Etcd, pretend: bool) -> Result<Freed> {
    let access = site::as_node(etcd).unwrap_or_else(|_| site::as_administrator_to_be(etcd));
    let store = Etcd::connect(&access).await?;
    let mut ids: BTreeMap<Owner, Vec<u32>> = BTreeMap::new();
    for (id, owner) in Pool::new(&store, POOL, KEYS).owners().await? {
        ids.entry(owner).or_default().push(id);
    }
    let (entries, _) = list_all(&store, &keys::all_hosts()).await?;
    let mut hosts: BTreeMap<Owner, BTreeSet<String>> = BTreeMap::new();
    for (owner, node) in entries.iter().filter_map(node) {
        hosts.entry(owner).or_default().insert(node);
    }
    // Asked last: a job that had something by then was in the queue, or is gone.
    let queue: BTreeSet<u32> =
        queue::list(Whose::Everybodys).await?.into_iter().map(|job| job.job).collect();
    let is_gone = |owner: &Owner| owner.manager == Manager::Slurm && !queue.contains(&owner.job);
    let gone: BTreeSet<Owner> = ids.keys().chain(hosts.keys()).copied().filter(is_gone).collect();
    let asked: BTreeSet<String> =
        gone.iter().filter_map(|o| hosts.get(o)).flatten().cloned().collect();
    let up = queue::nodes_up(&asked).await?;
    let mut found = Freed::default();
    for owner in gone {
        let alive: BTreeSet<String> = hosts
            .get(&owner)
            .into_iter()
            .flatten()
            .filter(|node| up.contains(*node))
            .cloned()
            .collect();
        if !alive.is_empty() {
            found.waiting.insert(owner, alive);
            continue;
        }
        let own = ids.get(&owner).map(Vec::as_slice).unwrap_or_default();
        if !pretend {
            forget_job(&store, owner, &entries, own).await?;
        }
        found.freed.insert(owner, own.len());
    }
    Ok(found)
}

async fn forget_job(store: &Etcd, owner: Owner, entries: &[Entry], ids: &[u32]) -> Result<()> {
    let of_it = |entry: &&Entry| keys::parse_host_key(&entry.key).is_some_and(|(o, _)| o == owner);
    let prefixes: BTreeSet<String> =
        entries.iter().filter(of_it).filter_map(|entry| keys::step_hosts_of(&entry.key)).collect();
    for prefix in prefixes {
        let _ = store.commit(&[], &[Change::DeletePrefix { prefix }]).await?;
    }
    Pool::new(store, POOL, KEYS).free(owner, ids).await.map(drop)
}
