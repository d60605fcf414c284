//! What srun says on its standard error while it carries a cluster.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::error::{Error, Kind};
use crate::model::cluster::MAX_VMS;
use crate::model::vmset::fold;

/// The most lines that are kept.
const MAX_LINES: usize = 200;
/// How a host's report begins on srun's standard error (see slurm-plugin).
const REPORT: &str = "pavo: ";
/// How Slurm puts it that a host, or munge there, does not believe it.
const DISTRUST: [&str; 2] =
    [": Zero Bytes were transmitted or received", ": Job credential expired"];
/// How long the rest may take of what has begun to be said.
pub const REPORT_TIME: Duration = Duration::from_millis(300);

/// srun's complaints, and what follows from them.
#[derive(Debug, Default)]
pub struct Complaints {
    lines: Vec<String>,
    ended: Option<Ended>,
    hearing: Option<Hearing>,
}

/// What ends the cluster, and may not be all said yet.
#[derive(Debug)]
struct Hearing {
    end: Instant,
    /// The lines of a host's report.
    report: Vec<String>,
    tasks: Option<TasksEnded>,
}

impl Default for Hearing {
    fn default() -> Self {
        Self { end: Instant::now() + REPORT_TIME, report: Vec::new(), tasks: None }
    }
}

/// Why Slurm ends a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Cancelled,
    TimeLimit,
    Preempted,
    Requeued,
    HostFailed,
}

impl Ended {
    /// Reads `slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T12:28:07 DUE
    /// TO TIME LIMIT ***`.
    fn read(line: &str) -> Option<Self> {
        let (_, said) = line.split_once(" error: *** ")?;
        let ours = said.starts_with("STEP ") || said.starts_with("JOB ");
        let (_, why) = said.split_once(" CANCELLED AT ").filter(|_| ours)?;
        let is_due_to = |reason: &str| why.contains(&format!(" DUE TO {reason}"));
        Some(match () {
            () if is_due_to("TIME LIMIT") => Self::TimeLimit,
            () if is_due_to("PREEMPTION") => Self::Preempted,
            () if is_due_to("JOB REQUEUE") => Self::Requeued,
            () if is_due_to("NODE FAILURE") => Self::HostFailed,
            () => Self::Cancelled,
        })
    }

    /// As what the user is told in the end.
    pub fn error(self) -> Error {
        let (what, help) = match self {
            Self::Cancelled => return Error::new(Kind::Interrupted, "the job was cancelled"),
            Self::TimeLimit => ("the job's time limit was reached", "ask for more with `-t`"),
            Self::Preempted => (
                "the job had to make room for another",
                "`scontrol show partition` says where it has not",
            ),
            Self::Requeued => {
                ("the job was put back into the queue", "`pavo ps` shows when it starts")
            }
            Self::HostFailed => ("Slurm has lost a host of the job", "see which: `sinfo -R`"),
        };
        Error::new(Kind::Interrupted, what).help(help)
    }
}

/// Tasks that have ended, as srun says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TasksEnded {
    /// A list of Slurm's.
    pub hosts: String,
    pub ranks: BTreeSet<u32>,
    pub how: String,
}

impl TasksEnded {
    /// Reads `srun: error: n[1-2]: tasks 0,2-3: Exited with exit code 5`.
    pub fn read(line: &str) -> Option<Self> {
        let (hosts, rest) = line.strip_prefix("srun: error: ")?.split_once(": task")?;
        let (ranks, how) = rest.strip_prefix('s').unwrap_or(rest).trim_start().split_once(": ")?;
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            (last.checked_sub(first)? < MAX_VMS).then_some(first..=last)
        };
        let ranks = ranks.split(',').map(range).collect::<Option<Vec<_>>>()?;
        let ranks = ranks.into_iter().flatten().collect();
        Some(Self { hosts: hosts.to_owned(), ranks, how: how.to_owned() })
    }

    /// Why these VMs of theirs never began; `words` are what the tasks may have said.
    pub fn error(&self, ranks: &[u32], words: String) -> Error {
        let (vms, hosts) = (fold(ranks), &self.hosts);
        let what = match ranks.len() {
            1 => format!("host {hosts}: the process of {vms} has ended: {}", self.how),
            _ => format!("hosts {hosts}: the processes of {vms} have ended: {}", self.how),
        };
        match words.is_empty() {
            true => Error::system(what).help("slurmd's log there, or `dmesg`, says why"),
            false => Error::system(what).because(Error::system(words)),
        }
    }
}

