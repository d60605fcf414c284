//! How commands name a running cluster, and get hold of it.

use std::sync::Arc;

use clap::Args;

use super::App;
use super::site::{INTRODUCTION, Person};
use crate::batch::slurm::Queued;
use crate::config::{BatchManager, load_batch};
use crate::error::{Error, Kind, Result};
use crate::model::job::{JobRecord, VmStatus};
use crate::model::owner::Manager;
use crate::model::vmset::VmSet;
use crate::ops::cleanup::{forget, sweep, sweep_dirs, sweep_host};
use crate::ops::elsewhere;
use crate::ops::jobs::{self, Remains, Selector};
use crate::ops::queue::{self, Whose};
use crate::store::embedded;
use crate::store::{Store, get_json, keys};

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

    /// Where jobs are known, and the running cluster that is meant.
    ///
    /// # Errors
    /// Also when it is not there yet: then the error says why not.
    pub async fn find(&self, app: &App) -> Result<(Jobs, JobRecord)> {
        let error = match self.find_running(app).await {
            Err(error) if error.kind() == Kind::NotFound => error,
            found => return found,
        };
        match self.queued(app).await {
            Ok(Some(job)) => {
                let id = job.job;
                Err(Error::not_found(job.why_not_yet()).help(format!(
                    "wait until its VMs run: `pavo wait -j {id}`; or give it up: `pavo cancel {id}`"
                )))
            }
            // A second question is no second trouble.
            Ok(None) | Err(_) => Err(error),
        }
    }

    /// The same, and nothing about those that wait.
    pub async fn find_running(&self, app: &App) -> Result<(Jobs, JobRecord)> {
        if let Some(id) = &self.jobid {
            jobs::parse_id(id)?;
        }
        let known = Jobs::open(app).await?;
        let job = jobs::choose(known.running(app).await?, &self.selector(app))?;
        Ok((known, job))
    }

    /// Whether no cluster is meant at all, at a site where commands may run without one: none
    /// is named, runs or waits.
    pub async fn is_outside(&self, app: &App) -> Result<bool> {
        let Selector { id, name, here } = self.selector(app);
        let named = id.is_some() || name.is_some() || here.is_some();
        let manager = load_batch(&super::config::sources(app))?.manager;
        Ok(!named && manager == BatchManager::Slurm && self.all_queued(app).await?.is_empty())
    }

    /// The one job in Slurm's queue that is meant, and that may still become a cluster.
    pub async fn queued(&self, app: &App) -> Result<Option<Queued>> {
        let mut jobs = self.all_queued(app).await?;
        Ok(if jobs.len() == 1 { jobs.pop() } else { None })
    }

    /// The person's jobs in Slurm's queue that may be meant, and that may still become
    /// clusters.
    pub async fn all_queued(&self, app: &App) -> Result<Vec<Queued>> {
        if load_batch(&super::config::sources(app))?.manager != BatchManager::Slurm {
            return Ok(Vec::new());
        }
        let selector = self.selector(app);
        let is_meant = |job: &Queued| match (&selector.id, &selector.name, &selector.here) {
            (Some(id), ..) | (None, None, Some(id)) => {
                job.job.to_string() == id.trim_start_matches('l')
            }
            (None, Some(name), _) => job.name == *name,
            (None, None, None) => true,
        };
        let mut jobs = queue::list(Whose::User(&app.env.user)).await?;
        jobs.retain(|job| job.cluster.is_some() && !job.ends() && is_meant(job));
        Ok(jobs)
    }
}

/// The ranks that a set means in this cluster.
pub fn ranks(set: &VmSet, job: &JobRecord) -> Result<Vec<u32>> {
    set.select(u32::try_from(job.vms.len()).unwrap_or(u32::MAX))
}

/// As [`ranks`], where only one VM may be meant.
pub fn one_vm(set: &VmSet, job: &JobRecord) -> Result<u32> {
    match ranks(set, job)?.as_slice() {
        [rank] => Ok(*rank),
        _ => Err(Error::usage(format!("`{set}` is not one VM")).help("name one, such as `vm0`")),
    }
}

/// Where the user's jobs are known.
#[derive(Debug)]
pub struct Jobs {
    /// None where no job has ever been.
    store: Option<Arc<dyn Store>>,
    manager: Manager,
}

