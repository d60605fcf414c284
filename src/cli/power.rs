//! `pavo power`, `pavo bootdev`

use std::sync::Arc;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use futures_util::stream;

use super::App;
use super::op::follow;
use super::results::{ResultArgs, Results};
use super::signals::Signals;
use crate::config::BatchManager;
use crate::error::{Error, Kind, Result};
use crate::model::node::operation::Operation;
use crate::model::node::request::Outcome as Missing;
use crate::model::order::{self, Order};
use crate::node::power::action::{Action, Patience};
use crate::node::power::fanout::{FailLimit, Outcome, Plan, Stop, Window, run};
use crate::node::power::{Bmc, Boot, Device, Hub};
use crate::ops::inventory;
use crate::ops::keeper::Keeper;
use crate::ops::nodesets::{self, Known};
use crate::ops::power::{Jobs, bmc};
use crate::ops::remote::Remote;
use crate::store::embedded;
use crate::store::secret::vault::Vault;
use hyper::Method;

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
    #[arg(value_name = "ACTION", default_value = "status")]
    action: Verb,

    #[command(flatten)]
    conduct: Conduct,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Verb {
    /// See whether it is on
    #[value(alias = "stat", alias = "state")]
    Status,
    On,
    /// As if the cable were pulled
    Off,
    /// Shut the operating system down, and wait for that
    Soft,
    /// Press the reset button
    Reset,
    /// Off, and on again once it is off
    Cycle,
    /// On, or reset where it is on
    Boot,
}

impl From<Verb> for Action {
    fn from(verb: Verb) -> Self {
        match verb {
            Verb::Status => Self::Status,
            Verb::On => Self::On,
            Verb::Off => Self::Off,
            Verb::Soft => Self::Soft,
            Verb::Reset => Self::Reset,
            Verb::Cycle => Self::Cycle,
            Verb::Boot => Self::Boot,
        }
    }
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
    #[arg(value_name = "DEVICE", default_value = "status")]
    device: Wanted,

    /// Not only the next time
    #[arg(long)]
    always: bool,

    #[command(flatten)]
    conduct: Conduct,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wanted {
    /// See what it is
    #[value(alias = "stat", alias = "state")]
    Status,
    Net,
    Disk,
    Cdrom,
    /// The set-up of the firmware
    Bios,
    /// What the firmware is set to
    Default,
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
        self.conduct.run(app, &self.nodes, self.action.into())
    }
}

impl Bootdev {
    pub fn run(self, app: &App) -> Result<u8> {
        let device = match self.device {
            Wanted::Status if self.always => {
                return Err(Error::usage("`--always` without a device"));
            }
            Wanted::Status => return self.conduct.run(app, &self.nodes, Action::BootDevice),
            Wanted::Net => Device::Net,
            Wanted::Disk => Device::Disk,
            Wanted::Cdrom => Device::Cdrom,
            Wanted::Bios => Device::Bios,
            Wanted::Default => Device::Default,
        };
        let boot = Boot { device, always: self.always };
        self.conduct.run(app, &self.nodes, Action::SetBootDevice(boot))
    }
}

impl Conduct {
    fn plan(&self, action: Action) -> Plan {
        let seconds = Duration::from_secs;
        let count = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
        let interval = seconds(self.interval);
        let window = self.window.map(|size| Window { size: count(size), interval });
        let patience = Patience {
            answer: seconds(self.timeout),
            tries: self.retries.saturating_add(1),
            settle: seconds(self.settle),
            ..Patience::default()
        };
        Plan {
            at_once: count(self.fanout),
            patience,
            window,
            fail_limit: self.fail_limit,
            dry_run: self.dry_run,
            ..Plan::new(action)
        }
    }

