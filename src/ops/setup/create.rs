//! `pavo internal setup create`: a host is made ready for the VMs of one step.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::unistd::{Gid, Uid, User, chown};

use super::ask::Ask;
use super::fabric::{self, Underlay};
use super::grave;
use super::guard;
use super::holding::{Claim, Holding, SCRATCH_DIR, make_dir};
use super::host_report::{HostReport, LocalVm};
use super::preview::{Action, Preview};
use super::release::{Patience, release, sweep};
use super::{SITE_DIR, site_config};
use crate::config::{self, Config, Network, ResourceSet, ServiceUsers, SwitchChoice};
use crate::error::{Context, Error, Kind, Result};
use crate::host::Host;
use crate::host::crash;
use crate::host::file::write_atomically;
use crate::host::journal::Journal;
use crate::network::{self, Fabric, NetworkPlan, Outside, Switch, VmNetworks};
use crate::ops::cleanup::{JOURNAL_DIR, NETNS_DIR};
use crate::ops::publish::{self, Bound};
use crate::ops::{site, site_store};
use crate::store::etcd::Etcd;
use crate::store::secret::{Letter, Secret, SiteKey};
use crate::vm::channel::Identity;

/// Makes all that the local VMs need, or nothing.
///
/// # Errors
/// What the user is told, with the name of this host before it: a cause and a way out.
pub async fn create(ask: &Ask) -> Result<()> {
    crash::point("setup.begin")?;
    // What dead steps left must not be in the way; their trouble is not this user's.
    if let Err(error) = sweep(Patience::Short).await {
        tracing::warn!("{}", error.report());
    }
    crash::point("setup.swept")?;
    let config = site_config()?;
    let user = user_name(ask.uid)?;
    let outcome = set_up(&config, ask, &user).await;
    if let (Err(error), Some(etcd)) = (&outcome, &config.batch.etcd) {
        // Another host's failure is known to the others already.
        if ask.nodes > 1 && error.kind() != Kind::Partial {
            // If that fails, too, the others wait for their limit.
            let _ = tell_others(etcd, ask, &user, error).await;
        }
    }
    outcome
}

/// What `create` would do. VXLAN keys and other hosts are known only to the store, which
/// is not asked.
///
/// # Errors
/// As [`create`], as far as nothing has to be made to know.
pub async fn create_preview(ask: &Ask) -> Result<Preview> {
    let wanted = Wanted::new(&site_config()?, ask)?;
    let slots = wanted.slots();
    let holding = Holding::wanted(ask, &user_name(ask.uid)?, slots)?;
    let count = wanted.networks.len();
    let switch = wanted.switch(&Host::new(NETNS_DIR.into()), None).await?;
    let plan = wanted.plan(&holding, None, switch)?;
    let mut preview = Preview::new(Action::Create, plan.plan)
        .with(format!("create `{}`", holding.scratch().display()))
        .with(format!("create `{}`", holding.dir().display()));
    if ask.nodes > 1 {
        preview = preview.with(format!(
            "create tunnels to {} other hosts: they, and {count} VXLAN keys, are taken from the store",
            ask.nodes - 1
        ));
    }
    Ok(preview)
}

async fn set_up(config: &Config, ask: &Ask, user: &str) -> Result<()> {
    let wanted = Wanted::new(config, ask)?;
    let slots = wanted.slots();
    let mut claim = Claim::wait(ask.patience())?;
    crash::point("setup.claimed")?;
    let holding = Holding::begin(&mut claim, ask, user, slots)?;
    drop(claim);
    let outcome = wanted.build(holding.clone()).await;
    if outcome.is_err() {
        crash::point("setup.failed")?;
        // The others are told why by us, not that it broke off.
        let mut remains = Holding::of(ask.job, ask.step)?.unwrap_or(holding);
        remains.pending = false;
        let _ = remains.save();
        if let Err(error) = release(&remains).await {
            tracing::warn!("{}", error.report());
        }
    }
    outcome
}

async fn tell_others(etcd: &config::Etcd, ask: &Ask, user: &str, error: &Error) -> Result<()> {
    let store = Etcd::connect(&site::as_node(etcd)?).await?;
    fabric::give_up(&store, ask, user, error).await
}

fn user_name(uid: u32) -> Result<String> {
    let user = User::from_uid(Uid::from_raw(uid)).while_doing(|| format!("finding user {uid}"))?;
    Ok(user.map_or_else(|| uid.to_string(), |user| user.name))
}

/// What the site's configuration makes of the ask.
struct Wanted {
    networks: Vec<(String, Network)>,
    /// Each resource set of the ask.
    sets: BTreeMap<String, ResourceSet>,
    etcd: Option<config::Etcd>,
    switch: SwitchChoice,
    users: ServiceUsers,
}

