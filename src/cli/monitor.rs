//! `pavo reset`, `pause`, `resume`, `powerdown`, `monitor-cmd` and `qmp`: what is said to
//! the hypervisors of a cluster.

use clap::Args;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;

use super::App;
use super::job::{JobSelector, ranks};
use super::out::printable;
use crate::error::{Context, Error, Kind, Result};
use crate::model::job::JobRecord;
use crate::model::vmset::{VmSet, fold};
use crate::ops::reach::Pass;
use crate::store::Store;
use crate::vm::control::Op;

/// VMs that are asked at the same time.
const AT_ONCE: usize = 32;

/// Some of a cluster's VMs.
#[derive(Debug, Args)]
struct Vms {
    #[command(flatten)]
    job: JobSelector,

    /// The VMs, such as `vm0`, `vm[0-3]` or `all`
    #[arg(value_name = "VMS", default_value = "vm0")]
    vms: VmSet,
}

impl Vms {
    /// Asks each of them the same, to which there is nothing to answer.
    fn tell(&self, app: &App, doing: &str, done: &str, op: &Op) -> Result<u8> {
        let answers = ask(app, &self.job, &self.vms, doing, op)?;
        let ranks: Vec<u32> = answers.said.iter().map(|(rank, _)| *rank).collect();
        if !ranks.is_empty() {
            app.out.status(&format!("{done} {}.", fold(&ranks)));
        }
        Ok(answers.code())
    }
}

/// What VMs have answered.
struct Answers {
    /// By rank.
    said: Vec<(u32, Value)>,
    asked: usize,
}

impl Answers {
    fn code(&self) -> u8 {
        if self.said.len() == self.asked { 0 } else { Kind::Partial.exit_code() }
    }

    /// Of one VM its answer, of several all by their names.
    fn value(&self) -> Value {
        match &*self.said {
            [(_, answer)] if self.asked == 1 => answer.clone(),
            said => said.iter().map(|(rank, said)| (format!("vm{rank}"), said.clone())).collect(),
        }
    }
}

/// Asks each of the VMs the same. Of several, those that fail are said, and the others asked
/// all the same.
fn ask(app: &App, job: &JobSelector, vms: &VmSet, doing: &str, op: &Op) -> Result<Answers> {
    app.block_on(async {
        let (known, job) = job.find(app).await?;
        ask_all(app, (known.store(), &job), &ranks(vms, &job)?, doing, op).await
    })
}

async fn ask_all(
    app: &App,
    (store, job): (Option<&dyn Store>, &JobRecord),
    ranks: &[u32],
    doing: &str,
    op: &Op,
) -> Result<Answers> {
    let pass = &Pass::default();
    let ask = |rank: u32| async move {
        let vm = async { pass.reach(store, job, rank).await?.connect().await };
        let ask = async { vm.await?.ask(op.clone()).await };
        (rank, ask.await.while_doing(|| format!("{doing} vm{rank}")))
    };
    let mut answers = futures_util::stream::iter(ranks.iter().copied().map(ask)).buffered(AT_ONCE);
    let mut said = Vec::new();
    while let Some((rank, answer)) = answers.next().await {
        match answer {
            Ok(answer) => said.push((rank, answer)),
            Err(error) if ranks.len() == 1 => return Err(error),
            Err(error) => app.out.error(&error.report()),
        }
    }
    Ok(Answers { said, asked: ranks.len() })
}

/// Reset VMs of a running cluster
///
/// The VMs restart from their current disks, as if their reset button had been pressed;
/// the guests are not told. One that has powered off starts again; one that stands still stays
/// so, and begins anew when it goes on.
#[derive(Debug, Args)]
pub struct Reset {
    /// Let them go on, too, if they stand still: after `pause`, or a failure of a disk
    #[arg(long)]
    hard: bool,

    #[command(flatten)]
    vms: Vms,
}

impl Reset {
    pub fn run(self, app: &App) -> Result<u8> {
        self.vms.tell(app, "resetting", "Reset", &Op::Reset { hard: self.hard })
    }
}

/// Let VMs stand still
///
/// Their processors stop, their memory stays. `pavo resume` lets them go on.
#[derive(Debug, Args)]
pub struct Pause {
    #[command(flatten)]
    vms: Vms,
}

impl Pause {
    pub fn run(self, app: &App) -> Result<u8> {
        self.vms.tell(app, "pausing", "Paused", &Op::Pause)
    }
}

/// Let VMs go on that were paused
#[derive(Debug, Args)]
pub struct Resume {
    #[command(flatten)]
    vms: Vms,
}

impl Resume {
    pub fn run(self, app: &App) -> Result<u8> {
        self.vms.tell(app, "resuming", "Resumed", &Op::Resume)
    }
}

/// Press the power button of VMs
///
/// A guest that heeds it shuts down; others do nothing. Its VM is `off` then, and stays while the
/// cluster does: its disk can be saved, and `pavo reset` starts the guest again.
#[derive(Debug, Args)]
pub struct Powerdown {
    #[command(flatten)]
    vms: Vms,
}

impl Powerdown {
    pub fn run(self, app: &App) -> Result<u8> {
        let done = "Pressed the power button of";
        self.vms.tell(app, "pressing the power button of", done, &Op::Powerdown)
    }
}

