//! Sets of VMs of one cluster: `vm0`, `vm[0-3,7]`, `0-3`, `all`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use super::hostlist::split_outside_brackets;
use super::nodeset::fold::ranges;
use super::nodeset::name::Number;
use crate::error::{Error, Result};

/// More VMs than any cluster has; a larger set is a slip of the finger.
const MAX: u32 = 100_000;

/// A set of VM ranks, or all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmSet {
    All,
    Ranks(BTreeSet<u32>),
}

impl VmSet {
    /// The ranks this set names in a cluster of `count` VMs, ascending.
    ///
    /// # Errors
    /// [`Kind::NotFound`](crate::error::Kind::NotFound) when it names a VM the
    /// cluster does not have.
    pub fn select(&self, count: u32) -> Result<Vec<u32>> {
        match self {
            Self::All => Ok((0..count).collect()),
            Self::Ranks(ranks) => match ranks.iter().find(|rank| **rank >= count) {
                Some(rank) => Err(Error::not_found(format!("the cluster has no vm{rank}"))
                    .help(format!("it has {}", fold(&(0..count).collect::<Vec<_>>())))),
                None => Ok(ranks.iter().copied().collect()),
            },
        }
    }
}

impl FromStr for VmSet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "all" {
            return Ok(Self::All);
        }
        let wrong = || {
            Error::usage(format!("`{text}` is not a set of VMs"))
                .help("write `vm0`, `vm[0-3,7]` or `all`")
        };
        let mut ranks = BTreeSet::new();
        for part in split_outside_brackets(text) {
            let part = part.strip_prefix("vm").unwrap_or(part);
            let inner = part.strip_prefix('[').and_then(|part| part.strip_suffix(']'));
            for range in inner.unwrap_or(part).split(',') {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let (first, last) = (number(first), number(last));
                let (Some(first), Some(last)) = (first, last) else { return Err(wrong()) };
                if first > last || last > MAX {
                    return Err(wrong());
                }
                ranks.extend(first..=last);
            }
        }
        Ok(Self::Ranks(ranks))
    }
}

fn number(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// Folds ascending ranks: `vm0`, `vm[0-3,7]`; of none, `no VM`.
pub fn fold(ranks: &[u32]) -> String {
    match ranks {
        [] => "no VM".into(),
        [rank] => format!("vm{rank}"),
        many => {
            let numbers: Vec<Number> =
                many.iter().map(|rank| Number::plain((*rank).into())).collect();
            let mut text = "vm[".to_owned();
            ranges(&numbers, u64::MAX, &mut text);
            text + "]"
        }
    }
}

impl fmt::Display for VmSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Ranks(ranks) => f.write_str(&fold(&ranks.iter().copied().collect::<Vec<_>>())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_read_and_folded() {
        for (text, folded) in [
            ("vm0", "vm0"),
            ("vm[0-3,7]", "vm[0-3,7]"),
            ("0-3", "vm[0-3]"),
            ("vm1,vm[3,2]", "vm[1-3]"),
            ("all", "all"),
        ] {
            assert_eq!(text.parse::<VmSet>().unwrap().to_string(), folded);
        }
    }

    #[test]
    fn what_is_no_set_is_refused() {
        for wrong in ["", "vm", "vm[]", "vm[3-1]", "vm-1", "vm0,", "vm[0-999999999]", "x", "vm[0"] {
            assert!(wrong.parse::<VmSet>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_vm_the_cluster_has_not_is_named() {
        let error = "vm[1-4]".parse::<VmSet>().unwrap().select(3).unwrap_err();
        assert_eq!(error.to_string(), "the cluster has no vm3");
    }
}
