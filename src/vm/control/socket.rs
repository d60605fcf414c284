//! Sockets in a VM's directory, however long its path is.

use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use crate::error::{Context, Result};

/// Listens on `name` in `dir`, however long the directory's path is.
///
/// # Errors
/// When the socket exists or cannot be made.
pub fn listen(dir: &Path, name: &str) -> Result<std::os::unix::net::UnixListener> {
    through_descriptor(dir, name, std::os::unix::net::UnixListener::bind)
        .while_doing(|| format!("making the socket `{}`", dir.join(name).display()))
}

/// Connects to `name` in `dir`, however long the directory's path is.
///
/// # Errors
/// When nobody listens there.
pub fn connect(dir: &Path, name: &str) -> std::io::Result<tokio::net::UnixStream> {
    let stream = through_descriptor(dir, name, std::os::unix::net::UnixStream::connect)?;
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

/// A socket's address holds 107 bytes only: name the directory by a descriptor.
pub(super) fn through_descriptor<T>(
    dir: &Path,
    name: &str,
    call: impl FnOnce(PathBuf) -> std::io::Result<T>,
) -> std::io::Result<T> {
    // What lies in it need not be listed.
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let dir = std::fs::File::options().read(true).custom_flags(flags.bits()).open(dir)?;
    call(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).into())
}
