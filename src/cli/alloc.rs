//! `pavo alloc`

use std::io::IsTerminal;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use clap::Args;
use nix::errno::Errno;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use super::App;
use super::wait::For;
use crate::batch::{Request, local, parse_memory, parse_time};
use crate::config::BatchManager;
use crate::error::{Context, Error, Kind, Result};
use crate::model::cluster::{ClusterDef, plain_name};
use crate::model::job::VmState;
use crate::model::vmset::fold;
use crate::ops::accel;
use crate::ops::beside::{Beside, Program};
use crate::ops::launch::{Cluster, Place, Wanted};
use crate::ops::pasta;
use crate::ops::resolve::resolve;
use crate::ops::watch::{Goal, Progress, wait_until};
use crate::store::embedded;

/// How long guests may take to shut down when the time limit is reached.
const GRACE: Duration = Duration::from_secs(10);
/// What a Ctrl-C is called: before there is a shell or script, the end; then its business.
const INTERRUPTED: &str = "interrupted";

/// Start a cluster of VMs, with a shell beside it
///
/// `pavo alloc tiny:2` starts two VMs of the template `tiny` (every image is a template)
/// and a shell in which `pavo ssh vm0`, `pavo console`, `pavo status` mean this cluster. When
/// the shell ends, the cluster ends, and nothing of it is left.
#[derive(Debug, Args)]
pub struct Alloc {
    /// `TEMPLATE[:COUNT]`, more of them separated by commas
    #[arg(value_name = "CLUSTER")]
    definition: ClusterDef,

    /// Cores of each VM [default: 1]
    #[arg(short = 'c', long = "cpus-per-task", value_name = "N")]
    cores: Option<u32>,

    /// Memory of each VM, MiB or with a unit [default: 512M a core]
    #[arg(long = "mem", value_name = "SIZE", value_parser = parse_memory)]
    memory: Option<u64>,

    /// Name of the job
    #[arg(short = 'J', long = "job-name", value_name = "NAME", default_value = "pavo")]
    name: String,

    /// End after this time: minutes, HH:MM:SS or D-HH:MM:SS
    #[arg(short = 't', long = "time", value_name = "TIME", value_parser = parse_time)]
    time: Option<u64>,

    /// Run this command instead of a shell; its exit code is ours
    #[arg(short = 'E', long = "alloc-script", value_name = "COMMAND")]
    script: Option<String>,

    /// What every VM must have shown before the shell or script starts
    #[arg(long, value_enum, default_value_t = For::Running)]
    wait: For,

    /// Give up when that takes more seconds than this
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
}

/// The signals that end a cluster.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).while_doing(|| "listening for signals".into());
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.terminate.recv() => "cancelled",
            _ = self.hangup.recv() => "the terminal was closed",
        }
    }
}

/// Why a cluster that was up has come to its end.
enum Outcome {
    /// The shell or script ended.
    Script(ExitStatus),
    /// Every VM has ended.
    ShutDown,
    TimeLimit,
}

impl Alloc {
    pub fn run(self, app: &App) -> Result<u8> {
        if app.env.job_id.is_some() {
            return Err(Error::usage("Failure in job allocation: already in a job")
                .help("leave this shell first, or unset PAVO_JOB_ID"));
        }
        if self.wait == For::Stopped && self.script.is_some() {
            return Err(Error::usage("`--wait stopped` leaves nothing for a script to run with"));
        }
        app.block_on(self.alloc(app))
    }

    async fn alloc(self, app: &App) -> Result<u8> {
        let wanted = self.wanted(app)?;
        let store = embedded::open(&app.env.state_dir()).await?;
        super::job::running(app, &store).await?;
        let place = Place {
            user: app.env.user.clone(),
            uid: app.env.uid,
            tmp: app.env.tmp.clone(),
            store: app.env.state_dir(),
            host: app.env.hostname(),
            accel: accel::choose(&app.env.state_dir(), &|text| app.out.status(text)).await,
            way_out: pasta::has_way_out(),
        };
        if !place.way_out {
            app.out.status("This machine has no default route: the cluster has no way out");
        }
        let mut signals = Signals::new()?;
        let owner = local::next_job(&store, &app.env.user).await?;
        let mut cluster = Cluster::new(&store, owner, place, wanted)?;
        app.out.status(&format!("Granted job allocation {}", owner.job));
        let outcome = self.session(app, &mut cluster, &mut signals).await;
        let outcome = outcome.map_err(|error| with_advice_on_room(error, &app.env.tmp));
        let grace = match outcome {
            Ok(Outcome::TimeLimit) => GRACE,
            _ => Duration::ZERO,
        };
        if !matches!(outcome, Ok(Outcome::ShutDown)) {
            app.out.status("Terminating the cluster...");
        }
        let ended = cluster.end(grace).await.while_doing(|| "ending the cluster".into());
        if let (Err(_), Err(leftover)) = (&outcome, &ended) {
            app.out.warn(leftover.report().trim_start_matches("error: "));
        }
        let code = report(app, outcome)?;
        ended.map(|()| code)
    }

