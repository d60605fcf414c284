//! What is told of an inventory that is there; secrets never.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Book;
use crate::error::{Context, Error, Result};
use crate::model::node::inventory::Inventory;
use crate::model::node::records::Record;
use crate::model::node::request::{Format, Noun, Outcome};
use crate::model::node::{Tree, edit, schema};
use crate::model::nodeset::NodeSet;
use crate::node::{self, groups};
use crate::store::secret::vault::{Lock, Vault};

/// Records as a file, and those that are not there.
///
/// # Errors
/// When `names` is no set, or an empty one; when the format is not for these.
pub fn export(
    inventory: &Inventory,
    noun: Noun,
    names: &str,
    format: Format,
) -> Result<(String, Vec<Outcome>)> {
    let names = inventory.names(noun, names)?;
    if format == Format::Groups && noun == Noun::Group {
        let members: BTreeMap<&str, NodeSet> = inventory.memberships().collect();
        let (there, missing) = found(&names, |name| members.get(name));
        return Ok((groups::lines(there.into_iter()), missing));
    }
    let (there, missing) = found(&names, |name| inventory.get(noun, name));
    let text = match (format, noun) {
        (Format::Groups, Noun::Node) => {
            let each = there.iter().filter_map(|(name, it)| Some((*name, it.settings()?.open())));
            groups::write(each)
        }
        (Format::Groups, _) => return Err(Error::usage("only nodes are in groups")),
        (format, noun) => node::write(noun, format, &mut there.into_iter())?,
    };
    Ok((text, missing))
}

/// Records with their secrets in plain text, and those that are not there: for the
/// administrator, who [locks](lock) them.
///
/// # Errors
/// When `names` is no set, or an empty one; when a secret cannot be opened.
pub fn opened(inventory: &Inventory, vault: &Vault, noun: Noun, names: &str) -> Result<Rows> {
    let names = inventory.names(noun, names)?;
    let (there, missing) = found(&names, |name| inventory.get(noun, name));
    let mut rows = Vec::new();
    for (name, record) in there {
        let mut tree = record.tree()?;
        schema::secrets(noun, &mut tree, &mut |_, sealed| {
            vault.unseal(sealed).map(|secret| Some(secret.expose().to_owned()))
        })
        .while_doing(|| format!("opening the secrets of `{name}`"))?;
        rows.push((name.to_owned(), tree));
    }
    Ok((rows, missing))
}

/// Opened records as a file, their secrets sealed to a passphrase.
///
/// # Errors
/// When they cannot be sealed, or the format is not for these.
pub fn lock(
    noun: Noun,
    mut rows: Vec<(String, Tree)>,
    format: Format,
    passphrase: &str,
) -> Result<String> {
    let lock = Lock::new(passphrase)?;
    for (_, tree) in &mut rows {
        schema::secrets(noun, tree, &mut |_, secret| lock.seal(secret).map(Some))?;
    }
    let mut trees = rows.iter_mut().map(|(name, tree)| Ok((name.as_str(), std::mem::take(tree))));
    node::write_trees(noun, format, &mut trees)
}

/// Records as a file with their secrets, sealed to a passphrase: the administrator's.
///
/// # Errors
/// Those of [`opened`] and [`lock`].
pub fn export_locked(
    book: &Book,
    noun: Noun,
    names: &str,
    format: Format,
    passphrase: &str,
) -> Result<(String, Vec<Outcome>)> {
    let (rows, missing) = opened(&book.inventory, &book.vault, noun, names)?;
    Ok((lock(noun, rows, format, passphrase)?, missing))
}

/// Those that are there, and those that are not.
fn found<T>(names: &[String], get: impl Fn(&str) -> Option<T>) -> (Vec<(&str, T)>, Vec<Outcome>) {
    let (mut there, mut missing) = (Vec::new(), Vec::new());
    for name in names {
        match get(name) {
            Some(it) => there.push((name.as_str(), it)),
            None => missing.push(Outcome::missing(name)),
        }
    }
    (there, missing)
}

/// A part of a record that is to be told.
enum Field {
    Name,
    /// Of a group.
    Members,
    Path(Vec<String>),
}

impl Field {
    fn parse(noun: Noun, text: &str) -> Result<Self> {
        match (text.trim(), noun) {
            ("name", _) => return Ok(Self::Name),
            ("members", Noun::Group) => return Ok(Self::Members),
            _ => {}
        }
        let path = schema::canonical(text.trim());
        let shown: String = text.chars().take(60).collect();
        let shown = shown.escape_debug();
        let wrong = |what: String| Error::usage(format!("`{shown}` cannot be shown")).because(what);
        schema::find(noun, &path).map_err(wrong).map(|_| Self::Path(path))
    }
}

/// Records with their settings, and what is not there.
pub type Rows = (Vec<(String, Tree)>, Vec<Outcome>);

/// What is known of records: all of them without `names`, all their settings without
/// `fields`, what nodes inherit included unless only their `own` is wanted. And those that are
/// not there. With `fields`, each is by its path; a group has `members`, too.
///
/// # Errors
/// When `names` is no set, or an empty one; when there is no such setting.
pub fn rows(
    inventory: &Inventory,
    noun: Noun,
    names: Option<&str>,
    fields: &[String],
    own: bool,
) -> Result<Rows> {
    let fields = fields.iter().map(|text| Field::parse(noun, text));
    let fields = fields.collect::<Result<Vec<_>>>()?;
    let names = match names {
        Some(text) => inventory.names(noun, text)?,
        None => all(inventory, noun),
    };
    let wants_members = fields.is_empty() || fields.iter().any(|it| matches!(it, Field::Members));
    let members = match noun == Noun::Group && wants_members {
        true => inventory.memberships().collect(),
        false => BTreeMap::new(),
    };
    let (mut rows, mut missing) = (Vec::new(), Vec::new());
    for name in names {
        let Some(record) = inventory.get(noun, &name) else {
            missing.push(Outcome::missing(name));
            continue;
        };
        let members = members.get(name.as_str());
        let tree = row(inventory, noun, (&name, &record), members, &fields, own)?;
        rows.push((name, tree));
    }
    Ok((rows, missing))
}

/// All names, in the order of the numbers in them.
fn all(inventory: &Inventory, noun: Noun) -> Vec<String> {
    match noun {
        Noun::Group => inventory.group_names().into_iter().collect::<NodeSet>().names(),
        _ => inventory.stored(noun).collect::<NodeSet>().names(),
    }
}

fn row(
    inventory: &Inventory,
    noun: Noun,
    (name, record): (&str, &Record),
    members: Option<&NodeSet>,
    fields: &[Field],
    own: bool,
) -> Result<Tree> {
    let members = || members.map(|set| Value::from(set.to_string()));
    let mut row = Tree::new();
    let whole = || -> Result<Tree> {
        let mut tree = match own {
            true => record.tree()?,
            false => inventory.whole(noun, record)?,
        };
        node::hide(noun, &mut tree);
        Ok(tree)
    };
    if fields.is_empty() {
        row = whole()?;
        row.extend(members().map(|set| ("members".to_owned(), set)));
        return Ok(row);
    }
    let mut tree = None;
    for field in fields {
        match field {
            Field::Name => drop(row.insert("name".into(), name.into())),
            Field::Members => row.extend(members().map(|set| ("members".to_owned(), set))),
            Field::Path(path) => {
                let tree = match &mut tree {
                    Some(tree) => tree,
                    none => none.insert(whole()?),
                };
                row.extend(edit::get(tree, path).map(|value| (path.join("/"), value.clone())));
            }
        }
    }
    Ok(row)
}
