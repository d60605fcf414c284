//! Copies of files that lie far away, on a disk of this host: named by their hashes, and no
//! more of them than there is to be room for.
//!
//! ```text
//! BASE/pavo-images-UID/data/HH/HASH   a copy, whole and checked; HH is how HASH begins
//! BASE/pavo-images-UID/part/HASH      one that is being made; its maker holds its lock
//! BASE/pavo-images-UID/lock           held while room is made
//! ```
//!
//! That is how layers of an image lie in a repository, so that one finds the next here, too.
//! Each user has copies of their own: nobody boots what somebody else could have written.
//! Whoever uses a copy holds a shared lock on it, and nobody removes it meanwhile; all locks
//! go with their holders, however these end.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::O_NOFOLLOW;
use nix::sys::statvfs::statvfs;
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};

/// How often a lock that somebody holds is tried.
const PAUSE: Duration = Duration::from_millis(20);
/// No copy is made that leaves less than this part of the disk free.
const FREE: u64 = 20;
/// What is copied at once.
const CHUNK: usize = 1 << 20;

/// The folder of this user's copies below `base`. Ask outside of any user namespace.
pub fn folder(base: &Path) -> PathBuf {
    base.join(format!("pavo-images-{}", nix::unistd::geteuid()))
}

/// One user's copies on this host.
#[derive(Clone, Debug)]
pub struct Blobs {
    dir: PathBuf,
    limit: u64,
}

/// A copy that is used: as long as this is there, so is it.
#[derive(Debug)]
pub struct Held {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Held {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What is known of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    pub hash: String,
    pub bytes: u64,
    /// When it was used last.
    pub used: SystemTime,
    pub in_use: bool,
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    pub count: usize,
    pub bytes: u64,
}

impl Removed {
    fn add(&mut self, bytes: u64) {
        (self.count, self.bytes) = (self.count + 1, self.bytes + bytes);
    }
}

impl Blobs {
    /// Those in this folder, at most `limit` bytes. Touches nothing.
    pub fn new(dir: &Path, limit: u64) -> Self {
        Self { dir: dir.to_owned(), limit }
    }

    /// Whether a file lies on the same file system already: a copy would be no use.
    pub fn is_near(&self, file: &Path) -> bool {
        let there = self.dir.ancestors().find_map(|path| path.metadata().ok());
        there.zip(file.metadata().ok()).is_some_and(|(a, b)| a.dev() == b.dev())
    }

    /// The copy of `source`, whose content has this hash; made if there is none, unless there
    /// is no room for it. Goes on as long as `wanted` says so.
    ///
    /// # Errors
    /// When it cannot be made, is not wanted any more, or `source` is something else.
    pub fn take(
        &self,
        source: &Path,
        hash: &str,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Option<Held>> {
        if hash.len() != 64 || !hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Error::bug(format!("`{}` is no hash", hash.escape_debug())));
        }
        self.prepare()?;
        loop {
            if let Some(held) = self.hold(hash, wanted)? {
                return Ok(Some(held));
            }
            if !self.copy(source, hash, wanted)? {
                return Ok(None);
            }
        }
    }

    /// All copies, the one first that was not used for longest.
    pub fn list(&self) -> Result<Vec<Blob>> {
        let doing = || format!("reading `{}`", self.dir.display());
        let mut all = Vec::new();
        for file in files(&self.dir.join("data")).while_doing(doing)? {
            let Some(hash) = file.file_name().and_then(|name| name.to_str()) else { continue };
            let Ok(about) = file.metadata() else { continue };
            let used = about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let in_use = match File::open(&file) {
                Ok(open) => Flock::lock(open, FlockArg::LockExclusiveNonblock).is_err(),
                Err(_) => continue,
            };
            all.push(Blob { hash: hash.to_owned(), bytes: about.len(), used, in_use });
        }
        all.sort_by_key(|blob| blob.used);
        Ok(all)
    }

