//! `pavo cancel`

use std::time::Duration;

use clap::Args;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use super::App;
use super::job::{JobSelector, Jobs};
use crate::batch::slurm::Queued;
use crate::error::{Context, Error, Kind, Result};
use crate::model::job::JobRecord;
use crate::model::owner::Manager;
use crate::ops::queue::{self, Whose};

/// How long a cluster may take to end.
const LIMIT: Duration = Duration::from_secs(50);

/// How often it is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// How often Slurm is asked whether the job is still there.
const ASK_SLURM: Duration = Duration::from_secs(2);

/// How often Slurm's queue is looked at while a job leaves it.
const ASK_QUEUE: Duration = Duration::from_millis(300);

/// End a cluster
///
/// Its VMs are switched off and everything of it is removed. The command returns when
/// nothing is left. A job of yours that still waits in Slurm's queue is taken out of it.
#[derive(Debug, Args)]
pub struct Cancel {
    /// The job to end
    #[arg(value_name = "JOBID", conflicts_with_all = ["jobid", "jobname"])]
    id: Option<String>,

    #[command(flatten)]
    job: JobSelector,
}

impl Cancel {
    pub fn run(self, app: &App) -> Result<u8> {
        let selector = match self.id {
            Some(id) => JobSelector { jobid: Some(id), jobname: None },
            None => self.job,
        };
        app.block_on(async {
            match selector.find_running(app).await {
                Ok((known, job)) => end(app, &known, &job).await,
                Err(error) if error.kind() == Kind::NotFound => {
                    let job = only(selector.all_queued(app).await?, error)?;
                    withdraw(app, &job).await
                }
                Err(error) => Err(error),
            }
        })
    }
}

/// Ends a cluster, and waits until nothing of it is left.
async fn end(app: &App, known: &Jobs, job: &JobRecord) -> Result<u8> {
    let id = job.owner.job;
    match known.manager() {
        Manager::Local => end_launcher(job)?,
        Manager::Slurm | Manager::Node => queue::cancel(id).await?,
    }
    let deadline = Instant::now() + LIMIT;
    app.out.progress(&format!("Waiting for job {id} to end…"));
    let mut ask_slurm = Instant::now() + ASK_SLURM;
    while Instant::now() < deadline {
        if known.manager() == Manager::Slurm && Instant::now() >= ask_slurm {
            // Slurm kills a launcher whose guests take long: then the record stays,
            // until somebody looks.
            known.running(app).await?;
            ask_slurm = Instant::now() + ASK_SLURM;
        }
        if known.current(app, job).await?.is_none() {
            app.out.status(&format!("Job {id} has ended."));
            return Ok(0);
        }
        sleep(PAUSE).await;
    }
    let error = format!("job {id} has not ended after {} s", LIMIT.as_secs());
    Err(Error::system(error).help(match known.manager() {
        Manager::Local => {
            let pid = job.launcher.pid;
            format!("its launcher is process {pid}: `kill -9 {pid}` ends it at once")
        }
        Manager::Slurm | Manager::Node => see(id),
    }))
}

/// What there is to look at when Slurm does not end a job.
fn see(id: u32) -> String {
    format!("see what Slurm says: `scontrol show job {id}`")
}

/// The one job of the queue that is meant; `none` if there is none.
fn only(mut jobs: Vec<Queued>, none: Error) -> Result<Queued> {
    match jobs.len() {
        0 => Err(none),
        1 => Ok(jobs.remove(0)),
        _ => {
            let one = |job: &Queued| format!("{} (`{}`)", job.job, job.name);
            let all: Vec<String> = jobs.iter().map(one).collect();
            Err(Error::usage("several jobs are in Slurm's queue: which one is meant?")
                .help(format!("add `-j JOBID`; there are {}", all.join(", "))))
        }
    }
}

/// Ends a job that has no cluster yet.
async fn withdraw(app: &App, job: &Queued) -> Result<u8> {
    let (id, waits) = (job.job, job.waits());
    match waits {
        true => queue::withdraw(id).await?,
        false => queue::cancel(id).await?,
    }
    let deadline = Instant::now() + LIMIT;
    app.out.progress(&format!("Waiting for job {id} to end…"));
    while Instant::now() < deadline {
        let queue = queue::list(Whose::User(&app.env.user)).await?;
        let there = queue.iter().find(|other| other.job == id && !other.ends());
        match there {
            None if waits => {
                let (state, reason) = (job.state.to_lowercase(), &job.reason);
                let reason = reason.trim_matches(['(', ')']);
                app.out
                    .status(&format!("Job {id} is cancelled; it had waited ({state}: {reason})."));
                return Ok(0);
            }
            None => {
                app.out.status(&format!("Job {id} has ended."));
                return Ok(0);
            }
            // It has begun meanwhile.
            Some(there) if waits && !there.waits() => queue::cancel(id).await?,
            Some(_) => {}
        }
        sleep(ASK_QUEUE).await;
    }
    let error = format!("job {id} has not ended after {} s", LIMIT.as_secs());
    Err(Error::system(error).help(see(id)))
}

/// Tells the launcher of a cluster on this machine to end it.
fn end_launcher(job: &JobRecord) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(job.launcher.pid).unwrap_or(i32::MAX));
    match kill(pid, Signal::SIGTERM) {
        // It has ended meanwhile: as good.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).while_doing(|| format!("ending job {}", job.owner.job)),
    }
}
