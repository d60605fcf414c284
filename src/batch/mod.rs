//! Who runs the job, and what it is given.
//!
//! Today the local manager: one machine, no scheduler. Its options are the ones
//! of Slurm that make sense there, read in Slurm's formats.

pub mod local;
pub mod slurm;
pub mod warning;

use crate::error::{Error, Result};

/// What a user asks of the manager.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub name: Option<String>,
    /// Cores of each VM.
    pub cores: Option<u32>,
    /// Memory of each VM, MiB.
    pub memory_mib: Option<u64>,
    /// Seconds the job may take.
    pub time_limit: Option<u64>,
}

/// Reads an amount of memory as Slurm does: a number with `K`, `M`, `G` or `T`,
/// by default MiB.
pub fn parse_memory(text: &str) -> Result<u64> {
    let wrong = || {
        Error::usage(format!("`{text}` is not an amount of memory"))
            .help("write a number of MiB, or with a unit: `512M`, `2G`")
    };
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..split].parse().map_err(|_| wrong())?;
    let kib = match text[split..].to_ascii_uppercase().as_str() {
        "K" | "KB" | "KIB" => 1,
        "" | "M" | "MB" | "MIB" => 1 << 10,
        "G" | "GB" | "GIB" => 1 << 20,
        "T" | "TB" | "TIB" => 1 << 30,
        _ => return Err(wrong()),
    };
    let mib = number.checked_mul(kib).ok_or_else(wrong)? >> 10;
    if mib == 0 { Err(wrong()) } else { Ok(mib) }
}

/// Reads a time limit as Slurm does: `minutes`, `minutes:seconds`,
/// `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]`. In seconds.
pub fn parse_time(text: &str) -> Result<u64> {
    let wrong = || {
        Error::usage(format!("`{text}` is not a time limit"))
            .help("write minutes, `HH:MM:SS` or `D-HH:MM:SS`")
    };
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(days), rest),
        None => (None, text),
    };
    let parts: Option<Vec<u64>> = rest.split(':').map(digits).collect();
    let parts = parts.ok_or_else(wrong)?;
    let units: &[u64] = match (days.is_some(), parts.len()) {
        (true, 1..=3) => &[3600, 60, 1],
        (false, 1 | 2) => &[60, 1],
        (false, 3) => &[3600, 60, 1],
        _ => return Err(wrong()),
    };
    let days = days.map_or(Some(0), digits).ok_or_else(wrong)?;
    let seconds =
        parts.iter().zip(units).try_fold(days.saturating_mul(86_400), |sum, (n, unit)| {
            sum.checked_add(n.checked_mul(*unit)?)
        });
    seconds.filter(|seconds| *seconds > 0).ok_or_else(wrong)
}

/// Reads a time as Slurm shows it, `1-02:03:04`, `2:03:04`, `3:04`; `None` where it is no
/// limit (`UNLIMITED`). In seconds.
pub fn parse_elapsed(text: &str) -> Option<u64> {
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (digits(days)?, rest),
        None => (0, text),
    };
    let parts: Option<Vec<u64>> = rest.split(':').map(digits).collect();
    let seconds = parts?.into_iter().fold(0, |sum: u64, part| sum * 60 + part);
    Some(days * 86_400 + seconds)
}

fn digits(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_slurm_reads_it() {
        for (text, mib) in
            [("512", 512), ("512M", 512), ("2G", 2048), ("1t", 1 << 20), ("2048K", 2)]
        {
            assert_eq!(parse_memory(text).unwrap(), mib, "{text}");
        }
        for wrong in ["", "0", "G", "1X", "-1", "1.5G", "99999999999999999999T", "100K"] {
            assert!(parse_memory(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_read_as_slurm_shows_them() {
        for (text, seconds) in [
            ("0:05", Some(5)),
            ("5:00", Some(300)),
            ("1:00:01", Some(3601)),
            ("1-00:00:00", Some(86_400)),
            ("UNLIMITED", None),
            ("INVALID", None),
        ] {
            assert_eq!(parse_elapsed(text), seconds, "{text}");
        }
    }

    #[test]
    fn time_limits_are_read_as_slurm_reads_them() {
        for (text, seconds) in [
            ("5", 300),
            ("0:30", 30),
            ("1:00:00", 3600),
            ("1-0", 86_400),
            ("1-2:03", 86_400 + 2 * 3600 + 180),
            ("1-2:03:04", 86_400 + 2 * 3600 + 184),
        ] {
            assert_eq!(parse_time(text).unwrap(), seconds, "{text}");
        }
        for wrong in ["", "0", "a", "1:2:3:4", "-5", "1-", "1d"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
