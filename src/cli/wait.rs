//! `pavo wait`

use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::time::{Instant, sleep};

use super::App;
use super::job::{JobSelector, Jobs};
use crate::batch::slurm::Queued;
use crate::error::{Error, Kind, Result};
use crate::model::job::{JobRecord, VmRecord, VmState, VmStatus};
use crate::model::vmset::fold;
use crate::ops::watch::{Goal, HOPELESS, LATE, Probes, hint, missing, too_late};

/// How often the store is looked at: it is a local file, and nobody waits for less.
const PAUSE: Duration = Duration::from_millis(100);

/// How long after one look at Slurm's queue comes the next, at first and at most.
const QUEUE_PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// The same at most, once the job has begun.
const BEGINNING: Duration = Duration::from_secs(1);

/// Wait until all VMs of a cluster have got somewhere
///
/// A job that still waits in Slurm's queue is waited for, too, and why it waits is shown. Without
/// `--timeout`, an agent is given up once its guest has answered ssh for five minutes.
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
    /// The guest's agent answered, which `pavo run` needs
    Agent,
    /// The VM, or the whole cluster, has ended
    Stopped,
}

impl From<For> for Goal {
    fn from(goal: For) -> Self {
        match goal {
            For::Running => Self::Running,
            For::Ssh => Self::Ssh,
            For::Agent => Self::Agent,
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
        let Some((known, mut job)) = self.begun(app, start, deadline).await? else { return Ok(0) };
        let mut shown = String::new();
        let mut probes = Probes::new(&job, known.shared_store());
        loop {
            // Where a VM is, is known once its task has come.
            let Some(current) = known.current(app, &job).await? else {
                return match goal {
                    Goal::Stopped => Ok(0),
                    _ => Err(Error::system(format!("job {} has ended", job.owner.job))),
                };
            };
            job = current;
            let states = with_proofs(&known.states(&job).await?, &probes, goal);
            if goal.shown().is_some() {
                // States are written now and then, and may be newer than what was read above.
                let is_known = |vm: &VmRecord| !vm.host.is_empty();
                let asked = |(vm, status): &(&VmRecord, &VmStatus)| {
                    is_known(vm) && status.state.is_up() && !goal.reached(status.state)
                };
                for (vm, _) in job.vms.iter().zip(&states).filter(asked) {
                    probes.ask(vm, goal)?;
                    probes.explain(vm, goal);
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
            let lacking = probes.without_agent(&missing, LATE);
            let is_over = match deadline {
                Some(deadline) => Instant::now() >= deadline,
                None => !probes.without_agent(&missing, HOPELESS).is_empty(),
            };
            if is_over {
                return Err(too_late(&job.vms, &states, goal, start.elapsed(), &lacking));
            }
            let (who, hint) = (fold(&missing), hint(&lacking));
            let line = format!("Waiting for {who} to reach `{}`…{hint}", goal.as_str());
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

impl Wait {
    /// The cluster that is meant, once it is there; `None` if it has come and gone meanwhile,
    /// and its end is what was waited for.
    async fn begun(
        &self,
        app: &App,
        start: Instant,
        deadline: Option<Instant>,
    ) -> Result<Option<(Jobs, JobRecord)>> {
        let mut selector = self.job.clone();
        let mut pause = QUEUE_PAUSES.0;
        let mut seen: Option<Queued> = None;
        loop {
            // One that waited when last seen is in no store.
            let missing = match &seen {
                Some(job) if job.waits() => None,
                _ => match selector.find_running(app).await {
                    Err(error) if error.kind() == Kind::NotFound => Some(error),
                    found => return found.map(Some),
                },
            };
            let Some(job) = selector.queued(app).await? else {
                return match (seen, missing, self.goal) {
                    (Some(_), _, For::Stopped) => Ok(None),
                    (None, Some(error), _) => Err(error),
                    (job, ..) => {
                        let id = job.map_or_else(String::new, |job| format!(" {}", job.job));
                        Err(Error::system(format!("job{id} has ended")))
                    }
                };
            };
            let (said, old) = (job.why_not_yet(), seen.as_ref());
            if old.is_none_or(|old| old.why_not_yet() != said) {
                app.out.progress(&format!("Waiting: {said}"));
                pause = QUEUE_PAUSES.0;
            }
            if deadline.is_some_and(|end| Instant::now() >= end) {
                let seconds = start.elapsed().as_secs();
                return Err(Error::system(said)
                    .because(format!("that has not changed within {seconds} s"))
                    .help(format!(
                        "wait longer: `--timeout`; or give it up: `pavo cancel {}`",
                        job.job
                    )));
            }
            let rest = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            sleep(rest.map_or(pause, |rest| pause.min(rest))).await;
            pause = (pause * 2).min(if job.waits() { QUEUE_PAUSES.1 } else { BEGINNING });
            // From here on no other is meant, whatever begins meanwhile.
            selector = JobSelector { jobid: Some(job.job.to_string()), jobname: None };
            seen = Some(job);
        }
    }
}

/// The stored states, raised to `ssh` or `agent` where our own probe was answered.
fn with_proofs(stored: &[Option<VmStatus>], probes: &Probes, goal: Goal) -> Vec<VmStatus> {
    let waiting = VmStatus { state: VmState::Waiting, since: 0, detail: String::new() };
    let raise = |(rank, status): (u32, &Option<VmStatus>)| {
        let mut status = status.clone().unwrap_or_else(|| waiting.clone());
        if status.state.is_up() && probes.answered(rank) {
            status.state = goal.shown().unwrap_or(status.state);
        }
        status
    };
    (0..).zip(stored).map(raise).collect()
}

fn ended(states: &[VmStatus], goal: Goal) -> Option<u32> {
    if goal == Goal::Stopped {
        return None;
    }
    (0..).zip(states).find(|(_, status)| status.state.is_down()).map(|(rank, _)| rank)
}
