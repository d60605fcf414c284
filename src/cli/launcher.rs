//! `pavo internal launcher`: inside a Slurm job, starts its cluster and stays with it.

use clap::Args;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use tokio::signal::unix::{SignalKind, signal};

use super::App;
use super::alloc::look_up;
use super::session::{GRACE, Session, SessionArgs, Signals};
use super::site::Person;
use crate::batch::slurm;
use crate::error::{Context, Error, Result};
use crate::model::cluster::ClusterDef;
use crate::model::hostlist::expand;
use crate::model::owner::{Manager, Owner};
use crate::ops::book::{Book, Place};
use crate::ops::launch::Cluster;
use crate::ops::program;
use crate::ops::queue;
use crate::ops::step::Wanted;
use crate::vm::channel::Identity;

/// Inside a Slurm job, start its cluster
#[derive(Debug, Args)]
pub struct Launcher {
    #[command(flatten)]
    session: SessionArgs,

    /// There is no terminal and nobody waits: without a script, stay until the VMs end
    #[arg(long)]
    batch: bool,

    #[arg(value_name = "CLUSTER")]
    definition: ClusterDef,
}

/// The command line of the launcher, for salloc or a batch script.
pub fn command(session: &SessionArgs, definition: &ClusterDef, batch: bool) -> Result<Vec<String>> {
    let exe = program::path().while_doing(|| "finding this program".into())?;
    let mut words = vec![exe.display().to_string(), "internal".into(), "launcher".into()];
    words.extend(batch.then(|| "--batch".into()));
    words.extend(session.arguments());
    words.push(definition.to_string());
    Ok(words)
}

impl Launcher {
    pub fn run(mut self, app: &App) -> Result<u8> {
        use super::wait::For;
        if self.batch && self.session.script.is_none() {
            self.session.wait = For::Stopped;
        }
        app.block_on(self.launch(app))
    }

    async fn launch(self, app: &App) -> Result<u8> {
        let environment = slurm::Environment::new(app.env.slurm.iter().cloned());
        let job = environment.job().ok_or_else(|| {
            Error::usage("this is no job of Slurm").help("start one: `pavo alloc TEMPLATE`")
        })?;
        let (config, blueprint) = look_up(app, &self.definition)?;
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
        let srun = slurm::srun_arguments(&sets, environment.cores(), &exe);
        let person = Person::new(app, config.batch.etcd.as_ref())?;
        let identity = Identity::generate(&format!("job {job}"))?;
        let sealed = person.as_ref().map(|person| person.sealed(job, &identity)).transpose()?;
        let log_in = person.map(Person::log_in_later);
        let wanted = Wanted { blueprint, srun, identity, sealed, log_in };
        let mut signals = Signals::new()?;
        // Suspended with its job, it has two seconds to write down that the guests stand still.
        let suspension = SignalKind::from_raw(Signal::SIGTSTP as i32);
        let caught = self.batch.then(|| signal(suspension)).transpose();
        let _caught = caught.while_doing(|| "catching signals".into())?;
        let salloc = (!self.batch).then(end_with_parent).transpose()?;
        let session = Session {
            app,
            args: &self.session,
            time: None,
            hosts: &environment.hosts().and_then(|list| expand(list).ok()).unwrap_or_default(),
            grace: GRACE,
            tmp: &place.tmp,
        };
        let outcome = session.run(Cluster::step(book, wanted), &mut signals).await;
        if salloc.is_some_and(|salloc| getppid() != salloc) {
            // It was killed: nobody else gives the job back to Slurm.
            queue::cancel(job).await?;
        }
        outcome
    }
}

/// Lets us be terminated when our parent, salloc, ends; returns who that is.
fn end_with_parent() -> Result<Pid> {
    set_pdeathsig(Signal::SIGTERM).while_doing(|| "tying the launcher to salloc".into())?;
    Ok(getppid())
}
