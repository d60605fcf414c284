//! Files to and from real guests, by the agent.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::running::{Output, PATIENCE, Running};
use super::world::{NOBODY, World, world};

/// A cluster of two VMs whose agents answer.
fn cluster(world: &World) -> Running {
    let alloc = world.alloc(&["tiny:2", "--mem", "160", "--wait", "agent", "-E", "sleep 600"]);
    alloc.wait_for("vm[0-1] answer\n");
    alloc
}

fn cp(world: &World, words: &[&str]) -> Output {
    world.pavo(&[&["cp"], words].concat())
}

/// What a line of the shell says in a guest.
fn sh(world: &World, vm: &str, line: &str) -> String {
    world.ok(&["run", "-w", vm, "sh", "-c", line])
}

/// A file of the user's, of so many bytes that do not repeat.
fn noise(world: &World, name: &str, count: u32) -> Vec<u8> {
    let bytes: Vec<u8> = (0..count).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let path = world.write(name, "");
    fs::write(&path, &bytes).unwrap();
    bytes
}

#[test]
fn files_travel_into_guests_and_out() {
    world(|world| {
        let alloc = cluster(world);
        there_and_back(world);
        names_and_sets(world);
        of_a_user(world);
        one_of_several_fails(world);
        an_interrupted_copy_goes_on(world);
        what_ends_meanwhile(world);
        one_of_two_stands_still(world);
        a_vms_process_is_killed(world);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

fn there_and_back(world: &World) {
    world.folder("home/tree");
    world.folder("home/tree/sub");
    let bytes = noise(world, "home/tree/sub/noise", 3_000_000);
    let sparse = world.write("home/tree/sparse", "");
    fs::File::options().write(true).open(&sparse).unwrap().set_len(1 << 30).unwrap();
    let program = world.write("home/tree/program", "#!/bin/sh\necho ran\n");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o750)).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 5_000_000);
    fs::File::open(&program).unwrap().set_modified(time).unwrap();
    symlink("/etc/passwd", world.path("home/tree/link")).unwrap();
    let said = cp(world, &["tree", "all:"]);
    assert_eq!((said.code, &*said.stderr), (Some(0), ""), "{said}");
    for vm in ["vm0", "vm1"] {
        assert_eq!(sh(world, vm, "/root/tree/program"), "ran\n");
        let line = "cd /root/tree; readlink link; stat -c '%a %u %Y' program; \
                    stat -c %s sparse; du -k sparse | cut -f1";
        assert_eq!(sh(world, vm, line), "/etc/passwd\n750 0 1000000000\n1073741824\n0\n");
    }
    // Into a folder that is there, and back under another name.
    world.folder("home/there");
    let said = cp(world, &["vm0:tree/program", "there"]);
    assert_eq!(said.code, Some(0), "{said}");
    assert!(world.path("home/there/program").exists());
    let said = cp(world, &["vm0:tree", "back"]);
    assert_eq!(said.code, Some(0), "{said}");
    assert!(fs::read(world.path("home/back/sub/noise")).unwrap() == bytes);
    let about = |name: &str| fs::symlink_metadata(world.path(name)).unwrap();
    assert_eq!(about("home/back/program").mode() & 0o777, 0o750);
    assert_eq!(about("home/back/program").modified().unwrap(), time);
    assert_eq!((about("home/back/sparse").len(), about("home/back/sparse").blocks()), (1 << 30, 0));
    let link = fs::read_link(world.path("home/back/link")).unwrap();
    assert_eq!(link.to_str(), Some("/etc/passwd"));
    sh(world, "all", "rm -r /root/tree");
}

fn names_and_sets(world: &World) {
    sh(world, "vm0,vm1", "hostname >/etc/hostname");
    let said = cp(world, &["vm[0-1]:/etc/hostname", "got"]);
    assert_eq!(said.code, Some(0), "{said}");
    for vm in ["vm0", "vm1"] {
        let name = fs::read_to_string(world.path(&format!("home/got/{vm}/hostname"))).unwrap();
        assert_eq!(name.trim(), vm);
    }
    let said = cp(world, &["vm1:/proc/version", "vm0:/etc/hostname", "."]);
    assert_eq!(said.code, Some(0), "{said}");
    assert!(world.path("home/vm1/version").exists() && world.path("home/vm0/hostname").exists());
    let said = cp(world, &["vm1:/etc/hostname", "one"]);
    assert_eq!(said.code, Some(0), "{said}");
    assert_eq!(fs::read_to_string(world.path("home/one")).unwrap().trim(), "vm1");
    for (words, code, why) in [
        (&["one", "two"][..], 2, "none of these files is in a VM"),
        (&["vm0:one", "vm1:two"], 2, "both sides are in VMs"),
        (&["missing", "vm0:"], 4, "reading `missing`"),
        (&["one", "vm7:"], 4, "has no vm7"),
        (&["one", "got/../one", "vm0:"], 2, "two of the sources are called `one`"),
        (&["one", "vm0:/no/such/folder/"], 5, "vm0"),
        (&["vm0:/no/such", "x"], 4, "reading `/no/such`\n  because: No such file or directory"),
        (&["vm0:/no/such", "vm0:/etc/hostname", "."], 1, "vm0: `/no/such`: No such file"),
        (&["-u", "nobody-here", "one", "vm0:"], 5, "no user `nobody-here`"),
    ] {
        let said = cp(world, words);
        assert_eq!(said.code, Some(code), "{words:?}: {said}");
        assert!(said.stderr.contains(why), "{words:?}: {said}");
    }
}

