//! A virtual machine that stands for a real one, by the socket of its QEMU (QMP).
//!
//! The machine is QEMU, which has to outlive what it runs: it is started with `-no-shutdown`, and
//! with `-S` if it shall be off in the beginning. Off is a machine that is reset and not let go
//! on. What it boots from is the order of its devices, by their ids, from the next reset on; QEMU
//! keeps it always.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{Boot, Change, Controller, Device, Failure, Power, cannot_boot};
use crate::error::{Context, Error};

/// The longest line that QEMU may say.
const MAX_LINE: u64 = 1 << 20;
/// How many it may say before the one that answers: events.
const MAX_LINES: usize = 1000;

#[derive(Clone, Debug)]
pub struct Settings {
    pub socket: PathBuf,
    /// The ids of what can be booted from.
    pub net: Option<String>,
    pub disk: Option<String>,
    pub cdrom: Option<String>,
}

impl Settings {
    fn devices(&self) -> impl Iterator<Item = (Device, &str)> {
        let all =
            [(Device::Net, &self.net), (Device::Disk, &self.disk), (Device::Cdrom, &self.cdrom)];
        all.into_iter().filter_map(|(device, id)| Some((device, id.as_deref()?)))
    }
}

/// The driver.
#[derive(Debug)]
pub struct Qmp {
    settings: Settings,
    limit: Duration,
}

impl Qmp {
    pub fn new(settings: Settings, limit: Duration) -> Self {
        Self { settings, limit }
    }

    /// Talks to QEMU, within the limit.
    async fn talk<T>(
        &self,
        talk: impl AsyncFnOnce(&mut Monitor) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let socket = self.settings.socket.display();
        let all = async {
            let stream = UnixStream::connect(&self.settings.socket).await;
            let stream = stream.while_doing(|| "connecting".into()).map_err(Failure::passing)?;
            let mut monitor = Monitor { stream: BufReader::new(stream) };
            monitor.line().await?;
            monitor.run("qmp_capabilities", json!({})).await?;
            Ok(talk(&mut monitor).await?)
        };
        let result = timeout(self.limit, all).await.unwrap_or_else(|_| {
            let limit = self.limit.as_secs_f32();
            Err(Failure::unconfirmed(Error::system(format!("no answer within {limit} s"))))
        });
        result.map_err(|failure| failure.while_doing(format!("asking QEMU at `{socket}`")))
    }
}

impl Controller for Qmp {
    async fn power(&self) -> Result<Power, Failure> {
        self.talk(async |monitor| monitor.power().await).await
    }

    async fn change(&self, change: Change) -> Result<(), Failure> {
        self.talk(async |monitor| {
            let power = monitor.power().await?;
            let commands: &[&str] = match (change, power) {
                (Change::On, Power::Off) => &["system_reset", "cont"],
                (Change::Off, Power::On) => &["stop", "system_reset"],
                (Change::Soft, Power::On) => &["system_powerdown"],
                (Change::Reset, Power::On) => &["system_reset"],
                (Change::Reset, Power::Off) => return Err(Error::system("the machine is off")),
                (Change::On | Change::Off | Change::Soft, _) => &[],
            };
            for command in commands {
                monitor.run(command, json!({})).await?;
            }
            Ok(())
        })
        .await
    }

    async fn boot(&self) -> Result<Boot, Failure> {
        self.talk(async |monitor| {
            let mut first: Option<(i64, Device)> = None;
            for (device, id) in self.settings.devices() {
                let place = monitor.place(id).await?;
                if place >= 0 && first.is_none_or(|(least, _)| place < least) {
                    first = Some((place, device));
                }
            }
            Ok(first.map_or(Boot::DEFAULT, |(_, device)| Boot { device, always: true }))
        })
        .await
    }

    async fn set_boot(&self, boot: Boot) -> Result<(), Failure> {
        if matches!(boot.device, Device::Other | Device::Bios) {
            return Err(cannot_boot(boot).into());
        }
        let known = self.settings.devices().any(|(device, _)| device == boot.device);
        if !known && boot.device != Device::Default {
            let what = format!("no id of a device is known for `{}`", boot.device);
            return Err(Error::config(what)
                .help(format!("say it: `control/qmp_{}=ID`", boot.device))
                .into());
        }
        self.talk(async |monitor| {
            // No two may have the same place, not even for a moment.
            for (_, id) in self.settings.devices() {
                monitor.set_place(id, -1).await?;
            }
            for (device, id) in self.settings.devices() {
                if device == boot.device {
                    monitor.set_place(id, 0).await?;
                }
            }
            Ok(())
        })
        .await
    }
}

/// A connection that accepts commands, one at a time.
struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    async fn line(&mut self) -> Result<Value, Error> {
        let mut line = Vec::new();
        let read = (&mut self.stream).take(MAX_LINE).read_until(b'\n', &mut line).await;
        read.while_doing(|| "reading".into())?;
        if !line.ends_with(b"\n") {
            return Err(Error::system("it says no whole line"));
        }
        serde_json::from_slice(&line).while_doing(|| "reading an answer".into())
    }

    async fn run(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let written = self.stream.get_mut().write_all(line.as_bytes()).await;
        written.while_doing(|| format!("saying `{command}`"))?;
        for _ in 0..MAX_LINES {
            let mut said = self.line().await?;
            if let Some(answer) = said.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = said.get("error") {
                let why = error.get("desc").and_then(Value::as_str).unwrap_or("no word of it");
                let why: String = why.chars().take(500).collect();
                let why = why.escape_debug();
                return Err(Error::system(format!("QEMU refuses `{command}`: {why}")));
            }
        }
        Err(Error::system(format!("no answer to `{command}` among {MAX_LINES} lines")))
    }

    async fn power(&mut self) -> Result<Power, Error> {
        let status = self.run("query-status", json!({})).await?;
        let running = status.get("running").and_then(Value::as_bool);
        match running {
            Some(true) => Ok(Power::On),
            Some(false) => Ok(Power::Off),
            None => Err(Error::system("QEMU does not say whether it runs")),
        }
    }

    async fn place(&mut self, id: &str) -> Result<i64, Error> {
        let arguments = json!({ "path": id, "property": "bootindex" });
        let place = self.run("qom-get", arguments).await?;
        place.as_i64().ok_or_else(|| Error::system(format!("`{id}` has no place in the order")))
    }

    async fn set_place(&mut self, id: &str, place: i64) -> Result<(), Error> {
        let arguments = json!({ "path": id, "property": "bootindex", "value": place });
        self.run("qom-set", arguments).await.map(drop)
    }
}
