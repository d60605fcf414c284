//! Guests' memory, written to files.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::world::{NOBODY, World, prepared_world, world};

fn state(world: &World) -> serde_json::Value {
    let status = world.ok(&["status", "-o", "json"]);
    serde_json::from_str::<serde_json::Value>(&status).unwrap()[0]["state"].clone()
}

#[test]
fn memory_becomes_a_file_of_its_user() {
    world(|world| {
        let alloc = world.idle(&["tiny"]);
        // Relative to where the user is.
        let said = world.pavo(&["dump", "vm0", "memory"]);
        assert_eq!(said.code, Some(0), "{said}");
        assert!(said.stderr.contains("vm0 memory written to "), "{said}");
        let elf = world.path("home/memory");
        let about = fs::metadata(&elf).unwrap();
        assert_eq!(about.mode() & 0o777, 0o600);
        if nix::unistd::geteuid().is_root() {
            assert_eq!(about.uid(), NOBODY);
        }
        assert!(about.len() >= 128 << 20, "{}", about.len());
        let bytes = fs::read(&elf).unwrap();
        // ELF, 64 bits, little-endian, a core file.
        assert_eq!((&bytes[..6], &bytes[16..18]), (&b"\x7fELF\x02\x01"[..], &[4, 0][..]));

        let kdump = world.path("home/kdump");
        world.ok(&["dump", "-z", "vm0", kdump.to_str().unwrap()]);
        let bytes = fs::read(&kdump).unwrap();
        // The second is the form of QEMU before 8.2.
        assert!(bytes.starts_with(b"KDUMP   ") || bytes.starts_with(b"makedumpfile\0"));
        assert!(bytes.len() < 64 << 20, "{}", bytes.len());

        let again = world.pavo(&["dump", "vm0", "memory"]);
        assert_eq!(again.code, Some(2), "{again}");
        assert!(again.stderr.contains("because: something is there already"), "{again}");
        let nowhere = world.pavo(&["dump", "vm0", "absent/memory"]);
        assert_eq!(nowhere.code, Some(5), "{nowhere}");
        assert!(nowhere.stderr.contains("No such file or directory"), "{nowhere}");
        world.until("it runs again", || state(world) == "running");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_dump_that_is_given_up_leaves_nothing() {
    world(|world| {
        let alloc = world.idle(&["tiny"]);
        let qemu = world.process("guest=pavo-").unwrap();
        let qemu = |signal| kill(Pid::from_raw(qemu.pid), signal).unwrap();
        // It takes its time.
        qemu(Signal::SIGSTOP);
        let dump = world.start(world.pavo_command(&["dump", "vm0", "given-up"]));
        world.until("it is asked for", || world.processes().len() > 1);
        std::thread::sleep(std::time::Duration::from_millis(200));
        dump.signal(Signal::SIGINT);
        dump.finish();
        qemu(Signal::SIGCONT);
        // The next one begins once the first has come to its end.
        let file = world.path("home/memory");
        world.until("another is written", || {
            world.pavo(&["dump", "vm0", "memory"]);
            file.exists()
        });
        let names = fs::read_dir(world.path("home")).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["memory", "state"]);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_full_disk_leaves_no_half_file_and_a_running_vm() {
    prepared_world(|world| {
        world.shrink_tmp(32 << 10);
        let alloc = world.idle(&["tiny"]);
        let file = world.path("tmp/memory");
        let full = world.pavo(&["dump", "vm0", file.to_str().unwrap()]);
        assert_eq!(full.code, Some(5), "{full}");
        for expected in ["because: QEMU could not write it all", "No space left on device"] {
            assert!(full.stderr.contains(expected), "{expected}: {full}");
        }
        assert!(!file.exists());
        world.until("it runs again", || state(world) == "running");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}