fn of_a_user(world: &World) {
    sh(world, "all", "echo ada:x:1000:1000::/tmp:/bin/sh >>/etc/passwd");
    let said = cp(world, &["-u", "ada", "one", "vm0:mine"]);
    assert_eq!(said.code, Some(0), "{said}");
    assert_eq!(sh(world, "vm0", "stat -c '%u:%g' /tmp/mine"), "1000:1000\n");
    sh(world, "all", "chmod 700 /root");
    let said = cp(world, &["--user", "ada", "one", "vm0:/root/x"]);
    assert_eq!(said.code, Some(5), "{said}");
    assert!(said.stderr.contains("vm0") && said.stderr.contains("Permission denied"), "{said}");
    let said = cp(world, &["--user", "ada", "vm0:/root", "x"]);
    assert!(said.stderr.contains("vm0: `/root`: Permission denied"), "{said}");
    assert_eq!(said.code, Some(1), "{said}");
}

fn one_of_several_fails(world: &World) {
    sh(world, "vm1", "mount -t tmpfs -o size=1m none /mnt");
    noise(world, "home/big", 5_000_000);
    let said = cp(world, &["big", "all:/mnt"]);
    assert_eq!(said.code, Some(1), "{said}");
    assert!(said.stderr.contains("error: vm1: writing `/mnt/big`: No space left on device"));
    assert!(!said.stderr.contains("vm0"), "{said}");
    assert_eq!(sh(world, "vm1", "ls -A /mnt; umount /mnt"), "", "nothing is left");
    assert_eq!(sh(world, "vm0", "ls -A /mnt; rm /mnt/big"), "big\n");
    // And here.
    let small = world.path("home/small");
    fs::create_dir(&small).unwrap();
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::empty();
    if nix::unistd::geteuid().is_root() {
        nix::mount::mount(none, &small, Some("tmpfs"), flags, Some("size=1m")).unwrap();
        chown(&small, Some(NOBODY), None).unwrap();
        sh(world, "vm0", "dd if=/dev/urandom of=/tmp/much bs=1M count=3 2>/dev/null");
        let said = cp(world, &["vm0:/tmp/much", "small"]);
        assert_eq!(said.code, Some(5), "{said}");
        assert!(said.stderr.contains("copying from vm0"), "{said}");
        assert!(said.stderr.contains("writing `small/much`: No space left on device"), "{said}");
        assert_eq!(fs::read_dir(&small).unwrap().count(), 0);
        nix::mount::umount(&small).unwrap();
    }
}

/// Looks more often than a copy is fast.
fn at_once(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "not so: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How much a process has read so far.
fn read_so_far(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let count = text.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse().ok());
    count.unwrap_or(0)
}

/// Begins to copy a large file into vm0, and stands still in the middle.
fn begin(world: &World, dest: &str) -> Running {
    let client = world.start(world.pavo_command(&["cp", "large", dest]));
    at_once("some of it is read", || read_so_far(client.pid()) > 8_000_000);
    client.signal(Signal::SIGSTOP);
    client
}

