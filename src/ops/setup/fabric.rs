//! How the hosts of a job find each other: through the site's store.
//!
//! Each host says who it is and waits for the others; the first one also takes a VXLAN key
//! for each network. A host believes what other hosts of the site wrote, and nothing of
//! the job's environment: who is in the list of hosts but was not set up by Slurm never
//! wrote, and is waited for in vain.
//!
//! ```text
//! n1 ── put host/<user>/<job>/<step>/node/00000, key/<network> ─┐
//! n2 ── put host/<user>/<job>/<step>/node/00001 ────────────────┴─ all watch the prefix
//! ```
//!
//! The last host that leaves gives the keys back: a key is free only when no host has a
//! tunnel with it any more. Why a host failed stays a while longer: one that begins late
//! reads it, and need not wait for hosts that have gone.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::time::Duration;

use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::ask::Ask;
use super::holding::Holding;
use crate::config::Network;
use crate::error::{Context, Error, Kind, Result, WireError};
use crate::host::crash;
use crate::model::hostlist;
use crate::model::owner::Owner;
use crate::network::{Fabric, Peer, SwitchKind, VmNetworks};
use crate::store::keys::{self, HostKey};
use crate::store::pool::Pool;
use crate::store::{Change, Check, Commit, Entry, Event, MAX_OPERATIONS, Seen, Store, list_all};

/// How long other hosts may take to begin. They are started at the same moment, but some
/// may have to wait for their file systems.
const OTHERS_LIMIT: Duration = Duration::from_secs(40);

/// The same, where the plugin gives less: there must be time left to say who is missing.
fn others_limit(ask: &Ask) -> Duration {
    let given = ask.limit.map(|seconds| Duration::from_secs(seconds.into()) * 2 / 3);
    given.map_or(OTHERS_LIMIT, |given| given.min(OTHERS_LIMIT))
}

/// How often what the job has in the store is read again because somebody changed it.
const ATTEMPTS: u32 = 20;

/// The pool of VXLAN keys. The lowest are left to what a site may have configured by hand.
pub const POOL: &str = "vni";
pub const KEYS: std::ops::RangeInclusive<u32> = 0x1_0000..=0xff_ffff;

/// What a host says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    pub node: String,
    /// On the underlay.
    pub address: Ipv4Addr,
    /// From which ports others may expect its tunnels' packets.
    pub switch: SwitchKind,
    pub ranks: Vec<u32>,
    /// Of this start of the job: an earlier one may have left its records.
    pub step: u32,
    pub restart: u32,
    /// Why this host could not be set up: nobody need wait for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<WireError>,
}

/// Tells the other hosts of the job that this one could not be set up.
pub async fn give_up(store: &dyn Store, ask: &Ask, user: &str, error: &Error) -> Result<()> {
    let record = HostRecord {
        node: ask.node.clone(),
        address: Ipv4Addr::UNSPECIFIED,
        switch: SwitchKind::Linux,
        ranks: Vec::new(),
        step: ask.step,
        restart: ask.restart,
        failure: Some(error.to_wire()),
    };
    let key = keys::host_record(user, ask.owner(), ask.step, ask.node_id);
    // As long as others may wait for it. Nobody else is there to take it back.
    let lease = store.lease(others_limit(ask)).await?;
    let put = Change::put_json(key, &record)?.with_lease(lease);
    store.commit(&[], &[put]).await.map(drop)
}

/// This host's place on the network that carries the tunnels.
#[derive(Clone, Debug)]
pub struct Underlay {
    pub address: Ipv4Addr,
    pub link: String,
    pub mtu: u16,
}

