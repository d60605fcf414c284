//! What memory this process may use, as its control groups say. Read only.

use std::fs;
use std::path::{Path, PathBuf};

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

#[cfg(test)]
mod tests {
    use super::*;

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
