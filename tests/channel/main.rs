//! A VM whose launcher and whose users are on other hosts, as far as it can tell: its
//! process is driven over the secure channel, and commands reach it there.
//!
//! The guest is a boot sector that echoes what it is sent by its serial port. Needs QEMU.

mod guest;
#[path = "../../src/vm/testing.rs"]
#[expect(dead_code, reason = "the library's own tests use more of it")]
mod testing;

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use guest::{FLOOD, spec};
use nix::pty::openpty;
use pavo::error::Result;
use pavo::host::process::current;
use pavo::model::job::{JobRecord, VmRecord, VmReport, VmState};
use pavo::model::owner::Owner;
use pavo::model::vm::Accel;
// `testing` finds it as the library does.
use pavo::model;
use pavo::store::{Change, Commit, Store, embedded, keys};
use pavo::vm::channel::{Caller, Identity, Listener};
use pavo::vm::control::{Client, Op};
use pavo::vm::link::{self, Bootstrap, Hello, Receiver, Sender, ToLauncher, ToTask};
use pavo::vm::machine::Stop;
use pavo::vm::process;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Longer than anything here may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// What happens within this time would have happened.
const MOMENT: Duration = Duration::from_millis(300);

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// What a task of the step does, from its standard input to the end of its VM.
async fn task(input: OwnedFd) -> Result<()> {
    let (bootstrap, life) = link::read_bootstrap(input, PATIENCE).await?;
    let identity = bootstrap.identity.expect("there is no root that could have it");
    let remote = Listener::bind(any_port(), &identity)?;
    let hello = Hello {
        version: link::VERSION,
        rank: 0,
        node: 0,
        host: "node".into(),
        cores: 1,
        memory_mib: 64,
        nics: Vec::new(),
        ports: Vec::new(),
        control: Some(remote.address()?),
        accel: Accel::Tcg,
    };
    let (spec, sender, receiver) =
        link::join(&bootstrap.addresses, &identity, hello, PATIENCE).await?;
    let launcher = process::Launcher { link: (sender, receiver), life, leads: false };
    process::task(spec, launcher, Some(remote), std::future::pending()).await
}

/// A VM that runs, and its launcher's ends of what leads to it.
struct Running {
    outer: TempDir,
    identity: Identity,
    control: SocketAddr,
    sender: Sender,
    receiver: Receiver,
    life: OwnedFd,
    task: JoinHandle<Result<()>>,
}

async fn start() -> Running {
    let outer = tempfile::tempdir().unwrap();
    std::fs::create_dir(outer.path().join("node")).unwrap();
    let identity = Identity::generate("7").unwrap();
    let mut listener = Listener::bind(any_port(), &identity).unwrap();
    // No other child may hold the life line.
    let (input, life) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let bootstrap = Bootstrap::new(vec![listener.address().unwrap()], Some(identity.clone()));
    let line = bootstrap.line();
    assert_eq!(nix::unistd::write(&life, line.as_bytes()).unwrap(), line.len());
    let task = tokio::spawn(task(input));
    let (hello, mut sender, receiver) = link::greet(listener.accept().await).await.unwrap();
    sender.send(&ToTask::Spec(Box::new(spec(outer.path())))).await.unwrap();
    let control = hello.control.unwrap();
    let mut vm = Running { outer, identity, control, sender, receiver, life, task };
    vm.until(VmState::Running).await;
    vm
}

impl Running {
    async fn report(&mut self) -> Option<VmReport> {
        match timeout(PATIENCE, self.receiver.receive()).await.unwrap().unwrap() {
            Some(ToLauncher::Report(report)) => Some(report),
            None => None,
            Some(other) => panic!("{other:?}"),
        }
    }

    /// The states up to this one.
    async fn until(&mut self, state: VmState) -> Vec<VmState> {
        let mut states = Vec::new();
        loop {
            let report = self.report().await.expect("it has not ended");
            states.push(report.state);
            if report.state == state {
                return states;
            }
            assert!(!report.state.is_over(), "{report:?}");
        }
    }

    async fn client(&self) -> Client {
        connect(self.control, &self.identity).await.unwrap()
    }
}

async fn connect(control: SocketAddr, identity: &Identity) -> Result<Client> {
    Client::connect_remote(control, &Caller::new(identity)?, PATIENCE).await
}

fn qemu_is_there(outer: &Path) -> bool {
    let disk = outer.join("node/vm0/disk.qcow2");
    let pids = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let line = |path: PathBuf| std::fs::read(path.join("cmdline")).unwrap_or_default();
    let disk = disk.to_str().unwrap();
    pids.map(line).any(|line| String::from_utf8_lossy(&line).contains(disk))
}

