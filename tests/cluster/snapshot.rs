//! VMs that begin from the memory of another.

use std::collections::BTreeSet;

use super::running::Running;
use super::world::{World, world};

/// A VM whose agent answers, written down in `home/warm`, and the template `warm` of it.
fn snapshot(world: &World) {
    let alloc = world.alloc(&["tiny", "--mem", "128", "--wait", "agent", "-E", "sleep 600"]);
    alloc.wait_for("vm0 answers\n");
    let line = "echo warm > /dev/shm/m; echo kept > /root/d; \
                (while :; do date +%s > /dev/shm/tick; sleep 1; done) > /dev/null 2>&1 &";
    world.ok(&["run", "sh", "-c", line]);
    let output = world.pavo(&["snapshot", "vm0", "warm"]);
    assert_eq!(output.code, Some(0), "{output}");
    assert!(output.stderr.contains("MiB); it goes on\n"), "{output}");
    // It does.
    assert_eq!(world.ok(&["run", "cat", "/dev/shm/m", "/root/d"]), "warm\nkept\n");
    world.ok(&["cancel"]);
    alloc.finish();
    world.nothing_runs();
    world.template("warm", "snapshot: \"%homedir/warm\"");
}

fn clones(world: &World, cluster: &str) -> Running {
    let alloc = world.alloc(&["--wait", "agent", "-E", "sleep 600", cluster]);
    alloc.wait_for(" answer\n");
    alloc
}

/// Seconds since the epoch.
fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(now.unwrap().as_secs()).unwrap()
}

/// What each of all guests says, a line each.
fn lines(world: &World, command: &str) -> Vec<String> {
    let said = world.ok(&["run", "--label", "sh", "-c", command]);
    let mut lines: Vec<String> = said.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn many_begin_from_one_and_each_is_itself() {
    world(|world| {
        snapshot(world);
        let alloc = clones(world, "warm:4");
        let names = lines(world, "hostname");
        assert_eq!(names, ["vm0: vm0", "vm1: vm1", "vm2: vm2", "vm3: vm3"]);
        let differ = |command: &str| {
            let lines = lines(world, command);
            let said = lines.iter().map(|line| line.split_once(": ").unwrap().1);
            assert_eq!(said.collect::<BTreeSet<_>>().len(), 4, "{lines:?}");
        };
        differ("cat /sys/class/net/eth0/address");
        differ("ip -4 -o addr show dev eth0 | sed 's/.*inet //'");
        differ("head -c 16 /dev/urandom | md5sum");
        differ("md5sum < /etc/dropbear/dropbear_ed25519_host_key");
        differ("grep -w $(hostname) /etc/hosts");
        // And what they remember.
        for line in lines(world, "cat /dev/shm/m /root/d; [ $(cat /dev/shm/tick) -gt 0 ] && echo t")
        {
            assert!([": warm", ": kept", ": t"].iter().any(|end| line.ends_with(end)), "{line}");
        }
        world.until("what ran runs on, and the clocks are right", || {
            let late =
                |line: &String| now() - line.split_once(": ").unwrap().1.parse::<i64>().unwrap();
            lines(world, "cat /dev/shm/tick").iter().all(|line| (-2..30).contains(&late(line)))
        });
        let ping = "for i in 0 1 2 3; do ping -c 1 -W 9 vm$i > /dev/null || echo no vm$i; done";
        assert_eq!(lines(world, ping), Vec::<String>::new());
        for vm in ["vm0", "vm3"] {
            assert_eq!(world.ok(&["ssh", vm, "hostname"]), format!("{vm}\n"));
        }
        // One that is reset boots as itself.
        world.ok(&["reset", "vm2"]);
        world.ok(&["wait", "--for", "agent", "--timeout", "100"]);
        world.until("it has booted", || {
            world.pavo(&["run", "-w", "vm2", "test", "!", "-e", "/dev/shm/m"]).code == Some(0)
        });
        assert_eq!(
            world.ok(&["run", "-w", "vm2", "cat", "/sys/class/net/eth0/address"]),
            "52:54:00:00:00:02\n"
        );
        assert_eq!(world.ok(&["ssh", "vm2", "hostname"]), "vm2\n");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}
