//! A program of the site, for what nothing else controls: switched sockets, relays.
//!
//! ```text
//! PROGRAM ARGUMENT… NODE status                       prints `on` or `off`
//! PROGRAM ARGUMENT… NODE on|off|soft|reset
//! PROGRAM ARGUMENT… NODE bootdev                      prints `net`, or `disk always`
//! PROGRAM ARGUMENT… NODE bootdev net once
//! ```
//!
//! It is started as it is written, by no shell, with an environment of ours. A password, where
//! there is one, is the line that it reads. It fails by its exit status, and says why on standard
//! error.

use std::time::Duration;

use super::{Boot, Change, Controller, Device, Failure, Power, cannot_boot, program};
use crate::error::Error;
use crate::store::secret::Secret;

#[derive(Clone, Debug)]
pub struct Settings {
    pub program: String,
    pub arguments: Vec<String>,
    pub node: String,
    pub password: Option<Secret>,
}

/// The driver.
#[derive(Debug)]
pub struct Exec {
    settings: Settings,
    limit: Duration,
}

impl Exec {
    pub fn new(settings: Settings, limit: Duration) -> Self {
        Self { settings, limit }
    }

    async fn run(&self, words: &[&str]) -> Result<String, Failure> {
        let it = &self.settings;
        let arguments = it.arguments.iter().map(String::as_str);
        let args: Vec<&str> = arguments.chain([&*it.node]).chain(words.iter().copied()).collect();
        let input = it.password.as_ref().map_or(String::new(), |it| format!("{}\n", it.expose()));
        program(&it.program, &args, input.as_bytes(), self.limit).await
    }

    fn not_understood(&self, said: &str) -> Failure {
        let said: String = said.trim().chars().take(200).collect();
        let (program, said) = (&self.settings.program, said.escape_debug());
        Error::system(format!("`{program}` says what is not understood: `{said}`")).into()
    }
}

impl Controller for Exec {
    async fn power(&self) -> Result<Power, Failure> {
        let said = self.run(&["status"]).await?;
        match said.trim() {
            "on" => Ok(Power::On),
            "off" => Ok(Power::Off),
            _ => Err(self.not_understood(&said)),
        }
    }

    async fn change(&self, change: Change) -> Result<(), Failure> {
        let word = match change {
            Change::On => "on",
            Change::Off => "off",
            Change::Soft => "soft",
            Change::Reset => "reset",
        };
        self.run(&[word]).await.map(drop)
    }

    async fn boot(&self) -> Result<Boot, Failure> {
        let said = self.run(&["bootdev"]).await?;
        let (device, always) = match said.split_ascii_whitespace().collect::<Vec<_>>()[..] {
            [device] | [device, "once"] => (device, false),
            [device, "always"] => (device, true),
            _ => return Err(self.not_understood(&said)),
        };
        let known = [Device::Default, Device::Net, Device::Disk, Device::Cdrom, Device::Bios];
        let found = known.into_iter().find(|it| it.to_string() == device);
        Ok(Boot { device: found.unwrap_or(Device::Other), always })
    }

    async fn set_boot(&self, boot: Boot) -> Result<(), Failure> {
        if boot.device == Device::Other {
            return Err(cannot_boot(boot).into());
        }
        let often = if boot.always { "always" } else { "once" };
        self.run(&["bootdev", &boot.device.to_string(), often]).await.map(drop)
    }
}