impl Underlay {
    /// The link that has this address.
    pub fn of(address: Ipv4Addr) -> Result<Self> {
        let doing = || format!("finding the link that has {address}");
        let mut all = nix::ifaddrs::getifaddrs().while_doing(doing)?;
        let has_it = |interface: &nix::ifaddrs::InterfaceAddress| {
            let found = interface.address.as_ref().and_then(|a| Some(a.as_sockaddr_in()?.ip()));
            found == Some(address)
        };
        let link = all.find(has_it).map(|interface| interface.interface_name).ok_or_else(|| {
            Error::system("none has").help(
                "Slurm's name of this host must resolve to one of its addresses (see \
                 `host-if-suffix` in networks.yaml)",
            )
        });
        let link = link.while_doing(doing)?;
        let file = format!("/sys/class/net/{link}/mtu");
        let mtu = fs::read_to_string(&file).while_doing(|| format!("reading `{file}`"))?;
        // Loopback's 65536 does not fit.
        let mtu = mtu.trim().parse::<u32>().map_or(1500, |mtu| mtu.min(u16::MAX.into()) as u16);
        Ok(Self { address, link, mtu })
    }
}

/// Says who this host is, and waits until all others have and the keys are known.
pub async fn join(
    store: &dyn Store,
    holding: &Holding,
    underlay: Underlay,
    switch: SwitchKind,
    networks: &[(String, Network)],
    interfaces: &dyn Fn(u32) -> VmNetworks,
) -> Result<Fabric> {
    let ask = &holding.ask;
    publish(store, holding, (underlay.address, switch), networks).await?;
    crash::point("fabric.published")?;
    let mut known = Known::default();
    match timeout(others_limit(ask), known.complete(store, holding, networks)).await {
        Ok(complete) => complete?,
        Err(_) => return Err(missing(&known, holding, networks)),
    }
    crash::point("fabric.complete")?;
    let keys = networks.iter().filter_map(|(name, _)| known.keys.get(name).copied()).collect();
    let peers =
        known.hosts.into_iter().filter(|(id, _)| *id != ask.node_id).map(|(_, host)| Peer {
            node: host.node,
            address: host.address,
            switch: host.switch,
            vms: host.ranks.into_iter().map(interfaces).collect(),
        });
    let Underlay { address, link, mtu } = underlay;
    Ok(Fabric { keys, address, link, mtu, peers: peers.collect() })
}

/// Writes this host's record; the first host's with the networks' keys.
async fn publish(
    store: &dyn Store,
    holding: &Holding,
    (address, switch): (Ipv4Addr, SwitchKind),
    networks: &[(String, Network)],
) -> Result<()> {
    let (ask, user, owner) = (&holding.ask, &holding.user, holding.ask.owner());
    let record = HostRecord {
        node: ask.node.clone(),
        address,
        switch,
        ranks: ask.ranks.clone(),
        step: ask.step,
        restart: ask.restart,
        failure: None,
    };
    let note = Change::put_json(keys::host_record(user, owner, ask.step, ask.node_id), &record)?;
    if ask.node_id == 0 && !networks.is_empty() {
        crash::point("fabric.keys")?;
        return publish_keys(store, holding, &note, networks).await;
    }
    match store.commit(&[], &[note]).await? {
        Commit::Done(_) => Ok(()),
        Commit::Conflict(_) => Err(Error::bug("a commit without checks had a conflict")),
    }
}

/// Writes the first host's record with the networks' keys.
///
/// The job's last start may have left keys, also those of which we were not told that we
/// have taken them: they are the job's still, and it takes no others in their place.
async fn publish_keys(
    store: &dyn Store,
    holding: &Holding,
    note: &Change,
    networks: &[(String, Network)],
) -> Result<()> {
    // As it nearly always is, which need not be read.
    let mut left = Vec::new();
    for _ in 0..ATTEMPTS {
        if try_publish_keys(store, holding, note, networks, &left).await? {
            return Ok(());
        }
        left = list_all(store, &hosts_of(holding)).await?.0;
    }
    Err(Error::system(format!("others have changed the job's keys {ATTEMPTS} times"))
        .help("try again"))
}

