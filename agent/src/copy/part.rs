//! A file that is not whole yet: `.NAME.pavo-part`, in the folder where it is to be.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fchmod, fstatat, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, close, unlinkat};

use super::record::Entry;
use super::{WORTH, digest::digest};

/// The longest name that file systems have.
const MAX_NAME: usize = 255;
/// How often one that vanishes under us is made anew.
const TRIES: usize = 5;

/// One that is written to, and nobody else writes to.
#[derive(Debug)]
pub struct Part {
    folder: OwnedFd,
    name: OsString,
    file: File,
    /// Absent where the file system knows no locks.
    _lock: Option<Flock<File>>,
    /// Where the next bytes go.
    at: u64,
}

/// Why there is none.
#[derive(Debug)]
pub enum Refused {
    /// Somebody else writes to it.
    Busy,
    Failed(io::Error),
}

impl From<Errno> for Refused {
    fn from(error: Errno) -> Self {
        Self::Failed(error.into())
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// What a file is called until it is whole.
pub fn part_name(name: &[u8]) -> OsString {
    const END: &[u8] = b".pavo-part";
    let mut part = [b".", name, END].concat();
    if part.len() > MAX_NAME {
        // Long names that begin alike are told apart by all of them.
        let hash = name.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        part = [b".", &name[..200], format!(".{hash:016x}").as_bytes(), END].concat();
    }
    OsString::from_vec(part)
}

pub fn times(entry: &Entry) -> (TimeSpec, TimeSpec) {
    (TimeSpec::UTIME_OMIT, TimeSpec::new(entry.time.0, entry.time.1.into()))
}

/// What others may do with it; who it runs as, and other such marks, do not travel.
pub fn mode(entry: &Entry) -> Mode {
    Mode::from_bits_truncate(entry.mode & 0o777)
}

impl Part {
    /// Opens what an interrupted copy has left of the file of this name, or begins.
    pub fn open(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Self, Refused> {
        let part = part_name(name);
        for _ in 0..TRIES {
            let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let private = Mode::S_IRUSR | Mode::S_IWUSR;
            let file: File = match openat(folder, &*part, flags | OFlag::O_CREAT, private) {
                Ok(file) => file.into(),
                // A link, or what is nobody's business of ours.
                Err(error @ (Errno::ELOOP | Errno::EACCES | Errno::ENXIO)) => {
                    match unlinkat(folder, &*part, UnlinkatFlags::NoRemoveDir) {
                        Ok(()) => continue,
                        // Nothing is there: it is the folder that may not be written.
                        Err(Errno::ENOENT) => return Err(error.into()),
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(error) => return Err(error.into()),
            };
            let about = file.metadata()?;
            let ours = about.is_file()
                && about.uid() == nix::unistd::geteuid().as_raw()
                && about.nlink() == 1
                && about.mode() & 0o077 == 0;
            if !ours {
                // Whoever made it might still write to it. One that is gone is made anew.
                match unlinkat(folder, &*part, UnlinkatFlags::NoRemoveDir) {
                    Ok(()) | Err(Errno::ENOENT) => continue,
                    Err(error) => return Err(error.into()),
                }
            }
            let lock = match Flock::lock(file.try_clone()?, FlockArg::LockExclusiveNonblock) {
                Err((_, Errno::EWOULDBLOCK)) => return Err(Refused::Busy),
                lock => lock.ok(),
            };
            // Who held the lock before may have made it the file.
            let there = fstatat(folder, &*part, AtFlags::AT_SYMLINK_NOFOLLOW);
            if there.is_ok_and(|there| (there.st_dev, there.st_ino) == (about.dev(), about.ino())) {
                let folder = folder.try_clone_to_owned()?;
                return Ok(Self { folder, name: part, file, _lock: lock, at: 0 });
            }
        }
        Err(Refused::Busy)
    }

    /// How much of it there is, at most so much, and what of.
    pub fn have(&self, most: u64) -> io::Result<(u64, [u8; 16])> {
        let length = self.file.metadata()?.len().min(most);
        Ok((length, digest(&self.file, length)?))
    }

    /// Goes on from here; what comes behind is forgotten.
    pub fn begin(&mut self, at: u64) -> io::Result<()> {
        self.at = at;
        self.file.set_len(at)
    }

    pub fn is_empty(&self) -> bool {
        self.file.metadata().is_ok_and(|about| about.len() == 0)
    }

    pub fn at(&self) -> u64 {
        self.at
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    pub fn skip(&mut self, bytes: u64) {
        self.at += bytes;
    }

    /// It is whole: it becomes the file.
    pub fn finish(self, name: &OsStr, entry: &Entry) -> io::Result<()> {
        let Self { folder, name: part, file, _lock, at } = self;
        let complete = || {
            file.set_len(at)?;
            fchmod(&file, mode(entry))?;
            let (accessed, changed) = times(entry);
            futimens(&file, &accessed, &changed)?;
            if at >= WORTH {
                // Were the name there before what it holds, a guest that is reset would have
                // a file that is whole only by its name.
                file.sync_data()?;
            }
            // A file server may tell only now that it is full.
            close(file)?;
            renameat(&folder, &*part, &folder, name)?;
            Ok(())
        };
        complete().inspect_err(|_: &io::Error| remove(&folder, &part))
    }

    /// It will not be gone on with.
    pub fn remove(&self) {
        remove(&self.folder, &self.name);
    }
}

fn remove(folder: &OwnedFd, part: &OsStr) {
    // What cannot be removed stays what it is: a part.
    let _ = unlinkat(folder, part, UnlinkatFlags::NoRemoveDir);
}