    /// Removes what was not used for longest, until what is left has at most so many bytes,
    /// and what killed makers left. What is in use stays.
    pub fn shrink(&self, to: u64) -> Result<Removed> {
        if !self.dir.exists() {
            return Ok(Removed::default());
        }
        let _room = self.lock()?;
        let mut removed = self.make_room(to)?;
        let parts = self.remove_parts()?;
        removed.count += parts.count;
        removed.bytes += parts.bytes;
        Ok(removed)
    }

    /// Removes copies that nobody makes any more, with the lock held.
    fn remove_parts(&self) -> Result<Removed> {
        let mut removed = Removed::default();
        for part in files(&self.dir.join("part")).while_doing(|| "looking for remains".into())? {
            let bytes = part.metadata().map_or(0, |about| about.len());
            if remove(&part)? {
                removed.add(bytes);
            }
        }
        Ok(removed)
    }

    /// Whether so many bytes more leave the disk room: guests write to it, whose VMs stand
    /// still when it is full.
    fn has_free(&self, bytes: u64) -> Result<bool> {
        let disk = statvfs(&self.dir).while_doing(|| "looking how much is free".into())?;
        let [free, all] =
            [disk.blocks_available(), disk.blocks()].map(|n| n * disk.fragment_size());
        Ok(bytes.saturating_add(all / FREE) <= free)
    }

    /// Removes a copy, unless it is in use or there is none.
    pub fn remove(&self, hash: &str) -> Result<Removed> {
        let path = self.path(hash);
        let bytes = path.metadata().map_or(0, |about| about.len());
        let mut removed = Removed::default();
        if remove(&path)? {
            removed.add(bytes);
        }
        Ok(removed)
    }

    fn path(&self, hash: &str) -> PathBuf {
        self.dir.join("data").join(&hash[..2]).join(hash)
    }

