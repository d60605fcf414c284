//! What the text of a node set leaves to others: files, Slurm's partitions, states, jobs.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use tokio::sync::OnceCell;

use super::inventory;
use super::keeper::Keeper;
use super::queue::{self, Hosts};
use crate::config::nearest;
use crate::error::{Context, Error, Result};
use crate::model::node::inventory::Inventory;
use crate::model::node::request::Noun;
use crate::model::nodeset::expr::{Expr, Want};
use crate::model::nodeset::lines::{self, Lines};
use crate::model::nodeset::parse::{empty, parse};
use crate::model::nodeset::{Builder, NodeSet};

/// A file of all names there may be, each at its longest, is about so long.
const MAX_FILE: u64 = 256 << 20;

/// How deep files may name files.
const MAX_DEPTH: usize = 10;

/// Where groups come from, other than from pavo.
const SOURCES: [&str; 3] = ["slurm", "slurmstate", "job"];

/// The inventory, for those sets that want something of it.
#[derive(Debug)]
pub struct Known {
    keeper: Keeper,
    /// One of our own, once it was read.
    read: OnceCell<Inventory>,
}

impl Known {
    /// What this one keeps, asked for when it is wanted.
    pub fn by(keeper: Keeper) -> Self {
        Self { keeper, read: OnceCell::new() }
    }

    /// The inventory in the store of `dir`, read when it is asked for.
    pub fn stored(dir: PathBuf) -> Self {
        Self::by(Keeper::Here(dir))
    }

    async fn give(&self, want: &Want) -> Result<NodeSet> {
        if let Keeper::Here(dir) = &self.keeper {
            return self.read.get_or_try_init(|| inventory::read(dir)).await?.give(want);
        }
        let (only, text) = (["name".to_owned()], want.to_string());
        let (rows, missing) = self.keeper.rows(Noun::Node, Some(&text), &only, true).await?;
        let rows = rows.into_iter().map(|(name, _)| name);
        Ok(rows.chain(missing.into_iter().map(|outcome| outcome.name)).collect())
    }

    async fn is_group(&self, name: &str) -> Result<bool> {
        if let Keeper::Here(dir) = &self.keeper {
            let inventory = self.read.get_or_try_init(|| inventory::read(dir)).await?;
            return Ok(inventory.get(Noun::Group, name).is_some());
        }
        let only = ["name".to_owned()];
        Ok(!self.keeper.rows(Noun::Group, Some(name), &only, true).await?.0.is_empty())
    }
}

/// The nodes that at least one of the texts names.
///
/// # Errors
/// When one is no set, or an empty one, and when what it names is not there.
pub async fn union(texts: &[String], known: &Known) -> Result<NodeSet> {
    let mut all = Builder::default();
    for text in texts {
        let set = resolve(&parse(text)?, known, 0).await?;
        if set.is_empty() {
            return Err(empty(text));
        }
        all.add_set(&set)?;
    }
    all.finish()
}

/// The nodes that standard input names, a set a line.
///
/// # Errors
/// When a line is no set, and when there is none.
pub async fn from_standard_input(known: &Known) -> Result<NodeSet> {
    let text = standard_input()?;
    let set = in_lines(lines::read(&text, "standard input")?, "standard input", known, 0).await?;
    if set.is_empty() {
        return Err(Error::usage("standard input has no node"));
    }
    Ok(set)
}

/// The text of a set for who knows the inventory and nothing else: what files and Slurm say
/// is in it. Where no inventory is known here, `@name` is a group.
///
/// # Errors
/// When it is no set, and when what it names outside of the inventory is not there.
pub async fn fill_in(text: &str, known: Option<&Known>) -> Result<String> {
    filled(&parse(text)?, known, 0).await
}

async fn filled(expr: &Expr, known: Option<&Known>, depth: usize) -> Result<String> {
    let mut texts: BTreeMap<&Want, String> = BTreeMap::new();
    for want in expr.wants() {
        if !texts.contains_key(want) {
            let text = Box::pin(outside(want, known, depth)).await;
            let text = text.while_doing(|| format!("looking up the nodes of `{want}`"))?;
            texts.extend(text.map(|text| (want, text)));
        }
    }
    Ok(expr.rewritten(&mut |want| texts.get(want).cloned()))
}

