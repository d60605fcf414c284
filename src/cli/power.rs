//! `pavo power`, `pavo bootdev`

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::App;
use super::op::follow;
use super::signals::Signals;
use crate::config::BatchManager;
use crate::error::{Context, Error, Kind, Result};
use crate::model::node::operation::Operation;
use crate::model::node::request::Outcome as Missing;
use crate::model::nodeset::NodeSet;
use crate::model::order::{self, Order};
use crate::node::power::action::{Action, Patience};
use crate::node::power::fanout::{FailLimit, Outcome, Plan, Stop, Window, run};
use crate::node::power::{Bmc, Boot, Device, Hub};
use crate::ops::inventory;
use crate::ops::keeper::Keeper;
use crate::ops::nodesets::{self, Known};
use crate::ops::power::{bmc, busy};
use crate::ops::remote::Remote;
use crate::store::secret::vault::Vault;
use hyper::Method;

/// Switch nodes on and off, or see whether they are
///
/// By their controllers, which the inventory knows: `mgt` (`redfish`, `ipmi` or `ipmitool`),
/// `control/bmc_address`, `bmc_username`, `bmc_password`; see `pavo node`. Each node has a line
/// as soon as it has answered. Nodes on which jobs of Slurm run are left alone.
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

/// How it is done to many.
#[derive(Debug, Args)]
struct Conduct {
    /// So many controllers are asked at once
    #[arg(short, long, value_name = "COUNT", default_value_t = 256)]
    fanout: usize,

    /// How many seconds an answer may take
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    timeout: u64,

    /// How often a controller that does not answer is asked again
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    retries: u32,

    /// How many seconds `soft` and `cycle` wait for a machine to be off
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    settle: u64,

    /// So many start in each interval, for what their power comes through
    #[arg(long, value_name = "COUNT")]
    window: Option<usize>,

    /// The seconds of an interval
    #[arg(long, value_name = "SECONDS", default_value_t = 10, requires = "window")]
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

    /// Write the nodes with which it went well to this file
    #[arg(long, value_name = "FILE")]
    ok_file: Option<PathBuf>,

    /// Write the others to this file
    #[arg(long, value_name = "FILE")]
    ko_file: Option<PathBuf>,
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

/// Nodes by what became of them.
#[derive(Debug, Default)]
struct Sorted {
    ok: BTreeSet<String>,
    ko: BTreeSet<String>,
}

impl Conduct {
    fn plan(&self, action: Action) -> Plan {
        let seconds = Duration::from_secs;
        let window = self.window.map(|size| Window { size, interval: seconds(self.interval) });
        let patience = Patience {
            answer: seconds(self.timeout.max(1)),
            tries: self.retries.saturating_add(1),
            settle: seconds(self.settle),
            ..Patience::default()
        };
        Plan {
            at_once: self.fanout,
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
            fanout: self.fanout,
            timeout: self.timeout,
            retries: self.retries,
            settle: self.settle,
            window: self.window,
            interval: self.interval,
            fail_limit: self.fail_limit.map(|limit| limit.to_string()),
            dry_run: self.dry_run,
            force: self.force,
            ..Order::new(nodesets::fill_in(names, Some(&known)).await?, wanted)
        };
        let operation: Operation = remote.send(Method::POST, "/v1/ops", &order).await?;
        if self.no_wait {
            app.out.data(&format!("{}\n", operation.id))?;
            return Ok(0);
        }
        let mut sorted = Sorted::default();
        let code = follow(app, remote, operation.id, &mut |outcome| {
            let side = if outcome.ok { &mut sorted.ok } else { &mut sorted.ko };
            side.insert(outcome.name.clone());
        })
        .await;
        write(self.ok_file.as_ref(), &sorted.ok)?;
        write(self.ko_file.as_ref(), &sorted.ko)?;
        code
    }

