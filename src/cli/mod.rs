//! The command line: one file per verb or noun, [`out`] the only one that prints.
//!
//! Each file holds a clap struct whose doc comment is the help, and one `run`.
//! [`App`] is what a verb may reach; it is made once, in [`main`].

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

mod agent;
mod alloc;
mod batch;
mod cancel;
mod changes;
mod ckpt;
mod completion;
mod config;
mod console;
mod copying;
mod cp;
mod daemon;
mod display;
mod doctor;
mod dump;
mod forward;
mod image;
mod internal;
mod inventory;
mod job;
mod launcher;
mod live;
mod monitor;
mod nic;
mod node;
mod nodeset;
mod op;
pub mod out;
mod passing;
mod power;
mod ps;
mod records;
mod rescue;
mod results;
mod run;
mod save;
mod secrets;
mod service;
mod session;
mod setup;
mod signals;
mod site;
mod snapshot;
mod ssh;
mod status;
mod tame;
mod template;
mod terminal;
mod top;
mod wait;

use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};
use crate::image::library::Library;
use crate::ops::program;
use crate::store::embedded;
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
    Alloc(alloc::Alloc),
    Batch(batch::Batch),
    Ps(ps::Ps),
    Status(status::Status),
    Top(top::Top),
    Wait(wait::Wait),
    Cancel(cancel::Cancel),
    Console(console::Console),
    Display(display::Display),
    Ssh(ssh::Ssh),
    Scp(ssh::Scp),
    SshConfig(ssh::SshConfig),
    Forward(forward::Forward),
    Nc(forward::Nc),
    Run(run::Run),
    Cp(cp::Cp),
    #[command(subcommand)]
    Agent(agent::Agent),
    Reset(monitor::Reset),
    Pause(monitor::Pause),
    Resume(monitor::Resume),
    Powerdown(monitor::Powerdown),
    MonitorCmd(monitor::MonitorCmd),
    Qmp(monitor::Qmp),
    Save(save::Save),
    Dump(dump::Dump),
    Ckpt(ckpt::Ckpt),
    Snapshot(snapshot::Snapshot),
    Template(template::Template),
    Config(config::Config),
    Image(image::Image),
    Node(node::Node),
    Group(records::Group),
    Profile(records::Profile),
    Net(records::Net),
    Nic(nic::Nic),
    Passwd(records::Passwd),
    Project(records::Project),
    Power(power::Power),
    Bootdev(power::Bootdev),
    Nodeset(nodeset::Nodeset),
    Daemon(daemon::Daemon),
    #[command(subcommand)]
    Op(op::Op),
    #[command(subcommand)]
    Service(service::Service),
    Doctor(doctor::Doctor),
    Completion(completion::Completion),
    #[command(subcommand, hide = true)]
    Internal(internal::Internal),
}

