//! Slurm: what its commands are told, and what a step knows of itself.
//!
//! Nothing here runs a program or asks the controller: arguments are built, and the
//! environment that Slurm gives a job or a task is read. A task's host is
//! `SLURMD_NODENAME`, whatever the kernel says the host's name is.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};

/// What a job is to be, as its user put it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobWish {
    pub vms: u32,
    /// The cluster's definition, for `ps`.
    pub cluster: String,
    pub name: Option<String>,
    /// Cores of each VM.
    pub cores: Option<u32>,
    /// As it was written: `--mem` means the same to Slurm.
    pub memory: Option<String>,
    pub time: Option<String>,
    /// Licences of the networks, `ib_pkey:1`.
    pub licences: Vec<String>,
    /// From batch.yaml.
    pub site: Vec<String>,
    /// Options that are not ours.
    pub passed: Vec<String>,
}

impl JobWish {
    /// The options of salloc or sbatch. A user's own come last, and so win.
    pub fn options(&self) -> Vec<String> {
        let mut options = vec![format!("--ntasks={}", self.vms)];
        // Neighbouring ranks on one host: addresses and tunnels follow hosts.
        options.push("--distribution=block".into());
        // A host that is lost takes its own VMs with it, not the others'.
        options.push("--no-kill".into());
        options.push(format!("--comment={COMMENT}{}", self.cluster));
        let mut add = |name: &str, value: Option<String>| {
            options.extend(value.map(|value| format!("--{name}={value}")));
        };
        add("job-name", self.name.clone());
        add("cpus-per-task", self.cores.map(|cores| cores.to_string()));
        add("mem", self.memory.clone());
        add("time", self.time.clone());
        add("licenses", (!self.licences.is_empty()).then(|| self.licences.join(",")));
        options.extend(self.site.iter().cloned());
        options.extend(self.passed.iter().cloned());
        options
    }
}

/// The arguments of the srun that carries a cluster: one task for each VM.
///
/// It reads the bootstrap on standard input and hands it to all tasks, and ends when the
/// last of them does: one VM's end is not the others'.
///
/// Tasks that are `led` leave it to the launcher when they end.
pub fn srun_arguments(
    sets: &[(String, u32)],
    cores: u32,
    program: &Path,
    led: bool,
) -> Vec<String> {
    let vms: u32 = sets.iter().map(|(_, count)| count).sum();
    let sets: Vec<String> = sets.iter().map(|(set, count)| format!("{set}:{count}")).collect();
    let mut arguments: Vec<String> = vec![
        "--quiet".into(),
        format!("--ntasks={vms}"),
        // Since 22.05 a step does not inherit it.
        format!("--cpus-per-task={cores}"),
        "--distribution=block".into(),
        "--kill-on-bad-exit=0".into(),
        "--no-kill".into(),
        "--wait=0".into(),
        "--input=all".into(),
        "--mpi=none".into(),
        // Also where the job was submitted with `--export=NONE`: the person's sealed secret
        // travels in it.
        "--export=ALL".into(),
        format!("--vm={}", sets.join(",")),
    ];
    arguments.extend([program.display().to_string(), "internal".into(), "task".into()]);
    arguments.extend(led.then(|| "--led".into()));
    arguments
}

/// Resource sets of VMs in the order of their ranks, and how many follow each other.
pub fn runs<'a>(sets: impl Iterator<Item = &'a str>) -> Vec<(String, u32)> {
    let mut runs: Vec<(String, u32)> = Vec::new();
    for set in sets {
        match runs.last_mut() {
            Some((last, count)) if last == set => *count += 1,
            _ => runs.push((set.to_owned(), 1)),
        }
    }
    runs
}

