//! The end that files come to. Nothing is written outside of where they are to go.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{
    Mode, SFlag, UtimensatFlags, fchmod, fstat, fstatat, futimens, mkdirat, utimensat,
};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};

use super::digest::digest;
use super::part::{Part, Refused, mode, part_name, times};
use super::record::{Entry, Record, Records};
use super::{MAX_DEPTH, Seen, Stop, cannot, name_of, no_place, shown};

/// The longest target of a link.
const MAX_TARGET: usize = 4095;
/// The longest name.
const MAX_NAME: usize = 255;

/// Where files are to go.
#[derive(Clone, Debug)]
pub struct Place {
    pub path: PathBuf,
    /// Into this folder, which may have to be made; else to this path, or into it where it is
    /// a folder already.
    pub into: bool,
    /// The names of the sources that were asked for, if anything was: others do not come.
    pub names: Option<Vec<Vec<u8>>>,
}

/// Takes files and folders, and says how that went.
///
/// # Errors
/// When one cannot be written, or the other end is gone or says what has no place.
pub fn receive(
    from: impl Read,
    mut to: impl Write,
    place: &Place,
    seen: &mut dyn FnMut(Seen),
) -> Result<(), Stop> {
    let mut receiver = Receiver {
        records: Records::new(from),
        to: &mut to,
        place,
        seen,
        base: None,
        open: Vec::new(),
        came: 0,
    };
    let outcome = receiver.receive_all();
    let last = match &outcome {
        Ok(()) => Record::Done,
        Err(Stop::Own(why)) => Record::Failed(why.clone()),
        Err(Stop::Wrong(why)) => Record::Failed(format!("what was sent is not in order: {why}")),
        Err(Stop::Gone | Stop::Told(_)) => return outcome,
    };
    let said = last.write(receiver.to).and_then(|()| receiver.to.flush());
    // All is written; only nobody hears of it.
    outcome.and(said.map_err(|_| Stop::Gone))
}

/// Where the first step leads.
struct Base {
    folder: OwnedFd,
    /// The one name there, instead of the source's own.
    name: Option<OsString>,
}

/// A folder that is being filled.
struct Open {
    folder: OwnedFd,
    path: PathBuf,
    end: End,
}

/// What becomes of a folder once it is filled.
enum End {
    /// One that was there stays as it is.
    Stays,
    /// But for what had to be changed meanwhile.
    Mode(Mode),
    /// What was made here becomes what it is at the other end.
    Becomes(Entry),
}

impl Drop for Open {
    /// One that the copy does not come back to.
    fn drop(&mut self) {
        if let End::Mode(mode) = self.end {
            // Why the copy has ended says more.
            let _ = fchmod(&self.folder, mode);
        }
    }
}

/// The mode of a folder that is not whole, which no other folder has: so one that an
/// interrupted copy has made is known again.
const UNFINISHED: Mode = Mode::S_IRWXU.union(Mode::S_ISVTX);

struct Receiver<'a, R, W> {
    records: Records<R>,
    to: &'a mut W,
    place: &'a Place,
    seen: &'a mut dyn FnMut(Seen),
    base: Option<Base>,
    open: Vec<Open>,
    /// How many sources have come, or were passed over.
    came: u32,
}

fn folder_at(at: BorrowedFd<'_>, name: &OsStr, more: OFlag) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | more;
    openat(at, name, flags, Mode::empty())
}

fn folder(path: &Path) -> nix::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    folder_at(nix::fcntl::AT_FDCWD, path.as_os_str(), OFlag::empty())
}

fn is_step(name: &[u8]) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}

