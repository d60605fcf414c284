//! `pavo agent`

use std::pin::pin;
use std::time::Duration;

use clap::{Args, Subcommand};
use futures_util::StreamExt;
use nix::sys::signal::Signal;
use pavo_agent::{Exit, Opening};
use serde::Serialize;
use tokio::time::Instant;

use super::App;
use super::job::{JobSelector, one_vm, ranks};
use super::out::{Column, OutputArgs};
use super::run::Conduct;
use crate::error::{Error, Result};
use crate::model::vmset::{VmSet, fold};
use crate::ops::agent::hellos;
use crate::ops::run::{Commands, Heard};
use crate::vm::agent::{Answer, PCOCCS, QEMUS};

/// Ask the agents in the guests, which run commands for `pavo run`
#[derive(Debug, Subcommand)]
pub enum Agent {
    Ping(Ping),
    List(List),
    Attach(Attach),
    Kill(Kill),
}

impl Agent {
    pub fn run(self, app: &App) -> Result<u8> {
        match self {
            Self::Ping(verb) => verb.run(app),
            Self::List(verb) => verb.run(app),
            Self::Attach(verb) => verb.run(app),
            Self::Kill(verb) => verb.run(app),
        }
    }
}

/// Find out which guests' agents answer
///
/// Says how many VMs answered, and how long that took. Those that did not are named, with the
/// reason, and make the exit code 1. Where pavo's own agent is missing, pcocc's answers, or QEMU's.
#[derive(Debug, Args)]
pub struct Ping {
    #[command(flatten)]
    job: JobSelector,

    /// The VMs, such as `vm0`, `vm[0-3]` or `all`
    #[arg(value_name = "VMS", default_value = "all")]
    vms: VmSet,

    /// Wait so many seconds for those that do not answer at once, 30 at most
    #[arg(short, long, value_name = "SECONDS", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u64).range(0..=30))]
    timeout: u64,

    #[command(flatten)]
    output: OutputArgs,
}

/// Who answered in a guest.
#[derive(Debug, Serialize)]
struct Pong {
    vm: u32,
    /// `pavo-agent`, `pcocc-agent` or `qemu-ga`; absent where none did.
    agent: Option<String>,
    version: Option<String>,
    /// Why none did.
    error: Option<String>,
}

impl Pong {
    fn new(vm: u32, answer: &Result<Answer>) -> Self {
        let (found, error) = match answer {
            Ok(answer) => (Some(answer), None),
            Err(error) => (None, Some(error.report().trim_start_matches("error: ").to_owned())),
        };
        let agent = found.map(|answer| answer.agent.clone());
        Self { vm, agent, version: found.map(|answer| answer.version.clone()), error }
    }
}

impl Ping {
    fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let ranks = ranks(&self.vms, &job)?;
            let start = Instant::now();
            let mut missing = ranks.clone();
            let (mut rows, mut failed) = (Vec::new(), Vec::new());
            let mut others = [(PCOCCS, Vec::new()), (QEMUS, Vec::new())];
            let patience = Duration::from_secs(self.timeout);
            let mut answers = pin!(hellos(known.store(), &job, &ranks, patience));
            while let Some((rank, answer)) = answers.next().await {
                missing.retain(|other| *other != rank);
                rows.push(Pong::new(rank, &answer));
                match answer {
                    Ok(answer) => {
                        let other = others.iter_mut().find(|(name, _)| answer.agent == *name);
                        other.into_iter().for_each(|(_, ranks)| ranks.push(rank));
                    }
                    Err(error) => failed.push((rank, error)),
                }
                if !missing.is_empty() {
                    app.out.transient(&format!("Waiting for {}…", fold(&missing)));
                }
            }
            let seconds = start.elapsed().as_secs_f64();
            let answered = ranks.len() - failed.len();
            if self.output.output.is_some() {
                rows.sort_by_key(|row| row.vm);
                app.out.list(self.output, &rows, &[])?;
            } else {
                let vms = if answered == 1 { "VM" } else { "VMs" };
                app.out.data(&format!("{answered} {vms} answered in {seconds:.2}s\n"))?;
            }
            for (name, mut ranks) in others.into_iter().filter(|(_, ranks)| !ranks.is_empty()) {
                ranks.sort_unstable();
                let (who, whose) = (fold(&ranks), if name == QEMUS { "QEMU's" } else { "pcocc's" });
                app.out
                    .warn(&format!("{who}: only {whose} agent answers, with no more than it can"));
            }
            report(app, failed);
            Ok(u8::from(answered < ranks.len()))
        })
    }
}

/// List the commands that run in the guests, and those that were left
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    job: JobSelector,

    /// The VMs, such as `vm0`, `vm[0-3]` or `all`
    #[arg(value_name = "VMS", default_value = "all")]
    vms: VmSet,

    #[command(flatten)]
    output: OutputArgs,
}

/// A line of the list.
#[derive(Debug, Serialize)]
struct Row {
    vm: u32,
    id: u64,
    pid: u32,
    user: String,
    /// Since it began.
    seconds: u64,
    state: String,
    command: String,
}

