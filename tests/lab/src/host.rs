//! One host: what can be asked of it and what can befall it.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Context, Error, Result};
use crate::keeper::{Keeper, USERS, User};
use crate::mounts::{self, Folders};
use crate::run::{self, Output};
use crate::service::{Daemon, Service};
use crate::site::Site;
use crate::wire::{Port, Wire};
use crate::{cgroups, clock};

/// How long a command of [`Host::run`] may take.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The controller, where people log in.
    Login,
    Compute,
    /// Holds one member of the store.
    Store,
}

/// A host of the lab, up or down.
#[derive(Debug)]
pub struct Host {
    name: String,
    short: String,
    pub(crate) role: Role,
    pub(crate) port: Port,
    folders: Folders,
    site: Arc<Site>,
    wire: Arc<Wire>,
    keeper: Mutex<Option<Arc<Keeper>>>,
    daemons: Mutex<Vec<Daemon>>,
    /// Processes that `pause` has stopped.
    paused: Mutex<Vec<i32>>,
}

/// A process on a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// As the machine numbers it.
    pub pid: i32,
    /// As the host numbers it.
    pub inner: i32,
    pub name: String,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

pub(crate) fn user(name: Option<&str>) -> Result<Option<User>> {
    match name {
        None | Some("root") => Ok(None),
        Some(name) => {
            let found = USERS.into_iter().find(|user| user.name == name);
            found.map(Some).ok_or_else(|| Error::new(format!("no user {name}: alice, bob, root")))
        }
    }
}

impl Host {
    pub(crate) fn new(
        prefix: &str,
        short: String,
        role: Role,
        port: Port,
        site: Arc<Site>,
        wire: Arc<Wire>,
    ) -> Self {
        let name = format!("{prefix}{short}");
        let folders = Folders::of(&name, &site);
        Self {
            name,
            short,
            role,
            port,
            folders,
            site,
            wire,
            keeper: Mutex::default(),
            daemons: Mutex::default(),
            paused: Mutex::default(),
        }
    }

    /// Its name, which is Slurm's name for the node, too.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its name without the lab's prefix.
    pub fn short(&self) -> &str {
        &self.short
    }

    /// On the management network (`eth0`).
    pub fn address(&self) -> Ipv4Addr {
        self.port.address()
    }

    /// On the network that tunnels run on, where the lab has one.
    pub fn underlay(&self) -> Option<Ipv4Addr> {
        self.port.underlay_address()
    }

    /// The host's files, seen from the machine: `host.root()?.join("run/pavo")`. Do not
    /// follow absolute links below it.
    pub fn root(&self) -> Result<PathBuf> {
        Ok(PathBuf::from(format!("/proc/{}/root", self.keeper()?.pid())))
    }

    /// The folder that this host alone sees as `/etc/pavo/node` (root's, 0700).
    pub fn node_dir(&self) -> PathBuf {
        self.folders.node.clone()
    }

    pub fn is_up(&self) -> bool {
        lock(&self.keeper).is_some()
    }

    /// Process 1 of the host, as the machine numbers it: its namespaces are in
    /// `/proc/<pid>/ns`.
    pub fn pid(&self) -> Result<i32> {
        Ok(self.keeper()?.pid())
    }

    pub(crate) fn keeper(&self) -> Result<Arc<Keeper>> {
        lock(&self.keeper).clone().ok_or_else(|| Error::new(format!("{} is down", self.name)))
    }

    /// A command that runs on the host as `user` (`None`: root), in that user's home,
    /// with a login's environment. Signals sent to it reach what runs on the host, and
    /// killing it kills that. Its working directory cannot be set; use `env -C`.
    pub fn command(&self, name: Option<&str>, argv: &[&str]) -> Result<Command> {
        self.keeper()?.command(user(name)?, argv)
    }

    /// Runs a command to its end, which must come within a minute.
    pub fn run(&self, user: Option<&str>, argv: &[&str]) -> Result<Output> {
        self.run_within(LIMIT, user, argv)
    }

    pub fn run_within(&self, limit: Duration, user: Option<&str>, argv: &[&str]) -> Result<Output> {
        let output = run::within(limit, self.command(user, argv)?);
        output.while_doing(|| format!("on {}", self.name))
    }