impl<R: Read, W: Write> Receiver<'_, R, W> {
    fn receive_all(&mut self) -> Result<(), Stop> {
        loop {
            match self.records.hear()? {
                Record::Total(bytes) => (self.seen)(Seen::Total(bytes)),
                Record::Folder(entry) => self.enter(entry)?,
                Record::Leave => self.leave()?,
                Record::File(entry) => self.file(&entry)?,
                Record::Link(entry) => self.link(&entry)?,
                Record::Trouble(why) => (self.seen)(Seen::Trouble(why)),
                Record::Finish if self.open.is_empty() => return Ok(()),
                record => return Err(no_place(&record)),
            }
        }
    }

    /// Where an entry goes: under which name, and the path for people.
    fn step(&mut self, entry: &Entry) -> Result<(OsString, PathBuf), Stop> {
        if let Some(open) = self.open.last() {
            if !is_step(&entry.name) {
                let name = String::from_utf8_lossy(&entry.name).into_owned();
                return Err(Stop::Wrong(format!("the name `{}`", name.escape_debug())));
            }
            let name = OsString::from_vec(entry.name.clone());
            let path = open.path.join(&name);
            return Ok((name, path));
        }
        self.check_source(entry)?;
        if self.base.is_none() {
            self.base = Some(base(self.place)?);
        }
        let base = self.base.as_ref().expect("it was just made");
        match &base.name {
            Some(name) => Ok((name.clone(), self.place.path.clone())),
            None => {
                let name = OsString::from_vec(entry.name.clone());
                let path = self.place.path.join(&name);
                Ok((name, path))
            }
        }
    }

    /// What comes must be what was asked for, each once and in its turn.
    fn check_source(&mut self, entry: &Entry) -> Result<(), Stop> {
        let known = match &self.place.names {
            Some(names) => names.get(entry.source as usize) == Some(&entry.name),
            None => entry.name.is_empty() || is_step(&entry.name),
        };
        let to_one_name = self.base.as_ref().is_some_and(|base| base.name.is_some());
        if !known || entry.source < self.came || to_one_name {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            return Err(Stop::Wrong(format!("`{}`, which is not wanted", name.escape_debug())));
        }
        self.came = entry.source + 1;
        Ok(())
    }

    /// The folder that is being filled.
    fn at(&self) -> BorrowedFd<'_> {
        match (self.open.last(), &self.base) {
            (Some(open), _) => open.folder.as_fd(),
            (None, Some(base)) => base.folder.as_fd(),
            (None, None) => unreachable!("a step was made"),
        }
    }

    fn enter(&mut self, entry: Entry) -> Result<(), Stop> {
        if self.open.len() >= MAX_DEPTH {
            return Err(Stop::Wrong("folders that lie too deep in each other".into()));
        }
        let (name, path) = self.step(&entry)?;
        if name.is_empty() {
            // What it holds goes where others are already: that folder stays as it is.
            let folder = self.at().try_clone_to_owned();
            let folder = folder.map_err(|error| cannot("opening", &path, error))?;
            self.open.push(Open { folder, path, end: End::Stays });
            return Ok(());
        }
        let made = mkdirat(self.at(), &*name, UNFINISHED);
        if let Err(error) = made {
            if error != Errno::EEXIST {
                return Err(cannot("making the folder", &path, error));
            }
        }
        let folder = match folder_at(self.at(), &name, OFlag::O_NOFOLLOW) {
            Ok(folder) => folder,
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                let text = format!("`{}` is there already, and is no folder", shown(&path));
                return Err(Stop::Own(text));
            }
            Err(error) => return Err(cannot("opening", &path, error)),
        };
        let end = if made.is_ok() { End::Becomes(entry) } else { found(&folder, entry) };
        self.open.push(Open { folder, path, end });
        Ok(())
    }

    fn leave(&mut self) -> Result<(), Stop> {
        let Some(mut open) = self.open.pop() else {
            return Err(no_place(&Record::Leave));
        };
        let folder = &open.folder;
        let set = match std::mem::replace(&mut open.end, End::Stays) {
            End::Stays => Ok(()),
            End::Mode(mode) => fchmod(folder, mode),
            End::Becomes(entry) => {
                let (accessed, changed) = times(&entry);
                fchmod(folder, mode(&entry)).and_then(|()| futimens(folder, &accessed, &changed))
            }
        };
        set.map_err(|error| cannot("setting mode and time of", &open.path, error))
    }

    fn link(&mut self, entry: &Entry) -> Result<(), Stop> {
        let (name, path) = self.step(entry)?;
        let target = OsStr::from_bytes(&entry.target);
        if name.is_empty() || target.is_empty() || entry.target.contains(&0) {
            return Err(no_place(&Record::Link(Entry::default())));
        }
        if entry.target.len() > MAX_TARGET {
            return Err(Stop::Wrong("a link that is too long".into()));
        }
        let (at, part) = (self.at(), part_name(name.as_bytes()));
        let make = || -> nix::Result<()> {
            match symlinkat(target, at, &*part) {
                Err(Errno::EEXIST) => {
                    unlinkat(at, &*part, UnlinkatFlags::NoRemoveDir)?;
                    symlinkat(target, at, &*part)?;
                }
                made => made?,
            }
            let (accessed, changed) = times(entry);
            utimensat(at, &*part, &accessed, &changed, UtimensatFlags::NoFollowSymlink)?;
            renameat(at, &*part, at, &*name).inspect_err(|_| {
                let _ = unlinkat(at, &*part, UnlinkatFlags::NoRemoveDir);
            })
        };
        make().map_err(|error| cannot("making the link", &path, error))
    }

    fn file(&mut self, entry: &Entry) -> Result<(), Stop> {
        let (name, path) = self.step(entry)?;
        if name.is_empty() {
            return Err(no_place(&Record::File(Entry::default())));
        }
        let is_folder = |at| {
            let there = fstatat(at, &*name, AtFlags::AT_SYMLINK_NOFOLLOW);
            there.is_ok_and(|there| there.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits())
        };
        if is_folder(self.at()) {
            let text = format!("`{}` is a folder, and what comes is none", shown(&path));
            return Err(Stop::Own(text));
        }
        let mut part = Part::open(self.at(), name.as_bytes()).map_err(|refused| match refused {
            Refused::Busy => {
                Stop::Own(format!("`{}` is being written by another copy", shown(&path)))
            }
            Refused::Failed(error) => cannot("writing", &path, error),
        })?;
        let failed = |error: io::Error| cannot("writing", &path, error);
        match self.fill(&mut part, entry, &name, &failed) {
            Ok(true) => part.finish(&name, entry).map_err(failed),
            Ok(false) => {
                part.remove();
                Ok(())
            }
            // It can be gone on with.
            Err(Stop::Gone) if entry.asks && !part.is_empty() => Err(Stop::Gone),
            Err(stop) => {
                part.remove();
                Err(stop)
            }
        }
    }

    /// Takes what a file holds; false where it is not to become one.
    fn fill(
        &mut self,
        part: &mut Part,
        entry: &Entry,
        name: &OsStr,
        failed: &dyn Fn(io::Error) -> Stop,
    ) -> Result<bool, Stop> {
        let mut from = 0;
        if entry.asks {
            let whole = self.whole(entry, name);
            let offered = match &whole {
                Some((_, digest)) => (entry.size, *digest),
                None => part.have(entry.size).map_err(failed)?,
            };
            from = self.offer(offered)?;
            if let Some((file, _)) = whole.filter(|_| from == entry.size) {
                (self.seen)(Seen::Bytes(from));
                return match self.records.hear()? {
                    Record::End => fchmod(&file, mode(entry))
                        .map(|()| false)
                        .map_err(|error| failed(error.into())),
                    record => Err(no_place(&record)),
                };
            }
        }
        (self.seen)(Seen::Bytes(from));
        part.begin(from).map_err(failed)?;
        loop {
            let left = entry.size - part.at();
            let more = match self.records.hear()? {
                Record::Content(bytes) if bytes.len() as u64 <= left => {
                    part.write(bytes).map_err(failed)?;
                    bytes.len() as u64
                }
                Record::Hole(length) if length <= left => {
                    part.skip(length);
                    length
                }
                Record::Content(_) | Record::Hole(_) => {
                    return Err(Stop::Wrong("more of a file than it was said to have".into()));
                }
                Record::End => return Ok(true),
                Record::Abandon => return Ok(false),
                record => return Err(no_place(&record)),
            };
            (self.seen)(Seen::Bytes(more));
        }
    }

    /// Says how much of a file is there; from where on it comes.
    fn offer(&mut self, (length, digest): (u64, [u8; 16])) -> Result<u64, Stop> {
        let said = Record::Have { length, digest }.write(self.to);
        said.and_then(|()| self.to.flush()).map_err(|_| Stop::Gone)?;
        match self.records.hear()? {
            Record::From(from) if from == 0 || from == length => Ok(from),
            record => Err(no_place(&record)),
        }
    }

    /// The file itself, if it may be there already: by its size and its time.
    fn whole(&self, entry: &Entry, name: &OsStr) -> Option<(File, [u8; 16])> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file: File = openat(self.at(), name, flags, Mode::empty()).ok()?.into();
        let about = file.metadata().ok()?;
        let time = (about.mtime(), about.mtime_nsec() as u32);
        let ours = about.uid() == nix::unistd::geteuid().as_raw();
        let may_be = about.is_file() && ours && about.len() == entry.size && time == entry.time;
        let digest = may_be.then(|| digest(&file, entry.size).ok())??;
        Some((file, digest))
    }
}

