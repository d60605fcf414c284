//! Control groups of pavo's own for its root set-up.
//!
//! slurmstepd is in the step's groups, and what it starts would be, too: a `scancel`
//! would kill the set-up half way, and the job's memory limit would count it. So it
//! is started in groups `pavo.NODE.JOB.STEP` at the root of each hierarchy. Where
//! that is refused, it stays where it is.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";

/// The groups of one step.
#[derive(Debug)]
pub struct Groups {
    name: String,
    /// Where a process writes `0` to be in them.
    pub members: Vec<File>,
}

impl Groups {
    /// Makes `name` in each hierarchy where this process is in a group.
    pub fn make(name: &str) -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let pure = Path::new(ROOT).join("cgroup.controllers").exists();
        let join = |hierarchy: String| join(&Path::new(ROOT).join(hierarchy), name);
        let members = hierarchies(&own, pure).into_iter().filter_map(join).collect();
        Self { name: name.to_owned(), members }
    }

    /// Removes the groups of this name, if nothing runs in them: what pavo leaves running
    /// keeps its group until it ends. `patience`: what was killed may take a moment.
    ///
    /// In all hierarchies: slurmstepd may have left one of the step's since they were made.
    pub fn remove(self, patience: Duration) {
        let end = Instant::now() + patience;
        let entries = fs::read_dir(ROOT).into_iter().flatten().flatten();
        let roots = entries.map(|entry| entry.path()).chain([PathBuf::from(ROOT)]);
        let mut left: Vec<PathBuf> = roots.map(|root| root.join(&self.name)).collect();
        loop {
            left.retain(|directory| fs::remove_dir(directory).is_err() && directory.exists());
            if left.is_empty() || Instant::now() >= end {
                return;
            }
            sleep(Duration::from_millis(2));
        }
    }
}

fn join(root: &Path, name: &str) -> Option<File> {
    if !root.join("cgroup.procs").exists() {
        return None;
    }
    let directory = root.join(name);
    let _ = fs::create_dir(&directory);
    for list in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = fs::read(root.join(list)) {
            let _ = fs::write(directory.join(list), value);
        }
    }
    OpenOptions::new().write(true).open(directory.join("cgroup.procs")).ok()
}

/// The folders, below the mount point, of the hierarchies in which a process with
/// this `/proc/self/cgroup` is not at the root. `pure`: only version 2 is mounted.
fn hierarchies(own: &str, pure: bool) -> Vec<String> {
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if path == "/" || controllers.contains('/') {
            continue;
        }
        found.push(match controllers {
            "" if number != "0" => continue,
            "" if pure => String::new(),
            "" => "unified".to_owned(),
            controllers => controllers.strip_prefix("name=").unwrap_or(controllers).to_owned(),
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hierarchies_with_a_group_of_the_step_are_left() {
        let own = "9:name=systemd:/x\n4:memory:/slurm_n1/uid_1/job_2/step_0\n3:cpuset:/\n\
                   2:cpu,cpuacct:/slurm\n0::/user\n";
        assert_eq!(hierarchies(own, false), ["systemd", "memory", "cpu,cpuacct", "unified"]);
    }

    #[test]
    fn version_two_alone_is_mounted_at_the_top() {
        let own = "0::/system.slice/slurmstepd.scope/job_1/step_0/slurm\n";
        assert_eq!(hierarchies(own, true), [""]);
        assert!(hierarchies("0::/\n", true).is_empty());
        assert!(hierarchies("nonsense\n1:\n", true).is_empty());
    }
}