    /// Makes the folders. The one above them may be everybody's, as `/var/tmp` is.
    fn prepare(&self) -> Result<()> {
        let us = nix::unistd::geteuid().as_raw();
        let base = self.dir.parent().unwrap_or(&self.dir);
        let about = base.metadata().while_doing(|| format!("looking at `{}`", base.display()))?;
        let everybodys = about.mode() & 0o022 != 0 && about.mode() & 0o1000 == 0;
        if everybodys {
            return Err(Error::system(format!(
                "others could replace what is in `{}`",
                base.display()
            ))
            .help("where all may write, only a sticky folder will do: `chmod +t`"));
        }
        let make = |path: &Path, mode| {
            match fs::DirBuilder::new().mode(mode).create(path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
                // The umask has no say.
                made => made.and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode))),
            }
            .while_doing(|| format!("making `{}`", path.display()))
        };
        make(&self.dir, 0o700)?;
        let about = fs::symlink_metadata(&self.dir);
        let about = about.while_doing(|| format!("looking at `{}`", self.dir.display()))?;
        if !about.is_dir() || about.uid() != us || about.mode() & 0o077 != 0 {
            return Err(Error::system(format!("`{}` is not yours alone", self.dir.display()))
                .help("have it removed: others may have written what is in it"));
        }
        make(&self.dir.join("data"), 0o700)?;
        make(&self.dir.join("part"), 0o700)
    }

    /// Waits until nobody else makes room.
    fn lock(&self) -> Result<Flock<File>> {
        let path = self.dir.join("lock");
        let doing = || format!("locking `{}`", path.display());
        let file = open(&path).while_doing(doing)?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).while_doing(doing)
    }

    /// Uses the copy, if there is one.
    fn hold(&self, hash: &str, wanted: &dyn Fn() -> bool) -> Result<Option<Held>> {
        let path = self.path(hash);
        let doing = || format!("opening `{}`", path.display());
        loop {
            let mut options = OpenOptions::new();
            let file = match options.read(true).custom_flags(O_NOFOLLOW).open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                file => file.while_doing(doing)?,
            };
            match Flock::lock(file, FlockArg::LockSharedNonblock) {
                // Somebody who removes it may have been faster.
                Ok(lock) if is_at(&lock, &path) => {
                    lock.set_modified(SystemTime::now()).while_doing(doing)?;
                    return Ok(Some(Held { path, _lock: lock }));
                }
                Ok(_) | Err((_, Errno::EWOULDBLOCK)) => wait(wanted)?,
                Err((_, errno)) => return Err(errno).while_doing(doing),
            }
        }
    }

    /// Makes the copy, or waits until somebody else has; false if there is no room.
    fn copy(&self, source: &Path, hash: &str, wanted: &dyn Fn() -> bool) -> Result<bool> {
        let doing = || format!("copying `{}` to `{}`", source.display(), self.dir.display());
        let part = self.dir.join("part").join(hash);
        let file = match open(&part) {
            // A maker was killed when it was all but done. If it is not dead, it is waited for.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                remove(&part)?;
                return wait(wanted).map(|()| true);
            }
            file => file.while_doing(doing)?,
        };
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return wait(wanted).map(|()| true),
            Err((_, errno)) => return Err(errno).while_doing(doing),
        };
        // It has become the copy, or was given up.
        if !is_at(&file, &part) {
            return Ok(true);
        }
        // Somebody has finished another one since we looked.
        if self.path(hash).exists() {
            let _ = fs::remove_file(&part);
            return Ok(true);
        }
        let made = self.fill(&mut file, source, hash, wanted);
        if matches!(made, Ok(true)) {
            return Ok(true);
        }
        let _ = fs::remove_file(&part);
        let full =
            |error: &Error| error.report().contains(&io::Error::from(Errno::ENOSPC).to_string());
        match made {
            Err(error) if full(&error) => Ok(false),
            made => made.while_doing(doing),
        }
    }

    fn fill(
        &self,
        file: &mut File,
        source: &Path,
        hash: &str,
        wanted: &dyn Fn() -> bool,
    ) -> Result<bool> {
        let mut from = File::open(source).while_doing(|| "opening it".into())?;
        let bytes = from.metadata().while_doing(|| "looking at it".into())?.len();
        {
            let _room = self.lock()?;
            file.set_len(0).while_doing(|| "emptying what was left".into())?;
            // What killed makers left counts no more.
            self.remove_parts()?;
            let parts = files(&self.dir.join("part")).while_doing(|| "counting copies".into())?;
            let parts = parts.iter().filter_map(|part| part.metadata().ok());
            let needed = bytes + parts.map(|about| about.len()).sum::<u64>();
            let Some(rest) = self.limit.checked_sub(needed) else { return Ok(false) };
            self.make_room(rest)?;
            if self.list()?.iter().map(|blob| blob.bytes).sum::<u64>() > rest {
                return Ok(false);
            }
            if !self.has_free(needed)? {
                return Ok(false);
            }
            // Others count it from now on.
            file.set_len(bytes).while_doing(|| "making room".into())?;
        }
        let (mut hasher, mut chunk) = (Sha256::new(), vec![0; CHUNK]);
        loop {
            if !wanted() {
                return Err(unwanted());
            }
            let count = from.read(&mut chunk).while_doing(|| "reading".into())?;
            if count == 0 {
                break;
            }
            hasher.update(&chunk[..count]);
            file.write_all(&chunk[..count]).while_doing(|| "writing".into())?;
        }
        let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found != hash {
            return Err(Error::config("its content is not what its name says: it is damaged")
                .help("import or build the image again"));
        }
        let finish = || -> io::Result<()> {
            // After a crash nobody reads it again to see whether it is whole.
            file.sync_all()?;
            file.set_permissions(Permissions::from_mode(0o400))?;
            let path = self.path(hash);
            let folder = path.parent().expect("it lies in a folder");
            fs::create_dir_all(folder)?;
            fs::rename(self.dir.join("part").join(hash), &path)?;
            File::open(folder)?.sync_all()
        };
        finish().while_doing(|| "finishing it".into())?;
        Ok(true)
    }

    /// Removes what was not used for longest, with the lock held.
    fn make_room(&self, to: u64) -> Result<Removed> {
        let all = self.list()?;
        let mut there: u64 = all.iter().map(|blob| blob.bytes).sum();
        let mut removed = Removed::default();
        for blob in all {
            if there <= to {
                break;
            }
            if remove(&self.path(&blob.hash))? {
                there -= blob.bytes;
                removed.add(blob.bytes);
            }
        }
        Ok(removed)
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.custom_flags(O_NOFOLLOW).open(path)
}

