//! The signals that a launcher hears, and what they are called.

use nix::unistd::{Pid, getppid};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Context, Result};

/// What a Ctrl-C is called: before there is a shell or script, the end; then its business.
pub const INTERRUPTED: &str = "interrupted";
pub const CANCELLED: &str = "cancelled";
/// What it is called that the process is gone for which we run.
pub const ORPHANED: &str = "salloc was killed, or what it had started";
/// What the word is called by which a scheduler warns.
pub const WARNED: &str = "warned by a signal";

/// The signals that end a cluster.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    warning: Option<Signal>,
    parent: Option<Pid>,
}

impl Signals {
    pub fn new() -> Result<Self> {
        let listen = |kind| signal(kind).while_doing(|| "listening for signals".into());
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            warning: None,
            parent: None,
        })
    }

    /// The same, with one by which a scheduler warns.
    pub fn warned_by(mut self, warning: Option<nix::sys::signal::Signal>) -> Result<Self> {
        let listen = |number| signal(SignalKind::from_raw(number as i32));
        // SIGTERM is heard as what it is.
        let warning = warning.filter(|it| *it != nix::sys::signal::Signal::SIGTERM);
        self.warning = warning.map(listen).transpose().while_doing(|| "listening for it".into())?;
        Ok(self)
    }

    /// The same, with SIGTERM also as the word that this parent has died.
    pub fn of_child(self, parent: Pid) -> Self {
        Self { parent: Some(parent), ..self }
    }

    /// Whether the parent has died.
    pub fn is_orphaned(&self) -> bool {
        self.parent.is_some_and(|parent| getppid() != parent)
    }

    pub async fn next(&mut self) -> &'static str {
        let warning = async {
            match &mut self.warning {
                Some(warning) => warning.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // It may be one of the others.
            biased;
            _ = warning => WARNED,
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.terminate.recv() => if self.is_orphaned() { ORPHANED } else { CANCELLED },
            _ = self.hangup.recv() => "the terminal was closed",
        }
    }
}
