//! Named moments at which tests make a process of pavo die, hang or fail.
//!
//! Only in debug builds: a release build has no such moments and reads no such files
//! (`debug_assertions` decides; packages are release builds). There, a process that comes
//! by a moment looks for
//!
//! - `/run/pavo/crash-at`, lines of `POINT ACTION`. It obeys a file that is its own user's
//!   and nobody else's to read (0600), *once*: whoever obeys removes the line, with the last
//!   one the file. What cleans up afterwards therefore gets through.
//! - `/run/pavo/crash-seen`: where that exists and may be written to, the moment's name is
//!   appended.
//!
//! Where `PAVO_CRASH_DIR` names a folder, the files are in that one: tests that share a machine
//! do not meet each other's.
//!
//! Actions: `kill` (the process is gone at once), `stop` (it hangs), `fail` (the moment
//! returns an error).

use std::path::Path;

use crate::error::Result;

/// Where a test says what is to happen, and reads what was reached.
pub const CRASH_AT: &str = "/run/pavo/crash-at";
pub const CRASH_SEEN: &str = "/run/pavo/crash-seen";

/// All moments, in the order in which a cluster comes by them.
const POINTS: &[&str] = &[
    // The launcher.
    "launch.begin",
    "launch.listening",
    "launch.srun",
    "launch.bootstrap",
    "launch.hello",
    "launch.spec",
    "launch.stored",
    // Root: the set-up of a host.
    "setup.begin",
    "setup.swept",
    "setup.claimed",
    "write.state",
    "setup.held",
    "setup.stored",
    "setup.connected",
    "setup.introduced",
    "fabric.keys",
    "fabric.published",
    "fabric.complete",
    "setup.planned",
    "setup.scratch-made",
    "setup.scratch",
    "journal.apply",
    "write.journal",
    "journal.written",
    "journal.applied",
    "setup.bound",
    "guard.spawned",
    "guard.begin",
    "guard.responders",
    "guard.told",
    "setup.guarded",
    "write.host",
    "setup.report",
    "setup.done",
    "setup.failed",
    // A task.
    "task.begin",
    "task.bootstrap",
    "task.host",
    "task.hello",
    "task.spec",
    "task.end",
    // The end: the launcher's, then root's on each host.
    "launch.end",
    "launch.removed",
    "launch.stopped",
    "delete.begin",
    "guard.end",
    "release.begin",
    "journal.undo",
    "journal.undone",
    "release.undone",
    "release.buried",
    "leave.begin",
    "leave.own",
    "leave.freed",
    "release.left",
    "release.forgotten",
];

/// The steps of plans before and after they are applied and undone, and what is half
/// done between. What lies in a namespace of the plan's is not undone by itself.
const STEPS: &[&str] = &[
    "netns.file",
    "link.made",
    "taps.made",
    "apply.namespace",
    "applied.namespace",
    "apply.sysctl",
    "applied.sysctl",
    "apply.nft-tables",
    "applied.nft-tables",
    "apply.veth",
    "applied.veth",
    "apply.address",
    "applied.address",
    "apply.neighbours",
    "applied.neighbours",
    "apply.route",
    "applied.route",
    "apply.link-up",
    "applied.link-up",
    "apply.taps",
    "applied.taps",
    "undo.namespace",
    "undone.namespace",
    "undo.sysctl",
    "undone.sysctl",
    "undo.nft-tables",
    "undone.nft-tables",
    "undo.veth",
    "undone.veth",
    "undo.address",
    "undone.address",
    "undo.taps",
    "undone.taps",
];

/// Those of bridges and tunnels of the kernel's.
const LINUX: &[&str] = &[
    "link.tunnel",
    "apply.bridge",
    "applied.bridge",
    "apply.vxlan",
    "applied.vxlan",
    "apply.forwarding",
    "applied.forwarding",
    "undo.bridge",
    "undone.bridge",
    "undo.neighbours",
    "undone.neighbours",
    "undo.vxlan",
    "undone.vxlan",
    "undo.forwarding",
    "undone.forwarding",
];

/// Those of Open vSwitch: bridges, with their ports, appear and go in one transaction.
const OVS: &[&str] = &[
    "apply.no-offloads",
    "applied.no-offloads",
    "apply.ovs-bridges",
    "ovs.made",
    "ovs.checked",
    "applied.ovs-bridges",
    "apply.ovs-flows",
    "ovs.settings",
    "applied.ovs-flows",
    "undo.ovs-flows",
    "undone.ovs-flows",
    "undo.ovs-bridges",
    "ovs.removed",
    "undone.ovs-bridges",
];

