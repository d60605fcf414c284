//! `pavo op`, and what watches an operation of the daemon.

use clap::{Args, Subcommand};
use hyper::Method;
use serde::Serialize;

use super::out::{Column, OutputArgs};
use super::signals::Signals;
use super::{App, daemon, duration, results as told};
use crate::error::{Error, Kind, Result};
use crate::model::node::operation::{Operation, State, StoppedBy};
use crate::model::node::request::Outcome;
use crate::model::order::Results;
use crate::ops::book::now;
use crate::ops::remote::Remote;

/// How long an answer is kept back for news, in seconds.
const WAIT: u64 = 20;

/// Look at long work, stop it, do it again
///
/// Power and boot devices of many nodes, and large changes of the inventory: they go on when who
/// ordered them goes away, and their journal says how far they came.
#[derive(Debug, Subcommand)]
pub enum Op {
    List(List),
    Show(Show),
    Watch(Watch),
    Retry(Retry),
    Abort(Abort),
}

/// List the latest operations
#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    format: OutputArgs,
}

/// Show an operation, and what came of each node
#[derive(Debug, Args)]
pub struct Show {
    #[command(flatten)]
    format: OutputArgs,

    /// As `pavo op list` has it
    #[arg(value_name = "ID")]
    id: u64,
}

/// Follow an operation to its end
///
/// An interrupt ends the watching, not the operation. The exit code is the operation's.
#[derive(Debug, Args)]
pub struct Watch {
    #[arg(value_name = "ID")]
    id: u64,

    #[command(flatten)]
    results: told::ResultArgs,
}

/// Do an operation again with the nodes that it did not go well with, and follow it
#[derive(Debug, Args)]
pub struct Retry {
    #[arg(value_name = "ID")]
    id: u64,

    #[command(flatten)]
    results: told::ResultArgs,
}

/// Stop an operation
///
/// No other node is started; those that are under way end.
#[derive(Debug, Args)]
pub struct Abort {
    #[arg(value_name = "ID")]
    id: u64,
}

/// The daemon, for what only a daemon has.
fn required(app: &App) -> Result<Remote> {
    daemon::find(app)?.ok_or_else(|| {
        Error::not_found("there is no daemon")
            .help("only a daemon's operations can be watched: `systemctl start pavo-daemon`")
    })
}

impl Op {
    pub fn run(self, app: &App) -> Result<u8> {
        match self {
            Self::List(list) => list.run(app),
            Self::Show(show) => show.run(app),
            Self::Watch(watch) => {
                let remote = required(app)?;
                let mut told = told::Results::new(&app.out, &watch.results, 0)?;
                let code = app.block_on(follow(app, &remote, watch.id, &mut told))?;
                told.end(code)
            }
            Self::Retry(retry) => {
                let remote = required(app)?;
                let mut told = told::Results::new(&app.out, &retry.results, 0)?;
                let code = app.block_on(async {
                    let path = format!("/v1/ops/{}/retry", retry.id);
                    let operation: Operation = remote.send(Method::POST, &path, &()).await?;
                    app.out.status(&format!("Operation {}: {}", operation.id, operation.what));
                    follow(app, &remote, operation.id, &mut told).await
                })?;
                told.end(code)
            }
            Self::Abort(abort) => {
                let remote = required(app)?;
                let path = format!("/v1/ops/{}/abort", abort.id);
                let _: Operation = app.block_on(remote.send(Method::POST, &path, &()))?;
                app.out.status(&format!("Operation {} starts no other node.", abort.id));
                Ok(0)
            }
        }
    }
}

fn progress(operation: &Operation) -> String {
    let failed = match operation.failed {
        0 => String::new(),
        failed => format!(", {failed} failed"),
    };
    format!("{} of {}{failed}", operation.done, operation.total)
}

fn took(operation: &Operation) -> String {
    duration(operation.ended.unwrap_or_else(now).saturating_sub(operation.begun))
}

impl List {
    fn run(self, app: &App) -> Result<u8> {
        let operations = app.block_on(daemon::keeper(app)?.operations())?;
        app.out.list(
            self.format,
            &operations,
            &[
                Column { title: "ID", text: |it: &Operation| it.id.to_string() },
                Column { title: "STATE", text: |it: &Operation| it.state.as_str().into() },
                Column { title: "DONE", text: progress },
                Column { title: "TOOK", text: took },
                Column { title: "USER", text: |it: &Operation| it.user.clone() },
                Column { title: "WHAT", text: |it: &Operation| it.what.clone() },
            ],
        )?;
        Ok(0)
    }
}

impl Show {
    fn run(self, app: &App) -> Result<u8> {
        let remote = required(app)?;
        let path = format!("/v1/ops/{}/results", self.id);
        let found: Results = app.block_on(remote.get(&path, &()))?;
        if self.format.output.is_some() {
            app.out.record(self.format, &found, &[])?;
            return Ok(0);
        }
        let it = &found.operation;
        let mut text = format!(
            "{}\n{} by {}, {} in {}\n",
            it.what,
            it.state.as_str(),
            it.user,
            progress(it),
            took(it)
        );
        if let Some(reason) = &it.reason {
            text += &format!("because {reason}\n");
        }
        for result in &found.results {
            text += &format!("{}: {}\n", result.name, result.text);
        }
        app.out.data(&text)?;
        Ok(0)
    }
}

/// Tells each result as it comes; the exit code.
///
/// # Errors
/// When the daemon cannot be asked any more: the operation goes on.
pub async fn follow(
    app: &App,
    remote: &Remote,
    id: u64,
    told: &mut told::Results<'_>,
) -> Result<u8> {
    let mut signals = Signals::new()?;
    let work = results(remote, id, told);
    let operation = tokio::select! {
        operation = work => operation.map_err(|error| {
            error.help(format!("it goes on: `pavo op watch {id}`"))
        })?,
        why = signals.next() => {
            app.out.status(&format!(
                "{why}: the operation goes on; `pavo op watch {id}` follows it, `pavo op abort {id}` stops it"
            ));
            return Ok(Kind::Interrupted.exit_code());
        }
    };
    if let Some(reason) = &operation.reason {
        app.out.status(&format!("{}: {reason}", operation.state.as_str()));
    }
    Ok(match operation.state {
        State::Done => 0,
        State::Failed | State::Running => Kind::Partial.exit_code(),
        State::Aborted if operation.stopped_by == Some(StoppedBy::FailLimit) => {
            Kind::FailLimit.exit_code()
        }
        State::Aborted | State::Interrupted => Kind::Interrupted.exit_code(),
    })
}

#[derive(Serialize)]
struct News {
    after: usize,
    wait: u64,
}

/// Tells each result as it comes; the operation when it has ended.
async fn results(remote: &Remote, id: u64, told: &mut told::Results<'_>) -> Result<Operation> {
    let path = format!("/v1/ops/{id}/results");
    let mut news = News { after: 0, wait: WAIT };
    loop {
        let found: Results = remote.get(&path, &news).await?;
        news.after += found.results.len();
        let is_all = found.results.is_empty();
        told.expect(found.operation.total);
        for Outcome { name, ok, text } in found.results {
            told.tell(&name, if ok { Ok(text) } else { Err(text) });
        }
        if found.operation.state != State::Running && is_all {
            return Ok(found.operation);
        }
    }
}
