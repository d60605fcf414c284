//! A world of its own for each test: account, folders, `/dev/net/tun`; and the proof at
//! its end that nothing is left in it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use tempfile::TempDir;

use super::processes::{self, Process};
use super::running::{Output, PATIENCE, PAUSE, Running};
use super::tiny::shared_images;

/// The account that owns nothing, `nobody`.
pub const NOBODY: u32 = 65_534;
/// Nothing of a job is left so long after its end, however it ended: a fraction of a second
/// where the machine is not busy with other tests.
const GONE: Duration = Duration::from_secs(15);
const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";

/// Whom `pavo` is run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Account {
    /// The one that runs the tests.
    Ours,
    /// An ordinary one, while the tests run as root.
    Nobody,
    /// Root, in a network and a `/run` of this world.
    Root,
}

/// Where one test lives.
#[derive(Debug)]
pub struct World {
    dir: TempDir,
    account: Account,
    pavo: PathBuf,
    /// Of all that was started: what is in them is ours, whatever it does.
    sessions: RefCell<BTreeSet<i32>>,
    outputs: Cell<u32>,
}

/// Runs a test as an ordinary user.
pub fn world(test: impl FnOnce(&World) + Send + 'static) {
    if nix::unistd::geteuid().is_root() {
        enter(Account::Nobody, test);
    } else if File::options().read(true).write(true).open("/dev/net/tun").is_ok() {
        enter(Account::Ours, test);
    } else {
        skip("neither root nor a usable /dev/net/tun");
    }
}

/// Runs a test as an ordinary user whose world only root can prepare.
pub fn prepared_world(test: impl FnOnce(&World) + Send + 'static) {
    if nix::unistd::geteuid().is_root() {
        enter(Account::Nobody, test);
    } else {
        skip("needs root");
    }
}

/// Runs a test as root, in a network of its own.
pub fn root_world(test: impl FnOnce(&World) + Send + 'static) {
    if nix::unistd::geteuid().is_root() {
        enter(Account::Root, test);
    } else {
        skip("needs root");
    }
}

#[expect(clippy::print_stderr, reason = "a skip is never silent")]
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}");
    eprintln!("skipped: {why}");
}

/// Lets signals mean what they mean at a terminal, for us and all that we start. A shell
/// starts what is to run beside it with SIGINT ignored, `nohup` with SIGHUP, and a signal
/// that is sent before the launcher listens would be lost.
fn heed_signals() {
    for signal in [Signal::SIGINT, Signal::SIGHUP] {
        #[expect(unsafe_code)]
        // SAFETY: the default action runs no code of ours.
        unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }.unwrap();
    }
}

/// On a thread of its own, whose mounts are nobody else's.
fn enter(account: Account, test: impl FnOnce(&World) + Send + 'static) {
    heed_signals();
    let run = move || {
        let world = World::new(account);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            test(&world);
            world.nothing_is_left();
        }));
        world.processes().iter().for_each(Process::kill);
        outcome
    };
    if let Err(panic) = std::thread::spawn(run).join().and_then(|outcome| outcome) {
        resume_unwind(panic);
    }
}

impl World {
    fn new(account: Account) -> Self {
        let dir = tempfile::Builder::new().prefix("pavo-e2e-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let mut world = Self {
            dir,
            account,
            pavo: env!("CARGO_BIN_EXE_pavo").into(),
            sessions: RefCell::default(),
            outputs: Cell::default(),
        };
        for name in ["home", "tmp", "site", "conf"] {
            world.folder(name);
        }
        fs::create_dir(world.path("out")).unwrap();
        if account != Account::Ours {
            world.make_private();
        }
        image(&world);
        world
    }

