//! How users' folders go: out of the way at once, and then bit by bit.
//!
//! A user may have put anything there: folders nested deeper than descriptors or the stack
//! reach, more files than there is time for, file systems mounted by `fusermount`. None of it
//! may keep root from ending a cluster, or others from starting one. So the folder is only
//! moved into a folder of root's, the grave, where nobody follows. What is there is
//! removed without recursion: a folder in it that is not empty moves up, beside it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, renameat};
use nix::mount::{MntFlags, umount2};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::{Context, Result};

/// In the folder of the folders; no cluster has this name.
const GRAVE: &str = ".gone";
/// How many mounts may lie on one another.
const MOUNTS: u32 = 64;

/// Moves a folder out of the way; one that is not there is.
pub fn bury(path: &Path) -> Result<()> {
    let (Some(parent), true) = (path.parent(), fs::symlink_metadata(path).is_ok()) else {
        return Ok(());
    };
    let grave = parent.join(GRAVE);
    let moved = || {
        for _ in 0..MOUNTS {
            match DirBuilder::new().mode(0o700).create(&grave) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            match fs::rename(path, grave.join(fresh())) {
                // The folder is gone, or somebody has just removed the empty grave.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    if fs::symlink_metadata(path).is_err() {
                        return Ok(());
                    }
                }
                Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => unmount(path)?,
                done => return done,
            }
        }
        Err(Errno::EBUSY.into())
    };
    moved().while_doing(|| format!("removing `{}`", path.display()))
}

/// Removes what was buried in this folder, for at most so long. Says whether all is gone;
/// what cannot be removed stays for the next time.
pub fn empty(parent: &Path, limit: Duration) -> bool {
    let (grave, end) = (parent.join(GRAVE), Instant::now() + limit);
    let Ok(root) = open(&grave) else { return !grave.exists() };
    let mut all = true;
    // Each round removes what is in the folders of the one before.
    loop {
        let mut more = false;
        for name in names(&root) {
            match shallow(&root, &root, &name, end) {
                Ok(()) => {}
                Err(Errno::ENOTEMPTY) => more = true,
                Err(_) => all = false,
            }
            if Instant::now() >= end {
                return false;
            }
        }
        if !more {
            break;
        }
    }
    // Fails where something is left, or has just come.
    let _ = fs::remove_dir(&grave);
    all
}

/// Removes `name` in `dir`. Of a folder, also what is in it, but for folders that are not
/// empty: they move to `root`.
///
/// # Errors
/// `ENOTEMPTY` when something has moved, or there was no time for all.
fn shallow(root: &File, dir: &File, name: &OsStr, end: Instant) -> Result<(), Errno> {
    match remove(dir, name) {
        Err(Errno::ENOTEMPTY) => {}
        done => return done,
    }
    let path = below(dir, name);
    let inner = open(&path).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(5)))?;
    let mut moved = false;
    for name in names(&inner) {
        if Instant::now() >= end {
            return Err(Errno::ENOTEMPTY);
        }
        if remove(&inner, &name) == Err(Errno::ENOTEMPTY) {
            renameat(&inner, name.as_os_str(), root, fresh().as_str())?;
            moved = true;
        }
    }
    match remove(dir, name) {
        // Nothing in it could be removed: not again in this run.
        Err(Errno::ENOTEMPTY) if !moved => Err(Errno::EBUSY),
        Ok(()) if moved => Err(Errno::ENOTEMPTY),
        done => done,
    }
}

/// Removes a file, or an empty folder, and what is mounted there.
fn remove(dir: &File, name: &OsStr) -> Result<(), Errno> {
    for _ in 0..MOUNTS {
        let removed = match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR | Errno::EPERM) => unlinkat(dir, name, UnlinkatFlags::RemoveDir),
            removed => removed,
        };
        match removed {
            Err(Errno::EBUSY) => {
                let unmounted = unmount(&below(dir, name));
                unmounted.map_err(|_| Errno::EBUSY)?;
            }
            Err(Errno::ENOENT) => return Ok(()),
            removed => return removed,
        }
    }
    Err(Errno::EBUSY)
}

/// Takes what is mounted on `path` off, even while it is used.
fn unmount(path: &Path) -> io::Result<()> {
    Ok(umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?)
}

