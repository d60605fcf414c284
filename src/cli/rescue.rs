//! `--ckpt-on-signal`: a cluster that has to end is written down by its launcher, and goes on
//! from there when its job starts again.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::App;
use super::changes::ChangeArgs;
use super::session::follow;
use super::signals::{CANCELLED, Signals, WARNED};
use crate::batch::warning;
use crate::error::{Context, Error, Kind, Result};
use crate::model::vm::MountKind;
use crate::model::vmset::fold;
use crate::ops::beside::Beside;
use crate::ops::book::random;
use crate::ops::checkpoint::{Order, Phase, take};
use crate::ops::complaints::Ended;
use crate::ops::launch::Cluster;
use crate::ops::queue;
use crate::ops::resolve::Blueprint;
use crate::ops::series::Series;

/// How long it may take until Slurm's reason is heard of for a signal that it has sent.
const REASON: Duration = Duration::from_secs(2);

/// What a launcher in a job is told besides the folder.
#[derive(Clone, Debug, Default, Args)]
pub struct RescueArgs {
    /// What the checkpoints of this job are known by
    #[arg(long, hide = true, value_name = "WORD")]
    pub ckpt_tag: Option<String>,

    /// The signal by which Slurm warns
    #[arg(long, hide = true, value_name = "SIGNAL")]
    pub ckpt_signal: Option<String>,

    /// Put the job back into the queue afterwards
    #[arg(long, hide = true)]
    pub ckpt_requeue: bool,
}

impl RescueArgs {
    /// Of a new job.
    pub fn new(signal: Signal, requeue: bool) -> Result<Self> {
        let tag = format!("{:08x}", random()? as u32);
        let signal = signal.as_str().to_owned();
        Ok(Self { ckpt_tag: Some(tag), ckpt_signal: Some(signal), ckpt_requeue: requeue })
    }

    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        arguments.extend(self.ckpt_tag.iter().map(|tag| format!("--ckpt-tag={tag}")));
        arguments.extend(self.ckpt_signal.iter().map(|name| format!("--ckpt-signal={name}")));
        arguments.extend(self.ckpt_requeue.then(|| "--ckpt-requeue".to_owned()));
        arguments
    }
}

/// # Errors
/// When no checkpoint of such VMs could ever be taken.
pub fn check(blueprint: &Blueprint) -> Result<()> {
    let refused = |vm: &str, what: &str| {
        Error::usage(format!("`--ckpt-on-signal` is not for {vm}, which has {what}"))
            .help("`pavo ckpt --help` says what cannot be written down")
    };
    for vm in &blueprint.vms {
        let name = format!("template `{}`", vm.template.name.escape_debug());
        let mut mounts = vm.template.mount_points.values();
        if !vm.template.persistent_drives.is_empty() {
            return Err(refused(&name, "persistent drives"));
        }
        if mounts.any(|mount| mount.kind == MountKind::VirtioFs) {
            return Err(refused(&name, "a mount of virtio-fs"));
        }
    }
    Ok(())
}

/// Where a cluster goes on from.
#[derive(Clone, Debug)]
pub struct Resumed {
    pub dir: PathBuf,
    /// The job's script, if vm0's agent has it.
    pub script: Option<String>,
}

impl Resumed {
    /// # Errors
    /// When the checkpoint is none.
    pub fn of(changes: &ChangeArgs) -> Result<Option<Self>> {
        let Some(checkpoint) = changes.checkpoint()? else { return Ok(None) };
        let script = checkpoint.script().map(str::to_owned);
        Ok(changes.restart.clone().map(|dir| Self { dir, script }))
    }
}

/// The file that tells that a script has begun, which is called so in its guest.
pub fn begun(dir: &Path, script: &str) -> PathBuf {
    dir.join(format!("{script}.begun"))
}

/// What is to be done before the cluster ends.
#[derive(Clone, Debug)]
pub struct Rescue {
    series: Series,
    pub signal: Signal,
    /// The job of Slurm.
    job: Option<u32>,
    requeue: bool,
    home: PathBuf,
}

/// Why a cluster is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// By a signal, as it is called.
    Signal(&'static str),
    /// The scheduler has said so of the VMs' step.
    Word(Ended),
    TimeLimit,
}

