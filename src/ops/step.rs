//! A cluster as a step of a Slurm job: one task for each VM, on as many hosts as it takes.
//!
//! ```text
//! launcher ── srun --vm=… ── slurmstepd ─┬─ pavo internal task vm0 ── QEMU
//!    │  │ environment: sealed letter     └─ pavo internal task vm1 ── QEMU
//!    │  └ standard input: bootstrap,              │
//!    │    then the life line                      │
//!    └───────────────── TLS ──────────────────────┘  hello, spec, reports, stop
//! ```
//!
//! What srun sends can be read on the network. The cluster's identity is in the letter, which
//! only root on the hosts opens; where the site has no key to seal with, in the bootstrap.
//!
//! The launcher knows a VM's interfaces and host only from the task's hello; root's side
//! made them. Should the launcher die, its end of the life line closes, and every task
//! ends its VM.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::book::{Book, JobDir};
use super::children::failed;
use super::cleanup;
use super::complaints::{Complaints, Ended, REPORT_TIME};
use super::drives::Gate;
use super::reach::IDENTITY;
use super::resolve::Blueprint;
use super::srun;
use super::ssh;
use crate::batch::local::Allocation;
use crate::error::{Context, Error, Result};
use crate::host::crash;
use crate::host::file::write_atomically;
use crate::host::limits::raise_open_files;
use crate::model::job::VmReport;
use crate::model::vm::HostKey;
use crate::store::Store;
use crate::vm::channel::{Identity, Listener};
use crate::vm::link::{self, Bootstrap, Hello, ToLauncher, ToTask, Wish};
use crate::vm::machine::Stop;

mod welcome;

/// How long tasks may take to end beyond their guests' grace.
const END_LIMIT: Duration = Duration::from_secs(8);

/// Logs the person in to the site's store; called once a host has introduced them.
pub type LogIn =
    Box<dyn Fn() -> futures_util::future::BoxFuture<'static, Result<Arc<dyn Store>>> + Send + Sync>;

/// What is asked of the step.
pub struct Wanted {
    pub blueprint: Blueprint,
    /// The options and the program of the srun.
    pub srun: Vec<String>,
    /// What makes a process a member of the cluster.
    pub identity: Identity,
    /// That, and the person's secret, sealed to root on the hosts. None where the site has no
    /// store: nor has it a key then.
    pub sealed: Option<String>,
    /// None where the site has no store.
    pub log_in: Option<LogIn>,
}

impl std::fmt::Debug for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "step of {}", self.blueprint.definition)
    }
}

/// What comes in from tasks, srun and the store.
enum News {
    Hello(Box<Hello>, mpsc::Sender<ToTask>),
    Report(VmReport),
    Trouble(u32, Error),
    /// A task's connection has ended.
    Gone(u32),
    /// A line of srun's standard error.
    Said(String),
    Store(Result<Arc<dyn Store>>),
}

/// The step's side of a cluster, from its first process to its last.
pub struct Step {
    wanted: Wanted,
    dir: Option<JobDir>,
    keys: Option<(HostKey, Vec<HostKey>)>,
    srun: Option<Child>,
    life_line: Option<ChildStdin>,
    tasks: BTreeMap<u32, mpsc::Sender<ToTask>>,
    /// The ranks that have said hello, each once.
    met: BTreeSet<u32>,
    news: mpsc::Receiver<News>,
    tell: mpsc::Sender<News>,
    complaints: Complaints,
    /// What the scheduler has said of its end, for who waits for that.
    word: watch::Sender<Option<Ended>>,
    /// Tasks whose connection has ended, and when the rest of what they said is here.
    gone: VecDeque<(Instant, u32)>,
    logging_in: bool,
    /// Where nothing has been written yet.
    store: Option<Arc<dyn Store>>,
    drives: Gate<(Hello, mpsc::Sender<ToTask>)>,
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Step")
    }
}

impl Step {
    /// Nothing exists yet.
    pub fn new(wanted: Wanted) -> Self {
        let (tell, news) = mpsc::channel(256);
        Self {
            wanted,
            dir: None,
            keys: None,
            srun: None,
            life_line: None,
            tasks: BTreeMap::new(),
            met: BTreeSet::new(),
            news,
            tell,
            complaints: Complaints::default(),
            word: watch::Sender::new(None),
            gone: VecDeque::new(),
            logging_in: false,
            store: None,
            drives: Gate::default(),
        }
    }

    /// The record's VMs as far as they are known before anything exists.
    pub fn describe(&self, book: &mut Book) {
        let nothing = Allocation { cores: 0, memory_mib: 0 };
        let vms = self.wanted.blueprint.vms.iter().map(|vm| vm.record(&nothing, ""));
        book.describe(vms.collect());
    }

