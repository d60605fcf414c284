//! The cell: the processes of a job on this host, held by one first process.
//!
//! [`outer`] makes the namespaces and waits; [`init`] is the first process inside
//! (pid 1 of a PID namespace), so that the kernel ends everything in the cell when
//! it ends. As an ordinary user the cell is a user, network and mount namespace
//! too; as root it stays in the host's network, and what it changes there is undone
//! from the journal.
//!
//! Order of operations inside: close every descriptor to children · read the set-up ·
//! apply the network plan · start the responders · say ready · start VMs on demand ·
//! at the end stop them, end everything, undo the plan. If the launcher is gone (its
//! end of the socket closes), all that happens at once, and the job's files and record
//! are removed from here.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::cleanup::{JobFiles, remove};
use crate::error::{Context, Error, Result, WireError};
use crate::host::Host;
use crate::host::journal::{Journal, Plan};
use crate::host::spawn::{die_with_parent, inherit};
use crate::model::job::{VmReport, VmState};
use crate::model::vm::VmSpec;
use crate::network::responder;
use crate::vm::machine::Stop;
use crate::vm::process::stop_line;

/// How long a responder may take until it is ready, and pasta until its link is there.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long VM processes may take to end their QEMUs once told to, before all is killed.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// What the launcher tells the cell, one JSON value a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    SetUp(Box<SetUp>),
    /// Start these VMs.
    Start(Vec<VmSpec>),
    /// End all VMs; the guests may shut down for `grace_seconds` first.
    Stop {
        grace_seconds: u64,
    },
}

/// Everything the cell needs before VMs can start.
#[derive(Debug, Serialize, Deserialize)]
pub struct SetUp {
    pub plan: Plan,
    /// Where network namespaces are named.
    pub netns_dir: PathBuf,
    pub journal_dir: PathBuf,
    pub responders: Vec<responder::Spec>,
    /// The link that must appear before there is a way out.
    pub uplink: Option<String>,
    /// What to remove should the launcher die.
    pub files: JobFiles,
}

/// What the cell tells the launcher, one JSON value a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum News {
    /// The namespaces exist; their first process, as the launcher sees it.
    Created { pid: u32 },
    /// The network stands and the responders answer.
    Ready,
    /// A VM's process reported.
    Vm(VmReport),
    /// All VMs have ended and the network is gone.
    Ended,
    /// It could not be done; everything is undone.
    Failed(WireError),
}

/// `pavo internal cell`: makes the namespaces, starts the first process in them with
/// the same standard input, and ends with it.
pub fn outer(rootless: bool) -> Result<()> {
    let control = std::io::stdin().as_fd().try_clone_to_owned();
    let control = control.while_doing(|| "opening the launcher's socket".into())?;
    let mut control = StdUnixStream::from(control);
    let made = if rootless { enter_user_namespace() } else { new_pid_namespace() };
    let first = made.and_then(|()| {
        let exe = std::env::current_exe().while_doing(|| "finding this program".into())?;
        Command::new(exe)
            .args(["internal", "cell-init"])
            .spawn()
            .while_doing(|| "starting the cell's first process".into())
    });
    let news = match &first {
        Ok(child) => News::Created { pid: child.id() },
        Err(error) => News::Failed(error.to_wire()),
    };
    let line = serde_json::to_string(&news).expect("news are always valid JSON") + "\n";
    // If nobody is there to tell, the first process sees the same and ends.
    let _ = control.write_all(line.as_bytes());
    drop(control);
    let mut first = first?;
    first.wait().while_doing(|| "waiting for the cell".into())?;
    Ok(())
}

fn enter_user_namespace() -> Result<()> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let all = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID;
    unshare(all).while_doing(|| "making a user namespace".into()).map_err(|error| {
        error.help(
            "user namespaces are off here: `sysctl user.max_user_namespaces`, \
             `kernel.unprivileged_userns_clone` and AppArmor decide (ask your administrator)",
        )
    })?;
    let write = |file: &str, text: String| {
        std::fs::write(format!("/proc/self/{file}"), text)
            .while_doing(|| format!("writing `/proc/self/{file}`"))
    };
    write("setgroups", "deny".into())?;
    write("uid_map", format!("0 {uid} 1"))?;
    write("gid_map", format!("0 {gid} 1"))
}

