//! `pavo alloc`: a cluster with a shell or script beside it, here or as a job of Slurm.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::Signal;

use super::App;
use super::changes::ChangeArgs;
use super::rescue::{Rescue, RescueArgs, Resumed};
use super::session::{Session, SessionArgs};
use super::signals::Signals;
use crate::batch::{Request, local, parse_memory, parse_time, slurm};
use crate::config::{BatchManager, Config, Network};
use crate::error::{Error, Result};
use crate::model::cluster::{ClusterDef, plain_name};
use crate::ops::accel;
use crate::ops::book::{Book, Place};
use crate::ops::here::Wanted;
use crate::ops::launch::Cluster;
use crate::ops::pasta;
use crate::ops::resolve::{Blueprint, resolve};
use crate::ops::task;
use crate::store::embedded;

/// Start a cluster of VMs, with a shell beside it
///
/// `pavo alloc tiny:2` starts two VMs of the template `tiny` (every image is a template)
/// and a shell in which `pavo ssh vm0`, `pavo console`, `pavo status` mean this cluster. When
/// the shell ends, the cluster ends, and nothing of it is left.
///
/// At a site with Slurm the cluster is a job; options that are not pavo's are salloc's.
#[derive(Debug, Args)]
pub struct Alloc {
    #[command(flatten)]
    pub job: JobArgs,

    #[command(flatten)]
    pub session: SessionArgs,
}

/// What a job is to be, for `alloc` and `batch`.
#[derive(Debug, Args)]
pub struct JobArgs {
    /// Options of the scheduler, then `TEMPLATE[:COUNT]`, more of them separated by commas
    #[arg(value_name = "CLUSTER", required_unless_present = "restart", num_args = 1..)]
    words: Vec<String>,

    /// Cores of each VM [default: 1]
    #[arg(short = 'c', long = "cpus-per-task", value_name = "N")]
    cores: Option<u32>,

    /// Memory: here of each VM, MiB or with a unit [default: 512M a core]; with Slurm its own
    /// `--mem`
    #[arg(long = "mem", value_name = "SIZE")]
    memory: Option<String>,

    /// Name of the job
    #[arg(short = 'J', long = "job-name", value_name = "NAME", default_value = "pavo")]
    name: String,

    /// End after this time: minutes, HH:MM:SS or D-HH:MM:SS
    #[arg(short = 't', long = "time", value_name = "TIME")]
    time: Option<String>,

    #[command(flatten)]
    pub changes: ChangeArgs,
}

impl JobArgs {
    /// The cluster: the last word, or that of the checkpoint.
    pub fn definition(&self) -> Result<ClusterDef> {
        if let ([], Some(checkpoint)) = (&*self.words, self.changes.checkpoint()?) {
            return checkpoint.definition();
        }
        self.words.last().map_or("", String::as_str).parse()
    }

    /// The words before it.
    fn passed(&self) -> &[String] {
        self.words.split_last().map_or(&[], |(_, passed)| passed)
    }

    pub fn check_name(&self) -> Result<()> {
        if plain_name(&self.name) {
            return Ok(());
        }
        let name = self.name.escape_debug();
        Err(Error::usage(format!("`{name}` cannot be the name of a job"))
            .help("use letters, digits, `_`, `-` and `.`"))
    }

    /// What the scheduler is asked for, once everything a user can have got wrong has been
    /// looked at: before a job waits in a queue.
    pub fn for_slurm(&self, config: &Config, blueprint: &Blueprint) -> Result<slurm::JobWish> {
        let memory = self.memory.as_deref().filter(|memory| *memory != "0");
        memory.map(parse_memory).transpose()?;
        blueprint.check_cores(self.cores)?;
        let former = blueprint.former();
        let mut passed = self.passed().to_vec();
        if let (Some((cores, mib)), None) = (former, &self.memory) {
            if !passed.iter().any(|word| word.starts_with("--mem")) {
                passed.insert(
                    0,
                    format!("--mem-per-cpu={}M", task::share(mib).div_ceil(cores.into())),
                );
            }
        }
        Ok(slurm::JobWish {
            vms: blueprint.definition.count(),
            cluster: blueprint.definition.to_string(),
            name: Some(self.name.clone()),
            cores: self.cores.or(former.map(|(cores, _)| cores)),
            memory: self.memory.clone(),
            time: self.time.clone(),
            licences: licences(blueprint),
            site: config.batch.batch_args.clone(),
            passed,
        })
    }

    fn for_here(&self, blueprint: &Blueprint) -> Result<Request> {
        if let Some(word) = self.passed().first() {
            return Err(Error::usage(format!(
                "unexpected argument `{}`: there is no scheduler here to pass it to",
                word.escape_debug()
            ))
            .help("`pavo alloc --help` lists the options; the cluster is the last word"));
        }
        blueprint.check_cores(self.cores)?;
        let (cores, memory_mib) = blueprint.former().unzip();
        Ok(Request {
            name: Some(self.name.clone()),
            cores: self.cores.or(cores),
            memory_mib: self.memory.as_deref().map(parse_memory).transpose()?.or(memory_mib),
            time_limit: self.time.as_deref().map(parse_time).transpose()?,
        })
    }
}

