//! Slurm's queue, asked once and filtered by the controller.
//!
//! Its commands take options from the environment, too: `SQUEUE_USERS` in somebody's profile
//! would hide the others' jobs from us. They get none of those.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::batch::slurm::{Queued, SQUEUE, TIME_FORMAT, parse_squeue};
use crate::error::{Context, Error, Result};
use crate::model::hostlist;

/// How long the controller may take to answer. It may be away for a while.
const LIMIT: Duration = Duration::from_secs(30);

/// Whose jobs are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose<'a> {
    User(&'a str),
    Everybodys,
}

/// The jobs in the queue, running or not.
pub async fn list(whose: Whose<'_>) -> Result<Vec<Queued>> {
    let format = format!("--format={SQUEUE}");
    let mut words = vec!["--noheader", &format];
    if let Whose::User(user) = whose {
        words.extend(["--user", user]);
    }
    ask("squeue", &words).await.map(|text| parse_squeue(&text))
}

/// Those of `nodes` that Slurm takes for running machines. None asked for, none asked.
pub async fn nodes_up(nodes: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    if nodes.is_empty() {
        return Ok(BTreeSet::new());
    }
    let text = ask_here("sinfo", &["--noheader", "--Node", "--all", "--format=%N|%T"]).await?;
    let is_up = |line: &str| {
        let (node, state) = line.trim().split_once('|')?;
        // With an asterisk a node does not answer.
        let down = state.starts_with("down") || state.contains(['*', '~', '%', '!']);
        (!down && nodes.contains(node)).then(|| node.to_owned())
    };
    Ok(text.lines().filter_map(is_up).collect())
}

