//! `pavo run`

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use pavo_agent::{Exec, Opening};

use super::App;
use super::job::{JobSelector, Jobs, ranks};
use super::terminal::terminal_size;
use crate::error::{Context, Error, Kind, Result};
use crate::model::job::JobRecord;
use crate::model::vmset::VmSet;
use crate::ops::agent::hellos;
use crate::ops::run::place::{Place, Room, Wish, place};
use crate::ops::run::{Commands, Heard};

mod arrival;
mod conduct;
mod exec;
mod outside;
mod show;
pub mod signals;

pub use conduct::Conduct;

/// Run a command in the VMs of a cluster
///
/// In each VM, or those of `-w`, as root and with what root has from logging in. It needs
/// neither ssh nor a network: pavo's agent in the guest runs it. Output and errors stay
/// apart; of several VMs, lines stay whole. On a terminal what VMs say alike is shown once:
/// `vm[0-63] (64): …`. The exit code is the highest of all, 128 and the number of a signal
/// for what one killed, 124 if the time was up, and 255 where a VM was lost.
///
/// Each process finds its number, from 0, in PAVO_PROCESS, and how many there are in
/// PAVO_PROCESSES. Standard input goes to all of them, unless it is a terminal.
///
/// Signals are passed on; a second Ctrl-C within a second leaves. Whoever is gone runs
/// nothing any more: when `pavo run` ends, however it does, so does the command it started, unless
/// that was started with `--detach`. What a command that has ended left in the background stays.
///
/// At a site with Slurm, where you have no cluster and name none, this is srun: the command
/// runs on compute hosts, as you, with the same options as far as srun has them. It says so.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    job: JobSelector,

    /// The VMs, such as `vm0`, `vm[0-3]` or `all`
    #[arg(short = 'w', long = "nodelist", value_name = "VMS", default_value = "all")]
    vms: VmSet,

    /// Start so many processes, filling VM after VM with one on each CPU
    #[arg(short = 'n', long = "process", value_name = "COUNT")]
    processes: Option<u32>,

    /// Use so many VMs, the first ones; the processes of `-n` are spread over them
    #[arg(short = 'N', long = "node", value_name = "COUNT")]
    nodes: Option<u32>,

    /// Give each process so many CPUs of its own
    #[arg(short = 'c', long = "core", value_name = "COUNT")]
    cores: Option<u32>,

    /// Run as this user of the guest
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,

    /// On a terminal: one process only
    #[arg(long)]
    pty: bool,

    /// Run this file of yours, with the command as its arguments
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,

    /// Set a variable: VAR=VALUE, or VAR, or all that match re(REGEX), as they are here
    #[arg(short, long, value_name = "VAR[=VALUE]")]
    env: Vec<String>,

    /// Set all variables that are set here, but for those of the user, such as HOME
    #[arg(long)]
    mirror_env: bool,

    /// Put VALUE and a colon before what a variable holds in the guest
    #[arg(long, value_name = "VAR=VALUE")]
    path_prefix: Vec<String>,

    /// Put a colon and VALUE behind it
    #[arg(long, value_name = "VAR=VALUE")]
    path_suffix: Vec<String>,

    /// Run in this folder of the guest [default: the user's home]
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,

    /// Outside of a cluster, where this is srun: run in this partition
    #[arg(short, long, value_name = "NAME")]
    partition: Option<String>,

    /// Wait so many seconds for agents that do not answer yet
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,

    /// Come back to the script if the guest, which goes on from a checkpoint, has it
    #[arg(long, hide = true, value_enum, requires = "begun")]
    again: Option<Again>,

    #[command(flatten)]
    conduct: Conduct,

    /// The command and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    #[arg(required_unless_present = "script")]
    command: Vec<std::ffi::OsString>,
}

/// Whether a guest that goes on must have the script.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Again {
    Must,
    May,
}

/// More than any guest has.
const MAX_CORES: u32 = 4096;
/// How long VMs may take to say how many CPUs they have.
const CORES: Duration = Duration::from_secs(10);

