//! A program that runs: what it says, how it is told to end and how it ends.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::processes;

/// Longer than any command here may take, guests' boots included.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what is waited for.
pub const PAUSE: Duration = Duration::from_millis(5);

/// A program that was started.
#[derive(Debug)]
pub struct Running {
    child: Child,
    out: PathBuf,
    err: PathBuf,
    over: bool,
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { code, signal, stdout, stderr } = self;
        write!(f, "exit {code:?}, signal {signal:?}\n{stdout}\n{stderr}")
    }
}

impl Running {
    pub fn new(child: Child, out: PathBuf, err: PathBuf) -> Self {
        Self { child, out, err, over: false }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.out).unwrap()).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.err).unwrap()).into_owned()
    }

    /// Waits until it has said this, on either stream.
    pub fn wait_for(&self, text: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            let said = self.stdout() + &self.stderr();
            if said.contains(text) {
                return;
            }
            let over = processes::is_over(self.pid());
            assert!(!over && Instant::now() < end, "it has not said `{text}`:\n{said}");
            sleep(PAUSE);
        }
    }

    /// The job's id, once it was granted.
    pub fn id(&self) -> String {
        self.wait_for("Granted job allocation ");
        let stderr = self.stderr();
        let rest = stderr.split("Granted job allocation ").nth(1).unwrap();
        rest.lines().next().unwrap().to_owned()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// As a terminal does at a key: the whole group gets it.
    pub fn signal_group(&self, signal: Signal) {
        let end = Instant::now() + PATIENCE;
        // Its session may be about to be made.
        while killpg(Pid::from_raw(self.pid()), signal).is_err() {
            assert!(Instant::now() < end, "there is no such group");
        }
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Output {
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            let said = || self.stdout() + &self.stderr();
            assert!(Instant::now() < end, "it does not end:\n{}", said());
            sleep(PAUSE);
        };
        self.over = true;
        Output {
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.over {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
