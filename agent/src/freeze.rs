//! File systems at rest: for a copy of the guest's disks that is of one moment.
//!
//! Two processes, which are this program again. One freezes, and holds them for as long as its
//! input is open; the other was started before, and thaws them when the first is gone or its
//! time is over, whatever becomes of the first, of the agent, of the host.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::libc::{c_int, syncfs};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use pavo_agent::{Exec, THAWED_BEFORE};

use super::copying::OURSELVES;

const FREEZE: &str = "--freeze";
const GUARD: &str = "--thaw";
/// What is mounted.
const MOUNTS: &str = "/proc/self/mountinfo";

/// The command that does it, for so many seconds at most.
pub fn command(seconds: u32) -> Exec {
    let words = [OURSELVES, FREEZE, &seconds.to_string()].map(|word| word.as_bytes().to_vec());
    Exec { argv: words.into(), input: true, ..Exec::default() }
}

/// Freezes or guards, if that is what this process was started for.
pub fn freeze(words: &[OsString]) -> Option<ExitCode> {
    let (word, rest) = words.split_first()?;
    if word != FREEZE && word != GUARD {
        return None;
    }
    let (seconds, mounts) = match rest {
        [seconds] => (seconds, OsStr::new(MOUNTS)),
        [seconds, mounts] => (seconds, &**mounts),
        _ => return Some(ExitCode::from(2)),
    };
    let Some(limit) = seconds.to_str().and_then(|text| text.parse().ok()) else {
        return Some(ExitCode::from(2));
    };
    // Whoever leaves says so by closing our input: then there is something to do.
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    #[expect(unsafe_code)]
    // SAFETY: no code of ours runs when the signal comes.
    let _ = unsafe { sigaction(Signal::SIGHUP, &ignore) };
    let outcome = match word == FREEZE {
        true => hold(limit, mounts),
        false => guard(limit, mounts),
    };
    Some(match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(THAWED_BEFORE),
        Err(error) => {
            let _ = write!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    })
}

/// Freezes, says how many file systems, and holds them until the input ends. Whether they
/// were held until then.
fn hold(limit: u16, mounts: &OsStr) -> io::Result<bool> {
    let all = FileSystem::all(mounts)?;
    // Most is written while nothing has to wait for it.
    all.iter().for_each(FileSystem::sync);
    let mut guard = Guard::start(limit, mounts)?;
    let mut count = 0;
    let frozen = all.iter().try_for_each(|it| it.freeze().map(|done| count += u32::from(done)));
    if frozen.is_ok() {
        let mut out = io::stdout();
        writeln!(out, "{count}")?;
        out.flush()?;
        // Whoever is gone wants no more, either.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
    }
    let held = guard.end();
    // Were the guard killed, there is still us.
    all.iter().rev().for_each(FileSystem::thaw);
    frozen.and(Ok(held))
}

/// Waits for the end of the input, or so long; then thaws. Whether it was the end.
fn guard(limit: u16, mounts: &OsStr) -> io::Result<bool> {
    let all = FileSystem::all(mounts)?;
    let mut out = io::stdout();
    out.write_all(b"\n")?;
    out.flush()?;
    let stdin = io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    let rest = PollTimeout::try_from(u32::from(limit) * 1000).unwrap_or(PollTimeout::MAX);
    let in_time = poll(&mut fds, rest).is_ok_and(|ready| ready > 0);
    all.iter().rev().for_each(FileSystem::thaw);
    Ok(in_time)
}

/// The process that thaws.
struct Guard(Child);

impl Guard {
    fn start(limit: u16, mounts: &OsStr) -> io::Result<Self> {
        let mut command = Command::new(OURSELVES);
        command.arg(GUARD).arg(limit.to_string()).arg(mounts);
        // Of a group of its own: the agent kills that of a command.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut guard = Self(command.spawn()?);
        let ready = guard.0.stdout.take().map(|mut out| out.read_exact(&mut [0]));
        match ready {
            Some(Ok(())) => Ok(guard),
            _ => Err(io::Error::other("who is to thaw the file systems did not begin")),
        }
    }

