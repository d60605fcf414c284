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
//! tunnel with it any more.

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
use crate::network::{Fabric, Peer, VmNetworks};
use crate::store::keys::{self, HostKey};
use crate::store::pool::Pool;
use crate::store::{Change, Check, Commit, Event, MAX_OPERATIONS, Seen, Store, list_all};

/// How long other hosts may take to begin. They are started at the same moment, but some
/// may have to wait for their file systems.
const OTHERS_LIMIT: Duration = Duration::from_secs(40);

/// The same, where the plugin gives less: there must be time left to say who is missing.
fn others_limit(ask: &Ask) -> Duration {
    let given = ask.limit.map(|seconds| Duration::from_secs(seconds.into()) * 2 / 3);
    given.map_or(OTHERS_LIMIT, |given| given.min(OTHERS_LIMIT))
}

/// The pool of VXLAN keys. The lowest are left to what a site may have configured by hand.
pub const POOL: &str = "vni";
pub const KEYS: std::ops::RangeInclusive<u32> = 0x1_0000..=0xff_ffff;

/// What a host says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    pub node: String,
    /// On the underlay.
    pub address: Ipv4Addr,
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
    networks: &[(String, Network)],
    interfaces: &dyn Fn(u32) -> VmNetworks,
) -> Result<Fabric> {
    let ask = &holding.ask;
    publish(store, holding, underlay.address, networks).await?;
    crash::point("fabric.published")?;
    let limit = timeout(others_limit(ask), Known::complete(store, holding, networks)).await;
    let known = match limit {
        Ok(known) => known?,
        Err(_) => return Err(missing(store, holding, networks).await?),
    };
    crash::point("fabric.complete")?;
    let keys = networks.iter().filter_map(|(name, _)| known.keys.get(name).copied()).collect();
    let peers =
        known.hosts.into_iter().filter(|(id, _)| *id != ask.node_id).map(|(_, host)| Peer {
            node: host.node,
            address: host.address,
            vms: host.ranks.into_iter().map(interfaces).collect(),
        });
    let Underlay { address, link, mtu } = underlay;
    Ok(Fabric { keys, address, link, mtu, peers: peers.collect() })
}

