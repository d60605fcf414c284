//! `pavo internal launcher`: inside a Slurm job, starts its cluster and stays with it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use clap::Args;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use super::App;
use super::alloc::look_up;
use super::changes::ChangeArgs;
use super::rescue::{Rescue, RescueArgs, Resumed};
use super::session::{GRACE, Session, SessionArgs};
use super::signals::Signals;
use super::site::Person;
use crate::batch::slurm;
use crate::error::{Context, Error, Kind, Result};
use crate::model::cluster::ClusterDef;
use crate::model::hostlist::expand;
use crate::model::owner::{Manager, Owner};
use crate::ops::book::{Book, Place};
use crate::ops::cleanup;
use crate::ops::launch::Cluster;
use crate::ops::program;
use crate::ops::queue;
use crate::ops::step::Wanted;
use crate::ops::supervisor::{self, Role};
use crate::vm::channel::Identity;

/// Inside a Slurm job, start its cluster
#[derive(Debug, Args)]
pub struct Launcher {
    #[command(flatten)]
    session: SessionArgs,

    #[command(flatten)]
    changes: ChangeArgs,

    #[command(flatten)]
    rescue: RescueArgs,

    /// There is no terminal and nobody waits: without a script, stay until the VMs end
    #[arg(long)]
    batch: bool,

    #[arg(value_name = "CLUSTER")]
    definition: ClusterDef,
}

/// The command line of the launcher, for salloc or, with what it does about signals, a batch
/// script.
pub fn command(
    session: &SessionArgs,
    changes: &ChangeArgs,
    definition: &ClusterDef,
    batch: Option<&RescueArgs>,
) -> Result<Vec<String>> {
    let exe = program::path().while_doing(|| "finding this program".into())?;
    let mut words = vec![exe.display().to_string(), "internal".into(), "launcher".into()];
    words.extend(batch.map(|_| "--batch".into()));
    words.extend(batch.into_iter().flat_map(RescueArgs::arguments));
    words.extend(session.arguments());
    words.extend(changes.arguments()?);
    words.push(definition.to_string());
    Ok(words)
}

impl Launcher {
    pub fn run(mut self, app: &App) -> Result<u8> {
        use super::wait::For;
        if !self.batch {
            // Before there is anything: it is the supervisor's, too.
            return match supervisor::split()? {
                Role::Launcher(parent) => app.block_on(self.launch(app, Some(parent))),
                Role::Supervisor(end) => Ok(report(app, end)),
            };
        }
        // Slurm tells how a batch script has ended.
        if !self.session.has_script() {
            self.session.wait = For::Stopped;
        }
        app.block_on(self.launch(app, None))
    }

    async fn launch(mut self, app: &App, supervisor: Option<Pid>) -> Result<u8> {
        let environment = slurm::Environment::new(app.env.slurm.iter().cloned());
        let job = environment.job().ok_or_else(|| {
            Error::usage("this is no job of Slurm").help("start one: `pavo alloc TEMPLATE`")
        })?;
        let dir = self.session.ckpt_on_signal.as_deref();
        let rescue = Rescue::new(app, dir, &self.rescue, (job, true))?;
        // Before anything that takes long: a job that is short may be warned at once.
        let signals = Signals::new()?.warned_by(rescue.as_ref().map(|rescue| rescue.signal))?;
        let again = environment.restarts() > 0;
        if let Some(rescue) = &rescue {
            rescue.resume(app, &mut self.changes, again)?;
        }
        let resumed = Resumed::of(&self.changes)?;
        let batch_script = self.session.read_batch_script()?;
        let (config, blueprint) = look_up(app, &self.definition, &self.changes)?;
        let place = Place {
            user: app.env.user.clone(),
            tmp: app.env.tmp.clone(),
            host: app.env.hostname(),
        };
        let owner = Owner { manager: Manager::Slurm, job };
        let name = environment.job_name().unwrap_or("pavo");
        let definition = blueprint.definition.to_string();
        let book = Book::new(None, owner, &place, name, definition, None)?;
        let exe = program::path().while_doing(|| "finding this program".into())?;
        let sets = slurm::runs(blueprint.vms.iter().map(|vm| vm.template.resource_set.as_str()));
        let srun = slurm::srun_arguments(&sets, environment.cores(), &exe, rescue.is_some());
        let person = Person::new(app, config.batch.etcd.as_ref())?;
        let identity = Identity::generate(&format!("job {job}"))?;
        let sealed = person.as_ref().map(|person| person.sealed(job, &identity)).transpose()?;
        let log_in = person.map(Person::log_in_later);
        let wanted = Wanted { blueprint, srun, identity, sealed, log_in };
        let mut signals = match supervisor {
            Some(supervisor) => signals.of_child(supervisor),
            None => signals,
        };
        // Suspended with its job, it has two seconds to write down that the guests stand still.
        let suspension = SignalKind::from_raw(Signal::SIGTSTP as i32);
        let caught = self.batch.then(|| signal(suspension)).transpose();
        let _caught = caught.while_doing(|| "catching signals".into())?;
        let session = Session {
            app,
            args: &self.session,
            time: None,
            hosts: &environment.hosts().and_then(|list| expand(list).ok()).unwrap_or_default(),
            grace: GRACE,
            tmp: &place.tmp,
            batch_script,
            rescue,
            resumed,
        };
        let outcome = session.run(Cluster::step(book, wanted), &mut signals).await;
        if signals.is_orphaned() {
            // Nobody else gives the job back to Slurm.
            queue::cancel(job).await?;
        }
        outcome
    }
}

/// Tells how the launcher has ended, and removes what it could not: its exit code, or the one
/// that a shell has for its signal.
fn report(app: &App, end: Option<ExitStatus>) -> u8 {
    // Our parent was killed: the launcher says so.
    let Some(end) = end else { return Kind::Interrupted.exit_code() };
    let Some(signal) = end.signal() else {
        return end.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    };
    let environment = slurm::Environment::new(app.env.slurm.iter().cloned());
    let job = environment.job().unwrap_or(0);
    let error = Error::system(format!("the launcher of job {job} was killed ({end})"));
    let help = match signal == Signal::SIGKILL as i32 {
        true => {
            "its VMs are ended; was this host's memory short? `dmesg` shows it to an administrator"
        }
        false => "its VMs are ended",
    };
    if app.out.stderr_is_terminal() {
        // What it was showing last.
        app.out.progress("");
        app.out.end_progress();
    }
    app.out.error(&error.help(help).report());
    cleanup::remove_dirs_of(job, &app.env.tmp);
    u8::try_from(128 + signal).unwrap_or(1)
}
