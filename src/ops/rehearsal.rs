//! Whether this machine's kernel and tools can carry a cluster: tried, not guessed.
//!
//! A child process leaves for namespaces of its own, makes the network of a small cluster
//! there, step by step as a set-up would, and ends, and everything ends with it. Root and
//! ordinary users can do it; an ordinary user needs user namespaces.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};
use tokio::process::Command;
use tokio::time::timeout;

use super::cleanup::NETNS_DIR;
use super::program;
use crate::config::{Ethernet, Network};
use crate::error::{Context, Error, Result, WireError};
use crate::host::step::Step;
use crate::host::{Host, process, spawn};
use crate::model::owner::Owner;
use crate::network::{Fabric, Outside, Peer, Request, Switch, SwitchKind, VmNetworks, plan};

/// Rehearses in a child process, for `limit` at most.
///
/// # Errors
/// The step that cannot be done, and how to mend it.
pub async fn rehearse(limit: Duration) -> Result<()> {
    let mut command = program::again();
    command.args(["internal", "rehearsal"]).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    spawn::die_with_parent(&mut command);
    let mut command = Command::from(command);
    let output = timeout(limit, command.kill_on_drop(true).output()).await;
    let output = output
        .map_err(|_| Error::system(format!("no end after {} s", limit.as_secs())))?
        .while_doing(|| "starting this program again".into())?;
    match serde_json::from_slice::<Option<WireError>>(&output.stdout) {
        Ok(None) => Ok(()),
        Ok(Some(error)) => Err(error.into()),
        Err(_) => Err(Error::system(format!("no answer ({})", output.status))),
    }
}

/// Leaves for namespaces of our own. This process must have one thread.
pub fn leave() -> Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    let mut spaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    if !uid.is_root() {
        spaces |= CloneFlags::CLONE_NEWUSER;
    }
    unshare(spaces).while_doing(|| "making namespaces".into()).map_err(|error| {
        error.help(
            "user namespaces may be switched off: look at /proc/sys/user/max_user_namespaces, \
             kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns",
        )
    })?;
    if !uid.is_root() {
        let write = |file: &str, text: String| {
            fs::write(file, text).while_doing(|| format!("writing `{file}`"))
        };
        write("/proc/self/setgroups", "deny".into())?;
        write("/proc/self/gid_map", format!("0 {gid} 1"))?;
        write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    }
    // What is named is not seen outside, and need not be removed.
    let none = None::<&str>;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(none, "/", none, private, none).while_doing(|| "making mounts private".into())?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)
        .while_doing(|| "mounting a file system".into())
}

/// Makes the network of a cluster, in the namespaces that this process has left for.
pub async fn perform() -> Result<()> {
    let host = Host::new(NETNS_DIR.into());
    for step in &plan(&request())?.plan.steps {
        step.apply(&host).await.map_err(|error| match needs(step) {
            Some(module) => error.help(format!(
                "the kernel may lack it: `modprobe {module}` as root; a module that is missing is \
                 in the distribution's package of kernel modules"
            )),
            None => error,
        })?;
    }
    Ok(())
}

/// One VM here, one on another host, on an L3 network.
fn request() -> Request {
    let network = "net".to_owned();
    let vm = |rank| VmNetworks {
        rank,
        nic_model: "virtio-net".into(),
        nic_queues: 1,
        networks: vec!["net".to_owned()],
    };
    let peer = Peer {
        node: "peer".into(),
        address: [192, 0, 2, 2].into(),
        switch: SwitchKind::Linux,
        vms: vec![vm(1)],
    };
    Request {
        owner: Owner::local(1),
        keeper: process::current(),
        tap_uid: 0,
        outside: Outside::Host,
        switch: Switch::Linux,
        uplink_slot: 0,
        networks: vec![(network, Network::Ethernet(Ethernet::default()))],
        vms: vec![vm(0)],
        fabric: Some(Fabric {
            keys: vec![1],
            address: Ipv4Addr::new(192, 0, 2, 1),
            link: "lo".into(),
            mtu: 1500,
            peers: vec![peer],
        }),
    }
}

/// The kernel module that a step is most likely to miss.
fn needs(step: &Step) -> Option<&'static str> {
    Some(match step {
        Step::Bridge { .. } => "bridge",
        Step::Veth { .. } => "veth",
        Step::Vxlan { .. } => "vxlan",
        Step::Taps { .. } => "tun",
        Step::NftTables { .. } => "nf_tables",
        _ => return None,
    })
}
