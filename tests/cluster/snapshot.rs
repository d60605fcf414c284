//! VMs that begin from the memory of another.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::Signal;

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

/// Names in a folder.
fn names(dir: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_no_vm_can_begin_from_is_refused() {
    world(|world| {
        let alloc = world.alloc(&["tiny:2", "--mem", "128", "-E", "sleep 600"]);
        alloc.wait_for("vm[0-1] run\n");
        let refused = |args: &[&str], code: i32, why: &str| {
            let output = world.pavo(args);
            assert_eq!(output.code, Some(code), "{args:?}: {output}");
            assert!(output.stderr.contains(why), "{args:?}: {output}");
        };
        refused(&["snapshot", "all", "warm"], 2, "`all` is not one VM");
        world.ok(&["wait", "--for", "agent", "--timeout", "100"]);
        world.ok(&["pause", "vm1"]);
        refused(&["snapshot", "vm1", "warm"], 5, "asking the agent of vm1");
        world.folder("home/open");
        fs::set_permissions(world.path("home/open"), Permissions::from_mode(0o777)).unwrap();
        refused(&["snapshot", "vm0", "open"], 3, "others may write to");
        assert_eq!(names(&world.path("home/open")), Vec::<String>::new());
        // Whoever is killed, the VM goes on, and there is no snapshot.
        for signal in [Signal::SIGINT, Signal::SIGKILL] {
            for moment in [0, 150] {
                let taking = world.start(world.pavo_command(&["snapshot", "vm0", "warm"]));
                taking.wait_for("Pausing vm0\n");
                sleep(Duration::from_millis(moment));
                taking.signal(signal);
                assert_ne!(taking.finish().code, Some(0), "{signal} after {moment} ms");
                world.ok(&["run", "-w", "vm0", "--timeout", "60", "true"]);
                let dir = world.path("home/warm");
                if signal == Signal::SIGKILL {
                    world.until("only the mark is left", || names(&dir) == ["unfinished"]);
                    world.template("warm", "snapshot: \"%homedir/warm\"");
                    let alloc = ["alloc", "-E", "true", "warm"];
                    refused(&alloc, 2, "it is not finished: `pavo snapshot` writes it still");
                    fs::remove_dir_all(&dir).unwrap();
                }
                assert!(!dir.exists());
            }
        }
        world.ok(&["snapshot", "vm0", "warm"]);
        assert_eq!(
            names(&world.path("home/warm")),
            ["snapshot.json", "vm0.disk.zst", "vm0.memory.zst"]
        );
        refused(&["snapshot", "vm0", "warm"], 2, "it is a snapshot already");
        // One whose guest cannot become another.
        let hook = "printf '#!/bin/sh\necho no leases today >&2; exit 3\n' > /etc/pavo/assume";
        world.ok(&["run", "-w", "vm0", "sh", "-c", hook]);
        world.ok(&["snapshot", "vm0", "broken"]);
        world.ok(&["cancel"]);
        alloc.finish();
        world.nothing_runs();
        other_machines_and_other_people(world);
        while_it_begins(world);
    });
}

fn other_machines_and_other_people(world: &World) {
    let refused = |args: &[&str], code: i32, why: &str| {
        let output = world.pavo(&[&["alloc", "-E", "true"], args].concat());
        assert_eq!(output.code, Some(code), "{args:?}: {output}");
        assert!(output.stderr.contains(why), "{args:?}: {output}");
    };
    let with = |settings: &str| {
        let settings = format!("snapshot: \"%homedir/warm\"\n  {settings}");
        world.template("warm", &settings);
    };
    refused(&["-r", "warm"], 2, "it is a snapshot, and no checkpoint");
    world.template("warm", "snapshot: relative");
    refused(&["warm"], 3, "`relative` is no absolute path");
    world.template("warm", "snapshot: /nowhere");
    refused(&["warm"], 4, "there is no such folder");
    with("");
    refused(&["-c", "2", "warm"], 3, "cores: `1` there, `2` now");
    refused(&["--mem", "64", "warm"], 2, "vm0 had 128 MiB of memory when the snapshot was taken");
    for (settings, why) in [
        ("nic-model: e1000", "`nic-model`: `virtio-net` there, `e1000` now"),
        ("machine-type: pc", "`machine-type`: `q35` there, `pc` now"),
        ("cpu-model: qemu64", "`cpu-model`: nothing there, `qemu64` now"),
        ("disk-model: ide", "`disk-model`: `virtio` there, `ide` now"),
        ("tpm: yes", "`tpm`: `false` there, `true` now"),
    ] {
        with(settings);
        refused(&["warm"], 3, why);
    }
    with("");
    let repos = world.path("conf/repos.yaml");
    let mine = format!("  - name: mine\n    path: {}\n", world.path("home/repo").display());
    fs::write(&repos, fs::read_to_string(&repos).unwrap() + &mine).unwrap();
    fs::write(world.write("home/blank.raw", ""), [0; 1 << 20]).unwrap();
    world.ok(&["image", "import", "blank.raw", "mine:blank"]);
    refused(&["--image", "mine:blank", "warm"], 3, "another machine: the image: ");
    let dir = world.path("home/warm");
    for (name, at, why) in [
        ("vm0.memory.zst", 5, "it is damaged, and not what was written"),
        ("vm0.disk.zst", 5, "it is damaged, and not what was written"),
        ("snapshot.json", 0, "`snapshot.json` is damaged at line 1"),
    ] {
        let path = dir.join(name);
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        refused(&["warm"], 3, why);
        fs::write(&path, &bytes[..at]).unwrap();
        refused(&["warm"], 3, "damaged");
        fs::write(&path, whole).unwrap();
    }
    for name in ["vm0.memory.zst", "vm0.disk.zst", "snapshot.json", "."] {
        let path = dir.join(name);
        let mode = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        refused(&["warm"], 3, "others may write to");
        fs::set_permissions(&path, mode).unwrap();
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&path).unwrap());
        if nix::unistd::geteuid().is_root() && path.is_file() {
            fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
            chown(&path, Some(1), None).unwrap();
            refused(&["warm"], 3, "QEMU would read it as you");
            // Root's may be read by anybody.
            chown(&path, Some(0), None).unwrap();
            refused(&["-c", "2", "warm"], 3, "cores: `1` there");
            chown(&path, Some(owner), None).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        }
    }
    // A link leads to what was not looked at.
    fs::rename(dir.join("vm0.disk.zst"), dir.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", dir.join("vm0.disk.zst")).unwrap();
    refused(&["warm"], 3, "is not a file");
    fs::rename(dir.join("elsewhere"), dir.join("vm0.disk.zst")).unwrap();
}

