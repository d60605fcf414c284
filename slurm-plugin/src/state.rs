//! What the plugin knows in this process, and does at each of Slurm's callbacks.
//!
//! A process is one srun, salloc, sbatch or slurmd, or the slurmstepd of one step. A
//! task's `task_init_privileged` runs in a fork of slurmstepd and sees a copy.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ask::{self, Facts};
use crate::setup::{Ended, Run};
use crate::slurm::{self, Context, Item, Spank};
use crate::step::{self, MARK, Mark};
use crate::{option, settings::Settings, sys};

/// What srun finds where salloc or sbatch was given `--vm`.
const INHERITED: &str = "SLURM_SPANK__SLURM_SPANK_OPTION_pavo_vm";

static STATE: Mutex<State> = Mutex::new(State::new());

#[derive(Debug)]
pub struct State {
    /// The argument of `--vm`, if it is good.
    vm: Option<String>,
    /// How often srun has told us of `--vm`, and how often that its options are known.
    told: u32,
    known: u32,
    /// Why this host has no VMs: for the user.
    failure: Option<String>,
    /// What there is to remove when the step ends.
    owned: Option<Owned>,
}

#[derive(Debug)]
struct Owned {
    ask: String,
    group: String,
    program: String,
    limit: Duration,
}

impl Owned {
    fn run(&self, action: &str) -> Ended {
        let Self { ask, group, program, limit } = self;
        Run { program, action, ask, limit: *limit, group }.run()
    }
}

impl State {
    const fn new() -> Self {
        Self { vm: None, told: 0, known: 0, failure: None, owned: None }
    }

    /// Slurm calls back from one thread at a time; the lock is never waited for.
    pub fn with<T>(body: impl FnOnce(&mut Self) -> T) -> T {
        let guard: Result<MutexGuard<'_, Self>, _> = STATE.lock();
        body(&mut guard.unwrap_or_else(PoisonError::into_inner))
    }

    pub fn fail(&mut self, why: &str) {
        self.failure = Some(why.to_owned());
    }

    /// `--vm` was given, here or at the step's srun.
    pub fn option(&mut self, argument: &str, remote: bool) -> Result<(), ()> {
        self.told += 1;
        match option::check(argument) {
            Ok(()) => self.vm = Some(argument.to_owned()),
            // An error here would go unseen on a node, and the step on without VMs.
            Err(why) if remote => {
                self.vm = Some(String::new());
                self.failure = Some(why);
            }
            Err(why) => {
                slurm::error(&format!("pavo: {why}"));
                return Err(());
            }
        }
        Ok(())
    }

    /// All options are known: on the user's side they are judged, on a node the step
    /// is set up.
    pub fn options_known<'a>(
        &mut self,
        spank: Spank,
        arguments: impl FnOnce() -> Vec<&'a str>,
    ) -> Result<(), ()> {
        self.known += 1;
        if self.vm.is_none() {
            return Ok(());
        }
        match slurm::context() {
            Context::Local | Context::Allocator => self.refuse_het(),
            Context::Remote => {
                self.create(spank, &arguments());
                Ok(())
            }
            Context::Other => Ok(()),
        }
    }

    /// Once per component of a heterogeneous job or step.
    fn refuse_het(&self) -> Result<(), ()> {
        if self.known == 1 && std::env::var_os("SLURM_HET_SIZE").is_none() {
            return Ok(());
        }
        slurm::error(&format!("pavo: {HET}"));
        Err(())
    }

    /// srun is about to launch: leaves the mark for the nodes.
    pub fn launching(&self, spank: Spank) -> Result<(), ()> {
        if self.vm.is_some() {
            sys::set_env(MARK_NAME, self.mark(spank).as_str());
        }
        Ok(())
    }

    /// An inherited `--vm` is told once, an own one once more.
    fn mark(&self, spank: Spank) -> Mark {
        let inherits = std::env::var_os(INHERITED).is_some();
        if !inherits || self.told > self.known {
            return Mark::Own;
        }
        let overlaps = || {
            let line = std::fs::read("/proc/self/cmdline").unwrap_or_default();
            step::overlaps(&line, slurm::command_words(spank).unwrap_or(0))
        };
        if std::env::var_os("SLURM_OVERLAP").is_some() || overlaps() {
            Mark::Overlap
        } else {
            Mark::Inherited
        }
    }

    /// On a node, as root: sets the step up if it owns the cluster. What goes wrong is
    /// kept for [`State::task`]: an error here would show the user nothing, and drain
    /// the node of a batch job.
    fn create(&mut self, spank: Spank, arguments: &[&str]) {
        let mark = slurm::step_env::<32>(spank, MARK_NAME).unwrap_or_default();
        slurm::unset_step_env(spank, MARK_NAME);
        let Some(step) = slurm::item(spank, Item::Step) else { return };
        if !step::owns(step, Mark::read(&mark)) {
            self.vm = None;
            self.failure = None;
            return;
        }
        if self.failure.is_none() {
            self.failure = self.set_up(spank, arguments).err();
        }
        if let Some(why) = &self.failure {
            slurm::error(&format!("pavo: {}", why.replace('\n', " | ")));
        }
    }

    fn set_up(&mut self, spank: Spank, arguments: &[&str]) -> Result<(), String> {
        if slurm::step_env::<64>(spank, c"SLURM_HET_SIZE").is_some() {
            return Err(HET.to_owned());
        }
        let settings = Settings::read(arguments)?;
        let vm = self.vm.clone().unwrap_or_default();
        let facts = Facts { limit: settings.limit.as_secs(), ..facts(spank, vm)? };
        let owned = Owned {
            ask: facts.ask()?,
            group: format!("pavo.{}.{}.{}", facts.node, facts.job, facts.step),
            program: settings.program,
            limit: settings.limit,
        };
        let ended = owned.run("create");
        // One that said no has left nothing and may not be the step that owns the
        // cluster: a delete could meet another's.
        if !matches!(ended, Ended::Refused(_)) {
            self.owned = Some(owned);
        }
        match ended {
            Ended::Done => Ok(()),
            Ended::Refused(why) | Ended::Broken(why) => Err(why),
        }
    }

    /// In the fork that becomes a task, still root: the one place where an error shows
    /// its text, fails srun and drains nothing. Once per host is enough.
    pub fn task(&self, spank: Spank) -> Result<(), ()> {
        let Some(why) = &self.failure else { return Ok(()) };
        if slurm::item(spank, Item::TaskId) == Some(0) {
            let host = node().unwrap_or_else(|| "?".to_owned());
            for line in why.lines() {
                slurm::tell(&format!("pavo: host {host}: {line}"));
            }
        }
        Err(())
    }

    /// The step is over on this host.
    pub fn exit(&mut self) -> Result<(), ()> {
        let Some(owned) = self.owned.take() else { return Ok(()) };
        match owned.run("delete") {
            Ended::Done => {}
            Ended::Refused(why) | Ended::Broken(why) => {
                slurm::error(&format!("pavo: removing: {}", why.replace('\n', " | ")));
            }
        }
        Ok(())
    }
}

