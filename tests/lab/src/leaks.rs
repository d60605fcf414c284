//! What a job can leave on a host, as a list to compare before and after.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cgroups;
use crate::error::Result;
use crate::host::Host;

/// Links, network namespaces, nft tables, OVS bridges and ports, cgroups, mounts, processes,
/// sockets that others can reach, and files under `/run/pavo` and `/tmp` of a host.
///
/// Two are equal when nothing was left and nothing was taken. Processes count by name:
/// a daemon that was restarted is no leak.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    host: String,
    /// Each thing with how often it is there.
    things: BTreeMap<String, usize>,
}

impl Snapshot {
    fn add(&mut self, kind: &str, things: impl IntoIterator<Item = String>) {
        for thing in things {
            *self.things.entry(format!("{kind} {thing}")).or_default() += 1;
        }
    }

    /// What differs in `after`, a line each: `+ link pv42br` was left, `- …` is missing.
    /// Empty when nothing does.
    pub fn diff(&self, after: &Self) -> String {
        let mut text = String::new();
        let all: BTreeSet<_> = self.things.keys().chain(after.things.keys()).collect();
        for thing in all {
            let count = |snapshot: &Self| snapshot.things.get(thing).copied().unwrap_or(0);
            let (was, is) = (count(self), count(after));
            let times = match was.abs_diff(is) {
                1 => String::new(),
                times => format!(" ({times} times)"),
            };
            if was != is {
                let sign = if is > was { '+' } else { '-' };
                text += &format!("{}: {sign} {thing}{times}\n", after.host);
            }
        }
        text
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.things.iter().try_for_each(|(thing, count)| writeln!(f, "{thing} × {count}"))
    }
}

pub(crate) fn snapshot(host: &Host) -> Result<Snapshot> {
    let mut found = Snapshot { host: host.name().to_owned(), ..Snapshot::default() };
    let root = host.root()?;
    let pid = host.pid()?;
    let processes = host.processes()?;
    found.add("process", processes.into_iter().map(|process| process.name));

    let links = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    let name = |line: &str| line.split_once(':').map(|(name, _)| name.trim().to_owned());
    found.add("link", links.lines().filter_map(name));

    found.add("socket", sockets(pid)?);

    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let target = |line: &str| line.split(' ').nth(4).map(str::to_owned);
    found.add("mount", mounts.lines().filter_map(target));

    found.add("netns", names(&root.join("run/netns")));
    // Slurm makes its own when it first needs it, and keeps it.
    let slurm = format!("slurm_{}", host.name());
    let groups = cgroups::of(host.name()).into_iter().filter(|dir| !dir.ends_with(&slurm));
    found.add("cgroup", groups.map(|dir| dir.display().to_string()));
    for dir in ["run/pavo", "tmp", "dev/shm"] {
        let mut files = Vec::new();
        walk(&root.join(dir), &format!("/{dir}"), &mut files);
        found.add("file", files);
    }

    found.add("nft", lines(host, "nft list tables")?);
    if host.service("ovs-vswitchd").is_ok() {
        let show = "for b in $(ovs-vsctl -t 5 list-br); do echo bridge $b; \
                    ovs-vsctl -t 5 list-ports $b | sed \"s/^/port $b\\//\"; done";
        found.add("ovs", lines(host, show)?);
    }
    Ok(found)
}

/// Waits until the host is again as it was in `before`, for processes end and the kernel
/// tidies in their own time. The difference that stays is the error.
pub(crate) fn settle(host: &Host, before: &Snapshot, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let diff = before.diff(&snapshot(host)?);
        if diff.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(crate::Error::new(format!("not as before:\n{diff}")));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The sockets that wait for others: of TCP and UDP, also the kernel's own, and those
/// without a file. Those with a file count with it.
fn sockets(pid: i32) -> Result<Vec<String>> {
    let table = |name| fs::read_to_string(format!("/proc/{pid}/net/{name}"));
    let mut found = Vec::new();
    // Listening, or unconnected.
    for (name, waits) in [("tcp", "0A"), ("udp", "07")] {
        for line in table(name)?.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields.get(3) == Some(&waits) {
                found.push(format!("{name} {}", fields[1]));
            }
        }
    }
    let unix = table("unix")?;
    let path = |line: &str| line.split_whitespace().nth(7).map(str::to_owned);
    // Five digits are the kernel's choice for who asked for no name, and new each time.
    let chosen = |path: &String| {
        let name = path.strip_prefix('@');
        name.is_some_and(|name| name.len() != 5 || !name.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    let abstracts = unix.lines().filter_map(path).filter(chosen);
    found.extend(abstracts.map(|path| format!("unix {path}")));
    Ok(found)
}

fn lines(host: &Host, script: &str) -> Result<Vec<String>> {
    Ok(host.sh(script)?.lines().map(str::to_owned).collect())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Files and folders below `dir`, under the names that the host has for them.
fn walk(dir: &Path, name: &str, found: &mut Vec<String>) {
    for entry in names(dir) {
        let (path, name) = (dir.join(&entry), format!("{name}/{entry}"));
        // Not through links: they lead out of the host.
        if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
            walk(&path, &name, found);
        }
        found.push(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(things: &[&str]) -> Snapshot {
        let mut snapshot = Snapshot { host: "a1n1".into(), ..Snapshot::default() };
        snapshot.add("link", things.iter().map(|&thing| thing.to_owned()));
        snapshot
    }

    #[test]
    fn a_difference_names_the_host_the_thing_and_the_direction() {
        let before = of(&["lo", "eth0", "tap", "tap"]);
        assert_eq!(before.diff(&before), "");
        let after = of(&["lo", "tap", "pv42br"]);
        assert_eq!(
            before.diff(&after),
            "a1n1: - link eth0\na1n1: + link pv42br\na1n1: - link tap\n"
        );
        assert_eq!(of(&[]).diff(&of(&["x", "x"])), "a1n1: + link x (2 times)\n");
    }
}
