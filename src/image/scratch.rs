//! Where what is not finished lies until it is: gone with whoever makes it, or, if that one
//! is killed, with the next.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::{O_DIRECTORY, O_NOFOLLOW};

use crate::error::{Context, Result};

const LOCK: &str = "lock";

/// How names of our folders begin: an empty one is nobody's, or is made once more by who has
/// just made it. pcocc's are not ours.
const PREFIX: &str = "pavo-";

/// When what has no lock (files, and all that pcocc makes) counts as left by a program that
/// is no more: an import that runs writes.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// A folder for what is not finished. Whoever has made it holds its lock.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    held: Option<Held>,
}

impl Scratch {
    /// One more in `tmp`; what a killed program left there goes.
    pub fn make(tmp: &Path) -> Result<Self> {
        let make = || -> io::Result<Self> {
            fs::create_dir_all(tmp)?;
            sweep(tmp, "");
            Self::new(tmp, PREFIX)
        };
        make().while_doing(|| format!("creating a folder in `{}`", tmp.display()))
    }

    /// One more in any folder, with a name that begins like this.
    pub(super) fn new(parent: &Path, prefix: &str) -> io::Result<Self> {
        loop {
            let path = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?.keep();
            match Held::new(&path) {
                Ok(Some(held)) => return Ok(Self { path, held: Some(held) }),
                // Before the lock was ours, somebody took the folder for a dead one's.
                Ok(None) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    let _ = fs::remove_dir_all(&path);
                    return Err(error);
                }
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            // What stays is for the next one.
            let _ = held.remove();
        }
    }
}

/// Removes the folders that dead programs have left in `parent`, of names that begin like
/// this.
pub(super) fn sweep(parent: &Path, prefix: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()) {
            continue;
        }
        match Held::of_dead(&entry.path()) {
            // Another one may be faster, and others' are theirs.
            Some(held) => drop(held.remove()),
            None if is_ours(&entry.path()) => drop(fs::remove_dir(entry.path())),
            None => {}
        }
    }
}

/// Removes from `tmp` what nobody works on any more; returns how many, and their size in
/// bytes. With `dry_run` it only looks.
pub(super) fn clear(tmp: &Path, dry_run: bool) -> Result<(usize, u64)> {
    let clear = || -> io::Result<(usize, u64)> {
        let (mut count, mut bytes) = (0, 0);
        let entries = match fs::read_dir(tmp) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((0, 0)),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            // Not counted: whoever is just making it makes another.
            if is_ours(&path) && !dry_run && fs::remove_dir(&path).is_ok() {
                continue;
            }
            let held = Held::of_dead(&path);
            // What cannot be looked into is somebody else's.
            let Ok((size, newest)) = weigh(&path) else { continue };
            let abandoned = match held {
                Some(_) => true,
                None => {
                    fs::symlink_metadata(path.join(LOCK)).is_err()
                        && newest.elapsed().is_ok_and(|age| age > STALE)
                }
            };
            if !abandoned {
                continue;
            }
            let removed = match (dry_run, held, path.is_dir() && !path.is_symlink()) {
                (true, ..) => Ok(()),
                (false, Some(held), _) => held.remove(),
                (false, None, true) => fs::remove_dir_all(&path),
                (false, None, false) => fs::remove_file(&path),
            };
            match removed.map_err(|error| error.kind()) {
                Ok(()) => (count, bytes) = (count + 1, bytes + size),
                // Another one was faster, or it is somebody else's.
                Err(ErrorKind::NotFound | ErrorKind::PermissionDenied) => {}
                Err(kind) => return Err(kind.into()),
            }
        }
        Ok((count, bytes))
    };
    clear().while_doing(|| format!("clearing `{}`", tmp.display()))
}

/// Whether this is the name of a folder of ours.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.windows(PREFIX.len()).any(|part| part == PREFIX.as_bytes())
}

/// A folder whose lock is ours. It is reached by its descriptor: its name may be given to a
/// link meanwhile.
#[derive(Debug)]
struct Held {
    path: PathBuf,
    folder: File,
    lock: Flock<File>,
}