    /// Everything a user can have got wrong is found here.
    fn wanted(&self, app: &App) -> Result<Wanted> {
        if !plain_name(&self.name) {
            let name = self.name.escape_debug();
            return Err(Error::usage(format!("`{name}` cannot be the name of a job"))
                .help("use letters, digits, `_`, `-` and `.`"));
        }
        let sources = super::config::sources(app);
        let config = super::config::load_from(app, &sources)?;
        if config.batch.manager == BatchManager::Slurm {
            return Err(Error::config(
                "batch.yaml says `type: slurm`, which this version cannot use",
            )
            .help("write `type: local` to run clusters on this machine"));
        }
        let library = app.library(&config);
        let blueprint = resolve(&config, &library, &sources.vars(), &self.definition);
        app.warn_of(&library);
        let blueprint = blueprint?;
        let request = Request {
            name: Some(self.name.clone()),
            cores: self.cores,
            memory_mib: self.memory,
            time_limit: self.time,
        };
        let capacity = local::Capacity::read()?;
        let allocation = local::allocate(&request, self.definition.count(), capacity)?;
        if allocation.cores > capacity.cores {
            app.out.warn(&format!(
                "each VM has {} cores, this machine {}: they will share them",
                allocation.cores, capacity.cores
            ));
        }
        Ok(Wanted { blueprint, allocation, name: self.name.clone(), time_limit: self.time })
    }

    /// From the first process to the reason for the end.
    async fn session(
        &self,
        app: &App,
        cluster: &mut Cluster<'_>,
        signals: &mut Signals,
    ) -> Result<Outcome> {
        let deadline =
            self.time.and_then(|time| Instant::now().checked_add(Duration::from_secs(time)));
        let up = async {
            app.out.progress("Configuring hosts...");
            cluster.start().await?;
            app.out.status("Configuring hosts... (done)");
            let limit = Some(Duration::from_secs(self.timeout));
            let goal = if self.wait == For::Stopped { Goal::Running } else { self.wait.into() };
            let every = if app.out.stderr_is_terminal() { 1 } else { 10 };
            let progress = Progress { say: &|line| app.out.progress(line), every };
            wait_until(cluster, goal, limit, progress).await
        };
        tokio::select! {
            result = up => result?,
            why = signals.next() => return Err(Error::new(Kind::Interrupted, why)),
            () = until(deadline) => return Ok(Outcome::TimeLimit),
        }
        let all: Vec<u32> = cluster.record.vms.iter().map(|vm| vm.rank).collect();
        let state = match (self.wait, all.len()) {
            (For::Ssh, 1) => "answers ssh",
            (For::Ssh, _) => "answer ssh",
            (_, 1) => "runs",
            (_, _) => "run",
        };
        app.out.status(&format!("{} {state}", fold(&all)));
        if self.wait == For::Stopped {
            return tokio::select! {
                over = follow(app, cluster) => over.map(|()| Outcome::ShutDown),
                why = signals.next() => Err(Error::new(Kind::Interrupted, why)),
                () = until(deadline) => Ok(Outcome::TimeLimit),
            };
        }
        self.beside(app, cluster, signals, deadline).await
    }

    /// Runs the shell or script beside the cluster.
    async fn beside(
        &self,
        app: &App,
        cluster: &mut Cluster<'_>,
        signals: &mut Signals,
        deadline: Option<Instant>,
    ) -> Result<Outcome> {
        let program = match &self.script {
            Some(script) => Program::Script(script.clone()),
            None => Program::Shell(app.env.shell.clone()),
        };
        let at_terminal = std::io::stdin().is_terminal();
        let mut beside = Beside::start(&program, &cluster.record, at_terminal)?;
        let outcome = loop {
            break tokio::select! {
                // A terminal that closes ends the shell, too: the signal is the reason.
                biased;
                why = signals.next() => match why {
                    INTERRUPTED => {
                        beside.interrupt();
                        continue;
                    }
                    why => Err(Error::new(Kind::Interrupted, why)),
                },
                status = beside.wait() => return status.map(Outcome::Script),
                over = follow(app, cluster) => over.map(|()| Outcome::ShutDown),
                () = until(deadline) => Ok(Outcome::TimeLimit),
            };
        };
        if matches!(outcome, Ok(Outcome::ShutDown)) {
            app.out.status("The cluster has shut down");
        }
        beside.end().await;
        outcome
    }
}

/// A full disk shows in many places, in several processes; the way out is the same.
fn with_advice_on_room(error: Error, tmp: &Path) -> Error {
    if !error.report().contains(Errno::ENOSPC.desc()) {
        return error;
    }
    let tmp = tmp.display();
    error.help(format!("`{tmp}` is full: make room, or set PAVO_TMPDIR to another folder"))
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Follows a running cluster until every VM has ended. A failed VM is only a warning as
/// long as there is another.
async fn follow(app: &App, cluster: &mut Cluster<'_>) -> Result<()> {
    while !cluster.is_over() {
        cluster.next_report().await?;
        while let Some((_, error)) = cluster.take_failure() {
            if cluster.is_over() {
                return Err(error);
            }
            app.out.warn(error.report().trim_start_matches("error: "));
        }
    }
    let failed = cluster.states.iter().filter(|status| status.state == VmState::Failed).count();
    match failed {
        0 => Ok(()),
        _ => Err(Error::new(Kind::Partial, format!("{failed} VMs of the cluster failed"))),
    }
}

/// The exit code of a session, or its error.
fn report(app: &App, outcome: Result<Outcome>) -> Result<u8> {
    match outcome? {
        Outcome::ShutDown => Ok(0),
        Outcome::TimeLimit => Err(Error::new(Kind::Interrupted, "the time limit was reached")
            .help("ask for more with `-t`")),
        Outcome::Script(status) => {
            if let Some(signal) = status.signal() {
                app.out.status(&format!("The script was ended by signal {signal}"));
            }
            let code = status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(1);
            Ok(u8::try_from(code).unwrap_or(1))
        }
    }
}
