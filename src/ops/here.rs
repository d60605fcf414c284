//! A cluster on this machine: its cell, its way out, its ports.
//!
//! The cell is a tree of processes of this program (see [`cell`](super::cell)), driven
//! through one socket: orders in, news out.

use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, timeout};

use super::book::{Book, JobDir, random};
use super::cell::{News, Order, SetUp};
use super::cleanup::{self, JobFiles};
use super::drives::{Asked, Claims};
use super::pasta;
use super::program;
use super::publish::{self, Bound};
use super::resolve::{Blueprint, Job, VmBlueprint};
use super::ssh::{self, SshFiles};
use crate::batch::local::Allocation;
use crate::error::{Context, Error, Result};
use crate::host::{Host, journal::Journal, process};
use crate::model::job::{ProcessId, VmReport};
use crate::model::vm::{Accel, HostKey, Nic, VmSpec};
use crate::network::{self, NetworkPlan, Outside, VmNetworks};

/// The account that owns nothing.
const NOBODY: u32 = 65_534;
/// How long the cell may take to stand.
const SET_UP_LIMIT: Duration = Duration::from_secs(30);
/// What may be done where that is not enough.
const BUSY: &str = "is this machine very busy, or short of memory (`uptime`, `free`)? try again";
/// How long the cell may take to end once it was told to, beyond the guests' grace.
const END_LIMIT: Duration = Duration::from_secs(8);

/// What is asked of this machine, and what it is like.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub blueprint: Blueprint,
    pub allocation: Allocation,
    pub uid: u32,
    /// The directory of the store.
    pub store: PathBuf,
    pub accel: Accel,
    /// Whether this machine can reach others at all.
    pub way_out: bool,
}

/// The cell, from outside.
struct Cell {
    process: tokio::process::Child,
    /// The first process inside, once it is known.
    first: Option<ProcessId>,
    news: Lines<BufReader<OwnedReadHalf>>,
    orders: OwnedWriteHalf,
}

/// The machine's side of a cluster, from its first process to its last.
pub struct Here {
    wanted: Wanted,
    cell: Option<Cell>,
    pasta: Option<tokio::process::Child>,
    dir: Option<JobDir>,
}

impl std::fmt::Debug for Here {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Here")
    }
}

impl Here {
    /// Nothing exists yet.
    pub fn new(wanted: Wanted) -> Self {
        Self { wanted, cell: None, pasta: None, dir: None }
    }

    /// The record's VMs as far as they are known before anything exists.
    pub fn describe(&self, book: &mut Book) {
        let host = book.record.host.clone();
        let blueprint = &self.wanted.blueprint;
        let record = |vm: &VmBlueprint| vm.record(&self.wanted.allocation, &host);
        book.describe(blueprint.vms.iter().map(record).collect());
    }

    /// Writes the job's record, then makes its directory: what exists is recorded.
    async fn make_files(&mut self, book: &mut Book) -> Result<()> {
        book.begin().await?;
        self.dir = Some(JobDir::make(&book.record.dir)?);
        Ok(())
    }

    fn rootless(&self) -> bool {
        self.wanted.uid != 0
    }

    fn files(&self, book: &Book) -> JobFiles {
        JobFiles {
            owner: book.record.owner,
            user: book.record.user.clone(),
            dir: book.record.dir.clone(),
            store: self.wanted.store.clone(),
        }
    }

    /// Takes the persistent drives of the cluster, if it has any.
    pub async fn take_drives(&self, book: &Book) -> Result<Option<Claims>> {
        let record = &book.record;
        let claimed = self.wanted.blueprint.claimed(None, &record.dir, &record.host)?;
        let Some(store) = book.store().filter(|_| !claimed.is_empty()) else { return Ok(None) };
        let mut claims = Claims::new(store, &record.user, record.owner).await?;
        if let Asked::Held(error) = claims.take(&claimed, &record.host).await? {
            return Err(error);
        }
        claims.lock(&claimed)?;
        Ok(Some(claims))
    }