impl Wanted {
    /// Looks up the resource sets of all VMs, also of those on other hosts.
    fn new(config: &Config, ask: &Ask) -> Result<Self> {
        let mut networks: Vec<(String, Network)> = Vec::new();
        for (set, _) in &ask.sets {
            let found = config.resource_sets.get(set).ok_or_else(|| {
                Error::usage(format!("this host knows no resource set `{set}`")).help(
                    "is /etc/pavo/resources.yaml the same on all hosts? `pavo config check` there",
                )
            })?;
            for name in &found.networks {
                if networks.iter().any(|(known, _)| known == name) {
                    continue;
                }
                let network = config.networks.get(name).ok_or_else(|| {
                    Error::config(format!("the network `{name}` does not exist"))
                        .help("`pavo config check` on this host says where it is named")
                })?;
                networks.push((name.clone(), network.clone()));
            }
        }
        let sets = ask
            .sets
            .iter()
            .filter_map(|(name, _)| Some((name.clone(), config.resource_sets.get(name)?.clone())));
        let batch = &config.batch;
        Ok(Self {
            networks,
            sets: sets.collect(),
            etcd: batch.etcd.clone(),
            switch: batch.switch,
            users: batch.responder_uids,
        })
    }

    /// How many clusters there may be on a host.
    fn slots(&self) -> u32 {
        network::uplink_slots(&self.networks).min(self.users.count())
    }

    async fn build(self, mut holding: Holding) -> Result<()> {
        crash::point("setup.held")?;
        let letter = open_letter(&holding)?;
        let address = address_of(&holding.ask.node, "")?;
        let host = Host::new(NETNS_DIR.into());
        let secret = letter.as_ref().map(|it| &it.secret);
        let (fabric, switch) = match self.meet(&host, &mut holding, secret).await? {
            Some((fabric, switch)) => (Some(fabric), switch),
            None => (None, self.switch(&host, None).await?),
        };
        let users = self.users;
        let plan = self.plan(&holding, fabric, switch)?;
        crash::point("setup.planned")?;
        make_scratch(&holding)?;
        crash::point("setup.scratch")?;
        let journal = Journal::open(JOURNAL_DIR)?.patient(holding.ask.patience());
        journal.apply(&plan.plan, &host).await?;
        let bound = publish::bind_all(&plan, address)?;
        crash::point("setup.bound")?;
        let vms = local_vms(&plan, &bound);
        start_guard(&mut holding, &plan, bound, users).await?;
        crash::point("setup.guarded")?;
        tell_user(&holding, address, vms, letter.map(|it| it.member))?;
        holding.pending = false;
        holding.save()?;
        crash::point("setup.done")
    }

    /// Makes the person known to the site, and finds the other hosts of the job.
    async fn meet(
        &self,
        host: &Host,
        holding: &mut Holding,
        secret: Option<&Secret>,
    ) -> Result<Option<(Fabric, Switch)>> {
        let Some(etcd) = &self.etcd else {
            return match holding.ask.nodes {
                1 => Ok(None),
                _ => Err(Error::config("batch.yaml names no etcd, by which hosts find each other")
                    .help("an administrator adds `etcd-servers` to it on all hosts")),
            };
        };
        let first = holding.ask.node_id == 0;
        if holding.ask.nodes == 1 && secret.is_none() {
            return Ok(None);
        }
        holding.stored = true;
        holding.save()?;
        crash::point("setup.stored")?;
        let store = Etcd::connect(&site::as_node(etcd)?).await?;
        crash::point("setup.connected")?;
        if let (true, Some(secret)) = (first, secret) {
            // Lets the site's store know the person.
            site_store::ensure_person(&store, &holding.user, secret).await?;
            crash::point("setup.introduced")?;
        }
        if holding.ask.nodes == 1 {
            return Ok(None);
        }
        let suffix = self.networks.iter().find_map(|(_, network)| match network {
            Network::Ethernet(ethernet) => ethernet.host_if_suffix.as_deref(),
            Network::Unsupported { .. } => None,
        });
        let underlay = Underlay::of(address_of(&holding.ask.node, suffix.unwrap_or_default())?)?;
        let interfaces = |rank: u32| self.interfaces(&holding.ask, rank);
        let switch = self.switch(host, Some(&underlay.link)).await?;
        let kind = switch.kind();
        let fabric = fabric::join(&store, holding, underlay, kind, &self.networks, &interfaces);
        Ok(Some((fabric.await?, switch)))
    }

    /// The interfaces of a VM, wherever it runs.
    fn interfaces(&self, ask: &Ask, rank: u32) -> VmNetworks {
        let set = ask.set_of(rank).and_then(|set| self.sets.get(set)).cloned().unwrap_or_default();
        VmNetworks {
            rank,
            nic_model: "virtio-net".into(),
            nic_queues: set.nic_queues,
            networks: set.networks,
        }
    }

    /// What carries the frames of this job's guests here.
    async fn switch(&self, host: &Host, underlay: Option<&str>) -> Result<Switch> {
        if self.switch == SwitchChoice::Linux {
            return Ok(Switch::Linux);
        }
        match network::ovs::decide(host, underlay).await {
            (Switch::Linux, why) if self.switch == SwitchChoice::Ovs => {
                Err(Error::system("this host has no Open vSwitch that could carry the cluster")
                    .because(Error::system(why))
                    .help(
                        "start it (`systemctl start openvswitch-switch`), or write `switch: auto`",
                    ))
            }
            (switch, _) => Ok(switch),
        }
    }

