//! Slurm's queue, asked once and filtered by the controller.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use crate::batch::slurm::{Queued, SQUEUE, TIME_FORMAT, parse_squeue};
use crate::error::{Context, Error, Result};

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
    let text = ask("sinfo", &["--noheader", "--Node", "--all", "--format=%N|%T"]).await?;
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
    /// That have something of a job.
    WithJobs,
}

/// These nodes, as Slurm writes them: lists in lines.
pub async fn hosts(which: Hosts<'_>) -> Result<String> {
    let (program, option) = match which {
        Hosts::OfPartition(name) => ("sinfo", format!("--partition={name}")),
        Hosts::InState(state) => ("sinfo", format!("--states={state}")),
        Hosts::OfJob(job) => ("squeue", format!("--jobs={job}")),
        Hosts::WithJobs => {
            ("squeue", "--states=CONFIGURING,RUNNING,SUSPENDED,COMPLETING".to_owned())
        }
    };
    ask(program, &["--noheader", "--format=%N", &option]).await
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

/// Runs one of Slurm's commands, found as the user finds it.
async fn ask(program: &str, words: &[&str]) -> Result<String> {
    let doing = || format!("asking Slurm with `{program}`");
    let mut command = Command::new(program);
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