/// Reads until `end` has come; gives all that came.
async fn read_to(reader: &mut (impl AsyncReadExt + Unpin), end: &str) -> String {
    let mut text = String::new();
    while !text.ends_with(end) {
        let byte = timeout(PATIENCE, reader.read_u8()).await;
        match byte.unwrap_or_else(|_| panic!("only {text:?} has come")) {
            Ok(byte) => text.push(byte.into()),
            Err(error) => panic!("{error} after {text:?}"),
        }
    }
    text
}

#[tokio::test]
async fn a_launcher_elsewhere_drives_a_vm_and_members_control_it() {
    let mut vm = start().await;
    let mut client = vm.client().await;
    assert_eq!(client.ask(Op::Hello).await.unwrap()["vm"], "vm0");
    assert_eq!(client.status().await.unwrap().state, VmState::Running);
    let text = client.ask(Op::Monitor { command: "info status".into() }).await.unwrap();
    assert_eq!(text, "VM status: running\r\n");

    let mut console = vm.client().await.console(4096).await.unwrap().stream;
    read_to(&mut console, "ready\r\n").await;
    console.write_all(b"knock").await.unwrap();
    console.flush().await.unwrap();
    read_to(&mut console, "knock").await;
    client.reset().await.unwrap();
    read_to(&mut console, "ready\r\n").await;

    client.ask(Op::Pause).await.unwrap();
    vm.until(VmState::Paused).await;
    client.ask(Op::Resume).await.unwrap();
    vm.until(VmState::Running).await;

    // It does not know the power button, and is given a moment only.
    let soon = Stop::Graceful { deadline: Duration::from_secs(1) };
    vm.sender.send(&ToTask::Stop(soon.into())).await.unwrap();
    assert_eq!(vm.until(VmState::Stopped).await[0], VmState::Stopping);
    assert_eq!(vm.report().await, None, "it hangs up");
    (&mut vm.task).await.unwrap().unwrap();
    assert!(!qemu_is_there(vm.outer.path()));
}

#[tokio::test]
async fn a_vm_does_not_outlive_its_launcher() {
    for closed in ["life line", "connection"] {
        let vm = start().await;
        assert!(qemu_is_there(vm.outer.path()));
        let Running { outer, identity, control, sender, receiver, life, task } = vm;
        // Each alone is enough.
        let kept = if closed == "life line" {
            drop(life);
            Ok((sender, receiver))
        } else {
            drop((sender, receiver));
            Err(life)
        };
        timeout(PATIENCE, task).await.expect(closed).unwrap().unwrap();
        let (life, link) = match kept {
            Ok(link) => (None, Some(link)),
            Err(life) => (Some(life), None),
        };
        assert!(!qemu_is_there(outer.path()), "{closed}");
        let gone = connect(control, &identity).await.unwrap_err();
        assert!(gone.report().contains("refused: nobody listens there"), "{}", gone.report());
        drop((life, link));
    }
}

#[tokio::test]
async fn many_are_served_and_strangers_are_not() {
    let vm = start().await;
    let stranger = Identity::generate("7").unwrap();
    let refused = connect(vm.control, &stranger).await.unwrap_err();
    assert!(refused.report().contains("not of this cluster"), "{}", refused.report());

    let mut viewers = Vec::new();
    for _ in 0..128 {
        viewers.push(vm.client().await.console(4096).await.unwrap());
    }
    for viewer in &mut viewers {
        read_to(&mut viewer.stream, "ready\r\n").await;
    }
    let busy = vm.client().await.status().await.unwrap_err();
    assert!(busy.report().contains("vm0 is asked by 128 others"), "{}", busy.report());
    let mut late = vm.client().await;
    let asked = tokio::spawn(async move { late.status().await.unwrap().state });
    tokio::time::sleep(MOMENT).await;
    assert!(!asked.is_finished(), "64 are served at once");
    // On its own host it is reached all the same.
    Client::connect(&vm.outer.path().join("node/vm0")).unwrap().status().await.unwrap();
    drop(viewers.pop());
    assert_eq!(timeout(PATIENCE, asked).await.unwrap().unwrap(), VmState::Running);
    // What one types all see.
    viewers[0].stream.write_all(b"hey").await.unwrap();
    viewers[0].stream.flush().await.unwrap();
    for viewer in &mut viewers {
        read_to(&mut viewer.stream, "hey").await;
    }
}

/// The login node: a store that knows the cluster, and the job's folder.
struct Login {
    dir: TempDir,
}

