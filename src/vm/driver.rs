//! Runs one VM, from its resolved description to its end.
//!
//! One loop: what happens (QEMU's events, its exit, a wish to stop, a deadline)
//! goes through [`machine::on`], and the actions that come out are carried out
//! here. Nothing is polled; a VM at rest wakes nobody.

use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::args::{self, Wiring};
use super::console::Console;
use super::machine::{self, Action, Event, State, Stop};
use super::stderr::Stderr;
use super::{control, overlay, qmp, seed};
use crate::error::{Context, Error, Result};
use crate::host::spawn;
use crate::model::job::{VmReport, VmState, VmStatus};
use crate::model::vm::VmSpec;

/// How long after QEMU's end its last words are waited for.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Runs a VM until it has ended, reporting each state it reaches. A message on
/// `stops` asks it to leave by the door that it names; a later, more impatient
/// one overtakes. The caller runs on the main thread, since QEMU dies with it.
///
/// # Errors
/// Why the VM failed, which the last report says too.
pub async fn run(
    spec: VmSpec,
    reports: mpsc::Sender<VmReport>,
    mut stops: mpsc::Receiver<Stop>,
) -> Result<()> {
    let mut driver = Driver::new(spec, reports);
    driver.report(VmState::Preparing, String::new(), None).await;
    let started = driver.start();
    if let Err(error) = started {
        driver.happened(Event::Broken { why: error.to_string() }, Some(error)).await;
    }
    while driver.state != State::Over {
        let (event, cause) = driver.next(&mut stops).await;
        driver.happened(event, cause).await;
    }
    driver.outcome
}

/// What the loop knows.
struct Driver {
    spec: VmSpec,
    state: State,
    reports: mpsc::Sender<VmReport>,
    status: watch::Sender<VmStatus>,
    qmp: watch::Sender<Option<qmp::Client>>,
    qemu: Option<Qemu>,
    deadline: Option<Instant>,
    /// Events from tasks.
    inbox: mpsc::Receiver<Event>,
    post: mpsc::Sender<Event>,
    /// Wishes from the control socket.
    quits: mpsc::Receiver<Stop>,
    quit: mpsc::Sender<Stop>,
    /// Of this VM; they end with the loop.
    tasks: JoinSet<()>,
    outcome: Result<()>,
}

/// A running QEMU.
struct Qemu {
    child: Child,
    stderr: JoinHandle<Stderr>,
    /// Listens to QMP until it closes.
    listener: JoinHandle<()>,
}

impl Driver {
    fn new(spec: VmSpec, reports: mpsc::Sender<VmReport>) -> Self {
        let status = VmStatus { state: VmState::Preparing, since: now(), detail: String::new() };
        let (post, inbox) = mpsc::channel(16);
        let (quit, quits) = mpsc::channel(1);
        Self {
            spec,
            state: State::Preparing,
            reports,
            status: watch::Sender::new(status),
            qmp: watch::Sender::new(None),
            qemu: None,
            deadline: None,
            inbox,
            post,
            quits,
            quit,
            tasks: JoinSet::new(),
            outcome: Ok(()),
        }
    }

    /// Makes what QEMU needs and starts it.
    fn start(&mut self) -> Result<()> {
        let spec = &self.spec;
        let files = Files::make(spec)?;
        let (console, qemu_console) = pair()?;
        let (qmp, qemu_qmp) = pair()?;
        let agent = control::listen(&spec.dir, "agent.sock")?;

        let mut command = std::process::Command::new(&spec.qemu_bin);
        let inherited = vec![qemu_qmp, qemu_console, agent.into()];
        let [qmp_fd, console_fd, agent_fd] =
            spawn::inherit(&mut command, inherited).try_into().expect("as many as were given");
        command.args(args::qemu(
            spec,
            &Wiring {
                qmp: qmp_fd,
                console: console_fd,
                agent: agent_fd,
                disk: &files.disk,
                seed: &files.seed,
            },
        )?);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // A Ctrl-C at the launcher's terminal is for the launcher.
        command.process_group(0);
        spawn::die_with_parent(&mut command);

        let console = Console::start(console, &spec.dir)?;
        self.serve(console)?;
        let mut command = tokio::process::Command::from(command);
        let mut child = command.kill_on_drop(true).spawn().map_err(|error| {
            Error::system(format!("`{}` does not start", self.spec.qemu_bin.display()))
                .because(error)
                .help("install it (Debian: qemu-system-x86), or set `qemu-bin` in the template")
        })?;
        // Our copies of QEMU's ends: with them open its end would go unnoticed.
        drop(command);
        let stderr = child.stderr.take().expect("it is piped");
        let stderr = tokio::spawn(Stderr::keep(stderr, self.spec.dir.join("qemu.log")));
        let run = !self.spec.paused;
        let listener = tokio::spawn(listen(qmp, self.qmp.clone(), self.post.clone(), run));
        self.qemu = Some(Qemu { child, stderr, listener });
        // The inbox is empty: there is room.
        self.post.try_send(Event::Started).while_doing(|| "starting QEMU".into())
    }

