//! Disks that are saved while their VMs run, and what is said to hypervisors. The guests
//! have not booted: QEMU itself writes to their disks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::tiny::shared_images;
use super::world::{World, world};

/// What QEMU calls the device that the guest writes to.
const DISK: &str = "/machine/peripheral/disk-dev/virtio-backend";

/// Gives the world a copy of the images that may be written to.
pub fn own_images(world: &World) {
    let bound = world.path("images");
    let from = if bound.exists() { bound } else { shared_images() };
    let to = world.folder("own");
    let mut copy = world.command("cp");
    copy.args(["-r", "-T"]).args([&from, &to]);
    let output = world.run(copy);
    assert_eq!(output.code, Some(0), "{output}");
    let repos = format!("repos:\n  - name: user\n    path: {}\n", to.display());
    world.write("conf/repos.yaml", &repos);
}

/// Puts bytes on a VM's disk.
pub fn write(world: &World, vm: &str, what: &str) {
    // What it says of a success goes to QEMU's own output.
    let said = world.ok(&["monitor-cmd", vm, &format!("qemu-io -d {DISK} \"write {what}\"")]);
    assert_eq!(said, "");
}

/// Whether a revision of the image holds these bytes.
fn holds(world: &World, image: &str, what: &str) -> bool {
    let (name, revision) = image.split_once('@').unwrap();
    let meta = world.path(&format!("own/meta/{name}@{revision}"));
    let meta: Value = serde_json::from_slice(&fs::read(meta).unwrap()).unwrap();
    let top = meta["data_blobs"].as_array().unwrap().last().unwrap().as_str().unwrap();
    let blob = world.path(&format!("own/data/{}/{top}", &top[..2]));
    let mut command = Command::new("qemu-io");
    command.args(["-r", "-f", "qcow2", "-c", &format!("read {what}")]).arg(blob);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(" ops; "), "{said}");
    !said.contains("Pattern verification failed")
}