/// Whether what the job has in the store was `left` all the time.
async fn try_publish_keys(
    store: &dyn Store,
    holding: &Holding,
    note: &Change,
    networks: &[(String, Network)],
    left: &[Entry],
) -> Result<bool> {
    let (user, owner, step) = (&holding.user, holding.ask.owner(), holding.ask.step);
    let pool = Pool::new(store, POOL, KEYS);
    let (mut checks, mut changes, mut wanting) = (Vec::new(), vec![note.clone()], Vec::new());
    for (name, _) in networks {
        let key = keys::network_key(user, owner, step, name);
        let entry = left.iter().find(|entry| entry.key == key);
        checks.push(Check::unchanged(&key, entry));
        let id = entry.and_then(|entry| entry.json::<u32>().ok());
        let taken = match id {
            Some(id) => pool.taken(owner, id).await?,
            None => None,
        };
        match (id, taken) {
            // Written again: who frees the last start's sees that it is in use.
            (Some(id), Some(taken)) => {
                checks.push(taken);
                changes.push(Change::put_json(key, &id)?);
            }
            _ => wanting.push(key),
        }
    }
    if wanting.is_empty() {
        return Ok(matches!(store.commit(&checks, &changes).await?, Commit::Done(_)));
    }
    // In one commit: ids of which there is no note would be nobody's to free.
    let noted = |ids: &[u32]| {
        let keys = wanting.iter().zip(ids).map(|(key, id)| Change::put_json(key.as_str(), id));
        keys.chain(changes.iter().cloned().map(Ok)).collect()
    };
    let taken = pool.take_with(owner, wanting.len(), &checks, &noted).await?;
    Ok(taken.is_some())
}

fn hosts_of(holding: &Holding) -> String {
    keys::step_hosts(&holding.user, holding.ask.owner(), holding.ask.step)
}

/// What is known of the job's hosts.
#[derive(Debug, Default)]
struct Known {
    hosts: BTreeMap<u32, HostRecord>,
    keys: BTreeMap<String, u32>,
}

impl Known {
    /// Reads what there is, then follows it until nothing is missing. Who has come and gone
    /// meanwhile, because others are missing, is none of those.
    async fn complete(
        &mut self,
        store: &dyn Store,
        holding: &Holding,
        networks: &[(String, Network)],
    ) -> Result<()> {
        let (prefix, ask) = (hosts_of(holding), &holding.ask);
        let mut revision = self.add(store, holding).await?;
        if self.is_complete(ask, networks)? {
            return Ok(());
        }
        let mut watch = store.watch(&prefix, revision).await?;
        while let Some(seen) = watch.next().await {
            if let Seen::Changes { events, .. } = seen? {
                for event in events {
                    if let Event::Put(entry) = event {
                        self.learn(&entry.key, &entry.value, ask);
                    }
                }
            } else {
                // The old revision is forgotten: from the new one.
                revision = self.add(store, holding).await?;
                watch = store.watch(&prefix, revision).await?;
            }
            if self.is_complete(ask, networks)? {
                return Ok(());
            }
        }
        Err(Error::system("the site's store has ended the watch"))
    }

    /// Reads what there is; returns its revision.
    async fn add(&mut self, store: &dyn Store, holding: &Holding) -> Result<u64> {
        let (entries, revision) = list_all(store, &hosts_of(holding)).await?;
        for entry in entries {
            self.learn(&entry.key, &entry.value, &holding.ask);
        }
        Ok(revision)
    }

    fn learn(&mut self, key: &str, value: &[u8], ask: &Ask) {
        match keys::parse_host_key(key) {
            Some((_, HostKey::Record { node_id })) => {
                let record = serde_json::from_slice::<HostRecord>(value).ok();
                let now =
                    |record: &HostRecord| record.step == ask.step && record.restart == ask.restart;
                self.hosts.extend(record.filter(now).map(|record| (node_id, record)));
            }
            Some((_, HostKey::NetworkKey { network })) => {
                let key = serde_json::from_slice(value).ok();
                self.keys.extend(key.map(|key: u32| (network, key)));
            }
            None => {}
        }
    }

