//! ClusterShell's files of groups: `rack1: node[1-4]`, a group a line.

use std::borrow::Borrow;
use std::collections::BTreeMap;

use super::{Mistake, told, without_mark};
use crate::error::{Error, Result};
use crate::model::nearest::nearest;
use crate::model::node::Settings;
use crate::model::node::inventory::Inventory;
use crate::model::node::kinds::is_group;
use crate::model::node::request::Noun;
use crate::model::nodeset::NodeSet;
use crate::model::nodeset::expr::Want;
use crate::model::nodeset::fold::Style;
use crate::model::nodeset::parse::parse;

/// The members of each group that nodes are in.
pub fn members<'a>(
    nodes: impl Iterator<Item = (&'a str, impl Borrow<Settings>)>,
) -> BTreeMap<String, NodeSet> {
    let mut names: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (name, settings) in nodes {
        for group in &settings.borrow().groups {
            match names.get_mut(group) {
                Some(names) => names.push(name),
                None => drop(names.insert(group.clone(), vec![name])),
            }
        }
    }
    names.into_iter().map(|(group, names)| (group, names.into_iter().collect())).collect()
}

/// The groups as such a file.
pub fn write<'a>(nodes: impl Iterator<Item = (&'a str, impl Borrow<Settings>)>) -> String {
    let members = members(nodes);
    lines(members.iter().map(|(group, nodes)| (group.as_str(), nodes)))
}

/// A line for each group.
pub fn lines<'a>(groups: impl Iterator<Item = (&'a str, &'a NodeSet)>) -> String {
    let line = |(group, nodes): (&str, &NodeSet)| format!("{group}: {}\n", nodes.fold(Style::Full));
    groups.map(line).collect()
}

/// Reads a file: which nodes it says are in which groups. `@group` is a group of the file,
/// above it, or of the inventory.
///
/// # Errors
/// All that is wrong in the file, which `what` names.
pub fn read(text: &str, what: &str, inventory: &Inventory) -> Result<BTreeMap<String, NodeSet>> {
    let mut groups: BTreeMap<String, NodeSet> = BTreeMap::new();
    let mut mistakes = Vec::new();
    let text = without_mark(text);
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let mut wrong = |what: String| mistakes.push(Mistake { line: index + 1, what });
        let Some((group, set)) = line.split_once(':') else {
            wrong("no `group: nodes`".into());
            continue;
        };
        let group = group.trim();
        if !is_group(group) {
            wrong(format!("`{}` cannot be a group's name", group.escape_debug()));
            continue;
        }
        let mut give = |want: &Want| match want {
            Want::Group { source: None, name } => match groups.get(name) {
                Some(nodes) => Ok(nodes.clone()),
                None if inventory.get(Noun::Group, name).is_some() => Ok(inventory.members(name)),
                None => {
                    let near = nearest(name, groups.keys().map(String::as_str));
                    let near = near.map_or(String::new(), |it| format!("; did you mean `@{it}`?"));
                    Err(Error::not_found(format!("there is no group `{name}` above{near}")))
                }
            },
            Want::File(_) | Want::Group { .. } => {
                Err(Error::usage(format!("`{want}` cannot be in a file of groups")))
            }
            want => inventory.give(want),
        };
        match parse(set.trim()).and_then(|expr| expr.eval(&mut give)) {
            Ok(nodes) => {
                let unknown = nodes.without(&inventory.all());
                if !unknown.is_empty() {
                    wrong(format!("there is no node {unknown}"));
                }
                let all = groups.get(group).map_or_else(|| nodes.clone(), |it| it.union(&nodes));
                groups.insert(group.to_owned(), all);
            }
            Err(error) => wrong(error.report().trim_start_matches("error: ").to_owned()),
        }
    }
    if mistakes.is_empty() { Ok(groups) } else { Err(told(&mut mistakes, what)) }
}
