//! `pavo cancel`

use std::time::Duration;

use clap::Args;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use super::job::JobSelector;
use super::{App, job::running};
use crate::error::{Context, Error, Result};
use crate::store::embedded;

/// How long a cluster may take to end.
const LIMIT: Duration = Duration::from_secs(20);

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
            let (store, job) = selector.find(app).await?;
            let id = job.owner.job;
            let pid = Pid::from_raw(i32::try_from(job.launcher.pid).unwrap_or(i32::MAX));
            match kill(pid, Signal::SIGTERM) {
                // It has ended meanwhile: as good.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error).while_doing(|| format!("ending job {id}")),
            }
            drop(store);
            let deadline = Instant::now() + LIMIT;
            app.out.progress(&format!("Waiting for job {id} to end…"));
            while Instant::now() < deadline {
                let Some(store) = embedded::open_existing(&app.env.state_dir()).await? else {
                    break;
                };
                let left = running(app, &store).await?;
                if !left.iter().any(|other| other.owner == job.owner) {
                    app.out.status(&format!("Job {id} has ended."));
                    return Ok(0);
                }
                sleep(Duration::from_millis(20)).await;
            }
            Err(Error::system(format!("job {id} has not ended after {} s", LIMIT.as_secs()))
                .help(format!("its launcher is process {pid}: `kill -9 {pid}` ends it at once")))
        })
    }
}
