//! Power and boot device of machines, by whatever controls them.
//!
//! ```text
//! Bmc { node, control }  ── open ──>  dyn Driver    what one controller can do, once
//!                                        │
//!                         action::perform│          one action on one node: `cycle`, `soft` and
//!                                        │          `boot` are made of a driver's changes here
//!                          fanout::run ──┘          many nodes: at once, in windows, again,
//!                                                   up to a limit of failures
//! ```
//!
//! A driver says nothing of the node's name, and never what a password is. It ends within the
//! time that it was opened with. Nothing that a controller answers is trusted to be short, to be
//! well formed, or to be of the one that was asked.

pub mod action;
pub mod exec;
pub mod fanout;
pub mod ipmi;
pub mod ipmitool;
pub mod qmp;
pub mod redfish;
pub mod virsh;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::host::cmd;

/// A machine and what controls it, as the inventory resolved it.
#[derive(Clone, Debug)]
pub struct Bmc {
    pub node: String,
    pub control: Control,
}

/// What controls a machine.
#[derive(Clone, Debug)]
pub enum Control {
    Redfish(redfish::Settings),
    /// IPMI 2.0 over UDP, spoken by ourselves.
    Ipmi(ipmi::Settings),
    /// The program `ipmitool`, for controllers whose IPMI is their own.
    Ipmitool(ipmitool::Settings),
    /// A virtual machine that stands for a real one.
    Qmp(qmp::Settings),
    /// A virtual machine of libvirt, the same.
    Virsh(virsh::Settings),
    /// A program of the site.
    Exec(exec::Settings),
}

/// Whether a machine is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    On,
    Off,
}

impl fmt::Display for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

/// What a controller does to a machine when it is told to. It answers before it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    On,
    /// As if the cable were pulled.
    Off,
    /// The power button, pressed shortly: the operating system shuts down if it listens.
    Soft,
    /// The reset button. What is off may refuse it.
    Reset,
}

impl Change {
    /// Whether doing it a second time does no more than doing it once.
    pub fn may_be_repeated(self) -> bool {
        matches!(self, Self::On | Self::Off)
    }
}

/// What a machine boots from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// What its firmware is set to: nothing is overridden.
    Default,
    Net,
    Disk,
    Cdrom,
    /// The set-up of the firmware.
    Bios,
    /// Something that has no name here; it is seen and cannot be set.
    Other,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::Net => "net",
            Self::Disk => "disk",
            Self::Cdrom => "cdrom",
            Self::Bios => "bios",
            Self::Other => "other",
        })
    }
}

/// A boot device, for the next boot or for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    pub device: Device,
    /// Not only the next time.
    pub always: bool,
}

impl Boot {
    /// What the firmware is set to.
    pub const DEFAULT: Self = Self { device: Device::Default, always: false };
}

/// `net`, or `disk, always`.
impl fmt::Display for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let always = self.always && self.device != Device::Default;
        write!(f, "{}{}", self.device, if always { ", always" } else { "" })
    }
}

/// Why a controller did not do what it was asked.
#[derive(Debug)]
pub struct Failure {
    /// Whether the same may succeed when it is tried again: nobody answered, or had no time. A
    /// wrong password is never tried twice, since controllers lock accounts.
    pub again: bool,
    /// The controller may have heard what it was told, and done it.
    pub perhaps_done: bool,
    pub error: Error,
}

impl Failure {
    /// Nobody answered, or was too busy; nothing was done.
    pub fn passing(error: Error) -> Self {
        Self { again: true, perhaps_done: false, error }
    }

    /// It was told, and nobody answered.
    pub fn unconfirmed(error: Error) -> Self {
        Self { again: true, perhaps_done: true, error }
    }

    /// The same, with what was being done.
    fn while_doing(self, what: String) -> Self {
        Self { error: Error::new(self.error.kind(), what).because(self.error), ..self }
    }
}

/// It was refused, and will be again.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { again: false, perhaps_done: false, error }
    }
}

/// What is asked of a controller. Each call is a conversation of its own; dropping its future
/// ends it.
trait Controller: fmt::Debug + Send + Sync {
    fn power(&self) -> impl Future<Output = Result<Power, Failure>> + Send;

    fn change(&self, change: Change) -> impl Future<Output = Result<(), Failure>> + Send;

    fn boot(&self) -> impl Future<Output = Result<Boot, Failure>> + Send;

    fn set_boot(&self, boot: Boot) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// What a driver answers, later.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send + 'a>>;

/// A controller of any kind.
pub trait Driver: fmt::Debug + Send + Sync {
    fn power(&self) -> Answer<'_, Power>;

    fn change(&self, change: Change) -> Answer<'_, ()>;

    fn boot(&self) -> Answer<'_, Boot>;

    fn set_boot(&self, boot: Boot) -> Answer<'_, ()>;
}

impl<T: Controller> Driver for T {
    fn power(&self) -> Answer<'_, Power> {
        Box::pin(Controller::power(self))
    }

    fn change(&self, change: Change) -> Answer<'_, ()> {
        Box::pin(Controller::change(self, change))
    }

    fn boot(&self) -> Answer<'_, Boot> {
        Box::pin(Controller::boot(self))
    }

    fn set_boot(&self, boot: Boot) -> Answer<'_, ()> {
        Box::pin(Controller::set_boot(self, boot))
    }
}

/// What the conversations with all controllers share. It lives in one asynchronous runtime.
#[derive(Clone, Debug, Default)]
pub struct Hub {
    ipmi: Arc<ipmi::Port>,
    certificates: Arc<redfish::Certificates>,
}

/// The driver of a controller, each of whose answers takes at most `limit`.
pub fn open(control: &Control, hub: &Hub, limit: Duration) -> Box<dyn Driver> {
    match control {
        Control::Redfish(settings) => {
            Box::new(redfish::Redfish::new(settings.clone(), hub.certificates.clone(), limit))
        }
        Control::Ipmi(settings) => {
            Box::new(ipmi::Ipmi::new(settings.clone(), hub.ipmi.clone(), limit))
        }
        Control::Ipmitool(settings) => Box::new(ipmitool::Ipmitool::new(settings.clone(), limit)),
        Control::Qmp(settings) => Box::new(qmp::Qmp::new(settings.clone(), limit)),
        Control::Virsh(settings) => Box::new(virsh::Virsh::new(settings.clone(), limit)),
        Control::Exec(settings) => Box::new(exec::Exec::new(settings.clone(), limit)),
    }
}

/// What no driver can be told to boot.
fn cannot_boot(boot: Boot) -> Error {
    Error::usage(format!("`{}` cannot be set as a boot device", boot.device))
}

/// Runs a program to its end, or to the limit.
async fn program(
    program: &str,
    args: &[&str],
    input: &[u8],
    limit: Duration,
) -> Result<String, Failure> {
    let begun = std::time::Instant::now();
    let command = cmd::Command { program, args, input, namespace: None, limit };
    let output = cmd::run(&command).await;
    // Who did not end in time may do so another time; who says no has been heard.
    let late = begun.elapsed() >= limit;
    let output = output.map_err(|error| Failure { again: late, perhaps_done: late, error })?;
    Ok(String::from_utf8_lossy(&output).into_owned())
}