/// The environment that Slurm gave this process.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Takes the variables of Slurm's out of an environment.
    pub fn new(variables: impl Iterator<Item = (String, String)>) -> Self {
        Self(variables.filter(|(name, _)| name.starts_with("SLURM")).collect())
    }

    /// The job we are in, if we are.
    pub fn job(&self) -> Option<u32> {
        self.get("SLURM_JOB_ID")?.parse().ok()
    }

    pub fn job_name(&self) -> Option<&str> {
        self.get("SLURM_JOB_NAME")
    }

    /// How often the job has been started anew.
    pub fn restarts(&self) -> u32 {
        self.get("SLURM_RESTART_COUNT").and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    /// The hosts of the job, as Slurm writes them.
    pub fn hosts(&self) -> Option<&str> {
        self.get("SLURM_JOB_NODELIST")
    }

    /// Cores of each task of the job; 1 where none were asked for.
    pub fn cores(&self) -> u32 {
        self.get("SLURM_CPUS_PER_TASK").and_then(|cores| cores.parse().ok()).unwrap_or(1)
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// What a task of a step knows of itself.
    ///
    /// # Errors
    /// When this is no task of a step.
    pub fn task(&self) -> Result<Task> {
        let number = |name: &str| {
            self.get(name).and_then(|value| value.parse().ok()).ok_or_else(|| {
                Error::usage(format!("this is no task of a Slurm step: no `{name}`"))
                    .help("`pavo alloc` and `pavo batch` start what this command is for")
            })
        };
        Ok(Task {
            job: number("SLURM_JOB_ID")?,
            step: number("SLURM_STEP_ID")?,
            rank: number("SLURM_PROCID")?,
            node_id: number("SLURM_NODEID")?,
            node: self.get("SLURMD_NODENAME").unwrap_or_default().to_owned(),
            cores: self.cores(),
            local_tasks: self.local_tasks()?,
            memory_mib: self.memory()?,
        })
    }

    /// What Slurm grants each task on this host, where it says so: MiB.
    fn memory(&self) -> Result<Option<u64>> {
        let number = |name: &str| self.get(name).and_then(|value| value.parse::<u64>().ok());
        let per_cpu = number("SLURM_MEM_PER_CPU").map(|mib| mib * u64::from(self.cores()));
        let per_node = match number("SLURM_MEM_PER_NODE").filter(|mib| *mib > 0) {
            Some(mib) => Some(mib / u64::from(self.local_tasks()?)),
            None => None,
        };
        Ok(per_cpu.filter(|mib| *mib > 0).or(per_node))
    }

    /// How many tasks of the step are on this host: the entry of `SLURM_NODEID` in
    /// `2(x3),1`.
    fn local_tasks(&self) -> Result<u32> {
        let text =
            self.get("SLURM_STEP_TASKS_PER_NODE").or_else(|| self.get("SLURM_TASKS_PER_NODE"));
        let node = self.get("SLURM_NODEID").and_then(|node| node.parse().ok()).unwrap_or(0);
        let tasks = text.and_then(|text| tasks_of_node(text, node));
        tasks
            .filter(|tasks| *tasks > 0)
            .ok_or_else(|| Error::system("Slurm does not tell how many tasks this host has"))
    }
}

/// One task of a step: the place of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    pub job: u32,
    pub step: u32,
    pub rank: u32,
    pub node_id: u32,
    /// Slurm's name of the host.
    pub node: String,
    pub cores: u32,
    /// Tasks of the step on this host, this one among them.
    pub local_tasks: u32,
    /// What was asked for for each task, if anything was.
    pub memory_mib: Option<u64>,
}

fn tasks_of_node(text: &str, node: u32) -> Option<u32> {
    let mut first = 0;
    for item in text.split(',') {
        let (tasks, times) = match item.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (item, 1),
        };
        if node < first + times {
            return tasks.parse().ok();
        }
        first += times;
    }
    None
}

/// One job of the queue, as [`SQUEUE`] shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queued {
    pub job: u32,
    pub name: String,
    pub user: String,
    /// `RUNNING`, `PENDING`, …
    pub state: String,
    /// Why it waits, or where it runs.
    pub reason: String,
    pub elapsed: String,
    pub time_limit: String,
    /// When it began, or is expected to: seconds since the epoch.
    pub start: Option<u64>,
    /// The cluster, where the job is one of pavo's.
    pub cluster: Option<String>,
}

/// By which a job is known as pavo's: its comment is this and the cluster's definition.
pub const COMMENT: &str = "pavo ";

/// The columns that [`parse_squeue`] reads. One call, filtered by the controller.
pub const SQUEUE: &str = "%A|%u|%T|%M|%l|%S|%R|%k|%j";

/// How Slurm is to write points in time: as seconds since the epoch.
pub const TIME_FORMAT: (&str, &str) = ("SLURM_TIME_FORMAT", "%s");

/// How far the clocks of a site's hosts may be apart, in seconds. A job that is requeued
/// begins two minutes after its end at the earliest.
const CLOCKS: u64 = 60;

impl Queued {
    /// Whether what a launcher wrote when it began at `started` is of this run of the job:
    /// not of an earlier one, nor of an earlier job with the same number.
    pub fn is_of_run(&self, started: u64) -> bool {
        let earlier = self.start.is_some_and(|start| started.saturating_add(CLOCKS) < start);
        !self.waits() && !earlier
    }

    /// Whether it is still to begin.
    pub fn waits(&self) -> bool {
        let waits = ["PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"];
        waits.contains(&self.state.as_str())
    }

    /// Whether nothing of it begins any more.
    pub fn ends(&self) -> bool {
        let lives = ["RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"];
        !self.waits() && !lives.contains(&self.state.as_str())
    }

