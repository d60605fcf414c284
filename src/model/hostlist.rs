//! Slurm's compressed lists of hosts, `n[1-3,07],login`, in the order they are written.
//!
//! Unlike a [node set](super::nodeset) a list has an order, names may be in it twice, and
//! nothing is in it but names.

use super::nodeset::pattern::Pattern;
use crate::error::{Error, Result};

/// The most names a list may expand to.
const MAX_HOSTS: usize = 100_000;

/// The names of a list, in its order.
///
/// # Errors
/// When it is no such list, or longer than any cluster.
pub fn expand(list: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for item in split_outside_brackets(list) {
        expand_item(item, &mut names).ok_or_else(|| {
            Error::usage(format!("`{}` is not a list of hosts", list.escape_debug()))
        })?;
    }
    Ok(names)
}

/// Splits at commas that are in no brackets.
pub fn split_outside_brackets(list: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_u32;
    list.split(move |c| {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    })
}

/// Adds what one item stands for; `None` if it is malformed or too much.
fn expand_item(item: &str, names: &mut Vec<String>) -> Option<()> {
    let (pattern, length) = Pattern::read(item, &[]).ok()?;
    if item.is_empty() || length < item.len() || names.len() + pattern.count() > MAX_HOSTS {
        return None;
    }
    let mut add = |name: &str| {
        names.push(name.to_owned());
        Ok(())
    };
    pattern.each(&mut add).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_expand_as_slurm_expands_them() {
        for (list, names) in [
            ("n1", "n1"),
            ("n[1-3,7]", "n1 n2 n3 n7"),
            ("n[08-10],login", "n08 n09 n10 login"),
            ("r[1-2]n[0-1]", "r1n0 r1n1 r2n0 r2n1"),
            ("a[1]-ib,b", "a1-ib b"),
        ] {
            assert_eq!(expand(list).unwrap().join(" "), names, "{list}");
        }
    }

    #[test]
    fn what_is_no_list_or_has_no_end_is_refused() {
        for wrong in
            ["", "a,", "n[", "n]", "n[]", "n[3-1]", "n[a]", "n[1-]", "n[0-99999999999]", "n[-1]"]
        {
            assert!(expand(wrong).is_err(), "{wrong}");
        }
        assert!(expand("n[0-999][0-999]").is_err());
    }
}
