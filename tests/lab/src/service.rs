//! Daemons of a host: each runs in the foreground of its own session, says everything
//! into `/var/log/lab/<name>.log` and is known by its process, never by its name.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Context, Error, Result};
use crate::host::Host;

/// How long a daemon may take to be ready, or to end when it is told to.
const PATIENCE: Duration = Duration::from_secs(20);

/// How a daemon is started; the same at first and at each restart.
#[derive(Clone, Debug)]
pub(crate) struct Daemon {
    pub name: &'static str,
    pub argv: Vec<String>,
    /// Shell commands before it starts.
    pub before: String,
    /// A shell command that succeeds when it is ready.
    pub ready: String,
    /// Shell commands once it is ready.
    pub after: String,
}

impl Daemon {
    pub fn new(name: &'static str, argv: &[&str]) -> Self {
        Self {
            name,
            argv: argv.iter().map(|&word| word.to_owned()).collect(),
            before: String::new(),
            ready: "true".to_owned(),
            after: String::new(),
        }
    }

    fn script(&self) -> String {
        let name = self.name;
        let quote = |word: &String| format!("'{}'", word.replace('\'', r"'\''"));
        let argv = self.argv.iter().map(quote).collect::<Vec<_>>().join(" ");
        let (before, ready, after) = (&self.before, &self.ready, &self.after);
        format!(
            "set -e
             {before}
             setsid {argv} </dev/null >>/var/log/lab/{name}.log 2>&1 &
             pid=$!
             echo $pid >/run/lab/{name}.pid
             until {ready}; do
                 kill -0 $pid 2>/dev/null || {{ tail -n 5 /var/log/lab/{name}.log >&2; exit 1; }}
                 sleep 0.02
             done
             {after}"
        )
    }
}

/// One daemon on one host.
#[derive(Debug)]
pub struct Service<'a> {
    pub(crate) host: &'a Host,
    pub(crate) daemon: Daemon,
}

impl Service<'_> {
    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Result<()> {
        let name = self.daemon.name;
        if self.pid().is_some() {
            return Err(Error::new(format!("{name} on {} runs already", self.host.name())));
        }
        let script = self.daemon.script();
        let started = self.host.run_within(PATIENCE, None, &["sh", "-c", &script]);
        started
            .and_then(crate::Output::ok)
            .map(drop)
            .while_doing(|| format!("starting {name} on {}", self.host.name()))
    }

    /// Asks it to end and waits until it has.
    pub fn stop(&self) -> Result<()> {
        self.end(Signal::SIGTERM)
    }

    /// Ends it at once: no goodbyes.
    pub fn kill(&self) -> Result<()> {
        self.end(Signal::SIGKILL)
    }

    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    pub fn restart(&self) -> Result<()> {
        if self.pid().is_some() {
            self.stop()?;
        }
        self.start()
    }

    /// Its process, as the machine numbers it, while it lives.
    pub fn pid(&self) -> Option<i32> {
        let file = self.host.root().ok()?.join(format!("run/lab/{}.pid", self.daemon.name));
        let inner: i32 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
        let processes = self.host.processes().ok()?;
        processes.iter().find(|process| process.inner == inner).map(|process| process.pid)
    }

    /// What it has said.
    pub fn log(&self) -> String {
        let file = format!("var/log/lab/{}.log", self.daemon.name);
        let read = |root: std::path::PathBuf| fs::read_to_string(root.join(file)).ok();
        self.host.root().ok().and_then(read).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let doing = || format!("{signal} to {} on {}", self.daemon.name, self.host.name());
        let pid = self.pid().ok_or("it does not run").while_doing(doing)?;
        kill(Pid::from_raw(pid), signal).while_doing(doing)
    }

    fn end(&self, signal: Signal) -> Result<()> {
        self.signal(signal)?;
        let deadline = Instant::now() + PATIENCE;
        while self.pid().is_some() {
            if Instant::now() > deadline {
                let name = self.daemon.name;
                return Err(Error::new(format!("{name} is there after {signal}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