/// Writes this host's record; the first host's with the networks' keys.
async fn publish(
    store: &dyn Store,
    holding: &Holding,
    address: Ipv4Addr,
    networks: &[(String, Network)],
) -> Result<()> {
    let (ask, user, owner) = (&holding.ask, &holding.user, holding.ask.owner());
    let record = HostRecord {
        node: ask.node.clone(),
        address,
        ranks: ask.ranks.clone(),
        step: ask.step,
        restart: ask.restart,
        failure: None,
    };
    let note = Change::put_json(keys::host_record(user, owner, ask.step, ask.node_id), &record)?;
    if ask.node_id == 0 && !networks.is_empty() {
        // In one commit: ids of which there is no note would be nobody's to free.
        let noted = |ids: &[u32]| {
            let key = |name| keys::network_key(user, owner, ask.step, name);
            let keys =
                networks.iter().zip(ids).map(|((name, _), id)| Change::put_json(key(name), id));
            keys.chain([Ok(note.clone())]).collect()
        };
        crash::point("fabric.keys")?;
        return Pool::new(store, POOL, KEYS)
            .take_with(owner, networks.len(), &noted)
            .await
            .map(drop);
    }
    match store.commit(&[], &[note]).await? {
        Commit::Done(_) => Ok(()),
        Commit::Conflict(_) => Err(Error::bug("a commit without checks had a conflict")),
    }
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
    /// Reads what there is, then follows it until nothing is missing.
    async fn complete(
        store: &dyn Store,
        holding: &Holding,
        networks: &[(String, Network)],
    ) -> Result<Self> {
        let prefix = hosts_of(holding);
        let (mut known, mut revision) = Self::read(store, holding).await?;
        if known.is_complete(&holding.ask, networks)? {
            return Ok(known);
        }
        let mut watch = store.watch(&prefix, revision).await?;
        while let Some(seen) = watch.next().await {
            if let Seen::Changes { events, .. } = seen? {
                for event in events {
                    if let Event::Put(entry) = event {
                        known.learn(&entry.key, &entry.value, &holding.ask);
                    }
                }
            } else {
                // The old revision is forgotten: from the new one.
                (known, revision) = Self::read(store, holding).await?;
                watch = store.watch(&prefix, revision).await?;
            }
            if known.is_complete(&holding.ask, networks)? {
                return Ok(known);
            }
        }
        Err(Error::system("the site's store has ended the watch"))
    }

    async fn read(store: &dyn Store, holding: &Holding) -> Result<(Self, u64)> {
        let prefix = hosts_of(holding);
        let (entries, revision) = list_all(store, &prefix).await?;
        let mut known = Self::default();
        for entry in entries {
            known.learn(&entry.key, &entry.value, &holding.ask);
        }
        Ok((known, revision))
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
async fn missing(
    store: &dyn Store,
    holding: &Holding,
    networks: &[(String, Network)],
) -> Result<Error> {
    let ask = &holding.ask;
    let (known, _) = Known::read(store, holding).await?;
    let names = hostlist::expand(&ask.node_list).unwrap_or_default();
    let names = Some(names).filter(|names| names.len() == ask.nodes as usize);
    let name = |id: u32| match &names {
        Some(names) => names[id as usize].clone(),
        None => format!("number {id} of the step"),
    };
    let absent: Vec<String> =
        (0..ask.nodes).filter(|id| !known.hosts.contains_key(id)).map(name).collect();
    let seconds = others_limit(ask).as_secs();
    Ok(if absent.is_empty() {
        let without = networks.iter().find(|(name, _)| !known.keys.contains_key(name));
        let network = without.map_or("?", |(name, _)| name);
        Error::system(format!("network `{network}` had no VXLAN key after {seconds} s"))
    } else {
        Error::system(format!("waited {seconds} s in vain for host {}", absent.join(", ")))
            .help("its own report, or slurmd's log there, says why it was not set up")
    })
}

/// Takes back what this host said. The last host frees the job's keys.
pub async fn leave(store: &dyn Store, holding: &Holding) -> Result<()> {
    let (user, owner) = (&holding.user, holding.ask.owner());
    crash::point("leave.begin")?;
    let own =
        store.get(&keys::host_record(user, owner, holding.ask.step, holding.ask.node_id)).await?;
    if let Some(entry) = own {
        let of_it = |record: HostRecord| {
            (record.step, record.restart) == (holding.ask.step, holding.ask.restart)
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
pub async fn leave_job(store: &dyn Store, prefix: &str, owner: Owner) -> Result<()> {
    let (entries, _) = list_all(store, prefix).await?;
    let mut ids: Vec<u32> = Vec::new();
    for entry in &entries {
        match keys::parse_host_key(&entry.key) {
            Some((_, HostKey::NetworkKey { .. })) => ids.extend(entry.json::<u32>().ok()),
            // Somebody else's turn; one that failed has none.
            Some((_, HostKey::Record { .. })) => match entry.json::<HostRecord>() {
                Ok(record) if record.failure.is_some() => {}
                _ => return Ok(()),
            },
            None => {}
        }
    }
    if entries.is_empty() {
        return Ok(());
    }
    // While they are noted, whoever tries again can free them.
    Pool::new(store, POOL, KEYS).free(owner, &ids).await?;
    crash::point("leave.freed")?;
    for some in entries.chunks(MAX_OPERATIONS) {
        // What is written meanwhile is of the job's next start, and stays.
        let unchanged = some.iter().map(|entry| Check::unchanged(&entry.key, Some(entry)));
        let gone = some.iter().map(|entry| Change::delete(entry.key.clone()));
        let _ = store.commit(&unchanged.collect::<Vec<_>>(), &gone.collect::<Vec<_>>()).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::process;
    use crate::store::embedded;

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

    #[tokio::test]
    async fn another_step_of_the_job_touches_nothing_of_this_ones() {
        let temp = tempfile::tempdir().unwrap();
        let store = embedded::open(temp.path()).await.unwrap();
        let (address, networks) = (Ipv4Addr::LOCALHOST, networks());
        let pool = Pool::new(&store, POOL, KEYS);
        let (first, second) = (holding(0, 0), holding(1, 0));
        publish(&store, &first, address, &networks).await.unwrap();
        let all = Known::read(&store, &first).await.unwrap().0;
        // One that is refused, on a host where the first one runs.
        give_up(&store, &second.ask, "alice", &Error::usage("no")).await.unwrap();
        // One on other hosts.
        publish(&store, &second, address, &networks).await.unwrap();
        assert_eq!(pool.owners().await.unwrap().len(), 4);
        leave(&store, &second).await.unwrap();
        let now = Known::read(&store, &first).await.unwrap().0;
        assert_eq!((now.hosts[&0].node.as_str(), &now.keys), ("n0", &all.keys));
        let taken: Vec<u32> = pool.owners().await.unwrap().into_keys().collect();
        assert_eq!(taken, all.keys.values().copied().collect::<Vec<_>>());
        leave(&store, &first).await.unwrap();
        assert_eq!(pool.owners().await.unwrap().len(), 0);
    }
}
