//! Taking back what a set-up made on this host.
//!
//! First what is on the host, then what the site's store holds: where that does not
//! answer, the holding stays with [`undone`](Holding::undone), takes nobody's place, and
//! the next sweep asks again.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::time::{sleep, timeout};

use super::ask::Ask;
use super::fabric;
use super::grave;
use super::holding::{Claim, Holding, SCRATCH_DIR, lost_scratch, node_names};
use super::wreck::Wreck;
use super::{lost, site_config};
use crate::error::{Context, Error, Result};
use crate::host::journal::{Journal, LOCK_LIMIT};
use crate::host::process::{self, ProcessId};
use crate::host::{Host, cgroup, crash, ovs};
use crate::model::owner::Owner;
use crate::ops::cleanup::{JOURNAL_DIR, NETNS_DIR};
use crate::ops::site;
use crate::store::etcd::Etcd;

/// How long a guard may take to end before it is killed.
const GUARD_LIMIT: Duration = Duration::from_secs(2);
/// How long what has ended may keep its control groups busy.
const LAST_MOMENT: Duration = Duration::from_millis(500);
/// A control group of this age is nobody's who is about to enter it.
const STALE: Duration = Duration::from_secs(10);

/// How long `delete` may take for what users' folders hold. Some have millions of files.
const GRAVE_LIMIT: Duration = Duration::from_secs(10);

/// How long a sweep may wait for the store, and take for what users' folders hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// It is another's set-up that waits for this.
    Short,
    Long,
}

impl Patience {
    /// For other processes of pavo.
    fn for_others(self) -> Duration {
        match self {
            Self::Short => Duration::from_secs(5),
            Self::Long => LOCK_LIMIT,
        }
    }

    fn for_folders(self) -> Duration {
        match self {
            Self::Short => Duration::from_millis(200),
            Self::Long => Duration::from_secs(3600),
        }
    }
}

/// `pavo internal setup delete`: removes what `create` made for the same ask. Nothing to
/// remove is no error.
pub async fn delete(ask: &Ask) -> Result<()> {
    crash::point("delete.begin")?;
    match release_step(ask.job, ask.step).await {
        Ok(false) => Ok(()),
        released => {
            if !grave::empty(Path::new(SCRATCH_DIR), GRAVE_LIMIT) {
                tracing::warn!("the VMs' folders hold much: the next sweep goes on");
            }
            released.map(drop)
        }
    }
}

/// Removes everything of a step on this host, also where what is noted of it cannot be
/// read; whether there was something.
pub async fn release_step(job: u32, step: u32) -> Result<bool> {
    match (Holding::of(job, step), Wreck::of(job, step)) {
        (Ok(Some(holding)), _) => release(&holding).await.map(|()| true),
        (Err(_), Some(wreck)) => {
            tracing::warn!("{}", wreck.error().report());
            wreck.clear().await.map(|()| true)
        }
        _ => Ok(false),
    }
}

/// Removes everything of a cluster on this host: its guard, its network, its files, what
/// the site's store holds for it. Several may do it at once.
pub async fn release(holding: &Holding) -> Result<()> {
    let Some((mut holding, _lock)) = holding.remove(LOCK_LIMIT).await? else { return Ok(()) };
    let noted = holding.clone();
    let looking = async {
        let Some(store) = open_store(noted.stored).await? else { return Ok(None) };
        let own = fabric::own(&store, &noted).await?;
        Ok::<_, Error>(Some((store, own)))
    };
    // The kernel takes its time with links: enough to log in and look.
    let (left, found) = tokio::join!(leave_host(&mut holding), looking);
    left?;
    if let Some((store, own)) = found? {
        fabric::leave(&store, &holding, own).await?;
    }
    crash::point("release.left")?;
    holding.forget()
}

/// Removes what is on this host.
pub async fn leave_host(holding: &mut Holding) -> Result<()> {
    if holding.undone {
        return Ok(());
    }
    crash::point("release.begin")?;
    let journal = Journal::open(JOURNAL_DIR)?;
    let host = Host::new(NETNS_DIR.into());
    let guard = holding.guard.filter(|guard| *guard != process::current());
    let ending = async {
        if let Some(guard) = &guard {
            end(guard).await;
        }
    };
    // It is told first, and touches nothing from then on.
    let ((), undone) = tokio::join!(ending, journal.undo(holding.ask.owner(), &host));
    crash::point("release.undone")?;
    grave::bury(&holding.scratch())?;
    crash::point("release.buried")?;
    undone?;
    leave_groups(&holding.ask).await;
    if holding.stored {
        holding.undone = true;
        holding.save()?;
    }
    Ok(())
}