    /// Runs a shell script as root and gives what it prints.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(None, &["sh", "-c", script])?.ok().while_doing(|| format!("on {}", self.name))
    }

    /// Runs `work` on a thread in the host's namespaces (not that of processes).
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.keeper()?.inside(work)
    }

    /// Processes of the host but its first, which only holds it.
    pub fn processes(&self) -> Result<Vec<Process>> {
        Ok(processes(self.keeper()?.pid()))
    }

    /// One of its daemons: `munged`, `slurmctld`, `slurmd`, `etcd`, `ovsdb-server`,
    /// `ovs-vswitchd`.
    pub fn service(&self, name: &str) -> Result<Service<'_>> {
        let daemons = lock(&self.daemons);
        let daemon = daemons.iter().find(|daemon| daemon.name == name).cloned();
        let daemon =
            daemon.ok_or_else(|| Error::new(format!("no {name} belongs on {}", self.name)))?;
        Ok(Service { host: self, daemon })
    }

    /// Adds a daemon and starts it; it is started again when the host restarts.
    pub(crate) fn install(&self, daemon: Daemon) -> Result<()> {
        let name = daemon.name;
        lock(&self.daemons).push(daemon);
        self.service(name)?.start()
    }

    /// Stops all of its processes, as a machine that hangs. Its links stay up.
    pub fn pause(&self) -> Result<()> {
        let mut paused = lock(&self.paused);
        // Again until nothing new runs: one may have forked before it was stopped.
        loop {
            let running: Vec<_> = self
                .processes()?
                .into_iter()
                .filter(|process| !paused.contains(&process.pid) && runs(process.pid))
                .collect();
            if running.is_empty() {
                return Ok(());
            }
            for process in running {
                if kill(Pid::from_raw(process.pid), Signal::SIGSTOP).is_ok() {
                    paused.push(process.pid);
                }
            }
        }
    }

    /// Lets go on what `pause` has stopped.
    pub fn resume(&self) -> Result<()> {
        let live: Vec<_> = self.processes()?.into_iter().map(|process| process.pid).collect();
        for pid in lock(&self.paused).drain(..).filter(|pid| live.contains(pid)) {
            kill(Pid::from_raw(pid), Signal::SIGCONT)?;
        }
        Ok(())
    }

    /// Pulls the plug: everything that runs there is gone at once.
    pub fn kill(&self) -> Result<()> {
        let keeper = self.keeper()?;
        lock(&self.paused).clear();
        *lock(&self.keeper) = None;
        keeper.kill();
        // They are the machine's, and would outlive the reboot.
        cgroups::remove(&self.name);
        // The kernel takes the links away in its own time; neighbours would see them.
        self.wire.unplug(self.port);
        Ok(())
    }

    /// Nothing reaches the host and nothing leaves it; what runs there goes on.
    pub fn cut_off(&self) -> Result<()> {
        self.wire.cut(self.port)
    }

    pub fn reconnect(&self) -> Result<()> {
        self.wire.mend(self.port)
    }

    /// Sets its clock ahead, or behind, of everybody's, for what is started from now on; its
    /// daemons are started again. A reboot sets it right.
    pub fn set_clock(&self, ahead: i64) -> Result<()> {
        let doing = || format!("setting the clock of {}", self.name);
        // All hosts have this file; only who has been told is off.
        let etc = self.site.etc();
        if !etc.join("clock.so").exists() {
            clock::build(&etc.join("clock.so")).while_doing(doing)?;
        }
        fs::write(etc.join("ld.so.preload"), "/etc/clock.so\n")?;
        fs::write(self.root()?.join("run/lab/clock"), ahead.to_string())?;
        let daemons = lock(&self.daemons).clone();
        let restart = |daemon| Service { host: self, daemon }.restart();
        daemons.into_iter().try_for_each(restart).while_doing(doing)
    }

    /// Reboots the host: its daemons are told to end, unless it hangs or is down. It
    /// comes back with fresh `/run` and `/tmp`, its `/var` kept, its daemons started.
    /// To have it crash, `kill` it before.
    pub fn restart(&self) -> Result<()> {
        let daemons = lock(&self.daemons).clone();
        if self.is_up() {
            let hangs = !lock(&self.paused).is_empty();
            for daemon in daemons.iter().rev().filter(|_| !hangs) {
                // One that is dead already need not end, one that does not end is killed.
                let _ = Service { host: self, daemon: daemon.clone() }.stop();
            }
            self.kill()?;
        }
        self.boot()?;
        let start = |daemon| Service { host: self, daemon }.start();
        daemons.into_iter().try_for_each(start)
    }

    pub(crate) fn boot(&self) -> Result<()> {
        let doing = || format!("booting {}", self.name);
        self.folders.make().while_doing(doing)?;
        let keeper = Keeper::start(&self.site.dir.join("keepers").join(&self.name))?;
        let mounted = keeper.inside(|| mounts::set_up(&self.name, &self.folders, &self.site));
        mounted.while_doing(doing)?;
        self.wire.plug(self.port, &keeper).while_doing(doing)?;
        *lock(&self.keeper) = Some(Arc::new(keeper));
        Ok(())
    }
}

/// Whether the process is neither stopped nor dead.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('T' | 'Z' | 'X'))
}

/// Processes of the host whose process 1 is `first`, those in namespaces below it, too.
fn processes(first: i32) -> Vec<Process> {
    let space = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(host) = space(first) else { return Vec::new() };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut parents = BTreeMap::new();
    let mut found = BTreeMap::new();
    for pid in pids.filter(|&pid| pid != first) {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field =
            |name| status.lines().find_map(|line| line.strip_prefix(name)).map_or("", str::trim);
        if field("State:").starts_with(['Z', 'X']) || status.is_empty() {
            continue;
        }
        parents.insert(pid, field("PPid:").parse::<i32>().unwrap_or_default());
        let numbers = field("NSpid:").split_whitespace();
        // One namespace down from the machine's numbers.
        let inner = numbers.skip_while(|n| n.parse() != Ok(pid)).nth(1);
        let inner = inner.and_then(|n| n.parse().ok()).unwrap_or_default();
        let process = Process { pid, inner, name: field("Name:").to_owned() };
        found.insert(pid, (space(pid).as_ref() == Some(&host), process));
    }
    let mut members: Vec<i32> = Vec::new();
    for &pid in found.keys() {
        let mut at = pid;
        while at > 1 && at != first && !found.get(&at).is_some_and(|(theirs, _)| *theirs) {
            at = parents.get(&at).copied().unwrap_or_default();
        }
        if at > 1 && at != pid || found[&pid].0 {
            members.push(pid);
        }
    }
    members.into_iter().map(|pid| found[&pid].1.clone()).collect()
}
