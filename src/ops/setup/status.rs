//! `pavo internal setup status`: what pavo holds on this host, and what is left to remove.

use serde::Serialize;

use super::holding::Holding;
use super::preview::sweep_preview;
use super::wreck::Wreck;
use crate::error::{Error, Result, WireError};
use crate::host::journal::Journal;
use crate::host::process;
use crate::host::step::Step;
use crate::model::owner::Owner;
use crate::ops::cleanup::JOURNAL_DIR;

/// What pavo holds on this host.
#[derive(Clone, Debug, Serialize)]
pub struct NodeStatus {
    pub clusters: Vec<ClusterHere>,
    /// What belongs to the host and to no cluster.
    pub node: Vec<String>,
    /// What the next sweep does.
    pub leftovers: Vec<String>,
    /// Clusters of which cannot be read what was noted of them: what is wrong, and what to
    /// do.
    pub unreadable: Vec<String>,
    /// Clusters of which only keys in the store are left.
    pub pending: Vec<String>,
}

/// A cluster's part on this host.
#[derive(Clone, Debug, Serialize)]
pub struct ClusterHere {
    pub job: u32,
    pub step: u32,
    pub user: String,
    /// The ranks of its VMs here.
    pub vms: Vec<u32>,
    /// Seconds of the epoch.
    pub since: u64,
    pub switch: Switch,
    /// Whether the step's process is there; without it the cluster is a leftover.
    pub keeper_alive: bool,
    /// Whether the process that answers the guests is there; `None` before it is started.
    pub guard_alive: Option<bool>,
}

/// What carries the frames of the VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    None,
    Linux,
    Ovs,
}

/// Looks, and changes nothing.
pub fn status() -> Result<NodeStatus> {
    let journal = Journal::peek(JOURNAL_DIR);
    let (pending, here): (Vec<_>, Vec<_>) =
        Holding::all()?.into_iter().partition(|holding| holding.undone);
    let clusters = here.iter().map(|holding| describe(holding, &journal));
    let node = journal.read(Owner::NODE)?.map(|plan| plan.steps).unwrap_or_default();
    let leftovers = sweep_preview()?.iter().flat_map(super::preview::Preview::lines).collect();
    Ok(NodeStatus {
        clusters: clusters.collect::<Result<_>>()?,
        node: node.iter().map(Step::to_string).collect(),
        leftovers,
        unreadable: Wreck::all()?.iter().map(|wreck| told(&wreck.error())).collect(),
        pending: pending
            .iter()
            .map(|holding| format!("{}.{}", holding.ask.job, holding.ask.step))
            .collect(),
    })
}

/// In a line.
fn told(error: &Error) -> String {
    let WireError { what, because, help, .. } = error.to_wire();
    let because: String = because.iter().map(|cause| format!(": {cause}")).collect();
    format!("{what}{because}; {}", help.join("; "))
}

fn describe(holding: &Holding, journal: &Journal) -> Result<ClusterHere> {
    let plan = journal.read(holding.ask.owner())?;
    Ok(ClusterHere {
        job: holding.ask.job,
        step: holding.ask.step,
        user: holding.user.clone(),
        vms: holding.ask.ranks.clone(),
        since: holding.since,
        switch: plan.map_or(Switch::None, |plan| switch(&plan.steps)),
        keeper_alive: holding.alive(),
        guard_alive: holding.guard.as_ref().map(process::alive),
    })
}

fn switch(steps: &[Step]) -> Switch {
    // A step is written as an object with one key, its kind.
    let is_ovs = |step: &Step| {
        let written = serde_json::to_value(step).unwrap_or_default();
        written.as_object().is_some_and(|step| step.keys().any(|kind| kind.starts_with("ovs-")))
    };
    match steps {
        [] => Switch::None,
        steps if steps.iter().any(is_ovs) => Switch::Ovs,
        _ => Switch::Linux,
    }
}
