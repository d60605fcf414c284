//! The program `ipmitool`, a process for each question. It costs a hundred times what our own
//! IPMI does, and has learned the ways of odd controllers for twenty years.

use std::time::Duration;

use super::ipmi::boot;
use super::{Boot, Change, Controller, Failure, Power, cannot_boot, program};
use crate::error::Error;
use crate::store::secret::Secret;

#[derive(Clone, Debug)]
pub struct Settings {
    pub address: String,
    pub port: u16,
    pub user: String,
    /// It goes to the program's standard input, as a file.
    pub password: Secret,
    /// How it speaks to the controller (`-I`).
    pub interface: String,
    /// Further options, such as `-o intelplus` or `-C 3`, for this controller's ways.
    pub options: Vec<String>,
    pub efi: bool,
}

impl Settings {
    /// The usual ones.
    pub fn new(address: impl Into<String>, user: impl Into<String>, password: Secret) -> Self {
        Self {
            address: address.into(),
            port: super::ipmi::PORT,
            user: user.into(),
            password,
            interface: "lanplus".into(),
            options: Vec::new(),
            efi: false,
        }
    }
}

/// The driver.
#[derive(Debug)]
pub struct Ipmitool {
    settings: Settings,
    limit: Duration,
}

impl Ipmitool {
    pub fn new(settings: Settings, limit: Duration) -> Self {
        Self { settings, limit }
    }

    async fn run(&self, words: &[&str]) -> Result<String, Failure> {
        let it = &self.settings;
        let port = it.port.to_string();
        let mut args = vec!["-I", &it.interface, "-H", &it.address, "-p", &port];
        args.extend(["-U", &it.user, "-L", "OPERATOR", "-f", "/dev/stdin"]);
        args.extend(it.options.iter().map(String::as_str));
        args.extend(words);
        let password = format!("{}\n", it.password.expose());
        program("ipmitool", &args, password.as_bytes(), self.limit).await
    }
}

impl Controller for Ipmitool {
    async fn power(&self) -> Result<Power, Failure> {
        let said = self.run(&["power", "status"]).await?;
        match said.trim() {
            "Chassis Power is on" => Ok(Power::On),
            "Chassis Power is off" => Ok(Power::Off),
            other => Err(not_understood(other)),
        }
    }

    async fn change(&self, change: Change) -> Result<(), Failure> {
        let word = match change {
            Change::On => "on",
            Change::Off => "off",
            Change::Soft => "soft",
            Change::Reset => "reset",
        };
        self.run(&["power", word]).await.map(drop)
    }

    async fn boot(&self) -> Result<Boot, Failure> {
        let option = boot::OPTION.to_string();
        let said = self.run(&["raw", "0", "9", &option, "0", "0"]).await?;
        let bytes = said.split_ascii_whitespace().map(|byte| u8::from_str_radix(byte, 16).ok());
        let bytes: Option<Vec<u8>> = bytes.collect();
        bytes.and_then(|bytes| boot::read(&bytes)).ok_or_else(|| not_understood(&said))
    }

    async fn set_boot(&self, boot: Boot) -> Result<(), Failure> {
        let data = boot::write(boot, self.settings.efi).ok_or_else(|| cannot_boot(boot))?;
        let data = data.map(|byte| byte.to_string());
        let words: Vec<&str> =
            ["raw", "0", "8"].into_iter().chain(data.iter().map(|it| &**it)).collect();
        self.run(&words).await.map(drop)
    }
}

fn not_understood(said: &str) -> Failure {
    let said: String = said.trim().chars().take(200).collect();
    Error::system(format!("`ipmitool` says what is not understood: `{}`", said.escape_debug()))
        .into()
}
