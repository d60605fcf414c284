//! What belongs to a host of the site and to no cluster.
//!
//! It has the owner `node` in the journal and is kept by process 1: nothing sweeps it, and
//! after a reboot there is nothing of it left. Jobs may rely on it, never take it back.
//!
//! | object | why | undone |
//! |---|---|---|
//! | folders | set-ups use them | if they were not there, and are empty |
//! | `/run/netns`, shared | named namespaces are seen by `ip netns` | while none is named |
//! | `ip_forward` | L3 networks have a way out | to what it was |
//! | bridges `PREFIX_xbr` | pcocc has them, and its users look for them | deleted |

use std::path::Path;
use std::time::Duration;

use super::holding::{Claim, Holding, RUN_DIR, SCRATCH_DIR, node_names};
use super::preview::{Action, Preview};
use super::release::{Patience, leave_host, release, sweep};
use super::wreck::Wreck;
use super::{grave, lost, site_config};
use crate::config::{Config, Layer, Network};
use crate::error::{Context, Error, Result};
use crate::host::journal::{Journal, LOCK_LIMIT, Plan};
use crate::host::step::{Step, sysctl};
use crate::host::{Host, cgroup, file, firewall, netns, process};
use crate::model::owner::Owner;
use crate::ops::cleanup::{JOURNAL_DIR, NETNS_DIR};
use crate::ops::rehearsal;

/// How long the rehearsal may take.
const REHEARSAL: Duration = Duration::from_secs(20);

/// How long what users' folders hold may take.
const FOLDERS: Duration = Duration::from_secs(600);

const FORWARD: &str = "net/ipv4/ip_forward";

/// `pavo internal setup init`: makes what set-ups use, and removes what no living step
/// owns. Safe to run again, also while clusters run.
///
/// Returns what the site should mend, a text each: clusters may run all the same.
pub async fn init() -> Result<Vec<String>> {
    let config = site_config()?;
    let claim = Claim::wait(LOCK_LIMIT)?;
    let journal = Journal::open(JOURNAL_DIR)?;
    let plan = node_plan(&config, &journal)?;
    journal.update(&plan, &Host::new(NETNS_DIR.into())).await?;
    drop(claim);
    let mut warnings = warnings().await;
    // A host that boots is waited for: the timer's sweep has more patience.
    let mut note = |outcome: Result<()>| warnings.extend(outcome.err().map(|e| e.report()));
    note(sweep(Patience::Short).await.map(drop));
    if let Some(etcd) = &config.batch.etcd {
        note(lost::forget_lost(etcd).await);
    }
    Ok(warnings)
}

/// What `init` would do.
pub fn init_preview() -> Result<Preview> {
    let plan = node_plan(&site_config()?, &Journal::peek(JOURNAL_DIR))?;
    Ok(Preview::new(Action::Create, plan))
}

/// Everything that the host shall have.
fn node_plan(config: &Config, journal: &Journal) -> Result<Plan> {
    let keeper = process::identify(1).ok_or_else(|| Error::system("there is no process 1"))?;
    // What we have made in this boot is not what was there before.
    let old = journal.read(Owner::NODE)?.filter(|old| old.keeper == keeper);
    let old = old.map(|old| old.steps).unwrap_or_default();
    let parent = Path::new(SCRATCH_DIR).parent().unwrap_or(Path::new("/"));
    let mut steps = Vec::new();
    for (path, mode) in
        [(parent, 0o755), (Path::new(SCRATCH_DIR), 0o711), (NETNS_DIR.as_ref(), 0o755)]
    {
        let step = Step::Folder { path: path.into(), mode };
        if old.contains(&step) || !path.exists() {
            steps.push(step);
        }
    }
    let shared = Step::SharedFolder { path: NETNS_DIR.into() };
    if old.contains(&shared) || !netns::is_mount_point(NETNS_DIR.as_ref())? {
        steps.push(shared);
    }
    let l3 = config.networks.values().filter_map(|network| match network {
        Network::Ethernet(ethernet) if ethernet.layer == Layer::L3 => Some(ethernet),
        _ => None,
    });
    let l3: Vec<_> = l3.collect();
    if !l3.is_empty() {
        steps.push(forwarding(&old)?);
    }
    for prefix in l3.iter().filter_map(|ethernet| ethernet.dev_prefix.as_ref()) {
        let name = format!("{prefix}_xbr");
        if !steps.iter().any(|step| matches!(step, Step::Bridge { name: n, .. } if *n == name)) {
            steps.push(Step::Bridge {
                name,
                mtu: 1500,
                group: Owner::NODE.link_group(),
                alias: "pavo: this host".into(),
                mac: None,
            });
        }
    }
    Ok(Plan { owner: Owner::NODE, keeper, steps })
}