/// What came of it.
pub enum Rescued {
    Saved(PathBuf),
    /// The script has ended meanwhile: there is nothing to go on with.
    Script(ExitStatus),
    /// Why not, which was said: the cluster goes on.
    Not,
}

impl Rescue {
    /// For a job of this number, or none if nothing is wanted.
    ///
    /// # Errors
    /// When the folder cannot be used.
    pub fn new(
        app: &App,
        dir: Option<&Path>,
        args: &RescueArgs,
        (job, slurm): (u32, bool),
    ) -> Result<Option<Self>> {
        let Some(dir) = dir else { return Ok(None) };
        let dir = std::path::absolute(dir).while_doing(|| "finding the current folder".into())?;
        Series::prepare(&dir)?;
        let signal = args.ckpt_signal.as_deref().and_then(warning::signal);
        let (Some(tag), Some(signal)) = (&args.ckpt_tag, signal) else {
            return Err(Error::bug("a launcher was not told how its checkpoints are called"));
        };
        let series = Series::new(&dir, job, tag);
        let (job, requeue, home) = (slurm.then_some(job), args.ckpt_requeue, app.env.home.clone());
        Ok(Some(Self { series, signal, job, requeue, home }))
    }

    /// Lets the job go on from its newest checkpoint, if it has one; says what it does and why.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn resume(&self, app: &App, changes: &mut ChangeArgs, again: bool) -> Result<()> {
        let (newest, others) = self.series.newest()?;
        for error in others {
            app.out.warn(error.report().trim_start_matches("error: "));
        }
        if let Some(dir) = newest {
            app.out.status(&format!("Going on from the checkpoint {}", dir.display()));
            changes.restart = Some(dir);
        } else if again {
            app.out.status("There is no checkpoint of this job: it begins anew");
        }
        Ok(())
    }

    /// Whether a checkpoint is to be taken because of that.
    pub async fn is_wanted(&self, app: &App, call: Call, cluster: &mut Cluster) -> bool {
        match (call, self.job) {
            (Call::Signal(WARNED) | Call::TimeLimit, _) => true,
            // Who ends one here wants no more of it.
            (Call::Signal(_), None) | (Call::Word(_), None) => false,
            (Call::Signal(CANCELLED), Some(_)) => {
                let reason = reason(app, cluster).await;
                !matches!(reason, Some(Ended::Cancelled | Ended::HostFailed))
            }
            (Call::Signal(_), _) => false,
            (Call::Word(Ended::Cancelled), Some(job)) => queue::runs(job).await.unwrap_or(true),
            (Call::Word(ended), _) => ended != Ended::HostFailed,
        }
    }

    /// Takes a checkpoint, after which the VMs end; or says why there is none, and they go on.
    pub async fn take(
        &self,
        app: &App,
        cluster: &mut Cluster,
        (mut beside, begun): (Option<&mut Beside>, Option<&Path>),
        signals: &mut Signals,
    ) -> Result<Rescued> {
        let (record, store) = (cluster.book.record.clone(), cluster.book.store());
        let dir = match self.series.next() {
            Ok(dir) => dir,
            Err(error) => return Ok(not(app, record.owner.job, error)),
        };
        let vms = fold(&record.vms.iter().map(|vm| vm.rank).collect::<Vec<_>>());
        app.out.status(&format!("Writing {vms} down to {}...", dir.display()));
        let id = record.owner.job;
        let order = Order { dir: &dir, keep_running: false, script: begun, home: &self.home };
        let (written, silence) = (Cell::new(false), beside.as_ref().map(|it| it.hush()));
        let told = |phase: Phase| {
            let Phase::Written(bytes) = phase else { return };
            written.set(true);
            silence.iter().for_each(|hush| hush.now());
            let (mib, dir) = (bytes.div_ceil(1 << 20), dir.display());
            app.out
                .status(&format!("Checkpoint of job {id} written to {dir} ({mib} MiB); it ends"));
        };
        let (end, ended) = oneshot::channel();
        let ended = async {
            match ended.await {
                Ok(error) => error,
                Err(_) => std::future::pending().await,
            }
        };
        let taken = take(store.as_deref(), &record, order, &told, ended);
        tokio::pin!(taken);
        let (mut end, mut over, mut script) = (Some(end), false, None);
        let taken = loop {
            let why = tokio::select! {
                biased;
                taken = &mut taken => break taken,
                status = status(&mut beside), if script.is_none() && !written.get() => {
                    script = Some(status?);
                    "the script has ended"
                }
                // Of a job the scheduler says it more than once.
                why = signals.next(), if self.job.is_none() => why,
                // What comes of it is seen by the checkpoint, too.
                _ = follow(app, cluster, Cluster::is_over, |_| {}), if !over => {
                    over = true;
                    continue;
                }
            };
            if let Some(end) = end.take() {
                // It is over already.
                let _ = end.send(Error::new(Kind::Interrupted, why));
            }
        };
        match (taken, script) {
            (Ok(troubles), _) => {
                for trouble in troubles.into_iter().chain(self.series.keep_from(&dir)) {
                    app.out.warn(trouble.report().trim_start_matches("error: "));
                }
                Ok(Rescued::Saved(dir.clone()))
            }
            (Err(_), Some(status)) => Ok(Rescued::Script(status)),
            (Err(error), None) => Ok(not(app, id, error)),
        }
    }
    /// The last word, once the cluster has ended: the exit code. Whether it was preempted, and
    /// why Slurm has ended it meanwhile.
    ///
    /// # Errors
    /// When the job is over, with how to go on from there; or it should not be.
    pub async fn finish(
        &self,
        app: &App,
        dir: &Path,
        (preempted, ended): (bool, Option<Ended>),
    ) -> Result<u8> {
        let dir = dir.display();
        // Whom Slurm preempts it would put back into the queue, if we did not end before.
        let wanted = self.job.filter(|_| self.requeue || preempted);
        let job = match (wanted, ended) {
            // It may have been cancelled while it was written down.
            (Some(job), Some(Ended::Cancelled)) => {
                queue::runs(job).await.unwrap_or(true).then_some(job)
            }
            (job, _) => job,
        };
        let Some(job) = job else {
            let verb = if self.job.is_some() { "batch" } else { "alloc" };
            let error =
                Error::new(Kind::Interrupted, "the cluster was written down, and has ended");
            return Err(error.help(format!("go on from there: `pavo {verb} -r {dir} …`")));
        };
        let requeued = queue::requeue(job).await;
        let requeued = requeued.while_doing(|| format!("putting job {job} back into the queue"));
        requeued.map_err(|error| error.help(format!("go on: `pavo batch -r {dir} …`")))?;
        app.out.status(&format!("Job {job} is in the queue again, and goes on from there"));
        Ok(0)
    }
}