/// Whether an open file still has this name.
fn is_at(file: &File, path: &Path) -> bool {
    let about = file.metadata().ok().zip(fs::symlink_metadata(path).ok());
    about.is_some_and(|(file, path)| (file.dev(), file.ino()) == (path.dev(), path.ino()))
}

fn wait(wanted: &dyn Fn() -> bool) -> Result<()> {
    std::thread::sleep(PAUSE);
    if wanted() { Ok(()) } else { Err(unwanted()) }
}

fn unwanted() -> Error {
    Error::usage("nobody waits for the copy any more")
}

/// Removes a file that nobody has locked.
fn remove(path: &Path) -> Result<bool> {
    let remove = || -> io::Result<bool> {
        let file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            file => file?,
        };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // Or somebody else was faster, and another has made it anew.
            Ok(lock) if !is_at(&lock, path) => Ok(false),
            Ok(_lock) => fs::remove_file(path).map(|()| true),
            Err((_, Errno::EWOULDBLOCK)) => Ok(false),
            Err((_, errno)) => Err(errno.into()),
        }
    };
    remove().while_doing(|| format!("removing `{}`", path.display()))
}

/// The files in a folder and the folders in it; none if it is not there.
fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => found.extend(files(&entry.path())?),
            false => found.push(entry.path()),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct World {
        dir: tempfile::TempDir,
        blobs: Blobs,
    }

    fn world(limit: u64) -> World {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(&folder(dir.path()), limit);
        World { dir, blobs }
    }

    impl World {
        /// A file far away, and its hash.
        fn file(&self, byte: u8, len: usize) -> (PathBuf, String) {
            let content = vec![byte; len];
            let hash: String =
                Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
            let path = self.dir.path().join(&hash);
            fs::write(&path, content).unwrap();
            (path, hash)
        }

        fn take(&self, (path, hash): &(PathBuf, String)) -> Option<Held> {
            self.blobs.take(path, hash, &|| true).unwrap()
        }

        fn hashes(&self) -> Vec<String> {
            let mut all: Vec<_> =
                self.blobs.list().unwrap().into_iter().map(|it| it.hash).collect();
            all.sort();
            all
        }
    }

    #[test]
    fn a_copy_is_made_once_and_is_its_users_alone() {
        let world = world(1 << 20);
        let file = world.file(7, 5000);
        let held = world.take(&file).unwrap();
        assert_eq!(fs::read(held.path()).unwrap(), vec![7; 5000]);
        assert!(held.path().ends_with(format!("data/{}/{}", &file.1[..2], file.1)));
        // The original is not read again.
        fs::remove_file(&file.0).unwrap();
        let again = world.take(&file).unwrap();
        assert!(world.blobs.list().unwrap()[0].in_use);
        drop((held, again));
        assert!(!world.blobs.list().unwrap()[0].in_use);
        assert_eq!(world.blobs.dir.metadata().unwrap().mode() & 0o777, 0o700);
        for (dir, mode, why) in [
            (world.blobs.dir.as_path(), 0o755, "is not yours alone"),
            (world.dir.path(), 0o777, "others could replace what is in"),
        ] {
            let before = dir.metadata().unwrap().permissions();
            fs::set_permissions(dir, Permissions::from_mode(mode)).unwrap();
            let error = world.blobs.take(&file.0, &file.1, &|| true).unwrap_err();
            assert!(error.report().contains(why), "{}", error.report());
            fs::set_permissions(dir, before).unwrap();
        }
    }

    #[test]
    fn many_at_once_copy_once() {
        let world = world(64 << 20);
        let file = world.file(9, 8 << 20);
        let (world, made) = (Arc::new(world), Arc::new(AtomicUsize::new(0)));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let (world, file, made) = (world.clone(), file.clone(), made.clone());
                std::thread::spawn(move || {
                    let inode = world.take(&file).unwrap().path().metadata().unwrap().ino();
                    made.fetch_add(1, Ordering::Relaxed);
                    inode
                })
            })
            .collect();
        let inodes: Vec<u64> = threads.into_iter().map(|it| it.join().unwrap()).collect();
        assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
        assert_eq!(made.load(Ordering::Relaxed), 8);
        assert_eq!(files(&world.blobs.dir.join("part")).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn room_is_made_of_what_was_not_used_for_longest_and_is_not_in_use() {
        let world = world(10_000);
        let [one, two, three, four] = [1, 2, 3, 4].map(|byte| world.file(byte, 4000));
        let held = world.take(&one).unwrap();
        drop(world.take(&two).unwrap());
        drop(world.take(&three).unwrap());
        let mut expected = vec![one.1.clone(), three.1.clone()];
        expected.sort();
        assert_eq!(world.hashes(), expected, "two was not in use");
        let third = world.take(&three).unwrap();
        assert!(world.take(&four).is_none(), "all is in use");
        assert!(world.take(&world.file(5, 20_000)).is_none(), "it is larger than all");
        assert_eq!(world.hashes(), expected);
        assert_eq!(files(&world.blobs.dir.join("part")).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(world.blobs.remove(&one.1).unwrap(), Removed::default());
        drop(held);
        assert_eq!(world.blobs.shrink(0).unwrap(), Removed { count: 1, bytes: 4000 });
        assert_eq!(world.hashes(), [&*three.1]);
        drop(third);
        assert_eq!(world.blobs.remove(&three.1).unwrap(), Removed { count: 1, bytes: 4000 });
    }

    #[test]
    fn what_is_damaged_or_not_wanted_or_killed_leaves_nothing() {
        let world = world(1 << 20);
        let (path, _) = world.file(1, 5000);
        let (_, other) = world.file(2, 5000);
        let error = world.blobs.take(&path, &other, &|| true).unwrap_err();
        assert!(error.report().contains("it is damaged"), "{}", error.report());
        let error = world.blobs.take(&path, &other, &|| false).unwrap_err();
        assert!(error.report().contains("nobody waits"), "{}", error.report());
        assert_eq!(files(&world.blobs.dir.join("part")).unwrap(), Vec::<PathBuf>::new());
        // A maker was killed: the next one begins anew.
        let file = world.file(3, 5000);
        let part = world.blobs.dir.join("part").join(&file.1);
        fs::write(&part, "half").unwrap();
        assert_eq!(fs::read(world.take(&file).unwrap().path()).unwrap(), vec![3; 5000]);
        // Nor does what it left take up the room of others, or keep anybody out.
        let (left, third) = (world.blobs.dir.join("part").join(&other), world.file(4, 600_000));
        File::create(&left).unwrap().set_len(1 << 20).unwrap();
        assert!(world.take(&third).is_some());
        assert!(!left.exists());
        let fourth = world.file(5, 600);
        let part = world.blobs.dir.join("part").join(&fourth.1);
        fs::write(&part, "whole but for its name").unwrap();
        fs::set_permissions(&part, Permissions::from_mode(0o400)).unwrap();
        assert_eq!(fs::read(world.take(&fourth).unwrap().path()).unwrap(), vec![5; 600]);
        fs::write(world.blobs.dir.join("part").join(&other), "half").unwrap();
        assert_eq!(world.blobs.shrink(1 << 20).unwrap(), Removed { count: 1, bytes: 4 });
    }
}
