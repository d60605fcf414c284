//! `pavo ps`

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tokio::time::timeout;

use super::job::running;
use super::out::{Column, OutputArgs};
use super::site::Person;
use super::{App, duration};
use crate::batch::slurm::Queued;
use crate::config::{BatchManager, Etcd, load_batch};
use crate::error::{Error, Result};
use crate::model::cluster::ClusterDef;
use crate::model::job::JobRecord;
use crate::model::owner::{Manager, Owner};
use crate::ops::book::now;
use crate::ops::jobs;
use crate::ops::queue::{self, Whose};
use crate::store::embedded;

/// How long the site's store may take: the list is Slurm's, and needs it for one column only.
const PATIENCE: Duration = Duration::from_secs(3);

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
    /// What is wrong with VMs of a cluster of one's own that runs.
    trouble: Option<String>,
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
            trouble: None,
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
            trouble: None,
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
    Column { title: "trouble", text: |row| row.trouble.clone().unwrap_or_default() },
];

impl Ps {
    pub fn run(self, app: &App) -> Result<u8> {
        let batch = load_batch(&super::config::sources(app))?;
        let rows = match batch.manager {
            BatchManager::Local => self.here(app)?,
            BatchManager::Slurm => self.queued(app, batch.etcd.as_ref())?,
        };
        app.out.list(self.output, &rows, COLUMNS)?;
        Ok(0)
    }

    fn here(&self, app: &App) -> Result<Vec<Row>> {
        if self.all || self.user.is_some() {
            return Err(Error::usage("on one machine, each user's clusters are their own")
                .help("`pavo ps` lists yours"));
        }
        app.block_on(async {
            let Some(store) = embedded::open_existing(&app.env.state_dir()).await? else {
                return Ok(Vec::new());
            };
            let mut rows = Vec::new();
            for job in running(app, &store).await? {
                let trouble = jobs::trouble(jobs::states(&store, &job).await?);
                rows.push(Row { trouble, ..Row::from(job) });
            }
            Ok(rows)
        })
    }

    /// One question to Slurm, which knows also what waits in the queue; and, only where
    /// clusters of one's own run, one to the site's store.
    fn queued(&self, app: &App, etcd: Option<&Etcd>) -> Result<Vec<Row>> {
        let user = &app.env.user;
        let whose = match (&self.user, self.all) {
            (Some(user), _) => Whose::User(user),
            (None, true) => Whose::Everybodys,
            (None, false) => Whose::User(user),
        };
        app.block_on(async {
            let mut rows = Vec::new();
            let mut own = Vec::new();
            for job in queue::list(whose).await? {
                let runs = job.user == *user && !job.waits() && !job.ends();
                if let Some(row) = Row::of_queue(job) {
                    own.extend(runs.then_some(rows.len()));
                    rows.push(row);
                }
            }
            if let (false, Some(person)) = (own.is_empty(), Person::new(app, etcd)?) {
                let told = timeout(PATIENCE, tell(&person, user, &mut rows, &own)).await;
                match told {
                    Ok(Ok(())) => {}
                    // Whose first cluster has just begun is not known there yet.
                    Ok(Err(error)) => tracing::info!("{}", error.report()),
                    Err(_) => app.out.warn("the site's store is slow: TROUBLE is not known"),
                }
            }
            Ok(rows)
        })
    }
}

/// Asks the site's store what is wrong with the user's `own` clusters among these.
async fn tell(person: &Person, user: &str, rows: &mut [Row], own: &[usize]) -> Result<()> {
    let store = person.log_in().await?;
    for at in own {
        let owner = Owner { manager: Manager::Slurm, job: rows[*at].id };
        rows[*at].trouble = jobs::trouble_at_site(&*store, user, owner).await?;
    }
    Ok(())
}
