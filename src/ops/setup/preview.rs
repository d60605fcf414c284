//! What a command would do, for `--dry-run`.

use serde::Serialize;

use super::ask::Ask;
use super::holding::{Holding, lost_scratch};
use super::release::stale_groups;
use super::wreck::Wreck;
use crate::error::Result;
use crate::host::cgroup;
use crate::host::journal::{Journal, Plan};
use crate::host::process;
use crate::host::step::Step;
use crate::model::owner::Owner;
use crate::ops::cleanup::JOURNAL_DIR;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Create,
    Delete,
}

/// What would be done for one owner, in this order.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    pub action: Action,
    pub owner: Owner,
    pub steps: Vec<Step>,
    /// What is done beside the steps.
    pub also: Vec<String>,
}

impl Preview {
    pub fn new(action: Action, plan: Plan) -> Self {
        let Plan { owner, mut steps, .. } = plan;
        if action == Action::Delete {
            steps.reverse();
        }
        Self { action, owner, steps, also: Vec::new() }
    }

    pub fn with(mut self, also: impl Into<String>) -> Self {
        self.also.push(also.into());
        self
    }

    /// A line for each step.
    pub fn lines(&self) -> Vec<String> {
        let verb = match self.action {
            Action::Create => "create",
            Action::Delete => "delete",
        };
        let steps = self.steps.iter().map(|step| format!("{verb} {step}"));
        steps.chain(self.also.iter().cloned()).collect()
    }
}

/// What the removal of these clusters would do.
pub fn removals(holdings: &[Holding], journal: &Journal) -> Result<Vec<Preview>> {
    holdings.iter().map(|holding| removal(holding, journal)).collect()
}

fn removal(holding: &Holding, journal: &Journal) -> Result<Preview> {
    let owner = holding.ask.owner();
    let plan = journal.read(owner)?;
    let plan = plan.unwrap_or(Plan { owner, keeper: holding.keeper, steps: Vec::new() });
    let mut preview = Preview::new(Action::Delete, plan);
    if let Some(guard) = holding.guard.filter(process::alive) {
        preview = preview.with(format!("end process {}, which answers the guests", guard.pid));
    }
    if !holding.undone {
        let Ask { node, job, step, .. } = &holding.ask;
        preview = preview
            .with(format!("delete `{}`", holding.scratch().display()))
            .with(format!("delete control groups `{}`", cgroup::step_group(node, *job, *step)));
    }
    if holding.stored {
        preview = preview.with("delete this host's keys of the job in etcd");
    }
    Ok(preview.with(format!("delete `{}`", holding.dir().display())))
}

/// What `delete` would do.
pub fn delete_preview(ask: &Ask) -> Result<Vec<Preview>> {
    if let Some(wreck) = Wreck::of(ask.job, ask.step) {
        let (owner, also) = (wreck.owner(), wreck.lines());
        return Ok(vec![Preview { action: Action::Delete, owner, steps: Vec::new(), also }]);
    }
    let holding = Holding::of(ask.job, ask.step)?;
    removals(holding.as_slice(), &Journal::peek(JOURNAL_DIR))
}

/// What `sweep` would do.
pub fn sweep_preview() -> Result<Vec<Preview>> {
    let journal = Journal::peek(JOURNAL_DIR);
    let dead: Vec<Holding> = Holding::all()?.into_iter().filter(|h| !h.alive()).collect();
    let mut all = removals(&dead, &journal)?;
    for owner in journal.owners()? {
        let known = dead.iter().any(|holding| holding.ask.owner() == owner);
        let plan = journal.read(owner)?.filter(|plan| !known && !process::alive(&plan.keeper));
        all.extend(plan.map(|plan| Preview::new(Action::Delete, plan)));
    }
    for wreck in Wreck::all()?.into_iter().filter(|wreck| !wreck.alive()) {
        let (owner, also) = (wreck.owner(), wreck.lines());
        all.push(Preview { action: Action::Delete, owner, steps: Vec::new(), also });
    }
    let also = strays()?;
    if !also.is_empty() {
        let (action, steps) = (Action::Delete, Vec::new());
        all.push(Preview { action, owner: Owner::NODE, steps, also });
    }
    Ok(all)
}

/// What no plan and no holding knows, and is ours to remove.
fn strays() -> Result<Vec<String>> {
    let folders = lost_scratch()?.into_iter().map(|path| format!("delete `{}`", path.display()));
    let groups = stale_groups()?.into_iter().map(|name| format!("delete control groups `{name}`"));
    Ok(folders.chain(groups).collect())
}