    /// # Errors
    /// [`Kind::Partial`] when a host has said that it could not be set up.
    fn is_complete(&self, ask: &Ask, networks: &[(String, Network)]) -> Result<bool> {
        let failed = self.hosts.values().find_map(|host| Some((host, host.failure.clone()?)));
        if let Some((host, failure)) = failed {
            let text = format!("host {} could not be set up", host.node);
            return Err(Error::new(Kind::Partial, text).because(Error::from(failure)));
        }
        Ok((0..ask.nodes).all(|id| self.hosts.contains_key(&id))
            && networks.iter().all(|(name, _)| self.keys.contains_key(name)))
    }
}

/// The error that names the hosts which have not come.
fn missing(known: &Known, holding: &Holding, networks: &[(String, Network)]) -> Error {
    let (ask, seconds) = (&holding.ask, others_limit(&holding.ask).as_secs());
    if !known.hosts.contains_key(&ask.node_id) {
        // What it has said itself is there.
        return Error::system(format!("the site's store has not answered within {seconds} s"))
            .help("an administrator looks with `etcdctl endpoint status`");
    }
    let names = hostlist::expand(&ask.node_list).unwrap_or_default();
    let names = Some(names).filter(|names| names.len() == ask.nodes as usize);
    let name = |id: u32| match &names {
        Some(names) => names[id as usize].clone(),
        None => format!("number {id} of the step"),
    };
    let absent: Vec<String> =
        (0..ask.nodes).filter(|id| !known.hosts.contains_key(id)).map(name).collect();
    if absent.is_empty() {
        let without = networks.iter().find(|(name, _)| !known.keys.contains_key(name));
        let network = without.map_or("?", |(name, _)| name);
        Error::system(format!("network `{network}` had no VXLAN key after {seconds} s"))
    } else {
        Error::system(format!("waited {seconds} s in vain for host {}", absent.join(", ")))
            .help("its own report, or slurmd's log there, says why it was not set up")
    }
}

/// What this host has said.
pub async fn own(store: &dyn Store, holding: &Holding) -> Result<Option<Entry>> {
    let ask = &holding.ask;
    store.get(&keys::host_record(&holding.user, ask.owner(), ask.step, ask.node_id)).await
}

/// Takes back what this host said, `own`. The last host frees the job's keys.
///
/// Whether it is the last is looked at only then: who comes later does not find this host,
/// and so never gets as far as to use the keys.
pub async fn leave(store: &dyn Store, holding: &Holding, own: Option<Entry>) -> Result<()> {
    let (user, owner) = (&holding.user, holding.ask.owner());
    crash::point("leave.begin")?;
    // A set-up that outlives its keeper may have said something since.
    let own = if own.is_some() { own } else { self::own(store, holding).await? };
    if let Some(entry) = own {
        let of_it = |record: HostRecord| {
            let now = (record.step, record.restart) == (holding.ask.step, holding.ask.restart);
            now && record.failure.is_none()
        };
        if entry.json::<HostRecord>().is_ok_and(of_it) {
            let check = Check::Revision(entry.key.clone(), entry.revision);
            // Changed meanwhile: it is the job's next start that has.
            let _ = store.commit(&[check], &[Change::delete(entry.key)]).await?;
        }
    }
    crash::point("leave.own")?;
    if holding.pending && holding.ask.nodes > 1 {
        // It died in its set-up, and they wait for it.
        give_up(store, &holding.ask, user, &Error::system("its set-up was broken off")).await?;
    }
    leave_job(store, &hosts_of(holding), owner).await
}