/// Removes the step's control groups. Whoever started this process may have put it there.
pub async fn leave_groups(ask: &Ask) {
    let name = cgroup::step_group(&ask.node, ask.job, ask.step);
    cgroup::leave(&name);
    let end = Instant::now() + LAST_MOMENT;
    while !cgroup::remove(&name) {
        if Instant::now() > end {
            tracing::warn!("control group `{name}` is still in use");
            return;
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// The site's store, where it is wanted.
async fn open_store(wanted: bool) -> Result<Option<Etcd>> {
    if !wanted {
        return Ok(None);
    }
    match site_config()?.batch.etcd {
        Some(etcd) => Etcd::connect(&site::as_node(&etcd)?).await.map(Some),
        None => Ok(None),
    }
}

/// Ends a guard: politely, then surely.
pub async fn end(guard: &ProcessId) {
    // Whether it is this very process is looked at behind a descriptor of it: another may get
    // its id at any moment.
    let told = process::signal(guard, Signal::SIGTERM);
    if told.is_err() || !matches!(timeout(GUARD_LIMIT, process::ended(guard)).await, Ok(Ok(()))) {
        if let Err(error) = process::signal(guard, Signal::SIGKILL) {
            tracing::warn!("ending the guard, process {}: {error}", guard.pid);
        }
    }
}

/// Removes what no living step owns on this host; returns whose it was.
///
/// # Errors
/// The last failure, after all were tried.
pub async fn sweep(patience: Patience) -> Result<Vec<Owner>> {
    let others = patience.for_others();
    Claim::wait(others)?.tidy()?;
    let (mut swept, mut failure) = (Vec::new(), None);
    let mut note = |outcome: Result<()>| {
        if let Err(error) = outcome {
            tracing::warn!("{}", error.report());
            failure = Some(error);
        }
    };
    let (mut pending, all) = (Vec::new(), Holding::all()?);
    for holding in all.into_iter().filter(|holding| !holding.alive()) {
        match sweep_one(&holding, others).await {
            Ok(Some(left)) => pending.push(left),
            Ok(None) => swept.push(holding.ask.owner()),
            Err(error) => note(Err(error)),
        }
    }
    sweep_wrecks(&mut swept, &mut note).await?;
    let journal = Journal::open(JOURNAL_DIR)?.patient(others);
    match journal.sweep(&Host::new(NETNS_DIR.into())).await {
        Ok(owners) => swept.extend(owners),
        Err(error) => note(Err(error)),
    }
    note(sweep_ovs(&journal, &mut swept).await);
    lost_scratch()?.iter().for_each(|path| note(grave::bury(path)));
    grave::empty(Path::new(SCRATCH_DIR), patience.for_folders());
    sweep_groups()?;
    let limit = match patience {
        Patience::Short => Duration::from_secs(2),
        Patience::Long => Duration::from_secs(40),
    };
    match timeout(limit, leave_stores(&pending)).await {
        Ok(Ok(())) => swept.extend(pending.iter().map(|holding| holding.ask.owner())),
        Ok(Err(error)) => note(Err(error)),
        Err(_) => note(Err(Error::system("etcd has not answered in time"))),
    }
    if patience == Patience::Long {
        if let Some(etcd) = site_config().ok().and_then(|config| config.batch.etcd) {
            note(lost::forget_lost(&etcd).await);
        }
    }
    failure.map_or(Ok(swept), Err)
}

/// Removes what dead steps have of which little is known, and complains of those that live.
async fn sweep_wrecks(swept: &mut Vec<Owner>, note: &mut impl FnMut(Result<()>)) -> Result<()> {
    for wreck in Wreck::all()? {
        if wreck.alive() {
            note(Err(wreck.error()));
            continue;
        }
        tracing::warn!("{}", wreck.error().report());
        match wreck.clear().await {
            Ok(()) => swept.push(wreck.owner()),
            Err(error) => note(Err(error)),
        }
    }
    Ok(())
}

/// Deletes bridges of Open vSwitch that no plan knows: its database outlives a reboot.
async fn sweep_ovs(journal: &Journal, swept: &mut Vec<Owner>) -> Result<()> {
    let host = Host::new(NETNS_DIR.into());
    if !host.ovs_db().exists() {
        return Ok(());
    }
    // One that does not answer carries no cluster.
    let Ok(found) = ovs::owners(&host).await else { return Ok(()) };
    // Read later: a plan is there before its bridges.
    let known = journal.owners()?;
    for owner in found.difference(&known) {
        ovs::delete(&host, *owner).await?;
        swept.push(*owner);
    }
    Ok(())
}

/// Removes what a dead step has on this host, and returns what is left to do.
async fn sweep_one(holding: &Holding, others: Duration) -> Result<Option<Holding>> {
    let Some((mut holding, _lock)) = holding.remove(others).await? else { return Ok(None) };
    leave_host(&mut holding).await?;
    if holding.stored {
        return Ok(Some(holding));
    }
    holding.forget().map(|()| None)
}

/// Takes back what is in the store, until it does not answer.
async fn leave_stores(pending: &[Holding]) -> Result<()> {
    for holding in pending {
        release(holding)
            .await
            .while_doing(|| format!("deleting the keys of {} in etcd", holding.ask))?;
    }
    Ok(())
}

/// The control groups, by name, of steps that nobody knows.
pub fn stale_groups() -> Result<Vec<String>> {
    let (known, wrecks) = (Holding::all()?, Wreck::all()?);
    let mut stale = Vec::new();
    for node in node_names() {
        let is_known = |(job, step): (u32, u32)| {
            known.iter().any(|holding| holding.ask.job == job && holding.ask.step == step)
                || wrecks.iter().any(|wreck| wreck.job == job && wreck.step == step)
        };
        let steps = cgroup::steps_of(&node).into_iter();
        // A younger one may have been made for a set-up that begins.
        let steps = steps.filter(|(step, age)| *age > STALE && !is_known(*step));
        stale.extend(steps.map(|((job, step), _)| cgroup::step_group(&node, job, step)));
    }
    Ok(stale)
}

fn sweep_groups() -> Result<()> {
    for name in stale_groups()? {
        // Something may still run there: then it is somebody's.
        cgroup::remove(&name);
    }
    Ok(())
}
