//! The machines below: lists of nodes, and of what belongs to them, in files.
//!
//! What a format reads are [`Draft`]s, trees of settings with their lines, one after the
//! other; [`take`] checks them all, so that every mistake of a file is told in one go, and
//! nothing of a file with one is taken.
//!
//! - [`json`]: the older system's `{"nodes": […]}`;
//! - [`yaml`]: by name;
//! - [`csv`]: a column for each setting;
//! - [`groups`]: ClusterShell's `group: nodes`, membership only.

use std::collections::HashMap;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::node::records::{Record, check_name};
use crate::model::node::request::{Format, Noun};
use crate::model::node::{Tree, schema};
use crate::model::nodeset::MAX_NAMES;
use crate::store::secret::vault::LOCKED;

pub mod csv;
pub mod groups;
pub mod json;
mod older;
pub mod power;
pub mod yaml;

/// How many mistakes are told; the rest are counted.
const TOLD: usize = 20;

/// How many mistakes are remembered: what is no list of records at all may have millions.
const MAX_MISTAKES: usize = 1000;

/// A record as a file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    pub name: String,
    pub line: usize,
    pub tree: Tree,
}

/// What is wrong in a line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    pub line: usize,
    pub what: String,
}

/// Who takes what is read, one after the other: a whole file of trees has no room.
pub type Give<'a> = dyn FnMut(Result<Draft, Mistake>) + 'a;

/// What was read, but for the records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Read {
    pub mistakes: Vec<Mistake>,
    /// The line of each record.
    pub lines: HashMap<String, usize>,
}

/// Reads the records of a file; `keep` is given each that is right. Secrets are sealed.
///
/// # Errors
/// When it is no such file at all.
pub fn take(
    noun: Noun,
    format: Format,
    text: &str,
    seal: &mut dyn FnMut(&str) -> Result<String>,
    keep: &mut dyn FnMut(String, Record),
) -> Result<Read> {
    let mut read = Read::default();
    let mut give = |draft: Result<Draft, Mistake>| {
        let line = draft.as_ref().map_or_else(|mistake| mistake.line, |draft| draft.line);
        match draft.and_then(|draft| check(noun, draft, &mut read, seal)) {
            Ok(Some((name, record))) => keep(name, record),
            Ok(None) => {}
            Err(mistake) => read.mistakes.push(Mistake { line, ..mistake }),
        }
        read.mistakes.truncate(MAX_MISTAKES);
    };
    match format {
        Format::Json => json::read(noun, text, &mut give)?,
        Format::Yaml => yaml::read(noun, text, &mut give)?,
        Format::Csv => csv::read(noun, text, &mut give)?,
        Format::Groups => return Err(Error::bug("groups are no records")),
    }
    Ok(read)
}

fn check(
    noun: Noun,
    draft: Draft,
    read: &mut Read,
    seal: &mut dyn FnMut(&str) -> Result<String>,
) -> Result<Option<(String, Record)>, Mistake> {
    let Draft { name, line, mut tree } = draft;
    let wrong = |what: String| Mistake { line, what };
    let failed = |error: Error| wrong(format!("`{name}`: {error}"));
    check_name(noun, &name).map_err(|error| wrong(error.to_string()))?;
    if read.lines.len() == MAX_NAMES {
        return Err(wrong(format!("there are more than {MAX_NAMES} of them")));
    }
    if let Some(first) = read.lines.get(&name) {
        return Err(wrong(format!("`{name}` is in line {first}, too")));
    }
    read.lines.insert(name.clone(), line);
    // Whatever it looks like: no file has sealed ones.
    schema::secrets(noun, &mut tree, &mut |path, secret| match secret.starts_with(LOCKED) {
        false => seal(secret).map(Some),
        true => Err(Error::usage(format!("{path}: it is sealed to a passphrase"))),
    })
    .map_err(failed)?;
    match schema::check(noun, tree) {
        Ok(tree) => match Record::from_tree(noun, tree) {
            Ok(record) => Ok(Some((name, record))),
            Err(error) => Err(failed(error)),
        },
        Err(all) => {
            let wrong = |(path, what)| wrong(format!("`{name}`: {path}: {what}"));
            read.mistakes.extend(all.into_iter().map(wrong));
            Ok(None)
        }
    }
}

/// Records as a file, without secrets.
///
/// # Errors
/// Never for what was checked.
pub fn write(
    noun: Noun,
    format: Format,
    records: &mut dyn Iterator<Item = (&str, Record)>,
) -> Result<String> {
    write_trees(noun, format, &mut records.map(|(name, it)| Ok((name, shown(noun, &it)?))))
}

/// Who gives the trees of records, one after the other.
pub type Trees<'a, 't> = dyn Iterator<Item = Result<(&'a str, Tree)>> + 't;

/// Records as a file, with all that is in these trees.
///
/// # Errors
/// Those of the trees.
pub fn write_trees(noun: Noun, format: Format, trees: &mut Trees<'_, '_>) -> Result<String> {
    match format {
        Format::Json => json::write(noun, trees),
        Format::Yaml => yaml::write(noun, trees),
        Format::Csv => csv::write(noun, trees),
        Format::Groups => Err(Error::bug("groups are no records")),
    }
}

/// One error of all that is wrong in a file.
pub fn told(mistakes: &mut [Mistake], what: &str) -> Error {
    mistakes.sort_by_key(|mistake| mistake.line);
    let line = |it: &Mistake| format!("line {}: {}", it.line, it.what);
    let mut texts: Vec<String> = mistakes.iter().take(TOLD).map(line).collect();
    if mistakes.len() > TOLD {
        texts.push(format!("and {} more", mistakes.len() - TOLD));
    }
    let count = mistakes.len();
    let many = match count {
        1 => "a mistake".to_owned(),
        MAX_MISTAKES.. => format!("{count} mistakes or more"),
        _ => format!("{count} mistakes"),
    };
    Error::usage(format!("{what} has {many}; nothing of it is taken")).because(texts.join("\n"))
}

/// The settings of a record for others to read: without secrets.
///
/// # Errors
/// Never for what was checked.
pub fn shown(noun: Noun, record: &Record) -> Result<Tree> {
    let mut tree = record.tree()?;
    hide(noun, &mut tree);
    Ok(tree)
}

/// Takes secrets away.
pub fn hide(noun: Noun, tree: &mut Tree) {
    match schema::secrets(noun, tree, &mut |_, _| Ok::<_, std::convert::Infallible>(None)) {
        Ok(()) => tree.retain(|_, value| value.as_object().is_none_or(|below| !below.is_empty())),
        Err(never) => match never {},
    }
}

/// The words under which a file has records of a kind: ours, and the older system's.
fn titles(noun: Noun) -> &'static [&'static str] {
    match noun {
        Noun::Net => &["nets", "networks", "network"],
        Noun::Passwd => &["passwds", "passwd"],
        Noun::Node => &["nodes"],
        Noun::Group => &["groups"],
        Noun::Profile => &["profiles"],
        Noun::Project => &["projects"],
    }
}

/// A text of a file, without the mark that some editors begin it with.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// A value as a cell or a word has it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
