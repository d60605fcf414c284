//! Checkpoints by themselves, and who dies or stands in the way of one.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::ckpt::{all_run, laden, names, now, states};
use super::probe;
use super::save::own_images;
use super::world::{World, world};

#[test]
fn a_cluster_is_written_down_before_it_ends_and_its_script_goes_on() {
    world(|world| {
        let text = "#!/bin/sh\nboot() { cut -c1-8 /proc/sys/kernel/random/boot_id; }\nboot
            i=0; until [ -e /root/go ]; do i=$((i + 1)); echo tick-$i; sleep 0.5; done
            boot; echo end >&2; exit 9\n";
        world.write("home/script", text);
        let words = ["--mem", "128", "--ckpt-on-signal", "saved", "-b", "script"];
        let first = world.alloc(&[&words[..], &["tiny:2"]].concat());
        world.until("it ticks", || first.stdout().contains("tick-3\n"));
        first.signal(Signal::SIGUSR2);
        let first = first.finish();
        assert_eq!(first.code, Some(130), "{first}");
        for expected in
            ["MiB); it ends\n", "error: the cluster was written down", "`pavo alloc -r "]
        {
            assert!(first.stderr.contains(expected), "{expected}: {first}");
        }
        assert!(!first.stderr.contains("has ended\n  help: see how it is"), "{first}");
        world.nothing_runs();
        let all = names(&world.path("home/saved"));
        assert_eq!(all.len(), 1, "{all:?}");
        let dir = format!("saved/{}", all[0]);

        // With another script, and a time limit instead of a signal: it is the first one still.
        world.write("home/script", "exit 1\n");
        let words = [&words[..4], &["-b", "script", "-r", &dir, "-t", "0:20"]].concat();
        let second = world.alloc(&words).finish();
        assert_eq!(second.code, Some(130), "{second}");
        assert!(second.stderr.contains("MiB); it ends\n"), "{second}");
        let all = names(&world.path("home/saved"));
        // That of another job is not its to remove.
        assert_eq!(all.len(), 2, "{all:?}");
        let newer = format!("saved/{}", all.iter().find(|name| !dir.ends_with(*name)).unwrap());
        let third = world.alloc(&["-r", &newer, "-b", "script"]);
        world.until("it ticks", || third.stdout().contains("tick-"));
        world.ok(&["run", "-w", "vm0", "touch", "/root/go"]);
        let third = third.finish();
        assert_eq!(third.code, Some(9), "{third}");
        assert!(third.stderr.contains("end\n"), "{third}");
        let said = [&first, &second, &third].map(|output| output.stdout.clone()).concat();
        let mut lines: Vec<&str> = said.lines().collect();
        // One of the moment in which it ended may be there twice.
        lines.dedup();
        let ticks: Vec<String> = (1..lines.len() - 1).map(|tick| format!("tick-{tick}")).collect();
        assert_eq!(lines[1..lines.len() - 1], ticks, "{said}");
        assert_eq!(lines[0], lines[lines.len() - 1], "it is the same boot: {said}");
    });
}

#[test]
fn what_cannot_be_written_down_by_itself_is_refused_or_goes_on() {
    world(|world| {
        let refused = |settings: &str, why: &str| {
            world.template("mine", settings);
            let output = world.pavo(&["alloc", "--ckpt-on-signal", "saved", "-E", "true", "mine"]);
            assert_eq!(output.code, Some(2), "{output}");
            assert!(output.stderr.contains(why), "{output}");
        };
        refused("persistent-drives:\n    - \"%homedir/kept.raw\"", "has persistent drives");
        refused("mount-points:\n    d: {path: /tmp, type: virtio-fs}", "a mount of virtio-fs");
        let words = ["--ckpt-on-signal", "saved", "tiny:1"];
        let alloc = world.idle(&[&["tiny:1"], &words[..2]].concat());
        // Somebody has taken the folder away.
        fs::remove_dir(world.path("home/saved")).unwrap();
        alloc.signal(Signal::SIGUSR2);
        alloc.wait_for("warning: ");
        assert!(alloc.stderr().contains("looking for checkpoints in"), "{}", alloc.stderr());
        world.until("it goes on", || states(world) == ["running"]);
        // Who ends it wants no checkpoint.
        fs::create_dir(world.path("home/saved")).unwrap();
        world.ok(&["cancel"]);
        assert_eq!(alloc.finish().code, Some(130));
        assert_eq!(names(&world.path("home/saved")), Vec::<String>::new());
    });
}

