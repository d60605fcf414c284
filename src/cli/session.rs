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
use tokio::time::Instant;

use super::App;
use super::rescue::{self, Call, Rescue, Rescued, Resumed};
use super::signals::{CANCELLED, INTERRUPTED, ORPHANED, Signals, WARNED};
use super::wait::For;
use crate::config::{BatchManager, Config};
use crate::error::{Context, Error, Kind, Result};
use crate::model::job::{JobRecord, VmState, VmStatus};
use crate::model::vmset::fold;
use crate::ops::beside::{Beside, Kept, Program};
use crate::ops::book::now;
use crate::ops::gather::gather;
use crate::ops::launch::Cluster;
use crate::ops::resolve::Blueprint;
use crate::ops::watch::{Again, Goal, Progress, wait_until};

/// How long guests may take to shut down when the time limit is reached, or the scheduler
/// ends the job.
pub const GRACE: Duration = Duration::from_secs(10);
/// How long they may take when they have persistent drives, whose data is to be whole.
const CLEAN: Duration = Duration::from_secs(30);
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

    /// Write the cluster down in this folder before it has to end, as `pavo ckpt` does: by a
    /// warning (SIGUSR2), or for want of time
    #[arg(long, value_name = "DIR")]
    pub ckpt_on_signal: Option<PathBuf>,

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

    /// # Errors
    /// When its VMs are none of which a checkpoint can be taken.
    pub fn check_rescue(&self, blueprint: &Blueprint) -> Result<()> {
        self.ckpt_on_signal.as_ref().map_or(Ok(()), |_| rescue::check(blueprint))
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
        let dir = self.ckpt_on_signal.iter().map(|dir| dir.to_string_lossy());
        arguments.extend(dir.map(|dir| format!("--ckpt-on-signal={dir}")));
        arguments
    }
}

/// The longest script for a guest: it travels in the job's own.
const MAX_SCRIPT: usize = 64 << 10;

