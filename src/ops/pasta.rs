//! pasta: an ordinary user's way out of the cell.
//!
//! pasta makes a link in the cell's network namespace and carries what is sent there by
//! sockets of its own, as any program of the user would. It stays out here and dies with
//! the launcher.

use std::fs::File;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use tokio::process::Child;

use crate::error::{Context, Error, Result};

/// The link in the cell, and the /30 on it. RFC 7335 reserves 192.0.0.0/29 for such links
/// inside a machine: no network that a guest may want to reach is hidden.
pub const LINK: &str = "pasta0";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);

const LOG: &str = "pasta.log";
/// A route that is in use (`linux/route.h`).
const RTF_UP: u16 = 1;

/// Whether this machine has a default route, without which pasta has nothing to do and
/// does not start. Columns of `/proc/net/route`: interface, destination, gateway, flags.
pub fn has_way_out() -> bool {
    let routes = std::fs::read_to_string("/proc/self/net/route").unwrap_or_default();
    is_routed(&routes)
}

fn is_routed(routes: &str) -> bool {
    routes.lines().skip(1).any(|line| {
        let mut columns = line.split_whitespace().skip(1);
        let (destination, flags) = (columns.next(), columns.nth(1));
        let up = flags.and_then(|flags| u16::from_str_radix(flags, 16).ok());
        destination == Some("00000000") && up.is_some_and(|flags| flags & RTF_UP != 0)
    })
}

/// Starts pasta for the namespaces of process `pid`. It dies with this process.
///
/// # Errors
/// When it is not installed.
pub fn start(pid: u32, dir: &Path) -> Result<Child> {
    let log = File::create(dir.join(LOG)).while_doing(|| "creating pasta's log".into())?;
    let mut command = Command::new("pasta");
    // In the foreground: in the background it would leave a child that nobody ends.
    command.args(["--config-net", "-4", "-q", "-f", "-I", LINK, "--no-map-gw", "-n", "30"]);
    command.args(["-a", &ADDRESS.to_string(), "-g", &GATEWAY.to_string()]);
    // Nothing is published by pasta, in neither direction: it would splice connections
    // to the loopback address of the other side.
    command.args(["-T", "none", "-U", "none", "-t", "none", "-u", "none"]);
    command.arg(pid.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    crate::host::spawn::die_with_parent(&mut command);
    let spawned = tokio::process::Command::from(command).kill_on_drop(true).spawn();
    spawned.map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::system("`pasta` is not installed")
            .help("install the package `passt`: `apt-get install passt`"),
        _ => Error::system("starting pasta").because(error),
    })
}

/// How pasta has ended; pending while it runs, or if there is none.
pub async fn ended(pasta: Option<&mut Child>) -> String {
    match pasta {
        Some(pasta) => match pasta.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        },
        None => std::future::pending().await,
    }
}

/// What its end means, with what it said.
pub fn error(status: &str, dir: &Path) -> Error {
    let said = std::fs::read_to_string(dir.join(LOG)).unwrap_or_default();
    // It also says that it has no system log to write to.
    let said: Vec<&str> = said.lines().filter(|line| !line.contains("syslog")).collect();
    let cause = match said.as_slice() {
        [] => status.to_owned(),
        said => format!("{status}: {}", said.join("; ")),
    };
    Error::system("pasta, the cluster's way out, has ended")
        .because(Error::system(cause))
        .help("try `pasta --config-net true` by hand; it needs /dev/net/tun and a default route")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_route_is_a_way_out_and_a_route_to_a_network_is_none() {
        let head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n";
        let default = "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\n";
        let near = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\n";
        assert!(is_routed(&format!("{head}{near}{default}")));
        assert!(!is_routed(&format!("{head}{near}")));
        assert!(!is_routed(head) && !is_routed(""));
    }
}