impl Run {
    pub fn run(self, app: &App) -> Result<u8> {
        let wish = Wish { processes: self.processes, vms: self.nodes, cores: self.cores };
        let found = app.block_on(async {
            match self.job.find(app).await {
                Err(error)
                    if error.kind() == Kind::NotFound && self.job.is_outside(app).await? =>
                {
                    Ok(None)
                }
                found => found.map(Some),
            }
        })?;
        let Some((known, job)) = found else { return self.outside(app) };
        if self.partition.is_some() {
            return Err(Error::usage("`-p` is for jobs, and this cluster has its hosts already")
                .help("run it in the VMs: leave `-p` away"));
        }
        let exec = self.exec()?;
        let here = std::env::vars_os().collect::<Vec<_>>();
        for name in exec::unset(&here, &self.env) {
            app.out.warn(&format!("`-e {name}`: it is not set here"));
        }
        app.block_on(async {
            let ranks = ranks(&self.vms, &job)?;
            if let Some(seconds) = self.wait {
                arrival::wait(app, &known, &job, &ranks, Duration::from_secs(seconds)).await?;
            }
            if let Some(again) = self.again {
                let name = String::from_utf8_lossy(&exec.argv[0]).into_owned();
                if let Some(id) = find_script(&known, &job, &name, again).await? {
                    return self.conduct.attach(app, &known, &job, 0, id).await;
                }
            }
            let places = self.places(&known, &job, wish, &ranks).await?;
            if self.pty && places.len() > 1 {
                let count = places.len();
                return Err(Error::usage(format!("`--pty` is for one process, not {count}"))
                    .help("choose one VM: `-w vm0`"));
            }
            self.conduct.conduct(app, &known, &job, places, exec).await
        })
    }

    /// The command, but for what differs from process to process.
    fn exec(&self) -> Result<Exec> {
        use std::os::unix::ffi::OsStrExt;
        let here = std::env::vars_os().collect::<Vec<_>>();
        let mut exec = Exec {
            argv: self.command.iter().map(|word| word.as_bytes().to_vec()).collect(),
            env: exec::environment(&here, &self.env, self.mirror_env)?,
            prefixes: exec::assignments("--path-prefix", &self.path_prefix)?,
            suffixes: exec::assignments("--path-suffix", &self.path_suffix)?,
            cwd: self.cwd.as_ref().map(|cwd| cwd.clone().into_bytes()),
            user: self.user.as_ref().map(|user| user.clone().into_bytes()),
            keep: self.conduct.detach || self.conduct.begun.is_some(),
            whole: self.conduct.begun.is_some(),
            leave: self.conduct.detach,
            ..Exec::default()
        };
        if let Some(path) = &self.script {
            let script = std::fs::read(path);
            let doing = || format!("reading the script `{}`", path.display());
            exec.script = Some(script.while_doing(doing)?);
            let name = path.file_name().unwrap_or(path.as_os_str());
            exec.argv.insert(0, name.as_bytes().to_vec());
        }
        if self.pty {
            if !std::io::stdin().is_terminal() {
                return Err(Error::usage("`--pty` is for a terminal, and standard input is none"));
            }
            exec.terminal = Some(terminal_size());
            exec.env.extend(exec::terminal(&here));
        }
        Ok(exec)
    }

    async fn places(
        &self,
        known: &Jobs,
        job: &JobRecord,
        wish: Wish,
        ranks: &[u32],
    ) -> Result<Vec<Place>> {
        use futures_util::StreamExt;
        wish.check(ranks.len())?;
        let mut rooms: Vec<Room> =
            ranks.iter().map(|rank| Room { rank: *rank, cores: 1 }).collect();
        if wish.needs_cores() {
            let mut answers = std::pin::pin!(hellos(known.store(), job, ranks, CORES));
            while let Some((rank, answer)) = answers.next().await {
                let answer = answer.while_doing(|| format!("asking vm{rank} for its CPUs"))?;
                if let Some(room) = rooms.iter_mut().find(|room| room.rank == rank) {
                    // QEMU's agent does not tell: what the VM was given is what it has.
                    let given = job.vms.iter().find(|vm| vm.rank == rank).map_or(1, |vm| vm.cores);
                    // A guest may say what it likes.
                    room.cores = if answer.cores > 0 { answer.cores.min(MAX_CORES) } else { given };
                }
            }
        }
        place(wish, &rooms)
    }
}

/// The number of the script of this name, which vm0 has brought from before.
async fn find_script(
    known: &Jobs,
    job: &JobRecord,
    name: &str,
    again: Again,
) -> Result<Option<u64>> {
    let doing = || "looking for the script in vm0, which goes on".to_owned();
    let mut commands = Commands::start(known.shared_store(), job, vec![(0, Opening::List)]);
    let (words, mut found) = (format!("(script) {name}"), None);
    while let Some((_, heard)) = commands.next().await {
        match heard {
            Heard::Item(item) if item.words == words => found = found.or(Some(item.id)),
            Heard::Lost(error) => return Err(error).while_doing(doing),
            Heard::Failed(failure) => return Err(Error::system(failure.why)).while_doing(doing),
            _ => {}
        }
    }
    if found.is_none() && again == Again::Must {
        let error = Error::not_found("vm0's agent does not have it any more");
        let help = "has the agent been started again there? see `pavo agent list vm0`";
        return Err(error.help(help)).while_doing(doing);
    }
    Ok(found)
}
