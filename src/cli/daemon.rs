//! `pavo daemon`

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand, ValueEnum};
use futures_util::FutureExt;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::App;
use super::out::{Column, OutputArgs};
use crate::config;
use crate::daemon::caller::{Rights, Tokens};
use crate::daemon::{self, Open};
use crate::error::{Context, Result};
use crate::model::api::Service;
use crate::ops::keeper::Keeper;
use crate::ops::remote::{Hint, Remote};
use crate::ops::site;
use crate::store::Store;
use crate::store::embedded;
use crate::store::etcd::Etcd;

/// Keep the inventory of the machines below, for all of a site
///
/// Runs until it is told to end, best by systemd (pavo-daemon.service). It keeps the inventory in
/// the site's etcd, or, where batch.yaml names none, in a store of its own; of several daemons
/// one is active, and the others wait. Commands on its host find it by its socket; what it
/// reads is daemon.yaml.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Daemon {
    #[command(subcommand)]
    verb: Option<Verb>,

    /// How it logs, to standard error
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people
    Text,
    /// A JSON object a line
    Json,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Tokens of those who ask from other hosts
    #[command(subcommand)]
    Token(Token),
}

#[derive(Debug, Subcommand)]
enum Token {
    Create(Create),
    List(List),
    Delete(Delete),
}

/// Make a token, and print it: once
///
/// Who has it asks the daemon from any host, as `Authorization: Bearer`; commands take it from
/// `~/.pavo/daemon-token`. The daemon keeps a digest only. On the daemon's host, as its user or as root.
#[derive(Debug, Args)]
struct Create {
    /// Whoever has it may look, and change nothing
    #[arg(long)]
    read_only: bool,

    /// Whose it is, for logs
    #[arg(value_name = "NAME")]
    name: String,
}

/// List who has a token
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    format: OutputArgs,
}

/// Make a token worthless
#[derive(Debug, Args)]
struct Delete {
    #[arg(value_name = "NAME")]
    name: String,
}

/// `daemon.yaml`.
///
/// # Errors
/// When it is wrong.
pub fn load(app: &App) -> Result<config::Daemon> {
    config::load_daemon(&super::config::sources(app))
}

/// The daemon that commands ask, if there is one.
///
/// # Errors
/// When what says so is wrong.
pub fn find(app: &App) -> Result<Option<Remote>> {
    let config = load(app)?;
    let hint = Hint { said: app.env.daemon.as_deref(), config: &config, home: &app.env.home };
    hint.find()
}

/// Who keeps the inventory that commands are about.
///
/// # Errors
/// When what says so is wrong.
pub fn keeper(app: &App) -> Result<Keeper> {
    Ok(find(app)?.map_or_else(|| Keeper::Here(app.env.state_dir()), Keeper::Daemon))
}

impl Daemon {
    /// What it does is told from the beginning, each line with its time, unless systemd adds that.
    pub fn log(&self, verbose: u8) {
        if self.verb.is_some() {
            return super::log_to_stderr(verbose);
        }
        let level = match verbose {
            0 => tracing::Level::INFO,
            1 => tracing::Level::DEBUG,
            _ => tracing::Level::TRACE,
        };
        let ours = tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(level);
        let in_journal = std::env::var_os("JOURNAL_STREAM").is_some();
        match self.log_format {
            LogFormat::Json => ours.json().flatten_event(true).init(),
            LogFormat::Text if in_journal => {
                ours.with_target(false).with_ansi(false).without_time().init()
            }
            LogFormat::Text => {
                ours.with_target(false).with_ansi(std::io::stderr().is_terminal()).init();
            }
        }
    }

    pub fn run(self, app: &App) -> Result<u8> {
        match self.verb {
            None => serve(app),
            Some(Verb::Token(Token::Create(create))) => create.run(app),
            Some(Verb::Token(Token::List(list))) => list.run(app),
            Some(Verb::Token(Token::Delete(delete))) => {
                Tokens::of(&load(app)?.state).delete(&delete.name)?;
                app.out.status(&format!("The token of `{}` is worthless now.", delete.name));
                Ok(0)
            }
        }
    }
}

fn serve(app: &App) -> Result<u8> {
    let config = load(app)?;
    let batch = config::load_batch(&super::config::sources(app))?;
    let (state, jobs) = (config.state.clone(), batch.manager == config::BatchManager::Slurm);
    let open: Open = Box::new(move || {
        let (etcd, state) = (batch.etcd.clone(), state.clone());
        async move {
            Ok(match etcd {
                Some(etcd) => Arc::new(Etcd::connect(&site::as_daemon(&etcd, &state)?).await?)
                    as Arc<dyn Store>,
                None => Arc::new(embedded::open(&state).await?),
            })
        }
        .boxed()
    });
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let me = Service {
        kind: "daemon".into(),
        host: app.env.hostname(),
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        begun: since.as_secs(),
        active: false,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.while_doing(|| "starting the runtime".into())?;
    runtime.block_on(async {
        let mut told = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()]
            .map(signal)
            .into_iter()
            .collect::<std::io::Result<Vec<_>>>()
            .while_doing(|| "waiting for signals".into())?;
        let stop = async move {
            let each = told.iter_mut().map(|signal| signal.recv().boxed());
            futures_util::future::select_all(each).await;
        };
        daemon::run(&config, jobs, open, me, stop).await
    })?;
    Ok(0)
}

impl Create {
    fn run(self, app: &App) -> Result<u8> {
        let rights = if self.read_only { Rights::Look } else { Rights::Change };
        let token = Tokens::of(&load(app)?.state).add(&self.name, rights)?;
        app.out.data(&format!("{}\n", token.expose()))?;
        Ok(0)
    }
}

impl List {
    fn run(self, app: &App) -> Result<u8> {
        #[derive(Serialize)]
        struct Row {
            name: String,
            read_only: bool,
        }
        let row = |caller: daemon::caller::Caller| Row {
            read_only: caller.rights == Rights::Look,
            name: caller.name,
        };
        let rows: Vec<Row> = Tokens::of(&load(app)?.state).list()?.into_iter().map(row).collect();
        app.out.list(
            self.format,
            &rows,
            &[
                Column { title: "NAME", text: |row: &Row| row.name.clone() },
                Column {
                    title: "MAY",
                    text: |row: &Row| if row.read_only { "look" } else { "change" }.into(),
                },
            ],
        )?;
        Ok(0)
    }
}