impl Login {
    /// One that reaches the VM over the channel.
    async fn of(vm: &Running) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let job_dir = dir.path().join("job");
        std::fs::create_dir(&job_dir).unwrap();
        let identity = job_dir.join("identity.json");
        std::fs::write(&identity, serde_json::to_vec(&vm.identity).unwrap()).unwrap();
        only_ours(&identity, 0o600);
        Self::new(dir, job_dir, Some(vm.control)).await
    }

    /// The VM's own host.
    async fn beside(vm: &Running) -> Self {
        Self::new(tempfile::tempdir().unwrap(), vm.outer.path().join("node"), None).await
    }

    async fn new(dir: TempDir, job_dir: PathBuf, control: Option<SocketAddr>) -> Self {
        let uid = nix::unistd::geteuid();
        let user = nix::unistd::User::from_uid(uid).unwrap();
        let user = user.map_or_else(|| uid.to_string(), |user| user.name);
        let record = JobRecord {
            version: JobRecord::VERSION,
            owner: Owner::local(7),
            name: "echo".into(),
            user: user.clone(),
            definition: "echo:1".into(),
            started: 0,
            time_limit: None,
            launcher: current(),
            dir: job_dir,
            host: "login".into(),
            vms: vec![VmRecord {
                rank: 0,
                template: "echo".into(),
                image: None,
                cores: 1,
                memory_mib: 64,
                host: "node".into(),
                addresses: Vec::new(),
                ports: Vec::new(),
                ssh_user: "root".into(),
                drives: Vec::new(),
                control,
            }],
        };
        let store = embedded::open(&dir.path().join("state")).await.unwrap();
        let put = Change::put_json(keys::job_record(&user, Owner::local(7)), &record).unwrap();
        assert!(matches!(store.commit(&[], &[put]).await.unwrap(), Commit::Done(_)));
        Self { dir }
    }

    fn pavo(&self, arguments: &[&str]) -> Command {
        let pavo = env!("CARGO_BIN_EXE_pavo");
        let mut command = if nix::unistd::geteuid().is_root() {
            // Root's commands look after the host's journal: let it be an empty one.
            let mut command = Command::new("unshare");
            let script = "mount -t tmpfs pavo /run && exec \"$0\" \"$@\"";
            command.args(["--mount", "sh", "-c", script, pavo]);
            command
        } else {
            Command::new(pavo)
        };
        command.args(arguments).env("PAVO_STATE_DIR", self.dir.path().join("state"));
        command.env_remove("PAVO_JOB_ID").kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.pavo(arguments);
        command.stdin(Stdio::null());
        timeout(PATIENCE, command.output()).await.expect("it ends").unwrap()
    }

    async fn log(&self) -> String {
        let output = self.run(&["console", "-l"]).await;
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A command at a terminal: what it shows comes by the channel, what is typed goes to
    /// the descriptor.
    fn at_terminal(&self, arguments: &[&str]) -> Terminal {
        let pty = openpty(None, None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut command = self.pavo(arguments);
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let (show, shown) = mpsc::unbounded_channel();
        let reader = pty.master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = nix::unistd::read(&reader, &mut bytes) {
                if show.send(String::from_utf8_lossy(&bytes[..count]).into_owned()).is_err() {
                    return;
                }
            }
        });
        Terminal { child, keyboard: pty.master, shown, text: String::new(), slave: pty.slave }
    }
}