impl Complaints {
    /// Takes a line of srun's. A host's report ends the cluster, and so does the end of a
    /// task that has not `met` the launcher.
    pub fn hear(&mut self, line: &str, met: &BTreeSet<u32>) {
        self.ended = self.ended.or_else(|| Ended::read(line));
        if self.lines.len() < MAX_LINES {
            self.lines.push(line.to_owned());
        }
        if let Some(report) = line.strip_prefix(REPORT) {
            self.hearing.get_or_insert_default().report.push(report.to_owned());
        } else if let Some(tasks) = TasksEnded::read(line).filter(|t| !t.ranks.is_subset(met)) {
            self.hearing.get_or_insert_default().tasks.get_or_insert(tasks);
        } else if let (Some(hearing), true) = (&mut self.hearing, is_own(line)) {
            if !hearing.report.is_empty() {
                hearing.report.push(line.to_owned());
            }
        }
    }

    /// When it is time for a [`verdict`](Self::verdict); pending while there is no reason.
    pub async fn due(&self) {
        match &self.hearing {
            Some(hearing) => sleep_until(hearing.end).await,
            None => std::future::pending().await,
        }
    }

    /// What was heard, as an error.
    pub fn verdict(&mut self, met: &BTreeSet<u32>) -> Option<Error> {
        let Hearing { report, tasks, .. } = self.hearing.take()?;
        if !report.is_empty() {
            let hosts = without_echoes(&report);
            let what = match missed(&hosts) {
                Some(missed) => missed,
                None => "a host could not be set up".into(),
            };
            let report = Error::system(in_short(hosts).join("\n"));
            return Some(Error::system(what).because(report));
        }
        if let Some(why) = self.ended {
            return Some(why.error());
        }
        let tasks = tasks?;
        let lost: Vec<u32> = tasks.ranks.difference(met).copied().collect();
        Some(tasks.error(&lost, self.words()))
    }

    /// Why the task of this rank has ended without a report, as far as srun has said it.
    pub fn end_of(&mut self, rank: u32) -> Option<Error> {
        let mut ended = self.lines.iter().filter_map(|line| TasksEnded::read(line));
        let tasks = ended.find(|tasks| tasks.ranks.contains(&rank))?;
        let words = self.words();
        // Not the next one's, too.
        self.lines.retain(|line| !is_own(line));
        Some(tasks.error(&[rank], words))
    }

    /// What tasks have said.
    fn words(&self) -> String {
        let words = self.lines.iter().map(String::as_str).filter(|line| is_own(line));
        words.collect::<Vec<_>>().join("\n")
    }

    /// Why Slurm ends the step, if it has said so.
    pub fn ended(&self) -> Option<Ended> {
        self.ended
    }

    /// The error of an srun that has ended like this, although VMs had not.
    pub fn error(&self, status: std::process::ExitStatus) -> Error {
        if let Some(ended) = self.ended {
            return ended.error();
        }
        let error = Error::system(format!("the step of the VMs has ended ({status})"));
        if self.lines.is_empty() {
            return error.help("was the job cancelled, or its time up? `scontrol show job`");
        }
        let said = Error::system(self.lines.join("\n"));
        let distrusts = |line: &String| DISTRUST.iter().any(|words| line.ends_with(words));
        match self.lines.iter().any(distrusts) {
            true => error.because(said.help(
                "a host refuses others if its clock is off by minutes, or its munge key is \
                 another: `pavo doctor` there",
            )),
            false => error.because(said),
        }
    }
}