fn an_interrupted_copy_goes_on(world: &World) {
    let bytes = noise(world, "home/large", 30_000_000);
    let client = begin(world, "vm0:/root/");
    let part = "stat -c %i,%s /root/.large.pavo-part 2>/dev/null || true";
    let seen = || sh(world, "vm0", part).trim().to_owned();
    let length = |seen: &str| seen.split(',').nth(1).and_then(|size| size.parse().ok());
    world.until("some of it is there", || length(&seen()).unwrap_or(0) > 1_000_000);
    client.signal(Signal::SIGKILL);
    client.finish();
    world.until("the guest's end is gone", || !sh(world, "vm0", "ps").contains("--receive"));
    let before = seen();
    assert!(length(&before).unwrap() < bytes.len(), "{before}: it was too fast");
    let said = cp(world, &["large", "vm0:/root/"]);
    assert_eq!(said.code, Some(0), "{said}");
    let after = sh(world, "vm0", "ls -A /root; stat -c %i /root/large").replace('\n', " ");
    let inode = before.split(',').next().unwrap();
    assert!(after.ends_with(&format!(" {inode} ")), "it was begun anew: {before}; {after}");
    assert!(!after.contains("pavo-part"), "{after}");
    // The other way, and whether it is the same.
    let client = world.start(world.pavo_command(&["cp", "vm0:large", "again"]));
    let part = world.path("home/.again.pavo-part");
    let some = || fs::metadata(&part).is_ok_and(|about| about.len() > 1_000_000);
    at_once("some of it is here", some);
    client.signal(Signal::SIGINT);
    let said = client.finish();
    assert_eq!(said.code, Some(130), "{said}");
    assert!(said.stderr.contains("the same command goes on with it"), "{said}");
    let before = fs::metadata(&part).unwrap();
    assert!(!world.path("home/again").exists());
    let said = cp(world, &["vm0:large", "again"]);
    assert_eq!(said.code, Some(0), "{said}");
    assert_eq!(fs::metadata(world.path("home/again")).unwrap().ino(), before.ino());
    assert!(fs::read(world.path("home/again")).unwrap() == bytes);
    sh(world, "vm0", "rm /root/large");
}

fn what_ends_meanwhile(world: &World) {
    // The guest's end.
    let client = begin(world, "vm0:/root/");
    sh(world, "vm0", "kill -9 $(ps | awk '/[-]-receive/ {print $1}')");
    client.signal(Signal::SIGCONT);
    let said = client.finish();
    assert_eq!(said.code, Some(5), "{said}");
    assert!(said.stderr.contains("copying to vm0"), "{said}");
    assert!(said.stderr.contains("killed in the guest, by signal 9"), "{said}");
    // The agent of one of two.
    let client = begin(world, "all:/tmp/");
    let said = world.pavo(&["run", "-w", "vm0", "sh", "-c", "kill -9 $PPID"]);
    assert_eq!(said.code, Some(255), "{said}");
    client.signal(Signal::SIGCONT);
    let said = client.finish();
    assert_eq!(said.code, Some(1), "{said}");
    assert!(said.stderr.contains("error: vm0: the guest's agent has ended"), "{said}");
    assert!(!said.stderr.contains("vm1"), "{said}");
    world.ok(&["wait", "--for", "agent", "--timeout", "50"]);
}

/// It is named, in a log too, and goes on when it does.
fn one_of_two_stands_still(world: &World) {
    sh(world, "all", "rm -f /tmp/large /tmp/.large.pavo-part");
    let client = begin(world, "all:/tmp/");
    world.ok(&["pause", "vm1"]);
    client.signal(Signal::SIGCONT);
    client.wait_for("Copying to vm[0-1]: nothing for 10 s with vm1\n");
    world.ok(&["resume", "vm1"]);
    let said = client.finish();
    assert_eq!(said.code, Some(0), "{said}");
    // Interrupted, it says which are whole.
    sh(world, "all", "rm /tmp/large");
    let client = begin(world, "all:/tmp/");
    world.ok(&["pause", "vm1"]);
    client.signal(Signal::SIGCONT);
    world.until("vm0 has it", || sh(world, "vm0", "ls /tmp").lines().any(|name| name == "large"));
    client.wait_for("with vm1\n");
    client.signal(Signal::SIGINT);
    let said = client.finish();
    assert_eq!(said.code, Some(130), "{said}");
    assert!(said.stderr.contains("is kept, and vm0 done"), "{said}");
    world.ok(&["resume", "vm1"]);
    world.ok(&["wait", "--for", "agent", "--timeout", "50"]);
}

/// One VM is lost; what the other is given arrives.
fn a_vms_process_is_killed(world: &World) {
    sh(world, "all", "rm -f /tmp/large /tmp/.large.pavo-part");
    let client = begin(world, "all:/tmp/");
    world.process("internal run").expect("that of a VM").kill();
    client.signal(Signal::SIGCONT);
    let said = client.finish();
    assert_eq!(said.code, Some(1), "{said}");
    let (lost, left) = match said.stderr.contains("error: vm0: ") {
        true => ("vm0", "vm1"),
        false => ("vm1", "vm0"),
    };
    assert!(said.stderr.contains(&format!("error: {lost}: ")), "{said}");
    assert!(!said.stderr.contains(&format!("error: {left}: ")), "{said}");
    assert_eq!(sh(world, left, "stat -c %s /tmp/large").trim(), "30000000");
}