/// Frees the job's keys, if no host of it is left; `prefix` is of what hosts say of it.
///
/// A key is free when its note is gone, and not before: both go in one commit. What failed
/// hosts have said goes with its lease.
pub async fn leave_job(store: &dyn Store, prefix: &str, owner: Owner) -> Result<()> {
    for _ in 0..ATTEMPTS {
        let (mut entries, _) = list_all(store, prefix).await?;
        entries.retain(|entry| !is_failure(entry));
        if entries.is_empty() || entries.iter().any(is_record) {
            return Ok(());
        }
        if free_noted(store, owner, &entries).await? {
            return crash::point("leave.freed");
        }
        // What was written meanwhile is of the job's next start, or somebody else was here.
    }
    Err(Error::system(format!("others have changed `{prefix}` {ATTEMPTS} times")).help("try again"))
}

/// Whether it is the record of a host.
fn is_record(entry: &Entry) -> bool {
    matches!(keys::parse_host_key(&entry.key), Some((_, HostKey::Record { .. })))
}

/// Whether it is why a host could not be set up: that host has nothing.
fn is_failure(entry: &Entry) -> bool {
    let failed = |record: HostRecord| record.failure.is_some();
    is_record(entry) && entry.json::<HostRecord>().is_ok_and(failed)
}

