//! Whole clusters that are written down, and go on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread::sleep;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

use super::running::Running;
use super::world::{NOBODY, World, prepared_world, world};

/// Seconds since the epoch.
pub fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(now.unwrap().as_secs()).unwrap()
}

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
        let files = "cat /dev/shm/m /root/d /proc/sys/kernel/random/boot_id; ip -4 -o addr show";
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
        world.until("the clocks are right", || {
            let said = world.ok(&["run", "date", "+%s"]);
            let late = |line: &str| now() - line.parse::<i64>().unwrap();
            said.lines().all(|line| (-2..30).contains(&late(line)))
        });
        world.ok(&["ssh", "vm1", "grep", "-q", "vm1-was-here", "/dev/shm/m"]);
        world.ok(&["cancel"]);
        again.finish();
    });
}

/// An image as pcocc had them, of one layer: its template is `older`.
fn older_image(world: &World) -> std::path::PathBuf {
    let home = world.folder("home/older");
    world.ok(&["image", "export", "-t", "qcow2", "tiny", home.join("image").to_str().unwrap()]);
    let text = format!("older:\n  image: {}\n", home.display());
    world.write("conf/templates.yaml", &text);
    home
}

#[test]
fn a_cluster_on_a_folder_of_images_goes_on_if_they_are_what_they_were() {
    world(|world| {
        let home = older_image(world);
        let alloc = world.idle(&["older"]);
        world.ok(&["ckpt", "saved"]);
        alloc.finish();
        // It goes on from the revision that it lay on, whatever has come since.
        fs::copy(home.join("image"), home.join("image-rev1")).unwrap();
        let output = world.pavo(&["alloc", "-r", "saved", "-E", "$PAVO status"]);
        assert_eq!(output.code, Some(0), "{output}");
        let image = fs::File::options().write(true).open(home.join("image")).unwrap();
        let time = image.metadata().unwrap().modified().unwrap();
        image.set_modified(time + Duration::from_secs(1)).unwrap();
        let output = world.pavo(&["alloc", "-r", "saved", "-E", "true"]);
        assert_eq!(output.code, Some(3), "{output}");
        assert!(output.stderr.contains("`image` has changed, in size or time"), "{output}");
        image.set_modified(time).unwrap();
        fs::rename(home.join("image"), home.join("away")).unwrap();
        let output = world.pavo(&["alloc", "-r", "saved", "-E", "true"]);
        assert_eq!(output.code, Some(4), "{output}");
        assert!(output.stderr.contains("older/image"), "{output}");
    });
}