fn new_pid_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWPID).while_doing(|| "making a PID namespace".into())
}

/// `pavo internal cell-init`: the first process of the cell.
pub async fn init() -> Result<()> {
    keep_descriptors_from_children()?;
    let control = std::io::stdin().as_fd().try_clone_to_owned();
    let control = control.while_doing(|| "opening the launcher's socket".into())?;
    let stream = StdUnixStream::from(control);
    let (read, write) = waited_for(stream)?.into_split();
    let mut orders = BufReader::new(read).lines();
    let Some(Order::SetUp(set_up)) = next_order(&mut orders).await? else { return Ok(()) };

    let (reports, inbox) = mpsc::channel(64);
    let (lost, mut losses) = mpsc::channel(1);
    let (vms, responders) = (BTreeMap::new(), Vec::new());
    let mut cell = Cell { set_up, write, reports, vms, responders, lost };
    let outcome = match cell.prepare().await {
        Ok(()) => cell.serve(&mut orders, inbox, &mut losses).await,
        Err(error) => {
            cell.tell(&News::Failed(error.to_wire())).await;
            cell.end(false).await
        }
    };
    if let Err(error) = &outcome {
        tracing::warn!("{error:?}");
    }
    outcome
}

/// Every descriptor but the first three is for the responders, which are given
/// theirs by name; QEMU gets none of them.
fn keep_descriptors_from_children() -> Result<()> {
    let doing = || "closing descriptors to children".to_owned();
    for entry in std::fs::read_dir("/proc/self/fd").while_doing(doing)? {
        let name = entry.while_doing(doing)?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if number > 2 {
            #[expect(unsafe_code)]
            // SAFETY: the number was just read from our own table of descriptors; it is
            // borrowed for one fcntl, which fails harmlessly if it is closed by now.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            let _ = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
        }
    }
    Ok(())
}

async fn next_order(orders: &mut Lines<BufReader<OwnedReadHalf>>) -> Result<Option<Order>> {
    let line = match orders.next_line().await {
        Ok(Some(line)) => line,
        // A launcher that was killed may leave a reset instead of an end-of-file.
        Ok(None) | Err(_) => return Ok(None),
    };
    serde_json::from_str(&line)
        .map(Some)
        .map_err(|error| Error::bug(format!("not an order of the launcher: {error}")))
}

/// A VM's process, as the cell sees it.
struct VmProcess {
    /// Its standard input: orders out, and its life line.
    write: OwnedWriteHalf,
    over: bool,
}

struct Cell {
    set_up: Box<SetUp>,
    write: OwnedWriteHalf,
    reports: mpsc::Sender<VmReport>,
    vms: BTreeMap<u32, VmProcess>,
    /// Their life lines.
    responders: Vec<OwnedWriteHalf>,
    /// Told the network whose responder has ended.
    lost: mpsc::Sender<String>,
}

impl Cell {
    fn host(&self) -> Host {
        Host::new(self.set_up.netns_dir.clone())
    }

    async fn prepare(&mut self) -> Result<()> {
        let journal = Journal::open(&self.set_up.journal_dir)?;
        journal.apply(&self.set_up.plan, &self.host()).await?;
        for mut spec in std::mem::take(&mut self.set_up.responders) {
            let inherited = hand_over(&mut spec)?;
            let (read, write) = start_responder(&spec, inherited).await?.into_split();
            self.responders.push(write);
            tokio::spawn(tell_end(read, spec.network, self.lost.clone()));
        }
        if let Some(link) = &self.set_up.uplink {
            wait_for_link(link).await?;
        }
        Ok(())
    }

    async fn serve(
        &mut self,
        orders: &mut Lines<BufReader<OwnedReadHalf>>,
        mut inbox: mpsc::Receiver<VmReport>,
        losses: &mut mpsc::Receiver<String>,
    ) -> Result<()> {
        self.tell(&News::Ready).await;
        loop {
            tokio::select! {
                order = next_order(orders) => match order? {
                    Some(Order::Start(specs)) => self.start(specs),
                    Some(Order::Stop { grace_seconds }) => {
                        self.stop_vms(&mut inbox, grace_seconds).await;
                        return self.end(false).await;
                    }
                    Some(Order::SetUp(_)) => return Err(Error::bug("a second set-up")),
                    None => return self.end(true).await,
                },
                Some(report) = inbox.recv() => self.pass_on(report).await,
                Some(network) = losses.recv() => {
                    let error = Error::system(format!(
                        "the DHCP and DNS responder of network `{network}` has ended"
                    ));
                    self.tell(&News::Failed(error.to_wire())).await;
                }
            }
        }
    }