/// Nodes that Slurm knows by something they have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosts<'a> {
    OfPartition(&'a str),
    InState(&'a str),
    OfJob(&'a str),
}

/// These nodes, as Slurm writes them: lists in lines.
pub async fn hosts(which: Hosts<'_>) -> Result<String> {
    let (program, option) = match which {
        Hosts::OfPartition(name) => ("sinfo", format!("--partition={name}")),
        Hosts::InState(state) => ("sinfo", format!("--states={state}")),
        Hosts::OfJob(job) => ("squeue", format!("--jobs={job}")),
    };
    ask_here(program, &["--noheader", "--format=%N", &option]).await
}

/// States of jobs that have no node, or none any more. What is not known here is taken for one
/// that has.
const WITHOUT_NODES: [&str; 11] = [
    "PENDING",
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
];

/// The names, in Slurm and of their hosts, of all nodes that have something of a job.
///
/// The nodes are asked as well as the jobs: who may not see others' jobs still sees that a node
/// is taken; a job that is suspended takes no processor.
///
/// # Errors
/// When Slurm does not answer.
pub async fn hosts_with_jobs() -> Result<BTreeSet<String>> {
    let everything = ["--local", "--all", "--noheader"];
    let nodes = [&everything[..], &["--Node", "--format=%N|%n|%T|%C"]].concat();
    let jobs = [&everything[..], &["--states=all", "--format=%T|%N"]].concat();
    let (nodes, jobs) = tokio::try_join!(ask_here("sinfo", &nodes), ask_here("squeue", &jobs))?;
    let mut busy = with_jobs(&jobs)?;
    // By the name of a host it may be known as well.
    for line in nodes.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let [node, host, state, processors] = line.split('|').collect::<Vec<_>>()[..] else {
            return Err(Error::system(format!("`sinfo` says `{}`", line.escape_debug())));
        };
        if is_taken(state, processors) || busy.contains(node) {
            busy.extend([node.to_owned(), host.to_owned()]);
        }
    }
    Ok(busy)
}

/// Those that the lines of `squeue` name, `RUNNING|n[1-3]`.
fn with_jobs(lines: &str) -> Result<BTreeSet<String>> {
    let mut busy = BTreeSet::new();
    for line in lines.lines().map(str::trim) {
        let (state, nodes) = line.split_once('|').unwrap_or((line, ""));
        if !WITHOUT_NODES.contains(&state) && !nodes.is_empty() {
            busy.extend(hostlist::expand(nodes)?);
        }
    }
    Ok(busy)
}

/// Whether a node's state, `draining*`, or its processors (taken/idle/other/all) say that
/// somebody has something of it.
fn is_taken(state: &str, processors: &str) -> bool {
    let taken = ["allocated", "mixed", "completing", "draining", "failing"];
    state.contains('+')
        || taken.iter().any(|word| state.starts_with(word))
        || processors.split('/').next().is_some_and(|count| count != "0")
}

/// Ends a job.
pub async fn cancel(job: u32) -> Result<()> {
    ask("scancel", &[&job.to_string()]).await.map(drop)
}

/// Puts a job that runs back into the queue.
pub async fn requeue(job: u32) -> Result<()> {
    ask("scontrol", &["requeue", &job.to_string()]).await.map(drop)
}

/// Whether Slurm has not begun to end a job.
pub async fn runs(job: u32) -> Result<bool> {
    let words = ["--noheader", "--states=all", "--format=%T", "--jobs", &job.to_string()];
    Ok(ask("squeue", &words).await?.trim() == "RUNNING")
}

/// Takes a job that waits out of the queue. Of an array only what waits goes.
pub async fn withdraw(job: u32) -> Result<()> {
    ask("scancel", &["--state=PENDING", &job.to_string()]).await.map(drop)
}

/// Whether a variable of the environment changes what Slurm's commands show or do.
fn is_option(name: &str) -> bool {
    ["SQUEUE_", "SINFO_", "SCANCEL_"].iter().any(|of| name.starts_with(of))
}

/// Runs one of Slurm's commands, found as the user finds it.
async fn ask(program: &str, words: &[&str]) -> Result<String> {
    run(Command::new(program), program, words).await
}

/// Asks of nodes: those of this machine's cluster, whichever one jobs are sent to.
async fn ask_here(program: &str, words: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.env_remove("SLURM_CLUSTERS");
    run(command, program, words).await
}

async fn run(mut command: Command, program: &str, words: &[&str]) -> Result<String> {
    let doing = || format!("asking Slurm with `{program}`");
    for (name, _) in std::env::vars_os() {
        if is_option(&name.to_string_lossy()) {
            command.env_remove(name);
        }
    }
    command.env(TIME_FORMAT.0, TIME_FORMAT.1);
    command.args(words).stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(LIMIT, command.output()).await;
    let output = output.map_err(|_| {
        Error::system(format!("no answer after {} s", LIMIT.as_secs()))
            .help("is slurmctld running? `scontrol ping`")
    });
    let output = output.while_doing(doing)?.while_doing(doing)?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let error =
            Error::system(if complaint.is_empty() { output.status.to_string() } else { complaint });
        return Err(error.help("is slurmctld running? `scontrol ping`")).while_doing(doing);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_taken_by_its_state_or_by_its_processors() {
        for (state, processors) in [
            ("allocated", "4/0/0/4"),
            ("mixed*", "1/3/0/4"),
            ("completing", "0/4/0/4"),
            ("draining@", "0/4/0/4"),
            ("reserved", "1/3/0/4"),
            ("idle+", "0/4/0/4"),
            ("maint", "?"),
        ] {
            assert!(is_taken(state, processors), "{state} {processors}");
        }
        for state in ["idle", "idle~", "down*", "drained", "reserved", "planned", "maint"] {
            assert!(!is_taken(state, "0/4/0/4"), "{state}");
        }
    }

    #[test]
    fn a_job_has_its_nodes_in_every_state_but_those_without() {
        let lines = "PENDING|\nCOMPLETED|n9\nRUNNING|n[1-2]\nSTOPPED|n3\nSIGNALING|n4\n\
                     SUSPENDED|n5\nSTAGE_OUT|n6\nTIMEOUT|n8\n\n";
        let names: Vec<_> = with_jobs(lines).unwrap().into_iter().collect();
        assert_eq!(names, ["n1", "n2", "n3", "n4", "n5", "n6"]);
    }

    #[test]
    fn options_of_the_environment_are_known() {
        assert!(is_option("SQUEUE_USERS") && is_option("SINFO_PARTITION"));
        assert!(!is_option("SLURM_CONF") && !is_option("PATH"));
    }
}
