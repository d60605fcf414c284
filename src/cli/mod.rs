//! The command line: one file per verb or noun, [`out`] the only one that prints.
//!
//! Each file holds a clap struct whose doc comment is the help, and one `run`.
//! [`App`] is what a verb may reach; it is made once, in [`main`].

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

mod completion;
mod config;
mod internal;
pub mod out;
mod template;

use crate::error::{Error, Kind, Result};
use out::Out;

/// Private clusters of virtual machines, for any user, in seconds
#[derive(Debug, Parser)]
#[command(name = "pavo", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    /// Say more of what is done (twice: everything)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Completion(completion::Completion),
    Config(config::Config),
    Template(template::Template),
    #[command(hide = true)]
    Internal(internal::Internal),
}

impl Command {
    /// Runs the verb; `Ok` holds the exit code.
    fn run(self, app: &App) -> Result<u8> {
        match self {
            Self::Completion(verb) => verb.run(app),
            Self::Config(noun) => noun.run(app),
            Self::Template(noun) => noun.run(app),
            Self::Internal(verb) => verb.run(app),
        }
    }
}

/// What a verb may reach: the output, and the environment as it was at the start.
#[derive(Debug)]
pub struct App {
    pub out: Out,
    pub env: Environment,
    pub verbose: u8,
}

/// The environment, read once.
#[derive(Clone, Debug)]
pub struct Environment {
    pub uid: u32,
    pub user: String,
    pub home: PathBuf,
    /// Where the site's configuration lies: `$PAVO_SYSTEM_CONF_DIR` or `/etc/pavo`.
    pub system_conf: Option<PathBuf>,
    /// `$PAVO_USER_CONF_DIR` or `~/.pavo`.
    pub user_conf: Option<PathBuf>,
    /// Where jobs keep what is only theirs: `$PAVO_TMPDIR`, `$TMPDIR` or `/tmp`.
    pub tmp: PathBuf,
    /// Where the store lies: `$PAVO_STATE_DIR` or below `tmp`.
    pub state: Option<PathBuf>,
}

/// Parses the arguments, runs the command and reports its outcome.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let out = Out::new();
    let outcome = environment()
        .map(|env| App { out: Out::new(), env, verbose: cli.verbose })
        .and_then(|app| cli.command.run(&app));
    match outcome {
        Ok(code) => code.into(),
        Err(error) => {
            out.error(&error.report());
            error.kind().exit_code().into()
        }
    }
}

fn environment() -> Result<Environment> {
    let uid = nix::unistd::Uid::effective();
    let account = nix::unistd::User::from_uid(uid).ok().flatten();
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let path = |name: &str| variable(name).map(PathBuf::from);
    let home = path("HOME").or_else(|| account.as_ref().map(|account| account.dir.clone()));
    Ok(Environment {
        uid: uid.as_raw(),
        user: account.map_or_else(|| uid.to_string(), |account| account.name),
        home: home.ok_or_else(|| {
            Error::new(Kind::System, "no home directory is known").help("set HOME")
        })?,
        system_conf: path("PAVO_SYSTEM_CONF_DIR"),
        user_conf: path("PAVO_USER_CONF_DIR"),
        tmp: path("PAVO_TMPDIR").or_else(|| path("TMPDIR")).unwrap_or_else(|| "/tmp".into()),
        state: path("PAVO_STATE_DIR"),
    })
}
