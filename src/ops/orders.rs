//! An order for machines, made ready: whom it concerns, who is spared, and how it is gone about.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::book::now;
use super::power::{Jobs, bmc};
use crate::error::{Error, Result};
use crate::model::node::inventory::Inventory;
use crate::model::node::operation::{Operation, State};
use crate::model::node::request::Outcome;
use crate::model::nodeset::NodeSet;
use crate::model::order::{Order, Wanted};
use crate::node::power::action::{Action, Patience};
use crate::node::power::fanout::{Plan, Window};
use crate::node::power::{Bmc, Boot, Device};
use crate::store::secret::vault::Vault;

/// The longest time that may be asked for, in seconds.
const DAY: u64 = 86_400;

/// An order that may begin.
#[derive(Debug)]
pub struct Prepared {
    pub order: Order,
    pub plan: Plan,
    pub bmcs: Vec<Bmc>,
    /// The nodes with which nothing is begun, and why.
    pub refused: Vec<Outcome>,
    /// All of them.
    names: NodeSet,
}

impl Prepared {
    /// As the journal has it before it begins.
    pub fn operation(&self, id: u64, user: &str) -> Operation {
        Operation {
            id,
            what: format!("{} {}", self.order.action.verb(), self.names),
            user: user.to_owned(),
            state: State::Running,
            begun: now(),
            ended: None,
            total: self.names.len(),
            done: 0,
            failed: 0,
            reason: None,
            stopped_by: None,
            writer: None,
            order: Some(self.order.clone()),
        }
    }
}

/// Makes an order ready for these nodes, with those left out that its plan's guard spares.
pub async fn prepare(
    mut order: Order,
    mut plan: Plan,
    names: NodeSet,
    inventory: &Inventory,
    vault: &Vault,
) -> Prepared {
    // As they are now: who does it again later means the same ones.
    order.names = names.to_string();
    let (mut bmcs, mut refused) = (Vec::new(), Vec::new());
    for name in names.names() {
        let Some(own) = inventory.nodes.get(name.as_str()) else {
            refused.push(Outcome::missing(name));
            continue;
        };
        let allowed = match &plan.guard {
            Some(guard) => guard.check(&name).await,
            None => Ok(()),
        };
        let found = allowed.and_then(|()| bmc(inventory, vault, &name, own));
        match found {
            Ok(bmc) => bmcs.push(bmc),
            Err(error) => {
                let report = error.report();
                let text = report.trim_start_matches("error: ").trim_end().to_owned();
                refused.push(Outcome { name, ok: false, text });
            }
        }
    }
    plan.failed_before = refused.len();
    Prepared { order, plan, bmcs, refused, names }
}

/// What runs on nodes, by Slurm.
///
/// # Errors
/// When it does not say.
pub async fn jobs() -> Result<Jobs> {
    let jobs = Jobs::of_slurm().await;
    jobs.map_err(|error| error.help("to do it without knowing what runs there: `--force`"))
}

/// How an order is gone about; nobody is spared yet.
///
/// # Errors
/// When it is no order.
pub fn plan(order: &Order) -> Result<Plan> {
    let boot = |device| Action::SetBootDevice(Boot { device, always: order.always });
    let action = match order.action {
        Wanted::Status => Action::Status,
        Wanted::On => Action::On,
        Wanted::Off => Action::Off,
        Wanted::Soft => Action::Soft,
        Wanted::Reset => Action::Reset,
        Wanted::Cycle => Action::Cycle,
        Wanted::Boot => Action::Boot,
        Wanted::Bootdev => Action::BootDevice,
        Wanted::Net => boot(Device::Net),
        Wanted::Disk => boot(Device::Disk),
        Wanted::Cdrom => boot(Device::Cdrom),
        Wanted::Bios => boot(Device::Bios),
        Wanted::Default => boot(Device::Default),
    };
    if order.always && !matches!(action, Action::SetBootDevice(_)) {
        return Err(Error::usage("`always` without a device"));
    }
    let within = |what: &str, value: u64, range: RangeInclusive<u64>| match range.contains(&value) {
        true => Ok(value),
        false => Err(Error::usage(format!(
            "`{what}` is {value}, and may be {} to {}",
            range.start(),
            range.end()
        ))),
    };
    let seconds = |what, value, range| within(what, value, range).map(Duration::from_secs);
    let many = |what, value: usize| within(what, value as u64, 1..=100_000);
    let fail_limit = order.fail_limit.as_deref().map(str::parse).transpose()?;
    let interval = seconds("interval", order.interval, 0..=DAY)?;
    many("fanout", order.fanout)?;
    order.window.map_or(Ok(0), |window| many("window", window))?;
    within("retries", order.retries.into(), 0..=100_000)?;
    Ok(Plan {
        at_once: order.fanout,
        patience: Patience {
            answer: seconds("timeout", order.timeout, 1..=DAY)?,
            tries: order.retries + 1,
            settle: seconds("settle", order.settle, 0..=DAY)?,
            ..Patience::default()
        },
        window: order.window.map(|size| Window { size, interval }),
        fail_limit,
        dry_run: order.dry_run,
        ..Plan::new(action)
    })
}
