//! The terminal: standard input as something one can wait for, without a thread, and the
//! screen as a whole.
//!
//! The descriptor is opened anew where that is possible (a terminal), so that making
//! it non-blocking does not change it for the shell that shares it. A file is
//! always ready and needs no waiting.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use pavo_agent::Size;
use tokio::io::unix::AsyncFd;

use super::out::{Out, fit};
use crate::error::{Context, Error, Result};

/// Standard input.
#[derive(Debug)]
pub enum Input {
    Waits(AsyncFd<File>),
    AlwaysReady(File),
}

/// The size of our terminal, as a guest is told it.
pub fn terminal_size() -> Size {
    let (columns, rows) =
        terminal_size::terminal_size().map_or((80, 24), |(width, height)| (width.0, height.0));
    Size { rows, columns }
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

/// The terminal in raw mode, as it was again when this goes.
#[derive(Debug)]
pub struct RawTerminal(Option<Termios>);

impl RawTerminal {
    pub fn new() -> Self {
        let stdin = std::io::stdin();
        let saved = stdin.is_terminal().then(|| tcgetattr(stdin.as_fd()).ok()).flatten();
        if let Some(mut raw) = saved.clone() {
            cfmakeraw(&mut raw);
            let _ = tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw);
        }
        Self(saved)
    }

    /// Whether standard input is a terminal, which then does not return at the end of a line.
    pub fn is_raw(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(saved) = &self.0 {
            let _ = tcsetattr(std::io::stdin().as_fd(), SetArg::TCSADRAIN, saved);
        }
    }
}

/// The whole screen; what was on it is there again when this goes.
#[derive(Debug)]
pub struct Screen<'a> {
    out: &'a Out,
    _raw: RawTerminal,
}

impl<'a> Screen<'a> {
    /// # Errors
    /// When there is no terminal to read from and write to.
    pub fn open(out: &'a Out) -> Result<Self> {
        if !(out.stdout_is_terminal() && io::stdin().is_terminal()) {
            return Err(Error::usage("this is shown on a terminal")
                .help("elsewhere: `--once`, with `-o json` for programs"));
        }
        let screen = Self { out, _raw: RawTerminal::new() };
        // Another screen, without a cursor.
        out.raw(b"\x1b[?1049h\x1b[?25l")?;
        Ok(screen)
    }

    /// Shows a title and below it as many lines as there is room for.
    pub fn draw(&self, title: &str, lines: &str) -> Result<()> {
        let size = terminal_size::terminal_size().map(|(width, height)| (width.0, height.0));
        let (width, height) = size.unwrap_or((80, 24));
        let room = usize::from(height).saturating_sub(1);
        let count = lines.lines().count();
        let shown = if count > room { room.saturating_sub(1) } else { count };
        let more = (count > room).then(|| format!("… and {} more", count - shown));
        // A raw terminal does not return at the end of a line.
        let mut text = String::from("\x1b[H");
        let all = std::iter::once(title).chain(lines.lines().take(shown)).chain(more.as_deref());
        let all = all.map(|line| fit(line, width.into()));
        text += &all.map(|line| line + "\x1b[K").collect::<Vec<_>>().join("\r\n");
        text += "\x1b[J";
        self.out.raw(text.as_bytes())
    }
}

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        // A terminal that is gone has nothing to be restored.
        let _ = self.out.raw(b"\x1b[?25h\x1b[?1049l");
    }
}