    /// Builds the network and starts every VM's process.
    pub async fn start(&mut self, book: &mut Book) -> Result<()> {
        let network = self.plan_network(book)?;
        let bound = Self::bind_ports(book, &network)?;
        let upstream = publish::name_servers();

        let asked = network.l3.iter().any(|net| net.allow_outbound);
        let uplink =
            (self.rootless() && asked && self.wanted.way_out).then(|| pasta::LINK.to_owned());
        let (netns_dir, journal_dir) = self.host_dirs(book);
        let drop_to = (!self.rootless()).then_some((NOBODY, NOBODY));
        let responders = publish::responders(&network, &netns_dir, &bound, &upstream, drop_to);
        let mut handed: Vec<OwnedFd> = bound.into_iter().map(|b| b.bound.listener).collect();
        handed.extend(upstream);

        // Before there is a file there is a process that removes it should we be killed.
        self.start_cell(book, handed)?;
        self.make_files(book).await?;
        let (key, host_keys) = self.make_keys(book)?;
        let first = self.first_process(book).await?;
        if let Some(cell) = &mut self.cell {
            cell.first = process::identify(first);
        }
        if uplink.is_some() {
            self.pasta = Some(pasta::start(first, &book.record.dir)?);
        }
        let NetworkPlan { plan, nics, .. } = network;
        let set_up = SetUp { plan, netns_dir, journal_dir, responders, uplink };
        self.order(&Order::SetUp(Box::new(set_up))).await?;
        self.until_ready(book).await?;
        let specs = self.specs(book, &nics, &key, &host_keys)?;
        self.order(&Order::Start(specs)).await
    }

    fn host_dirs(&self, book: &Book) -> (PathBuf, PathBuf) {
        if self.rootless() {
            (book.record.dir.join("netns"), book.record.dir.join("journal"))
        } else {
            (cleanup::NETNS_DIR.into(), cleanup::JOURNAL_DIR.into())
        }
    }

    fn plan_network(&mut self, book: &mut Book) -> Result<NetworkPlan> {
        let blueprint = &self.wanted.blueprint;
        let vms = blueprint.vms.iter().map(|vm| VmNetworks {
            rank: vm.rank,
            nic_model: vm.template.nic_model.clone(),
            nic_queues: vm.template.nic_queues.unwrap_or(1),
            networks: vm.networks.clone(),
        });
        let outside = if self.rootless() {
            Outside::Pasta { link: pasta::LINK.into(), gateway: pasta::GATEWAY }
        } else {
            Outside::Host
        };
        let request = network::Request {
            switch: network::Switch::Linux,
            owner: book.record.owner,
            keeper: book.record.launcher,
            tap_uid: 0,
            outside,
            uplink_slot: book.record.owner.job % network::uplink_slots(&blueprint.networks),
            networks: blueprint.networks.clone(),
            vms: vms.collect(),
            fabric: None,
        };
        let plan = network::plan(&request)?;
        for (rank, nics) in &plan.nics {
            let vm = &mut book.record.vms[*rank as usize];
            vm.addresses = nics.iter().flat_map(Nic::addresses).collect();
        }
        Ok(plan)
    }

    /// Binds a host port for each published port of each guest.
    fn bind_ports(book: &mut Book, network: &NetworkPlan) -> Result<Vec<Bound>> {
        let all = publish::bind_all(network, Ipv4Addr::LOCALHOST)?;
        for bound in &all {
            book.record.vms[bound.rank as usize].ports.push(bound.bound.port);
        }
        Ok(all)
    }

    fn make_keys(&self, book: &Book) -> Result<(HostKey, Vec<HostKey>)> {
        let known = self.wanted.blueprint.known.as_ref();
        let (key, host_keys) = ssh::keys(book.record.owner.job, &book.record.vms, known)?;
        SshFiles::of_job(&book.record.dir).write(
            &key,
            &book.record.vms,
            &ssh::public(&host_keys),
        )?;
        Ok((key, host_keys))
    }

