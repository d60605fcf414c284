//! Ten thousand BMCs in one process: each has an address of 127.0.0.0/8, a power state and a
//! boot device, and behaves as it is told to.
//!
//! [`Bmcs`] speaks IPMI 2.0 at one UDP port of all of them, from one thread, and, if it is asked
//! to, Redfish at a TCP port, from another. It reaches nothing but the loopback interface.

mod ipmi;
mod redfish;
mod udp;

use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use ipmi::Suites;
pub use redfish::{Redfish, Tls};

/// The address of the first.
const FIRST: u32 = u32::from_be_bytes([127, 16, 0, 1]);

/// The user that all of them know.
pub const USER: &str = "admin";
pub const PASSWORD: &str = "correct horse";

/// How a BMC answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    #[default]
    Honest,
    /// Never.
    Dead,
    /// Everything twice.
    Twice,
    /// To no packet but each so manieth.
    Deaf(u32),
    /// Who opened the session cannot be told by the code of its answers to commands.
    ForgedAnswers,
    /// It does not know the password, and answers all the same.
    ForgedLogin,
    /// It has other keys for the session.
    ForgedKeys,
    /// For a session that is not there.
    WrongSession,
    /// The first half of what it should.
    Truncated,
    /// Many packets of nonsense for the right session, and then what it should.
    Noise,
    /// Commands: it has no time.
    Busy,
    /// It has no room for another session.
    Full,
    /// It takes commands, and never says so.
    Mute,
    /// It changes its power, and never says so.
    Unconfirmed,
    /// It does not change its power by IPMI.
    NoChange,
}

/// One BMC and its machine.
#[derive(Clone, Debug)]
pub struct Bmc {
    pub on: bool,
    /// The five bytes of IPMI's boot flags.
    pub boot: [u8; 5],
    pub manner: Manner,
    /// How long each answer takes.
    pub delay: Duration,
    pub password: String,
    /// The controller's own key.
    pub key: Option<String>,
    pub suites: Suites,
    /// After which time the operating system has shut down; never where there is none.
    pub shuts_down: Option<Duration>,
    /// What Redfish says of its power: `None` is the truth, an empty text nothing.
    pub said_state: Option<&'static str>,
    /// How Redfish can reset it.
    pub resets: Vec<&'static str>,
    /// On how many pages Redfish tells its systems; all but the last are empty.
    pub pages: usize,
    /// Changes of power that were asked for, as IPMI numbers them.
    pub changes: Vec<u8>,
    /// Sessions that were opened and not closed.
    pub sessions: usize,
    /// How many packets came.
    pub packets: u32,
    off_at: Option<Instant>,
}

impl Bmc {
    fn new(delay: Duration) -> Self {
        Self {
            on: false,
            boot: [0; 5],
            manner: Manner::Honest,
            delay,
            password: PASSWORD.into(),
            key: None,
            suites: Suites::Both,
            shuts_down: Some(Duration::from_millis(100)),
            said_state: None,
            resets: vec!["On", "ForceOff", "GracefulShutdown", "ForceRestart"],
            pages: 1,
            changes: Vec::new(),
            sessions: 0,
            packets: 0,
            off_at: None,
        }
    }

    /// What happens in time.
    fn settle(&mut self) {
        if self.off_at.is_some_and(|at| at <= Instant::now()) {
            (self.on, self.off_at) = (false, None);
        }
    }

    /// A change of power as IPMI numbers it. Says whether there is such a one.
    fn change(&mut self, number: u8) -> bool {
        self.settle();
        self.changes.push(number);
        match number {
            0 => self.on = false,
            1 | 2 => self.on = true,
            3 => {}
            5 if self.on => {
                self.off_at = self.shuts_down.map(|delay| Instant::now() + delay);
            }
            5 => {}
            _ => return false,
        }
        true
    }
}

/// All of them, until this is dropped.
#[derive(Debug)]
pub struct Bmcs {
    all: Arc<Mutex<Vec<Bmc>>>,
    server: udp::Server,
}

fn lock(all: &Mutex<Vec<Bmc>>) -> MutexGuard<'_, Vec<Bmc>> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bmcs {
    /// Starts `count` of them, honest and off, at a port that is free (0) or this one.
    ///
    /// # Errors
    /// When there is no socket to be had.
    pub fn start(count: u32, delay: Duration, port: u16) -> io::Result<Self> {
        let all = vec![Bmc::new(delay); count as usize];
        let all = Arc::new(Mutex::new(all));
        let server = udp::Server::start(all.clone(), port)?;
        Ok(Self { all, server })
    }

    /// The UDP port of all of them.
    pub fn port(&self) -> u16 {
        self.server.port()
    }

    /// All of them speak Redfish too, at a port that is free, until what this gives is dropped.
    ///
    /// # Errors
    /// When there is no socket to be had.
    pub fn redfish(&self, tls: Tls) -> io::Result<Redfish> {
        Redfish::start(self.all.clone(), tls)
    }

    /// The address of one.
    pub fn address(index: u32) -> Ipv4Addr {
        Ipv4Addr::from(FIRST + index)
    }

    /// Looks at one, or changes it.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn with<T>(&self, index: u32, change: impl FnOnce(&mut Bmc) -> T) -> T {
        let mut all = lock(&self.all);
        let bmc = &mut all[index as usize];
        bmc.settle();
        change(bmc)
    }
}

/// Which it is, of `count`.
fn index(address: Ipv4Addr, count: usize) -> Option<usize> {
    let index = u32::from(address).checked_sub(FIRST)? as usize;
    (index < count).then_some(index)
}
