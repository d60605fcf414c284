//! Checkpoints and those who take and read them, in bad luck: two at once, one VM of many that is
//! lost, no room where a cluster is to go on; and another user's cluster.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::ckpt::{all_run, laden_with, names, states};
use super::save::write;
use super::world::{prepared_world, world};

/// Somebody who is neither root nor the account of the test.
const STRANGER: u32 = 65_533;

#[test]
fn of_two_checkpoints_at_once_one_is_taken() {
    world(|world| {
        let alloc = laden_with(world, 24, "laden:2");
        let first = world.start(world.pavo_command(&["ckpt", "-k", "one"]));
        first.wait_for("Writing vm[0-1]: ");
        // It takes as long as it is to.
        first.signal(Signal::SIGSTOP);
        for (dir, code, why) in [
            ("one", 2, "because: a checkpoint is being taken there, or one was interrupted"),
            ("two", 5, "because: another checkpoint of it is being taken"),
        ] {
            let other = world.pavo(&["ckpt", "-k", dir]);
            assert_eq!(other.code, Some(code), "{other}");
            assert!(other.stderr.contains(why), "{other}");
            assert!(other.stderr.contains("help: "), "{other}");
        }
        assert!(!world.path("home/two").exists());
        assert_eq!(states(world), ["paused", "paused"], "the first has them");
        first.signal(Signal::SIGCONT);
        let output = first.finish();
        assert_eq!(output.code, Some(0), "{output}");
        world.until("they go on", || all_run(world));
        assert!(names(&world.path("home/one")).contains(&"manifest.json".into()));
        // The folder that was refused is as good as any.
        world.ok(&["ckpt", "two"]);
        alloc.finish();
        world.nothing_runs();
        let output = world.alloc(&["-r", "one", "-E", "$PAVO status -o ndjson"]).finish();
        assert_eq!(output.code, Some(0), "{output}");
        assert_eq!(output.stdout.matches("\"running\"").count(), 2, "{output}");
    });
}

#[test]
fn one_vm_of_eight_is_named_with_what_was_done() {
    world(|world| {
        let mut command = world.pavo_command(&["alloc", "--mem", "64", "-E", "sleep 600"]);
        command.arg("tiny:8");
        let alloc = world.start(command);
        alloc.wait_for("vm[0-7] run\n");
        world.ok(&["pause", "all"]);
        let others: Vec<String> = (0..8).map(|rank| format!("vm{rank}")).collect();
        // QEMU of one of them does not answer, and then is gone.
        let qemu = world.process("vm5/disk.qcow2").unwrap();
        qemu.signal(Signal::SIGSTOP);
        let ckpt = world.start(world.pavo_command(&["ckpt", "saved"]));
        world.until("it has begun", || world.path("home/saved").exists());
        qemu.kill();
        let output = ckpt.finish();
        assert_ne!(output.code, Some(0), "{output}");
        assert!(output.stderr.contains("the checkpoint of vm5 on "), "{output}");
        for other in others.iter().filter(|name| *name != "vm5") {
            assert!(!output.stderr.contains(&format!("of {other} ")), "{output}");
        }
        assert!(!world.path("home/saved").exists());
        world.until("the others are as they were", || {
            let states = states(world);
            let failed = |rank| states[rank] == if rank == 5 { "failed" } else { "paused" };
            (0..8).all(failed)
        });
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn without_room_a_cluster_does_not_go_on_and_its_checkpoint_stays() {
    prepared_world(|world| {
        let alloc = world.idle(&["tiny:2"]);
        write(world, "vm1", "0 12M");
        world.ok(&["ckpt", "saved"]);
        alloc.finish();
        world.nothing_runs();
        let before = names(&world.path("home/saved"));
        world.shrink_tmp(8 << 10);
        let output = world.alloc(&["-r", "saved", "-E", "true"]).finish();
        assert_eq!(output.code, Some(5), "{output}");
        assert!(output.stderr.contains("restoring vm1 from `"), "{output}");
        assert!(output.stderr.contains("vm1/disk.qcow2`"), "{output}");
        assert!(output.stderr.contains("No space left on device"), "{output}");
        world.nothing_is_left();
        assert_eq!(fs::read_dir(world.path("tmp")).unwrap().count(), 0);
        umount2(&world.path("tmp"), MntFlags::MNT_DETACH).unwrap();
        assert_eq!(names(&world.path("home/saved")), before);
        let output = world.alloc(&["-r", "saved", "-E", "$PAVO status"]).finish();
        assert_eq!(output.code, Some(0), "{output}");
    });
}

#[test]
fn another_users_cluster_is_refused_to_every_command() {
    prepared_world(|world| {
        let alloc = world.idle(&["tiny"]);
        let folder = world.path("stranger");
        fs::create_dir(&folder).unwrap();
        chown(&folder, Some(STRANGER), Some(STRANGER)).unwrap();
        fs::write(folder.join("file"), "theirs").unwrap();
        let tried = |state: &Path, words: &[&str]| {
            let id = STRANGER.to_string();
            let mut command = Command::new("setpriv");
            command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
            command.arg(world.program()).args(words).current_dir(&folder);
            command.env("HOME", &folder).env("PAVO_TMPDIR", &folder);
            command.env("PAVO_STATE_DIR", state).stdin(Stdio::null());
            let output = command.output().unwrap();
            let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
            (output.status.code(), text(output.stdout), text(output.stderr))
        };
        let (mine, others) = (folder.join("state"), world.path("home/state"));
        for words in [
            &["run", "-j", "1", "true"][..],
            &["cp", "-j", "1", "file", "vm0:/tmp"],
            &["cp", "-j", "1", "vm0:/etc/passwd", "got"],
            &["ckpt", "-j", "1", "saved"],
            &["snapshot", "-j", "1", "vm0", "saved"],
            &["save", "-j", "1", "vm0"],
            &["console", "-j", "1", "vm0"],
            &["console", "-j", "1", "-l", "vm0"],
            &["agent", "ping", "-j", "1"],
            &["pause", "-j", "1", "vm0"],
            &["cancel", "1"],
        ] {
            let (code, out, said) = tried(&mine, words);
            assert_eq!((code, &*out), (Some(4), ""), "{words:?}: {said}");
            assert!(said.contains("you have no running cluster"), "{words:?}: {said}");
            // Nor by the other's own record of it.
            let (code, out, said) = tried(&others, words);
            assert_eq!((code, &*out), (Some(5), ""), "{words:?}: {said}");
            let why = format!("`{}` belongs to the user ", others.display());
            assert!(said.contains(&why) && said.contains("help: "), "{words:?}: {said}");
            assert!(!folder.join("saved").exists() && !folder.join("got").exists(), "{words:?}");
        }
        assert_eq!(states(world), ["running"]);
        assert!(names(&folder).iter().all(|name| ["file", "state"].contains(&&**name)));
        world.ok(&["cancel"]);
        alloc.finish();
    });
}
