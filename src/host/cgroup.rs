//! Control groups: what memory this process may use, and the groups of root's set-ups.
//!
//! Slurm's plugin starts the set-up of a step in groups `pavo.NODE.JOB.STEP` at the root
//! of each hierarchy, so that it is in none of the step's. Groups of any other name are
//! not touched, and none is removed in which a process runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const ROOT: &str = "/sys/fs/cgroup";

/// The smallest limit on memory of this process's groups and those above them, in bytes;
/// `None` where there is none.
pub fn memory_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    limit_below(Path::new(ROOT), &groups)
}

fn limit_below(root: &Path, groups: &str) -> Option<u64> {
    groups.lines().flat_map(|line| limits(root, line)).min()
}

/// The limits of one line of `/proc/self/cgroup`, from the group up to the root.
fn limits(root: &Path, line: &str) -> Vec<u64> {
    let mut parts = line.splitn(3, ':');
    let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
    else {
        return Vec::new();
    };
    let (dir, file) = match controllers {
        "" => (root.to_owned(), "memory.max"),
        list if list.split(',').any(|controller| controller == "memory") => {
            (root.join("memory"), "memory.limit_in_bytes")
        }
        _ => return Vec::new(),
    };
    let group = PathBuf::from(path.trim_start_matches('/'));
    let read = |group: &Path| fs::read_to_string(dir.join(group).join(file)).ok();
    let above = group.ancestors().filter_map(read);
    // `max`, and version 1's largest number of pages, are no limits.
    above.filter_map(|text| text.trim().parse().ok()).filter(|limit| *limit < 1 << 60).collect()
}

/// The name of the groups of a step.
pub fn step_group(node: &str, job: u32, step: u32) -> String {
    format!("pavo.{node}.{job}.{step}")
}

/// Moves this process out of the groups of this name, to the roots of their hierarchies.
pub fn leave(name: &str) {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let in_one = |line: &str| {
        let path = line.splitn(3, ':').nth(2).unwrap_or_default();
        Path::new(path).file_name().is_some_and(|last| last == name)
    };
    if own.lines().any(in_one) {
        for hierarchy in hierarchies(Path::new(ROOT)) {
            if hierarchy.join(name).is_dir() {
                // Where it stays, the group does, and is removed later.
                let _ = fs::write(hierarchy.join("cgroup.procs"), "0");
            }
        }
    }
}

/// Removes the groups of this name in which nothing runs; returns whether none is left.
pub fn remove(name: &str) -> bool {
    remove_below(Path::new(ROOT), name)
}

fn remove_below(root: &Path, name: &str) -> bool {
    let gone = |dir: PathBuf| fs::remove_dir(&dir).is_ok() || !dir.exists();
    // All are tried.
    hierarchies(root).into_iter().map(|dir| gone(dir.join(name))).fold(true, |all, one| all & one)
}

/// The steps of which a host of Slurm's has groups, and for how long at least.
pub fn steps_of(node: &str) -> BTreeMap<(u32, u32), Duration> {
    steps_below(Path::new(ROOT), node)
}

fn steps_below(root: &Path, node: &str) -> BTreeMap<(u32, u32), Duration> {
    let mut found = BTreeMap::new();
    let prefix = format!("pavo.{node}.");
    for hierarchy in hierarchies(root) {
        for entry in fs::read_dir(hierarchy).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let rest = name.to_str().and_then(|name| name.strip_prefix(&prefix));
            let Some(step) = rest.and_then(job_and_step) else { continue };
            let modified = entry.metadata().and_then(|data| data.modified());
            // The kernel may have looked at it later than it was made, not earlier.
            let age = modified.ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
            let youngest = found.entry(step).or_insert(age);
            *youngest = age.min(*youngest);
        }
    }
    found
}

/// Reads `JOB.STEP`.
fn job_and_step(text: &str) -> Option<(u32, u32)> {
    let number = |text: &str| {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| plain)
    };
    let (job, step) = text.split_once('.')?;
    Some((number(job)?, number(step)?))
}

/// Where hierarchies are mounted: the folder itself (version 2), and those in it.
fn hierarchies(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mounted = |dir: &PathBuf| dir.join("cgroup.procs").exists();
    std::iter::once(root.to_owned()).chain(folders.map(|dir| dir.path())).filter(mounted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_groups_of_exactly_that_form_are_found_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let dir = |name: &str| fs::create_dir_all(root.path().join(name)).unwrap();
        for name in ["pavo.n1.42.0", "pavo.n1.43.7", "pavo.n1.44.0/inner", "pavo.n10.45.0"] {
            dir(&format!("memory/{name}"));
            dir(&format!("freezer/{name}"));
        }
        for name in ["pavo.n1.1.46.0", "pavo.n1.47", "pavo.n1.48.0.1", "pavo.n1.+49.0", "pavo.n1."]
        {
            dir(&format!("memory/{name}"));
        }
        for hierarchy in ["memory", "freezer"] {
            fs::write(root.path().join(hierarchy).join("cgroup.procs"), "").unwrap();
        }
        dir("unmounted/pavo.n1.50.0");
        let steps = |node| steps_below(root.path(), node).into_keys().collect::<Vec<_>>();
        assert_eq!(steps("n1"), [(42, 0), (43, 7), (44, 0)]);
        assert_eq!(steps("n1.1"), [(46, 0)]);
        assert!(remove_below(root.path(), &step_group("n1", 42, 0)));
        assert!(remove_below(root.path(), &step_group("n1", 42, 0)), "again");
        assert!(!remove_below(root.path(), &step_group("n1", 44, 0)), "it is not empty");
        assert_eq!(steps("n1"), [(43, 7), (44, 0)]);
        assert_eq!(steps("n10"), [(45, 0)]);
    }

    #[test]
    fn the_smallest_limit_on_the_way_to_the_root_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("memory/slurm/job_1/step_0/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/slurm/job_1/memory.limit_in_bytes", "1073741824\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/slurm/memory.limit_in_bytes", "4294967296\n");
        let limit = |groups| limit_below(root.path(), groups);
        let v1 = "5:memory:/slurm/job_1/step_0\n1:name=systemd:/\n0::/user.slice\n";
        assert_eq!(limit(v1), Some(1 << 30));
        assert_eq!(limit("1:cpu,cpuacct:/slurm\n"), None);
        write("a/b/memory.max", "max\n");
        write("a/memory.max", "2048\n");
        assert_eq!(limit("0::/a/b\n"), Some(2048));
    }
}