/// Why a cluster has come to its end.
enum Outcome {
    /// A signal, as it is called.
    Signal(&'static str),
    /// The shell or script ended.
    Script(ExitStatus),
    /// Every VM has ended.
    ShutDown,
    TimeLimit,
    /// It was written down first.
    Saved {
        dir: PathBuf,
        preempted: bool,
    },
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
    /// What is to be done before it ends.
    pub rescue: Option<Rescue>,
    /// Where it goes on from, if that was done before.
    pub resumed: Option<Resumed>,
}

impl Session<'_> {
    /// Starts the cluster, does what is wanted, ends it; returns the exit code.
    pub async fn run(&self, mut cluster: Cluster, signals: &mut Signals) -> Result<u8> {
        let app = self.app;
        let outcome = self.live(&mut cluster, signals).await;
        let outcome = outcome.map_err(|error| with_advice_on_room(error, self.tmp));
        if let (Ok(Outcome::Signal(CANCELLED)), false) = (&outcome, self.grace.is_zero()) {
            // "cancelled" would not tell a job that was put back from one that nobody wants.
            rescue::reason(app, &mut cluster).await;
        }
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
        if !matches!(outcome, Ok(Outcome::ShutDown | Outcome::Saved { .. })) {
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
        let why = cluster.ended();
        let ended = cluster.end(grace).await.while_doing(|| "ending the cluster".into());
        if let (Err(_), Err(leftover)) = (&outcome, &ended) {
            app.out.warn(leftover.report().trim_start_matches("error: "));
        }
        if let (Ok(Outcome::Saved { dir, preempted }), Some(rescue)) = (&outcome, &self.rescue) {
            ended?;
            return rescue.finish(app, dir, (*preempted, why)).await;
        }
        let code = report(app, outcome)?;
        ended.map(|()| code)
    }

    /// From the first process to the reason for the end.
    async fn live(&self, cluster: &mut Cluster, signals: &mut Signals) -> Result<Outcome> {
        let app = self.app;
        let deadline =
            self.time.and_then(|time| Instant::now().checked_add(Duration::from_secs(time)));
        let mut warned = false;
        {
            let up = async {
                app.out.progress("Configuring hosts...");
                cluster.start().await?;
                let limit = Duration::from_secs(self.args.timeout);
                let goal = if self.args.wait == For::Stopped {
                    Goal::Running
                } else {
                    self.args.wait.into()
                };
                let every = if app.out.stderr_is_terminal() { 1 } else { 10 };
                let progress = Progress { say: &|line| app.out.progress(line), every };
                gather(cluster, self.hosts, limit, progress).await?;
                app.out.status("Configuring hosts... (done)");
                wait_until(cluster, goal, Some(limit), progress).await?;
                cluster.settle().await
            };
            tokio::pin!(up);
            loop {
                tokio::select! {
                    result = &mut up => {
                        result?;
                        break;
                    }
                    why = signals.next() => match why {
                        // There is nothing yet that would be worth it.
                        WARNED => warned = true,
                        why => return Ok(Outcome::Signal(why)),
                    },
                    () = until(deadline) => return Ok(Outcome::TimeLimit),
                }
            }
        }
        self.say_up(cluster);
        self.stay(cluster, signals, deadline, warned).await
    }

    fn say_up(&self, cluster: &Cluster) {
        let all: Vec<u32> = cluster.book.record.vms.iter().map(|vm| vm.rank).collect();
        let state = match (self.args.wait, all.len()) {
            (For::Ssh, 1) => "answers ssh",
            (For::Ssh, _) => "answer ssh",
            (For::Agent, 1) => "answers",
            (For::Agent, _) => "answer",
            (_, 1) => "runs",
            (_, _) => "run",
        };
        self.app.out.status(&format!("{} {state}", fold(&all)));
    }

    /// What the script for vm0 is called there, by which it is found in a guest that goes on.
    fn script_name(&self, job: &JobRecord) -> String {
        let before = self.resumed.as_ref().and_then(|resumed| resumed.script.clone());
        before.unwrap_or_else(|| format!("batch-script-{}", job.owner.job))
    }

    /// What runs beside the cluster.
    fn program(&self, job: &JobRecord) -> Result<Program> {
        if let Some(text) = &self.batch_script {
            let name = self.script_name(job);
            let before = self.resumed.as_ref().map(|resumed| resumed.script.is_some());
            let stays = self.rescue.is_some() || before == Some(true);
            let kept = stays.then(|| Kept { begun: rescue::begun(&job.dir, &name), before });
            let script = job.dir.join(name);
            let written = std::fs::write(&script, text);
            written.while_doing(|| format!("writing `{}`", script.display()))?;
            return Ok(Program::InGuest { script, patience: self.args.timeout, kept });
        }
        Ok(match &self.args.script {
            Some(script) => Program::Script(script.clone()),
            None => Program::Shell(self.app.env.shell.clone()),
        })
    }

    /// Stays with a cluster that is up until there is a reason for its end; a shell or script
    /// runs beside it, if one is wanted.
    async fn stay(
        &self,
        cluster: &mut Cluster,
        signals: &mut Signals,
        deadline: Option<Instant>,
        warned: bool,
    ) -> Result<Outcome> {
        let mut beside = match self.args.wait {
            For::Stopped => None,
            _ => Some(self.start_beside(&cluster.book.record)?),
        };
        let outcome = self.watch(cluster, &mut beside, signals, deadline, warned).await;
        if let (Ok(Outcome::ShutDown), Some(_)) = (&outcome, &beside) {
            self.app.out.status("The cluster has shut down");
        }
        match (beside, &outcome) {
            (Some(_), Ok(Outcome::Script(_))) | (None, _) => {}
            (Some(beside), _) => beside.end().await,
        }
        outcome
    }

    fn start_beside(&self, job: &JobRecord) -> Result<Beside> {
        let resumed = self.resumed.as_ref().map(|resumed| &*resumed.dir);
        let at_terminal = std::io::stdin().is_terminal();
        Beside::start(&self.program(job)?, job, at_terminal, resumed)
    }

    /// Waits for the reason.
    async fn watch(
        &self,
        cluster: &mut Cluster,
        beside: &mut Option<Beside>,
        signals: &mut Signals,
        deadline: Option<Instant>,
        mut warned: bool,
    ) -> Result<Outcome> {
        let app = self.app;
        // Who is beside a guest that powers off may want to save its disk.
        let (mut off, what) = (false, if self.args.has_script() { "script" } else { "shell" });
        let ended = if beside.is_some() { Cluster::is_over } else { Cluster::is_down };
        let stays = beside.is_some();
        let mut watch = |cluster: &Cluster| {
            let down = cluster.is_down() && !cluster.is_over();
            if down && !off && stays {
                app.out.status(&format!(
                    "All guests are off; the cluster stays until the {what} ends: they can be \
                     saved, or started again with `pavo reset`"
                ));
            }
            off = down;
        };
        let (mut word, mut heard) = (cluster.word(), self.rescue.is_none());
        loop {
            let mut company = beside.as_mut();
            let call = tokio::select! {
                // A terminal that closes ends the shell, too: the signal is the reason.
                biased;
                () = std::future::ready(()), if std::mem::take(&mut warned) => Call::Signal(WARNED),
                why = signals.next() => match (why, &beside) {
                    (INTERRUPTED, Some(beside)) => {
                        beside.interrupt();
                        continue;
                    }
                    (why, _) => Call::Signal(why),
                },
                said = rescue::said(&mut word), if !heard => {
                    heard = true;
                    Call::Word(said)
                }
                status = rescue::status(&mut company) => return status.map(Outcome::Script),
                over = follow(app, cluster, ended, &mut watch) => {
                    return over.map(|()| Outcome::ShutDown);
                }
                () = until(deadline) => Call::TimeLimit,
            };
            if let Some(outcome) = self.rescued(call, cluster, beside.as_mut(), signals).await? {
                return Ok(outcome);
            }
            match call {
                Call::Signal(WARNED) | Call::Word(_) => {}
                Call::Signal(why) => return Ok(Outcome::Signal(why)),
                Call::TimeLimit => return Ok(Outcome::TimeLimit),
            }
        }
    }

    /// Takes a checkpoint, if one is wanted because of that; what came of it, unless the cluster
    /// goes on.
    async fn rescued(
        &self,
        call: Call,
        cluster: &mut Cluster,
        beside: Option<&mut Beside>,
        signals: &mut Signals,
    ) -> Result<Option<Outcome>> {
        let Some(rescue) = &self.rescue else { return Ok(None) };
        if !rescue.is_wanted(self.app, call, cluster).await {
            return Ok(None);
        }
        let record = &cluster.book.record;
        let name = self.batch_script.as_ref().map(|_| self.script_name(record));
        let begun = name.map(|name| rescue::begun(&record.dir, &name));
        let company = (beside, begun.as_deref());
        Ok(match rescue.take(self.app, cluster, company, signals).await? {
            Rescued::Saved(dir) => {
                Some(Outcome::Saved { dir, preempted: matches!(call, Call::Word(_)) })
            }
            Rescued::Script(status) => Some(Outcome::Script(status)),
            Rescued::Not => None,
        })
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
pub async fn follow(
    app: &App,
    cluster: &mut Cluster,
    ended: fn(&Cluster) -> bool,
    mut watch: impl FnMut(&Cluster),
) -> Result<()> {
    let mut again = Again::new(&cluster.book.record);
    while !ended(cluster) {
        watch(cluster);
        again.look(&cluster.book.record.vms, &cluster.book.states);
        tokio::select! {
            report = cluster.next_report() => drop(report?),
            (rank, state) = again.next() => {
                if cluster.book.states[rank as usize].state == VmState::Running {
                    let status = VmStatus { state, since: now(), detail: String::new() };
                    cluster.set_state(rank, status).await?;
                }
            }
        }
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
        Outcome::ShutDown | Outcome::Saved { .. } => Ok(0),
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