/// The states of the VMs, as their processes know them.
pub fn states(world: &World) -> Vec<String> {
    let status = world.ok(&["status", "-o", "json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let vms = status.as_array().unwrap().iter();
    vms.map(|vm| vm["state"].as_str().unwrap().to_owned()).collect()
}

pub fn all_run(world: &World) -> bool {
    let said = world.ok(&["qmp", "all", "query-status"]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let running = |vm: &serde_json::Value| vm["status"] == "running";
    said.as_object().unwrap().values().all(running)
        && states(world).iter().all(|it| ["running", "ssh", "agent"].contains(&it.as_str()))
}

/// What is in a folder, by name.
pub fn names(dir: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_cluster_goes_on_after_its_checkpoint_or_without_one() {
    world(|world| {
        let alloc = world.idle(&["tiny:2"]);
        let saved = world.pavo(&["ckpt", "-k", "saved"]);
        assert_eq!(saved.code, Some(0), "{saved}");
        assert!(saved.stderr.contains("MiB); it goes on\n"), "{saved}");
        world.until("it goes on", || all_run(world));
        let dir = world.path("home/saved");
        let files = |vm: &str| ["disk", "memory", "seed"].map(|what| format!("{vm}.{what}.zst"));
        let expected = [vec!["manifest.json".into()], files("vm0").into(), files("vm1").into()];
        assert_eq!(names(&dir), expected.concat());
        assert!(names(&dir).iter().all(|name| mode(dir.join(name)) == 0o600));

        let taken = |path: &str, code: i32, why: &str| {
            let output = world.pavo(&["ckpt", "-k", path]);
            assert_eq!(output.code, Some(code), "{path}: {output}");
            assert!(output.stderr.contains(why), "{path}: {output}");
        };
        taken("saved", 2, "because: it is a checkpoint already");
        assert_eq!(names(&dir), expected.concat(), "it is as it was");
        world.folder("home/mine");
        world.write("home/mine/file", "");
        taken("mine", 2, "because: something is in it");
        world.folder("home/rest");
        world.write("home/rest/unfinished", "");
        taken("rest", 2, "or one was interrupted");
        taken("absent/saved", 5, "No such file or directory");
        world.folder("home/empty");
        taken("empty", 0, "it goes on");
        assert_eq!(names(&world.path("home/empty")).len(), 7);
        // One that stands still stays so, and so does what goes on from it.
        world.ok(&["pause", "vm1"]);
        world.until("vm1 stands still", || states(world)[1] == "paused");
        taken("paused", 0, "it goes on");
        world.until("as before", || states(world) == ["running", "paused"]);
        world.ok(&["resume", "vm1"]);
        world.until("it goes on", || all_run(world));

        world.ok(&["cancel"]);
        alloc.finish();
        let again = world.alloc(&["-r", "paused", "-E", "sleep 600", "tiny:2"]);
        world.until("vm0 goes on alone", || {
            world.pavo(&["status"]).code == Some(0) && states(world) == ["running", "paused"]
        });
        world.ok(&["cancel"]);
        again.finish();
    });
}

#[test]
fn what_cannot_be_written_down_is_named() {
    world(|world| {
        let make = |name: &str, settings: &str| {
            world.template(name, settings);
            let alloc = world.idle(&[name]);
            let output = world.pavo(&["ckpt", "saved"]);
            world.until("it goes on", || states(world) == ["running"]);
            assert!(!world.path("home/saved").exists());
            world.ok(&["cancel"]);
            alloc.finish();
            output
        };
        let mut image = world.command("qemu-img");
        image.args(["create", "-q", "-f", "raw", "kept.raw", "8M"]);
        assert_eq!(world.run(image).code, Some(0));
        let output = make("keeper", "persistent-drives:\n    - \"%homedir/kept.raw\"");
        assert_eq!(output.code, Some(2), "{output}");
        assert!(output.stderr.contains("preparing the checkpoint of vm0"), "{output}");
        assert!(output.stderr.contains("`persistent-drives` of template `keeper`"), "{output}");
        // The same disk by another way.
        let path = world.path("home/kept.raw");
        let drive = format!("file={},format=raw,if=virtio", path.display());
        let output = make("odd", &format!("custom-args: [-drive, \"{drive}\"]"));
        assert_eq!(output.code, Some(2), "{output}");
        assert!(output.stderr.contains("`custom-args` of template `odd`"), "{output}");
        assert!(output.stderr.contains("kept.raw` stays where it is"), "{output}");
        // A device that QEMU does not write down.
        let output = make("odd", "custom-args: [-device, \"nvme,serial=x\"]");
        assert_eq!(output.code, Some(2), "{output}");
        assert!(output.stderr.contains("preparing the checkpoint of vm0 on "), "{output}");
        assert!(output.stderr.contains("non-migratable device"), "{output}");
    });
}

#[test]
fn whoever_is_killed_the_guests_go_on() {
    world(|world| {
        let alloc = laden(world, "laden:2");
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
            for moment in [0, 60, 250] {
                let ckpt = world.start(world.pavo_command(&["ckpt", "saved"]));
                ckpt.wait_for("Pausing vm[0-1]\n");
                sleep(Duration::from_millis(moment));
                ckpt.signal(signal);
                let output = ckpt.finish();
                assert_ne!(output.code, Some(0), "{signal} after {moment} ms: {output}");
                world.until("the guests go on", || all_run(world));
                let dir = world.path("home/saved");
                if signal == Signal::SIGKILL {
                    world.until("only the mark is left", || names(&dir) == ["unfinished"]);
                    let refused = world.pavo(&["alloc", "-r", "saved", "-E", "true"]);
                    assert_eq!(refused.code, Some(2), "{refused}");
                    assert!(refused.stderr.contains("it is not finished"), "{refused}");
                    fs::remove_dir_all(&dir).unwrap();
                } else {
                    assert_eq!(output.code, Some(130), "{output}");
                    assert!(!dir.exists());
                }
            }
        }
        a_vm_is_killed(world);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

/// QEMU of vm1 is killed while it writes; then all that is left of the cluster is vm0.
fn a_vm_is_killed(world: &World) {
    let ckpt = world.start(world.pavo_command(&["ckpt", "saved"]));
    ckpt.wait_for("Writing vm[0-1]: ");
    world.process("vm1/disk.qcow2").unwrap().kill();
    let output = ckpt.finish();
    assert_eq!(output.code, Some(5), "{output}");
    assert!(output.stderr.contains("writing vm1 on "), "{output}");
    assert!(!world.path("home/saved").exists());
    world.until("vm0 goes on", || states(world) == ["running", "failed"]);
    let output = world.pavo(&["ckpt", "saved"]);
    assert_eq!(output.code, Some(4), "{output}");
    assert!(output.stderr.contains("preparing the checkpoint of vm1"), "{output}");
    assert!(!world.path("home/saved").exists());
    world.until("vm0 goes on", || states(world) == ["running", "failed"]);
}

/// Starts VMs of 512 MiB, of which 320 are not zero, nor anything that packs well.
pub fn laden(world: &World, cluster: &str) -> Running {
    laden_with(world, 320, cluster)
}

/// The same with so many MiB.
pub fn laden_with(world: &World, mib: u64, cluster: &str) -> Running {
    let mut state = 1_u64;
    let bytes = (0..mib << 17).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let ballast = world.path("ballast");
    fs::write(&ballast, bytes.collect::<Vec<u8>>()).unwrap();
    fs::set_permissions(&ballast, fs::Permissions::from_mode(0o644)).unwrap();
    let loader = format!("loader,file={},addr=0x1000000,force-raw=on", ballast.display());
    world.template("laden", &format!("custom-args: [-device, \"{loader}\"]"));
    let memory = (mib + 192).to_string();
    let alloc = world.alloc(&["--mem", &memory, "-E", "sleep 600", cluster]);
    alloc.wait_for("vm[0-1] run\n");
    alloc
}

#[test]
fn a_full_disk_leaves_no_checkpoint_and_running_guests() {
    prepared_world(|world| {
        let small = world.folder("small");
        let options = format!("size=256k,uid={NOBODY},gid={NOBODY},mode=700");
        mount(Some("none"), &small, Some("tmpfs"), MsFlags::empty(), Some(&*options)).unwrap();
        let alloc = world.idle(&["tiny:2"]);
        // One that is not there for the VMs, which began before.
        let late = world.folder("late");
        mount(Some("none"), &late, Some("tmpfs"), MsFlags::empty(), Some(&*options)).unwrap();
        let output = world.pavo(&["ckpt", late.join("saved").to_str().unwrap()]);
        assert_eq!(output.code, Some(2), "{output}");
        assert!(output.stderr.contains("vm0 on "), "{output}");
        assert!(output.stderr.contains("its host does not see the folder"), "{output}");
        assert_eq!(names(&late), Vec::<String>::new());
        umount2(&late, MntFlags::MNT_DETACH).unwrap();
        let path = small.join("saved");
        let output = world.pavo(&["ckpt", path.to_str().unwrap()]);
        assert_eq!(output.code, Some(5), "{output}");
        assert!(output.stderr.contains("writing vm"), "{output}");
        assert!(output.stderr.contains("No space left on device"), "{output}");
        world.until("the guests go on", || all_run(world));
        assert_eq!(names(&small), Vec::<String>::new());
        umount2(&small, MntFlags::MNT_DETACH).unwrap();
        // And there is nothing in the way of another.
        world.ok(&["ckpt", "saved"]);
        alloc.finish();
    });
}

#[test]
fn what_is_damaged_or_another_machine_is_refused() {
    world(|world| {
        world.template("mine", "nic-model: virtio-net");
        let alloc = world.idle(&["mine"]);
        world.ok(&["ckpt", "saved"]);
        alloc.finish();
        world.nothing_runs();
        let refused = |args: &[&str], code: i32, why: &str| {
            let output = world.pavo(&[&["alloc", "-r", "saved", "-E", "true"], args].concat());
            assert_eq!(output.code, Some(code), "{args:?}: {output}");
            assert!(output.stderr.contains(why), "{args:?}: {output}");
        };
        refused(&["mine:2"], 2, "the checkpoint is of `mine:1`, and `mine:2` is asked for");
        refused(&["-c", "2"], 3, "cores: `1` in the checkpoint, `2` now");
        refused(&["--mem", "64"], 2, "vm0 had 128 MiB of memory");
        refused(
            &["--mount", "t=/tmp"],
            3,
            "`mount-points`: nothing in the checkpoint, `t:virtio-9p`",
        );
        for (settings, why) in [
            ("nic-model: e1000", "`nic-model`: `virtio-net` in the checkpoint, `e1000` now"),
            ("machine-type: pc", "`machine-type`: `q35` in the checkpoint, `pc` now"),
            ("cpu-model: qemu64", "`cpu-model`: nothing in the checkpoint, `qemu64` now"),
            ("resource-set: none", "resource set"),
        ] {
            world.template("mine", settings);
            refused(&[], 3, why);
        }
        world.write("conf/templates.yaml", "");
        refused(&[], 4, "Template not found: mine");
        world.template("mine", "nic-model: virtio-net");

        others_checkpoints(world);
        let dir = world.path("home/saved");
        let change = |name: &str, how: &dyn Fn(&mut Vec<u8>)| {
            let path = dir.join(name);
            let whole = fs::read(&path).unwrap();
            let mut bytes = whole.clone();
            how(&mut bytes);
            fs::write(&path, bytes).unwrap();
            whole
        };
        for (name, how, code, why) in [
            (
                "vm0.memory.zst",
                flip as fn(&mut Vec<u8>),
                3,
                "it is damaged, and not what was written",
            ),
            ("vm0.disk.zst", flip, 3, "it is damaged, and not what was written"),
            ("vm0.disk.zst", cut, 3, "it is damaged"),
            ("manifest.json", cut, 3, "`manifest.json` is damaged"),
            ("manifest.json", newer, 2, "use the pavo that wrote it"),
            ("manifest.json", outside, 3, "is no name of a file"),
            ("manifest.json", fewer, 3, "its VMs are not those of its cluster"),
        ] {
            let whole = change(name, &how);
            refused(&[], code, why);
            fs::write(dir.join(name), whole).unwrap();
        }
        fs::rename(dir.join("vm0.seed.zst"), dir.join("seed")).unwrap();
        refused(&[], 5, "saved/vm0.seed.zst`");
        fs::rename(dir.join("seed"), dir.join("vm0.seed.zst")).unwrap();
        // As it was, it goes on.
        let output = world.pavo(&["alloc", "-r", "saved", "-E", "$PAVO status"]);
        assert_eq!(output.code, Some(0), "{output}");
    });
}

/// Its guest, and the disk that the guest sees, could be anything.
fn others_checkpoints(world: &World) {
    let dir = world.path("home/saved");
    let refused = |why: &str| {
        let output = world.pavo(&["alloc", "-r", "saved", "-E", "true"]);
        assert_eq!(output.code, Some(3), "{output}");
        assert!(output.stderr.contains(why) && output.stderr.contains("help: "), "{output}");
    };
    for path in [dir.clone(), dir.join("manifest.json")] {
        let before = mode(&path);
        fs::set_permissions(&path, fs::Permissions::from_mode(before | 0o020)).unwrap();
        refused("others may write to");
        fs::set_permissions(&path, fs::Permissions::from_mode(before)).unwrap();
        if nix::unistd::geteuid().is_root() {
            // One that this account can look at, and has not written.
            std::os::unix::fs::chown(&path, Some(1), None).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            refused("what others have written may hold anything");
            std::os::unix::fs::chown(&path, Some(NOBODY), None).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(before)).unwrap();
        }
    }
}

#[expect(clippy::ptr_arg, reason = "as the others are")]
fn flip(bytes: &mut Vec<u8>) {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
}

fn cut(bytes: &mut Vec<u8>) {
    bytes.truncate(bytes.len() / 2);
}

fn newer(bytes: &mut Vec<u8>) {
    replace(bytes, "\"version\":2", "\"version\":9");
}

fn fewer(bytes: &mut Vec<u8>) {
    replace(bytes, "\"definition\":\"mine", "\"definition\":\"mine:2,mine");
}

fn outside(bytes: &mut Vec<u8>) {
    replace(bytes, "vm0.disk.zst", "../secret");
}

fn replace(bytes: &mut Vec<u8>, from: &str, to: &str) {
    let text = String::from_utf8(std::mem::take(bytes)).unwrap();
    assert!(text.contains(from));
    *bytes = text.replacen(from, to, 1).into();
}
