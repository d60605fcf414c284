//! The end that has the files.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use nix::sys::statfs::fstatfs;

use super::digest::digest;
use super::holes::{data_from, hole_from};
use super::record::{Entry, Piece, Record, Records};
use super::{MAX_DEPTH, Seen, Stop, WORTH, name_of, no_place, reason, shown};

/// A file that does not tell its size, such as those of the kernel, is sent up to this one.
const UNTOLD: u64 = 16 << 20;
/// How many files are counted before the first is sent.
const COUNTED: usize = 200_000;

/// Sends files and folders. What cannot be read is told, and the rest sent.
///
/// # Errors
/// When the other end cannot go on, or is gone.
pub fn send(
    from: impl Read,
    to: impl Write,
    sources: &[PathBuf],
    seen: &mut dyn FnMut(Seen),
) -> Result<(), Stop> {
    let records = Records::new(from);
    let mut sender = Sender { records, to, seen, piece: Piece::default(), source: 0, depth: 0 };
    let sent = sender.send_all(sources);
    if !matches!(sent, Ok(()) | Err(Stop::Gone)) {
        return sent;
    }
    // Who does not listen any more has said why.
    match sender.records.hear() {
        Ok(Record::Failed(why)) => Err(Stop::Told(why)),
        Ok(Record::Done) if sent.is_ok() => Ok(()),
        Ok(record) if sent.is_ok() => Err(no_place(&record)),
        Err(stop) if sent.is_ok() => Err(stop),
        _ => sent,
    }
}

struct Sender<'a, R, W> {
    records: Records<R>,
    to: W,
    seen: &'a mut dyn FnMut(Seen),
    piece: Piece,
    source: u32,
    depth: usize,
}

