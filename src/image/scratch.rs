//! Where what is not finished lies until it is: gone with whoever makes it, or, if that one
//! is killed, with the next.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use crate::error::{Context, Result};

const LOCK: &str = "lock";

/// When what has no lock (files, and all that pcocc makes) counts as left by a program that
/// is no more: an import that runs writes.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// A folder for what is not finished. Whoever has made it holds its lock.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
    _lock: Flock<File>,
}

impl Scratch {
    /// One more in `tmp`; what a killed program left there goes.
    pub fn make(tmp: &Path) -> Result<Self> {
        let make = || -> io::Result<Self> {
            fs::create_dir_all(tmp)?;
            for entry in fs::read_dir(tmp).into_iter().flatten().flatten() {
                if let Some(_lock) = dead(&entry.path()) {
                    // Another one may be faster, and others' are theirs.
                    let _ = fs::remove_dir_all(entry.path());
                }
            }
            loop {
                let dir = tempfile::tempdir_in(tmp)?;
                let path = dir.path().join(LOCK);
                let lock = File::create_new(&path)?;
                match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
                    Ok(lock) if path.exists() => return Ok(Self { dir, _lock: lock }),
                    // Before the lock was ours, somebody took the folder for a dead one's.
                    Ok(_) | Err((_, Errno::EWOULDBLOCK)) => {}
                    Err((_, errno)) => return Err(errno.into()),
                }
            }
        };
        make().while_doing(|| format!("creating a folder in `{}`", tmp.display()))
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
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
            let lock = dead(&path);
            // What cannot be looked into is somebody else's.
            let Ok((size, newest)) = weigh(&path) else { continue };
            let abandoned = match lock {
                Some(_) => true,
                None => {
                    fs::symlink_metadata(path.join(LOCK)).is_err()
                        && newest.elapsed().is_ok_and(|age| age > STALE)
                }
            };
            if !abandoned {
                continue;
            }
            let removed = match (dry_run, path.is_dir() && !path.is_symlink()) {
                (true, _) => Ok(()),
                (false, true) => fs::remove_dir_all(&path),
                (false, false) => fs::remove_file(&path),
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

/// The lock of a folder whose maker is dead. Without one it is being made, or not ours.
fn dead(folder: &Path) -> Option<Flock<File>> {
    let lock = File::options().write(true).open(folder.join(LOCK)).ok()?;
    Flock::lock(lock, FlockArg::LockExclusiveNonblock).ok()
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
}
