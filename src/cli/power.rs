//! `pavo power`, `pavo bootdev`

use std::sync::Arc;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use futures_util::stream;
use hyper::Method;

use super::App;
use super::op::follow;
use super::results::{ResultArgs, Results};
use super::signals::Signals;
use crate::config::BatchManager;
use crate::error::{Error, Kind, Result};
use crate::model::node::operation::Operation;
use crate::model::node::request::Outcome;
use crate::model::order::{Order, Wanted};
use crate::node::power::Hub;
use crate::node::power::fanout::{self, FailLimit, Outcome as Node, Stop};
use crate::ops::inventory;
use crate::ops::keeper::Keeper;
use crate::ops::nodesets::{self, Known};
use crate::ops::orders::{self, Prepared};
use crate::ops::power::Jobs;
use crate::ops::remote::Remote;
use crate::store::embedded;
use crate::store::secret::vault::Vault;

/// Switch nodes on and off, or see whether they are
///
/// By their controllers, which the inventory knows: `mgt` (`redfish`, `ipmi` or `ipmitool`),
/// `control/bmc_address`, `bmc_username`, `bmc_password`; `qmp` and `control/qmp_socket`; `exec`
/// and `control/exec`; `virsh` and `control/ssh_address`; see `pavo node`. Each node has a line as soon as it has answered. Nodes on
/// which jobs of Slurm run are left alone; Slurm is asked again as long as nodes start. A reset
/// whose answer is lost is not done again.
#[derive(Debug, Args)]
pub struct Power {
    /// The nodes
    #[arg(value_name = "NODES")]
    nodes: String,

    /// What to do
    #[arg(value_name = "ACTION", default_value = "status", value_parser = one_of(ACTIONS))]
    action: Wanted,

    #[command(flatten)]
    conduct: Conduct,
}

/// Words that all mean the same order, the first of them its name, and what is said of it.
type Word = (&'static [&'static str], Wanted, &'static str);

const ACTIONS: &[Word] = &[
    (&["status", "stat", "state"], Wanted::Status, "See whether it is on"),
    (&["on"], Wanted::On, ""),
    (&["off"], Wanted::Off, "As if the cable were pulled"),
    (&["soft"], Wanted::Soft, "Shut the operating system down, and wait for that"),
    (&["reset"], Wanted::Reset, "Press the reset button"),
    (&["cycle"], Wanted::Cycle, "Off, and on again once it is off"),
    (&["boot"], Wanted::Boot, "On, or reset where it is on"),
];

const DEVICES: &[Word] = &[
    (&["status", "stat", "state"], Wanted::Bootdev, "See what it is"),
    (&["net"], Wanted::Net, ""),
    (&["disk"], Wanted::Disk, ""),
    (&["cdrom"], Wanted::Cdrom, ""),
    (&["bios"], Wanted::Bios, "The set-up of the firmware"),
    (&["default"], Wanted::Default, "What the firmware is set to"),
];

/// Reads one of these words.
fn one_of(words: &'static [Word]) -> impl TypedValueParser<Value = Wanted> {
    let value = |(names, _, help): &Word| {
        let value = PossibleValue::new(names[0]).aliases(&names[1..]);
        if help.is_empty() { value } else { value.help(help) }
    };
    PossibleValuesParser::new(words.iter().map(value)).try_map(|given| {
        let word = words.iter().find(|(names, ..)| names.contains(&given.as_str()));
        word.map(|(_, wanted, _)| *wanted).ok_or_else(|| Error::bug("a word without a meaning"))
    })
}

/// Set what nodes boot from, or see what it is
///
/// The next time, or with `--always` from now on. Controllers as for `pavo power`.
#[derive(Debug, Args)]
pub struct Bootdev {
    /// The nodes
    #[arg(value_name = "NODES")]
    nodes: String,

    /// What to boot from
    #[arg(value_name = "DEVICE", default_value = "status", value_parser = one_of(DEVICES))]
    device: Wanted,

    /// Not only the next time
    #[arg(long)]
    always: bool,

    #[command(flatten)]
    conduct: Conduct,
}

/// The longest time that may be asked for, in seconds: a day.
const DAY: u64 = 86_400;

/// How it is done to many.
#[derive(Debug, Args)]
struct Conduct {
    /// So many controllers are asked at once
    #[arg(short, long, value_name = "COUNT", default_value_t = 256, value_parser = counts(1))]
    fanout: u32,

    /// How many seconds an answer may take
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = seconds(1))]
    timeout: u64,

    /// How often a controller that does not answer is asked again
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = counts(0))]
    retries: u32,

    /// How many seconds `soft` and `cycle` wait for a machine to be off
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = seconds(0))]
    settle: u64,

    /// So many start in each interval, for what their power comes through
    #[arg(long, value_name = "COUNT", value_parser = counts(1))]
    window: Option<u32>,

    /// The seconds of an interval
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10,
        value_parser = seconds(0),
        requires = "window"
    )]
    interval: u64,

    /// So many nodes, or `5%`, may fail; after one more, no other is started
    #[arg(long, value_name = "COUNT|N%")]
    fail_limit: Option<FailLimit>,

    /// Say what would be done
    #[arg(long)]
    dry_run: bool,

    /// Leave it to the daemon, and print the number of its operation: see `pavo op`
    #[arg(long)]
    no_wait: bool,

    /// Nodes on which jobs run, too
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    results: ResultArgs,
}

