//! What the text of a set stands for, in an inventory that is there.

use super::inventory::Inventory;
use super::request::Noun;
use super::schema::is_name;
use crate::error::{Context, Error, Result};
use crate::model::nodeset::expr::Want;
use crate::model::nodeset::parse::{empty, parse};
use crate::model::nodeset::{Builder, NodeSet};

impl Inventory {
    /// The nodes that a text stands for, in it or not. What the text leaves to others than the
    /// inventory (files, Slurm) must have been filled in.
    ///
    /// # Errors
    /// When it is no set, or an empty one, and when what it names is not there.
    pub fn node_set(&self, text: &str) -> Result<NodeSet> {
        let set = parse(text)?.eval(&mut |want| {
            self.give(want).while_doing(|| format!("looking up the nodes of `{want}`"))
        })?;
        if set.is_empty() { Err(empty(text)) } else { Ok(set) }
    }

    /// What a set wants of the inventory.
    ///
    /// # Errors
    /// When it is not there, or others than the inventory know it.
    pub fn give(&self, want: &Want) -> Result<NodeSet> {
        let some = || match self.nodes.is_empty() {
            false => Ok(()),
            true => Err(Error::not_found("there is no inventory of nodes")
                .help("make one: `pavo node create NODES`, `pavo node import FILE`")),
        };
        match want {
            Want::All => some().map(|()| self.all()),
            Want::Attribute { path, test, value } => {
                some()?;
                Ok(self.having(Noun::Node, path, *test, value)?.into_iter().collect())
            }
            Want::Matching(regex) => some().and_then(|()| self.matching(regex)),
            Want::Group { source: None, name } => match self.get(Noun::Group, name) {
                Some(_) => Ok(self.members(name)),
                None => Err(Error::not_found(format!("there is no group `{name}`"))
                    .help(format!("a file of nodes is written `@./{name}`"))),
            },
            Want::Group { .. } | Want::File(_) => {
                Err(Error::usage(format!("`{want}` is not for the inventory to know")))
            }
        }
    }

    /// The names of records that a text stands for, there or not.
    ///
    /// # Errors
    /// When it is no set, or an empty one.
    pub fn names(&self, noun: Noun, text: &str) -> Result<Vec<String>> {
        if noun == Noun::Node {
            return Ok(self.node_set(text)?.names());
        }
        if is_name(text) && text != "all" && !text.starts_with('@') {
            return Ok(vec![text.to_owned()]);
        }
        let all = || match noun {
            Noun::Group => self.group_names(),
            _ => self.stored(noun).collect(),
        };
        let set = parse(text)?.eval(&mut |want| {
            let given: Vec<&str> = match want {
                Want::All => all(),
                Want::Matching(regex) => {
                    let regex = regex_lite::Regex::new(regex);
                    let regex = regex.map_err(|it| Error::usage(it.to_string()))?;
                    all().into_iter().filter(|name| regex.is_match(name)).collect()
                }
                Want::Attribute { path, test, value } => self.having(noun, path, *test, value)?,
                Want::Group { .. } | Want::File(_) => {
                    let what = noun.what();
                    return Err(Error::usage(format!(
                        "`{want}` is no {what}: nodes are in groups"
                    )));
                }
            };
            let mut set = Builder::default();
            given.iter().try_for_each(|name| set.add(name))?;
            set.finish()
        })?;
        match set.is_empty() {
            false => Ok(set.names()),
            true if parse(text)?.wants() == [&Want::All] => {
                Err(Error::not_found(format!("there is no {}", noun.what())))
            }
            true => Err(empty(text)),
        }
    }
}
