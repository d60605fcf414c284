//! `pavo status`

use clap::Args;
use serde::Serialize;

use super::job::JobSelector;
use super::out::{Column, OutputArgs};
use super::{App, duration};
use crate::error::Result;
use crate::model::job::{JobRecord, VmRecord, VmState, VmStatus};
use crate::ops::book::now;

/// Show the VMs of a cluster, and how far each is
///
/// The state says what was seen: `running` is QMP's word, `ssh` means that the ssh
/// server answered.
#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    job: JobSelector,

    #[command(flatten)]
    output: OutputArgs,
}

/// One VM.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    vm: VmRecord,
    state: VmState,
    /// Seconds in this state.
    elapsed: u64,
    detail: String,
}

const COLUMNS: &[Column<Row>] = &[
    Column { title: "vm", text: |row| format!("vm{}", row.vm.rank) },
    Column { title: "state", text: |row| row.state.to_string() },
    Column { title: "for", text: |row| duration(row.elapsed) },
    Column { title: "template", text: |row| row.vm.template.clone() },
    Column { title: "host", text: |row| row.vm.host.clone() },
    Column { title: "image", text: |row| row.vm.image.clone().unwrap_or_default() },
    Column { title: "address", text: |row| join(&row.vm.addresses) },
    Column { title: "ports", text: |row| ports(&row.vm) },
    Column { title: "detail", text: |row| row.detail.clone() },
];

fn join<T: ToString>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn ports(vm: &VmRecord) -> String {
    let port = |port: &crate::model::job::PublishedPort| {
        format!("{}:{}→{}", port.host_address, port.host_port, port.vm_port)
    };
    vm.ports.iter().map(port).collect::<Vec<_>>().join(",")
}

impl Status {
    pub fn run(self, app: &App) -> Result<u8> {
        let (job, states) = app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let states = known.states(&job).await?;
            Ok((job, states))
        })?;
        app.out.list(self.output, &rows(job, states), COLUMNS)?;
        Ok(0)
    }
}

fn rows(job: JobRecord, states: Vec<Option<VmStatus>>) -> Vec<Row> {
    let row = |(vm, status): (VmRecord, Option<VmStatus>)| {
        let status = status.unwrap_or(VmStatus {
            state: VmState::Waiting,
            since: job.started,
            detail: String::new(),
        });
        Row {
            vm,
            state: status.state,
            elapsed: now().saturating_sub(status.since),
            detail: status.detail,
        }
    };
    job.vms.into_iter().zip(states).map(row).collect()
}
