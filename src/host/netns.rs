//! Network namespaces: made, entered on threads of their own, and named by files.
//!
//! A named namespace is a mount of its `/proc` file, as `ip netns` makes it. Which
//! namespace a thread is in decides which links it sees; threads that enter one
//! therefore end there, and sockets opened inside are used from outside.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

use super::crash;
use super::step::Outcome;
use crate::error::{Context, Error, Result};

const NONE: Option<&str> = None;

/// Moves the calling thread into a network namespace, for the rest of its life.
pub fn enter(path: &Path) -> Result<()> {
    let file = File::open(path).while_doing(|| format!("opening `{}`", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .while_doing(|| format!("entering namespace `{}`", path.display()))
}

/// Runs `inside` on a thread in the namespace and waits for it. The caller's tokio
/// runtime, if there is one, is entered there too: sockets and children made inside
/// belong to it.
pub fn with_netns<T: Send>(path: &Path, inside: impl FnOnce() -> T + Send) -> Result<T> {
    let runtime = tokio::runtime::Handle::try_current().ok();
    on_own_thread(move || {
        enter(path)?;
        let _runtime = runtime.as_ref().map(|runtime| runtime.enter());
        Ok(inside())
    })
}

/// Makes the folder in which namespaces are named, as `ip netns` does.
pub fn prepare(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).while_doing(|| format!("creating `{}`", dir.display()))?;
    share(dir).while_doing(|| format!("sharing mounts below `{}`", dir.display()))
}

/// Makes mounts below a folder appear in all mount namespaces that share it.
pub fn share_folder(dir: &Path) -> Result<Outcome> {
    let was = is_mount_point(dir)?;
    share(dir).while_doing(|| format!("sharing mounts below `{}`", dir.display()))?;
    Ok(if was { Outcome::AlreadySo } else { Outcome::Changed })
}

/// Takes that back, unless there is something in the folder.
pub fn unshare_folder(dir: &Path) -> Result<Outcome> {
    let doing = || format!("unmounting `{}`", dir.display());
    if !is_mount_point(dir)? || fs::read_dir(dir).while_doing(doing)?.next().is_some() {
        return Ok(Outcome::AlreadySo);
    }
    umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).while_doing(doing)?;
    Ok(Outcome::Changed)
}

/// Whether a folder is where a file system is mounted; another mount of the same name may
/// lie hidden below. Its path has no blanks in it.
pub fn is_mount_point(dir: &Path) -> Result<bool> {
    let doing = || format!("looking for mounts at `{}`", dir.display());
    let file = match File::open(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        file => file.while_doing(doing)?,
    };
    let info = format!("/proc/thread-self/fdinfo/{}", file.as_raw_fd());
    let info = fs::read_to_string(info).while_doing(doing)?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim);
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").while_doing(doing)?;
    let path = fs::canonicalize(dir).while_doing(doing)?;
    // The first field is the mount's id, the fifth its place.
    Ok(mounts.lines().any(|line| {
        let mut fields = line.split(' ');
        fields.next() == id && fields.nth(3).map(Path::new) == Some(&path)
    }))
}

/// Makes a namespace and names it, unless it exists.
pub fn create(path: &Path) -> Result<Outcome> {
    if is_netns(path) {
        return Ok(Outcome::AlreadySo);
    }
    prepare(path.parent().ok_or_else(|| Error::bug("a namespace needs a folder"))?)?;
    // A crash may have left the file without the mount.
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    file.while_doing(|| format!("creating `{}`", path.display()))?;
    crash::point("netns.file")?;
    on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        mount(Some("/proc/thread-self/ns/net"), path, NONE, MsFlags::MS_BIND, NONE)
    })
    .inspect_err(|_| {
        // An empty file is not a namespace, and nothing else looks at it.
        let _ = fs::remove_file(path);
    })
    .while_doing(|| format!("mounting a new namespace at `{}`", path.display()))?;
    Ok(Outcome::Changed)
}

/// Takes the name away. The namespace ends with the last process inside.
pub fn delete(path: &Path) -> Result<Outcome> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // EINVAL: not a mount point.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ENAMETOOLONG) => return Ok(Outcome::AlreadySo),
        Err(error) => {
            return Err(error).while_doing(|| format!("unmounting `{}`", path.display()));
        }
    }
    match fs::remove_file(path) {
        Ok(()) => Ok(Outcome::Changed),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Outcome::AlreadySo),
        Err(error) => Err(error).while_doing(|| format!("removing `{}`", path.display())),
    }
}

/// Takes all mounts at and below the folder of names away, so that it can be removed: for
/// a folder of our own, in a mount namespace of our own. A folder that is absent has none.
pub fn forget_all(dir: &Path) -> Result<()> {
    loop {
        match umount2(dir, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => {
                return Err(error).while_doing(|| format!("unmounting `{}`", dir.display()));
            }
        }
    }
}

/// Whether a namespace is mounted at `path`.
pub fn is_netns(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)
}

/// Makes mounts below `dir` appear in, and disappear from, every mount namespace
/// that shares it: what `ip netns add` does, so that either may come first.
fn share(dir: &Path) -> nix::Result<()> {
    let make_shared = || mount(NONE, dir, NONE, MsFlags::MS_SHARED | MsFlags::MS_REC, NONE);
    match make_shared() {
        // Not a mount point yet.
        Err(Errno::EINVAL) => {
            mount(Some(dir), dir, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
            make_shared()
        }
        other => other,
    }
}

fn on_own_thread<T: Send, E: Send>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> std::result::Result<T, E> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
