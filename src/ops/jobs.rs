//! Finding running clusters: all of a user's, or the one that is meant.

use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{Context, Error, Result};
use crate::model::job::{JobRecord, ProcessId, VmState, VmStatus};
use crate::model::owner::Owner;
use crate::model::vmset::fold;
use crate::store::keys::{self, JobKey};
use crate::store::{Entry, Store, get_json, list_all};

/// How a command names a job.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    pub id: Option<String>,
    pub name: Option<String>,
    /// The job whose shell we are in (`$PAVO_JOB_ID`).
    pub here: Option<String>,
}

/// A stored job, with what it takes to remove it: that is the same in every version.
#[derive(Debug)]
pub struct Stored {
    pub remains: Remains,
    entry: Entry,
}

/// What there is to remove of a job whose launcher is gone.
#[derive(Debug, Deserialize)]
pub struct Remains {
    pub owner: Owner,
    pub launcher: ProcessId,
    pub dir: PathBuf,
    #[serde(default)]
    pub started: u64,
}

/// Every stored job of a user, whether it lives or not, by id.
pub async fn stored(store: &dyn Store, user: &str) -> Result<Vec<Stored>> {
    let (entries, _) = list_all(store, &keys::jobs(user)).await?;
    let is_record =
        |entry: &Entry| matches!(keys::parse_job_key(&entry.key), Some((_, JobKey::Record)));
    let read = |entry: Entry| Ok(Stored { remains: entry.json()?, entry });
    let mut found: Vec<Stored> =
        entries.into_iter().filter(is_record).map(read).collect::<Result<_>>()?;
    found.sort_by_key(|job| job.remains.owner);
    Ok(found)
}

impl Stored {
    /// The whole record.
    ///
    /// # Errors
    /// When another version of pavo wrote it.
    pub fn record(&self) -> Result<JobRecord> {
        let entry = &self.entry;
        let record: serde_json::Value = entry.json()?;
        let version = record.get("version").and_then(serde_json::Value::as_u64);
        let doing = || format!("reading the stored `{}`", entry.key);
        if version != Some(JobRecord::VERSION.into()) {
            return Err(Error::system("it was written by another version of pavo")
                .help("use the version that started the job, or end the job"))
            .while_doing(doing);
        }
        serde_json::from_value(record).while_doing(doing)
    }
}

/// The one job that is meant: by id, by name, by the shell we are in, or because there
/// is only one.
pub fn choose(jobs: Vec<JobRecord>, selector: &Selector) -> Result<JobRecord> {
    if let Some(id) = &selector.id {
        return by_id(jobs, id);
    }
    if let Some(name) = &selector.name {
        return by_name(jobs, name);
    }
    if let Some(here) = &selector.here {
        return by_id(jobs, here);
    }
    let mut jobs = jobs;
    match jobs.len() {
        1 => Ok(jobs.remove(0)),
        0 => Err(Error::not_found("you have no running cluster")
            .help("start one: `pavo alloc TEMPLATE`")),
        _ => Err(Error::usage("several clusters are running: which one is meant?")
            .help(format!("add `-j JOBID`; there are {}", listed(&jobs)))),
    }
}

fn by_id(jobs: Vec<JobRecord>, id: &str) -> Result<JobRecord> {
    let wanted = id.trim_start_matches('l');
    let list = listed(&jobs);
    let is_it = |job: &JobRecord| job.owner.job.to_string() == wanted;
    jobs.into_iter().find(is_it).ok_or_else(|| {
        let error = Error::not_found(format!("you have no running cluster with the job id {id}"));
        if list.is_empty() {
            error.help("you have none at all; start one: `pavo alloc TEMPLATE`")
        } else {
            error.help(format!("there are {list}"))
        }
    })
}

fn by_name(jobs: Vec<JobRecord>, name: &str) -> Result<JobRecord> {
    let mut found: Vec<JobRecord> = jobs.into_iter().filter(|job| job.name == name).collect();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(Error::not_found(format!("Unable to find job: no valid match for name {name}"))
            .help("`pavo ps` lists your clusters")),
        _ => Err(Error::usage(format!("Unable to find job: name {name} is ambiguous"))
            .help(format!("add `-j JOBID`; there are {}", listed(&found)))),
    }
}

