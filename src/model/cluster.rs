//! Cluster definitions, `TEMPLATE[:COUNT][,TEMPLATE[:COUNT]]…`, as pcocc reads them.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The most VMs one cluster may have.
pub const MAX_VMS: u32 = 10_000;

/// Templates and how many VMs of each, in the order of their ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterDef {
    pub parts: Vec<Part>,
}

/// `count` VMs of one template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// May hold `/` and `:` (`fs/mds0`, `repo:image`).
    pub template: String,
    pub count: u32,
}

impl ClusterDef {
    /// How many VMs there are in all; at least one.
    pub fn count(&self) -> u32 {
        self.parts.iter().map(|part| part.count).sum()
    }

    /// The template of each VM, by rank.
    pub fn templates(&self) -> impl Iterator<Item = &str> {
        self.parts
            .iter()
            .flat_map(|part| std::iter::repeat_n(part.template.as_str(), part.count as usize))
    }
}

/// Whether `name` may name a template, an image or a job: it appears in files,
/// lists and messages, and nothing may be smuggled in by it.
pub fn plain_name(name: &str) -> bool {
    let part_ok = |part: &str| !part.is_empty() && !part.starts_with('.');
    name.len() <= 255
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:/@+".contains(&b))
        && !name.starts_with('-')
        && name.split('/').all(part_ok)
}

impl FromStr for ClusterDef {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: String| {
            Error::usage(format!("Unable to parse cluster definition: '{}'", text.escape_debug()))
                .because(Error::usage(why))
                .help("write TEMPLATE[:COUNT], more of them separated by commas: `debian:8`")
        };
        let mut parts = Vec::new();
        for item in text.split(',') {
            let (template, count) = match item.rsplit_once(':') {
                Some((template, count)) if looks_like_a_count(count) => {
                    (template, count.parse::<u64>().unwrap_or(u64::MAX))
                }
                _ => (item, 1),
            };
            if template.is_empty() {
                return Err(wrong("a template name is missing".into()));
            }
            if !plain_name(template) {
                return Err(wrong(format!("`{}` cannot be a template", template.escape_debug())));
            }
            if count == 0 {
                return Err(wrong(format!("`{template}` is asked for 0 times")));
            }
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            parts.push(Part { template: template.into(), count });
        }
        let total: u64 = parts.iter().map(|part| u64::from(part.count)).sum();
        if total > MAX_VMS.into() {
            return Err(wrong(format!("more than {MAX_VMS} VMs")));
        }
        Ok(Self { parts })
    }
}

fn looks_like_a_count(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('-')
}

impl fmt::Display for ClusterDef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.parts.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}:{}", part.template, part.count)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_follow_the_order_of_the_definition() {
        let def: ClusterDef = "front,fs/mds0:2,site:img:1".parse().unwrap();
        assert_eq!(def.count(), 4);
        let templates: Vec<_> = def.templates().collect();
        assert_eq!(templates, ["front", "fs/mds0", "fs/mds0", "site:img"]);
        assert_eq!(def.to_string(), "front:1,fs/mds0:2,site:img:1");
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_reason() {
        for (text, why) in [
            ("", "a template name is missing"),
            ("a,", "a template name is missing"),
            (":3", "a template name is missing"),
            ("a:0", "`a` is asked for 0 times"),
            ("a:1000000000", "more than 10000 VMs"),
            ("a:99999999999999999999999", "more than 10000 VMs"),
            ("../a", "`../a` cannot be a template"),
            ("a/../b", "`a/../b` cannot be a template"),
            ("a\nb", "`a\\nb` cannot be a template"),
            ("-c", "`-c` cannot be a template"),
        ] {
            let error = text.parse::<ClusterDef>().unwrap_err();
            let report = error.report();
            assert!(report.contains(why), "{text:?}: {report}");
            assert!(report.contains("Unable to parse cluster definition: '"), "{report}");
        }
    }
}