    /// Answers at the control socket.
    fn serve(&mut self, console: Console) -> Result<()> {
        let listener = control::listen(&self.spec.dir, control::SOCKET)?;
        let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
        let listener = listener.while_doing(|| "preparing the control socket".into())?;
        let endpoint = control::Endpoint {
            name: self.spec.name(),
            status: self.status.subscribe(),
            qmp: self.qmp.subscribe(),
            console,
            stop: self.quit.clone(),
        };
        self.tasks.spawn(control::serve(listener, endpoint));
        Ok(())
    }

    /// Waits for what happens next, and what explains it.
    async fn next(&mut self, stops: &mut mpsc::Receiver<Stop>) -> (Event, Option<Error>) {
        let deadline = self.deadline;
        let passed = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let exited = async {
            match &mut self.qemu {
                Some(qemu) => qemu.child.wait().await,
                None => std::future::pending().await,
            }
        };
        let status = tokio::select! {
            // What QEMU said comes before that it is gone.
            biased;
            Some(event) = self.inbox.recv() => return (event, None),
            Some(stop) = self.quits.recv() => return (Event::StopAsked(stop), None),
            Some(stop) = stops.recv() => return (Event::StopAsked(stop), None),
            status = exited => status,
            () = passed => {
                self.deadline = None;
                return (Event::Deadline, None);
            }
        };
        let qemu = self.qemu.take().expect("it has exited");
        // Its last words on QMP, such as that the guest shut down, come first.
        let mut listener = qemu.listener;
        let end = Instant::now() + LAST_WORDS;
        while !listener.is_finished() && self.state != State::Over {
            tokio::select! {
                biased;
                Some(event) = self.inbox.recv() => self.happened(event, None).await,
                _ = &mut listener => {}
                () = tokio::time::sleep_until(end) => listener.abort(),
            }
        }
        while let Ok(event) = self.inbox.try_recv() {
            self.happened(event, None).await;
        }
        let stderr = tokio::time::timeout(LAST_WORDS, qemu.stderr).await;
        let stderr = stderr.ok().and_then(Result::ok).unwrap_or_default();
        let fault = status.map_or_else(|error| Some(error.to_string()), |status| self.fault(status));
        let cause = fault.as_ref().map(|fault| stderr.explain(fault));
        (Event::Exited { fault }, cause)
    }

    /// What is wrong with QEMU having ended like this.
    fn fault(&self, status: ExitStatus) -> Option<String> {
        let when = match self.status.borrow().state {
            VmState::Preparing | VmState::Starting => " during start",
            _ => "",
        };
        match (status.code(), status.signal()) {
            (Some(0), _) => None,
            (Some(code), _) => Some(format!("QEMU exited{when} with status {code}")),
            (None, signal) => {
                Some(format!("QEMU was killed{when} by signal {}", signal.unwrap_or_default()))
            }
        }
    }

    /// Lets the machine decide, and does what it says.
    async fn happened(&mut self, event: Event, cause: Option<Error>) {
        let state = std::mem::replace(&mut self.state, State::Over);
        let (state, actions) = machine::on(state, event);
        self.state = state;
        let mut cause = cause;
        for action in actions {
            self.carry_out(action, &mut cause).await;
        }
    }

    async fn carry_out(&mut self, action: Action, cause: &mut Option<Error>) {
        match action {
            Action::Continue => {
                let (qmp, post) = (self.qmp.borrow().clone(), self.post.clone());
                self.tasks.spawn(async move {
                    let Some(qmp) = qmp else { return };
                    if let Err(failure) = qmp.execute(qapi::qmp::cont {}).await {
                        let why = format!("the guest does not start: {failure}");
                        // The loop has ended: nobody asks any more.
                        let _ = post.send(Event::Broken { why }).await;
                    }
                });
            }
            Action::Powerdown => self.command(qapi::qmp::system_powerdown {}),
            Action::Quit => self.command(qapi::qmp::quit {}),
            Action::Kill => {
                if let Some(qemu) = &mut self.qemu {
                    // It has ended by itself: as good.
                    let _ = qemu.child.start_kill();
                }
            }
            Action::Arm(patience) => self.deadline = Some(Instant::now() + patience),
            Action::Disarm => self.deadline = None,
            Action::Report(state, detail) => {
                let mut error = None;
                if state == VmState::Failed {
                    let cause = cause.take().unwrap_or_else(|| Error::system(detail.clone()));
                    error = Some(cause.to_wire());
                    let name = self.spec.name();
                    self.outcome = Err(cause).while_doing(|| format!("running {name}"));
                }
                self.report(state, detail, error).await;
            }
        }
    }