fn while_it_begins(world: &World) {
    world.template("broken", "snapshot: \"%homedir/broken\"");
    let output = world.pavo(&["alloc", "-E", "true", "broken"]);
    assert_eq!(output.code, Some(5), "{output}");
    assert!(output.stderr.contains("the guest cannot be another"), "{output}");
    assert!(output.stderr.contains("no leases today"), "{output}");
    world.nothing_runs();
    // Killed at some moment before it is itself.
    world.template("warm", "snapshot: \"%homedir/warm\"");
    for moment in [100, 600] {
        let alloc = world.alloc(&["-E", "true", "warm:2"]);
        let qemu = world.process("vm1/disk.qcow2").unwrap();
        sleep(Duration::from_millis(moment));
        qemu.kill();
        let output = alloc.finish();
        assert_eq!(output.code, Some(5), "{output}");
        assert!(output.stderr.contains("vm1"), "{output}");
        world.nothing_runs();
    }
    // And it works all the same, and goes on another day.
    let alloc = clones(world, "warm:2");
    world.ok(&["run", "sh", "-c", "hostname > /root/name"]);
    world.ok(&["ckpt", "saved"]);
    alloc.finish();
    world.nothing_runs();
    fs::remove_dir_all(world.path("home/warm")).unwrap();
    let alloc = world.alloc(&["-r", "saved", "--wait", "agent", "-E", "sleep 600"]);
    alloc.wait_for("vm[0-1] answer\n");
    assert_eq!(
        lines(world, "cat /root/name; hostname"),
        ["vm0: vm0", "vm0: vm0", "vm1: vm1", "vm1: vm1"]
    );
    world.ok(&["cancel"]);
    alloc.finish();
}