    fn specs(
        &self,
        book: &Book,
        nics: &[(u32, Vec<Nic>)],
        key: &HostKey,
        host_keys: &[HostKey],
    ) -> Result<Vec<VmSpec>> {
        let allocation = &self.wanted.allocation;
        let job = |rank: u32, nonce: u64| Job {
            owner: book.record.owner,
            dir: &book.record.dir,
            cluster_dir: &book.record.dir,
            first_cpu: Some(rank * allocation.cores),
            allocation,
            accel: self.wanted.accel,
            authorized_key: &key.openssh_public,
            host_keys,
            nonce,
        };
        let nonce = random()?;
        let nics_of = |rank: u32| {
            let found = nics.iter().find(|(of, _)| *of == rank);
            found.map(|(_, nics)| nics.clone()).unwrap_or_default()
        };
        let spec = |vm: &VmBlueprint| vm.spec(&job(vm.rank, nonce), nics_of(vm.rank));
        self.wanted.blueprint.vms.iter().map(spec).collect()
    }

    fn start_cell(&mut self, book: &Book, handed: Vec<OwnedFd>) -> Result<()> {
        let doing = || "starting the cell".to_owned();
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().while_doing(doing)?;
        // It fits into the socket's buffer, and stays there if we die now.
        let guard = line(&Order::Guard(self.files(book)));
        ours.write_all(guard.as_bytes()).while_doing(doing)?;
        ours.set_nonblocking(true).while_doing(doing)?;
        let mut command = program::again();
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
    async fn news(&mut self, dir: &Path) -> Result<News> {
        let Some(cell) = self.cell.as_mut() else { return Err(Error::bug("there is no cell")) };
        let pasta = self.pasta.as_mut();
        let line = tokio::select! {
            // What it said comes before that it is gone.
            biased;
            line = cell.news.next_line() => line,
            status = pasta::ended(pasta) => return Err(pasta::error(&status, dir)),
            // What is inside lives on; it is told to stop at the end.
            _ = cell.process.wait() => return Err(cell_died()),
        };
        match line {
            Ok(Some(line)) => serde_json::from_str(&line)
                .map_err(|error| Error::bug(format!("not news of the cell: {error}"))),
            Ok(None) | Err(_) => Err(cell_died()),
        }
    }

    async fn first_process(&mut self, book: &Book) -> Result<u32> {
        match timeout(SET_UP_LIMIT, self.news(&book.record.dir)).await {
            Ok(Ok(News::Created { pid })) => Ok(pid),
            Ok(Ok(other)) => Err(unexpected(other)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::system("the cell has not started after 30 s").help(BUSY)),
        }
        .while_doing(|| "making the cluster's namespaces".into())
    }

    async fn until_ready(&mut self, book: &Book) -> Result<()> {
        let ready = match timeout(SET_UP_LIMIT, self.news(&book.record.dir)).await {
            Ok(Ok(News::Ready)) => Ok(()),
            Ok(Ok(other)) => Err(unexpected(other)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::system("it is not ready after 30 s").help(BUSY)),
        };
        ready.while_doing(|| "setting up the cluster's network".into())
    }

    /// The next report of a VM. Safe to drop.
    pub async fn next(&mut self, dir: &Path) -> Result<VmReport> {
        match self.news(dir).await? {
            News::Vm(report) => Ok(report),
            other => Err(unexpected(other)),
        }
    }

    /// Ends the cluster, whatever state it is in, and removes all of it. Guests may shut
    /// down for `grace` first.
    pub async fn end(mut self, book: &Book, grace: Duration) -> Result<()> {
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
            journal.undo(book.record.owner, &Host::new(cleanup::NETNS_DIR.into())).await
        };
        cleanup::remove(&self.files(book)).await?;
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
