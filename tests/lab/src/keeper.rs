//! The namespaces of one host, and ways into them.
//!
//! They are held by a process that does nothing but read from a pipe whose other end
//! this process holds: when the owner goes, however it goes, the pipe ends, the
//! keeper (process 1 of the host) exits and the kernel kills whatever runs there.
//! A parent-death signal would not do: it fires when the *thread* ends that started
//! the process, and tests are threads.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::enter;
use crate::error::{Context, Error, Result};

/// A person of the lab; `None` is root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct User {
    pub name: &'static str,
    pub id: u32,
}

pub(crate) const USERS: [User; 2] =
    [User { name: "alice", id: 2001 }, User { name: "bob", id: 2002 }];

/// Programs are found here, whatever the caller's own path is.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug)]
pub(crate) struct Keeper {
    child: Mutex<Child>,
    /// Process 1 of the host, as the machine numbers it.
    pid: i32,
    record: PathBuf,
}

impl Keeper {
    /// Makes namespaces; `record` is where a later run finds who held them.
    pub fn start(record: &Path) -> Result<Self> {
        let doing = || format!("making namespaces for {}", record.display());
        let spaces = ["--net", "--uts", "--ipc", "--mount", "--pid"];
        let mut child = Command::new("unshare")
            .args(spaces)
            .args(["--fork", "--kill-child", "--mount-proc", "bash", "-c"])
            .arg("echo; exec >/dev/null 2>&1; read -r _")
            .env_clear()
            .env("PATH", PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .while_doing(doing)?;
        let mut ready = [0];
        let told = child.stdout.take().map_or(Ok(()), |mut out| out.read_exact(&mut ready));
        // Read on failure only: it complains when the process that it keeps is killed.
        let mut why = child.stderr.take();
        if told.is_err() {
            let mut text = String::new();
            why.as_mut().map_or(Ok(0), |err| err.read_to_string(&mut text))?;
            child.wait()?;
            return Err(Error::new(format!("{}: {text}", doing())));
        }
        let outside = child.id();
        let children = fs::read_to_string(format!("/proc/{outside}/task/{outside}/children"))?;
        let pid = children.trim().parse().map_err(|_| Error::new(doing()))?;
        fs::write(record, format!("{pid} {}", started(pid).unwrap_or_default()))?;
        Ok(Self { child: Mutex::new(child), pid, record: record.to_owned() })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A command that will run in the namespaces.
    pub fn command(&self, user: Option<User>, argv: &[&str]) -> Result<Command> {
        command(self.pid, user, argv)
    }

    /// Runs `work` on a thread that has entered the namespaces (but that of processes).
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let pid = self.pid;
        let enter = move || {
            // The root and working directory are the thread's own from here on.
            unshare(CloneFlags::CLONE_FS)?;
            for (file, kind) in namespaces(pid)? {
                if kind != CloneFlags::CLONE_NEWPID {
                    setns(&file, kind)?;
                }
            }
            work()
        };
        std::thread::scope(|scope| {
            scope.spawn(enter).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Ends everything in the namespaces; they are gone when this returns.
    pub fn kill(&self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        let _ = self.child.lock().unwrap_or_else(|e| e.into_inner()).wait();
        let _ = fs::remove_file(&self.record);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Kills the keeper that an owner recorded, if that very process still lives.
pub(crate) fn kill_recorded(record: &Path) {
    let text = fs::read_to_string(record).unwrap_or_default();
    let Some((pid, start)) = text.split_once(' ') else { return };
    let Ok(pid) = pid.parse::<i32>() else { return };
    let deadline = Instant::now() + Duration::from_secs(5);
    while started(pid).is_some_and(|now| now == start) && Instant::now() < deadline {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// When the process began, in ticks: with its number, that names it for good.
fn started(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut after_name = stat.rsplit_once(')')?.1.split_whitespace();
    if after_name.next()? == "Z" {
        return None;
    }
    after_name.nth(18).map(str::to_owned)
}

pub(crate) fn namespaces(pid: i32) -> io::Result<Vec<(File, CloneFlags)>> {
    let kinds = [
        ("net", CloneFlags::CLONE_NEWNET),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let open = |(name, kind)| Ok((File::open(format!("/proc/{pid}/ns/{name}"))?, kind));
    kinds.into_iter().map(open).collect()
}

/// A command in the host whose process 1 is `pid`, with a clean environment.
pub(crate) fn command(pid: i32, user: Option<User>, argv: &[&str]) -> Result<Command> {
    let (program, arguments) = argv.split_first().ok_or_else(|| Error::new("no command"))?;
    let (name, home) = match user {
        Some(user) => (user.name, format!("/home/{}", user.name)),
        None => ("root", "/root".to_owned()),
    };
    let spaces = namespaces(pid).while_doing(|| format!("entering the host of process {pid}"))?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs([
        ("PATH", PATH),
        ("HOME", &home),
        ("USER", name),
        ("LOGNAME", name),
        ("SHELL", "/bin/bash"),
        ("LANG", "C.UTF-8"),
    ]);
    enter::on_start(&mut command, spaces, user.map(|user| user.id), &home)?;
    Ok(command)
}
