//! IPMI 2.0 over UDP ("lanplus"), in this process: a session for each question, and as many at
//! once as one likes.

pub(super) mod boot;
mod keys;
mod port;
mod session;
pub mod wire;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

pub use keys::Suite;
pub use port::Port;

use self::session::Session;
use self::wire::Command;
use super::{Boot, Change, Controller, Failure, Power, cannot_boot};
use crate::error::{Context, Error, Result};
use crate::store::secret::Secret;

/// IANA's.
pub const PORT: u16 = 623;

/// The most that IPMI has for a name, a password and a key, in bytes.
const MAX_USER: usize = 16;
const MAX_SECRET: usize = 20;

/// How a controller is reached and who we are there.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A name or address.
    pub address: String,
    pub port: u16,
    pub user: String,
    pub password: Secret,
    /// The controller's own key ("Kg"), where the site has set one.
    pub key: Option<Secret>,
    pub suite: SuiteChoice,
    pub privilege: Privilege,
    /// The machine's firmware is UEFI: some controllers want to know when they set what to boot.
    pub efi: bool,
}

impl Settings {
    /// The usual ones.
    pub fn new(address: impl Into<String>, user: impl Into<String>, password: Secret) -> Self {
        Self {
            address: address.into(),
            port: PORT,
            user: user.into(),
            password,
            key: None,
            suite: SuiteChoice::Best,
            privilege: Privilege::Operator,
            efi: false,
        }
    }

    fn check(&self) -> Result<()> {
        let long = |what: &str, length: usize, most: usize| {
            let text = format!("the {what} has {length} bytes, and IPMI takes {most} at most");
            if length > most { Err(Error::config(text)) } else { Ok(()) }
        };
        long("user's name", self.user.len(), MAX_USER)?;
        long("password", self.password.expose().len(), MAX_SECRET)?;
        long("controller's key", self.key.as_ref().map_or(0, |key| key.expose().len()), MAX_SECRET)
    }
}

/// Which cipher suite a session has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuiteChoice {
    /// 17, or 3 where the controller says that it has no such.
    Best,
    Only(Suite),
}

impl SuiteChoice {
    fn candidates(self) -> &'static [Suite] {
        match self {
            Self::Best => &[Suite::Seventeen, Suite::Three],
            Self::Only(Suite::Three) => &[Suite::Three],
            Self::Only(Suite::Seventeen) => &[Suite::Seventeen],
        }
    }
}

/// What a session may do. An operator may do all that is done here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Privilege {
    User = 2,
    Operator = 3,
    Administrator = 4,
}

/// The driver.
#[derive(Debug)]
pub struct Ipmi {
    settings: Settings,
    port: Arc<Port>,
    limit: Duration,
}

const CHASSIS: u8 = 0;
const APPLICATION: u8 = 6;

/// The boot option that says for how long the others are kept.
const BOOT_KEEPS: u8 = 3;

impl Ipmi {
    pub fn new(settings: Settings, port: Arc<Port>, limit: Duration) -> Self {
        Self { settings, port, limit }
    }

    async fn open(&self) -> Result<Session, Failure> {
        let end = Instant::now() + self.limit;
        self.settings.check()?;
        let peer = self.peer(end).await?;
        let conversation = self.port.talk(peer);
        let conversation = conversation
            .while_doing(|| format!("opening a socket to {peer}"))
            .map_err(Failure::passing)?;
        session::open(conversation, &self.settings, end, self.limit).await
    }

    async fn peer(&self, end: Instant) -> Result<SocketAddr, Failure> {
        let (name, port) = (&self.settings.address, self.settings.port);
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(SocketAddr::new(address, port));
        }
        let looking = || format!("looking for the address of `{}`", name.escape_debug());
        let found = timeout_at(end, tokio::net::lookup_host((name.as_str(), port))).await;
        let found = found.map_err(|_| Error::system("no answer in time"));
        let found = found.while_doing(looking).map_err(Failure::passing)?;
        let mut found = found.while_doing(looking).map_err(Failure::passing)?;
        found.next().ok_or_else(|| Error::system(format!("`{name}` has no address")).into())
    }

    /// A session that may change something.
    async fn open_to_change(&self) -> Result<Session, Failure> {
        let mut session = self.open().await?;
        let data = [self.settings.privilege as u8];
        let raise = Command { function: APPLICATION, command: 0x3b, data: &data };
        run(&mut session, "taking the privilege", raise).await?;
        Ok(session)
    }
}

impl Controller for Ipmi {
    async fn power(&self) -> Result<Power, Failure> {
        let mut session = self.open().await?;
        let command = Command { function: CHASSIS, command: 1, data: &[] };
        let answer = run(&mut session, "asking for the power's state", command).await?;
        let state = answer.first().ok_or_else(|| short("the power's state"))?;
        Ok(if state & 1 == 0 { Power::Off } else { Power::On })
    }

    async fn change(&self, change: Change) -> Result<(), Failure> {
        let mut session = self.open_to_change().await?;
        let (number, what) = match change {
            Change::Off => (0, "switching off"),
            Change::On => (1, "switching on"),
            Change::Reset => (3, "resetting"),
            Change::Soft => (5, "pressing the power button"),
        };
        let command = Command { function: CHASSIS, command: 2, data: &[number] };
        let once = !change.may_be_repeated();
        completed(what, session.run(what, command, once).await?).map(drop)
    }

    async fn boot(&self) -> Result<Boot, Failure> {
        let mut session = self.open().await?;
        let command = Command { function: CHASSIS, command: 9, data: &[boot::OPTION, 0, 0] };
        let answer = run(&mut session, "asking for the boot device", command).await?;
        Ok(boot::read(&answer).ok_or_else(|| short("the boot device"))?)
    }

    async fn set_boot(&self, boot: Boot) -> Result<(), Failure> {
        let data = boot::write(boot, self.settings.efi).ok_or_else(|| cannot_boot(boot))?;
        let mut session = self.open_to_change().await?;
        // Not only within the next minute, where the controller can do that.
        let keep = Command { function: CHASSIS, command: 8, data: &[BOOT_KEEPS, 8] };
        let _ = session.run("keeping the boot device", keep, false).await?;
        let command = Command { function: CHASSIS, command: 8, data: &data };
        run(&mut session, "setting the boot device", command).await.map(drop)
    }
}

fn short(what: &str) -> Error {
    Error::system(format!("the controller's answer with {what} is too short"))
}

/// Runs a command that has to be completed.
async fn run(session: &mut Session, what: &str, command: Command<'_>) -> Result<Vec<u8>, Failure> {
    completed(what, session.run(what, command, false).await?)
}

fn completed(what: &str, answer: Result<Vec<u8>, u8>) -> Result<Vec<u8>, Failure> {
    answer.map_err(|code| {
        let (again, why) = match code {
            0xc0 => (true, "the controller is busy"),
            0xc1 => (false, "the controller does not know this command"),
            0xc3 => (true, "the controller gave up"),
            0xcc => (false, "the controller takes no such value"),
            0xd4 => (false, "the user, or the session, does not have this privilege"),
            0xd5 => (false, "the controller cannot do this now"),
            _ => (false, "the controller refuses"),
        };
        let error = Error::system(format!("{what}: {why} (code {code:#04x})"));
        // Who gave up may have begun.
        Failure { again, perhaps_done: code == 0xc3, error }
    })
}
