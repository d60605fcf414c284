//! What happens beside a running cluster: waiting, a shell or script, the end.
//!
//! The same on one machine and in a job of Slurm.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use clap::Args;
use nix::errno::Errno;
use nix::unistd::{Pid, getppid};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use super::App;
use super::wait::For;
use crate::config::{BatchManager, Config};
use crate::error::{Context, Error, Kind, Result};
use crate::model::job::{JobRecord, VmState};
use crate::model::vmset::fold;
use crate::ops::beside::{Beside, Program};
use crate::ops::gather::gather;
use crate::ops::launch::Cluster;
use crate::ops::watch::{Goal, Progress, wait_until};

/// How long guests may take to shut down when the time limit is reached, or the scheduler
/// ends the job.
pub const GRACE: Duration = Duration::from_secs(10);
/// How long they may take when they have persistent drives, whose data is to be whole.
const CLEAN: Duration = Duration::from_secs(30);
/// What a Ctrl-C is called: before there is a shell or script, the end; then its business.
const INTERRUPTED: &str = "interrupted";
const CANCELLED: &str = "cancelled";
/// What it is called that the process is gone for which we run.
const ORPHANED: &str = "salloc was killed, or what it had started";

/// What is wanted of the cluster once it is there.
#[derive(Clone, Debug, Args)]
pub struct SessionArgs {
    /// Run this command instead of a shell; its exit code is ours
    #[arg(short = 'E', long = "alloc-script", value_name = "COMMAND")]
    pub script: Option<String>,

    /// Run this script in vm0, as root, once its agent answers; its exit code is ours. `-` is
    /// standard input
    #[arg(short = 'b', long = "batch-script", value_name = "FILE", conflicts_with = "script")]
    pub batch_script: Option<PathBuf>,

    /// What every VM must have shown before the shell or script starts
    #[arg(long, value_enum, default_value_t = For::Running)]
    pub wait: For,

    /// Give up when that takes more seconds than this
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
}

impl SessionArgs {
    /// # Errors
    /// When the wishes contradict each other.
    pub fn check(&self) -> Result<()> {
        if self.wait == For::Stopped && self.has_script() {
            return Err(Error::usage("`--wait stopped` leaves nothing for a script to run with"));
        }
        Ok(())
    }

    /// Looks at what a site must have.
    ///
    /// # Errors
    /// When it has not.
    pub fn check_site(&self, config: &Config) -> Result<()> {
        let nowhere = config.batch.manager == BatchManager::Slurm && config.batch.etcd.is_none();
        if self.batch_script.is_some() && nowhere {
            return Err(Error::usage("`-b` needs the site's store, and batch.yaml names none")
                .help("run a command beside the cluster: `-E COMMAND`"));
        }
        Ok(())
    }

    /// Whether the cluster ends with a script, of either kind.
    pub fn has_script(&self) -> bool {
        self.script.is_some() || self.batch_script.is_some()
    }

    /// The script for vm0, as it is now.
    ///
    /// # Errors
    /// When it cannot be read, or is too long.
    pub fn read_batch_script(&self) -> Result<Option<Vec<u8>>> {
        let Some(path) = &self.batch_script else { return Ok(None) };
        let mut text = Vec::new();
        let most = MAX_SCRIPT as u64 + 1;
        let read = match path == Path::new("-") {
            true => std::io::stdin().take(most).read_to_end(&mut text),
            false => File::open(path).and_then(|file| file.take(most).read_to_end(&mut text)),
        };
        read.while_doing(|| format!("reading the script `{}`", path.display()))?;
        if text.len() > MAX_SCRIPT {
            return Err(Error::usage(format!("the script `{}` is too long", path.display()))
                .help("give at most 64 KiB; what it needs can lie in the image or on a mount"));
        }
        Ok(Some(text))
    }

    /// As arguments again, for the process that carries them out.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--wait={}", Goal::from(self.wait).as_str()),
            format!("--timeout={}", self.timeout),
        ];
        arguments.extend(self.script.iter().map(|script| format!("--alloc-script={script}")));
        let path = self.batch_script.iter().map(|path| path.to_string_lossy());
        arguments.extend(path.map(|path| format!("--batch-script={path}")));
        arguments
    }
}

/// The longest script for a guest: it travels in the job's own.
const MAX_SCRIPT: usize = 64 << 10;

