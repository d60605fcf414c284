//! Signals to us that are meant for what runs in the guests.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::{Context, Result};

/// Signals by number.
pub const HUP: u8 = 1;
pub const INT: u8 = 2;
pub const QUIT: u8 = 3;
pub const TERM: u8 = 15;

/// The signals that are passed on.
pub struct Signals([(u8, Signal); 6]);

pub fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).while_doing(|| "listening for signals".into())
}

impl Signals {
    pub fn new() -> Result<Self> {
        Ok(Self([
            (HUP, listen(SignalKind::hangup())?),
            (INT, listen(SignalKind::interrupt())?),
            (QUIT, listen(SignalKind::quit())?),
            (10, listen(SignalKind::user_defined1())?),
            (12, listen(SignalKind::user_defined2())?),
            (TERM, listen(SignalKind::terminate())?),
        ]))
    }

    pub async fn next(&mut self) -> u8 {
        let [a, b, c, d, e, f] = &mut self.0;
        tokio::select! {
            _ = a.1.recv() => a.0,
            _ = b.1.recv() => b.0,
            _ = c.1.recv() => c.0,
            _ = d.1.recv() => d.0,
            _ = e.1.recv() => e.0,
            _ = f.1.recv() => f.0,
        }
    }
}
