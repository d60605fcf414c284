//! Where a file has nothing stored.

use std::fs::File;

use nix::unistd::{Whence, lseek};

/// Where the next data begins, from `at` on; `end` if none does before.
pub fn data_from(file: &File, at: u64, end: u64) -> u64 {
    match seek(file, at, Whence::SeekData) {
        Ok(data) => data.clamp(at, end),
        // Nothing more is there.
        Err(nix::Error::ENXIO) => end,
        // A file system that does not tell.
        Err(_) => at,
    }
}

/// Where the data at `at` ends, at most at `end`.
pub fn hole_from(file: &File, at: u64, end: u64) -> u64 {
    seek(file, at, Whence::SeekHole).map_or(end, |hole| hole.clamp(at, end))
}

fn seek(file: &File, at: u64, whence: Whence) -> nix::Result<u64> {
    let at = i64::try_from(at).map_err(|_| nix::Error::EINVAL)?;
    lseek(file, at, whence).map(|at| at as u64)
}