fn forwarding(old: &[Step]) -> Result<Step> {
    let is_it = |step: &&Step| matches!(step, Step::Sysctl { key, .. } if key == FORWARD);
    if let Some(step) = old.iter().find(is_it) {
        return Ok(step.clone());
    }
    let before = Some(sysctl(FORWARD)?);
    Ok(Step::Sysctl { namespace: None, key: FORWARD.into(), value: "1".into(), before })
}

/// What clusters on this host would suffer from.
async fn warnings() -> Vec<String> {
    let mut found = Vec::new();
    if let Err(error) = rehearsal::rehearse(REHEARSAL).await {
        let error = Err::<(), _>(error).while_doing(|| "trying a cluster's network".into());
        found.extend(error.err().map(|error| error.report()));
    }
    match firewall::forward_drops().await {
        Ok(drops) => found.extend(drops.iter().map(|drop| {
            let rules: Vec<String> =
                drop.rules().iter().map(|rule| format!("\n  help: {rule}")).collect();
            format!(
                "{} drops what clusters send, unless a rule accepts it{}",
                drop.name(),
                rules.concat()
            )
        })),
        Err(error) => found.push(error.report()),
    }
    if firewall::bridges_call_iptables() {
        found.push(BRIDGES_CALL_IPTABLES.into());
    }
    found
}

/// What it means, and what to do.
pub const BRIDGES_CALL_IPTABLES: &str = "guests' frames pass the host's IP rules (net.bridge.bridge-nf-call-iptables = 1)\
     \n  help: sysctl -w net.bridge.bridge-nf-call-iptables=0\
     \n  help: if Docker or Kubernetes need it: let them accept what comes by `pb*`";

/// `pavo internal setup cleanup`: removes all clusters' set-ups, and what `init` has made.
/// Then the host is as it was before.
///
/// # Errors
/// While clusters live, unless by `force`.
pub async fn cleanup(force: bool) -> Result<()> {
    let living = Holding::all()?.into_iter().filter(Holding::alive).map(|living| living.ask.job);
    let wrecks = Wreck::all()?.into_iter().filter(Wreck::alive).map(|wreck| wreck.job);
    let names: Vec<String> = living.chain(wrecks).map(|job| job.to_string()).collect();
    if !force && !names.is_empty() {
        return Err(Error::usage(format!("clusters run here, of job {}", names.join(", "))).help(
            format!(
                "end them first: `scancel {}`\n  help: `--force` takes their networks and disks \
                 away, and leaves their processes to Slurm",
                names.join(" ")
            ),
        ));
    }
    let host = Host::new(NETNS_DIR.into());
    let names = node_names();
    let mut failure = sweep(Patience::Long).await.err();
    for holding in Holding::all()? {
        failure = end(&holding, force).await.err().or(failure);
    }
    for wreck in Wreck::all()? {
        failure = wreck.clear().await.err().or(failure);
    }
    // The folder goes with the host's plan if nothing is in it.
    grave::empty(Path::new(SCRATCH_DIR), FOLDERS);
    let journal = Journal::open(JOURNAL_DIR)?;
    for owner in journal.owners()?.into_iter().filter(|owner| force || *owner == Owner::NODE) {
        failure = journal.undo(owner, &host).await.err().or(failure);
    }
    for node in names {
        for (job, step) in cgroup::steps_of(&node).into_keys() {
            cgroup::remove(&cgroup::step_group(&node, job, step));
        }
    }
    failure.map_or(Ok(()), Err)?;
    journal.close().await?;
    forget_run_dir()
}

/// Removes one cluster's set-up. By force it goes even if the store does not answer: its
/// keys are then found by `sweep --ids`.
async fn end(holding: &Holding, force: bool) -> Result<()> {
    let released = release(holding).await;
    if released.is_ok() || !force {
        return released;
    }
    let Some((mut holding, _lock)) = holding.remove(LOCK_LIMIT).await? else { return Ok(()) };
    leave_host(&mut holding).await?;
    holding.forget()
}

fn forget_run_dir() -> Result<()> {
    let dir = Path::new(RUN_DIR);
    let claim = Claim::wait(LOCK_LIMIT)?;
    claim.tidy()?;
    for name in ["lock", lost::MARK] {
        remove_file(&dir.join(name))?;
    }
    file::remove_empty_folder(dir).map(drop)
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.while_doing(|| format!("removing `{}`", path.display())),
    }
}

/// What `cleanup` would do.
pub fn cleanup_preview() -> Result<Vec<Preview>> {
    let journal = Journal::peek(JOURNAL_DIR);
    let mut all = super::preview::removals(&Holding::all()?, &journal)?;
    if let Some(plan) = journal.read(Owner::NODE)? {
        all.push(Preview::new(Action::Delete, plan).with(format!("delete `{RUN_DIR}`")));
    }
    Ok(all)
}
