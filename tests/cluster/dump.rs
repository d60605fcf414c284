//! Guests' memory, written to files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::sys::signal::Signal;

use super::running::Running;
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
        assert!(bytes.starts_with(b"KDUMP   "));
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

/// Starts a VM of 512 MiB, of which so many are not zero.
fn laden(world: &World, mib: usize) -> Running {
    let ballast = world.path("ballast");
    fs::write(&ballast, vec![0x5a; mib << 20]).unwrap();
    fs::set_permissions(&ballast, fs::Permissions::from_mode(0o644)).unwrap();
    let file = ballast.display();
    let loader = format!("loader,file={file},addr=0x1000000,force-raw=on");
    world.template("laden", &format!("custom-args: [-device, \"{loader}\"]"));
    let alloc = world.alloc(&["--mem", "512", "-E", "sleep 600", "laden"]);
    alloc.wait_for("vm0 runs\n");
    alloc
}

/// What QEMU says of its last dump.
fn last_dump(world: &World) -> serde_json::Value {
    let said = world.ok(&["qmp", "vm0", "query-dump"]);
    serde_json::from_str::<serde_json::Value>(&said).unwrap()["status"].clone()
}

#[test]
fn a_dump_that_is_given_up_leaves_nothing_and_a_running_vm() {
    world(|world| {
        let alloc = laden(world, 320);
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
            let dump = world.start(world.pavo_command(&["dump", "vm0", "given-up"]));
            dump.wait_for("Writing the memory of vm0: ");
            dump.signal(signal);
            assert_ne!(dump.finish().code, Some(0));
            world.until("it runs again", || state(world) == "running");
            // It has not been written to its end.
            assert_eq!(last_dump(world), "failed", "{signal}");
        }
        world.ok(&["dump", "vm0", "memory"]);
        assert_eq!(last_dump(world), "completed");
        let elf = fs::read(world.path("home/memory")).unwrap();
        assert!(elf.iter().filter(|byte| **byte == 0x5a).count() >= 320 << 20);
        world.until("it runs again", || state(world) == "running");

        // One that stood still before does so afterwards.
        world.ok(&["pause"]);
        world.until("it stands still", || state(world) == "paused");
        let dump = world.start(world.pavo_command(&["dump", "vm0", "given-up"]));
        dump.wait_for("Writing the memory of vm0: ");
        dump.signal(Signal::SIGKILL);
        dump.finish();
        world.until("it is given up", || last_dump(world) == "failed");
        assert_eq!(state(world), "paused");

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
        let alloc = laden(world, 64);
        let file = world.path("tmp/memory");
        let full = world.pavo(&["dump", "vm0", file.to_str().unwrap()]);
        assert_eq!(full.code, Some(5), "{full}");
        for expected in ["because: writing the file\n", "No space left on device", "`df`"] {
            assert!(full.stderr.contains(expected), "{expected}: {full}");
        }
        assert!(!file.exists());
        world.until("it runs again", || state(world) == "running");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}