/// The signals that end a cluster.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    parent: Option<Pid>,
}

impl Signals {
    pub fn new() -> Result<Self> {
        let listen = |kind| signal(kind).while_doing(|| "listening for signals".into());
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            parent: None,
        })
    }

    /// The same, with SIGTERM also as the word that this parent has died.
    pub fn of_child(self, parent: Pid) -> Self {
        Self { parent: Some(parent), ..self }
    }

    /// Whether the parent has died.
    pub fn is_orphaned(&self) -> bool {
        self.parent.is_some_and(|parent| getppid() != parent)
    }

    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.terminate.recv() => if self.is_orphaned() { ORPHANED } else { CANCELLED },
            _ = self.hangup.recv() => "the terminal was closed",
        }
    }
}

/// Why a cluster has come to its end.
enum Outcome {
    /// A signal, as it is called.
    Signal(&'static str),
    /// The shell or script ended.
    Script(ExitStatus),
    /// Every VM has ended.
    ShutDown,
    TimeLimit,
}

/// A cluster's life from its first process to its last, and the reason for its end.
pub struct Session<'a> {
    pub app: &'a App,
    pub args: &'a SessionArgs,
    /// Seconds, where nobody else ends the job in time.
    pub time: Option<u64>,
    /// The hosts of the job, where there are others than this.
    pub hosts: &'a [String],
    /// How long guests may take to shut down when the job is cancelled.
    pub grace: Duration,
    pub tmp: &'a Path,
    /// What runs in vm0.
    pub batch_script: Option<Vec<u8>>,
}