    /// Lets it thaw; whether it had not yet.
    fn end(&mut self) -> bool {
        drop(self.0.stdin.take());
        self.0.wait().is_ok_and(|status| status.success())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.end();
    }
}

nix::ioctl_readwrite!(fifreeze, b'X', 119, c_int);
nix::ioctl_readwrite!(fithaw, b'X', 120, c_int);

/// One that is on a disk, and written to.
struct FileSystem {
    file: File,
    path: PathBuf,
}

impl FileSystem {
    /// All of them, those first that may lie in others.
    fn all(mounts: &OsStr) -> io::Result<Vec<Self>> {
        let text = std::fs::read(mounts)?;
        let open = |path: PathBuf| {
            let mut options = File::options();
            options.read(true).custom_flags(nix::libc::O_NONBLOCK);
            // One that cannot be reached has nothing mounted over it that could.
            options.open(&path).ok().map(|file| Self { file, path })
        };
        Ok(on_disks(&text).into_iter().filter_map(open).collect())
    }

    fn sync(&self) {
        #[expect(unsafe_code)]
        // SAFETY: the descriptor is open; what cannot be written, freezing will tell.
        let _ = unsafe { syncfs(self.file.as_raw_fd()) };
    }

    /// Whether it is at rest now: not all know how to.
    fn freeze(&self) -> io::Result<bool> {
        let mut nothing = 0;
        #[expect(unsafe_code)]
        // SAFETY: the call reads and writes no memory of ours but this number.
        match unsafe { fifreeze(self.file.as_raw_fd(), &raw mut nothing) } {
            Ok(_) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EINVAL) => Ok(false),
            Err(error) => {
                let path = self.path.display();
                Err(io::Error::other(format!("freezing `{path}`: {}", error.desc())))
            }
        }
    }

    fn thaw(&self) {
        let mut nothing = 0;
        #[expect(unsafe_code)]
        // SAFETY: as above. It fails where nothing is frozen.
        let _ = unsafe { fithaw(self.file.as_raw_fd(), &raw mut nothing) };
    }
}

/// Where file systems of disks are mounted that can be written, each once, the last first.
fn on_disks(mountinfo: &[u8]) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    let lines: Vec<&[u8]> = mountinfo.split(|byte| *byte == b'\n').collect();
    let mut found = Vec::new();
    for line in lines.into_iter().rev() {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let Some(dash) = fields.iter().position(|field| *field == b"-") else { continue };
        let (Some(device), Some(place)) = (fields.get(2), fields.get(4)) else { continue };
        let (Some(source), Some(options)) = (fields.get(dash + 2), fields.get(dash + 3)) else {
            continue;
        };
        let writable = options.split(|byte| *byte == b',').any(|option| option == b"rw");
        if source.starts_with(b"/dev/") && writable && seen.insert(device.to_vec()) {
            found.push(PathBuf::from(OsString::from_vec(unescaped(place))));
        }
    }
    found
}

/// Without the octal numbers that stand for spaces and the like.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut rest = text;
    while let Some((first, more)) = rest.split_first() {
        let digits = more.get(..3).filter(|_| *first == b'\\');
        let number = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match number.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &more[3..];
            }
            None => {
                plain.push(*first);
                rest = more;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn file_systems_of_disks_are_found_once_and_the_innermost_first() {
        let text = b"22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n\
            23 22 0:21 / /proc rw - proc proc rw\n\
            24 22 254:2 / /my\\040data rw master:1 - xfs /dev/mapper/a rw,attr2\n\
            25 22 7:0 / /snap ro - squashfs /dev/loop0 ro\n\
            26 22 254:1 /x /bound rw - ext4 /dev/vda1 rw\n\
            27 22 0:40 / /net rw - nfs4 server:/x rw\n\
            broken - line\n";
        let found = on_disks(text);
        assert_eq!(found, [Path::new("/bound"), Path::new("/my data")]);
    }
}
