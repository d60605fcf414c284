//! Whole clusters that are written down, and go on.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::world::{World, world};

fn mode(path: impl AsRef<std::path::Path>) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_cluster_goes_on_where_it_was() {
    world(|world| {
        let alloc = world.alloc(&["tiny:2", "--mem", "128", "--wait", "agent", "-E", "sleep 600"]);
        alloc.wait_for("vm[0-1] answer\n");
        // In memory, on disk, and running.
        let line = "echo $(hostname)-was-here > /dev/shm/m; echo kept > /root/d; \
                    (while :; do date +%s >> /dev/shm/ticks; sleep 1; done) > /dev/null 2>&1 &";
        world.ok(&["run", "sh", "-c", line]);
        let files = "cat /dev/shm/m /root/d /proc/sys/kernel/random/boot_id; ip -o addr show";
        let look = ["run", "--label", "sh", "-c", files];
        let before = world.ok(&look);
        let dir = world.path("home/saved");
        let text = dir.to_str().unwrap();
        let taken = world.pavo(&["ckpt", text]);
        assert_eq!(taken.code, Some(0), "{taken}");
        let ended = alloc.finish();
        assert!(ended.stderr.contains("The cluster has shut down\n"), "{ended}");
        assert_eq!((mode(&dir), mode(dir.join("manifest.json"))), (0o700, 0o600));
        world.nothing_runs();

        let again = world.alloc(&["-r", text, "--wait", "agent", "-E", "sleep 600"]);
        again.wait_for("vm[0-1] answer\n");
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&world.ok(&look)), sorted(&before));
        world.ok(&["ssh", "vm1", "grep", "-q", "vm1-was-here", "/dev/shm/m"]);
        world.ok(&["cancel"]);
        again.finish();
    });
}
