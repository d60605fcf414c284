//! The launcher: starts a cluster on this machine, follows it, ends it.
//!
//! [`Cluster`] is made in steps so that whatever interrupts it leaves by one door:
//!
//! ```text
//! Cluster::new ─► start ─► wait_until(running | ssh) ─► until_over ─► end
//!                      └──────────┴── any failure, signal, limit ──────►─┘
//! ```
//!
//! It is the single writer of the job's record and of its VMs' states.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, timeout};

use super::cell::{News, Order, SetUp};
use super::cleanup::{self, JobFiles};
use super::pasta;
use super::publish::{self, Bound};
use super::resolve::{Blueprint, Job};
use super::ssh::{self, SshFiles};
use crate::batch::local::Allocation;
use crate::error::{Context, Error, Result};
use crate::host::{Host, journal::Journal, process};
use crate::model::job::{JobRecord, ProcessId, VmState, VmStatus};
use crate::model::owner::Owner;
use crate::model::vm::{Accel, HostKey, VmSpec};
use crate::network::{self, NetworkPlan, Outside, VmNetworks};
use crate::store::{Change, Check, Commit, Store, keys};

/// The account that owns nothing.
const NOBODY: u32 = 65_534;
/// How long the cell may take to stand.
const SET_UP_LIMIT: Duration = Duration::from_secs(30);
/// How long the cell may take to end once it was told to, beyond the guests' grace.
const END_LIMIT: Duration = Duration::from_secs(8);

/// What the job needs to know of who starts it, and where.
#[derive(Clone, Debug)]
pub struct Place {
    pub user: String,
    pub uid: u32,
    /// Where jobs' directories are made.
    pub tmp: PathBuf,
    /// The directory of the store.
    pub store: PathBuf,
    pub host: String,
    pub accel: Accel,
    /// Whether this machine can reach others at all.
    pub way_out: bool,
}

/// What is asked for, checked.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub blueprint: Blueprint,
    pub allocation: Allocation,
    pub name: String,
    pub time_limit: Option<u64>,
}

/// The cell, from outside.
struct Cell {
    process: tokio::process::Child,
    /// The first process inside, once it is known.
    first: Option<ProcessId>,
    news: Lines<BufReader<OwnedReadHalf>>,
    orders: OwnedWriteHalf,
}

/// A cluster, from its first file to its last.
pub struct Cluster<'a> {
    store: &'a dyn Store,
    place: Place,
    wanted: Wanted,
    pub record: JobRecord,
    pub states: Vec<VmStatus>,
    cell: Option<Cell>,
    pasta: Option<tokio::process::Child>,
    dir_lock: Option<Flock<std::fs::File>>,
    /// The error a VM's process reported, by rank.
    failures: BTreeMap<u32, Error>,
}

