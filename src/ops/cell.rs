//! The cell: the processes of a job on this host, held by one first process.
//!
//! [`outer`] makes the namespaces and waits; [`init`] is the first process inside
//! (pid 1 of a PID namespace), so that the kernel ends everything in the cell when
//! it ends. As an ordinary user the cell is a user, network and mount namespace
//! too; as root it stays in the host's network, and what it changes there is undone
//! from the journal.
//!
//! Order of operations inside: close every descriptor to children · read what the job's
//! files will be, before there is one · read the set-up · apply the network plan · start
//! the responders · say ready · start VMs on demand · at the end stop them, end
//! everything, undo the plan. If the launcher is gone (its end of the socket closes), at
//! whatever point, all that happens at once. In any case the last thing is to wait until
//! the launcher hangs up, which it does when it has removed the job's files and record, and
//! to remove what is left of them: it may be killed while it ends the job, too.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

use super::children::{
    START_ANEW, failed, hand_over, start_responder, start_vm, tell_end, waited_for,
};
use super::cleanup::{JobFiles, remove};
use super::dial;
use super::program;
use crate::error::{Context, Error, Result, WireError};
use crate::host::Host;
use crate::host::journal::{Journal, Plan};
use crate::host::netns;
use crate::model::job::VmReport;
use crate::model::vm::VmSpec;
use crate::network::responder;
use crate::vm::machine::Stop;
use crate::vm::process::stop_line;

/// How long pasta may take until its link is there.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long VM processes may take to end their QEMUs once told to, before all is killed.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// What the launcher tells the cell, one JSON value a line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// What to remove should the launcher die. It comes first, before anything of it exists.
    Guard(JobFiles),
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
        program::again()
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
    let Some(Order::Guard(files)) = next_order(&mut orders).await? else { return Ok(()) };
    let outcome = match next_order(&mut orders).await {
        Ok(Some(Order::SetUp(set_up))) => work(set_up, &files.dir, write, &mut orders).await,
        early => {
            // An order this early can only be to stop; the launcher's end is one, too.
            drop(write);
            early.map(drop)
        }
    };
    if let Err(error) = &outcome {
        tracing::warn!("{error:?}");
    }
    while let Ok(Some(_)) = orders.next_line().await {}
    remove(&files).await.and(outcome)
}

/// From the first change to the kernel's state to the last process's end. `dir` is the
/// job's.
async fn work(
    set_up: Box<SetUp>,
    dir: &Path,
    write: OwnedWriteHalf,
    orders: &mut Lines<BufReader<OwnedReadHalf>>,
) -> Result<()> {
    let (reports, inbox) = mpsc::channel(64);
    let (lost, mut losses) = mpsc::channel(1);
    let (vms, responders) = (BTreeMap::new(), Vec::new());
    let mut cell = Cell { set_up, write, reports, vms, responders, lost };
    let prepared = match cell.build(dir).await {
        Ok(()) => tokio::select! {
            connected = cell.connect(dir) => Some(connected),
            // Again, to stop.
            _ = next_order(orders) => None,
        },
        Err(error) => Some(Err(error)),
    };
    let outcome = match prepared {
        Some(Ok(())) => cell.serve(orders, inbox, &mut losses).await,
        Some(Err(error)) => {
            cell.tell(&News::Failed(error.to_wire())).await;
            Ok(())
        }
        None => Ok(()),
    };
    cell.end(dir).await.and(outcome)
}

/// Lets what this process and its children have to say go to a file of the job.
fn write_to_log(dir: &Path) -> Result<()> {
    let log = std::fs::File::create(dir.join("cell.log"));
    let log = log.while_doing(|| "creating the cell's log".into())?;
    nix::unistd::dup2_stderr(&log).while_doing(|| "writing to the cell's log".into())
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

    /// Makes what the kernel is to hold. It takes milliseconds, and is not safe to drop:
    /// what is half done could not be undone.
    async fn build(&mut self, dir: &Path) -> Result<()> {
        write_to_log(dir)?;
        let journal = Journal::open(&self.set_up.journal_dir)?;
        journal.apply(&self.set_up.plan, &self.host()).await
    }

    /// Starts the responders and waits for the way out. Safe to drop.
    async fn connect(&mut self, dir: &Path) -> Result<()> {
        for mut spec in std::mem::take(&mut self.set_up.responders) {
            let mut inherited = hand_over(&mut spec)?;
            inherited.push(dial::listen(dir, &mut spec, None)?);
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
                        return tokio::select! {
                            () = self.stop_vms(&mut inbox, grace_seconds) => Ok(()),
                            // The launcher is gone: nobody waits for them any more.
                            _ = next_order(orders) => Ok(()),
                        };
                    }
                    Some(Order::Guard(_) | Order::SetUp(_)) => {
                        return Err(Error::bug("a second set-up"));
                    }
                    None => return Ok(()),
                },
                Some(report) = inbox.recv() => self.pass_on(report).await,
                Some(network) = losses.recv() => {
                    let error = Error::system(format!(
                        "the DHCP and DNS responder of network `{network}` has ended"
                    ))
                    .help(START_ANEW);
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

    /// Ends every process of the cell and undoes the network.
    async fn end(&mut self, dir: &Path) -> Result<()> {
        self.responders.clear();
        // From pid 1, this is every process of the PID namespace but itself.
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        let journal = Journal::open(&self.set_up.journal_dir)?;
        let undone = journal.undo(self.set_up.plan.owner, &self.host()).await;
        // As root the folder is the host's, and not among the job's files.
        if self.set_up.netns_dir.starts_with(dir) {
            netns::forget_all(&self.set_up.netns_dir)?;
        }
        self.tell(&News::Ended).await;
        undone
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