const COLUMNS: &[Column<Row>] = &[
    Column { title: "vm", text: |row| format!("vm{}", row.vm) },
    Column { title: "id", text: |row| row.id.to_string() },
    Column { title: "pid", text: |row| row.pid.to_string() },
    Column { title: "user", text: |row| row.user.clone() },
    Column { title: "for", text: |row| super::duration(row.seconds) },
    Column { title: "state", text: |row| row.state.clone() },
    Column { title: "command", text: |row| row.command.clone() },
];

impl Row {
    fn new(vm: u32, command: pavo_agent::Command) -> Self {
        let state = match command.exit {
            Some(Exit::Code(code)) => format!("exit code {code}"),
            Some(Exit::Signal(signal)) => format!("killed by signal {signal}"),
            _ if command.attached => "attached".into(),
            _ => "left".into(),
        };
        let pavo_agent::Command { id, pid, user, words, seconds, .. } = command;
        Self { vm, id, pid, user, seconds, state, command: words }
    }
}

impl List {
    fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let wanted = ranks(&self.vms, &job)?;
            let openings = wanted.into_iter().map(|rank| (rank, Opening::List)).collect();
            let mut commands = Commands::start(known.shared_store(), &job, openings);
            let (mut rows, mut failed) = (Vec::new(), Vec::new());
            while let Some((index, heard)) = commands.next().await {
                let rank = commands.all[index].rank;
                match heard {
                    Heard::Item(item) => rows.push(Row::new(rank, item)),
                    Heard::Lost(error) => failed.push((rank, error)),
                    Heard::Failed(failure) => failed.push((rank, Error::system(failure.why))),
                    _ => {}
                }
            }
            rows.sort_by_key(|row| (row.vm, row.id));
            app.out.list(self.output, &rows, COLUMNS)?;
            let code = u8::from(!failed.is_empty());
            report(app, failed);
            Ok(code)
        })
    }
}

/// One command of one guest.
#[derive(Debug, Args)]
struct One {
    #[command(flatten)]
    job: JobSelector,

    /// The VM
    #[arg(value_name = "VM")]
    vm: VmSet,

    /// The command's number, as `pavo agent list` and `pavo run --detach` say it
    #[arg(value_name = "ID")]
    id: u64,
}

/// Show a command that was left, to its end
///
/// First comes the newest of what it has written, 64 KiB at most, then what it writes. It has no
/// input. Its exit code becomes ours. A Ctrl-C is passed on; whoever wants to leave
/// it running closes the terminal, or kills this.
#[derive(Debug, Args)]
pub struct Attach {
    #[command(flatten)]
    one: One,
}

impl Attach {
    fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.one.job.find(app).await?;
            let rank = one_vm(&self.one.vm, &job)?;
            Conduct::default().attach(app, &known, &job, rank, self.one.id).await
        })
    }
}

/// Send a signal to a command in a guest, whoever started it
#[derive(Debug, Args)]
pub struct Kill {
    #[command(flatten)]
    one: One,

    /// The signal, by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "TERM", value_parser = parse_signal)]
    signal: u8,
}

fn parse_signal(text: &str) -> Result<u8> {
    let upper = text.to_uppercase();
    let name = format!("SIG{}", upper.trim_start_matches("SIG"));
    let number = text.parse().ok().and_then(|number: i32| Signal::try_from(number).ok());
    let signal = number.or_else(|| name.parse().ok());
    signal.map(|signal| signal as u8).ok_or_else(|| {
        Error::usage(format!("`{}` is no signal", text.escape_debug()))
            .help("give a name, such as TERM or KILL, or its number")
    })
}

impl Kill {
    fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.one.job.find(app).await?;
            let rank = one_vm(&self.one.vm, &job)?;
            let opening = Opening::Kill { id: self.one.id, signal: self.signal };
            let mut commands = Commands::start(known.shared_store(), &job, vec![(rank, opening)]);
            match commands.next().await {
                Some((_, Heard::Failed(failure))) => Err(no_command(rank, &failure.why)),
                Some((_, Heard::Lost(error))) => Err(error),
                _ => Ok(0),
            }
        })
    }
}

/// The error where a guest has no command of a number, as its agent says it.
pub fn no_command(rank: u32, why: &str) -> Error {
    Error::not_found(format!("{why} in vm{rank}"))
        .help(format!("see what runs: `pavo agent list vm{rank}`"))
}

/// Says who failed, and why, the same reason once.
pub fn report(app: &App, mut failed: Vec<(u32, Error)>) {
    failed.sort_by_key(|(rank, _)| *rank);
    let mut groups: Vec<(String, Vec<u32>)> = Vec::new();
    for (rank, error) in failed {
        let text = error.report();
        match groups.iter_mut().find(|(known, _)| *known == text) {
            Some((_, ranks)) => ranks.push(rank),
            None => groups.push((text, vec![rank])),
        }
    }
    for (text, ranks) in groups {
        app.out.error(&text.replacen("error: ", &format!("error: {}: ", fold(&ranks)), 1));
    }
}
