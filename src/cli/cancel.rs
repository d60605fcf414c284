//! `pavo cancel`

use std::time::Duration;

use clap::Args;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use super::App;
use super::job::JobSelector;
use crate::error::{Context, Error, Result};
use crate::model::job::JobRecord;
use crate::model::owner::Manager;
use crate::ops::queue;

/// How long a cluster may take to end.
const LIMIT: Duration = Duration::from_secs(20);

/// How often it is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// How often Slurm is asked whether the job is still there.
const ASK_SLURM: Duration = Duration::from_secs(2);

/// End a cluster
///
/// Its VMs are switched off and everything of it is removed. The command returns when
/// nothing is left.
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
            let (known, job) = selector.find(app).await?;
            let id = job.owner.job;
            match known.manager() {
                Manager::Local => end_launcher(&job)?,
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
                if !known.exists(app, &job).await? {
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
                Manager::Slurm | Manager::Node => {
                    format!("see what Slurm says: `scontrol show job {id}`")
                }
            }))
        })
    }
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
