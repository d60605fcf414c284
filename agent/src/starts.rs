//! Commands on their way: to find out who they run as, and to execute them, may have to wait
//! for a server that does not answer. Each does so on a thread of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc;

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use pavo_agent::{Exec, Failure, Kind, WINDOW};

use super::spawn::{Spawned, spawn};

/// What came of it.
type Outcome = Result<Spawned, Failure>;

/// Those that have not begun.
#[derive(Debug)]
pub struct Starts {
    under_way: HashMap<u64, Start>,
    last: u64,
    tell: mpsc::Sender<(u64, Outcome)>,
    told: mpsc::Receiver<(u64, Outcome)>,
    /// Wakes who polls.
    wake: File,
    woken: File,
}

/// One of them.
#[derive(Debug)]
pub struct Start {
    /// Who asked, unless nobody is there any more.
    pub stream: Option<u32>,
    pub exec: Exec,
    /// What it was told meanwhile.
    pub told: Vec<(Kind, Vec<u8>)>,
    bytes: usize,
}

impl Starts {
    pub fn new() -> io::Result<Self> {
        let (woken, wake) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let (woken, wake) = (File::from(woken), File::from(wake));
        let (tell, told) = mpsc::channel();
        Ok(Self { under_way: HashMap::new(), last: 0, tell, told, wake, woken })
    }

    pub fn len(&self) -> usize {
        self.under_way.len()
    }

    /// Readable when one has begun, or cannot.
    pub fn woken(&self) -> BorrowedFd<'_> {
        self.woken.as_fd()
    }

    pub fn begin(&mut self, stream: u32, exec: Exec) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure { why: format!("no thread: {error}"), code: 126 };
        self.last += 1;
        let (number, tell, wanted) = (self.last, self.tell.clone(), exec.clone());
        let mut wake = self.wake.try_clone().map_err(failed)?;
        let run = move || {
            if let Err(mpsc::SendError((_, Ok(spawned)))) = tell.send((number, spawn(&wanted))) {
                end(spawned);
            }
            // A full pipe wakes as well.
            let _ = wake.write(&[0]);
        };
        std::thread::Builder::new().spawn(run).map_err(failed)?;
        let start = Start { stream: Some(stream), exec, told: Vec::new(), bytes: 0 };
        self.under_way.insert(number, start);
        Ok(())
    }

    /// Keeps what one is told until it has begun; says whether it is one.
    pub fn keep(&mut self, stream: u32, kind: Kind, payload: &[u8]) -> bool {
        let mut all = self.under_way.values_mut();
        let Some(start) = all.find(|start| start.stream == Some(stream)) else {
            return false;
        };
        start.bytes += payload.len();
        if start.bytes <= 2 * WINDOW as usize {
            start.told.push((kind, payload.to_vec()));
        }
        true
    }

    /// Who asked for it is gone; false where it is none of these.
    pub fn leave(&mut self, stream: u32) -> bool {
        let mut all = self.under_way.values_mut();
        let start = all.find(|start| start.stream == Some(stream));
        start.is_some_and(|start| start.stream.take().is_some())
    }

    /// All who asked are gone.
    pub fn leave_all(&mut self) {
        self.under_way.values_mut().for_each(|start| start.stream = None);
    }

    /// One that has begun, or cannot.
    pub fn next(&mut self) -> Option<(Start, Outcome)> {
        while self.woken.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
        let (number, outcome) = self.told.try_recv().ok()?;
        self.under_way.remove(&number).map(|start| (start, outcome))
    }
}

impl Drop for Starts {
    fn drop(&mut self) {
        while let Some((_, outcome)) = self.next() {
            if let Ok(spawned) = outcome {
                end(spawned);
            }
        }
    }
}

/// Nobody is there to whom it could be told.
fn end(mut spawned: Spawned) {
    let pid = Pid::from_raw(spawned.child.id() as i32);
    let _ = kill(Pid::from_raw(-pid.as_raw()), Signal::SIGKILL);
    let _ = spawned.child.wait();
}