/// What becomes of a folder that was there.
fn found(folder: &OwnedFd, entry: Entry) -> End {
    let Ok(about) = fstat(folder) else { return End::Stays };
    let now = Mode::from_bits_truncate(about.st_mode & 0o7777);
    if about.st_uid != nix::unistd::geteuid().as_raw() {
        return End::Stays;
    }
    if now == UNFINISHED {
        return End::Becomes(entry);
    }
    // One that was copied before may have been closed to its owner since.
    if now.contains(Mode::S_IRWXU) || fchmod(folder, now | Mode::S_IRWXU).is_err() {
        return End::Stays;
    }
    End::Mode(now)
}

/// Where the first step leads. Nothing is made before the first comes.
fn base(place: &Place) -> Result<Base, Stop> {
    let path = &*place.path;
    let within = |folder| Base { folder, name: None };
    match folder(path) {
        Ok(folder) => return Ok(within(folder)),
        Err(Errno::ENOENT) if place.into => {}
        Err(Errno::ENOENT | Errno::ENOTDIR) if !place.into => {
            return beside(path);
        }
        Err(error) => return Err(cannot("opening", path, error)),
    }
    // Another copy may make it, or what it is in, at the same time; what it is, is seen below.
    let one = |path: &Path| match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    };
    let make = || match one(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            one(path.parent().unwrap_or(path))?;
            one(path)
        }
        made => made,
    };
    make().map_err(|error| cannot("making the folder", path, error))?;
    folder(path).map(within).map_err(|error| cannot("opening", path, error))
}

/// The one name in the folder where it is to be.
fn beside(path: &Path) -> Result<Base, Stop> {
    let name = name_of(path);
    if name.is_empty() {
        return Err(cannot("opening", path, Errno::ENOENT));
    }
    let parent = path.parent().unwrap_or(Path::new(""));
    let folder = folder(parent).map_err(|error| cannot("opening", parent, error))?;
    Ok(Base { folder, name: Some(OsStr::from_bytes(name).to_owned()) })
}