/// What a set wants, if others than the inventory know it.
async fn outside(want: &Want, known: Option<&Known>, depth: usize) -> Result<Option<String>> {
    let path = match want {
        Want::File(path) => path,
        Want::Group { source: Some(source), name } => {
            return group(source, name).await.map(|set| Some(set.to_string()));
        }
        Want::Group { source: None, name } => {
            let Some(known) = known else { return Ok(None) };
            if known.is_group(name).await? || !Path::new(name).is_file() {
                return Ok(None);
            }
            name
        }
        _ => return Ok(None),
    };
    let (read, what) = open_file(path, depth)?;
    let names = read.names.finish()?;
    // A set without a name has no text of its own.
    let names = if names.is_empty() { "n!n".to_owned() } else { names.to_string() };
    let mut texts = vec![format!("({names})")];
    for (line, expr) in &read.exprs {
        let text = Box::pin(filled(expr, known, depth + 1)).await;
        let text = text.while_doing(|| format!("reading line {line} of {what}"))?;
        texts.push(format!("({text})"));
    }
    Ok(Some(texts.join(",")))
}

/// The set, with what it wants.
async fn resolve(expr: &Expr, inventory: &Known, depth: usize) -> Result<NodeSet> {
    let mut known: BTreeMap<&Want, NodeSet> = BTreeMap::new();
    for want in expr.wants() {
        if !known.contains_key(want) {
            let set = Box::pin(give(want, inventory, depth)).await;
            known.insert(want, set.while_doing(|| format!("looking up the nodes of `{want}`"))?);
        }
    }
    expr.eval(&mut |want| Ok(known.get(want).cloned().unwrap_or_default()))
}

async fn give(want: &Want, known: &Known, depth: usize) -> Result<NodeSet> {
    match want {
        Want::File(path) => file(path, known, depth).await,
        Want::Group { source: None, name } => {
            if known.is_group(name).await? {
                return known.give(want).await;
            }
            if Path::new(name).is_file() {
                return file(name, known, depth).await;
            }
            let error = format!("there is neither a group nor a file `{name}`");
            Err(Error::not_found(error)
                .help("others know groups too: `@slurm:PARTITION`, `@job:ID`"))
        }
        Want::Group { source: Some(source), name } => group(source, name).await,
        Want::All | Want::Attribute { .. } | Want::Matching(_) => known.give(want).await,
    }
}

async fn group(source: &str, name: &str) -> Result<NodeSet> {
    let (which, what) = match source {
        "slurm" => (Hosts::OfPartition(name), "partition"),
        "slurmstate" => (Hosts::InState(name), "node in the state"),
        "job" => (Hosts::OfJob(name), "running job"),
        _ => {
            let error = Error::not_found(format!("nothing called `{source}` knows groups"));
            let near = nearest(source, SOURCES).unwrap_or_else(|| SOURCES.join("`, `"));
            return Err(error.help(format!("did you mean `{near}`?")));
        }
    };
    let text = queue::hosts(which).await?;
    let read = lines::read(&text, "Slurm's answer")?;
    let mut set = read.names;
    for (_, expr) in &read.exprs {
        let other = |_: &Want| Err(Error::system("Slurm's answer is no list of nodes"));
        set.add_set(&expr.eval(&mut { other })?)?;
    }
    let set = set.finish()?;
    if set.is_empty() {
        return Err(Error::not_found(format!("Slurm has no {what} `{name}`, or no node in it")));
    }
    Ok(set)
}

async fn file(path: &str, known: &Known, depth: usize) -> Result<NodeSet> {
    let (read, what) = open_file(path, depth)?;
    in_lines(read, &what, known, depth + 1).await
}

/// What a file holds, and what to call it.
fn open_file(path: &str, depth: usize) -> Result<(Lines, String)> {
    if depth >= MAX_DEPTH {
        return Err(Error::usage(format!("files name files, more than {MAX_DEPTH} deep")));
    }
    let (text, what) = match path {
        "-" => (standard_input()?, "standard input".to_owned()),
        _ => (read_file(path)?, format!("`{path}`")),
    };
    Ok((lines::read(&text, &what)?, what))
}

async fn in_lines(read: Lines, what: &str, known: &Known, depth: usize) -> Result<NodeSet> {
    let mut set = read.names;
    for (line, expr) in &read.exprs {
        let more = resolve(expr, known, depth).await;
        set.add_set(&more.while_doing(|| format!("reading line {line} of {what}"))?)?;
    }
    set.finish()
}

fn read_file(path: &str) -> Result<String> {
    let read = || text(std::fs::File::open(path)?);
    read().while_doing(|| format!("reading `{path}`"))
}

fn standard_input() -> Result<String> {
    text(std::io::stdin().lock()).while_doing(|| "reading standard input".into())
}

fn text(from: impl Read) -> std::io::Result<String> {
    let mut text = String::new();
    from.take(MAX_FILE + 1).read_to_string(&mut text)?;
    match text.len() as u64 {
        0..=MAX_FILE => Ok(text),
        _ => Err(std::io::Error::other(format!("more than {} MiB of nodes", MAX_FILE >> 20))),
    }
}