    /// Mounts and devices of this thread and what it starts.
    fn make_private(&mut self) {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("none"), "/dev/net", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mknod("/dev/net/tun", SFlag::S_IFCHR, Mode::empty(), makedev(10, 200)).unwrap();
        self.allow_tun(0o666);
        // The build's folder may be one that the other account cannot read.
        self.pavo = self.path("pavo");
        bind(Path::new(env!("CARGO_BIN_EXE_pavo")), &self.pavo);
        if self.account == Account::Root {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            mount(Some("none"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
        }
    }

    /// Sets who may open `/dev/net/tun`.
    pub fn allow_tun(&self, mode: u32) {
        fs::set_permissions("/dev/net/tun", Permissions::from_mode(mode)).unwrap();
    }

    /// Replaces the folder of jobs' files by a file system of this size.
    pub fn shrink_tmp(&self, kib: u32) {
        let options = format!("size={kib}k,uid={NOBODY},gid={NOBODY},mode=700");
        let tmp = self.path("tmp");
        mount(Some("none"), &tmp, Some("tmpfs"), MsFlags::empty(), Some(&*options)).unwrap();
    }

    /// A path in this world; `""` is its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a folder that belongs to the account.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        self.give(&path);
        path
    }

    /// Writes a file that belongs to the account.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        self.give(&path);
        path
    }

    fn give(&self, path: &Path) {
        if self.account == Account::Nobody {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }

    /// A program as the account runs it, in a session of its own.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.session_command(&[], program.as_ref())
    }

    /// Like [`Self::command`], with standard input as the session's terminal.
    pub fn terminal_command(&self, program: impl AsRef<OsStr>) -> Command {
        self.session_command(&["--ctty"], program.as_ref())
    }

    fn session_command(&self, options: &[&str], program: &OsStr) -> Command {
        let mut command = Command::new("setsid");
        command.args(options).arg(program).env_clear().current_dir(self.path("home"));
        for (name, folder) in [
            ("HOME", "home"),
            ("PAVO_STATE_DIR", "home/state"),
            ("PAVO_TMPDIR", "tmp"),
            ("PAVO_SYSTEM_CONF_DIR", "site"),
            ("PAVO_USER_CONF_DIR", "conf"),
        ] {
            command.env(name, self.path(folder));
        }
        command.env("PATH", PATH).env("SHELL", "/bin/bash").env("TERM", "xterm");
        command.env("PAVO", &self.pavo);
        if self.account == Account::Nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    /// `pavo` with these arguments, to be started.
    pub fn pavo_command(&self, args: &[&str]) -> Command {
        let mut command = self.command(&self.pavo);
        command.args(args);
        command
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.pavo
    }

    /// Runs `pavo` to its end.
    pub fn pavo(&self, args: &[&str]) -> Output {
        self.run(self.pavo_command(args))
    }

    /// Runs `pavo` to its end, which must be a good one, and returns what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.pavo(args);
        assert_eq!(output.code, Some(0), "pavo {args:?}: {output}");
        output.stdout
    }

    /// Runs a command to its end.
    pub fn run(&self, command: Command) -> Output {
        self.start(command).finish()
    }

    /// Starts `pavo alloc` with these arguments.
    pub fn alloc(&self, args: &[&str]) -> Running {
        let mut command = self.pavo_command(&["alloc"]);
        command.args(args);
        self.start(command)
    }

    /// Starts a cluster whose VMs run without having booted, and waits until they do.
    pub fn idle(&self, args: &[&str]) -> Running {
        let mut command = self.pavo_command(&["alloc", "--mem", "128", "-E", "sleep 600"]);
        command.args(args);
        let alloc = self.start(command);
        alloc.wait_for(if args[0] == "tiny:2" { "vm[0-1] run\n" } else { "vm0 runs\n" });
        alloc
    }

    /// Starts a command without input; what it says goes to files.
    pub fn start(&self, mut command: Command) -> Running {
        command.stdin(Stdio::null());
        self.start_with_input(command)
    }

    /// Starts a command whose input is set; what it says goes to files.
    pub fn start_with_input(&self, mut command: Command) -> Running {
        let [out, err] = self.outputs();
        command.stdout(File::create(out).unwrap()).stderr(File::create(err).unwrap());
        self.spawn(command)
    }

    /// Starts a command whose streams are set.
    pub fn launch(&self, command: Command) -> Running {
        for file in self.outputs() {
            File::create(file).unwrap();
        }
        self.spawn(command)
    }

    /// Where the next command's outputs go.
    fn outputs(&self) -> [PathBuf; 2] {
        let number = self.outputs.get();
        ["out", "err"].map(|stream| self.path(&format!("out/{number}.{stream}")))
    }