impl Session<'_> {
    /// Starts the cluster, does what is wanted, ends it; returns the exit code.
    pub async fn run(&self, mut cluster: Cluster, signals: &mut Signals) -> Result<u8> {
        let app = self.app;
        let outcome = self.live(&mut cluster, signals).await;
        let outcome = outcome.map_err(|error| with_advice_on_room(error, self.tmp));
        let clean = if cluster.keeps_data { CLEAN } else { Duration::ZERO };
        let grace = match outcome {
            Ok(Outcome::TimeLimit) => clean.max(GRACE),
            // A scheduler does not wait for longer.
            Ok(Outcome::Signal(CANCELLED | ORPHANED)) if !self.grace.is_zero() => self.grace,
            // Guests are shutting down already.
            _ if cluster.ended().is_some() => self.grace,
            _ => clean,
        };
        let outcome = match (outcome, cluster.ended()) {
            (Ok(Outcome::Script(status)), _) => Ok(Outcome::Script(status)),
            (Ok(Outcome::ShutDown | Outcome::Signal(_)) | Err(_), Some(why)) => Err(why.error()),
            (outcome, _) => outcome,
        };
        if !matches!(outcome, Ok(Outcome::ShutDown)) {
            // It may be the last that we have the time to say.
            let why = match (&outcome, cluster.ended()) {
                (_, Some(why)) => format!(" ({})", why.error()),
                (Ok(Outcome::Signal(why)), None) if !self.grace.is_zero() => format!(" ({why})"),
                _ => String::new(),
            };
            app.out.status(&format!("Terminating the cluster{why}..."));
            if !clean.is_zero() && !cluster.book.is_over() {
                let limit = grace.as_secs();
                app.out.status(&format!(
                    "Guests with persistent drives may shut down first, for {limit} s at most"
                ));
            }
        }
        let ended = cluster.end(grace).await.while_doing(|| "ending the cluster".into());
        if let (Err(_), Err(leftover)) = (&outcome, &ended) {
            app.out.warn(leftover.report().trim_start_matches("error: "));
        }
        let code = report(app, outcome)?;
        ended.map(|()| code)
    }

    /// From the first process to the reason for the end.
    async fn live(&self, cluster: &mut Cluster, signals: &mut Signals) -> Result<Outcome> {
        let app = self.app;
        let deadline =
            self.time.and_then(|time| Instant::now().checked_add(Duration::from_secs(time)));
        let up = async {
            app.out.progress("Configuring hosts...");
            cluster.start().await?;
            let limit = Duration::from_secs(self.args.timeout);
            let goal =
                if self.args.wait == For::Stopped { Goal::Running } else { self.args.wait.into() };
            let every = if app.out.stderr_is_terminal() { 1 } else { 10 };
            let progress = Progress { say: &|line| app.out.progress(line), every };
            gather(cluster, self.hosts, limit, progress).await?;
            app.out.status("Configuring hosts... (done)");
            wait_until(cluster, goal, Some(limit), progress).await?;
            cluster.settle().await
        };
        tokio::select! {
            result = up => result?,
            why = signals.next() => return Ok(Outcome::Signal(why)),
            () = until(deadline) => return Ok(Outcome::TimeLimit),
        }
        let all: Vec<u32> = cluster.book.record.vms.iter().map(|vm| vm.rank).collect();
        let state = match (self.args.wait, all.len()) {
            (For::Ssh, 1) => "answers ssh",
            (For::Ssh, _) => "answer ssh",
            (For::Agent, 1) => "answers",
            (For::Agent, _) => "answer",
            (_, 1) => "runs",
            (_, _) => "run",
        };
        app.out.status(&format!("{} {state}", fold(&all)));
        if self.args.wait == For::Stopped {
            return tokio::select! {
                over = follow(app, cluster, Cluster::is_down, |_| {}) => {
                    over.map(|()| Outcome::ShutDown)
                }
                why = signals.next() => Ok(Outcome::Signal(why)),
                () = until(deadline) => Ok(Outcome::TimeLimit),
            };
        }
        self.beside(cluster, signals, deadline).await
    }

    /// What runs beside the cluster.
    fn program(&self, job: &JobRecord) -> Result<Program> {
        if let Some(text) = &self.batch_script {
            let script = job.dir.join("batch-script");
            let written = std::fs::write(&script, text);
            written.while_doing(|| format!("writing `{}`", script.display()))?;
            return Ok(Program::InGuest { script, patience: self.args.timeout });
        }
        Ok(match &self.args.script {
            Some(script) => Program::Script(script.clone()),
            None => Program::Shell(self.app.env.shell.clone()),
        })
    }

    /// Runs the shell or script beside the cluster.
    async fn beside(
        &self,
        cluster: &mut Cluster,
        signals: &mut Signals,
        deadline: Option<Instant>,
    ) -> Result<Outcome> {
        let app = self.app;
        let program = self.program(&cluster.book.record)?;
        let at_terminal = std::io::stdin().is_terminal();
        let mut beside = Beside::start(&program, &cluster.book.record, at_terminal)?;
        // Who is beside a guest that powers off may want to save its disk.
        let (mut off, what) = (false, if self.args.has_script() { "script" } else { "shell" });
        let mut watch = |cluster: &Cluster| {
            let down = cluster.is_down() && !cluster.is_over();
            if down && !off {
                app.out.status(&format!(
                    "All guests are off; the cluster stays until the {what} ends: they can be \
                     saved, or started again with `pavo reset`"
                ));
            }
            off = down;
        };
        let outcome = loop {
            break tokio::select! {
                // A terminal that closes ends the shell, too: the signal is the reason.
                biased;
                why = signals.next() => match why {
                    INTERRUPTED => {
                        beside.interrupt();
                        continue;
                    }
                    why => Ok(Outcome::Signal(why)),
                },
                status = beside.wait() => return status.map(Outcome::Script),
                over = follow(app, cluster, Cluster::is_over, &mut watch) => {
                    over.map(|()| Outcome::ShutDown)
                }
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

/// Follows a running cluster until every VM has `ended`, and lets `watch` see what comes of
/// it. A failed VM is only a warning as long as there is another.
async fn follow(
    app: &App,
    cluster: &mut Cluster,
    ended: fn(&Cluster) -> bool,
    mut watch: impl FnMut(&Cluster),
) -> Result<()> {
    while !ended(cluster) {
        watch(cluster);
        cluster.next_report().await?;
        while let Some((_, error)) = cluster.take_failure() {
            if cluster.is_over() {
                return Err(error);
            }
            app.out.warn(error.report().trim_start_matches("error: "));
        }
    }
    let failed =
        cluster.book.states.iter().filter(|status| status.state == VmState::Failed).count();
    match failed {
        0 => Ok(()),
        _ => Err(Error::new(Kind::Partial, format!("{failed} VMs of the cluster failed"))),
    }
}

/// The exit code of a session, or its error.
fn report(app: &App, outcome: Result<Outcome>) -> Result<u8> {
    match outcome? {
        Outcome::ShutDown => Ok(0),
        Outcome::Signal(why) => Err(Error::new(Kind::Interrupted, why)),
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