    /// Starts the step. Its tasks come by themselves.
    pub async fn start(&mut self, book: &mut Book) -> Result<()> {
        cleanup::sweep_dirs(&book.record.dir);
        self.dir = Some(JobDir::make(&book.record.dir)?);
        crash::point("launch.begin")?;
        let identity = self.wanted.identity.clone();
        let known = self.wanted.blueprint.known.as_ref();
        self.keys = Some(ssh::keys(book.record.owner.job, &book.record.vms, known)?);
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let listener = Listener::bind(any, &identity)?;
        let port = listener.address()?.port();
        let addresses = own_addresses()?.into_iter().map(|address| (address, port).into());
        // For commands on this host.
        let text = serde_json::to_vec(&identity).expect("an identity is always valid JSON");
        write_atomically(&book.record.dir.join(IDENTITY), &text, 0o600)?;
        let unsealed = self.wanted.sealed.is_none().then_some(identity);
        let bootstrap = Bootstrap::new(addresses.collect(), unsealed);
        // A connection for each task.
        raise_open_files();
        tokio::spawn(accept(listener, self.tell.clone()));
        crash::point("launch.listening")?;
        self.start_srun(&bootstrap).await
    }

    async fn start_srun(&mut self, bootstrap: &Bootstrap) -> Result<()> {
        let doing = || "starting the step of the VMs with srun".to_owned();
        let mut command = tokio::process::Command::new("srun");
        command.args(&self.wanted.srun);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        // A group of its own: Ctrl-C at the terminal is the launcher's to deal with.
        command.process_group(0);
        // It is ciphertext to everybody but root on the hosts.
        command.envs(self.wanted.sealed.iter().map(|sealed| ("PAVO_SEALED", sealed)));
        let mut srun = command.spawn().while_doing(doing)?;
        let mut stdin = srun.stdin.take().ok_or_else(|| Error::bug("srun has no input"))?;
        let stderr = srun.stderr.take().ok_or_else(|| Error::bug("srun has no errors"))?;
        tokio::spawn(srun::listen(stderr, self.tell.clone(), News::Said));
        self.srun = Some(srun);
        crash::point("launch.srun")?;
        stdin.write_all(bootstrap.line().as_bytes()).await.while_doing(doing)?;
        self.life_line = Some(stdin);
        crash::point("launch.bootstrap")
    }

    /// Waits for the next news of a VM and records it; returns its rank. Safe to drop.
    pub async fn next(&mut self, book: &mut Book) -> Result<u32> {
        loop {
            if let Some(rank) = self.let_in(book).await? {
                return Ok(rank);
            }
            let again = self.drives.again();
            let srun = self.srun.as_mut().ok_or_else(|| Error::bug("there is no step"))?;
            let news = tokio::select! {
                // What was said comes before that it is over.
                biased;
                Some(news) = self.news.recv() => news,
                () = book.due() => {
                    book.flush().await?;
                    continue;
                }
                error = self.drives.lost() => return Err(error),
                () = until(again) => continue,
                () = self.complaints.due() => {
                    match self.complaints.verdict(&self.met) {
                        Some(error) => return Err(error),
                        None => continue,
                    }
                }
                rank = due(self.gone.front()) => {
                    self.gone.pop_front();
                    match self.lost(book, rank) {
                        Some(report) => return book.report(report).await,
                        None => continue,
                    }
                }
                status = srun.wait() => {
                    let status = status.while_doing(|| "waiting for srun".into())?;
                    let report = self.ended_early(book, status).await?;
                    return book.report(report).await;
                }
            };
            match news {
                News::Hello(hello, orders) => {
                    if let Some(rank) = self.greet(book, *hello, orders).await? {
                        return Ok(rank);
                    }
                }
                News::Report(report) => return book.report(report).await,
                News::Trouble(rank, error) => book.trouble(rank, &error),
                News::Gone(rank) => self.gone.push_back((Instant::now() + REPORT_TIME, rank)),
                News::Said(line) => {
                    self.complaints.hear(&line, &self.met);
                    self.word.send_replace(self.complaints.ended());
                }
                // Kept until it is done: who waits for news may be interrupted.
                News::Store(store) => self.store = Some(store?),
            }
        }
    }

    /// The last report of a VM whose task has ended without one.
    fn lost(&mut self, book: &Book, rank: u32) -> Option<VmReport> {
        self.tasks.remove(&rank)?;
        let at = rank as usize;
        if book.states.get(at)?.state.is_over() {
            return None;
        }
        if let Some(error) = self.complaints.end_of(rank) {
            return Some(failed(rank, &error));
        }
        let host = &book.record.vms.get(at)?.host;
        let error = Error::system(format!("the connection to its process on `{host}` has ended"))
            .help("was the host lost, or is its memory short? `scontrol show node`, `dmesg` there");
        Some(failed(rank, &error))
    }

