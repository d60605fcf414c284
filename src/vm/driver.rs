//! Runs one VM, from its resolved description to its end.
//!
//! One loop: what happens (QEMU's events, its exit, a wish to stop, a deadline)
//! goes through [`machine::on`], and the actions that come out are carried out
//! here. Nothing is polled; a VM at rest wakes nobody.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use qapi::qmp::CpuInfoFast;
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::agent::Agent;
use super::args::{self, Wiring};
use super::attach::Attached;
use super::channel::Listener;
use super::checkpoint::{Restored, Subject};
use super::console::Console;
use super::cpus::{self, Layout};
use super::display::Screen;
use super::guest_ports::GuestPorts;
use super::machine::{self, Action, Event, Order, State, Stop};
use super::stderr::Stderr;
use super::usage::Meter;
use super::{control, guest_agent, qmp};
use crate::error::{Context, Error, Result};
use crate::host::spawn;
use crate::model::job::{VmReport, VmState, VmStatus};
use crate::model::vm::VmSpec;

mod events;
mod prepare;

use events::{Beginning, Ports, listen};
use prepare::Files;

/// How long after QEMU's end its last words are waited for.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long viewers of the console may take to be shown the last of it.
const LAST_LOOK: Duration = Duration::from_millis(500);

/// Runs a VM until it has ended, reporting each state it reaches. A message on
/// `orders` may ask it to leave by the door that it names; a later, more impatient
/// one overtakes. The caller runs on the main thread, since QEMU dies with it.
///
/// # Errors
/// Why the VM failed, which the last report says too.
pub async fn run(
    spec: VmSpec,
    reports: mpsc::Sender<VmReport>,
    mut orders: mpsc::Receiver<Order>,
    remote: Option<Listener>,
) -> Result<()> {
    let mut driver = Driver::new(spec, reports);
    driver.report(VmState::Preparing, String::new(), None).await;
    let mut held = None;
    let started = match driver.prepare(&mut orders).await {
        Ok(_) if driver.state == State::Over => Ok(()),
        Ok(near) => {
            // QEMU uses it to its end.
            held = near;
            driver.start(remote)
        }
        Err(error) => Err(error),
    };
    if let Err(error) = started {
        let why = error.to_string();
        driver.cause = Some(error);
        driver.happened(Event::Broken { why }).await;
    }
    while driver.state != State::Over {
        let event = driver.next(&mut orders).await;
        driver.happened(event).await;
    }
    if let Some(console) = &driver.console {
        // Whoever looks on sees it to its end.
        let _ = tokio::time::timeout(LAST_LOOK, console.seen()).await;
    }
    drop(held);
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
    attached: Attached,
    /// Where the guest's CPUs are to be bound, before they start.
    layout: Option<Layout>,
    meter: Meter,
    console: Option<Console>,
    /// Whether QMP ever did.
    answered: bool,
    deadline: Option<Instant>,
    /// Events from tasks.
    inbox: mpsc::Receiver<Event>,
    post: mpsc::Sender<Event>,
    /// Wishes from the control socket.
    quits: mpsc::Receiver<Stop>,
    quit: mpsc::Sender<Stop>,
    /// Of this VM; they end with the loop.
    tasks: JoinSet<()>,
    /// Why it could not be started.
    cause: Option<Error>,
    /// What it goes on from.
    restored: Option<Restored>,
    /// What QEMU said before it ended.
    last_words: Stderr,
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
            meter: Meter::new(&spec),
            spec,
            state: State::Preparing,
            reports,
            status: watch::Sender::new(status),
            qmp: watch::Sender::new(None),
            qemu: None,
            attached: Attached::default(),
            layout: None,
            console: None,
            answered: false,
            deadline: None,
            inbox,
            post,
            quits,
            quit,
            tasks: JoinSet::new(),
            cause: None,
            restored: None,
            last_words: Stderr::default(),
            outcome: Ok(()),
        }
    }

    /// Makes what QEMU needs and starts it.
    fn start(&mut self, remote: Option<Listener>) -> Result<()> {
        let layout = Layout::of(&self.spec)?;
        self.spec.cores = layout.cores;
        let spec = &self.spec;
        let files = Files::make(spec)?;
        self.attached = Attached::make(spec)?;
        self.attached.args.nodes.clone_from(&layout.nodes);
        prepare::check_shape(spec, &layout.nodes)?;
        let (console, qemu_console) = pair()?;
        let (qmp, qemu_qmp) = pair()?;
        let agent = control::listen(&spec.dir, guest_agent::SOCKET)?;
        let (line, qemu_line) = pair()?;
        let (pcoccs_line, qemu_pcoccs_line) = pair()?;

        let mut command = std::process::Command::new(&spec.qemu_bin);
        let (tpm, display) = (self.attached.tpm.take(), self.attached.display.take());
        self.attached.args.tpm = tpm.as_ref().map(AsRawFd::as_raw_fd);
        self.attached.args.display = display.as_ref().map(AsRawFd::as_raw_fd);
        let mut inherited = vec![qemu_qmp, qemu_console, agent.into(), qemu_line, qemu_pcoccs_line];
        inherited.extend(tpm.into_iter().chain(display));
        let numbers = spawn::inherit(&mut command, inherited);
        command.args(args::qemu(
            spec,
            &Wiring {
                qmp: numbers[0],
                console: numbers[1],
                agent: numbers[2],
                own_agent: numbers[3],
                pcoccs_agent: numbers[4],
                disk: &files.disk,
                seed: &files.seed,
                extras: &self.attached.args,
            },
        )?);
        let console = Console::start(console, &spec.dir)?;
        let (ports, [opened, pcoccs_opened]) = Ports::new();
        let (agent, served, pcoccs) = Agent::new(spec.name(), spec.dir.clone());
        self.tasks.spawn(served.serve(line, opened));
        self.tasks.spawn(pcoccs.serve(pcoccs_line, pcoccs_opened));
        if spec.restore.as_ref().is_some_and(|restore| restore.former.is_none()) {
            self.tasks.spawn(agent.clone().keep_time(self.status.subscribe()));
        }
        let beginning = Beginning::of(spec, &agent, self.restored.take());
        self.serve(console, agent, remote)?;
        let before = layout.enter();
        let child = self.spawn(command);
        cpus::leave(before);
        let mut child = child?;
        self.meter.starts(child.id());
        self.layout = Some(layout).filter(|layout| !layout.guest.is_empty());
        let stderr = child.stderr.take().expect("it is piped");
        let stderr = tokio::spawn(Stderr::keep(stderr, self.spec.dir.join("qemu.log")));
        let posts = self.post.clone();
        let listener = tokio::spawn(listen(qmp, self.qmp.clone(), posts, ports, beginning));
        self.qemu = Some(Qemu { child, stderr, listener });
        // The inbox is empty: there is room.
        self.post.try_send(Event::Started).while_doing(|| "starting QEMU".into())
    }

    /// Starts QEMU. Our copies of its ends go with the command: with them open its end would
    /// go unnoticed.
    fn spawn(&self, mut command: std::process::Command) -> Result<Child> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // A Ctrl-C at the launcher's terminal is for the launcher.
        command.process_group(0);
        spawn::die_with_parent(&mut command);
        // Where a scheduler suspends all of a job, we pause the guest.
        spawn::ignore_suspension(&mut command);
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true).spawn().map_err(|error| {
            let qemu = self.spec.qemu_bin.display();
            Error::system(format!("`{qemu}` does not start"))
                .because(error)
                .help("install it (Debian: qemu-system-x86), or set `qemu-bin` in the template")
        })
    }

    /// Answers at the control socket, and those on other hosts.
    fn serve(&mut self, console: Console, agent: Agent, remote: Option<Listener>) -> Result<()> {
        let listener = control::listen(&self.spec.dir, control::SOCKET)?;
        let listener =
            listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
        let listener = listener.while_doing(|| "preparing the control socket".into())?;
        let endpoint = control::Endpoint {
            name: self.spec.name(),
            status: self.status.subscribe(),
            qmp: self.qmp.subscribe(),
            console: console.clone(),
            stop: self.quit.clone(),
            dir: self.spec.dir.clone(),
            disk: self.spec.disk.as_ref().map(|disk| disk.virtual_size),
            saves: Arc::default(),
            subject: Subject::new(&self.spec, &self.attached.args.nodes),
            ports: GuestPorts::new(&self.spec),
            screen: Screen::new(&self.spec),
            meter: self.meter.clone(),
            agent,
        };
        self.console = Some(console);
        if let Some(remote) = remote {
            self.tasks.spawn(control::serve_members(remote, endpoint.clone()));
        }
        self.tasks.spawn(control::serve(listener, endpoint));
        Ok(())
    }

    /// Waits for what happens next.
    async fn next(&mut self, orders: &mut mpsc::Receiver<Order>) -> Event {
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
            Some(event) = self.inbox.recv() => return event,
            Some(stop) = self.quits.recv() => return Event::Asked(Order::Stop(stop)),
            Some(order) = orders.recv() => return Event::Asked(order),
            status = exited => status,
            () = passed => {
                self.deadline = None;
                return Event::Deadline;
            }
        };
        self.hear_last_words().await;
        let fault = match status {
            Ok(status) => self.fault(status),
            Err(error) => Some(format!("QEMU is lost: {error}")),
        };
        Event::Exited { fault }
    }

    /// QEMU has exited: takes what it said before, such as that the guest shut
    /// down, which must come first.
    async fn hear_last_words(&mut self) {
        let Some(Qemu { mut listener, stderr, .. }) = self.qemu.take() else { return };
        let end = Instant::now() + LAST_WORDS;
        while !listener.is_finished() {
            tokio::select! {
                biased;
                Some(event) = self.inbox.recv() => self.happened(event).await,
                _ = &mut listener => {}
                () = tokio::time::sleep_until(end) => listener.abort(),
            }
        }
        while let Ok(event) = self.inbox.try_recv() {
            self.happened(event).await;
        }
        if let Ok(Ok(stderr)) = tokio::time::timeout_at(end, stderr).await {
            self.last_words = stderr;
        }
    }

    /// What is wrong with QEMU having ended like this.
    fn fault(&self, status: ExitStatus) -> Option<String> {
        let when = if self.answered { "" } else { " during start" };
        match (status.code(), status.signal()) {
            (Some(0), _) => None,
            (Some(code), _) => Some(format!("QEMU exited{when} with status {code}")),
            (None, signal) => {
                Some(format!("QEMU was killed{when} by signal {}", signal.unwrap_or_default()))
            }
        }
    }

    /// Lets the machine decide, and does what it says.
    async fn happened(&mut self, event: Event) {
        self.answered |= matches!(event, Event::Greeted { .. } | Event::Strange);
        let actions;
        let state = std::mem::replace(&mut self.state, State::Over);
        (self.state, actions) = machine::on(state, event);
        for action in actions {
            self.carry_out(action).await;
        }
    }

    async fn carry_out(&mut self, action: Action) {
        match action {
            Action::Continue => {
                let (qmp, post) = (self.qmp.borrow().clone(), self.post.clone());
                let layout = self.layout.take();
                self.tasks.spawn(async move {
                    let Some(qmp) = qmp else { return };
                    if let Err(failure) = go_on(&qmp, layout).await {
                        let why = format!("the guest does not start: {failure}");
                        // The loop has ended: nobody asks any more.
                        let _ = post.send(Event::Broken { why }).await;
                    }
                });
            }
            Action::Pause => self.command(qapi::qmp::stop {}),
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
                    let cause = self.cause.take();
                    let mut cause = cause.unwrap_or_else(|| self.last_words.explain(&detail));
                    if let Some(said) = self.attached.last_words(&self.spec.dir) {
                        cause = Error::system(cause.to_string()).because(said);
                    }
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

/// Lets the guest's CPUs run, where they are to.
async fn go_on(qmp: &qmp::Client, layout: Option<Layout>) -> std::result::Result<(), String> {
    if let Some(layout) = layout {
        let cpus = qmp.execute(qapi::qmp::query_cpus_fast {}).await;
        let cpus = cpus.map_err(|failure| failure.to_string())?;
        let thread = |cpu| match cpu {
            CpuInfoFast::x86_64(cpu) | CpuInfoFast::i386(cpu) => i32::try_from(cpu.thread_id).ok(),
            _ => None,
        };
        let threads: Vec<i32> = cpus.into_iter().filter_map(thread).collect();
        layout.bind(&threads).map_err(|error| error.report())?;
    }
    qmp.execute(qapi::qmp::cont {}).await.map(drop).map_err(|failure| failure.to_string())
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

/// Seconds since the epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::control::{Client, Op};
    use super::*;
    use crate::model::vm::Accel;
    use std::path::PathBuf;

    /// A VM that runs beside the test, on the test's own thread.
    struct Running {
        dir: PathBuf,
        reports: mpsc::Receiver<VmReport>,
        stops: mpsc::Sender<Order>,
        done: JoinHandle<Result<()>>,
        _dir: tempfile::TempDir,
    }

    fn start(change: impl FnOnce(&mut VmSpec)) -> Running {
        let outer = tempfile::tempdir().unwrap();
        let mut spec = testing::spec(outer.path());
        change(&mut spec);
        let dir = spec.dir.clone();
        let (report, reports) = mpsc::channel(16);
        let (stops, stop) = mpsc::channel(4);
        let done = tokio::spawn(run(spec, report, stop, None));
        Running { dir, reports, stops, done, _dir: outer }
    }

    impl Running {
        /// Takes reports up to this state.
        async fn until(&mut self, state: VmState) -> VmReport {
            loop {
                let report = self.reports.recv().await.expect("it has not ended");
                if report.state == state {
                    return report;
                }
                assert!(!report.state.is_over(), "{report:?}");
            }
        }

        async fn failure(mut self) -> (String, Self) {
            let report = self.until(VmState::Failed).await;
            let error: Error = report.error.expect("a failure has an error").into();
            (&mut self.done).await.unwrap().unwrap_err();
            (error.report(), self)
        }

        async fn ask(&self, op: Op) -> serde_json::Value {
            Client::connect(&self.dir).unwrap().ask(op).await.unwrap()
        }

        fn qemu(&self) -> Option<nix::unistd::Pid> {
            testing::process_with(&self.dir.join("disk.qcow2"))
        }
    }

    #[tokio::test]
    async fn a_vm_is_reported_from_its_preparation_to_its_end() {
        let mut vm = start(|_| {});
        vm.until(VmState::Running).await;
        assert!(vm.qemu().is_some());
        vm.stops.send(Order::Stop(Stop::Now)).await.unwrap();
        vm.until(VmState::Stopped).await;
        vm.done.await.unwrap().unwrap();
        assert_eq!(testing::process_with(&vm.dir), None);
    }

    #[tokio::test]
    async fn commands_at_the_control_socket_reach_the_guest() {
        let mut vm = start(|spec| spec.paused = true);
        vm.until(VmState::Paused).await;
        vm.ask(Op::Resume).await;
        vm.until(VmState::Running).await;
        vm.ask(Op::Reset { hard: false }).await;
        vm.ask(Op::Pause).await;
        vm.until(VmState::Paused).await;
        let status = Client::connect(&vm.dir).unwrap().status().await.unwrap();
        assert_eq!(status.state, VmState::Paused);
        let text = vm.ask(Op::Monitor { command: "info status".into() }).await;
        assert_eq!(text, "VM status: paused\r\n");
        vm.ask(Op::Quit).await;
        vm.until(VmState::Stopped).await;
    }

    /// A boot sector that powers off: `mov dx, 604h; mov ax, 2000h; out dx, ax; hlt`, the
    /// sleep register of q35 and what puts it to its deepest sleep.
    #[tokio::test]
    async fn a_guest_that_powers_off_is_kept_with_its_disk() {
        let mut vm = start(|spec| {
            let mut disk = vec![0; 1 << 20];
            disk[..8].copy_from_slice(&[0xba, 4, 6, 0xb8, 0, 0x20, 0xef, 0xf4]);
            disk[510..512].copy_from_slice(&[0x55, 0xaa]);
            std::fs::write(&spec.disk.as_ref().unwrap().backing, disk).unwrap();
        });
        let report = vm.until(VmState::Off).await;
        assert_eq!(report.detail, "the guest powered off");
        let text = vm.ask(Op::Monitor { command: "info status".into() }).await;
        assert_eq!(text, "VM status: paused (shutdown)\r\n");
        // The button starts it, and it powers off again.
        vm.ask(Op::Reset { hard: false }).await;
        vm.until(VmState::Running).await;
        vm.until(VmState::Off).await;
        vm.ask(Op::Quit).await;
        vm.until(VmState::Stopped).await;
        vm.done.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_ignores_the_power_button_is_ended_all_the_same() {
        let mut vm = start(|_| {});
        vm.until(VmState::Running).await;
        vm.stops
            .send(Order::Stop(Stop::Graceful { deadline: Duration::from_millis(50) }))
            .await
            .unwrap();
        vm.until(VmState::Stopped).await;
        vm.done.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_stop_before_qemu_answers_leaves_nothing_behind() {
        let vm = start(|_| {});
        vm.stops.send(Order::Stop(Stop::Now)).await.unwrap();
        vm.done.await.unwrap().unwrap();
        assert_eq!(testing::process_with(&vm.dir), None);
    }

    #[tokio::test]
    async fn a_killed_qemu_is_a_failure_that_says_so() {
        let mut vm = start(|_| {});
        vm.until(VmState::Running).await;
        nix::sys::signal::kill(vm.qemu().unwrap(), nix::sys::signal::Signal::SIGKILL).unwrap();
        let (report, _) = vm.failure().await;
        assert!(report.starts_with("error: QEMU was killed by signal 9"), "{report}");
    }

    #[tokio::test]
    async fn a_qemu_that_dies_at_start_is_quoted() {
        let (report, vm) = start(|spec| spec.custom_args = vec!["-bogus".into()]).failure().await;
        assert!(report.starts_with("error: QEMU exited during start with status 1"), "{report}");
        assert!(report.contains("because: ") && report.contains("-bogus: invalid option"));
        assert!(report.contains("help: check `custom-args`"), "{report}");
        let log = std::fs::read_to_string(vm.dir.join("qemu.log")).unwrap();
        assert!(log.contains("-bogus"));
    }

    #[tokio::test]
    async fn a_missing_qemu_is_named() {
        let (report, _) = start(|spec| spec.qemu_bin = "/no/qemu".into()).failure().await;
        assert!(report.contains("`/no/qemu` does not start"), "{report}");
        assert!(report.contains("help: install it"), "{report}");
    }

    #[tokio::test]
    async fn a_directory_that_exists_is_not_taken_over() {
        let vm = start(|spec| std::fs::create_dir(&spec.dir).unwrap());
        let (report, vm) = vm.failure().await;
        assert!(report.starts_with("error: creating the VM's directory"), "{report}");
        assert_eq!(std::fs::read_dir(&vm.dir).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_machine_type_cannot_smuggle_in_an_accelerator() {
        let change = |spec: &mut VmSpec| {
            spec.accel = Accel::Tcg;
            spec.machine_type = "q35,accel=kvm".into();
        };
        let (report, _) = start(change).failure().await;
        assert!(report.contains("unsupported machine type"), "{report}");
    }
}
