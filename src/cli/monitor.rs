//! `pavo reset`, `pause`, `resume`, `powerdown`, `monitor-cmd` and `qmp`: what is said to
//! the hypervisors of a cluster.

use clap::Args;
use serde_json::Value;

use super::App;
use super::job::{JobSelector, ranks};
use super::out::printable;
use crate::error::{Context, Error, Result};
use crate::model::vmset::{VmSet, fold};
use crate::ops::reach::reach;
use crate::vm::control::Op;

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
        let ranks: Vec<u32> = answers.into_iter().map(|(rank, _)| rank).collect();
        app.out.status(&format!("{done} {}.", fold(&ranks)));
        Ok(0)
    }
}

/// Asks each of the VMs the same; returns their answers by rank.
fn ask(
    app: &App,
    job: &JobSelector,
    vms: &VmSet,
    doing: &str,
    op: &Op,
) -> Result<Vec<(u32, Value)>> {
    app.block_on(async {
        let (known, job) = job.find(app).await?;
        let mut answers = Vec::new();
        for rank in ranks(vms, &job)? {
            let ask = async {
                reach(known.store(), &job, rank).await?.connect().await?.ask(op.clone()).await
            };
            answers.push((rank, ask.await.while_doing(|| format!("{doing} vm{rank}"))?));
        }
        Ok(answers)
    })
}

/// Reset VMs of a running cluster
///
/// The VMs restart from their current disks, as if their reset button had been pressed;
/// the guests are not told.
#[derive(Debug, Args)]
pub struct Reset {
    #[command(flatten)]
    vms: Vms,
}

impl Reset {
    pub fn run(self, app: &App) -> Result<u8> {
        self.vms.tell(app, "resetting", "Reset", &Op::Reset)
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
/// A guest that heeds it shuts down, and its VM ends; others do nothing.
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
        let many = answers.len() > 1;
        for (rank, answer) in answers {
            let name = if many { format!("vm{rank}: ") } else { String::new() };
            for line in answer.as_str().unwrap_or_default().lines() {
                app.out.data(&format!("{name}{}\n", printable(line)))?;
            }
        }
        Ok(0)
    }
}

/// Send a command to QEMU by its machine protocol (QMP)
///
/// `pavo qmp vm0 query-block`, `pavo qmp vm0 set_link '{"name": "nic0", "up": false}'`.
/// The answer is JSON: of one VM as it is, of several as an object by their names.
#[derive(Debug, Args)]
pub struct Qmp {
    #[command(flatten)]
    job: JobSelector,

    /// The VMs, such as `vm0`, `vm[0-3]` or `all`
    #[arg(value_name = "VMS")]
    vms: VmSet,

    /// The command
    #[arg(value_name = "COMMAND")]
    command: String,

    /// Its arguments, a JSON object
    #[arg(value_name = "ARGUMENTS", default_value = "{}")]
    arguments: String,
}

impl Qmp {
    pub fn run(self, app: &App) -> Result<u8> {
        let arguments = serde_json::from_str(&self.arguments).map_err(|error| {
            Error::usage("the arguments of the command are no JSON object")
                .because(error)
                .help(r#"such as '{"name": "nic0", "up": false}'"#)
        })?;
        let op = Op::Qmp { command: self.command, arguments };
        let mut answers = ask(app, &self.job, &self.vms, "asking", &op)?;
        let answer = match answers.len() {
            1 => answers.remove(0).1,
            _ => answers.into_iter().map(|(rank, answer)| (format!("vm{rank}"), answer)).collect(),
        };
        app.out.data(&format!("{answer:#}\n"))?;
        Ok(0)
    }
}
