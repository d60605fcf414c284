//! A guest that looks at what it was given, and says so on its console: Debian's kernel,
//! which unlike that of `tiny` has 9p, with a script of the test's own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Instant;

use nix::fcntl::{Flock, FlockArg};

use super::running::{PATIENCE, PAUSE, Running};
use super::world::World;

/// The newest kernel is what this package depends on.
const KERNEL: &str = "linux-image-amd64";
const BUSYBOX: &str = "busybox-static";
/// In whatever order: they are loaded as often as it takes.
const MODULES: &[&str] = &[
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "crct10dif_common",
    "crc-t10dif",
    "crc64",
    "crc64-rocksoft",
    "t10-pi",
    "scsi_common",
    "scsi_mod",
    "sd_mod",
    "virtio_scsi",
    "virtio_console",
    "libata",
    "ata_piix",
    "fscache",
    "netfs",
    "9pnet",
    "9pnet_virtio",
    "9p",
    "fuse",
    "virtiofs",
    "evdev",
    "button",
];
/// What comes before the test's script. Kernel messages would mix with what it says.
const INIT: &str = "#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /proc /sys /dev /mnt
busybox mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo 1 >/proc/sys/kernel/printk
for round in 1 2 3 4; do for module in /modules/*; do insmod $module 2>/dev/null; done; done
exec >/dev/console 2>&1
for event in /sys/class/input/event*; do
	grep -q Power $event/device/name &&
		(dd if=/dev/input/${event##*/} bs=24 count=1 2>/dev/null >/dev/null && sync && poweroff -f) &
done
";

/// The files of the packages, fetched and unpacked once.
fn files() -> PathBuf {
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let dir = shared.join("probe");
    let lock = File::create(shared.join("probe.lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    if dir.join("done").exists() {
        return dir;
    }
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).unwrap();
    let packages = shared.join("packages");
    fs::create_dir_all(&packages).unwrap();
    let script = "set -e
        kernel=$(apt-cache depends \"$1\" | sed -n 's/.*Depends: *\\(linux-image-[^ ]*\\)/\\1/p;T;q')
        cd \"$3\"
        for name in \"$kernel\" \"$2\"; do
            file=$(apt-get download --print-uris \"$name\" | cut -d' ' -f2)
            [ -n \"$file\" ] || file=$(ls \"$name\"_*.deb | tail -n 1)
            [ -e \"$file\" ] || apt-get download -qq \"$name\"
            dpkg-deb --fsys-tarfile \"$file\" |
                tar -x -C \"$4\" --wildcards './boot/vmlinuz-*' '*.ko' './bin/busybox' 2>/dev/null || true
        done";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", KERNEL, BUSYBOX]).arg(&packages).arg(&dir);
    assert!(command.status().unwrap().success(), "apt's lists may be old: `apt-get update`");
    assert!(found(&dir, "busybox").is_some(), "{BUSYBOX} was not unpacked");
    File::create(dir.join("done")).unwrap();
    dir
}

fn found(dir: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(dir).ok()?.find_map(|entry| {
        let path = entry.ok()?.path();
        if path.is_dir() && !path.is_symlink() {
            return found(&path, name);
        }
        let file = path.file_name()?.to_str()?;
        let versioned = name == "vmlinuz" && file.starts_with("vmlinuz-");
        (file == name || versioned).then_some(path)
    })
}

/// Writes a template `probe` with these settings, whose guest runs this script.
pub fn template(world: &World, settings: &str, script: &str) {
    template_with(world, settings, script, &[]);
}

/// The same, with programs in the guest's `/bin`.
pub fn template_with(world: &World, settings: &str, script: &str, programs: &[(&str, &Path)]) {
    let files = files();
    let mut archive = Archive::default();
    for folder in ["bin", "modules"] {
        archive.add(folder, 0o040_755, &[]);
    }
    archive.add("bin/busybox", 0o100_755, &fs::read(found(&files, "busybox").unwrap()).unwrap());
    for (name, path) in programs {
        archive.add(&format!("bin/{name}"), 0o100_755, &fs::read(path).unwrap());
    }
    let init = format!("{INIT}{script}\necho THE PROBE ENDS\nwhile :; do sleep 600; done\n");
    archive.add("init", 0o100_755, init.as_bytes());
    for (index, name) in MODULES.iter().enumerate() {
        // What a kernel has built in is no file.
        if let Some(file) = found(&files, &format!("{name}.ko")) {
            archive.add(&format!("modules/{index:02}"), 0o100_644, &fs::read(file).unwrap());
        }
    }
    archive.add("TRAILER!!!", 0, &[]);
    fs::write(world.path("initrd"), archive.0).unwrap();
    fs::copy(found(&files, "vmlinuz").unwrap(), world.path("vmlinuz")).unwrap();
    let (kernel, initrd) = (world.path("vmlinuz"), world.path("initrd"));
    let text = format!(
        "probe:\n  kernel: {}\n  custom-args: [-initrd, {}]\n{settings}",
        kernel.display(),
        initrd.display()
    );
    world.write("conf/templates.yaml", &text);
}

/// Starts the template's cluster, and returns what its guest says.
pub fn says(world: &World, args: &[&str]) -> (Running, String) {
    let mut all = vec!["--mem", "192", "-E", "sleep 600"];
    all.extend(args);
    if !args.iter().any(|arg| arg.starts_with("probe:")) {
        all.push("probe:1");
    }
    let alloc = world.alloc(&all);
    alloc.wait_for(" run");
    let log = || world.pavo(&["console", "-l", "vm0"]).stdout;
    // A whole kernel, emulated beside others.
    let end = Instant::now() + PATIENCE * 4;
    while !log().contains("THE PROBE ENDS") {
        assert!(Instant::now() < end, "the guest has not said all:\n{}{}", alloc.stderr(), log());
        sleep(PAUSE * 20);
    }
    let said = log().replace('\r', "");
    (alloc, said)
}

/// An initramfs: cpio of the form `newc`.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(&mut self, path: &str, mode: u32, content: &[u8]) {
        let (size, name) = (content.len() as u32, path.len() as u32 + 1);
        self.0.extend(b"070701");
        for field in [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0] {
            self.0.extend(format!("{field:08X}").bytes());
        }
        self.0.extend(path.bytes());
        self.0.push(0);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}