impl Alloc {
    pub fn run(self, app: &App) -> Result<u8> {
        if app.env.job_id.is_some() {
            return Err(Error::usage("Failure in job allocation: already in a job")
                .help("leave this shell first, or unset PAVO_JOB_ID"));
        }
        self.session.check()?;
        self.job.check_name()?;
        let definition = self.job.definition()?;
        let (config, blueprint) = look_up(app, &definition, &self.job.changes)?;
        self.session.check_site(&config)?;
        self.session.check_rescue(&blueprint)?;
        match config.batch.manager {
            BatchManager::Local => app.block_on(self.here(app, blueprint)),
            BatchManager::Slurm => self.salloc(app, &config, &blueprint),
        }
    }

    /// Becomes salloc, whose command is the launcher: it says what it waits for, and takes
    /// the signals of the terminal.
    fn salloc(self, app: &App, config: &Config, blueprint: &Blueprint) -> Result<u8> {
        if self.session.ckpt_on_signal.is_some() {
            let error = "`--ckpt-on-signal` is for jobs that nobody waits for";
            return Err(Error::usage(error)
                .help("submit it: `pavo batch`; or write it down yourself: `pavo ckpt DIR`"));
        }
        let wish = self.job.for_slurm(config, blueprint)?;
        if self.session.batch_script.as_deref() != Some("-".as_ref()) {
            // Before there is a job: one that cannot be read.
            self.session.read_batch_script()?;
        }
        let mut command = Command::new("salloc");
        command.args(wish.options());
        command.args(super::launcher::command(
            &self.session,
            &self.job.changes,
            &blueprint.definition,
            None,
        )?);
        app.out.end_progress();
        Err(Error::system("salloc cannot be run")
            .because(command.exec())
            .help("is Slurm installed on this host? batch.yaml says `type: slurm`"))
    }

    async fn here(self, app: &App, blueprint: Blueprint) -> Result<u8> {
        let request = self.job.for_here(&blueprint)?;
        let batch_script = self.session.read_batch_script()?;
        let allocation = self.allocate(app, &request, &blueprint)?;
        let accel = accel::choose(&app.env.state_dir(), &|text| app.out.status(text)).await;
        blueprint.check_here(allocation.cores, accel)?;
        let store = Arc::new(embedded::open(&app.env.state_dir()).await?);
        super::job::running(app, &*store).await?;
        let place = Place {
            user: app.env.user.clone(),
            tmp: app.env.tmp.clone(),
            host: app.env.hostname(),
        };
        let definition = blueprint.definition.to_string();
        let wanted = Wanted {
            blueprint,
            allocation,
            uid: app.env.uid,
            store: app.env.state_dir(),
            accel,
            way_out: pasta::has_way_out(),
        };
        if !wanted.way_out {
            app.out.status("This machine has no default route: the cluster has no way out");
        }
        let owner = local::next_job(&*store, &app.env.user).await?;
        let args = RescueArgs::new(Signal::SIGUSR2, false)?;
        let dir = self.session.ckpt_on_signal.as_deref();
        let rescue = Rescue::new(app, dir, &args, (owner.job, false))?;
        let mut signals = Signals::new()?.warned_by(rescue.as_ref().map(|rescue| rescue.signal))?;
        let limit = request.time_limit;
        let book = Book::new(Some(store), owner, &place, &self.job.name, definition, limit)?;
        app.out.status(&format!("Granted job allocation {}", owner.job));
        let session = Session {
            app,
            args: &self.session,
            time: limit,
            hosts: &[],
            grace: Duration::ZERO,
            tmp: &place.tmp,
            batch_script,
            rescue,
            resumed: Resumed::of(&self.job.changes)?,
        };
        session.run(Cluster::here(book, wanted), &mut signals).await
    }

    fn allocate(
        &self,
        app: &App,
        request: &Request,
        blueprint: &Blueprint,
    ) -> Result<local::Allocation> {
        let capacity = local::Capacity::read()?;
        let allocation = local::allocate(request, blueprint.definition.count(), capacity)?;
        if allocation.cores > capacity.cores {
            app.out.warn(&format!(
                "each VM has {} cores, this machine {}: they will share them",
                allocation.cores, capacity.cores
            ));
        }
        Ok(allocation)
    }
}

/// One licence of each network that has some: a job takes one of each network.
fn licences(blueprint: &Blueprint) -> Vec<String> {
    let of = |network: &Network| match network {
        Network::Ethernet(ethernet) => ethernet.license.clone(),
        Network::Unsupported { .. } => None,
    };
    let names = blueprint.networks.iter().filter_map(|(_, network)| of(network));
    names.map(|name| format!("{name}:1")).collect()
}

/// The configuration, and the cluster as it says.
pub fn look_up(
    app: &App,
    definition: &ClusterDef,
    changes: &ChangeArgs,
) -> Result<(Config, Blueprint)> {
    let sources = super::config::sources(app);
    let config = super::config::load_from(app, &sources)?;
    let library = app.library(&config);
    let (mut wanted, checkpoint) = (changes.changes()?, changes.checkpoint()?);
    if let Some(checkpoint) = &checkpoint {
        checkpoint.check_definition(definition)?;
        wanted.images = checkpoint.images();
    }
    let blueprint = resolve(&config, &library, &sources.vars(), definition, &wanted);
    app.warn_of(&library);
    let mut blueprint = blueprint?;
    if let Some(checkpoint) = checkpoint {
        checkpoint.apply(&mut blueprint)?;
    }
    Ok((config, blueprint))
}