    fn spawn(&self, mut command: Command) -> Running {
        let [out, err] = self.outputs();
        self.outputs.set(self.outputs.get() + 1);
        let child = command.spawn().unwrap();
        self.sessions.borrow_mut().insert(child.id() as i32);
        Running::new(child, out, err)
    }

    /// The folder of the only job.
    pub fn job_dir(&self) -> PathBuf {
        fs::read_dir(self.path("tmp")).unwrap().next().unwrap().unwrap().path()
    }

    /// Tries until it is so.
    pub fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < end, "not so: {what}");
            sleep(PAUSE);
        }
    }

    /// Adds a template `NAME` of the image `tiny` with these settings.
    pub fn template(&self, name: &str, settings: &str) {
        self.write("conf/templates.yaml", &format!("{name}:\n  image: tiny\n  {settings}\n"));
    }

    /// What runs in this world.
    pub fn processes(&self) -> Vec<Process> {
        let sessions = self.sessions.borrow();
        let mut all = processes::all(self.dir.path());
        all.retain(|process| process.names || sessions.contains(&process.session));
        all
    }

    /// Waits for a process of this world whose command line holds `part`.
    pub fn process(&self, part: &str) -> Option<Process> {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let mut all = self.processes();
            all.retain(|process| process.command.contains(part));
            // The first is the one that was started: pasta makes others for moments.
            if let Some(found) = all.into_iter().next() {
                return Some(found);
            }
            if Instant::now() > end {
                return None;
            }
        }
    }

    /// What is left of jobs but records, a line each.
    fn left(&self) -> Vec<String> {
        let processes = self.processes();
        let mut left: Vec<String> =
            processes.iter().map(|it| format!("process {}: {}", it.pid, it.command)).collect();
        let mut folders = vec![self.path("tmp")];
        if self.account == Account::Root {
            folders.extend(["/run/netns".into(), "/run/pavo/journal".into()]);
        }
        for folder in folders {
            let entries = fs::read_dir(&folder).into_iter().flatten();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            // The journal's lock is nobody's.
            let names = names.filter(|name| name != "lock");
            left.extend(names.map(|name| format!("in {}: {name}", folder.display())));
        }
        if self.account == Account::Root {
            let links = fs::read_dir("/sys/class/net").unwrap();
            let names = links.map(|link| link.unwrap().file_name().into_string().unwrap());
            left.extend(names.filter(|name| name.starts_with('p')).map(|n| format!("link {n}")));
        }
        left
    }

    /// Fails if anything of a job is still there when it may not be any more.
    pub fn nothing_runs(&self) {
        let end = Instant::now() + GONE;
        loop {
            let left = self.left();
            if left.is_empty() {
                break;
            }
            assert!(Instant::now() < end, "left after {GONE:?}:\n{}", left.join("\n"));
            sleep(PAUSE);
        }
        // Their numbers may be given to others from now on.
        self.sessions.borrow_mut().clear();
    }

    /// [`Self::nothing_runs`], and no job is known.
    pub fn nothing_is_left(&self) {
        self.nothing_runs();
        assert_eq!(self.ok(&["ps", "-o", "ndjson"]), "", "a job is still known");
    }
}

/// Makes `source` readable, and no more, at `target` in our mount namespace.
fn bind(source: &Path, target: &Path) {
    if source.is_dir() {
        fs::create_dir(target).unwrap();
    } else {
        File::create_new(target).unwrap();
    }
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, target, None::<&str>, read_only, None::<&str>).unwrap();
}

impl Drop for World {
    /// What is mounted is not the folder's, and must not be removed with it.
    fn drop(&mut self) {
        for name in ["pavo", "images", "tmp"] {
            while umount2(&self.path(name), MntFlags::MNT_DETACH).is_ok() {}
        }
    }
}

/// Leads this world to the image `tiny`.
fn image(world: &World) {
    let shared = shared_images();
    let images = match world.account {
        Account::Ours => shared,
        _ => {
            let images = world.path("images");
            bind(&shared, &images);
            images
        }
    };
    let repos = format!("repos:\n  - name: user\n    path: {}\n", images.display());
    world.write("conf/repos.yaml", &repos);
}
