//! What srun says on its standard error while it carries a cluster.

use crate::error::{Error, Kind};

/// The most lines that are kept.
const MAX_LINES: usize = 200;

/// srun's complaints, and what follows from them.
#[derive(Debug, Default)]
pub struct Complaints {
    lines: Vec<String>,
    ended: Option<Ended>,
}

/// Why Slurm ends a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Cancelled,
    TimeLimit,
    Preempted,
    Requeued,
    HostFailed,
}

impl Ended {
    /// Reads `slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T12:28:07 DUE
    /// TO TIME LIMIT ***`.
    fn read(line: &str) -> Option<Self> {
        let (_, said) = line.split_once(" error: *** ")?;
        let ours = said.starts_with("STEP ") || said.starts_with("JOB ");
        let (_, why) = said.split_once(" CANCELLED AT ").filter(|_| ours)?;
        let is_due_to = |reason: &str| why.contains(&format!(" DUE TO {reason}"));
        Some(match () {
            () if is_due_to("TIME LIMIT") => Self::TimeLimit,
            () if is_due_to("PREEMPTION") => Self::Preempted,
            () if is_due_to("JOB REQUEUE") => Self::Requeued,
            () if is_due_to("NODE FAILURE") => Self::HostFailed,
            () => Self::Cancelled,
        })
    }

    /// As what the user is told in the end.
    pub fn error(self) -> Error {
        let (what, help) = match self {
            Self::Cancelled => return Error::new(Kind::Interrupted, "the job was cancelled"),
            Self::TimeLimit => ("the job's time limit was reached", "ask for more with `-t`"),
            Self::Preempted => (
                "the job had to make room for another",
                "`scontrol show partition` says where it has not",
            ),
            Self::Requeued => {
                ("the job was put back into the queue", "`pavo ps` shows when it starts")
            }
            Self::HostFailed => ("Slurm has lost a host of the job", "see which: `sinfo -R`"),
        };
        Error::new(Kind::Interrupted, what).help(help)
    }
}

impl Complaints {
    pub fn keep(&mut self, line: &str) {
        self.ended = self.ended.or_else(|| Ended::read(line));
        if self.lines.len() < MAX_LINES {
            self.lines.push(line.to_owned());
        }
    }

    /// Why Slurm ends the step, if it has said so.
    pub fn ended(&self) -> Option<Ended> {
        self.ended
    }

    /// The error of an srun that has ended like this, although VMs had not.
    pub fn error(&self, status: std::process::ExitStatus) -> Error {
        if let Some(ended) = self.ended {
            return ended.error();
        }
        let error = Error::system(format!("the step of the VMs has ended ({status})"));
        match self.lines.is_empty() {
            true => error.help("was the job cancelled, or its time up? `scontrol show job`"),
            false => error.because(Error::system(self.lines.join("\n"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slurm_says_why_it_ends_a_step() {
        let line = "slurmstepd-n1: error: *** STEP 3.0 ON n1 CANCELLED AT 2026-11-21T12:28:07";
        for (rest, expected) in [
            (" ***", Ended::Cancelled),
            (" DUE TO TIME LIMIT ***", Ended::TimeLimit),
            (" DUE TO PREEMPTION ***", Ended::Preempted),
            (" DUE TO JOB REQUEUE ***", Ended::Requeued),
            (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", Ended::HostFailed),
        ] {
            assert_eq!(Ended::read(&format!("{line}{rest}")), Some(expected), "{rest}");
        }
        assert_eq!(Ended::read("srun: error: n1: task 0: Killed"), None);
    }
}
