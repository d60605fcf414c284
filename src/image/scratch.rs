//! Where what is not finished lies until it is: gone with whoever makes it, or, if that one
//! is killed, with the next.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use crate::error::{Context, Result};

/// A folder for what is not finished. Whoever has made it holds its lock.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
    _lock: Flock<File>,
}

impl Scratch {
    const LOCK: &str = "lock";

    /// One more in `tmp`; what a killed program left there goes.
    pub fn make(tmp: &Path) -> Result<Self> {
        let make = || -> io::Result<Self> {
            fs::create_dir_all(tmp)?;
            Self::sweep(tmp);
            loop {
                let dir = tempfile::tempdir_in(tmp)?;
                let path = dir.path().join(Self::LOCK);
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

    /// Removes what nobody works on any more, as far as it is ours to remove.
    fn sweep(tmp: &Path) {
        for entry in fs::read_dir(tmp).into_iter().flatten().flatten() {
            // Without a lock it is being made, or no folder of ours.
            let Ok(lock) = File::options().write(true).open(entry.path().join(Self::LOCK)) else {
                continue;
            };
            if let Ok(_lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
                // Another one may be faster, and others' are theirs.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
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
}