    fn start(&mut self, specs: Vec<VmSpec>) {
        for spec in specs {
            match start_vm(&spec, self.reports.clone()) {
                Ok(write) => {
                    self.vms.insert(spec.rank, VmProcess { write, over: false });
                }
                Err(error) => {
                    let report = failed(spec.rank, &error);
                    let reports = self.reports.clone();
                    tokio::spawn(async move { reports.send(report).await });
                }
            }
        }
    }

    async fn pass_on(&mut self, report: VmReport) {
        if let Some(vm) = self.vms.get_mut(&report.rank) {
            // Its process may end after its last word: that is no second end.
            if vm.over {
                return;
            }
            vm.over = report.state.is_over();
        }
        self.tell(&News::Vm(report)).await;
    }

    async fn tell(&mut self, news: &News) {
        let line = serde_json::to_string(news).expect("news are always valid JSON") + "\n";
        // A launcher that is gone is noticed by the end-of-file on its socket.
        let _ = self.write.write_all(line.as_bytes()).await;
    }

    /// Tells every VM process to end and waits for their last words.
    async fn stop_vms(&mut self, inbox: &mut mpsc::Receiver<VmReport>, grace_seconds: u64) {
        let stop = match grace_seconds {
            0 => Stop::Now,
            seconds => Stop::Graceful { deadline: Duration::from_secs(seconds) },
        };
        for vm in self.vms.values_mut().filter(|vm| !vm.over) {
            let _ = vm.write.write_all(stop_line(stop).as_bytes()).await;
        }
        let deadline = Instant::now() + STOP_LIMIT + Duration::from_secs(grace_seconds);
        while self.vms.values().any(|vm| !vm.over) {
            match timeout_at(deadline, inbox.recv()).await {
                Ok(Some(report)) => self.pass_on(report).await,
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Ends every process of the cell and undoes the network; if the launcher is gone,
    /// removes what it would have removed.
    async fn end(&mut self, launcher_is_gone: bool) -> Result<()> {
        self.responders.clear();
        // From pid 1, this is every process of the PID namespace but itself.
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        let journal = Journal::open(&self.set_up.journal_dir)?;
        let undone = journal.undo(self.set_up.plan.owner, &self.host()).await;
        if launcher_is_gone {
            remove(&self.set_up.files).await?;
        } else {
            self.tell(&News::Ended).await;
        }
        undone
    }
}

fn failed(rank: u32, error: &Error) -> VmReport {
    VmReport {
        rank,
        state: VmState::Failed,
        detail: error.to_string(),
        error: Some(error.to_wire()),
    }
}

/// A `pavo internal VERB` with one end of a new socket as its standard input.
fn child(verb: &str, inherited: Vec<OwnedFd>) -> Result<(Command, StdUnixStream)> {
    let exe = std::env::current_exe().while_doing(|| "finding this program".into())?;
    let (ours, theirs) =
        StdUnixStream::pair().while_doing(|| format!("making a socket for `internal {verb}`"))?;
    let mut command = Command::new(exe);
    command.args(["internal", verb]).stdin(Stdio::from(OwnedFd::from(theirs)));
    die_with_parent(&mut command);
    inherit(&mut command, inherited);
    Ok((command, ours))
}

/// A socket that the runtime waits for.
fn waited_for(stream: StdUnixStream) -> Result<UnixStream> {
    let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
    stream.while_doing(|| "waiting for a socket".into())
}

/// Sends `network` once a responder's end of its socket has closed.
async fn tell_end(mut read: OwnedReadHalf, network: String, lost: mpsc::Sender<String>) {
    let mut ignored = [0; 64];
    while !matches!(read.read(&mut ignored).await, Ok(0) | Err(_)) {}
    // At the end of the cell nobody listens any more.
    let _ = lost.send(network).await;
}

/// Copies of the descriptors a responder is to inherit; the specification names the
/// copies from then on. Several responders may share one.
fn hand_over(spec: &mut responder::Spec) -> Result<Vec<OwnedFd>> {
    let mut copies = Vec::new();
    let listeners = spec.publish.iter_mut().map(|port| &mut port.listener);
    for number in spec.upstream.iter_mut().chain(listeners) {
        #[expect(unsafe_code)]
        // SAFETY: the launcher opened it for us, and nothing here closes it; it is borrowed
        // for one call, which fails if the number is wrong.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        let copy =
            fd.try_clone_to_owned().while_doing(|| "taking the launcher's sockets".into())?;
        *number = copy.as_raw_fd();
        copies.push(copy);
    }
    Ok(copies)
}

async fn start_responder(spec: &responder::Spec, inherited: Vec<OwnedFd>) -> Result<UnixStream> {
    let doing = || format!("starting the DHCP and DNS responder of network `{}`", spec.network);
    let (mut command, stream) = child("responder", inherited)?;
    command.spawn().while_doing(doing)?;
    drop(command);
    let mut stream = waited_for(stream)?;
    let ready = async {
        let line = serde_json::to_string(spec).expect("a specification is valid JSON") + "\n";
        stream.write_all(line.as_bytes()).await?;
        let mut answer = String::new();
        BufReader::new(&mut stream).read_line(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = match timeout(READY_LIMIT, ready).await {
        Ok(answer) => answer.while_doing(doing)?,
        Err(_) => return Err(Error::system("it is not ready after 10 s")).while_doing(doing),
    };
    match serde_json::from_str::<responder::Answer>(&answer) {
        Ok(responder::Answer::Ready(_)) => Ok(stream),
        Ok(responder::Answer::Error(error)) => Err(Error::from(error)).while_doing(doing),
        Err(_) => Err(Error::system("it ended without a word")).while_doing(doing),
    }
}

/// Starts a VM's process; its reports go to `reports`, and if it ends without a last
/// word, that is reported too.
fn start_vm(spec: &VmSpec, reports: mpsc::Sender<VmReport>) -> Result<OwnedWriteHalf> {
    let doing = || format!("starting the process of {}", spec.name());
    let (mut command, mut stream) = child("run", Vec::new())?;
    let process = command.spawn().while_doing(doing)?;
    drop(command);
    let line = serde_json::to_string(spec).expect("a specification is valid JSON") + "\n";
    // Blocks at most until the process reads, and only if the user-data is very long.
    stream
        .set_write_timeout(Some(READY_LIMIT))
        .and_then(|()| stream.write_all(line.as_bytes()))
        .while_doing(doing)?;
    let (read, write) = waited_for(stream)?.into_split();
    let (rank, pid) = (spec.rank, process.id());
    tokio::spawn(async move {
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Ok(report) = serde_json::from_str::<VmReport>(&line) {
                if reports.send(VmReport { rank, ..report }).await.is_err() {
                    return;
                }
            }
        }
        let status = reap(process);
        let error = Error::system(format!("its process ({pid}) ended: {status}"))
            .help(format!("see `pavo console -l vm{rank}` while the cluster lasts"));
        let _ = reports.send(failed(rank, &error)).await;
    });
    Ok(write)
}

/// Its socket is closed, so it has ended or is about to.
fn reap(mut process: std::process::Child) -> String {
    match process.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

/// Waits until a link of this name exists. The kernel could tell by netlink; it takes
/// some 20 ms, once per cluster.
async fn wait_for_link(name: &str) -> Result<()> {
    let wanted = format!("{name}:");
    let deadline = Instant::now() + READY_LIMIT;
    while Instant::now() < deadline {
        let links = std::fs::read_to_string("/proc/self/net/dev")
            .while_doing(|| "reading `/proc/self/net/dev`".into())?;
        if links.lines().any(|line| line.trim_start().starts_with(&wanted)) {
            return Ok(());
        }
        sleep(Duration::from_millis(2)).await;
    }
    Err(Error::system(format!("pasta has not made its link `{name}` after 10 s"))
        .help("try `pasta --config-net true` by hand; its package is `passt`"))
}