    fn run(&self, app: &App, nodes: &str, action: Action) -> Result<u8> {
        if let Some(remote) = super::daemon::find(app)? {
            return app.block_on(self.order(app, &remote, nodes, action));
        }
        if self.no_wait {
            return Err(Error::usage("`--no-wait` without a daemon: nobody would go on"));
        }
        let dir = app.env.state_dir();
        let config = super::config::load(app)?;
        let slurm = config.batch.manager == BatchManager::Slurm;
        let (code, sorted) = app.block_on(async {
            let known = Known::stored(dir.clone());
            let names = nodesets::union(&[nodes.to_owned()], &known).await?.names();
            let (inventory, vault) = (inventory::read(&dir).await?, Vault::open(&dir)?);
            let all: BTreeSet<String> = names.iter().cloned().collect();
            let busy = match slurm && !self.force && !action.only_looks() {
                true => busy(&all).await.map_err(|error| {
                    error.help("to do it without knowing what runs there: `--force`")
                })?,
                false => BTreeSet::new(),
            };
            let mut sorted = Sorted::default();
            let mut bmcs = Vec::new();
            for name in &names {
                let Some(own) = inventory.nodes.get(name) else {
                    sorted.ko.insert(name.clone());
                    app.out.data(&format!("{name}: {}\n", Missing::missing(name).text))?;
                    continue;
                };
                let found = match busy.contains(name) {
                    true => Err(Error::system("a job runs there").help("all the same: `--force`")),
                    false => bmc(&inventory, &vault, name, own),
                };
                match found {
                    Ok(bmc) => bmcs.push(bmc),
                    Err(error) => fail(app, &mut sorted, name, &error)?,
                }
            }
            let code = self.act(app, &bmcs, action, &mut sorted).await?;
            app.out.data(&format!("\nSuccess: {}  Total: {}\n", sorted.ok.len(), names.len()))?;
            Ok((code, sorted))
        })?;
        write(self.ok_file.as_ref(), &sorted.ok)?;
        write(self.ko_file.as_ref(), &sorted.ko)?;
        Ok(match code {
            0 if !sorted.ko.is_empty() => Kind::Partial.exit_code(),
            code => code,
        })
    }

    /// Does it to those that have a controller; 0, or why it ended early.
    async fn act(
        &self,
        app: &App,
        bmcs: &[Bmc],
        action: Action,
        sorted: &mut Sorted,
    ) -> Result<u8> {
        let mut signals = Signals::new()?;
        let stop = async {
            let why = signals.next().await;
            app.out.status(&format!("{why}: no other node is started"));
        };
        let mut told = Ok(());
        let hub = Hub::default();
        let report = run(bmcs, &self.plan(action), &hub, stop, &mut |bmc, outcome| {
            let line = match outcome {
                Outcome::Done(done) => {
                    sorted.ok.insert(bmc.node.clone());
                    app.out.data(&format!("{}: {done}\n", bmc.node))
                }
                Outcome::Failed(error) => fail(app, sorted, &bmc.node, error),
                Outcome::NotStarted => Ok(()),
            };
            if told.is_ok() {
                told = line;
            }
        })
        .await;
        told?;
        for (bmc, outcome) in bmcs.iter().zip(&report.outcomes) {
            if matches!(outcome, Outcome::NotStarted) {
                sorted.ko.insert(bmc.node.clone());
                app.out.data(&format!("{}: not started\n", bmc.node))?;
            }
        }
        Ok(match report.stop {
            Some(Stop::TooManyFailed) => Kind::FailLimit.exit_code(),
            Some(Stop::Interrupted) => Kind::Interrupted.exit_code(),
            None => 0,
        })
    }
}

/// A line of what kept a node from it, and why.
fn fail(app: &App, sorted: &mut Sorted, node: &str, error: &Error) -> Result<()> {
    sorted.ko.insert(node.to_owned());
    let report = error.report();
    let lines = report.trim_start_matches("error: ").trim_end();
    app.out.data(&format!("{node}: {lines}\n"))
}

/// A set of nodes as a file.
fn write(file: Option<&PathBuf>, nodes: &BTreeSet<String>) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    let text = match nodes.is_empty() {
        true => String::new(),
        false => format!("{}\n", nodes.iter().collect::<NodeSet>()),
    };
    std::fs::write(file, text).while_doing(|| format!("writing `{}`", file.display()))
}
