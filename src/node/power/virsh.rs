//! A virtual machine of libvirt, by the program `virsh`: on this host, or on another by ssh.
//!
//! What it boots from is in its definition: it is so from the next start on, and for good. The
//! definition is taken with its secrets and put back, which only `virsh` itself sees.

use std::time::Duration;

use super::{Boot, Change, Controller, Device, Failure, Power, cannot_boot, program};
use crate::error::Error;

#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name, or path.
    pub program: String,
    /// The host's libvirt, as [`uri`] writes it.
    pub uri: String,
    /// Its name there.
    pub domain: String,
}

/// Where libvirt is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    pub user: Option<String>,
    pub address: String,
    pub port: Option<u16>,
    /// The file with the key of ssh.
    pub key: Option<String>,
}

/// The address of libvirt's own service on a host; on this one where there is none.
pub fn uri(host: Option<&Host>) -> String {
    let Some(host) = host else { return "qemu:///system".into() };
    let user = host.user.as_deref().map_or(String::new(), |user| format!("{}@", escaped(user)));
    let address = match host.address.contains(':') {
        true => format!("[{}]", host.address),
        false => host.address.clone(),
    };
    let port = host.port.map_or(String::new(), |port| format!(":{port}"));
    let key = host.key.as_deref();
    let key = key.map_or(String::new(), |key| format!("&keyfile={}", escaped(key)));
    // Nobody is there to be asked.
    format!("qemu+ssh://{user}{address}{port}/system?no_tty=1{key}")
}

/// A text as a part of an address.
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    let each = text.bytes().map(|byte| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    each.collect()
}

/// The driver.
#[derive(Debug)]
pub struct Virsh {
    settings: Settings,
    limit: Duration,
}

impl Virsh {
    pub fn new(settings: Settings, limit: Duration) -> Self {
        Self { settings, limit }
    }

    async fn run(&self, words: &[&str], input: &str) -> Result<String, Failure> {
        let it = &self.settings;
        let args = [&["-q", "-c", &*it.uri], words].concat();
        program(&it.program, &args, input.as_bytes(), self.limit).await
    }

    /// With the name of the machine behind it.
    async fn of_domain(&self, words: &[&str]) -> Result<String, Failure> {
        self.run(&[words, &["--domain", &self.settings.domain]].concat(), "").await
    }

    async fn definition(&self) -> Result<String, Failure> {
        self.of_domain(&["dumpxml", "--inactive", "--security-info"]).await
    }
}

impl Controller for Virsh {
    async fn power(&self) -> Result<Power, Failure> {
        let said = self.of_domain(&["domstate"]).await?;
        match said.trim() {
            "shut off" | "crashed" => Ok(Power::Off),
            "running" | "idle" | "paused" | "in shutdown" | "pmsuspended" => Ok(Power::On),
            other => Err(not_understood(other)),
        }
    }

    async fn change(&self, change: Change) -> Result<(), Failure> {
        let word = match (change, self.power().await?) {
            (Change::On, Power::On) | (Change::Off | Change::Soft, Power::Off) => return Ok(()),
            (Change::On, _) => "start",
            (Change::Off, _) => "destroy",
            (Change::Soft, _) => "shutdown",
            (Change::Reset, _) => "reset",
        };
        self.of_domain(&[word]).await.map(drop)
    }

    async fn boot(&self) -> Result<Boot, Failure> {
        let definition = self.definition().await?;
        let (_, system, _) = system(&definition).ok_or_else(|| not_understood(&definition))?;
        let device = match boot_lines(system).next().and_then(device) {
            None => return Ok(Boot::DEFAULT),
            Some("network") => Device::Net,
            Some("hd") => Device::Disk,
            Some("cdrom") => Device::Cdrom,
            Some(_) => Device::Other,
        };
        Ok(Boot { device, always: true })
    }

    async fn set_boot(&self, boot: Boot) -> Result<(), Failure> {
        let word = match boot.device {
            Device::Default => None,
            Device::Net => Some("network"),
            Device::Disk => Some("hd"),
            Device::Cdrom => Some("cdrom"),
            Device::Bios | Device::Other => return Err(cannot_boot(boot).into()),
        };
        let definition = self.definition().await?;
        let changed = with_boot(&definition, word).ok_or_else(|| not_understood(&definition))?;
        self.run(&["define", "/dev/stdin"], &changed).await.map(drop)
    }
}

fn not_understood(said: &str) -> Failure {
    let said: String = said.trim().chars().take(200).collect();
    Error::system(format!("`virsh` says what is not understood: `{}`", said.escape_debug())).into()
}

/// What is before, in, and after the part of a definition that says how it boots.
fn system(definition: &str) -> Option<(&str, &str, &str)> {
    let end = definition.find("</os>")?;
    let begin = definition[..end].rfind("<os>").or_else(|| definition[..end].rfind("<os "))?;
    Some((&definition[..begin], &definition[begin..end], &definition[end..]))
}

/// `<boot dev='hd'/>`, of which there may be several. Each has a line of its own.
fn boot_lines(system: &str) -> impl Iterator<Item = &str> {
    system.lines().filter(|line| line.trim_start().starts_with("<boot dev="))
}

fn device(line: &str) -> Option<&str> {
    line.split(['\'', '"']).nth(1)
}

/// The definition with one device to boot from.
fn with_boot(definition: &str, device: Option<&str>) -> Option<String> {
    let (before, system, after) = system(definition)?;
    let is_boot = |line: &&str| line.trim_start().starts_with("<boot dev=");
    let kept: String = system.split_inclusive('\n').filter(|line| !is_boot(line)).collect();
    let boot = device.map_or(String::new(), |device| format!("  <boot dev='{device}'/>\n  "));
    Some(format!("{before}{kept}{boot}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFINITION: &str = "<domain>\n  <os>\n    <type arch='x86_64'>hvm</type>\n    \
                              <boot dev='hd'/>\n    <boot dev='cdrom'/>\n  </os>\n  <devices/>\n\
                              </domain>\n";

    #[test]
    fn one_device_takes_the_place_of_those_there_were() {
        let changed = with_boot(DEFINITION, Some("network")).unwrap();
        let (_, inside, _) = system(&changed).unwrap();
        let devices: Vec<_> = boot_lines(inside).filter_map(device).collect();
        assert_eq!(devices, ["network"]);
        assert!(changed.ends_with("</os>\n  <devices/>\n</domain>\n"), "{changed}");
        let none = with_boot(&changed, None).unwrap();
        assert!(!none.contains("<boot") && none.contains("hvm</type>"), "{none}");
        assert_eq!(with_boot("<domain/>", None), None);
    }

    #[test]
    fn what_is_odd_in_a_host_changes_nothing_of_the_address() {
        let host = Host {
            user: Some("a&b@c".into()),
            address: "fe80::1".into(),
            port: Some(2222),
            key: Some("/k?x=1&y".into()),
        };
        assert_eq!(
            uri(Some(&host)),
            "qemu+ssh://a%26b%40c@[fe80::1]:2222/system?no_tty=1&keyfile=/k%3Fx%3D1%26y"
        );
        let plain = Host { address: "host1".into(), ..Host::default() };
        assert_eq!(uri(Some(&plain)), "qemu+ssh://host1/system?no_tty=1");
        assert_eq!(uri(None), "qemu:///system");
    }
}
