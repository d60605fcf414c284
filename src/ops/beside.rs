//! The shell or script that runs beside a cluster, and ends no later than it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::time::timeout;

use super::program;
use crate::error::{Context, Result};
use crate::host::limits::restore_open_files;
use crate::host::spawn::die_with_parent;
use crate::model::job::JobRecord;

/// How long it may take to end after a signal.
const GRACE: Duration = Duration::from_secs(3);

/// What to run.
#[derive(Clone, Debug)]
pub enum Program {
    /// A line for `/bin/sh`.
    Script(String),
    /// The user's shell, with a prompt that says where one is.
    Shell(PathBuf),
    /// A script for vm0, whose agent may take so many seconds until it answers.
    InGuest { script: PathBuf, patience: u64, kept: Option<Kept> },
}

/// A script that outlives who waits for it, with its guest.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The file that tells that it has begun.
    pub begun: PathBuf,
    /// Whether its guest goes on from a checkpoint, and it had begun before that.
    pub before: Option<bool>,
}

impl Kept {
    fn options(&self) -> Vec<OsString> {
        let mut options = vec!["--begun".into(), self.begun.clone().into_os_string()];
        match self.before {
            Some(true) => options.push("--again=must".into()),
            Some(false) => options.push("--again=may".into()),
            None => {}
        }
        options
    }
}

/// It, running.
#[derive(Debug)]
pub struct Beside {
    child: Child,
    /// What tells it that it has to end.
    last_signal: Signal,
    /// Whether it leads a process group of its own.
    leads: bool,
    in_guest: bool,
}

impl Beside {
    /// Starts it. At a terminal it shares our process group, so that keys reach it as they
    /// reach us; otherwise it leads its own, so that its children can be ended with it.
    /// Of a cluster that goes on it is told from where.
    pub fn start(
        program: &Program,
        job: &JobRecord,
        at_terminal: bool,
        resumed: Option<&Path>,
    ) -> Result<Self> {
        let mut command = match program {
            Program::Script(script) => {
                let mut command = Command::new("/bin/sh");
                command.args(["-c", script]);
                command
            }
            Program::Shell(shell) => interactive(shell, job.owner.job),
            Program::InGuest { script, patience, kept } => {
                let mut command = program::again();
                command.args(["run", "-w", "vm0", "--input-none", "--wait"]);
                command.arg(patience.to_string()).arg("--script").arg(script);
                command.args(kept.iter().flat_map(Kept::options));
                command
            }
        };
        let id = job.owner.job.to_string();
        for variable in ["PAVO_JOB_ID", "PCOCC_JOB_ID"] {
            command.env(variable, &id);
        }
        for variable in ["PAVO_JOB_NAME", "PCOCC_JOB_NAME"] {
            command.env(variable, &job.name);
        }
        command.env("PAVO_ALLOCATION", "1").env("PCOCC_ALLOCATION", "1");
        command.envs(resumed.map(|dir| ("PAVO_RESUMED", dir)));
        if !at_terminal {
            command.process_group(0);
        }
        restore_open_files(&mut command);
        // Should we be killed, it must not go on without the cluster.
        die_with_parent(&mut command);
        let doing = || match program {
            Program::Script(script) => format!("running `{script}`"),
            Program::Shell(shell) => format!("starting the shell `{}`", shell.display()),
            Program::InGuest { .. } => "running the script in vm0".into(),
        };
        let child = tokio::process::Command::from(command).kill_on_drop(true).spawn();
        let last_signal = match program {
            // The scheduler's SIGTERM, which reaches it as well, is none for a script that is kept.
            Program::Shell(_) | Program::InGuest { kept: Some(_), .. } => Signal::SIGHUP,
            Program::Script(_) | Program::InGuest { .. } => Signal::SIGTERM,
        };
        let in_guest = matches!(program, Program::InGuest { .. });
        let child = child.while_doing(doing)?;
        Ok(Self { child, last_signal, leads: !at_terminal, in_guest })
    }

    /// Waits for its end. Safe to drop.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().await.while_doing(|| "waiting for the shell".into())
    }

    /// Passes an interrupt on; at a terminal it got the same one.
    pub fn interrupt(&self) {
        if self.leads {
            self.signal(Signal::SIGINT);
        }
    }

    /// What lets it not tell that the guests are gone, where it is a guest's.
    pub fn hush(&self) -> Hush {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok());
        Hush(pid.filter(|_| self.in_guest).map(Pid::from_raw))
    }

    fn signal(&self, signal: Signal) {
        let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) else { return };
        let pid = Pid::from_raw(pid);
        // It may have ended by itself.
        let _ = if self.leads { killpg(pid, signal) } else { kill(pid, signal) };
    }

    /// Tells it to end, and ends it.
    pub async fn end(mut self) {
        self.signal(self.last_signal);
        if timeout(GRACE, self.child.wait()).await.is_err() {
            self.signal(Signal::SIGKILL);
            let _ = self.child.wait().await;
        }
    }
}

/// See [`Beside::hush`].
#[derive(Clone, Copy, Debug)]
pub struct Hush(Option<Pid>);

impl Hush {
    /// Before anybody has waited for it.
    pub fn now(self) {
        // It may have ended by itself.
        let _ = self.0.map(|pid| kill(pid, Signal::SIGKILL));
    }
}

/// The user's shell, with a prompt that says where one is.
fn interactive(shell: &Path, job: u32) -> Command {
    let prompt = format!("(pavo/{job}) ");
    let mut command = Command::new(shell);
    match shell.file_name().and_then(|name| name.to_str()) {
        // bash reads its prompt from its start-up file: set it after that was read.
        Some("bash") => {
            command.env("PROMPT_COMMAND", format!("PS1='{prompt}'\"$PS1\"; unset PROMPT_COMMAND"));
        }
        _ => {
            command.env("PS1", format!("{prompt}$ "));
        }
    }
    command
}