impl Jobs {
    /// This machine's, or the site's.
    pub async fn open(app: &App) -> Result<Self> {
        let batch = load_batch(&super::config::sources(app))?;
        match batch.manager {
            BatchManager::Local => {
                let store = embedded::open_existing(&app.env.state_dir()).await?;
                let store = store.map(|store| Arc::new(store) as Arc<dyn Store>);
                Ok(Self { store, manager: Manager::Local })
            }
            BatchManager::Slurm => {
                let store = match Person::new(app, batch.etcd.as_ref())? {
                    Some(person) => log_in(app, &person).await?,
                    None => None,
                };
                Ok(Self { store, manager: Manager::Slurm })
            }
        }
    }

    pub fn store(&self) -> Option<&dyn Store> {
        self.store.as_deref()
    }

    /// The same, for who goes on beside us.
    pub fn shared_store(&self) -> Option<Arc<dyn Store>> {
        self.store.clone()
    }

    pub fn manager(&self) -> Manager {
        self.manager
    }

    /// The record of a cluster that was running, if it still is. Asks no scheduler: it may be asked often.
    pub async fn current(&self, app: &App, job: &JobRecord) -> Result<Option<JobRecord>> {
        let Some(store) = self.store() else { return Ok(None) };
        match self.manager {
            Manager::Local => {
                let alive = running(app, store).await?;
                Ok(alive.into_iter().find(|other| other.owner == job.owner))
            }
            Manager::Slurm | Manager::Node => {
                let record = keys::job_record(&job.user, job.owner);
                Ok(get_json(store, &record).await?.map(|(record, _)| record))
            }
        }
    }

    /// The states of a cluster's VMs, by rank.
    pub async fn states(&self, job: &JobRecord) -> Result<Vec<Option<VmStatus>>> {
        match self.store() {
            Some(store) => jobs::states(store, job).await,
            None => Ok(vec![None; job.vms.len()]),
        }
    }

    /// The user's running clusters; what dead ones left is removed first.
    pub async fn running(&self, app: &App) -> Result<Vec<JobRecord>> {
        let Some(store) = self.store() else { return Ok(Vec::new()) };
        match self.manager {
            Manager::Local => running(app, store).await,
            Manager::Slurm | Manager::Node => running_at_site(app, store).await,
        }
    }
}

/// The site's store; `None` for who has no cluster and is not let in: the site knows a person
/// from their first cluster on.
async fn log_in(app: &App, person: &Person) -> Result<Option<Arc<dyn Store>>> {
    let refused = match person.log_in().await {
        Ok(store) => return Ok(Some(store)),
        Err(error) => error,
    };
    let begun = |job: &Queued| {
        let elapsed = crate::batch::parse_elapsed(&job.elapsed).unwrap_or(0);
        job.cluster.is_some() && elapsed > INTRODUCTION.as_secs()
    };
    match queue::list(Whose::User(&app.env.user)).await {
        Ok(jobs) if !jobs.iter().any(begun) => Ok(None),
        _ => Err(refused),
    }
}

/// The clusters that run on this machine; what dead ones left is removed first.
pub async fn running(app: &App, store: &dyn Store) -> Result<Vec<JobRecord>> {
    let alive = sweep(store, &app.env.user).await?;
    if app.env.uid == 0 {
        sweep_host().await?;
    }
    Ok(alive)
}

/// The clusters whose jobs run, as Slurm says; of others what is left is removed.
async fn running_at_site(app: &App, store: &dyn Store) -> Result<Vec<JobRecord>> {
    let stored = jobs::stored(store, &app.env.user).await?;
    let mut alive = Vec::new();
    if !stored.is_empty() {
        let queue = queue::list(Whose::User(&app.env.user)).await?;
        for job in stored {
            let Remains { owner, started, .. } = job.remains;
            let is_it = |queued: &Queued| queued.job == owner.job && queued.is_of_run(started);
            if queue.iter().any(is_it) {
                alive.push(job.record()?);
            } else {
                forget(store, &app.env.user, owner).await?;
            }
        }
    }
    elsewhere::tidy(&app.env.home, &alive);
    sweep_dirs(&app.env.tmp.join("job"));
    Ok(alive)
}