impl Held {
    /// Locks a folder that has just been made; `None` if another one has.
    fn new(path: &Path) -> io::Result<Option<Self>> {
        let folder = open(path)?;
        let file = inside(&folder).join(LOCK);
        let lock = File::create_new(&file)?;
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) if file.exists() => Ok(Some(Self { path: path.to_owned(), folder, lock })),
            Ok(_) | Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    /// Locks a folder whose maker is dead. Without a lock it is being made, or not ours.
    fn of_dead(path: &Path) -> Option<Self> {
        let folder = open(path).ok()?;
        let file = inside(&folder).join(LOCK);
        let lock = File::options().write(true).custom_flags(O_NOFOLLOW).open(file).ok()?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).ok()?;
        Some(Self { path: path.to_owned(), folder, lock })
    }

    /// Removes the folder, the lock after all else: whoever is killed meanwhile leaves what
    /// the next one knows for a dead one's, or an empty folder.
    fn remove(self) -> io::Result<()> {
        let folder = inside(&self.folder);
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_name() == LOCK {
                continue;
            }
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        fs::remove_file(folder.join(LOCK))?;
        // NFS keeps a file that is open.
        drop(self.lock);
        fs::remove_dir(&self.path)
    }
}

/// Opens a folder, and nothing else.
fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(O_DIRECTORY | O_NOFOLLOW).open(path)
}

/// What leads to a folder that is open, whatever its name is by now.
fn inside(folder: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()))
}

/// The size of a file, or of all in a folder, and when something was last written there.
fn weigh(path: &Path) -> io::Result<(u64, SystemTime)> {
    let data = fs::symlink_metadata(path)?;
    let mut sum = (0, data.modified()?);
    if !data.is_dir() {
        sum.0 = data.len();
        return Ok(sum);
    }
    for entry in fs::read_dir(path)? {
        let (size, newest) = weigh(&entry?.path())?;
        sum = (sum.0 + size, sum.1.max(newest));
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_at_once_do_not_take_each_other_for_dead() {
        let dir = tempfile::tempdir().unwrap();
        let work = || {
            for _ in 0..300 {
                let scratch = Scratch::make(dir.path()).unwrap();
                fs::write(scratch.path().join("disk"), "").unwrap();
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(work);
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_what_nobody_works_on_goes() {
        let dir = tempfile::tempdir().unwrap();
        let tmp = dir.path();
        let held = Scratch::make(tmp).unwrap();
        for (name, hours) in [("fresh", 1), ("old", 30)] {
            let file = File::create_new(tmp.join(name)).unwrap();
            file.set_len(100).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
        }
        // As one leaves it who is killed.
        fs::create_dir(tmp.join("killed")).unwrap();
        fs::write(tmp.join("killed/disk"), [0; 10]).unwrap();
        fs::write(tmp.join("killed/lock"), "").unwrap();
        // As pcocc imports.
        fs::create_dir(tmp.join("unlocked")).unwrap();

        assert_eq!(clear(tmp, true).unwrap(), (2, 110));
        assert_eq!(clear(tmp, false).unwrap(), (2, 110));
        assert_eq!(clear(tmp, false).unwrap(), (0, 0));
        assert!(held.path().exists() && tmp.join("fresh").exists());
        assert!(tmp.join("unlocked").exists() && !tmp.join("killed").exists());
        assert_eq!(clear(&tmp.join("none"), false).unwrap(), (0, 0));
    }

    #[test]
    fn whoever_is_killed_while_removing_leaves_nothing_for_long() {
        let dir = tempfile::tempdir().unwrap();
        let (elsewhere, tmp) = (dir.path().join("elsewhere"), dir.path().join("tmp"));
        fs::create_dir_all(elsewhere.join("mine")).unwrap();
        fs::write(elsewhere.join("lock"), "").unwrap();
        for clear_it in [true, false] {
            fs::create_dir(&tmp).unwrap();
            // Killed before the lock goes, after it, and between folder and lock.
            for (name, lock) in [("pavo-content", true), ("pavo-lock", true), ("pavo-empty", false)]
            {
                fs::create_dir(tmp.join(name)).unwrap();
                fs::write(tmp.join(name).join("lock"), "").unwrap();
                if !lock {
                    fs::remove_file(tmp.join(name).join("lock")).unwrap();
                }
            }
            fs::create_dir(tmp.join("pavo-content/folder")).unwrap();
            // pcocc's, and one who would have us remove what is not ours.
            fs::create_dir(tmp.join("tmpq1w2e3")).unwrap();
            std::os::unix::fs::symlink(&elsewhere, tmp.join("pavo-link")).unwrap();
            match clear_it {
                true => assert_eq!(clear(&tmp, false).unwrap().0, 2),
                false => drop(Scratch::make(&tmp).unwrap()),
            }
            let left = fs::read_dir(&tmp).unwrap().map(|entry| entry.unwrap().file_name());
            let left: std::collections::BTreeSet<_> = left.collect();
            assert_eq!(left, ["pavo-link", "tmpq1w2e3"].map(Into::into).into());
            assert!(elsewhere.join("mine").exists() && elsewhere.join("lock").exists());
            fs::remove_dir_all(&tmp).unwrap();
        }
    }
}
