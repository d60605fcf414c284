//! `pavo ps`

use clap::Args;
use serde::Serialize;

use super::job::running;
use super::out::{Column, OutputArgs};
use super::{App, duration};
use crate::error::Result;
use crate::model::job::JobRecord;
use crate::ops::book::now;
use crate::store::embedded;

/// List your running clusters
#[derive(Debug, Args)]
pub struct Ps {
    #[command(flatten)]
    output: OutputArgs,
}

/// One line of the list.
#[derive(Debug, Serialize)]
struct Row {
    id: u32,
    name: String,
    user: String,
    definition: String,
    vms: usize,
    host: String,
    /// Seconds.
    elapsed: u64,
    /// Seconds.
    time_limit: Option<u64>,
}

impl From<JobRecord> for Row {
    fn from(job: JobRecord) -> Self {
        Self {
            id: job.owner.job,
            name: job.name,
            user: job.user,
            definition: job.definition,
            vms: job.vms.len(),
            host: job.host,
            elapsed: now().saturating_sub(job.started),
            time_limit: job.time_limit,
        }
    }
}

const COLUMNS: &[Column<Row>] = &[
    Column { title: "id", text: |row| row.id.to_string() },
    Column { title: "name", text: |row| row.name.clone() },
    Column { title: "user", text: |row| row.user.clone() },
    Column { title: "cluster", text: |row| row.definition.clone() },
    Column { title: "vms", text: |row| row.vms.to_string() },
    Column { title: "host", text: |row| row.host.clone() },
    Column { title: "duration", text: |row| duration(row.elapsed) },
    Column {
        title: "timelimit",
        text: |row| row.time_limit.map_or_else(|| "none".into(), duration),
    },
];

impl Ps {
    pub fn run(self, app: &App) -> Result<u8> {
        let jobs = app.block_on(async {
            match embedded::open_existing(&app.env.state_dir()).await? {
                Some(store) => running(app, &store).await,
                None => Ok(Vec::new()),
            }
        })?;
        let rows: Vec<Row> = jobs.into_iter().map(Row::from).collect();
        app.out.list(self.output, &rows, COLUMNS)?;
        Ok(0)
    }
}