    /// Why there is no cluster of it yet, as a sentence.
    pub fn why_not_yet(&self) -> String {
        let (job, state) = (self.job, self.state.to_lowercase());
        if self.waits() {
            let reason = self.reason.trim_matches(['(', ')']);
            format!("job {job} waits in Slurm's queue ({state}: {reason})")
        } else {
            format!("job {job} has begun ({state}), and its cluster is not there yet")
        }
    }
}

/// Reads the output of `squeue --noheader --format=`[`SQUEUE`]. What is no line of it is
/// left out.
pub fn parse_squeue(text: &str) -> Vec<Queued> {
    let parse = |line: &str| {
        let mut fields = line.splitn(9, '|').map(|field| field.trim().to_owned());
        let mut next = || fields.next();
        Some(Queued {
            job: next()?.parse().ok()?,
            user: next()?,
            state: next()?,
            elapsed: next()?,
            time_limit: next()?,
            start: next()?.parse().ok(),
            reason: next()?,
            cluster: next()?.strip_prefix(COMMENT).map(str::to_owned),
            name: next()?,
        })
    };
    text.lines().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::new(variables.iter().map(|(name, value)| ((*name).into(), (*value).into())))
    }

    #[test]
    fn a_users_own_options_come_last() {
        let wish = JobWish {
            vms: 4,
            cluster: "tiny:4".into(),
            cores: Some(2),
            memory: Some("0".into()),
            licences: vec!["pkey:1".into()],
            site: vec!["--partition=vm".into()],
            passed: vec!["-p".into(), "big".into()],
            ..JobWish::default()
        };
        assert_eq!(
            wish.options().join(" "),
            "--ntasks=4 --distribution=block --no-kill --comment=pavo tiny:4 --cpus-per-task=2 --mem=0 --licenses=pkey:1 \
             --partition=vm -p big"
        );
    }

    #[test]
    fn sets_are_told_in_runs_of_ranks() {
        let sets = runs(["a", "a", "b", "a"].into_iter());
        assert_eq!(sets, [("a".into(), 2), ("b".into(), 1), ("a".into(), 1)]);
        let arguments = srun_arguments(&sets, 3, Path::new("/usr/bin/pavo"), false);
        assert!(arguments.contains(&"--vm=a:2,b:1,a:1".into()), "{arguments:?}");
        assert!(arguments.contains(&"--ntasks=4".into()), "{arguments:?}");
        assert!(arguments.ends_with(&["/usr/bin/pavo".into(), "internal".into(), "task".into()]));
    }

    #[test]
    fn a_task_knows_its_rank_and_how_many_share_its_host() {
        let task = environment(&[
            ("SLURM_JOB_ID", "42"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "5"),
            ("SLURM_NODEID", "2"),
            ("SLURMD_NODENAME", "n3"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2),1"),
            ("SLURM_CPUS_PER_TASK", "4"),
            ("SLURM_MEM_PER_CPU", "300"),
        ]);
        let task = task.task().unwrap();
        assert_eq!((task.rank, task.local_tasks, task.cores), (5, 1, 4));
        assert_eq!(task.memory_mib, Some(1200));
        assert_eq!(tasks_of_node("2(x2),1", 1), Some(2));
        assert_eq!(tasks_of_node("2(x2),1", 3), None);
        assert!(environment(&[("SLURM_JOB_ID", "42")]).task().is_err());
    }

    #[test]
    fn the_queue_is_read_line_by_line_and_names_may_hold_anything() {
        let text =
            "42|alice|RUNNING|1:02|5:00|900|n[1-2]|pavo tiny:2|a|b \nslurm_load_jobs error\n";
        let jobs = parse_squeue(text);
        assert_eq!(jobs.len(), 1);
        assert_eq!((jobs[0].name.as_str(), jobs[0].reason.as_str()), ("a|b", "n[1-2]"));
        assert_eq!(jobs[0].cluster.as_deref(), Some("tiny:2"));
    }

    #[test]
    fn a_record_of_an_earlier_run_is_told_from_one_of_this() {
        let line = "42|alice|RUNNING|1:02|5:00|1000|n1|pavo tiny:2|a";
        let jobs = |state: &str| parse_squeue(&line.replace("RUNNING", state)).remove(0);
        for (state, started, expected) in [
            ("RUNNING", 1001, true),
            ("SUSPENDED", 1001, true),
            ("COMPLETING", 1001, true),
            // The clock of its host is behind.
            ("RUNNING", 941, true),
            ("RUNNING", 939, false),
            ("PENDING", 1001, false),
            ("REQUEUED", 1001, false),
        ] {
            assert_eq!(jobs(state).is_of_run(started), expected, "{state} {started}");
        }
    }
}