/// Says why there is no checkpoint.
fn not(app: &App, job: u32, error: Error) -> Rescued {
    let doing = || format!("taking a checkpoint of job {job}");
    let error = Err::<(), _>(error).while_doing(doing).unwrap_err();
    app.out.warn(error.report().trim_start_matches("error: "));
    Rescued::Not
}

/// The scheduler's reason for a signal that it has sent, if it says one soon: the signal and the
/// word come by different ways, in any order.
pub async fn reason(app: &App, cluster: &mut Cluster) -> Option<Ended> {
    let mut word = cluster.word();
    let reason = async {
        tokio::select! {
            said = said(&mut word) => Some(said),
            // It is heard of by following.
            _ = follow(app, cluster, Cluster::is_over, |_| {}) => None,
        }
    };
    timeout(REASON, reason).await.ok().flatten()
}

/// Waits until the scheduler says why it ends the step.
pub async fn said(word: &mut watch::Receiver<Option<Ended>>) -> Ended {
    match word.wait_for(Option::is_some).await.map(|said| *said) {
        Ok(Some(said)) => said,
        _ => std::future::pending().await,
    }
}

/// Waits for the end of what is beside the cluster, if anything is.
pub async fn status(beside: &mut Option<&mut Beside>) -> Result<ExitStatus> {
    match beside {
        Some(beside) => beside.wait().await,
        None => std::future::pending().await,
    }
}
