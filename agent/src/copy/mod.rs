//! Files from one machine to another, over two streams of bytes: the same code at both ends.
//!
//! ```text
//! sender                                                           receiver
//!   ── Total ── Folder a ── File b, 5 bytes ── Content ── End ── … ─►
//!   ── File c, 1 GiB: what have you of it? ─────────────────────────►
//!   ◄── Have 300 MiB, of this digest ────────────────────────────────
//!   ── From 300 MiB ── Content ── Hole ── Content ── End ── … ──────►
//!   ── Leave ── Finish ─────────────────────────────────────────────►
//!   ◄── Done; or, at any time, Failed ───────────────────────────────
//! ```
//!
//! A file has another name until it is whole: `.NAME.pavo-part`. What an interrupted copy has
//! left there is gone on with, if the sender has the same.
//!
//! The receiver believes nothing. Names are one step each, and no step leads through a link or
//! out of the folder; a source has the name that was asked for; a file has at most the bytes
//! that were said. A sender follows links only in what it was told to send.

mod digest;
mod holes;
mod part;
mod receive;
mod record;
mod send;

use std::io;
use std::path::Path;

pub use receive::{Place, receive};
pub use record::{BYTES, Entry, Piece, Record, Records};
pub use send::send;

use crate::Malformed;

/// A file of so many bytes is worth to be gone on with.
const WORTH: u64 = 1 << 20;
/// Folders lie at most so deep in each other: each is open while what it holds is copied.
const MAX_DEPTH: usize = 256;

/// Why a copy has ended before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The other end is gone.
    Gone,
    /// The other end cannot go on, and has said why.
    Told(String),
    /// This end cannot.
    Own(String),
    /// The other end said something that has no place.
    Wrong(String),
}

impl From<Malformed> for Stop {
    fn from(wrong: Malformed) -> Self {
        Self::Wrong(wrong.0)
    }
}

/// What is seen of a copy while it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// How many bytes it has in all.
    Total(u64),
    /// So many bytes more are copied.
    Bytes(u64),
    /// Something is not copied, and why.
    Trouble(String),
}

/// The name that a source has at the other end; empty where it has none, as `.` or `/`.
pub fn name_of(path: &Path) -> &[u8] {
    path.as_os_str()
        .as_encoded_bytes()
        .rsplit(|byte| *byte == b'/')
        .find(|name| !name.is_empty())
        .filter(|name| *name != b"." && *name != b"..")
        .unwrap_or_default()
}

/// What an error is, without its number.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => nix::Error::from_raw(number).desc().into(),
        None => error.to_string(),
    }
}

fn no_place(record: &Record<'_>) -> Stop {
    let name = format!("{record:?}");
    let end = name.find(|letter: char| !letter.is_alphanumeric()).unwrap_or(name.len());
    Stop::Wrong(format!("{} where it has no place", &name[..end]))
}

/// Why something of ours cannot be done.
fn cannot(doing: &str, path: &Path, error: impl Into<io::Error>) -> Stop {
    Stop::Own(format!("{doing} `{}`: {}", shown(path), reason(&error.into())))
}

/// A path for people: names come from the other end, and a terminal would obey some.
fn shown(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

#[cfg(test)]
mod tests;
