//! The machines below: lists of nodes in files.
//!
//! What a format reads are [`Draft`]s, trees of settings with their lines; [`take`] checks
//! them all at once, so that every mistake of a file is told in one go, and nothing of a file
//! with one is taken.
//!
//! - [`json`]: the older system's `{"nodes": […]}`;
//! - [`yaml`]: by name;
//! - [`csv`]: a column for each setting;
//! - [`groups`]: ClusterShell's `group: nodes`, membership only.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::node::{Settings, Tree, schema};
use crate::model::nodeset::name;

pub mod csv;
pub mod groups;
pub mod json;
mod older;
pub mod power;
pub mod yaml;

/// How many mistakes are told; the rest are counted.
const TOLD: usize = 20;

/// A node as a file has it.
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

/// What a file holds, right or wrong.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drafts {
    pub nodes: Vec<Draft>,
    pub mistakes: Vec<Mistake>,
}

/// Nodes as they are to be, with the line that each comes from.
pub type Taken = BTreeMap<String, (usize, Settings)>;

/// The nodes of a file, if all of it is right. Secrets are sealed.
///
/// # Errors
/// All that is wrong in the file, which `what` names.
pub fn take(
    drafts: Drafts,
    what: &str,
    seal: &mut dyn FnMut(&str) -> Result<String>,
) -> Result<Taken> {
    let mut mistakes = drafts.mistakes;
    let mut taken = Taken::new();
    let mut lines: HashMap<String, usize> = HashMap::new();
    for Draft { name, line, mut tree } in drafts.nodes {
        let mut wrong = |what: String| mistakes.push(Mistake { line, what });
        if let Some((_, what)) = name::wrong_with(&name) {
            let shown: String = name.chars().take(60).collect();
            wrong(format!("`{}` cannot be a node's name: {what}", shown.escape_debug()));
            continue;
        }
        if let Some(first) = lines.insert(name.clone(), line) {
            wrong(format!("`{name}` is in line {first}, too"));
            continue;
        }
        schema::secrets(&mut tree, &mut |secret| {
            // Whatever it looks like: no file has sealed ones.
            seal(secret).map(Some)
        })?;
        match schema::check(tree) {
            Ok(tree) => drop(taken.insert(name, (line, Settings::from_tree(tree)?))),
            Err(all) => all.into_iter().for_each(|(path, what)| {
                wrong(format!("`{name}`: {path}: {what}"));
            }),
        }
    }
    if mistakes.is_empty() { Ok(taken) } else { Err(told(&mut mistakes, what)) }
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
    let many = if count == 1 { "a mistake".to_owned() } else { format!("{count} mistakes") };
    Error::usage(format!("{what} has {many}; nothing of it is taken")).because(texts.join("\n"))
}

/// The settings of a node for others to read: without secrets.
///
/// # Errors
/// Never for what was checked.
pub fn shown(settings: &Settings) -> Result<Tree> {
    let mut tree = settings.tree()?;
    schema::secrets(&mut tree, &mut |_| Ok::<_, Error>(None))?;
    tree.retain(|_, value| value.as_object().is_none_or(|below| !below.is_empty()));
    Ok(tree)
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