/// A host, and the lines of its report.
type Said<'a> = (&'a str, Vec<&'a str>);

/// The lines of hosts' reports, host after host, without those of hosts that only broke off
/// because of another (see `setup::fabric`): on a hundred hosts these would bury the cause.
/// Those that have only waited for others come last.
fn without_echoes(lines: &[String]) -> Vec<Said<'_>> {
    let mut hosts: Vec<Said<'_>> = Vec::new();
    for line in lines {
        let name = line.strip_prefix("host ").and_then(|rest| rest.split_once(": "));
        let name = name.map_or("", |(name, _)| name);
        match hosts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, said)) => said.push(line),
            None => hosts.push((name, vec![line])),
        }
    }
    let mut causes: BTreeSet<&str> =
        hosts.iter().filter(|host| echo(host).is_none()).map(|(name, _)| *name).collect();
    // Where the cause itself has not said anything, the first that was told.
    hosts.retain(|host| echo(host).is_none_or(|cause| causes.insert(cause)));
    let told: BTreeSet<&str> = hosts.iter().map(|(name, _)| *name).collect();
    let is_told = |host: &Said<'_>| {
        waited_for(host).is_some_and(|names| names.iter().all(|name| told.contains(name)))
    };
    // Two that wait for each other both stay.
    let waits = |name: &str| hosts.iter().any(|host| host.0 == name && waited_for(host).is_some());
    let waits: BTreeSet<&str> = told.iter().copied().filter(|name| waits(name)).collect();
    hosts.retain(|host| {
        let names = waited_for(host).unwrap_or_default();
        !is_told(host) || names.iter().any(|name| waits.contains(name))
    });
    hosts.sort_by_key(|host| waited_for(host).is_some());
    hosts
}

/// Hosts that are named in one line.
const NAMED: usize = 6;

/// Who is to blame where all that hosts say is that they have waited: the hosts that have
/// said nothing.
fn missed(hosts: &[Said<'_>]) -> Option<String> {
    let waits: Option<Vec<Vec<&str>>> = hosts.iter().map(waited_for).collect();
    let mut names: BTreeSet<&str> = waits?.into_iter().flatten().collect();
    names.retain(|name| hosts.iter().all(|(told, _)| told != name));
    let first: Vec<&str> = names.iter().copied().take(NAMED).collect();
    let first = first.join(", ");
    Some(match names.len() {
        0 => return None,
        1 => format!("host {first} was not set up in time"),
        2..=NAMED => format!("hosts {first} were not set up in time"),
        count => format!("hosts {first} and {} more were not set up in time", count - NAMED),
    })
}

/// The lines of these hosts. What many say alike is said once: perhaps they all wait for the
/// same one. Of some the end may not be here yet.
fn in_short(hosts: Vec<Said<'_>>) -> Vec<String> {
    let mut reports: Vec<(Said<'_>, Vec<&str>)> = Vec::new();
    for (name, said) in hosts {
        let text = |(name, said): &Said<'_>| {
            let prefix = format!("host {name}");
            said.iter().map(|line| line.trim_start_matches(&prefix).to_owned()).collect::<Vec<_>>()
        };
        let host = (name, said);
        let new = text(&host);
        let alike = |(known, _): &&mut (Said<'_>, Vec<&str>)| {
            let known = text(known);
            !name.is_empty() && (known.starts_with(&new) || new.starts_with(&known))
        };
        match reports.iter_mut().find(alike) {
            Some((known, others)) if known.1.len() < host.1.len() => {
                others.push(std::mem::replace(known, host).0);
            }
            Some((_, others)) => others.push(name),
            None => reports.push((host, Vec::new())),
        }
    }
    let lines = |((_, said), others): (Said<'_>, Vec<&str>)| {
        let mut lines: Vec<String> = said.into_iter().map(str::to_owned).collect();
        match others[..] {
            [] => {}
            [one] => lines.push(format!("host {one}: the same")),
            _ => lines.push(format!("{} more hosts: the same", others.len())),
        }
        lines
    };
    reports.into_iter().flat_map(lines).collect()
}

/// The host because of which this one broke off.
fn echo<'a>((name, said): &Said<'a>) -> Option<&'a str> {
    let first = said.first()?.strip_prefix("host ")?.strip_prefix(*name)?;
    let cause = first.strip_prefix(": error: host ")?.strip_suffix(" could not be set up")?;
    (cause != *name).then_some(cause)
}