/// Those of the daemon, and of the inventory.
const DAEMON: &[&str] = &[
    "lead.taken",
    "lead.vault",
    "lead.active",
    "inventory.planned",
    "inventory.committed",
    "inventory.begun",
    "inventory.shard",
    "inventory.done",
    "inventory.buried",
    "op.begin",
    "op.recorded",
    "op.begun",
    "op.switched",
    "op.shard",
    "op.written",
    "op.ended",
    "op.closed",
    "op.buried",
];

/// The names of all moments of a daemon.
pub fn daemon_points() -> &'static [&'static str] {
    DAEMON
}

/// The names of all moments where the kernel's bridges carry a cluster.
pub fn linux_points() -> Vec<&'static str> {
    [POINTS, STEPS, LINUX].concat()
}

/// The names of all moments where Open vSwitch does.
pub fn ovs_points() -> Vec<&'static str> {
    [POINTS, STEPS, OVS].concat()
}

/// Whether this is the moment of a switch: other moments are the same with every one.
pub fn is_of_the_switch(name: &str) -> bool {
    [STEPS, LINUX, OVS].iter().any(|points| points.contains(&name))
}

/// A process comes by this moment.
///
/// # Errors
/// Where a test wants it to fail here.
#[inline]
pub fn point(name: &str) -> Result<()> {
    #[cfg(debug_assertions)]
    debug::meet(name)?;
    let _ = name;
    Ok(())
}

/// The moment of a step of this kind: `apply.bridge`.
///
/// # Errors
/// Where a test wants it to fail here.
#[inline]
pub fn step(moment: &str, kind: &str) -> Result<()> {
    #[cfg(debug_assertions)]
    debug::meet(&format!("{moment}.{kind}"))?;
    let _ = (moment, kind);
    Ok(())
}

/// The moment between a file's temporary name and its own, of the files that root keeps.
///
/// # Errors
/// Where a test wants it to fail here.
#[inline]
pub fn written(path: &Path) -> Result<()> {
    #[cfg(debug_assertions)]
    match path.file_name().and_then(|name| name.to_str()) {
        Some("state.json") => debug::meet("write.state")?,
        Some("host.json") => debug::meet("write.host")?,
        _ if path.parent().is_some_and(|dir| dir.ends_with("journal")) => {
            debug::meet("write.journal")?;
        }
        _ => {}
    }
    let _ = path;
    Ok(())
}

#[cfg(debug_assertions)]
mod debug {
    use std::fs::{self, OpenOptions};
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::{Pid, geteuid};

    use super::{CRASH_AT, CRASH_SEEN, DAEMON, LINUX, OVS, POINTS, STEPS};
    use crate::error::{Error, Result};

    pub fn meet(name: &str) -> Result<()> {
        note(name);
        match armed(name).as_deref() {
            Some("kill") => end(Signal::SIGKILL),
            Some("stop") => end(Signal::SIGSTOP),
            Some("fail") => return Err(Error::system(format!("made to fail at `{name}`"))),
            _ => {}
        }
        Ok(())
    }

    /// Where the file is that is usually here.
    fn place(usual: &str) -> PathBuf {
        let usual = PathBuf::from(usual);
        match (std::env::var_os("PAVO_CRASH_DIR"), usual.file_name()) {
            (Some(dir), Some(name)) => PathBuf::from(dir).join(name),
            _ => usual,
        }
    }

    fn end(signal: Signal) {
        let _ = kill(Pid::this(), signal);
    }

    fn note(name: &str) {
        if let Ok(mut seen) = OpenOptions::new().append(true).open(place(CRASH_SEEN)) {
            let known =
                [POINTS, STEPS, LINUX, OVS, DAEMON].iter().any(|points| points.contains(&name));
            let known = if known { "" } else { "unknown " };
            // One write: several processes append.
            let _ = seen.write_all(format!("{known}{name}\n").as_bytes());
        }
    }

    /// What is to happen here. It is not to happen again.
    fn armed(name: &str) -> Option<String> {
        let file = place(CRASH_AT);
        let meta = fs::symlink_metadata(&file).ok()?;
        if !meta.is_file() || meta.uid() != geteuid().as_raw() || meta.mode() & 0o077 != 0 {
            return None;
        }
        let text = fs::read_to_string(&file).ok()?;
        let action = |line: &str| Some(line.strip_prefix(name)?.strip_prefix(' ')?.to_owned());
        let found = text.lines().find_map(action)?;
        let left: Vec<&str> = text.lines().filter(|line| action(line).is_none()).collect();
        match left.is_empty() {
            true => fs::remove_file(&file).or_else(|_| fs::write(&file, "")).ok()?,
            false => fs::write(&file, left.join("\n")).ok()?,
        }
        Some(found)
    }
}
