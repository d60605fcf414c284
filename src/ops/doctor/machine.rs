//! What runs VMs and carries their frames.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;

use super::{Good, Outcome, Patient, Role, at_once, ok, run, warn};
use crate::config::{Network, SwitchChoice};
use crate::error::{Context, Error};
use crate::host::tunnel::SOURCE_PORTS;
use crate::host::{Host, firewall};
use crate::network::{self, Switch};
use crate::ops::cleanup::NETNS_DIR;
use crate::ops::rehearsal::rehearse;
use crate::ops::setup::{BRIDGES_CALL_IPTABLES, holding::SCRATCH_DIR, underlay};
use crate::vm::kvm;

/// The first port that needs no privilege (ip-sysctl.rst).
const UNPRIVILEGED_PORTS: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
const PROBE: Duration = Duration::from_secs(3);
const REHEARSAL: Duration = Duration::from_secs(9);
/// A cluster's disks grow to the size of its images.
const ENOUGH: u64 = 10 << 30;
/// QEMU opens some hundred files; a host of many VMs some for each.
const FILES: u64 = 4096;

pub(super) fn checks(patient: &Patient) -> Vec<(&'static str, BoxFuture<'_, Outcome>)> {
    let mut checks: Vec<(_, BoxFuture<'_, Outcome>)> = Vec::new();
    if patient.role == Role::Login {
        return checks;
    }
    checks.push(("qemu", qemu().boxed()));
    checks.push(("kvm", kvm_verdict().boxed()));
    checks.push(("tun", at_once(tun())));
    // On a node only root makes networks.
    if patient.is_root || patient.role == Role::Alone {
        checks.push(("network", network_tried().boxed()));
    }
    if patient.is_root {
        checks.push(("forward", forward().boxed()));
        checks.push(("switch", switch(patient).boxed()));
    } else if patient.role == Role::Alone {
        checks.push(("pasta", pasta().boxed()));
    }
    if patient.role == Role::Node {
        checks.push(("tunnels", at_once(tunnel_ports())));
    }
    if patient.config.networks.values().any(has_ipv6) {
        checks.push(("ipv6", at_once(ipv6(Path::new("/proc/sys/net")))));
    }
    checks.push(("bridge-nf", at_once(bridge_nf())));
    checks.push(("space", at_once(space(patient))));
    checks.push(("limits", at_once(limits())));
    checks
}

/// Whether a program of this name runs here.
pub(super) fn runs(name: &str) -> bool {
    let mut processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_it = |entry: fs::DirEntry| {
        fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    processes.any(is_it)
}

async fn qemu() -> Outcome {
    let text = run("qemu-system-x86_64", &["--version"], b"").await;
    let text = text.map_err(|error| error.help("install it: package qemu-system-x86"))?;
    ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

async fn kvm_verdict() -> Outcome {
    let exe = std::env::current_exe().while_doing(|| "finding this program".into())?;
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return warn(
            format!("VMs are emulated, and slow: /dev/kvm does not open ({error})"),
            "switch virtualisation on in the firmware, `modprobe kvm_intel` or `kvm_amd`, and \
             let users open it: `chmod 0666 /dev/kvm`",
        );
    }
    match kvm::probe(&exe, PROBE).await {
        Ok(()) => ok("guests run"),
        Err(why) => warn(
            format!("VMs are emulated, and slow: {}", why.trim()),
            "inside of a VM: let its host pass virtualisation on",
        ),
    }
}

fn tun() -> Outcome {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    opened.while_doing(|| "opening `/dev/net/tun`".into()).map_err(|error| {
        error.help("`modprobe tun`, and let everybody open it: `chmod 0666 /dev/net/tun`")
    })?;
    ok("/dev/net/tun opens")
}

async fn network_tried() -> Outcome {
    rehearse(REHEARSAL).await.while_doing(|| "trying a cluster's network".into())?;
    ok("a cluster's network can be made")
}

async fn forward() -> Outcome {
    let drops = firewall::forward_drops().await?;
    if drops.is_empty() {
        return ok("no firewall drops what clusters send");
    }
    let names: Vec<String> = drops.iter().map(firewall::ForwardDrop::name).collect();
    let help = drops.iter().flat_map(firewall::ForwardDrop::rules).collect();
    let found = format!("{} drops what no rule accepts; clusters need one", names.join(", "));
    Ok(Good::Warn(found, help))
}

fn has_ipv6(network: &Network) -> bool {
    matches!(network, Network::Ethernet(ethernet) if ethernet.int_network6.is_some())
}

/// What a network with `int-network6` takes. Where the host has it off, its namespaces have it
/// nevertheless; where the kernel has, nobody has.
fn ipv6(settings: &Path) -> Outcome {
    if settings.join("ipv6/conf").exists() {
        return ok("the kernel has it, as `int-network6` in networks.yaml needs");
    }
    Err(Error::system("the kernel has no IPv6, which `int-network6` in networks.yaml needs")
        .help("start the kernel without `ipv6.disable=1`, or take `int-network6` out"))
}

fn bridge_nf() -> Outcome {
    if !firewall::bridges_call_iptables() {
        return ok("frames on bridges pass no IP rules of the host");
    }
    let mut lines = BRIDGES_CALL_IPTABLES.lines().map(str::trim);
    let found = lines.next().unwrap_or_default().to_owned();
    let help = lines.map(|line| line.trim_start_matches("help: ").to_owned()).collect();
    Ok(Good::Warn(found, help))
}

/// Whether only root sends from the ports by which hosts know each other's tunnels.
fn tunnel_ports() -> Outcome {
    let start = fs::read_to_string(UNPRIVILEGED_PORTS)
        .while_doing(|| format!("reading `{UNPRIVILEGED_PORTS}`"))?;
    let (first, last) = SOURCE_PORTS;
    match start.trim().parse::<u32>() {
        Ok(start) if start <= last.into() => warn(
            format!(
                "every user may send from ports {start} and above: from {first} to {last} that \
                 passes for another host's tunnel, and gets into others' clusters"
            ),
            "`sysctl -w net.ipv4.ip_unprivileged_port_start=1024`, and so in /etc/sysctl.d; let a \
             program that needs such a port have CAP_NET_BIND_SERVICE",
        ),
        _ => ok(format!("only root sends from ports {first} to {last}")),
    }
}

/// What carries frames here, and why.
async fn switch(patient: &Patient) -> Outcome {
    let choice = patient.config.batch.switch;
    if choice == SwitchChoice::Linux {
        return ok("the kernel's bridge, as batch.yaml says");
    }
    let link = underlay(&patient.config, &patient.hostname).ok();
    let host = Host::new(NETNS_DIR.into());
    match network::ovs::decide(&host, link.as_deref()).await {
        (Switch::Ovs(_), why) => ok(why),
        (Switch::Linux, why) if choice == SwitchChoice::Ovs => {
            Err(Error::system(format!("batch.yaml asks for Open vSwitch: {why}"))
                .help("`systemctl start openvswitch-switch`, or write `switch: auto`"))
        }
        (Switch::Linux, why) => ok(format!("the kernel's bridge ({why})")),
    }
}

async fn pasta() -> Outcome {
    let text = run("pasta", &["--version"], b"").await;
    let text = text.map_err(|error| error.help("install it: package passt"))?;
    ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Where VMs' disks grow.
fn space(patient: &Patient) -> Outcome {
    let dir = if patient.role == Role::Node { Path::new(SCRATCH_DIR) } else { &patient.tmp };
    let there = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let found = statvfs(there).while_doing(|| format!("looking at `{}`", there.display()))?;
    let free = found.blocks_available() as u64 * found.fragment_size() as u64;
    if patient.role == Role::Node && dir.exists() {
        let data = fs::metadata(dir).while_doing(|| format!("looking at `{}`", dir.display()))?;
        if data.uid() != 0 || data.mode() & 0o022 != 0 || data.mode() & 0o011 != 0o011 {
            let text = format!("`{}` is not root's, or closed to users", dir.display());
            let help = format!("`chown root {0}; chmod 0711 {0}`", dir.display());
            return Err(Error::system(text).help(help));
        }
    }
    let text = format!("{} GiB free for disks in `{}`", free >> 30, dir.display());
    if free >= ENOUGH {
        return ok(text);
    }
    let help = match patient.role {
        Role::Node => "mount a larger file system there",
        _ => "set TMPDIR to a folder on a larger file system",
    };
    warn(text, help)
}

fn limits() -> Outcome {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).while_doing(|| "reading limits".into());
    let (soft, hard) = limit?;
    let text = format!("{soft} open files, and up to {hard}");
    if hard >= FILES {
        return ok(text);
    }
    warn(text, "raise it: `nofile` in /etc/security/limits.conf, LimitNOFILE= of slurmd.service")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_ipv6_is_told_from_one_that_has_it() {
        let settings = tempfile::tempdir().unwrap();
        let Err(error) = ipv6(settings.path()) else { panic!("there is none") };
        assert!(error.report().contains("ipv6.disable=1"), "{}", error.report());
        fs::create_dir_all(settings.path().join("ipv6/conf/all")).unwrap();
        assert!(matches!(ipv6(settings.path()), Ok(Good::Ok(_))));
    }
}