fn seconds(least: u64) -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(least..=DAY)
}

fn counts(least: u64) -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(least..=100_000)
}

impl Power {
    pub fn run(self, app: &App) -> Result<u8> {
        self.conduct.run(app, self.conduct.order(self.nodes, self.action))
    }
}

impl Bootdev {
    pub fn run(self, app: &App) -> Result<u8> {
        if self.always && self.device == Wanted::Bootdev {
            return Err(Error::usage("`--always` without a device"));
        }
        let order = self.conduct.order(self.nodes, self.device);
        self.conduct.run(app, Order { always: self.always, ..order })
    }
}

impl Conduct {
    fn order(&self, names: String, action: Wanted) -> Order {
        Order {
            fanout: self.fanout as usize,
            timeout: self.timeout,
            retries: self.retries,
            settle: self.settle,
            window: self.window.map(|it| it as usize),
            interval: self.interval,
            fail_limit: self.fail_limit.map(|limit| limit.to_string()),
            dry_run: self.dry_run,
            force: self.force,
            ..Order::new(names, action)
        }
    }

    /// Lets the daemon do it, and tells what comes of it.
    async fn send(&self, app: &App, remote: &Remote, mut order: Order) -> Result<u8> {
        let known = Known::by(Keeper::Daemon(remote.clone()));
        order.names = nodesets::fill_in(&order.names, Some(&known)).await?;
        // Which opens the files, before anything is done.
        let mut results = Results::new(&app.out, &self.results, 0)?;
        let operation: Operation = remote.send(Method::POST, "/v1/ops", &order).await?;
        if self.no_wait {
            app.out.data(&format!("{}\n", operation.id))?;
            return Ok(0);
        }
        let code = follow(app, remote, operation.id, &mut results).await?;
        results.end(code)
    }

    fn run(&self, app: &App, order: Order) -> Result<u8> {
        if let Some(remote) = super::daemon::find(app)? {
            return app.block_on(self.send(app, &remote, order));
        }
        if self.no_wait {
            return Err(Error::usage("`--no-wait` without a daemon: nobody would go on"));
        }
        let dir = app.env.state_dir();
        app.block_on(async {
            let known = Known::stored(dir.clone());
            let names = nodesets::union(std::slice::from_ref(&order.names), &known).await?;
            let (inventory, vault) = (inventory::read(&dir).await?, Vault::open(&dir)?);
            let mut plan = orders::plan(&order)?;
            if order.spares_the_busy() {
                plan.guard = Some(Arc::new(jobs(app).await?));
            }
            let mut results = Results::new(&app.out, &self.results, names.len())?;
            let work = orders::prepare(order, plan, names, &inventory, &vault).await;
            for Outcome { name, text, .. } in &work.refused {
                results.tell(name, Err(text.clone()));
            }
            let code = act(app, &work, &mut results).await?;
            results.end(code)
        })
    }
}

/// Who knows where something runs that must not be switched off.
async fn jobs(app: &App) -> Result<Jobs> {
    if super::config::load(app)?.batch.manager == BatchManager::Slurm {
        return orders::jobs().await;
    }
    app.out
        .status("what runs on these nodes is not looked at: batch.yaml has no `type: slurm` here");
    let Some(store) = embedded::open_existing(&app.env.state_dir()).await? else {
        return Ok(Jobs::of_clusters([]));
    };
    let clusters = super::job::running(app, &store).await?;
    Ok(Jobs::of_clusters(clusters.into_iter().map(|job| job.host)))
}

/// Does it to those that have a controller; 0, or why it ended early.
async fn act(app: &App, work: &Prepared, results: &mut Results<'_>) -> Result<u8> {
    let stop =
        stream::unfold((Signals::new()?, "; again: at once"), |(mut signals, more)| async move {
            let why = signals.next().await;
            app.out.status(&format!("{why}: no other node is started, others end{more}"));
            Some(((), (signals, "")))
        });
    let report =
        fanout::run(
            &work.bmcs,
            &work.plan,
            &Hub::default(),
            stop,
            &mut |bmc, outcome| match outcome {
                Node::Done(done) => results.tell(&bmc.node, Ok(done.to_string())),
                Node::Failed(error) => results.fail(&bmc.node, error),
                Node::NotStarted => {}
            },
        )
        .await;
    for (bmc, outcome) in work.bmcs.iter().zip(&report.outcomes) {
        if matches!(outcome, Node::NotStarted) {
            results.tell(&bmc.node, Err("not started".into()));
        }
    }
    Ok(match report.stop {
        Some(Stop::TooManyFailed) => Kind::FailLimit.exit_code(),
        Some(Stop::Interrupted) => Kind::Interrupted.exit_code(),
        None => 0,
    })
}