/// Deletes these entries, and frees the keys that they note; whether nobody had changed
/// them.
async fn free_noted(store: &dyn Store, owner: Owner, entries: &[Entry]) -> Result<bool> {
    let pool = Pool::new(store, POOL, KEYS);
    // An entry and its id, and one for the pool.
    for some in entries.chunks(MAX_OPERATIONS / 2 - 1) {
        let noted = |entry: &Entry| match keys::parse_host_key(&entry.key)? {
            (_, HostKey::NetworkKey { .. }) => entry.json::<u32>().ok(),
            _ => None,
        };
        let ids: Vec<u32> = some.iter().filter_map(noted).collect();
        let unchanged: Vec<Check> =
            some.iter().map(|entry| Check::unchanged(&entry.key, Some(entry))).collect();
        let gone: Vec<Change> =
            some.iter().map(|entry| Change::delete(entry.key.clone())).collect();
        if pool.free_with(owner, &ids, &unchanged, &gone).await?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process;
    use crate::store::{LeaseId, Page, Watch, embedded};
    use futures_util::future::BoxFuture;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn holding(step: u32, restart: u32) -> Holding {
        let text = format!(
            "version=1\njob=42\nstep={step}\nrestart={restart}\nuid=2001\ngid=2001\nnode=n{step}\n\
             node_id=0\nnodes=2\ntasks=2\nlocal_tasks=0\nvm=eth:2\nkeeper=77\n"
        );
        let (ask, keeper) = (Ask::parse(&text).unwrap(), process::current());
        Holding {
            ask,
            user: "alice".into(),
            keeper,
            slot: 0,
            guard: None,
            stored: true,
            undone: false,
            pending: false,
            since: 0,
        }
    }

    fn networks() -> Vec<(String, Network)> {
        ["a", "b"].map(|name| (name.into(), Network::Unsupported { kind: "x".into() })).into()
    }

    async fn read(store: &dyn Store, holding: &Holding) -> Known {
        let mut known = Known::default();
        known.add(store, holding).await.unwrap();
        known
    }

    async fn take_leave(store: &dyn Store, holding: &Holding) -> Result<()> {
        leave(store, holding, own(store, holding).await?).await
    }

    #[tokio::test]
    async fn another_step_of_the_job_touches_nothing_of_this_ones() {
        let temp = tempfile::tempdir().unwrap();
        let store = embedded::open(temp.path()).await.unwrap();
        let networks = networks();
        let pool = Pool::new(&store, POOL, KEYS);
        let (first, second) = (holding(0, 0), holding(1, 0));
        publish(&store, &first, PLACE, &networks).await.unwrap();
        let all = read(&store, &first).await;
        // One that is refused, on a host where the first one runs.
        give_up(&store, &second.ask, "alice", &Error::usage("no")).await.unwrap();
        // One on other hosts.
        publish(&store, &second, PLACE, &networks).await.unwrap();
        assert_eq!(pool.owners().await.unwrap().len(), 4);
        take_leave(&store, &second).await.unwrap();
        let now = read(&store, &first).await;
        assert_eq!((now.hosts[&0].node.as_str(), &now.keys), ("n0", &all.keys));
        let taken: Vec<u32> = pool.owners().await.unwrap().into_keys().collect();
        assert_eq!(taken, all.keys.values().copied().collect::<Vec<_>>());
        take_leave(&store, &first).await.unwrap();
        assert_eq!(pool.owners().await.unwrap().len(), 0);
    }

    /// The holding of one of three hosts.
    fn one_of_three(node_id: u32) -> Holding {
        let first = holding(0, 0);
        Holding { ask: Ask { node_id, nodes: 3, ..first.ask.clone() }, ..first }
    }

    #[tokio::test]
    async fn who_has_come_and_gone_was_not_waited_for() {
        let temp = tempfile::tempdir().unwrap();
        let store = embedded::open(temp.path()).await.unwrap();
        let (first, other, networks) = (one_of_three(0), one_of_three(1), networks());
        publish(&store, &first, PLACE, &networks).await.unwrap();
        let mut known = Known::default();
        assert!(missing(&known, &first, &networks).to_string().contains("store has not answered"));
        let complete = timeout(Duration::from_secs(2), known.complete(&store, &first, &networks));
        let comes_and_goes = async {
            publish(&store, &other, PLACE, &networks).await.unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
            take_leave(&store, &other).await.unwrap();
        };
        assert!(tokio::join!(complete, comes_and_goes).0.is_err(), "it is too late");
        let said = missing(&known, &first, &networks).to_string();
        assert_eq!(said, "waited 40 s in vain for host number 2 of the step");
    }

    #[tokio::test]
    async fn who_comes_late_reads_why_after_all_others_have_gone() {
        let temp = tempfile::tempdir().unwrap();
        let store = embedded::open(temp.path()).await.unwrap();
        let networks = networks();
        let [first, failing, late] = [0, 1, 2].map(one_of_three);
        publish(&store, &first, PLACE, &networks).await.unwrap();
        publish(&store, &failing, PLACE, &networks).await.unwrap();
        take_leave(&store, &failing).await.unwrap();
        give_up(&store, &failing.ask, "alice", &Error::system("no room")).await.unwrap();
        take_leave(&store, &first).await.unwrap();
        // The host itself, once more: by the sweep.
        take_leave(&store, &failing).await.unwrap();
        assert_eq!(Pool::new(&store, POOL, KEYS).owners().await.unwrap().len(), 0);
        publish(&store, &late, PLACE, &networks).await.unwrap();
        let mut known = Known::default();
        let complete = known.complete(&store, &late, &networks);
        let error = timeout(Duration::from_secs(5), complete).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Partial);
        assert!(error.report().ends_with("because: no room"), "{}", error.report());
    }

    /// Where the hosts are.
    const PLACE: (Ipv4Addr, SwitchKind) = (Ipv4Addr::LOCALHOST, SwitchKind::Linux);

    /// A store in which somebody else does something just before a certain commit, or which
    /// is lost then.
    struct Before<'s> {
        store: &'s dyn Store,
        commit: u32,
        seen: AtomicU32,
        then: &'s (dyn Fn() -> BoxFuture<'s, Result<()>> + Send + Sync),
    }

    impl std::fmt::Debug for Before<'_> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Before")
        }
    }

    impl Store for Before<'_> {
        fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
            self.store.get(key)
        }

        fn list<'a>(
            &'a self,
            prefix: &'a str,
            after: Option<&'a str>,
            limit: usize,
        ) -> BoxFuture<'a, Result<Page>> {
            self.store.list(prefix, after, limit)
        }

        fn commit<'a>(
            &'a self,
            checks: &'a [Check],
            changes: &'a [Change],
        ) -> BoxFuture<'a, Result<Commit>> {
            Box::pin(async move {
                if self.seen.fetch_add(1, Ordering::Relaxed) == self.commit {
                    (self.then)().await?;
                }
                self.store.commit(checks, changes).await
            })
        }

        fn watch<'a>(&'a self, prefix: &'a str, after: u64) -> BoxFuture<'a, Result<Watch>> {
            self.store.watch(prefix, after)
        }

        fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>> {
            self.store.lease(ttl)
        }

        fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<bool>> {
            self.store.keep_alive(lease)
        }

        fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>> {
            self.store.revoke(lease)
        }
    }

    /// The ids that are taken, which must be those that are noted.
    #[track_caller]
    fn taken_and_noted(known: &Known, owners: &BTreeMap<u32, Owner>, when: &str) -> usize {
        let mut noted: Vec<u32> = known.keys.values().copied().collect();
        noted.sort_unstable();
        assert_eq!(noted, owners.keys().copied().collect::<Vec<_>>(), "{when}");
        noted.len()
    }

    #[tokio::test]
    async fn a_job_that_starts_again_has_no_more_ids_than_before() {
        let temp = tempfile::tempdir().unwrap();
        let store = embedded::open(temp.path()).await.unwrap();
        let (first, again) = (holding(0, 0), holding(0, 1));
        let pool = Pool::new(&store, POOL, KEYS);
        publish(&store, &first, PLACE, &networks()[..1]).await.unwrap();
        // Nobody has seen the end of the first; the site has one network more.
        publish(&store, &again, PLACE, &networks()).await.unwrap();
        let known = read(&store, &again).await;
        assert!(known.is_complete(&Ask { nodes: 1, ..again.ask.clone() }, &networks()).unwrap());
        assert_eq!(taken_and_noted(&known, &pool.owners().await.unwrap(), "again"), 2);
        // Late, and no more its turn.
        take_leave(&store, &first).await.unwrap();
        let known = read(&store, &again).await;
        assert_eq!(taken_and_noted(&known, &pool.owners().await.unwrap(), "late"), 2);
        take_leave(&store, &again).await.unwrap();
        assert_eq!(pool.owners().await.unwrap().len(), 0);
        assert_eq!(list_all(&store, &keys::all_hosts()).await.unwrap().0, []);
    }

    #[tokio::test]
    async fn an_id_is_free_when_its_note_is_gone_whoever_comes_between() {
        let networks = networks();
        for commit in 0..4 {
            let temp = tempfile::tempdir().unwrap();
            let store = embedded::open(temp.path()).await.unwrap();
            let (first, again) = (holding(0, 0), holding(0, 1));
            let pool = Pool::new(&store, POOL, KEYS);
            let look = async |when: &str| {
                let known = read(&store, &again).await;
                taken_and_noted(&known, &pool.owners().await.unwrap(), when)
            };
            let when = format!("before commit {commit}");

            // It dies.
            publish(&store, &first, PLACE, &networks).await.unwrap();
            let dies = || -> BoxFuture<'_, _> { Box::pin(async { Err(Error::system("died")) }) };
            let seen = AtomicU32::new(0);
            let dying = Before { store: &store, commit, seen, then: &dies };
            let outcome = take_leave(&dying, &first).await;
            assert_eq!(outcome.is_err(), commit < 2, "{when}");
            look(&format!("it dies {when}")).await;
            take_leave(&store, &first).await.unwrap();
            assert_eq!(look(&format!("it is done again {when}")).await, 0);

            // The job starts again.
            publish(&store, &first, PLACE, &networks).await.unwrap();
            let starts =
                || -> BoxFuture<'_, _> { Box::pin(publish(&store, &again, PLACE, &networks)) };
            let seen = AtomicU32::new(0);
            let between = Before { store: &store, commit, seen, then: &starts };
            take_leave(&between, &first).await.unwrap();
            let started = between.seen.load(Ordering::Relaxed) > commit;
            assert_eq!(look(&format!("it starts {when}")).await, if started { 2 } else { 0 });
            take_leave(&store, &again).await.unwrap();
            assert_eq!(look("all is over").await, 0);
        }
    }
}