impl std::fmt::Debug for Cluster<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cluster {}", self.record.owner)
    }
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl<'a> Cluster<'a> {
    /// A cluster of which nothing exists yet.
    pub fn new(store: &'a dyn Store, owner: Owner, place: Place, wanted: Wanted) -> Result<Self> {
        let nonce = random()?;
        let dir = place.tmp.join(format!("pavo-{}-{:08x}", owner.job, nonce as u32));
        let record = JobRecord {
            version: JobRecord::VERSION,
            owner,
            name: wanted.name.clone(),
            user: place.user.clone(),
            definition: wanted.blueprint.definition.to_string(),
            started: now(),
            time_limit: wanted.time_limit,
            launcher: process::current(),
            dir,
            host: place.host.clone(),
            vms: wanted
                .blueprint
                .vms
                .iter()
                .map(|vm| vm.record(&wanted.allocation, &place.host))
                .collect(),
        };
        let waiting = VmStatus { state: VmState::Waiting, since: now(), detail: String::new() };
        let states = vec![waiting; record.vms.len()];
        Ok(Self {
            store,
            place,
            wanted,
            record,
            states,
            cell: None,
            pasta: None,
            dir_lock: None,
            failures: BTreeMap::new(),
        })
    }

    /// Writes the job's record, then makes its directory: what exists is recorded.
    async fn make_files(&mut self) -> Result<()> {
        let key = keys::job_record(&self.record.user, self.record.owner);
        self.write_record(&[Check::Absent(key)]).await?;
        let dir = &self.record.dir;
        let made = std::fs::DirBuilder::new().mode(0o700).create(dir);
        made.while_doing(|| format!("creating `{}`", dir.display()))
            .map_err(|error| error.help("set PAVO_TMPDIR to a folder that you can write to"))?;
        // Cleaners of temporary folders (systemd-tmpfiles) leave alone what is locked.
        let lock = std::fs::File::open(dir)
            .and_then(|dir| Ok(Flock::lock(dir, FlockArg::LockShared).map_err(|(_, e)| e)?));
        self.dir_lock = Some(lock.while_doing(|| format!("locking `{}`", dir.display()))?);
        Ok(())
    }

    async fn write_record(&self, checks: &[Check]) -> Result<()> {
        let key = keys::job_record(&self.record.user, self.record.owner);
        let change = Change::put_json(key, &self.record)?;
        match self.store.commit(checks, &[change]).await? {
            Commit::Done(_) => Ok(()),
            Commit::Conflict(_) => {
                Err(Error::bug(format!("job {} exists already", self.record.owner.job)))
            }
        }
    }

    fn rootless(&self) -> bool {
        self.place.uid != 0
    }

    fn files(&self) -> JobFiles {
        JobFiles {
            owner: self.record.owner,
            user: self.record.user.clone(),
            dir: self.record.dir.clone(),
            store: self.place.store.clone(),
        }
    }

    /// Builds the network and starts every VM's process.
    pub async fn start(&mut self) -> Result<()> {
        let network = self.plan_network()?;
        let bound = self.bind_ports(&network)?;
        let upstream = publish::name_servers();

        let asked = network.l3.iter().any(|net| net.allow_outbound);
        let uplink =
            (self.rootless() && asked && self.place.way_out).then(|| pasta::LINK.to_owned());
        let (netns_dir, journal_dir) = self.host_dirs();
        let drop_to = (!self.rootless()).then_some((NOBODY, NOBODY));
        let responders = publish::responders(&network, &netns_dir, &bound, &upstream, drop_to);
        let mut handed: Vec<OwnedFd> = bound.into_iter().map(|b| b.bound.listener).collect();
        handed.extend(upstream);

        // Before there is a file there is a process that removes it should we be killed.
        self.start_cell(handed)?;
        self.make_files().await?;
        let (key, host_keys) = self.make_keys()?;
        let first = self.first_process().await?;
        if let Some(cell) = &mut self.cell {
            cell.first = process::identify(first);
        }
        if uplink.is_some() {
            self.pasta = Some(pasta::start(first, &self.record.dir)?);
        }
        let NetworkPlan { plan, nics, .. } = network;
        let set_up = SetUp { plan, netns_dir, journal_dir, responders, uplink };
        self.order(&Order::SetUp(Box::new(set_up))).await?;
        self.until_ready().await?;
        let specs = self.specs(&nics, &key, &host_keys)?;
        self.order(&Order::Start(specs)).await
    }

    fn host_dirs(&self) -> (PathBuf, PathBuf) {
        if self.rootless() {
            (self.record.dir.join("netns"), self.record.dir.join("journal"))
        } else {
            (cleanup::NETNS_DIR.into(), cleanup::JOURNAL_DIR.into())
        }
    }

    fn plan_network(&mut self) -> Result<NetworkPlan> {
        let blueprint = &self.wanted.blueprint;
        let vms = blueprint.vms.iter().map(|vm| VmNetworks {
            rank: vm.rank,
            nic_model: vm.template.nic_model.clone(),
            networks: vm.networks.clone(),
        });
        let outside = if self.rootless() {
            Outside::Pasta { link: pasta::LINK.into(), gateway: pasta::GATEWAY }
        } else {
            Outside::Host
        };
        let request = network::Request {
            owner: self.record.owner,
            keeper: self.record.launcher,
            tap_uid: 0,
            outside,
            uplink_slot: self.record.owner.job % network::uplink_slots(&blueprint.networks),
            networks: blueprint.networks.clone(),
            vms: vms.collect(),
        };
        let plan = network::plan(&request)?;
        for (rank, nics) in &plan.nics {
            let vm = &mut self.record.vms[*rank as usize];
            vm.addresses = nics.iter().filter_map(|nic| Some(nic.ipv4.as_ref()?.address)).collect();
        }
        Ok(plan)
    }

    /// Binds a host port for each published port of each guest.
    fn bind_ports(&mut self, network: &NetworkPlan) -> Result<Vec<Bound>> {
        let all = publish::bind_all(network, Ipv4Addr::LOCALHOST)?;
        for bound in &all {
            self.record.vms[bound.rank as usize].ports.push(bound.bound.port);
        }
        Ok(all)
    }

    fn make_keys(&self) -> Result<(HostKey, Vec<HostKey>)> {
        let key = ssh::generate(&format!("pavo job {}", self.record.owner.job))?;
        let host_keys: Vec<HostKey> = self
            .record
            .vms
            .iter()
            .map(|vm| ssh::generate(&format!("vm{}", vm.rank)))
            .collect::<Result<_>>()?;
        SshFiles::of_job(&self.record.dir).write(&key, &self.record.vms, &host_keys)?;
        Ok((key, host_keys))
    }

    fn specs(
        &self,
        nics: &[(u32, Vec<crate::model::vm::Nic>)],
        key: &HostKey,
        host_keys: &[HostKey],
    ) -> Result<Vec<VmSpec>> {
        let job = Job {
            owner: self.record.owner,
            dir: &self.record.dir,
            allocation: &self.wanted.allocation,
            accel: self.place.accel,
            authorized_key: &key.openssh_public,
            host_keys,
            nonce: random()?,
        };
        let nics_of = |rank: u32| {
            let found = nics.iter().find(|(of, _)| *of == rank);
            found.map(|(_, nics)| nics.clone()).unwrap_or_default()
        };
        Ok(self.wanted.blueprint.vms.iter().map(|vm| vm.spec(&job, nics_of(vm.rank))).collect())
    }

    fn start_cell(&mut self, handed: Vec<OwnedFd>) -> Result<()> {
        let doing = || "starting the cell".to_owned();
        let exe = std::env::current_exe().while_doing(|| "finding this program".into())?;
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().while_doing(doing)?;
        // It fits into the socket's buffer, and stays there if we die now.
        let guard = line(&Order::Guard(self.files()));
        ours.write_all(guard.as_bytes()).while_doing(doing)?;
        ours.set_nonblocking(true).while_doing(doing)?;
        let mut command = Command::new(exe);
        command.args(["internal", "cell"]);
        if self.rootless() {
            command.arg("--rootless");
        }
        // A group of its own: Ctrl-C at the terminal is the launcher's to deal with.
        command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.process_group(0);
        crate::host::spawn::inherit(&mut command, handed);
        let process = tokio::process::Command::from(command).spawn().while_doing(doing)?;
        let stream = UnixStream::from_std(ours).while_doing(doing)?;
        let (read, orders) = stream.into_split();
        self.cell = Some(Cell { process, first: None, news: BufReader::new(read).lines(), orders });
        Ok(())
    }

    async fn order(&mut self, order: &Order) -> Result<()> {
        let cell = self.cell.as_mut().ok_or_else(|| Error::bug("there is no cell"))?;
        let told = cell.orders.write_all(line(order).as_bytes()).await;
        told.map_err(|error| cell_died().because(error))
    }

    /// The next thing the cell has to say, or that it or pasta has died. Safe to drop.
    async fn news(&mut self) -> Result<News> {
        let Some(cell) = self.cell.as_mut() else { return Err(Error::bug("there is no cell")) };
        let pasta = self.pasta.as_mut();
        let line = tokio::select! {
            // What it said comes before that it is gone.
            biased;
            line = cell.news.next_line() => line,
            status = pasta::ended(pasta) => return Err(pasta::error(&status, &self.record.dir)),
            // What is inside lives on; it is told to stop at the end.
            _ = cell.process.wait() => return Err(cell_died()),
        };
        match line {
            Ok(Some(line)) => serde_json::from_str(&line)
                .map_err(|error| Error::bug(format!("not news of the cell: {error}"))),
            Ok(None) | Err(_) => Err(cell_died()),
        }
    }

    async fn first_process(&mut self) -> Result<u32> {
        match timeout(SET_UP_LIMIT, self.news()).await {
            Ok(Ok(News::Created { pid })) => Ok(pid),
            Ok(Ok(other)) => Err(unexpected(other)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::system("the cell has not started after 30 s")),
        }
        .while_doing(|| "making the cluster's namespaces".into())
    }

    async fn until_ready(&mut self) -> Result<()> {
        let ready = match timeout(SET_UP_LIMIT, self.news()).await {
            Ok(Ok(News::Ready)) => Ok(()),
            Ok(Ok(other)) => Err(unexpected(other)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::system("it is not ready after 30 s")),
        };
        ready.while_doing(|| "setting up the cluster's network".into())
    }

    /// Waits for the cell's next report of a VM and records it. Safe to drop.
    pub async fn next_report(&mut self) -> Result<u32> {
        match self.news().await? {
            News::Vm(report) => {
                let status = VmStatus { state: report.state, since: now(), detail: report.detail };
                if let Some(error) = report.error {
                    self.failures.insert(report.rank, error.into());
                }
                self.set_state(report.rank, status).await?;
                Ok(report.rank)
            }
            other => Err(unexpected(other)),
        }
    }

    /// Records a VM's state, here and in the store.
    pub async fn set_state(&mut self, rank: u32, status: VmStatus) -> Result<()> {
        let key = keys::vm_status(&self.record.user, self.record.owner, rank);
        let change = Change::put_json(key, &status)?;
        self.states[rank as usize] = status;
        // Who took the record away has ended the job: nothing may be written behind it.
        let check = Check::Exists(keys::job_record(&self.record.user, self.record.owner));
        match self.store.commit(&[check], &[change]).await? {
            Commit::Done(_) => Ok(()),
            Commit::Conflict(_) => Err(Error::system("the job's record was removed")
                .help("was the job ended by another process?")),
        }
    }

    /// Takes the error of the first VM that failed, if one did.
    pub fn take_failure(&mut self) -> Option<(u32, Error)> {
        let (rank, error) = self.failures.pop_first()?;
        Some((rank, Err::<(), _>(error).while_doing(|| format!("running vm{rank}")).unwrap_err()))
    }

    /// Whether every VM has ended.
    pub fn is_over(&self) -> bool {
        self.states.iter().all(|status| status.state.is_over())
    }

    /// Ends the cluster, whatever state it is in, and removes all of it. Guests may shut
    /// down for `grace` first.
    pub async fn end(mut self, grace: Duration) -> Result<()> {
        if let Some(mut cell) = self.cell.take() {
            let stop = Order::Stop { grace_seconds: grace.as_secs() };
            let _ = cell.orders.write_all(line(&stop).as_bytes()).await;
            let deadline = Instant::now() + grace + END_LIMIT;
            let ended = async {
                while let Ok(Some(line)) = cell.news.next_line().await {
                    if matches!(serde_json::from_str(&line), Ok(News::Ended)) {
                        break;
                    }
                }
            };
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                cell.kill();
            }
            self.cell = Some(cell);
        }
        if let Some(mut pasta) = self.pasta.take() {
            let _ = pasta.start_kill();
            let _ = pasta.wait().await;
        }
        let undone = if self.rootless() {
            Ok(())
        } else {
            let journal = Journal::open(cleanup::JOURNAL_DIR)?;
            journal.undo(self.record.owner, &Host::new(cleanup::NETNS_DIR.into())).await
        };
        cleanup::remove(&self.files()).await?;
        // The cell would remove what we had not, were we killed before this.
        if let Some(mut cell) = self.cell.take() {
            drop(cell.orders);
            if timeout(Duration::from_secs(2), cell.process.wait()).await.is_err() {
                let _ = cell.process.start_kill();
            }
        }
        undone
    }
}

impl Cell {
    /// Ends a cell that hangs: with its first process the kernel ends all others.
    fn kill(&mut self) {
        if let Some(first) = self.first.filter(process::alive) {
            let pid = Pid::from_raw(i32::try_from(first.pid).unwrap_or(i32::MAX));
            // It has ended in this very moment: as good.
            let _ = kill(pid, Signal::SIGKILL);
        }
        let _ = self.process.start_kill();
    }
}

fn line(order: &Order) -> String {
    serde_json::to_string(order).expect("orders are always valid JSON") + "\n"
}

fn unexpected(news: News) -> Error {
    match news {
        News::Failed(error) => error.into(),
        other => Error::bug(format!("unexpected news of the cell: {other:?}")),
    }
}

fn cell_died() -> Error {
    Error::system("the cell of the cluster has died")
        .help("was one of its processes killed? nothing of the cluster is left")
}

/// 64 random bits.
fn random() -> Result<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .while_doing(|| "reading `/dev/urandom`".into())?;
    Ok(u64::from_ne_bytes(bytes))
}
