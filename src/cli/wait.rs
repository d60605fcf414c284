//! `pavo wait`

use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::time::{Instant, sleep};

use super::App;
use super::job::JobSelector;
use crate::error::{Error, Result};
use crate::model::job::{VmState, VmStatus};
use crate::model::vmset::fold;
use crate::ops::watch::{Goal, Probes, missing, too_late};

/// How often the store is looked at: it is a local file, and nobody waits for less.
const PAUSE: Duration = Duration::from_millis(100);

/// Wait until all VMs of a cluster have got somewhere
#[derive(Debug, Args)]
pub struct Wait {
    #[command(flatten)]
    job: JobSelector,

    /// What to wait for
    #[arg(long = "for", value_enum, default_value_t = For::Running)]
    goal: For,

    /// Give up after so many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// What a VM must have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum For {
    /// QMP says that the guest runs
    Running,
    /// The guest's ssh server answered
    Ssh,
    /// The VM, or the whole cluster, has ended
    Stopped,
}

impl From<For> for Goal {
    fn from(goal: For) -> Self {
        match goal {
            For::Running => Self::Running,
            For::Ssh => Self::Ssh,
            For::Stopped => Self::Stopped,
        }
    }
}

impl Wait {
    pub fn run(self, app: &App) -> Result<u8> {
        app.block_on(self.wait(app))
    }

    async fn wait(self, app: &App) -> Result<u8> {
        let goal = Goal::from(self.goal);
        let start = Instant::now();
        let deadline =
            self.timeout.and_then(|seconds| start.checked_add(Duration::from_secs(seconds)));
        let (known, job) = self.job.find(app).await?;
        let mut shown = String::new();
        let mut probes = Probes::new(&job);
        loop {
            if !known.exists(app, &job).await? {
                return match goal {
                    Goal::Stopped => Ok(0),
                    _ => Err(Error::system(format!("job {} has ended", job.owner.job))),
                };
            }
            let states = with_proofs(&known.states(&job).await?, &probes);
            if goal == Goal::Ssh {
                let running = |(_, vm): &(_, &VmStatus)| vm.state == VmState::Running;
                for (vm, _) in job.vms.iter().zip(&states).filter(running) {
                    probes.ask(vm)?;
                }
            }
            let missing = missing(&states, goal);
            if missing.is_empty() {
                app.out.end_progress();
                return Ok(0);
            }
            if let Some(rank) = ended(&states, goal) {
                return Err(Error::system(format!(
                    "vm{rank} ended before it reached `{}`",
                    goal.as_str()
                )));
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(too_late(&missing, goal, start.elapsed()));
            }
            let line = format!("Waiting for {} to reach `{}`…", fold(&missing), goal.as_str());
            if line != shown {
                app.out.progress(&line);
                shown = line;
            }
            tokio::select! {
                () = sleep(PAUSE) => {}
                _ = probes.next() => {}
            }
        }
    }
}

/// The stored states, raised to `ssh` where our own probe read a banner.
fn with_proofs(stored: &[Option<VmStatus>], probes: &Probes) -> Vec<VmStatus> {
    let waiting = VmStatus { state: VmState::Waiting, since: 0, detail: String::new() };
    let raise = |(rank, status): (u32, &Option<VmStatus>)| {
        let mut status = status.clone().unwrap_or_else(|| waiting.clone());
        if status.state == VmState::Running && probes.answered(rank) {
            status.state = VmState::Ssh;
        }
        status
    };
    (0..).zip(stored).map(raise).collect()
}

fn ended(states: &[VmStatus], goal: Goal) -> Option<u32> {
    if goal == Goal::Stopped {
        return None;
    }
    (0..).zip(states).find(|(_, status)| status.state.is_over()).map(|(rank, _)| rank)
}
