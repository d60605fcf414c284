//! The line to the VM's process.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Where udev links ports by their names, and where the kernel says how they are called.
const LINKS: &str = "/dev/virtio-ports";
const CLASS: &str = "/sys/class/virtio-ports";
/// How often a port that is not there, or that another agent serves, is looked for: at first,
/// and once it has not come for a while.
const LOOKS: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(3)];
const WHILE: Duration = Duration::from_secs(60);

/// Waits for the port, however long.
pub fn wait() -> io::Result<File> {
    let begun = Instant::now();
    loop {
        if let Some(path) = find() {
            match open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {}
                opened => return opened,
            }
        }
        std::thread::sleep(LOOKS[usize::from(begun.elapsed() > WHILE)]);
    }
}

fn find() -> Option<PathBuf> {
    let link = Path::new(LINKS).join(pavo_agent::PORT);
    if link.exists() {
        return Some(link);
    }
    // Without udev the device has a number only.
    let entries = std::fs::read_dir(CLASS).ok()?;
    let ours = |entry: &std::fs::DirEntry| {
        let name = std::fs::read_to_string(entry.path().join("name"));
        name.is_ok_and(|name| name.trim() == pavo_agent::PORT)
    };
    entries.flatten().find(ours).map(|entry| Path::new("/dev").join(entry.file_name()))
}

/// Opens a device, or connects to a socket.
pub fn open(path: &Path) -> io::Result<File> {
    if std::fs::metadata(path)?.file_type().is_socket() {
        return ready(UnixStream::connect(path)?.into());
    }
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

pub fn stdio() -> io::Result<File> {
    ready(io::stdin().as_fd().try_clone_to_owned()?)
}

fn ready(port: OwnedFd) -> io::Result<File> {
    do_not_wait(&port)?;
    Ok(port.into())
}

/// Reading and writing fail from now on where they would have to wait.
pub fn do_not_wait(fd: impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