    /// Sends a command whose failure shows by nothing happening.
    fn command<C: qapi::Command + 'static>(&mut self, command: C) {
        if let Some(qmp) = self.qmp.borrow().clone() {
            self.tasks.spawn(async move {
                if let Err(failure) = qmp.execute(command).await {
                    tracing::debug!("{}: {failure}", C::NAME);
                }
            });
        }
    }

    async fn report(
        &mut self,
        state: VmState,
        detail: String,
        error: Option<crate::error::WireError>,
    ) {
        self.status.send_replace(VmStatus { state, since: now(), detail: detail.clone() });
        let report = VmReport { rank: self.spec.rank, state, detail, error };
        // A launcher that is gone is noticed by its own end of the connection.
        let _ = self.reports.send(report).await;
    }
}

/// The files that QEMU opens.
struct Files {
    disk: PathBuf,
    seed: PathBuf,
}

impl Files {
    fn make(spec: &VmSpec) -> Result<Self> {
        let dir: &Path = &spec.dir;
        let made = DirBuilder::new().mode(0o700).create(dir);
        made.while_doing(|| format!("creating the VM's directory `{}`", dir.display()))?;
        let files = Self { disk: dir.join("disk.qcow2"), seed: dir.join("seed.img") };
        if let Some(disk) = &spec.disk {
            overlay::create(&files.disk, &disk.backing, disk.backing_format, disk.virtual_size)?;
        }
        if let Some(seed) = &spec.seed {
            seed::write(&files.seed, seed, &spec.nics)?;
        }
        Ok(files)
    }
}

/// A connected pair: our end, and the one that QEMU inherits.
fn pair() -> Result<(UnixStream, OwnedFd)> {
    let pair = || {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok::<_, std::io::Error>((UnixStream::from_std(ours)?, theirs.into()))
    };
    pair().while_doing(|| "making a connection to QEMU".into())
}

/// Speaks QMP until it closes, and passes on what concerns the machine.
async fn listen(
    stream: UnixStream,
    client: watch::Sender<Option<qmp::Client>>,
    post: mpsc::Sender<Event>,
    run: bool,
) {
    // The machine has the deadline; this one only ends the task after it.
    let connected = qmp::connect(stream, machine::START * 2).await;
    let mut events = match connected {
        Ok((connected, events)) => {
            client.send_replace(Some(connected));
            let _ = post.send(Event::Greeted { run }).await;
            events
        }
        Err(failure) => {
            let _ = post.send(Event::Broken { why: failure.to_string() }).await;
            return;
        }
    };
    let mut disk_error = None;
    while let Some(event) = events.recv().await {
        let event = match event.name.as_str() {
            "BLOCK_IO_ERROR" => {
                disk_error = event.data::<DiskError>();
                continue;
            }
            "RESUME" => Event::Resumed,
            "STOP" => Event::Suspended { why: why_suspended(disk_error.take()) },
            "SHUTDOWN" => Event::ShuttingDown { why: why_shut_down(event.data()) },
            _ => continue,
        };
        let _ = post.send(event).await;
    }
    client.send_replace(None);
    let _ = post.send(Event::Broken { why: qmp::Failure::Lost.to_string() }).await;
}

/// The part of BLOCK_IO_ERROR that is shown.
#[derive(Deserialize)]
struct DiskError {
    #[serde(default)]
    nospace: bool,
    reason: String,
}

fn why_suspended(error: Option<DiskError>) -> String {
    match error {
        Some(DiskError { nospace: true, .. }) => {
            "the file system that holds its disk is full".into()
        }
        Some(error) => format!("its disk failed: {}", error.reason),
        None => String::new(),
    }
}

#[derive(Deserialize)]
struct Shutdown {
    guest: bool,
    reason: String,
}

fn why_shut_down(shutdown: Option<Shutdown>) -> String {
    match shutdown {
        Some(Shutdown { guest: true, .. }) => "the guest shut down".into(),
        Some(Shutdown { reason, .. }) => format!("QEMU ends ({reason})"),
        None => "QEMU ends".into(),
    }
}

/// Seconds since the epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