#[test]
fn a_vms_own_process_is_killed_and_the_others_go_on() {
    world(|world| {
        let alloc = laden(world, "laden:2");
        let process = |rank: usize| {
            let all = world.processes().into_iter();
            let mut all: Vec<_> = all.filter(|it| it.command.contains("internal run")).collect();
            all.sort_by_key(|process| process.pid);
            all.swap_remove(rank)
        };
        let ckpt = world.start(world.pavo_command(&["ckpt", "saved"]));
        ckpt.wait_for("Writing vm[0-1]: ");
        process(1).kill();
        let output = ckpt.finish();
        assert_eq!(output.code, Some(5), "{output}");
        assert!(output.stderr.contains("writing vm1 on "), "{output}");
        assert!(!world.path("home/saved").exists(), "nothing of it is left");
        world.until("vm0 goes on", || states(world) == ["running", "failed"]);
        let refused = world.pavo(&["alloc", "-r", "saved", "-E", "true"]);
        assert_eq!(refused.code, Some(4), "{refused}");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn guests_know_the_time_after_a_checkpoint_and_those_that_stand_still_can_be_saved() {
    world(|world| {
        own_images(world);
        let alloc = world.alloc(&["tiny:2", "--mem", "128", "--wait", "agent", "-E", "sleep 600"]);
        alloc.wait_for("vm[0-1] answer\n");
        world.ok(&["run", "sh", "-c", "echo kept >/root/kept; sync"]);
        world.ok(&["pause", "vm1"]);
        world.until("vm1 stands still", || states(world)[1] == "paused");
        let ckpt = world.start(world.pavo_command(&["ckpt", "-k", "saved"]));
        // As if there was much to write.
        let packer = world.process("zstd").unwrap();
        packer.signal(Signal::SIGSTOP);
        sleep(Duration::from_secs(6));
        packer.signal(Signal::SIGCONT);
        let output = ckpt.finish();
        assert_eq!(output.code, Some(0), "{output}");
        let late = || {
            now() - world.ok(&["run", "-w", "vm0", "date", "+%s"]).trim().parse::<i64>().unwrap()
        };
        world.until("it knows the time", || (-2..=2).contains(&late()));
        // It has stood still from before, and its disk is its own again.
        world.until("all are as they were", || states(world) == ["agent", "paused"]);
        world.ok(&["save", "-d", "user:mine", "vm1"]);
        assert_eq!(states(world), ["agent", "paused"]);
        world.ok(&["resume", "vm1"]);
        world.until("it goes on", || all_run(world));
        assert_eq!(world.ok(&["run", "-w", "vm1", "cat", "/root/kept"]), "kept\n");
        world.ok(&["run", "-w", "vm1", "sh", "-c", "echo more >/root/more; sync"]);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_mounted_9p_is_refused_by_its_name_before_anything_is_written() {
    world(|world| {
        mounts(world);
    });
}

fn mounts(world: &World) {
    let settings = "  mount-points:\n    data: \"%homedir/data\"\n";
    world.folder("home/data");
    let script = "mount -t 9p -o trans=virtio,version=9p2000.L data /mnt && echo it is mounted";
    probe::template(world, settings, script);
    let (alloc, said) = probe::says(world, &[]);
    assert!(said.contains("it is mounted"), "{said}");
    let output = world.pavo(&["ckpt", "saved"]);
    assert_eq!(output.code, Some(2), "{output}");
    for expected in ["preparing the checkpoint of vm0 on ", "data", "umount FOLDER"] {
        assert!(output.stderr.contains(expected), "{expected}: {output}");
    }
    assert!(!Path::new(&world.path("home/saved")).exists());
    world.until("it goes on", || states(world) == ["running"]);
    world.ok(&["cancel"]);
    alloc.finish();
}