fn only_ours(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

struct Terminal {
    child: tokio::process::Child,
    keyboard: OwnedFd,
    shown: mpsc::UnboundedReceiver<String>,
    /// All that was shown.
    text: String,
    slave: OwnedFd,
}

impl Terminal {
    fn types(&self, keys: &[u8]) {
        assert_eq!(nix::unistd::write(self.keyboard.as_fd(), keys).unwrap(), keys.len());
    }

    async fn shows(&mut self, what: &str) {
        while !self.text.contains(what) {
            let shown = timeout(PATIENCE, self.shown.recv()).await;
            let shown = shown.unwrap_or_else(|_| panic!("only {:?} is shown", self.text));
            self.text += &shown.expect("the terminal is there");
        }
    }

    /// Whether lines are edited, as in a shell.
    fn is_cooked(&self) -> bool {
        let modes = nix::sys::termios::tcgetattr(&self.slave).unwrap();
        modes.local_flags.contains(nix::sys::termios::LocalFlags::ICANON)
    }

    async fn ends_well(&mut self) {
        let status = timeout(PATIENCE, self.child.wait()).await.expect("it ends").unwrap();
        assert!(status.success(), "{status:?}, {:?}", self.text);
        assert!(self.is_cooked(), "the terminal is as it was");
    }
}

#[tokio::test]
async fn commands_find_a_vm_on_another_host() {
    let mut vm = start().await;
    let login = Login::of(&vm).await;
    while !login.log().await.ends_with("ready\r\n") {}

    let mut terminal = login.at_terminal(&["console"]);
    terminal.shows("leave with three times Ctrl-C").await;
    terminal.shows("ready").await;
    terminal.types(b"knock");
    terminal.shows("knock").await;
    assert!(!terminal.is_cooked());
    terminal.types(b"F");
    terminal.shows("!").await;
    let told = terminal.text.contains("this viewer is too slow");
    assert!(told || terminal.text.matches('x').count() >= FLOOD);
    terminal.types(b"\x03\x03\x03");
    terminal.ends_well().await;
    let log = login.log().await;
    assert_eq!(log.matches('x').count(), FLOOD);
    assert!(log.starts_with("ready\r\nknock") && log.ends_with('!'));

    let reset = login.run(&["reset", "vm0"]).await;
    assert!(reset.status.success(), "{reset:?}");
    let mut follower = login.at_terminal(&["console", "-f"]);
    follower.shows("!ready").await;

    let mut last = login.at_terminal(&["console"]);
    last.shows("!ready").await;
    last.types(b"Q");
    last.shows("bye").await;
    follower.shows("bye").await;
    // It has powered off, and is kept until it is stopped.
    vm.until(VmState::Off).await;
    vm.sender.send(&ToTask::Stop(Stop::Now.into())).await.unwrap();
    last.ends_well().await;
    follower.ends_well().await;
    vm.until(VmState::Stopped).await;
    (&mut vm.task).await.unwrap().unwrap();

    let output = login.run(&["console"]).await;
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("because: the VM's process does not answer"), "{said}");
    assert!(said.contains(&format!("{}: refused", vm.control)), "{said}");
}

#[tokio::test]
async fn commands_find_a_vm_on_this_host() {
    let vm = start().await;
    let here = Login::beside(&vm).await;
    while !here.log().await.ends_with("ready\r\n") {}
    assert!(here.run(&["reset"]).await.status.success());
    let mut terminal = here.at_terminal(&["console"]);
    terminal.shows("ready\r\nready").await;
    terminal.types(b"knock");
    terminal.shows("knock").await;
    terminal.types(b"\x03\x03\x03");
    terminal.ends_well().await;
}

#[tokio::test]
async fn an_identity_that_others_can_read_is_not_used() {
    let vm = start().await;
    let login = Login::of(&vm).await;
    let identity = login.dir.path().join("job/identity.json");
    only_ours(&identity, 0o644);
    let output = login.run(&["reset"]).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("because: others may have read or written it"), "{said}");
    std::fs::remove_file(&identity).unwrap();
    let output = login.run(&["reset"]).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("identity.json") && said.contains("No such file"), "{said}");
}

#[tokio::test]
async fn a_wrong_certificate_is_refused_to_every_command() {
    let mut vm = start().await;
    let login = Login::of(&vm).await;
    // Of a job that had the same id.
    let strange = serde_json::to_vec(&Identity::generate("7").unwrap()).unwrap();
    std::fs::write(login.dir.path().join("job/identity.json"), strange).unwrap();
    let path = |name: &str| login.dir.path().join(name).to_str().unwrap().to_owned();
    let (file, saved) = (path("file"), path("saved"));
    std::fs::write(&file, "ours").unwrap();
    for (words, code) in [
        (&["run", "true"][..], 255),
        (&["cp", &file, "vm0:/tmp/"], 4),
        (&["cp", "vm0:/etc/passwd", &saved], 4),
        (&["console"], 4),
        (&["console", "-l"], 4),
        (&["reset"], 4),
        (&["pause", "vm0"], 4),
    ] {
        let output = login.run(words).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
        assert!(said.contains("vm0"), "{words:?}: {said}");
        let why = format!("{}: what listens there is not of this cluster", vm.control);
        assert!(said.contains(&why), "{words:?}: {said}");
        assert!(output.stdout.is_empty() && !Path::new(&saved).exists(), "{words:?}");
    }
    // Those that are of it do not notice.
    assert_eq!(vm.client().await.status().await.unwrap().state, VmState::Running);
    vm.sender.send(&ToTask::Stop(Stop::Now.into())).await.unwrap();
    let states = vm.until(VmState::Stopped).await;
    assert_eq!(states, [VmState::Stopping, VmState::Stopped], "it has run all the time");
    (&mut vm.task).await.unwrap().unwrap();
}