    fn plan(
        self,
        holding: &Holding,
        fabric: Option<Fabric>,
        switch: Switch,
    ) -> Result<NetworkPlan> {
        network::plan(&network::Request {
            switch,
            owner: holding.ask.owner(),
            keeper: holding.keeper,
            tap_uid: holding.ask.uid,
            outside: Outside::Host,
            uplink_slot: holding.slot,
            vms: holding.ask.ranks.iter().map(|r| self.interfaces(&holding.ask, *r)).collect(),
            networks: self.networks,
            fabric,
        })
    }
}

fn local_vms(plan: &NetworkPlan, bound: &[Bound]) -> Vec<LocalVm> {
    let ports = |rank: u32| {
        let of_it = bound.iter().filter(|bound| bound.rank == rank);
        of_it.map(|bound| bound.bound.port).collect()
    };
    let local = |(rank, nics): &(u32, Vec<_>)| LocalVm {
        rank: *rank,
        nics: nics.clone(),
        ports: ports(*rank),
    };
    plan.nics.iter().map(local).collect()
}

/// Starts what answers the guests; without an L3 network there is nothing to answer, but
/// the guard still waits for the step's end.
async fn start_guard(
    holding: &mut Holding,
    plan: &NetworkPlan,
    bound: Vec<Bound>,
    users: ServiceUsers,
) -> Result<()> {
    let upstream = publish::name_servers();
    let (dir, user) = (Path::new(NETNS_DIR), users.of(holding.slot));
    let responders = publish::responders(plan, dir, &bound, &upstream, Some(user));
    let mut handed: Vec<OwnedFd> = bound.into_iter().map(|b| b.bound.listener).collect();
    handed.extend(upstream);
    guard::start(holding, responders, handed).await
}

/// What the person's launcher has sealed, if it has: only root can open it.
fn open_letter(holding: &Holding) -> Result<Option<Letter<Identity>>> {
    let Some(sealed) = &holding.ask.sealed else { return Ok(None) };
    let key = SiteKey::read(&Path::new(SITE_DIR).join("site.key"))?;
    key.open(sealed, &holding.user, holding.ask.uid, holding.ask.job).map(Some)
}

/// Where other hosts reach the host of this name.
fn address_of(node: &str, suffix: &str) -> Result<Ipv4Addr> {
    let node = &format!("{node}{suffix}");
    let doing = || format!("looking up this host's address, `{node}`");
    let found = (node.as_str(), 0).to_socket_addrs().while_doing(doing)?;
    let mut ipv4 = found.filter_map(|address| match address {
        SocketAddr::V4(address) => Some(*address.ip()),
        SocketAddr::V6(_) => None,
    });
    ipv4.next().ok_or_else(|| Error::system("it has no IPv4 address")).while_doing(doing)
}

/// The link by which other hosts of the site reach this one.
pub fn underlay(config: &Config, node: &str) -> Result<String> {
    let suffix = config.networks.values().find_map(|network| match network {
        Network::Ethernet(ethernet) => ethernet.host_if_suffix.as_deref(),
        Network::Unsupported { .. } => None,
    });
    Underlay::of(address_of(node, suffix.unwrap_or_default())?).map(|underlay| underlay.link)
}

/// A folder of the user's, below one of root's.
fn make_scratch(holding: &Holding) -> Result<()> {
    make_dir(Path::new(SCRATCH_DIR), 0o711)?;
    let path = holding.scratch();
    let doing = || format!("creating `{}`", path.display());
    let (uid, gid) = (Uid::from_raw(holding.ask.uid), Gid::from_raw(holding.ask.gid));
    // Of an earlier job with this id, whose end nobody saw.
    grave::bury(&path)?;
    std::fs::DirBuilder::new().mode(0o700).create(&path).while_doing(doing)?;
    crash::point("setup.scratch-made")?;
    chown(&path, Some(uid), Some(gid)).while_doing(doing)
}

/// Writes `host.json`, for the user's eyes.
fn tell_user(
    holding: &Holding,
    address: Ipv4Addr,
    vms: Vec<LocalVm>,
    identity: Option<Identity>,
) -> Result<()> {
    let report = HostReport {
        version: HostReport::VERSION,
        node: holding.ask.node.clone(),
        address,
        scratch: holding.scratch(),
        vms,
        identity,
    };
    let text = serde_json::to_vec(&report).expect("a report is always valid JSON");
    let path = holding.dir().join("host.json");
    write_atomically(&path, &text, 0o400)?;
    crash::point("setup.report")?;
    let (uid, gid) = (Uid::from_raw(holding.ask.uid), Gid::from_raw(holding.ask.gid));
    chown(&path, Some(uid), Some(gid)).while_doing(|| format!("handing over `{}`", path.display()))
}
