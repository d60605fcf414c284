//! The cgroups of a host. They are the machine's, and carry the host's name.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How deep a host's name is looked for: `memory/slurm_a1n1`, `unified/pavo/a1n1/…`.
const DEPTH: usize = 4;

/// Every cgroup of `host`, inner ones before the outer.
pub(crate) fn of(host: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    collect(Path::new("/sys/fs/cgroup"), host, false, 0, &mut found);
    found
}

fn collect(dir: &Path, host: &str, theirs: bool, depth: usize, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        let path = entry.path();
        let theirs = theirs || names(&entry.file_name().to_string_lossy(), host);
        if theirs || depth < DEPTH {
            collect(&path, host, theirs, depth + 1, found);
        }
        if theirs {
            found.push(path);
        }
    }
}

/// Whether a part of `entry` is the host's name: `slurm_a1n1`, not `slurm_a1n11`.
fn names(entry: &str, host: &str) -> bool {
    entry.split(|c: char| !c.is_ascii_alphanumeric()).any(|part| part == host)
}

/// Removes them. Processes leave a moment after they have ended.
pub(crate) fn remove(host: &str) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let left = of(host);
        let all = left.iter().map(|dir| fs::remove_dir(dir).is_ok()).fold(true, |a, b| a & b);
        if all || Instant::now() > deadline {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_not_found_in_a_longer_one() {
        assert!(names("slurm_a1n1", "a1n1"));
        assert!(names("pavo-a1n1.42", "a1n1"));
        assert!(!names("slurm_a1n11", "a1n1"));
        assert!(!names("slurm_ba1n1", "a1n1"));
    }
}
