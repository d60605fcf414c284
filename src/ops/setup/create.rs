//! `pavo internal setup create`: a host is made ready for the VMs of one step.

use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::unistd::{Gid, Uid, User, chown};

use super::ask::Ask;
use super::guard;
use super::holding::{Claim, Holding, SCRATCH_DIR, make_dir};
use super::host_report::{HostReport, LocalVm};
use super::release::{release, sweep};
use super::site_config;
use crate::config::{Config, Network};
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::host::file::write_atomically;
use crate::host::journal::Journal;
use crate::network::{self, NetworkPlan, Outside, VmNetworks};
use crate::ops::cleanup::{JOURNAL_DIR, NETNS_DIR};
use crate::ops::publish::{self, Bound};

/// The account that owns nothing.
const NOBODY: u32 = 65_534;

/// Makes all that the local VMs need, or nothing.
///
/// # Errors
/// What the user is told, with the name of this host before it: a cause and a way out.
pub async fn create(ask: &Ask) -> Result<()> {
    // What dead steps left must not be in the way; their trouble is not this user's.
    if let Err(error) = sweep().await {
        tracing::warn!("{}", error.report());
    }
    let config = site_config()?;
    let wanted = Wanted::new(&config, ask)?;
    let user = user_name(ask.uid)?;
    let slots = network::uplink_slots(&wanted.networks);
    let holding = Holding::begin(&Claim::wait()?, ask, &user, slots)?;
    let outcome = wanted.build(holding.clone()).await;
    if outcome.is_err() {
        let remains = Holding::of(ask.job, ask.step)?.unwrap_or(holding);
        if let Err(error) = release(&remains).await {
            tracing::warn!("{}", error.report());
        }
    }
    outcome
}

fn user_name(uid: u32) -> Result<String> {
    let user = User::from_uid(Uid::from_raw(uid)).while_doing(|| format!("finding user {uid}"))?;
    Ok(user.map_or_else(|| uid.to_string(), |user| user.name))
}

/// What the site's configuration makes of the ask.
struct Wanted {
    networks: Vec<(String, Network)>,
    vms: Vec<VmNetworks>,
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
        let vm = |rank: &u32| {
            let set = ask.set_of(*rank).and_then(|set| config.resource_sets.get(set));
            VmNetworks {
                rank: *rank,
                nic_model: "virtio-net".into(),
                networks: set.map(|set| set.networks.clone()).unwrap_or_default(),
            }
        };
        Ok(Self { networks, vms: ask.ranks.iter().map(vm).collect() })
    }

    async fn build(self, mut holding: Holding) -> Result<()> {
        let address = address_of(&holding.ask.node)?;
        let plan = self.plan(&holding)?;
        make_scratch(&holding)?;
        let journal = Journal::open(JOURNAL_DIR)?;
        journal.apply(&plan.plan, &Host::new(NETNS_DIR.into())).await?;
        let bound = publish::bind_all(&plan, address)?;
        let vms = local_vms(&plan, &bound);
        holding.guard = start_guard(&holding, &plan, bound).await?;
        holding.save()?;
        tell_user(&holding, address, vms)
    }

    fn plan(self, holding: &Holding) -> Result<NetworkPlan> {
        network::plan(&network::Request {
            owner: holding.ask.owner(),
            keeper: holding.keeper,
            tap_uid: holding.ask.uid,
            outside: Outside::Host,
            uplink_slot: holding.slot,
            networks: self.networks,
            vms: self.vms,
            fabric: None,
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
    holding: &Holding,
    plan: &NetworkPlan,
    bound: Vec<Bound>,
) -> Result<Option<crate::host::process::ProcessId>> {
    let upstream = publish::name_servers();
    let dir = Path::new(NETNS_DIR);
    let responders = publish::responders(plan, dir, &bound, &upstream, Some((NOBODY, NOBODY)));
    let mut handed: Vec<OwnedFd> = bound.into_iter().map(|b| b.bound.listener).collect();
    handed.extend(upstream);
    guard::start(holding, responders, handed).await.map(Some)
}

/// Where other hosts reach the host of this name.
fn address_of(node: &str) -> Result<Ipv4Addr> {
    let doing = || format!("looking up this host's address, `{node}`");
    let found = (node, 0).to_socket_addrs().while_doing(doing)?;
    let mut ipv4 = found.filter_map(|address| match address {
        SocketAddr::V4(address) => Some(*address.ip()),
        SocketAddr::V6(_) => None,
    });
    ipv4.next().ok_or_else(|| Error::system("it has no IPv4 address")).while_doing(doing)
}

/// A folder of the user's, below one of root's.
fn make_scratch(holding: &Holding) -> Result<()> {
    make_dir(Path::new(SCRATCH_DIR), 0o711)?;
    let path = holding.scratch();
    let doing = || format!("creating `{}`", path.display());
    let (uid, gid) = (Uid::from_raw(holding.ask.uid), Gid::from_raw(holding.ask.gid));
    std::fs::DirBuilder::new().mode(0o700).create(&path).while_doing(doing)?;
    chown(&path, Some(uid), Some(gid)).while_doing(doing)
}

/// Writes `host.json`, for the user's eyes.
fn tell_user(holding: &Holding, address: Ipv4Addr, vms: Vec<LocalVm>) -> Result<()> {
    let report = HostReport {
        version: HostReport::VERSION,
        node: holding.ask.node.clone(),
        address,
        scratch: holding.scratch(),
        vms,
    };
    let text = serde_json::to_vec(&report).expect("a report is always valid JSON");
    let path = holding.dir().join("host.json");
    write_atomically(&path, &text, 0o400)?;
    let (uid, gid) = (Uid::from_raw(holding.ask.uid), Gid::from_raw(holding.ask.gid));
    chown(&path, Some(uid), Some(gid)).while_doing(|| format!("handing over `{}`", path.display()))
}
