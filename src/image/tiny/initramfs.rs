//! The initramfs: the guest's whole world, since it runs from memory.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::cpio::Archive;
use super::kmod;
use crate::error::{Context, Error, Result};
use crate::image::tool;

/// What the guest's devices and its seed need.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "button",
    "evdev",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "isofs",
];

const FOLDERS: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("etc/dropbear", 0o700),
    ("etc/pavo", 0o755),
    ("lib", 0o755),
    ("lib/modules", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("root/.ssh", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
    ("var/log", 0o755),
];

/// Programs and libraries, searched in the usual folders of the packages.
const BIN: &[&str] = &["bin", "usr/bin", "usr/sbin"];
const PROGRAMS: &[&str] = &["busybox", "dropbear", "dropbearkey"];
const LIBRARIES: &[&str] = &[
    "libc.so.6",
    // busybox loads these to look host names up.
    "libresolv.so.2",
    "libnss_dns.so.2",
    "libnss_files.so.2",
    "libtomcrypt.so.1",
    "libtommath.so.1",
    "libgmp.so.10",
    "libcrypt.so.1",
    "libz.so.1",
];
/// Where programs look for the dynamic loader, whatever the distribution.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

const TEXTS: &[(&str, u32, &str)] = &[
    ("init", 0o755, include_str!("guest/init")),
    ("etc/udhcpc", 0o755, include_str!("guest/udhcpc")),
    ("etc/network", 0o644, include_str!("guest/network")),
    ("etc/pavo/assume", 0o755, include_str!("guest/assume")),
    ("etc/profile", 0o644, include_str!("guest/profile")),
    ("etc/passwd", 0o644, "root::0:0:root:/root:/bin/sh\n"),
    ("etc/group", 0o644, "root:x:0:\n"),
    ("etc/shells", 0o644, "/bin/sh\n"),
    ("etc/nsswitch.conf", 0o644, "hosts: files dns\n"),
];

/// The kernel that was unpacked.
#[derive(Debug)]
pub(super) struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// Finds the one kernel below `root`.
    pub(super) fn find(root: &Path) -> Result<Self> {
        let missing = || Error::system("the kernel's package holds no kernel");
        let boot = root.join("boot");
        let entries =
            fs::read_dir(&boot).while_doing(|| format!("listing `{}`", boot.display()))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let version = names
            .filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
            .next()
            .ok_or_else(missing)?;
        Ok(Self {
            image: boot.join(format!("vmlinuz-{version}")),
            modules: find(root, &["lib/modules", "usr/lib/modules"], &version)?,
        })
    }

    /// The file that a boot loader loads.
    pub(super) fn image(&self) -> Result<Vec<u8>> {
        read(&self.image)
    }
}

/// Writes the initramfs, compressed.
pub(super) fn build(root: &Path, kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for (path, mode) in FOLDERS {
        archive.directory(path, *mode);
    }
    for (to, from) in [("sbin", "bin"), ("lib64", "lib"), ("usr", "."), ("var/run", "../run")] {
        archive.symlink(to, from);
    }
    for applet in applets(root)? {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    for name in PROGRAMS {
        let path = find(root, BIN, name)?;
        archive.file(&format!("bin/{name}"), 0o755, &read(&path)?);
    }
    archive.file("bin/pavo-agent", 0o755, crate::model::agent::PROGRAM);
    // Where dropbear looks for it: /usr is /.
    let sftp = find(root, &["usr/lib/openssh"], "sftp-server")?;
    archive.file("lib/sftp-server", 0o755, &read(&sftp)?);
    let folders = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
    for name in LIBRARIES {
        let path = find(root, &folders, name)?;
        archive.file(&format!("lib/{name}"), 0o755, &read(&path)?);
    }
    let (_, loader) = LOADER.split_once('/').expect("it lies in a folder");
    archive.file(&format!("lib/{loader}"), 0o755, &read(&find(root, &folders, loader)?)?);
    let modules = kmod::select(&kernel.modules, MODULES)?;
    for (index, module) in modules.iter().enumerate() {
        // A shell's `*` goes through them in the order in which they are loaded.
        let path = format!("lib/modules/{index:02}-{}.ko", module.name);
        archive.file(&path, 0o644, &module.content);
    }
    for (path, mode, text) in TEXTS {
        archive.file(path, *mode, text.as_bytes());
    }
    // Half the size: under emulation the BIOS reads more slowly than the kernel unpacks.
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed
        .write_all(&archive.finish())
        .and_then(|()| packed.finish())
        .while_doing(|| "compressing the initramfs".into())
}

/// The names under which busybox does something.
fn applets(root: &Path) -> Result<Vec<String>> {
    let list = tool::run(Command::new(find(root, BIN, "busybox")?).arg("--list"))?;
    let list = String::from_utf8_lossy(&list);
    Ok(list.lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}

/// The path of `name` in the first of `folders` that has it.
fn find(root: &Path, folders: &[&str], name: &str) -> Result<PathBuf> {
    let paths = folders.iter().map(|folder| root.join(folder).join(name));
    paths.into_iter().find(|path| path.exists()).ok_or_else(|| {
        Error::system(format!("`{name}` is in none of the Debian packages"))
            .help("a newer Debian may have moved it: please report it")
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).while_doing(|| format!("reading `{}`", path.display()))
}