impl Command {
    /// Runs the verb; `Ok` holds the exit code.
    fn run(self, app: &App) -> Result<u8> {
        match self {
            Self::Alloc(verb) => verb.run(app),
            Self::Batch(verb) => verb.run(app),
            Self::Ps(verb) => verb.run(app),
            Self::Status(verb) => verb.run(app),
            Self::Top(verb) => verb.run(app),
            Self::Wait(verb) => verb.run(app),
            Self::Cancel(verb) => verb.run(app),
            Self::Console(verb) => verb.run(app),
            Self::Display(verb) => verb.run(app),
            Self::Ssh(verb) => verb.run(app),
            Self::Scp(verb) => verb.run(app),
            Self::SshConfig(verb) => verb.run(app),
            Self::Forward(verb) => verb.run(app),
            Self::Nc(verb) => verb.run(app),
            Self::Run(verb) => verb.run(app),
            Self::Cp(verb) => verb.run(app),
            Self::Agent(verb) => verb.run(app),
            Self::Reset(verb) => verb.run(app),
            Self::Pause(verb) => verb.run(app),
            Self::Resume(verb) => verb.run(app),
            Self::Powerdown(verb) => verb.run(app),
            Self::MonitorCmd(verb) => verb.run(app),
            Self::Qmp(verb) => verb.run(app),
            Self::Dump(verb) => verb.run(app),
            Self::Ckpt(verb) => verb.run(app),
            Self::Snapshot(verb) => verb.run(app),
            Self::Save(verb) => verb.run(app),
            Self::Template(verb) => verb.run(app),
            Self::Config(verb) => verb.run(app),
            Self::Doctor(verb) => verb.run(app),
            Self::Completion(verb) => verb.run(app),
            Self::Internal(verb) => verb.run(app),
            Self::Image(verb) => verb.run(app),
            Self::Node(verb) => verb.run(app),
            Self::Group(verb) => verb.run(app),
            Self::Profile(verb) => verb.run(app),
            Self::Net(verb) => verb.run(app),
            Self::Nic(verb) => verb.run(app),
            Self::Passwd(verb) => verb.run(app),
            Self::Project(verb) => verb.run(app),
            Self::Power(verb) => verb.run(app),
            Self::Bootdev(verb) => verb.run(app),
            Self::Nodeset(verb) => verb.run(app),
            Self::Daemon(verb) => verb.run(app),
            Self::Op(verb) => verb.run(app),
            Self::Service(verb) => verb.run(app),
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

impl App {
    /// Runs what waits, on this thread.
    pub fn block_on<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.while_doing(|| "starting the runtime".into())?.block_on(work)
    }

    /// The images the configuration leads to.
    pub fn library(&self, config: &Config) -> Library {
        Library::open(&config.repos)
    }

    /// Says what the library has found that the user may want to know.
    pub fn warn_of(&self, library: &Library) {
        library.take_warnings().iter().for_each(|warning| self.out.warn(warning));
    }
}

/// Seconds, as people read them: `4s`, `2m05s`, `1h02m`, `3d04h`.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86_400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// The environment, read once.
#[derive(Clone, Debug)]
pub struct Environment {
    pub uid: u32,
    pub user: String,
    pub home: PathBuf,
    pub shell: PathBuf,
    /// `$PAVO_SYSTEM_CONF_DIR`
    pub system_conf: Option<PathBuf>,
    /// `$PAVO_USER_CONF_DIR`
    pub user_conf: Option<PathBuf>,
    /// Where jobs keep what is only theirs: `$PAVO_TMPDIR`, `$TMPDIR` or `/tmp`.
    pub tmp: PathBuf,
    /// `$PAVO_STATE_DIR`
    pub state: Option<PathBuf>,
    /// `$PAVO_DAEMON`
    pub daemon: Option<String>,
    /// `$XDG_STATE_HOME`
    pub state_home: Option<PathBuf>,
    /// The job whose shell this is: `$PAVO_JOB_ID`.
    pub job_id: Option<String>,
    /// Whether there is a desktop: `$DISPLAY` or `$WAYLAND_DISPLAY`.
    pub graphical: bool,
    /// What Slurm says of the job and the task we are in: `$SLURM…`.
    pub slurm: Vec<(String, String)>,
}

impl Environment {
    /// The directory of the user's store on this machine: `$PAVO_STATE_DIR`, or below the
    /// home directory if that is on this machine, or in `/var/tmp`.
    pub fn state_dir(&self) -> PathBuf {
        if let Some(state) = &self.state {
            return state.clone();
        }
        let homely = self.state_home.clone().unwrap_or_else(|| self.home.join(".local/state"));
        if usable(&homely) {
            homely.join("pavo").join(self.hostname())
        } else {
            PathBuf::from(format!("/var/tmp/pavo-{}", self.uid))
        }
    }

    pub fn hostname(&self) -> String {
        let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        name.filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".into())
    }
}

/// Whether a store may lie below `path`: its nearest directory that exists is ours to
/// write to, and on a local file system.
fn usable(path: &Path) -> bool {
    let existing = path.ancestors().find(|path| path.exists());
    existing.is_some_and(|path| {
        nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).is_ok()
            && embedded::is_local(path)
    })
}

/// The whole command line, for who writes about it: manual pages.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses the arguments, runs the command and reports its outcome.
pub fn main() -> ExitCode {
    program::show_name();
    let out = Out::new();
    let cli = match Cli::try_parse_from(passing::arrange(&command(), std::env::args_os().collect()))
    {
        Ok(cli) => cli,
        Err(error) => return refuse(&out, &error),
    };
    match &cli.command {
        Command::Daemon(daemon) => daemon.log(cli.verbose),
        _ => log_to_stderr(cli.verbose),
    }
    let outcome = environment()
        .map(|env| App { out: Out::new(), env, verbose: cli.verbose })
        .and_then(|app| cli.command.run(&app));
    match outcome {
        Ok(code) => code.into(),
        // Whoever reads us has had enough: no error, but no success either.
        Err(error) if is_unread(&error) => UNREAD.into(),
        Err(error) => {
            out.error(&error.report());
            error.kind().exit_code().into()
        }
    }
}

/// As a shell says it of one that SIGPIPE has ended.
const UNREAD: u8 = 141;

/// Whether nobody takes what we write to standard output.
fn is_unread(error: &Error) -> bool {
    let mut at: &(dyn std::error::Error + 'static) = error;
    let mut writing = error.to_string() == out::WRITING;
    while let Some(cause) = at.source() {
        writing |= cause.to_string() == out::WRITING;
        at = cause;
    }
    let cause = at.downcast_ref::<std::io::Error>();
    writing && cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Shows what the library logs: what went wrong where nobody could be told, and with `-v`
/// what is done.
fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        .with_target(false)
        .without_time()
        .init();
}

/// Arguments that cannot be meant. clap would show only the first line of an error of
/// ours, and control characters of the argument as they are.
fn refuse(out: &Out, error: &clap::Error) -> ExitCode {
    match error.source().and_then(|source| source.downcast_ref::<Error>()) {
        Some(ours) => {
            out.error(&ours.report());
            ours.kind().exit_code().into()
        }
        None => error.exit(),
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
        shell: path("SHELL").unwrap_or_else(|| "/bin/sh".into()),
        system_conf: path("PAVO_SYSTEM_CONF_DIR"),
        user_conf: path("PAVO_USER_CONF_DIR"),
        tmp: {
            // It is recorded, and found again by commands that run elsewhere.
            let tmp = path("PAVO_TMPDIR").or_else(|| path("TMPDIR"));
            std::path::absolute(tmp.unwrap_or_else(|| "/tmp".into()))
                .while_doing(|| "finding the folder for temporary files".into())?
        },
        state: path("PAVO_STATE_DIR"),
        daemon: variable("PAVO_DAEMON").and_then(|it| it.into_string().ok()),
        state_home: path("XDG_STATE_HOME"),
        job_id: variable("PAVO_JOB_ID").and_then(|id| id.into_string().ok()),
        graphical: ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| variable(name).is_some()),
        slurm: std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with("SLURM"))
            .collect(),
    })
}
