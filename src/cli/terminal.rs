//! Standard input as something one can wait for, without a thread.
//!
//! The descriptor is opened anew where that is possible (a terminal), so that making
//! it non-blocking does not change it for the shell that shares it. A file is
//! always ready and needs no waiting.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::unix::AsyncFd;

use crate::error::{Context, Result};

/// Standard input.
#[derive(Debug)]
pub enum Input {
    Waits(AsyncFd<File>),
    AlwaysReady(File),
}

/// Opens standard input.
pub fn input() -> Result<Input> {
    let doing = || "opening standard input".to_owned();
    let flags = OFlag::O_NONBLOCK.bits();
    let anew = OpenOptions::new().read(true).custom_flags(flags).open("/proc/self/fd/0");
    let file = match anew {
        Ok(file) => file,
        Err(_) => File::from(io::stdin().as_fd().try_clone_to_owned().while_doing(doing)?),
    };
    // epoll refuses regular files.
    let again = file.try_clone().while_doing(doing)?;
    #[expect(unsafe_code)]
    // SAFETY: an owned file stays open, and the same one, as long as it is owned.
    let waits = unsafe { AsyncFd::register(file) };
    Ok(waits.map_or(Input::AlwaysReady(again), Input::Waits))
}

impl Input {
    pub async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::AlwaysReady(file) => file.read(buffer),
            Self::Waits(file) => loop {
                let mut ready = file.readable_mut().await?;
                // A terminal of another user cannot be opened anew, and then blocks.
                let read = |file: &mut AsyncFd<File>| match is_ready(file.get_ref())? {
                    true => file.get_mut().read(buffer),
                    false => Err(io::ErrorKind::WouldBlock.into()),
                };
                if let Ok(count) = ready.try_io(read) {
                    return count;
                }
            },
        }
    }
}

/// Whether reading would not block now.
fn is_ready(file: &File) -> io::Result<bool> {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}