const HET: &str = "--vm does not work in heterogeneous jobs and steps: ask for one component \
    whose hosts have what every VM needs";
/// Slurm's "not set".
const NO_VALUE: u32 = 0xffff_fffe;
const MARK_NAME: &std::ffi::CStr = c"SLURM_PAVO_STEP";
const _: () = assert!(MARK.len() == MARK_NAME.count_bytes());

/// slurmstepd's own SLURMD_NODENAME, which it takes from slurmd. The step's
/// environment has one, too: that is the user's.
fn node() -> Option<String> {
    let own = std::env::var("SLURMD_NODENAME").ok();
    own.or_else(sys::host_name).filter(|name| ask::is_node(name))
}

/// How often the job was requeued. Slurm 22.05 always says 0 to plugins; then the
/// step's environment may know, which is the user's word.
fn restarts(spank: Spank) -> u32 {
    let told = slurm::item(spank, Item::RestartCount).filter(|&count| count > 0);
    let read = || slurm::step_env::<16>(spank, c"SLURM_RESTART_COUNT")?.parse().ok();
    told.or_else(read).unwrap_or(0)
}

fn facts(spank: Spank, vm: String) -> Result<Facts, String> {
    let need = |item: Item| {
        slurm::item(spank, item).ok_or_else(|| format!("Slurm does not tell {item:?} of the step"))
    };
    let local = need(Item::LocalTasks)?;
    let ranks: Option<Vec<u32>> = (0..local).map(|task| slurm::rank(spank, task)).collect();
    let array = slurm::item(spank, Item::ArrayJob).filter(|&job| job != 0);
    let list = slurm::step_env::<16384>(spank, c"SLURM_STEP_NODELIST")
        .or_else(|| slurm::step_env::<16384>(spank, c"SLURM_JOB_NODELIST"));
    let sealed = slurm::step_env::<{ ask::MAX_SEALED + 1 }>(spank, c"PAVO_SEALED");
    Ok(Facts {
        job: need(Item::Job)?,
        step: need(Item::Step)?,
        restart: restarts(spank),
        array: array.zip(slurm::item(spank, Item::ArrayTask).filter(|&task| task != NO_VALUE)),
        uid: need(Item::Uid)?,
        gid: need(Item::Gid)?,
        node: node().ok_or("neither SLURMD_NODENAME nor the host's name is a node's name")?,
        node_id: need(Item::NodeId)?,
        nodes: need(Item::Nodes)?,
        node_list: list.filter(|list| ask::is_host_list(list)),
        tasks: need(Item::TotalTasks)?,
        local_tasks: ranks.ok_or("Slurm does not tell the ranks of the tasks")?,
        vm,
        sealed: sealed.filter(|sealed| ask::is_sealed(sealed)),
        keeper: std::process::id(),
        limit: 0,
    })
}