/// The hosts for which this one has only waited.
fn waited_for<'a>((name, said): &Said<'a>) -> Option<Vec<&'a str>> {
    let first = said.first()?.strip_prefix("host ")?.strip_prefix(*name)?;
    let waited = first.strip_prefix(": error: waited ")?;
    let (_, hosts) = waited.split_once(" s in vain for host ")?;
    Some(hosts.split(", ").collect())
}

/// Whether it was said neither by Slurm nor by root's side: by a task.
fn is_own(line: &str) -> bool {
    !["srun:", "slurmstepd", REPORT].iter().any(|other| line.starts_with(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slurm_says_why_it_ends_a_step() {
        let line = "slurmstepd-n1: error: *** STEP 3.0 ON n1 CANCELLED AT 2026-11-21T12:28:07";
        for (rest, expected) in [
            (" ***", Ended::Cancelled),
            (" DUE TO TIME LIMIT ***", Ended::TimeLimit),
            (" DUE TO PREEMPTION ***", Ended::Preempted),
            (" DUE TO JOB REQUEUE ***", Ended::Requeued),
            (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", Ended::HostFailed),
        ] {
            assert_eq!(Ended::read(&format!("{line}{rest}")), Some(expected), "{rest}");
        }
        assert_eq!(Ended::read("srun: error: n1: task 0: Killed"), None);
    }

    #[tokio::test]
    async fn a_report_is_whole_and_comes_before_the_end_of_its_task() {
        let (mut complaints, nobody) = (Complaints::default(), BTreeSet::new());
        for line in [
            "srun: error: n1: task 0: Exited with exit code 1",
            "pavo: host n1: why",
            "pavo: host n1:   help: how",
            "slurmstepd-n1: error: spank: failed",
        ] {
            complaints.hear(line, &nobody);
        }
        complaints.due().await;
        let report = complaints.verdict(&nobody).unwrap().report();
        assert!(report.ends_with("because: host n1: why\n    host n1:   help: how"), "{report}");
        assert!(complaints.verdict(&nobody).is_none());
    }

    #[tokio::test]
    async fn a_host_that_broke_off_because_of_another_says_nothing_new() {
        let (mut complaints, nobody) = (Complaints::default(), BTreeSet::new());
        for line in [
            "pavo: host n3: error: host n1 could not be set up",
            "pavo: host n1: error: no room",
            "pavo: host n4: error: host n1 could not be set up",
            "pavo: host n3:   because: no room",
            "pavo: host n1:   help: make some",
            "pavo: host n4:   because: no room",
            "pavo: host n5: error: host n2 could not be set up",
            "pavo: host n5:   because: no fun",
            "pavo: host n6: error: host n2 could not be set up",
        ] {
            complaints.hear(line, &nobody);
        }
        let report = complaints.verdict(&nobody).unwrap().report();
        let expected = "because: host n1: error: no room\n    host n1:   help: make some\n    \
                        host n5: error: host n2 could not be set up\n    \
                        host n5:   because: no fun\n";
        assert!(report.ends_with(expected.trim_end()), "{report}");
    }

    #[tokio::test]
    async fn what_many_hosts_say_is_said_once() {
        let (mut complaints, nobody) = (Complaints::default(), BTreeSet::new());
        for line in [
            "pavo: host n2: error: waited 40 s in vain for host n1",
            "pavo: host n3: error: waited 40 s in vain for host n1",
            "pavo: host n3:   help: look there",
            "pavo: host n4: error: waited 40 s in vain for host n1",
            "pavo: host n5: error: no room",
            "pavo: host n6: error: no room",
            "pavo: host n7: error: no room, either",
        ] {
            complaints.hear(line, &nobody);
        }
        let report = complaints.verdict(&nobody).unwrap().report();
        let report: Vec<&str> = report.lines().map(str::trim).collect();
        let expected = [
            "error: a host could not be set up",
            "because: host n5: error: no room",
            "host n6: the same",
            "host n7: error: no room, either",
            "host n3: error: waited 40 s in vain for host n1",
            "host n3:   help: look there",
            "2 more hosts: the same",
        ];
        assert_eq!(report, expected);
    }

    #[tokio::test]
    async fn a_host_that_hangs_is_named_before_those_that_waited_for_it() {
        let verdict = |lines: &[&str]| {
            let (mut complaints, nobody) = (Complaints::default(), BTreeSet::new());
            lines.iter().for_each(|line| complaints.hear(line, &nobody));
            complaints.verdict(&nobody).unwrap().report()
        };
        let (n2, n3) = (
            "pavo: host n2: error: waited 40 s in vain for host n1",
            "pavo: host n3: error: waited 40 s in vain for host n1, n4",
        );
        let report = verdict(&[n2]);
        assert!(report.starts_with("error: host n1 was not set up in time\n"), "{report}");
        let report = verdict(&[n2, n3]);
        assert!(report.starts_with("error: hosts n1, n4 were not set up in time\n"), "{report}");
        // It has been heard of in the end.
        let report = verdict(&[n2, n3, "pavo: host n1: error: it took too long"]);
        let expected = "error: a host could not be set up\n  \
                        because: host n1: error: it took too long\n    host n3: error: waited ";
        assert!(report.starts_with(expected) && !report.contains("n2"), "{report}");
        let report = verdict(&[n2, "pavo: host n1: error: waited 40 s in vain for host n2"]);
        assert!(report.contains("host n2: error") && report.contains("host n1: error"), "{report}");
        assert!(report.starts_with("error: a host could not be set up\n"), "{report}");
    }

    #[tokio::test]
    async fn a_task_that_has_met_the_launcher_tells_by_itself_and_another_by_srun() {
        let (mut complaints, met) = (Complaints::default(), BTreeSet::from([0]));
        complaints.hear("srun: error: n1: task 0: Killed", &met);
        let soon = REPORT_TIME * 2;
        assert!(tokio::time::timeout(soon, complaints.due()).await.is_err());
        complaints.hear("error: no room", &met);
        complaints.hear("srun: error: n[1-2]: tasks 0-1: Exited with exit code 5", &met);
        complaints.due().await;
        let report = complaints.verdict(&met).unwrap().report();
        assert!(report.contains("the process of vm1 has ended: Exited"), "{report}");
        assert!(report.contains("because: error: no room"), "{report}");
        // That it is gone is known before the launcher hears of it.
        let report = complaints.end_of(0).unwrap().report();
        assert!(report.contains("host n1: the process of vm0 has ended: Killed"), "{report}");
        assert!(report.contains("because: error: no room"), "{report}");
        assert!(complaints.end_of(2).is_none());
    }

    #[test]
    fn srun_says_which_tasks_have_ended() {
        let read = |line| TasksEnded::read(line).map(|e| (e.hosts, Vec::from_iter(e.ranks), e.how));
        let one = ("n1".into(), vec![0], "Killed".into());
        assert_eq!(read("srun: error: n1: task 0: Killed"), Some(one));
        let many = ("n[1-2]".into(), vec![0, 2, 3], "Exited with exit code 5".into());
        let line = "srun: error: n[1-2]: tasks 0,2-3: Exited with exit code 5";
        assert_eq!(read(line), Some(many));
        for other in [
            "srun: error: n1: task x: Killed",
            "srun: error: n1: tasks 3-0: Killed",
            "srun: error: n1: tasks 0-4294967295: Killed",
            "srun: error: Task launch for 3.0 failed on node n1: Unspecified error",
            "n1: task 0: Killed",
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
