//! `pavo ps`

use clap::Args;
use serde::Serialize;

use super::job::running;
use super::out::{Column, OutputArgs};
use super::{App, duration};
use crate::batch::slurm::Queued;
use crate::config::{BatchManager, load_batch};
use crate::error::{Error, Result};
use crate::model::cluster::ClusterDef;
use crate::model::job::JobRecord;
use crate::ops::book::now;
use crate::ops::queue::{self, Whose};
use crate::store::embedded;

/// List your running clusters
#[derive(Debug, Args)]
pub struct Ps {
    /// With Slurm: everybody's
    #[arg(short, long, conflicts_with = "user")]
    all: bool,

    /// With Slurm: another user's
    #[arg(short, long, value_name = "NAME")]
    user: Option<String>,

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
    /// Where it runs, or why it waits.
    host: String,
    /// `running`; at a site also Slurm's other states.
    state: String,
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
            state: "running".into(),
            elapsed: now().saturating_sub(job.started),
            time_limit: job.time_limit,
        }
    }
}

impl Row {
    /// A job of the queue, if it is one of pavo's.
    fn of_queue(job: Queued) -> Option<Self> {
        let definition = job.cluster?;
        let count = definition.parse::<ClusterDef>().map_or(0, |def| def.count());
        Some(Self {
            id: job.job,
            name: job.name,
            user: job.user,
            vms: count as usize,
            definition,
            host: job.reason,
            state: job.state.to_lowercase(),
            elapsed: crate::batch::parse_elapsed(&job.elapsed).unwrap_or(0),
            time_limit: crate::batch::parse_elapsed(&job.time_limit),
        })
    }
}

const COLUMNS: &[Column<Row>] = &[
    Column { title: "id", text: |row| row.id.to_string() },
    Column { title: "name", text: |row| row.name.clone() },
    Column { title: "user", text: |row| row.user.clone() },
    Column { title: "cluster", text: |row| row.definition.clone() },
    Column { title: "vms", text: |row| row.vms.to_string() },
    Column { title: "state", text: |row| row.state.clone() },
    Column { title: "host", text: |row| row.host.clone() },
    Column { title: "duration", text: |row| duration(row.elapsed) },
    Column {
        title: "timelimit",
        text: |row| row.time_limit.map_or_else(|| "none".into(), duration),
    },
];

impl Ps {
    pub fn run(self, app: &App) -> Result<u8> {
        let batch = load_batch(&super::config::sources(app))?;
        let rows = match batch.manager {
            BatchManager::Local => self.here(app)?,
            BatchManager::Slurm => self.queued(app)?,
        };
        app.out.list(self.output, &rows, COLUMNS)?;
        Ok(0)
    }

    fn here(&self, app: &App) -> Result<Vec<Row>> {
        if self.all || self.user.is_some() {
            return Err(Error::usage("on one machine, each user's clusters are their own")
                .help("`pavo ps` lists yours"));
        }
        let jobs = app.block_on(async {
            match embedded::open_existing(&app.env.state_dir()).await? {
                Some(store) => running(app, &store).await,
                None => Ok(Vec::new()),
            }
        })?;
        Ok(jobs.into_iter().map(Row::from).collect())
    }

    /// One question to Slurm, which knows also what waits in the queue.
    fn queued(&self, app: &App) -> Result<Vec<Row>> {
        let whose = match (&self.user, self.all) {
            (Some(user), _) => Whose::User(user),
            (None, true) => Whose::Everybodys,
            (None, false) => Whose::User(&app.env.user),
        };
        let jobs = app.block_on(queue::list(whose))?;
        Ok(jobs.into_iter().filter_map(Row::of_queue).collect())
    }
}