    /// The VM because of which srun has ended although VMs have not.
    ///
    /// # Errors
    /// The reason, where it is none of a VM.
    async fn ended_early(&mut self, book: &Book, status: ExitStatus) -> Result<VmReport> {
        // Its last words may still be on their way.
        let end = Instant::now() + REPORT_TIME;
        while let Ok(Some(news)) = tokio::time::timeout_at(end, self.news.recv()).await {
            match news {
                News::Said(line) => self.complaints.hear(&line, &self.met),
                News::Gone(rank) => self.gone.push_back((end, rank)),
                _ => {}
            }
        }
        if let Some(error) = self.complaints.verdict(&self.met) {
            return Err(error);
        }
        while let Some((_, rank)) = self.gone.pop_front() {
            if let Some(report) = self.lost(book, rank) {
                return Ok(report);
            }
        }
        Err(self.complaints.error(status))
    }

    /// Why Slurm ends the step, if it has said so.
    pub fn ended(&self) -> Option<Ended> {
        self.complaints.ended()
    }

    /// The same, as soon as it is heard.
    pub fn word(&self) -> watch::Receiver<Option<Ended>> {
        self.word.subscribe()
    }

    /// Ends the step and removes what the launcher made.
    pub async fn end(mut self, book: &Book, grace: Duration) -> Result<()> {
        crash::point("launch.end")?;
        let stop = match grace {
            Duration::ZERO => Stop::Now,
            deadline => Stop::Graceful { deadline },
        };
        // Those have no guest that could shut down.
        self.drives.dismiss();
        for orders in self.tasks.values() {
            let _ = orders.try_send(ToTask::Stop(Wish::from(stop)));
        }
        // Slurm gives us less time than a guest may take: our files must not stay. Whoever
        // looks at jobs next removes a record that does.
        let removed = cleanup::remove_dir(&book.record.dir);
        crash::point("launch.removed")?;
        if let Some(mut srun) = self.srun.take() {
            let deadline = Instant::now() + grace + END_LIMIT;
            if grace.is_zero() {
                self.life_line = None;
            }
            let ended = srun::ended(&mut srun, &mut self.news);
            if tokio::time::timeout_at(deadline, ended).await.is_err() {
                self.life_line = None;
                srun::end(&mut srun, &mut self.news).await;
            }
        }
        crash::point("launch.stopped")?;
        removed?;
        self.drives.release().await;
        // The store may be away, and the user's next command forgets it as well.
        if let Err(error) = book.forget().await {
            tracing::warn!("{}", error.report());
        }
        Ok(())
    }
}

/// Pending while there is no such moment.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Waits for the moment of the first that is gone; pending while there is none.
async fn due(first: Option<&(Instant, u32)>) -> u32 {
    match first {
        Some((moment, rank)) => {
            sleep_until(*moment).await;
            *rank
        }
        None => std::future::pending().await,
    }
}

/// Takes connections until the launcher ends.
async fn accept(mut listener: Listener, tell: mpsc::Sender<News>) {
    loop {
        let stream = listener.accept().await;
        tokio::spawn(converse(stream, tell.clone()));
    }
}

/// One task's connection.
async fn converse(stream: crate::vm::channel::Stream, tell: mpsc::Sender<News>) {
    let (hello, mut sender, mut receiver) = match link::greet(stream).await {
        Ok(greeted) => greeted,
        Err(error) => return tracing::warn!("{}", error.report()),
    };
    let rank = hello.rank;
    let (orders, mut inbox) = mpsc::channel::<ToTask>(8);
    if tell.send(News::Hello(Box::new(hello), orders)).await.is_err() {
        return;
    }
    // Until it is told what it is to be, it has nothing to say.
    loop {
        match inbox.recv().await {
            None => return,
            Some(ToTask::Refused { error }) => return link::refuse(sender, &error.into()).await,
            Some(order) => {
                if sender.send(&order).await.is_err() {
                    return drop(tell.send(News::Gone(rank)).await);
                }
                if order != ToTask::Wait {
                    break;
                }
            }
        }
    }
    loop {
        tokio::select! {
            message = receiver.receive::<ToLauncher>() => match message {
                Ok(Some(ToLauncher::Report(report))) => {
                    // Its rank is the connection's, whatever it says.
                    if tell.send(News::Report(VmReport { rank, ..report })).await.is_err() {
                        return;
                    }
                }
                Ok(Some(ToLauncher::Trouble(error))) => {
                    let _ = tell.send(News::Trouble(rank, error.into())).await;
                }
                Ok(Some(ToLauncher::Hello(_)) | None) | Err(_) => break,
            },
            Some(order) = inbox.recv() => {
                if sender.send(&order).await.is_err() {
                    break;
                }
            }
        }
    }
    let _ = tell.send(News::Gone(rank)).await;
}

/// Addresses of this host by which others may reach it; loopback last.
fn own_addresses() -> Result<Vec<Ipv4Addr>> {
    let all = nix::ifaddrs::getifaddrs().while_doing(|| "listing this host's addresses".into())?;
    let mut addresses: Vec<Ipv4Addr> =
        all.filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip())).collect();
    addresses.sort_by_key(|address| address.is_loopback());
    addresses.dedup();
    Ok(addresses)
}