/// Send a command to QEMU's monitor
///
/// `pavo monitor-cmd vm0 info block` shows the VM's disks; `help` lists the commands.
#[derive(Debug, Args)]
pub struct MonitorCmd {
    #[command(flatten)]
    job: JobSelector,

    /// The VMs, such as `vm0`, `vm[0-3]` or `all`
    #[arg(value_name = "VMS")]
    vms: VmSet,

    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, num_args = 1.., trailing_var_arg = true)]
    #[arg(allow_hyphen_values = true)]
    command: Vec<String>,
}

impl MonitorCmd {
    pub fn run(self, app: &App) -> Result<u8> {
        let op = Op::Monitor { command: self.command.join(" ") };
        let answers = ask(app, &self.job, &self.vms, "asking the monitor of", &op)?;
        let many = answers.asked > 1;
        let mut refused = false;
        for (rank, answer) in &answers.said {
            let name = if many { format!("vm{rank}: ") } else { String::new() };
            if let Some(why) = refusal(answer.as_str().unwrap_or_default()) {
                refused = true;
                app.out.error(&format!("error: {name}QEMU refused: {}", printable(why)));
                continue;
            }
            for line in answer.as_str().unwrap_or_default().lines() {
                app.out.data(&format!("{name}{}\n", printable(line)))?;
            }
        }
        Ok(match (refused, many) {
            (false, _) => answers.code(),
            (true, false) => Kind::System.exit_code(),
            (true, true) => Kind::Partial.exit_code(),
        })
    }
}

/// What the monitor says of a command that it did not carry out: text, like all that it says.
fn refusal(answer: &str) -> Option<&str> {
    let line = answer.lines().find(|line| !line.trim().is_empty())?;
    match line.strip_prefix("Error: ") {
        Some(why) => Some(why),
        None => Some(line).filter(|line| line.starts_with("unknown command:")),
    }
}

/// Send a command to QEMU by its machine protocol (QMP)
///
/// `pavo qmp vm0 query-block`, `pavo qmp vm0 set_link '{"name": "nic0", "up": false}'`, or as
/// QEMU itself takes it: `pavo qmp vm0 '{"execute": "query-block"}'`. The answer is JSON: of one
/// VM as it is, of several as an object by their names.
///
/// With `-` commands are read from standard input, each a line of JSON, and each is answered by
/// one, until the first that fails.
#[derive(Debug, Args)]
pub struct Qmp {
    #[command(flatten)]
    job: JobSelector,

    /// The VMs, such as `vm0`, `vm[0-3]` or `all`
    #[arg(value_name = "VMS")]
    vms: VmSet,

    /// The command, or `-`
    #[arg(value_name = "COMMAND")]
    command: String,

    /// Its arguments, a JSON object
    #[arg(value_name = "ARGUMENTS")]
    arguments: Option<String>,
}

/// A command as QEMU takes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Execute {
    execute: String,
    #[serde(default)]
    arguments: serde_json::Map<String, Value>,
}

impl Execute {
    fn parse(text: &str) -> Result<Op> {
        let command: Self = serde_json::from_str(text).map_err(|error| {
            Error::usage("it is no command of QMP")
                .because(error)
                .help(r#"such as '{"execute": "query-block"}'"#)
        })?;
        Ok(Op::Qmp { command: command.execute, arguments: command.arguments })
    }
}

impl Qmp {
    pub fn run(self, app: &App) -> Result<u8> {
        if self.command == "-" {
            return self.run_lines(app);
        }
        let op = match &self.arguments {
            None if self.command.starts_with('{') => Execute::parse(&self.command)?,
            arguments => {
                let arguments = serde_json::from_str(arguments.as_deref().unwrap_or("{}"));
                let arguments = arguments.map_err(|error| {
                    Error::usage("the arguments of the command are no JSON object")
                        .because(error)
                        .help(r#"such as '{"name": "nic0", "up": false}'"#)
                })?;
                Op::Qmp { command: self.command, arguments }
            }
        };
        let answers = ask(app, &self.job, &self.vms, "asking", &op)?;
        app.out.data(&format!("{:#}\n", answers.value()))?;
        Ok(answers.code())
    }

    fn run_lines(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let ranks = ranks(&self.vms, &job)?;
            for line in std::io::stdin().lines() {
                let line = line.while_doing(|| "reading standard input".into())?;
                if line.trim().is_empty() {
                    continue;
                }
                let op = Execute::parse(&line)?;
                let answers = ask_all(app, (known.store(), &job), &ranks, "asking", &op).await?;
                app.out.data(&format!("{}\n", answers.value()))?;
                if answers.code() != 0 {
                    return Ok(answers.code());
                }
            }
            Ok(0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_monitor_refuses_is_told_from_what_it_answers() {
        assert_eq!(refusal("unknown command: 'x'\r\n"), Some("unknown command: 'x'"));
        assert_eq!(refusal("Error: there is no screen\r\n"), Some("there is no screen"));
        for answer in ["", "VM status: running\r\n", "id 1: Error: 0\r\n"] {
            assert_eq!(refusal(answer), None, "{answer}");
        }
    }
}