    /// Lets the daemon do it, and tells what comes of it.
    async fn order(&self, app: &App, remote: &Remote, names: &str, action: Action) -> Result<u8> {
        let boot = |boot: Boot| match boot.device {
            Device::Net => order::Wanted::Net,
            Device::Disk => order::Wanted::Disk,
            Device::Cdrom => order::Wanted::Cdrom,
            Device::Bios => order::Wanted::Bios,
            // Which is none that can be asked for.
            Device::Default | Device::Other => order::Wanted::Default,
        };
        let wanted = match action {
            Action::Status => order::Wanted::Status,
            Action::On => order::Wanted::On,
            Action::Off => order::Wanted::Off,
            Action::Soft => order::Wanted::Soft,
            Action::Reset => order::Wanted::Reset,
            Action::Cycle => order::Wanted::Cycle,
            Action::Boot => order::Wanted::Boot,
            Action::BootDevice => order::Wanted::Bootdev,
            Action::SetBootDevice(it) => boot(it),
        };
        let known = Known::by(Keeper::Daemon(remote.clone()));
        let order = Order {
            always: matches!(action, Action::SetBootDevice(it) if it.always),
            fanout: self.fanout as usize,
            timeout: self.timeout,
            retries: self.retries,
            settle: self.settle,
            window: self.window.map(|it| it as usize),
            interval: self.interval,
            fail_limit: self.fail_limit.map(|limit| limit.to_string()),
            dry_run: self.dry_run,
            force: self.force,
            ..Order::new(nodesets::fill_in(names, Some(&known)).await?, wanted)
        };
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

    fn run(&self, app: &App, nodes: &str, action: Action) -> Result<u8> {
        if let Some(remote) = super::daemon::find(app)? {
            return app.block_on(self.order(app, &remote, nodes, action));
        }
        if self.no_wait {
            return Err(Error::usage("`--no-wait` without a daemon: nobody would go on"));
        }
        let dir = app.env.state_dir();
        app.block_on(async {
            let known = Known::stored(dir.clone());
            let names = nodesets::union(&[nodes.to_owned()], &known).await?.names();
            let (inventory, vault) = (inventory::read(&dir).await?, Vault::open(&dir)?);
            let mut plan = self.plan(action);
            if !self.force && !action.only_looks() {
                plan.guard = Some(Arc::new(jobs(app).await?));
            }
            let mut results = Results::new(&app.out, &self.results, names.len())?;
            let mut bmcs = Vec::new();
            for name in &names {
                let Some(own) = inventory.nodes.get(name) else {
                    results.tell(name, Err(Missing::missing(name).text));
                    continue;
                };
                let allowed = match &plan.guard {
                    Some(guard) => guard.check(name).await,
                    None => Ok(()),
                };
                match allowed.and_then(|()| bmc(&inventory, &vault, name, own)) {
                    Ok(bmc) => bmcs.push(bmc),
                    Err(error) => results.fail(name, &error),
                }
            }
            plan.failed_before = results.failed();
            let code = act(app, &bmcs, &plan, &mut results).await?;
            results.end(code)
        })
    }
}

/// Who knows where something runs that must not be switched off.
async fn jobs(app: &App) -> Result<Jobs> {
    if super::config::load(app)?.batch.manager == BatchManager::Slurm {
        return Jobs::of_slurm()
            .await
            .map_err(|error| error.help("to do it without knowing what runs there: `--force`"));
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
async fn act(app: &App, bmcs: &[Bmc], plan: &Plan, results: &mut Results<'_>) -> Result<u8> {
    let stop =
        stream::unfold((Signals::new()?, "; again: at once"), |(mut signals, more)| async move {
            let why = signals.next().await;
            app.out.status(&format!("{why}: no other node is started, others end{more}"));
            Some(((), (signals, "")))
        });
    let report = run(bmcs, plan, &Hub::default(), stop, &mut |bmc, outcome| match outcome {
        Outcome::Done(done) => results.tell(&bmc.node, Ok(done.to_string())),
        Outcome::Failed(error) => results.fail(&bmc.node, error),
        Outcome::NotStarted => {}
    })
    .await;
    for (bmc, outcome) in bmcs.iter().zip(&report.outcomes) {
        if matches!(outcome, Outcome::NotStarted) {
            results.tell(&bmc.node, Err("not started".into()));
        }
    }
    Ok(match report.stop {
        Some(Stop::TooManyFailed) => Kind::FailLimit.exit_code(),
        Some(Stop::Interrupted) => Kind::Interrupted.exit_code(),
        None => 0,
    })
}
