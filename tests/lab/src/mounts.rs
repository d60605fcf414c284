//! The file systems of one host.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::error::{Context, Result};
use crate::site::Site;

/// What a host keeps over a restart, on the machine.
#[derive(Debug)]
pub(crate) struct Folders {
    tmp: PathBuf,
    var: PathBuf,
    var_work: PathBuf,
    pub node: PathBuf,
}

/// Mounts what makes a host of the namespaces that the caller has entered.
pub(crate) fn set_up(name: &str, folders: &Folders, site: &Site) -> Result<()> {
    nix::unistd::sethostname(name).while_doing(|| format!("naming {name}"))?;
    overlay(site, folders)?;
    bind(&site.etc(), Path::new("/etc"))?;
    bind(&folders.node, Path::new("/etc/pavo/node"))?;
    bind(&site.home(), Path::new("/home"))?;
    programs(site)?;
    // First of these three: what the others mount aside is made in it.
    run_files()?;
    device_files()?;
    kernel_files()?;
    // Last: the lab's folder, and all that was mounted above, may lie below these.
    bind(&site.home().join("root"), Path::new("/root"))?;
    bind(&folders.tmp, Path::new("/tmp"))
}

impl Folders {
    pub fn of(host: &str, site: &Site) -> Self {
        let memory = site.memory.join("hosts").join(host);
        Self {
            tmp: site.dir.join("hosts").join(host).join("tmp"),
            var: memory.join("var"),
            var_work: memory.join("var.work"),
            node: memory.join("node"),
        }
    }

    /// Makes those that are not there; `/tmp` is emptied.
    pub fn make(&self) -> Result<()> {
        let _ = fs::remove_dir_all(&self.tmp);
        make_dir(&self.tmp, 0o1777)?;
        make_dir(&self.var, 0o755)?;
        make_dir(&self.var_work, 0o755)?;
        make_dir(&self.node, 0o700)
    }
}

fn overlay(site: &Site, folders: &Folders) -> Result<()> {
    let usr = format!("lowerdir={}:/usr", site.usr().display());
    let var = format!(
        "lowerdir=/var,upperdir={},workdir={}",
        folders.var.display(),
        folders.var_work.display()
    );
    for (target, options) in [("/usr", usr), ("/var", var)] {
        fs_mount("overlay", Path::new(target), MsFlags::empty(), &options)?;
    }
    for (dir, owner) in [("slurmctld", "slurm"), ("slurmd", "root")] {
        let dir = Path::new("/var/spool").join(dir);
        make_dir(&dir, 0o755)?;
        own(&dir, owner)?;
    }
    for (dir, owner) in [("slurm", "slurm"), ("munge", "munge"), ("openvswitch", "root")] {
        let dir = Path::new("/var/log").join(dir);
        make_dir(&dir, 0o755)?;
        own(&dir, owner)?;
    }
    make_dir(Path::new("/var/lib/openvswitch"), 0o755)?;
    make_dir(Path::new("/var/lib/etcd"), 0o700)?;
    make_dir(Path::new("/var/log/lab"), 0o755)
}

fn programs(site: &Site) -> Result<()> {
    let programs = [(&site.pavo, "/usr/bin/pavo"), (&site.plugin, "/usr/lib/pavo/spank_pavo.so")];
    for (program, target) in programs {
        if let Some(program) = program {
            let target = Path::new(target);
            bind(program, target)?;
            let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, target, None::<&str>, read_only, None::<&str>)
                .while_doing(|| format!("making {} read-only", target.display()))?;
        }
    }
    Ok(())
}

/// A `/dev` without the machine's disks and without `/dev/kvm`, which may open and yet
/// run no guest.
fn device_files() -> Result<()> {
    let new = Path::new("/run/dev");
    make_dir(new, 0o755)?;
    fs_mount("tmpfs", new, MsFlags::empty(), "mode=755")?;
    let nodes = [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
        ("ptmx", 5, 2),
        ("net/tun", 10, 200),
    ];
    make_dir(&new.join("net"), 0o755)?;
    for (name, major, minor) in nodes {
        let path = new.join(name);
        let all = Mode::from_bits_truncate(0o666);
        mknod(&path, SFlag::S_IFCHR, all, makedev(major, minor))
            .while_doing(|| format!("making /dev/{name}"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    }
    let links = [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")];
    for (name, end) in links {
        symlink(format!("/proc/self/fd{end}"), new.join(name))?;
    }
    make_dir(&new.join("pts"), 0o755)?;
    bind(Path::new("/dev/pts"), &new.join("pts"))?;
    make_dir(&new.join("shm"), 0o1777)?;
    fs_mount("tmpfs", &new.join("shm"), MsFlags::empty(), "mode=1777")?;
    mount(Some(new), "/dev", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .while_doing(|| "moving /dev".into())?;
    fs::remove_dir(new).while_doing(|| "removing /run/dev".into())
}

/// A `/run` as after a boot.
fn run_files() -> Result<()> {
    fs_mount("tmpfs", Path::new("/run"), MsFlags::empty(), "mode=755")?;
    let dirs = [
        ("munge", 0o755, "munge"),
        ("slurm", 0o755, "slurm"),
        ("openvswitch", 0o755, "root"),
        ("lab", 0o755, "root"),
        ("lock", 0o1777, "root"),
    ];
    for (dir, mode, owner) in dirs {
        let dir = Path::new("/run").join(dir);
        make_dir(&dir, mode)?;
        own(&dir, owner)?;
    }
    Ok(())
}

/// `/sys` of the host's own network; the machine's cgroups stay below it.
fn kernel_files() -> Result<()> {
    let aside = Path::new("/run/cgroup");
    make_dir(aside, 0o755)?;
    bind(Path::new("/sys/fs/cgroup"), aside)?;
    fs_mount("sysfs", Path::new("/sys"), MsFlags::empty(), "")?;
    bind(aside, Path::new("/sys/fs/cgroup"))?;
    umount2(aside, MntFlags::MNT_DETACH)?;
    fs::remove_dir(aside).while_doing(|| "removing /run/cgroup".into())
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(source), target, None::<&str>, flags, None::<&str>)
        .while_doing(|| format!("mounting {} on {}", source.display(), target.display()))
}

fn fs_mount(kind: &str, target: &Path, flags: MsFlags, options: &str) -> Result<()> {
    mount(Some(kind), target, Some(kind), flags, Some(options))
        .while_doing(|| format!("mounting {kind} on {} ({options})", target.display()))
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.while_doing(|| format!("making {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .while_doing(|| format!("opening {}", path.display()))
}

/// Daemons' accounts exist where their packages are installed: hosts of a lab without
/// Slurm need none.
fn own(path: &Path, name: &str) -> Result<()> {
    match nix::unistd::User::from_name(name) {
        Ok(Some(user)) => chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
            .while_doing(|| format!("giving {} to {name}", path.display())),
        _ => Ok(()),
    }
}
