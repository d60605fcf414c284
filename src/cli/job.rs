//! How commands name a running cluster, and get hold of it.

use clap::Args;

use super::App;
use crate::error::{Error, Result};
use crate::model::job::JobRecord;
use crate::ops::cleanup::{sweep, sweep_host};
use crate::ops::jobs::{self, Selector};
use crate::store::Store;
use crate::store::embedded::{self, Embedded};

/// `-j` and `-J`, for every command on one cluster.
#[derive(Clone, Debug, Default, Args)]
pub struct JobSelector {
    /// The cluster with this job id
    #[arg(short = 'j', long = "jobid", value_name = "JOBID")]
    pub jobid: Option<String>,

    /// The cluster with this name
    #[arg(short = 'J', long = "jobname", value_name = "NAME")]
    pub jobname: Option<String>,
}

impl JobSelector {
    pub fn selector(&self, app: &App) -> Selector {
        Selector {
            id: self.jobid.clone(),
            name: self.jobname.clone(),
            here: app.env.job_id.clone(),
        }
    }

    /// The store and the running cluster that is meant.
    pub async fn find(&self, app: &App) -> Result<(Embedded, JobRecord)> {
        if let Some(id) = &self.jobid {
            jobs::parse_id(id)?;
        }
        let selector = self.selector(app);
        match embedded::open_existing(&app.env.state_dir()).await? {
            Some(store) => {
                let job = jobs::choose(running(app, &store).await?, &selector)?;
                Ok((store, job))
            }
            None => Err(jobs::choose(Vec::new(), &selector)
                .err()
                .unwrap_or_else(|| Error::bug("a job without a store"))),
        }
    }
}

/// The user's running clusters; what dead ones left is removed first.
pub async fn running(app: &App, store: &dyn Store) -> Result<Vec<JobRecord>> {
    let alive = sweep(store, &app.env.user).await?;
    if app.env.uid == 0 {
        sweep_host().await?;
    }
    Ok(alive)
}