fn gone(_: io::Error) -> Stop {
    Stop::Gone
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn open(at: BorrowedFd<'_>, name: &OsStr, flags: OFlag) -> nix::Result<OwnedFd> {
    // Of a pipe that has taken the place of a file nothing is waited for.
    let flags = flags | OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    openat(at, name, flags, Mode::empty())
}

/// File systems that hold no files, but show what the kernel knows: `proc`, `sysfs`, `devpts`,
/// `cgroup`, `cgroup2`, `debugfs`, `tracefs`, `securityfs`, `pstore`, `bpf`, `configfs`,
/// `efivarfs`, `binfmt_misc`, `selinuxfs`, `fusectl`, `mqueue`.
const KERNELS: [u32; 16] = [
    0x9fa0,
    0x6265_6572,
    0x1cd1,
    0x0027_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6165_676c,
    0xcafe_4a11,
    0x6265_6570,
    0xde5e_81e4,
    0x4249_4e4d,
    0xf97c_ff8c,
    0x6573_5543,
    0x1980_0202,
];

/// Whether a folder is where another file system begins that is the kernel's: no end of
/// bytes may be in it.
pub(super) fn leads_out(at: BorrowedFd<'_>, folder: BorrowedFd<'_>) -> bool {
    let device = |fd| fstat(fd).map(|stat| stat.st_dev).ok();
    if device(at) == device(folder) {
        return false;
    }
    let kind = fstatfs(folder).map(|found| found.filesystem_type().0 as u32);
    // Devices lie in one that is like any in memory.
    let null = fstatat(folder, "null", AtFlags::AT_SYMLINK_NOFOLLOW);
    kind.is_ok_and(|kind| KERNELS.contains(&kind))
        || null.is_ok_and(|null| kind_of(&null) == SFlag::S_IFCHR)
}

/// What a folder holds, by name.
fn names(folder: &OwnedFd) -> nix::Result<Vec<OsString>> {
    let again = openat(folder, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::from_fd(again)?.iter() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// How many bytes there are; what cannot be looked at has none.
fn measure(at: BorrowedFd<'_>, name: &OsStr, follow: bool, left: &mut usize, depth: usize) -> u64 {
    let flags = if follow { AtFlags::empty() } else { AtFlags::AT_SYMLINK_NOFOLLOW };
    let Ok(stat) = fstatat(at, name, flags) else { return 0 };
    let Some(rest) = left.checked_sub(1).filter(|_| depth < MAX_DEPTH) else { return 0 };
    *left = rest;
    match kind_of(&stat) {
        SFlag::S_IFREG => stat.st_size.max(0) as u64,
        SFlag::S_IFDIR => {
            let no_link = if follow { OFlag::empty() } else { OFlag::O_NOFOLLOW };
            let Ok(folder) = open(at, name, OFlag::O_DIRECTORY | no_link) else { return 0 };
            if depth > 0 && leads_out(at, folder.as_fd()) {
                return 0;
            }
            let names = names(&folder).unwrap_or_default();
            let sizes = names.iter().map(|name| {
                if *left > 0 { measure(folder.as_fd(), name, false, left, depth + 1) } else { 0 }
            });
            sizes.fold(0, u64::saturating_add)
        }
        _ => 0,
    }
}

impl<R: Read, W: Write> Sender<'_, R, W> {
    fn say(&mut self, record: &Record<'_>) -> Result<(), Stop> {
        record.write(&mut self.to).map_err(gone)
    }

    fn trouble(&mut self, path: &Path, why: &str) -> Result<(), Stop> {
        let text = format!("`{}`: {why}", shown(path));
        (self.seen)(Seen::Trouble(text.clone()));
        self.say(&Record::Trouble(text))
    }

    fn failed(&mut self, path: &Path, error: impl Into<io::Error>) -> Result<(), Stop> {
        self.trouble(path, &reason(&error.into()))
    }

    fn send_all(&mut self, sources: &[PathBuf]) -> Result<(), Stop> {
        let mut left = COUNTED;
        let sizes = sources.iter().map(|path| {
            let whole = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            measure(AT_FDCWD, whole.as_os_str(), true, &mut left, 0)
        });
        let total = sizes.fold(0, u64::saturating_add);
        (self.seen)(Seen::Total(total));
        self.say(&Record::Total(total))?;
        for (index, path) in sources.iter().enumerate() {
            self.source = index as u32;
            let name = name_of(path).to_vec();
            let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
            self.send(AT_FDCWD, path.as_os_str(), path, name, true)?;
        }
        self.say(&Record::Finish)?;
        self.to.flush().map_err(gone)
    }

    /// Sends what is called so in a folder; `path` is for people.
    fn send(
        &mut self,
        at: BorrowedFd<'_>,
        name: &OsStr,
        path: &Path,
        called: Vec<u8>,
        follow: bool,
    ) -> Result<(), Stop> {
        let flags = if follow { AtFlags::empty() } else { AtFlags::AT_SYMLINK_NOFOLLOW };
        let stat = match fstatat(at, name, flags) {
            Ok(stat) => stat,
            Err(error) => return self.failed(path, error),
        };
        let no_link = if follow { OFlag::empty() } else { OFlag::O_NOFOLLOW };
        match kind_of(&stat) {
            SFlag::S_IFREG => match open(at, name, no_link) {
                Ok(file) => self.file(&file.into(), path, called),
                Err(error) => self.failed(path, error),
            },
            SFlag::S_IFDIR => match open(at, name, OFlag::O_DIRECTORY | no_link) {
                Ok(folder) if self.depth > 0 && leads_out(at, folder.as_fd()) => {
                    self.trouble(path, "the kernel's own: it is not copied")
                }
                Ok(folder) => self.folder(&folder, path, called),
                Err(error) => self.failed(path, error),
            },
            SFlag::S_IFLNK => match readlinkat(at, name) {
                Ok(target) => {
                    let mut entry = self.entry(called, &stat);
                    entry.target = target.into_vec();
                    self.say(&Record::Link(entry))
                }
                Err(error) => self.failed(path, error),
            },
            _ => self.trouble(path, "neither a file nor a folder or a link: it is not copied"),
        }
    }

    fn entry(&self, name: Vec<u8>, stat: &FileStat) -> Entry {
        Entry {
            source: self.source,
            name,
            mode: stat.st_mode & 0o777,
            time: (stat.st_mtime, (stat.st_mtime_nsec as u32).min(999_999_999)),
            size: stat.st_size.max(0) as u64,
            target: Vec::new(),
            asks: false,
        }
    }

    fn folder(&mut self, folder: &OwnedFd, path: &Path, called: Vec<u8>) -> Result<(), Stop> {
        if self.depth == MAX_DEPTH {
            return self.trouble(path, "it lies too deep: it is not copied");
        }
        let (stat, names) = match (fstat(folder), names(folder)) {
            (Ok(stat), Ok(names)) => (stat, names),
            (Err(error), _) | (_, Err(error)) => return self.failed(path, error),
        };
        let entry = self.entry(called, &stat);
        self.say(&Record::Folder(entry))?;
        self.depth += 1;
        for name in names {
            let path = path.join(&name);
            let called = name.as_bytes().to_vec();
            self.send(folder.as_fd(), &name, &path, called, false)?;
        }
        self.depth -= 1;
        self.say(&Record::Leave)
    }

    fn file(&mut self, file: &File, path: &Path, called: Vec<u8>) -> Result<(), Stop> {
        let stat = match fstat(file) {
            Ok(stat) if kind_of(&stat) == SFlag::S_IFREG => stat,
            Ok(_) => return self.trouble(path, "it is no file any more: it is not copied"),
            Err(error) => return self.failed(path, error),
        };
        let mut entry = self.entry(called, &stat);
        if entry.name.is_empty() {
            return self.trouble(path, "it has no name to be copied to");
        }
        let mut untold = Vec::new();
        if entry.size == 0 {
            match file.take(UNTOLD + 1).read_to_end(&mut untold) {
                Ok(_) if untold.len() as u64 <= UNTOLD => entry.size = untold.len() as u64,
                Ok(_) => return self.trouble(path, "its size is not known, and it is too long"),
                Err(error) => return self.failed(path, error),
            }
        }
        entry.asks = untold.is_empty() && entry.size >= WORTH;
        let (size, asks) = (entry.size, entry.asks);
        self.say(&Record::File(entry))?;
        let from = if asks { self.agree(file, size)? } else { 0 };
        (self.seen)(Seen::Bytes(from));
        let sent = if untold.is_empty() {
            self.contents(file, from, size)?
        } else {
            self.small(&untold)?;
            Ok(size)
        };
        match sent {
            Ok(end) => {
                self.say(&Record::End)?;
                // What is cut off is told from a hole only by the size.
                let now = fstat(file).map_or(0, |stat| stat.st_size.max(0) as u64);
                match end == size && (now >= size || !untold.is_empty()) {
                    true => Ok(()),
                    false => self.trouble(path, "it became shorter while it was copied"),
                }
            }
            Err(error) => {
                self.say(&Record::Abandon)?;
                self.failed(path, error)
            }
        }
    }

    /// Where the file is to be gone on with: what is there of it must be the same.
    fn agree(&mut self, file: &File, size: u64) -> Result<u64, Stop> {
        self.to.flush().map_err(gone)?;
        let (length, theirs) = match self.records.hear()? {
            Record::Have { length, digest } => (length, digest),
            Record::Failed(why) => return Err(Stop::Told(why)),
            record => return Err(no_place(&record)),
        };
        let same =
            (1..=size).contains(&length) && digest(file, length).is_ok_and(|ours| ours == theirs);
        let from = if same { length } else { 0 };
        self.say(&Record::From(from))?;
        Ok(from)
    }

    fn small(&mut self, bytes: &[u8]) -> Result<(), Stop> {
        for bytes in bytes.chunks(super::BYTES) {
            self.say(&Record::Content(bytes))?;
            (self.seen)(Seen::Bytes(bytes.len() as u64));
        }
        Ok(())
    }

    /// Sends what a file holds; until where, or why it could not be read.
    fn contents(&mut self, file: &File, from: u64, size: u64) -> Result<io::Result<u64>, Stop> {
        let mut at = from;
        while at < size {
            let data = data_from(file, at, size);
            if data > at {
                self.say(&Record::Hole(data - at))?;
                (self.seen)(Seen::Bytes(data - at));
                at = data;
                continue;
            }
            let end = hole_from(file, at, size).max(at + 1);
            while at < end {
                let room = self.piece.room();
                let most = room.len().min((end - at).try_into().unwrap_or(usize::MAX));
                let count = match file.read_at(&mut room[..most], at) {
                    Ok(0) => return Ok(Ok(at)),
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Ok(Err(error)),
                };
                self.piece.write(count, &mut self.to).map_err(gone)?;
                (self.seen)(Seen::Bytes(count as u64));
                at += count as u64;
            }
        }
        Ok(Ok(at))
    }
}