fn open(path: &Path) -> io::Result<File> {
    let flags = (OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW).bits();
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// What is in a folder now.
fn names(dir: &File) -> impl Iterator<Item = std::ffi::OsString> {
    let entries = fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    entries.into_iter().flatten().map_while(Result::ok).map(|entry| entry.file_name())
}

/// A name in an open folder, whatever its path is by now.
fn below(dir: &File, name: &OsStr) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name)
}

/// A name that nobody else makes.
fn fresh() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let (nanos, count) =
        (now.unwrap_or_default().as_nanos(), COUNT.fetch_add(1, Ordering::Relaxed));
    format!("{}-{nanos:x}-{count}", std::process::id())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use nix::fcntl::openat;
    use nix::sys::resource::{Resource, setrlimit};
    use nix::sys::stat::{Mode, mkdirat};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn buried_and_gone(parent: &Path, scratch: &Path) {
        bury(scratch).unwrap();
        assert!(!scratch.exists(), "at once");
        assert!(empty(parent, LONG));
        assert_eq!(fs::read_dir(parent).unwrap().count(), 0);
    }

    /// Runs itself again in a process that has few descriptors.
    #[test]
    fn folders_deeper_than_descriptors_reach_go() {
        const CHILD: &str = "PAVO_TEST_DEEP";
        if std::env::var_os(CHILD).is_none() {
            let name = "ops::setup::grave::tests::folders_deeper_than_descriptors_reach_go";
            let mut command = std::process::Command::new(std::env::current_exe().unwrap());
            let output = command.args(["--exact", name]).env(CHILD, "1").output().unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
        let parent = tempfile::tempdir().unwrap();
        let scratch = parent.path().join("7.0");
        fs::create_dir(&scratch).unwrap();
        let mut at = open(&scratch).unwrap();
        for _ in 0..200 {
            mkdirat(&at, "d", Mode::S_IRWXU).unwrap();
            at = openat(&at, "d", OFlag::O_DIRECTORY, Mode::empty()).unwrap().into();
        }
        drop(at);
        assert!(fs::remove_dir_all(&scratch).is_err(), "recursion fails");
        buried_and_gone(parent.path(), &scratch);
    }

    #[test]
    fn no_link_is_followed_and_no_mode_is_in_the_way() {
        let (parent, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let scratch = parent.path().join("7.0");
        fs::create_dir_all(scratch.join("a/b")).unwrap();
        fs::write(other.path().join("kept"), "").unwrap();
        for dir in [&scratch, &scratch.join("a")] {
            fs::write(dir.join("file"), "").unwrap();
            symlink(other.path(), dir.join("link")).unwrap();
        }
        if nix::unistd::geteuid().is_root() {
            fs::set_permissions(scratch.join("a"), PermissionsExt::from_mode(0o000)).unwrap();
        }
        buried_and_gone(parent.path(), &scratch);
        assert!(other.path().join("kept").exists());
        bury(&scratch).unwrap();
    }

    #[test]
    fn what_there_is_no_time_for_stays_in_the_grave() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = parent.path().join("7.0");
        fs::create_dir_all(scratch.join("a/b")).unwrap();
        bury(&scratch).unwrap();
        assert!(!empty(parent.path(), Duration::ZERO));
        assert!(parent.path().join(GRAVE).exists() && !scratch.exists());
        assert!(empty(parent.path(), LONG));
        assert!(!parent.path().join(GRAVE).exists());
    }

    #[test]
    fn what_is_mounted_there_is_taken_off() {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};
        if !nix::unistd::geteuid().is_root() {
            // Only root can mount; CI is root.
            assert!(std::env::var_os("CI").is_none(), "needs root");
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        let scratch = parent.path().join("7.0");
        let (inner, outer) = (scratch.join("a/mounted"), scratch.clone());
        fs::create_dir_all(&inner).unwrap();
        // In a thread, as its mounts are to be seen by nobody else.
        let path = parent.path().to_owned();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
            .unwrap();
            let tmpfs = |at: &Path| {
                mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
                fs::write(at.join("file"), "").unwrap();
            };
            tmpfs(&inner);
            tmpfs(&inner);
            tmpfs(&outer);
            buried_and_gone(&path, &outer);
        })
        .join()
        .unwrap();
    }
}