/// What is in the repository and no part of an image.
fn unfinished(world: &World) -> Vec<PathBuf> {
    let entries = fs::read_dir(world.path("own/.tmp")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_running_disk_becomes_a_revision_and_a_new_image() {
    world(|world| {
        own_images(world);
        let alloc = world.idle(&["tiny"]);
        write(world, "vm0", "-P 0x17 600k 100k");
        let saved = world.pavo(&["save"]);
        assert!(
            saved.stderr.contains("vm0 disk successfully saved to user:tiny revision 1\n"),
            "{saved}"
        );
        // What is written later is not in it.
        write(world, "vm0", "-P 0x18 600k 64k");
        world.ok(&["save", "-d", "mine", "vm0"]);
        world.ok(&["save", "--full", "-d", "whole", "vm0"]);
        assert!(holds(world, "tiny@1", "-P 0x17 600k 100k"));
        for image in ["mine@0", "whole@0"] {
            assert!(holds(world, image, "-P 0x18 600k 64k"), "{image}");
            assert!(holds(world, image, "-P 0x17 664k 36k"), "{image}");
        }
        let details = |image: &str| -> Value {
            serde_json::from_str(&world.ok(&["image", "show", image, "-o", "json"])).unwrap()
        };
        assert_eq!(details("mine")["revisions"][0]["layers"], 2);
        assert_eq!(details("whole")["revisions"][0]["layers"], 1);
        let refused = world.pavo(&["save", "-d", "mine", "vm0"]);
        assert!(refused.stderr.contains("Image mine already exists"), "{refused}");
        let refused = world.pavo(&["save", "-s", "vm0"]);
        assert!(refused.stderr.contains("did not bring its file systems to rest"), "{refused}");
        assert_eq!(unfinished(world), Vec::<PathBuf>::new());
        world.ok(&["cancel"]);
        alloc.finish();

        // The newest revision is what the next cluster starts from.
        let alloc = world.idle(&["tiny"]);
        write(world, "vm0", "-P 0x19 0 64k");
        world.ok(&["save"]);
        assert!(holds(world, "tiny@2", "-P 0x17 664k 36k"));
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_persistent_drive_is_saved_where_it_is_said_or_its_backup_says() {
    world(|world| {
        own_images(world);
        for name in ["kept.raw", "other.qcow2"] {
            let mut make = world.command("qemu-img");
            let format = if name == "kept.raw" { "raw" } else { "qcow2" };
            make.args(["create", "-q", "-f", format, name, "8M"]);
            assert_eq!(world.run(make).code, Some(0));
        }
        let backup = "{backup: \"user:kept-%{vm_rank}\"}";
        let drives = format!(
            "persistent-drives:\n    - \"%homedir/kept.raw\": {backup}\n    - \"%homedir/other.qcow2\""
        );
        world.template("keeper", &drives);
        let alloc = world.idle(&["keeper"]);
        let put = |drive: u32, what: &str| {
            let device = format!("/machine/peripheral/drive{drive}-dev/virtio-backend");
            world.ok(&["monitor-cmd", "vm0", &format!("qemu-io -d {device} \"write {what}\"")]);
        };
        put(1, "-P 0x21 600k 100k");
        put(2, "-P 0x22 600k 100k");
        let saved = world.pavo(&["save", "-i", "1"]);
        let said = "vm0 drive 1 successfully saved to user:kept-0 revision 0\n";
        assert!(saved.stderr.contains(said), "{saved}");
        put(1, "-P 0x23 600k 100k");
        world.ok(&["save", "-i", "1", "vm0"]);
        world.ok(&["save", "-i", "2", "-d", "other", "vm0"]);
        assert!(holds(world, "kept-0@0", "-P 0x21 600k 100k"));
        assert!(holds(world, "kept-0@1", "-P 0x23 600k 100k"));
        assert!(holds(world, "other@0", "-P 0x22 600k 100k"));
        for (words, text) in [
            (&["-i", "2"][..], "because: No default target image to save VM drive. Please specify"),
            (&["-i", "3"], "because: Provided drive index (3) is invalid"),
            (&["-i", "1", "-d", "other"], "Image other already exists"),
        ] {
            let refused = world.pavo(&[&["save"], words].concat());
            assert_eq!(refused.code, Some(2), "{refused}");
            assert!(refused.stderr.contains(text), "{refused}");
        }
        assert_eq!(unfinished(world), Vec::<PathBuf>::new());
        // Nobody in there heeds the power button, for which it would be waited.
        world.ok(&["qmp", "vm0", "quit"]);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

/// A boot sector that waits for three seconds (the BIOS's call 15h, 86h) and powers off
/// (the sleep register of q35).
const MORTAL: [u8; 18] = [
    0xb4, 0x86, 0xb9, 0x2d, 0, 0xba, 0xc0, 0xc6, 0xcd, 0x15, 0xba, 4, 6, 0xb8, 0, 0x20, 0xef, 0xf4,
];

/// Makes the image `mortal`, which powers off after three seconds.
pub fn mortal_image(world: &World) {
    own_images(world);
    let mut disk = vec![0; 1 << 20];
    disk[..MORTAL.len()].copy_from_slice(&MORTAL);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let file = world.path("home/mortal.raw");
    fs::write(&file, disk).unwrap();
    world.ok(&["image", "import", file.to_str().unwrap(), "mortal"]);
}

#[test]
fn a_guest_that_has_powered_off_is_saved_and_started_again() {
    world(|world| {
        mortal_image(world);
        let alloc = world.idle(&["mortal"]);
        world.ok(&["wait", "--for", "stopped"]);
        let status = world.ok(&["status", "-o", "ndjson"]);
        assert!(status.contains("\"state\":\"off\""), "{status}");
        write(world, "vm0", "-P 0x17 600k 100k");
        world.ok(&["save"]);
        assert!(holds(world, "mortal@1", "-P 0x17 600k 100k"));
        world.ok(&["reset", "vm0"]);
        world.until("the guest runs", || world.ok(&["status"]).contains("running"));
        world.ok(&["cancel"]);
        assert_eq!(alloc.finish().code, Some(130));

        // With a script it is the script that ends it, and it may save them.
        let pavo = world.program().display();
        let script =
            format!("{pavo} wait --for stopped && {pavo} save vm0 >&2; echo saved $?; exit 3");
        let alloc = world.alloc(&["mortal", "--mem", "128", "-E", &script]);
        let output = alloc.finish();
        assert_eq!((output.code, &*output.stdout), (Some(3), "saved 0\n"), "{output}");
        let said = "All guests are off; the cluster stays until the script ends";
        assert_eq!(output.stderr.matches(said).count(), 1, "{output}");

        // A job without anybody beside it ends with its guests.
        let alloc = world.alloc(&["mortal", "--mem", "128", "--wait", "stopped"]);
        let output = alloc.finish();
        assert_eq!(output.code, Some(0), "{output}");
    });
}

#[test]
fn saves_at_once_make_a_revision_each() {
    world(|world| {
        own_images(world);
        let alloc = world.idle(&["tiny:2"]);
        write(world, "vm0", "-P 1 0 16M");
        write(world, "vm1", "-P 2 0 16M");
        let saves: Vec<_> = ["vm0", "vm1", "vm0"]
            .iter()
            .map(|vm| world.start(world.pavo_command(&["save", vm])))
            .collect();
        for save in saves {
            let output = save.finish();
            assert_eq!(output.code, Some(0), "{output}");
        }
        let mut ones = 0;
        for revision in 1..=3 {
            ones += usize::from(holds(world, &format!("tiny@{revision}"), "-P 1 0 16M"));
        }
        assert_eq!(ones, 2);
        assert!(!world.path("own/meta/tiny@4").exists());
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_save_that_dies_leaves_repository_and_vm_whole() {
    world(|world| {
        own_images(world);
        let alloc = world.idle(&["tiny"]);
        write(world, "vm0", "-P 1 0 16M");
        let before = revisions(&world.path("own"));
        let qemu = world.process("qemu-system").unwrap();
        let begin = || {
            // QEMU cannot begin before it goes on.
            qemu.signal(Signal::SIGSTOP);
            let save = world.start(world.pavo_command(&["save", "--full", "-d", "lost"]));
            world.until("the copy's file is there", || {
                unfinished(world).iter().any(|dir| dir.join("disk").exists())
            });
            save
        };
        for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT] {
            let save = begin();
            save.signal(signal);
            assert_ne!(save.finish().code, Some(0));
            qemu.signal(Signal::SIGCONT);
            // QEMU has let go of it, and nothing has come of it.
            world.until("the copy has ended", || {
                world.ok(&["qmp", "vm0", "query-jobs"]).trim() == "[]"
                    && !world.ok(&["qmp", "vm0", "query-named-block-nodes"]).contains("save")
            });
            assert_eq!(revisions(&world.path("own")), before);
        }
        // What the killed ones left is gone with the next.
        world.ok(&["save"]);
        assert!(holds(world, "tiny@1", "-P 1 0 16M"));
        assert_eq!(unfinished(world), Vec::<PathBuf>::new());

        // The VM goes in the middle of it.
        let save = begin();
        qemu.signal(Signal::SIGKILL);
        let output = save.finish();
        assert!(output.stderr.contains("error: saving the disk of vm0\n"), "{output}");
        alloc.finish();
        assert_eq!(unfinished(world), Vec::<PathBuf>::new());
        assert_eq!(revisions(&world.path("own")).len(), before.len() + 1);
    });
}

/// The names of all revisions of a repository.
fn revisions(repo: &Path) -> Vec<String> {
    let entries = fs::read_dir(repo.join("meta")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn one_of_two_may_fail(world: &World) {
    let extra = r#"{"qom-type": "rng-builtin", "id": "extra"}"#;
    world.ok(&["qmp", "vm0", "object-add", extra]);
    let partly = world.pavo(&["qmp", "vm[0-1]", "object-del", r#"{"id": "extra"}"#]);
    assert_eq!(partly.code, Some(1), "{partly}");
    let said: Value = serde_json::from_str(&partly.stdout).unwrap();
    assert_eq!(said, serde_json::json!({ "vm0": {} }));
    assert!(partly.stderr.contains("error: asking vm1\n"), "{partly}");
    assert!(!partly.stderr.contains("vm0"), "{partly}");
}

fn qmp_takes_json(world: &World) {
    let said = world.ok(&["qmp", "vm0", r#"{"execute": "query-status", "arguments": {}}"#]);
    assert_eq!(serde_json::from_str::<Value>(&said).unwrap()["status"], "running");
    let lines = "{\"execute\": \"query-status\"}\n\n{\"execute\":\"query-name\"}\n{\"execut\":1}\n";
    let input = world.write("commands", lines);
    let mut command = world.pavo_command(&["qmp", "all", "-"]);
    command.stdin(fs::File::open(input).unwrap());
    let output = world.start_with_input(command).finish();
    assert_eq!(output.code, Some(2), "{output}");
    assert!(output.stderr.contains("it is no command of QMP"), "{output}");
    let said: Vec<Value> =
        output.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(said.len(), 2, "{output}");
    assert_eq!(said[0]["vm1"]["status"], "running");
    assert!(said[1]["vm0"]["name"].as_str().unwrap().ends_with("-vm0"), "{output}");
}

#[test]
fn a_vm_is_paused_resumed_and_asked() {
    world(|world| {
        own_images(world);
        let alloc = world.idle(&["tiny:2"]);
        let state =
            || -> Value { serde_json::from_str(&world.ok(&["status", "-o", "json"])).unwrap() };
        world.ok(&["pause", "vm1"]);
        world.until("vm1 is paused", || state()[1]["state"] == "paused");
        assert_ne!(state()[0]["state"], "paused");
        let said = world.ok(&["monitor-cmd", "all", "info", "status"]);
        assert_eq!(said, "vm0: VM status: running\nvm1: VM status: paused\n");
        world.ok(&["resume", "all"]);
        world.until("vm1 runs", || state()[1]["state"] != "paused");
        let said = world.ok(&["qmp", "vm[0-1]", "query-status"]);
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["vm1"]["status"], "running");
        let refused = world.pavo(&["qmp", "vm0", "no-such-command"]);
        assert!(refused.stderr.contains("has not been found"), "{refused}");
        let refused = world.pavo(&["qmp", "vm0", "set_link", "[1"]);
        assert!(refused.stderr.contains("no JSON object"), "{refused}");
        one_of_two_may_fail(world);
        qmp_takes_json(world);
        world.ok(&["pause", "all"]);
        world.until("both are paused", || (0..2).all(|at| state()[at]["state"] == "paused"));
        world.ok(&["reset", "all"]);
        let said = world.ok(&["monitor-cmd", "all", "info", "status"]);
        assert_eq!(said.matches("VM status: paused").count(), 2, "{said}");
        let said = world.pavo(&["reset", "--hard", "vm[0-1]"]);
        assert!(said.stderr.contains("Reset vm[0-1]."), "{said}");
        world.until("both run", || (0..2).all(|at| state()[at]["state"] == "running"));
        // Nobody in there heeds it.
        world.ok(&["powerdown", "vm[0-1]"]);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}
