//! Who an object on a host belongs to, readable from its name.
//!
//! Kernel names have 15 characters at most. They are `p`, a letter for the kind,
//! the owner, and for taps `-` and an index:
//!
//! ```text
//! pb42      bridge of Slurm job 42          pt42-7    its eighth tap
//! pbl3      bridge of local job 3           ptl3-0    its first tap
//! ```
//!
//! A local job is marked `l`, so that it never collides with a Slurm job on the
//! same host. The longest, `pt99999999-1023`, is exactly 15. What belongs to the host
//! and to no job has the owner `node`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The scheduler a job belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Manager {
    Local,
    Slurm,
    /// No scheduler: the administrator of the host.
    Node,
}

/// One job, as the owner of kernel objects, files and stored keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    pub manager: Manager,
    pub job: u32,
}

/// The largest job id whose kernel names fit (eight decimal digits, seven for
/// local jobs).
pub const MAX_LOCAL_JOB: u32 = 9_999_999;

impl Owner {
    /// The host itself, as the owner of what all jobs on it share.
    pub const NODE: Self = Self { manager: Manager::Node, job: 0 };

    pub fn local(job: u32) -> Self {
        Self { manager: Manager::Local, job }
    }

    /// The name of the owner's object of `kind` (one letter: `b` bridge, `v`
    /// uplink veth, `n` namespace …).
    pub fn name(&self, kind: char) -> String {
        format!("p{kind}{self}")
    }

    /// The name of the owner's object of `kind` with an index.
    pub fn indexed(&self, kind: char, index: u32) -> String {
        format!("p{kind}{self}-{index}")
    }

    /// The link group (`IFLA_GROUP`) that all links of this owner carry, by
    /// which they are deleted at once. Never 0, the kernel's default group.
    pub fn link_group(&self) -> u32 {
        let mark = match self.manager {
            Manager::Slurm => 0x4000_0000,
            Manager::Local => 0x6000_0000,
            Manager::Node => 0x2000_0000,
        };
        mark | self.job
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.manager {
            Manager::Local => write!(f, "l{}", self.job),
            Manager::Slurm => write!(f, "{}", self.job),
            Manager::Node => f.write_str("node"),
        }
    }
}

impl FromStr for Owner {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "node" {
            return Ok(Self::NODE);
        }
        let (manager, digits) = match text.strip_prefix('l') {
            Some(digits) => (Manager::Local, digits),
            None => (Manager::Slurm, text),
        };
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        match digits.parse() {
            Ok(job) if plain => Ok(Self { manager, job }),
            _ => Err(Error::usage(format!("`{text}` is not a job"))),
        }
    }
}

impl Serialize for Owner {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Owner {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_and_slurm_jobs_never_share_a_name_or_a_group() {
        let (local, slurm) = (Owner::local(42), Owner { manager: Manager::Slurm, job: 42 });
        assert_eq!(local.indexed('t', 7), "ptl42-7");
        assert_eq!(slurm.indexed('t', 7), "pt42-7");
        assert_ne!(local.link_group(), slurm.link_group());
        assert!(![local, slurm].iter().any(|job| job.link_group() == Owner::NODE.link_group()));
    }

    #[test]
    fn the_longest_names_just_fit() {
        let slurm = Owner { manager: Manager::Slurm, job: 99_999_999 };
        assert_eq!(slurm.indexed('t', 1023).len(), 15);
        assert_eq!(Owner::local(MAX_LOCAL_JOB).indexed('t', 1023).len(), 15);
    }

    #[test]
    fn an_owner_is_read_back_from_its_name_and_nothing_else_is() {
        let slurm = Owner { manager: Manager::Slurm, job: 12 };
        for owner in [Owner::local(3), slurm, Owner::NODE] {
            assert_eq!(owner.to_string().parse::<Owner>().unwrap(), owner);
        }
        for wrong in ["", "l", "x3", "-3", "+3", "3/..", "99999999999"] {
            assert!(wrong.parse::<Owner>().is_err(), "{wrong}");
        }
    }
}