fn listed(jobs: &[JobRecord]) -> String {
    let one = |job: &JobRecord| format!("{} (`{}`)", job.owner.job, job.name);
    jobs.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The states of a job's VMs, by rank; `None` where nothing was reported yet.
pub async fn states(store: &dyn Store, job: &JobRecord) -> Result<Vec<Option<VmStatus>>> {
    let mut states = vec![None; job.vms.len()];
    if let Some((all, _)) =
        get_json::<Vec<VmStatus>>(store, &keys::vm_states(&job.user, job.owner)).await?
    {
        states.iter_mut().zip(all).for_each(|(state, status)| *state = Some(status));
        return Ok(states);
    }
    let (entries, _) = list_all(store, &keys::vm_statuses(&job.user, job.owner)).await?;
    for entry in entries {
        if let Some((_, JobKey::VmStatus { rank })) = keys::parse_job_key(&entry.key) {
            if let Some(state) = states.get_mut(rank as usize) {
                *state = Some(entry.json()?);
            }
        }
    }
    Ok(states)
}

/// What is wrong with VMs of a job at a site: `vm[0-1]: …`. Only their states are read.
pub async fn trouble_at_site(store: &dyn Store, user: &str, job: Owner) -> Result<Option<String>> {
    let states = get_json::<Vec<VmStatus>>(store, &keys::vm_states(user, job)).await?;
    Ok(states.and_then(|(states, _)| trouble(states.into_iter().map(Some).collect())))
}

/// What is said of VMs that run or have failed; of others it is no trouble.
pub fn trouble(states: Vec<Option<VmStatus>>) -> Option<String> {
    let tells = |status: &VmStatus| {
        let state = [VmState::Running, VmState::Agent, VmState::Ssh, VmState::Failed]
            .contains(&status.state);
        state && !status.detail.is_empty()
    };
    let mut said: Vec<(String, Vec<u32>)> = Vec::new();
    for (rank, status) in (0..).zip(states) {
        let Some(status) = status.filter(tells) else { continue };
        match said.iter_mut().find(|(detail, _)| *detail == status.detail) {
            Some((_, ranks)) => ranks.push(rank),
            None => said.push((status.detail, vec![rank])),
        }
    }
    let one = |(detail, ranks): &(String, Vec<u32>)| format!("{}: {detail}", fold(ranks));
    (!said.is_empty()).then(|| said.iter().map(one).collect::<Vec<_>>().join("; "))
}

/// Parses a job id as users write it.
pub fn parse_id(text: &str) -> Result<Owner> {
    let digits = text.strip_prefix('l').unwrap_or(text);
    format!("l{digits}").parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: u32, name: &str) -> JobRecord {
        JobRecord {
            version: JobRecord::VERSION,
            owner: Owner::local(id),
            name: name.into(),
            user: "alice".into(),
            definition: "tiny:1".into(),
            started: 0,
            time_limit: None,
            launcher: ProcessId { pid: 1, start_time: 1 },
            dir: "/tmp/x".into(),
            host: "here".into(),
            vms: Vec::new(),
        }
    }

    fn chosen(selector: Selector) -> Result<u32> {
        let jobs = vec![job(3, "a"), job(4, "b"), job(5, "b")];
        choose(jobs, &selector).map(|job| job.owner.job)
    }

    #[test]
    fn what_several_vms_have_in_common_is_said_once() {
        let status = |state, detail: &str| VmStatus { state, since: 0, detail: detail.into() };
        let states = [
            status(VmState::Running, "no guard"),
            status(VmState::Ssh, ""),
            status(VmState::Paused, "the job is suspended"),
            status(VmState::Failed, "no room"),
            status(VmState::Ssh, "no guard"),
        ];
        let said = trouble(states.map(Some).into());
        assert_eq!(said.as_deref(), Some("vm[0,4]: no guard; vm3: no room"));
        assert_eq!(trouble(vec![None]), None);
    }

    #[test]
    fn an_id_goes_before_a_name_and_a_name_before_the_shell_we_are_in() {
        let some = |text: &str| Some(text.to_owned());
        let all = Selector { id: some("3"), name: some("b"), here: some("4") };
        assert_eq!(chosen(all.clone()).unwrap(), 3);
        assert_eq!(chosen(Selector { id: None, name: some("a"), ..all.clone() }).unwrap(), 3);
        assert_eq!(chosen(Selector { id: None, name: None, ..all }).unwrap(), 4);
    }

    #[test]
    fn doubt_is_an_error_that_names_the_choices() {
        let name = Some("b".to_owned());
        let error = chosen(Selector { name, ..Selector::default() }).unwrap_err();
        assert_eq!(error.to_string(), "Unable to find job: name b is ambiguous");
        let report = chosen(Selector::default()).unwrap_err().report();
        assert!(report.contains("3 (`a`), 4 (`b`), 5 (`b`)"), "{report}");
        let only = choose(vec![job(7, "x")], &Selector::default()).unwrap();
        assert_eq!(only.owner.job, 7);
    }
}
