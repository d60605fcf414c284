//! All nodes, and what is shared among them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde_json::Value;

use super::claims::{self, Claim, Claims};
use super::records::{Network, Passwd, Project, Record};
use super::request::Noun;
use super::schema::{self, Attribute, Found, Kind};
use super::{Packed, Settings, Tree, edit};
use crate::error::{Error, Result};
use crate::model::nodeset::NodeSet;
use crate::model::nodeset::expr::Test;

/// What is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inventory {
    /// Changed by [`put`](Self::put) and [`remove`](Self::remove) only.
    pub nodes: BTreeMap<Arc<str>, Packed>,
    claims: Claims,
    /// Who is in which group, so that nobody looks at all nodes for that.
    pub(super) members: BTreeMap<Arc<str>, Arc<BTreeSet<Arc<str>>>>,
    /// What members have in common; a group that only members name has no entry.
    pub groups: BTreeMap<String, Arc<Settings>>,
    pub profiles: BTreeMap<String, Arc<Settings>>,
    pub networks: BTreeMap<String, Arc<Network>>,
    pub passwords: BTreeMap<String, Arc<Passwd>>,
    pub projects: BTreeMap<String, Arc<Project>>,
}

/// Something that is wrong with the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The record that is to be changed.
    pub name: String,
    pub what: String,
}

impl Inventory {
    /// A copy for who only reads.
    #[must_use]
    pub fn to_read(&self) -> Self {
        Self {
            nodes: self.nodes.clone(),
            claims: Claims::default(),
            members: self.members.clone(),
            groups: self.groups.clone(),
            profiles: self.profiles.clone(),
            networks: self.networks.clone(),
            passwords: self.passwords.clone(),
            projects: self.projects.clone(),
        }
    }

    /// All nodes.
    pub fn all(&self) -> NodeSet {
        self.nodes.keys().collect()
    }

    /// The members of a group.
    pub fn members(&self, group: &str) -> NodeSet {
        self.members.get(group).into_iter().flat_map(|names| names.iter()).collect()
    }

    /// The groups that nodes are in, with their members.
    pub fn memberships(&self) -> impl Iterator<Item = (&str, NodeSet)> {
        self.members.iter().map(|(group, names)| (&**group, names.iter().collect()))
    }

    /// The groups that there are.
    pub fn group_names(&self) -> Vec<&str> {
        let stored = self.groups.keys().map(String::as_str);
        let mut names: Vec<&str> = self.members.keys().map(|it| &**it).chain(stored).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// What holds for a node: its own settings, then its groups', then its profiles' and
    /// those of its groups.
    ///
    /// # Errors
    /// Never for settings that were checked.
    pub fn effective(&self, node: &Packed) -> Result<Settings> {
        match (self.groups.is_empty(), self.profiles.is_empty()) {
            (true, true) => Ok(node.open()),
            _ => Settings::from_tree(self.inherited(node.tree()?)?),
        }
    }

    /// A node's own tree with what it inherits.
    fn inherited(&self, mut tree: Tree) -> Result<Tree> {
        let names = |tree: &Tree, key| -> Vec<String> {
            let list = tree.get(key).and_then(Value::as_array);
            let texts = list.into_iter().flatten().filter_map(Value::as_str);
            texts.map(str::to_owned).collect()
        };
        let groups = names(&tree, "groups");
        let groups: Vec<_> = groups.iter().filter_map(|name| self.groups.get(name)).collect();
        let own = names(&tree, "profiles");
        let profiles = own.iter().chain(groups.iter().flat_map(|it| &it.profiles));
        let profiles = profiles.filter_map(|name| self.profiles.get(name));
        let above: Vec<_> = groups.iter().copied().chain(profiles).collect();
        if above.is_empty() {
            return Ok(tree);
        }
        for settings in above {
            let mut inherited = settings.tree()?;
            // Membership is a node's own.
            inherited.remove("groups");
            inherit(&mut tree, inherited);
        }
        // In the order in which all are.
        Settings::from_tree(tree)?.tree()
    }

    /// What holds for a record; only nodes inherit.
    ///
    /// # Errors
    /// Never for settings that were checked.
    pub fn whole(&self, noun: Noun, record: &Record) -> Result<Tree> {
        match record.settings() {
            Some(settings) if noun == Noun::Node => self.inherited(settings.tree()?),
            _ => record.tree(),
        }
    }

    /// A record. A group that only members name says nothing.
    pub fn get(&self, noun: Noun, name: &str) -> Option<Record> {
        match noun {
            Noun::Node => self.nodes.get(name).cloned().map(Record::Settings),
            Noun::Group => match self.groups.get(name) {
                Some(group) => Some(Record::from(&**group)),
                None => self.has_members(name).then(|| Record::empty(noun)),
            },
            Noun::Profile => self.profiles.get(name).map(|it| Record::from(&**it)),
            Noun::Net => self.networks.get(name).cloned().map(Record::Network),
            Noun::Passwd => self.passwords.get(name).cloned().map(Record::Passwd),
            Noun::Project => self.projects.get(name).cloned().map(Record::Project),
        }
    }

    fn has_members(&self, group: &str) -> bool {
        self.members.contains_key(group)
    }

    /// The names of all records of a kind that are stored, in the order of their letters.
    pub fn stored(&self, noun: Noun) -> Box<dyn Iterator<Item = &str> + '_> {
        match noun {
            Noun::Node => Box::new(self.nodes.keys().map(|name| &**name)),
            Noun::Group => Box::new(self.groups.keys().map(String::as_str)),
            Noun::Profile => Box::new(self.profiles.keys().map(String::as_str)),
            Noun::Net => Box::new(self.networks.keys().map(String::as_str)),
            Noun::Passwd => Box::new(self.passwords.keys().map(String::as_str)),
            Noun::Project => Box::new(self.projects.keys().map(String::as_str)),
        }
    }

    /// Takes a record, instead of the old one of that name.
    pub fn put_record(&mut self, noun: Noun, name: &str, record: Record) {
        let key = || name.to_owned();
        match (noun, record) {
            (Noun::Node, Record::Settings(it)) => self.put(name, it),
            (Noun::Group, Record::Settings(it)) => {
                self.groups.insert(key(), it.open().into());
            }
            (_, Record::Settings(it)) => drop(self.profiles.insert(key(), it.open().into())),
            (_, Record::Network(it)) => drop(self.networks.insert(key(), it)),
            (_, Record::Passwd(it)) => drop(self.passwords.insert(key(), it)),
            (_, Record::Project(it)) => drop(self.projects.insert(key(), it)),
        }
    }

    /// Removes a record; whether there was one.
    pub fn remove_record(&mut self, noun: Noun, name: &str) -> bool {
        match noun {
            Noun::Node => self.remove(name),
            Noun::Group => self.groups.remove(name).is_some(),
            Noun::Profile => self.profiles.remove(name).is_some(),
            Noun::Net => self.networks.remove(name).is_some(),
            Noun::Passwd => self.passwords.remove(name).is_some(),
            Noun::Project => self.projects.remove(name).is_some(),
        }
    }

    /// The records of which a setting, their own or inherited, is as wanted.
    ///
    /// # Errors
    /// When there is no such setting, or the expression is none.
    pub fn having(&self, noun: Noun, path: &str, test: Test, value: &str) -> Result<Vec<&str>> {
        let parts = schema::canonical(path);
        let wrong =
            |what: String| Error::usage(format!("nothing is found by `{path}`")).because(what);
        let found = schema::find(noun, &parts).map_err(wrong)?;
        match found {
            Found::Setting(Attribute { kind: Kind::Secret, .. }) => {
                return Err(wrong("it is a secret".into()));
            }
            Found::Group | Found::Setting(Attribute { kind: Kind::Free, .. }) => {
                return Err(wrong("it is several settings: name one below it".into()));
            }
            // `project!=$P` with nothing in P would be all there are.
            _ if value.is_empty() => {
                return Err(wrong(format!("there is nothing behind the `{}`", test.as_str())));
            }
            _ => {}
        }
        let regex = match test {
            Test::Matches => {
                Some(regex_lite::Regex::new(value).map_err(|it| Error::usage(it.to_string()))?)
            }
            _ => None,
        };
        // As it is kept: a MAC address in capitals is the same one.
        let wanted = match found {
            _ if test == Test::Matches => String::new(),
            Found::Setting(it) => plain(&it.kind.part().keep(value.into()).map_err(wrong)?),
            _ => value.to_owned(),
        };
        let fits = |value: &Value| match (&regex, value) {
            (Some(regex), Value::Array(list)) => list.iter().any(|it| regex.is_match(&plain(it))),
            (Some(regex), value) => regex.is_match(&plain(value)),
            (None, Value::Array(list)) => list.iter().any(|it| plain(it) == wanted),
            (None, value) => plain(value) == wanted,
        };
        let mut names = Vec::new();
        for name in self.stored(noun) {
            let Some(record) = self.get(noun, name) else { continue };
            let tree = self.whole(noun, &record)?;
            let has = edit::get(&tree, &parts).is_some_and(fits);
            if has == (test != Test::IsNot) {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// The nodes whose names a regular expression matches.
    ///
    /// # Errors
    /// When it is none.
    pub fn matching(&self, regex: &str) -> Result<NodeSet> {
        let regex = regex_lite::Regex::new(regex).map_err(|it| Error::usage(it.to_string()))?;
        Ok(self.nodes.keys().filter(|name| regex.is_match(name)).collect())
    }

    /// Takes a node, instead of its old settings. Who changes the inventory asks first for the
    /// [`problems`](Self::problems) there would be.
    pub fn put(&mut self, name: &str, settings: Packed) {
        let name = self.take_out(name).unwrap_or_else(|| name.into());
        let node = settings.glance();
        self.claims.add(&name, &node);
        for group in &node.groups {
            match self.members.get_mut(&**group) {
                Some(members) => drop(Arc::make_mut(members).insert(name.clone())),
                None => {
                    let members = BTreeSet::from([name.clone()]);
                    self.members.insert((**group).into(), members.into());
                }
            }
        }
        self.nodes.insert(name, settings);
    }

    /// Removes a node; whether there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        self.take_out(name).is_some()
    }

    /// Removes a node, and gives its name as the others have it.
    fn take_out(&mut self, name: &str) -> Option<Arc<str>> {
        let (name, old) = self.nodes.remove_entry(name)?;
        let old = old.glance();
        self.claims.remove(&name, &old);
        for group in &old.groups {
            let Some(members) = self.members.get_mut(&**group) else { continue };
            let left = Arc::make_mut(members);
            left.remove(&name);
            if left.is_empty() {
                self.members.remove(&**group);
            }
        }
        Some(name)
    }

    /// What no two nodes may have and these would, were they as this says.
    pub(super) fn conflicts<'a>(&self, new: &'a BTreeMap<String, Record>) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut fresh: HashMap<Claim, &'a str> = HashMap::new();
        for (name, record) in new {
            let Some(node) = record.settings() else { continue };
            for claim in claims::of(&node.glance()) {
                // What a node had that is changed, too, counts no more.
                let held = || self.claims.holder(&claim).filter(|it| !new.contains_key(*it));
                match fresh.get(&claim).copied().or_else(held) {
                    Some(holder) => problems.push(Problem {
                        name: name.clone(),
                        what: format!("{claim} is `{holder}`'s, too"),
                    }),
                    None => drop(fresh.insert(claim, name)),
                }
            }
        }
        problems
    }
}

/// Adds what a tree does not have yet.
fn inherit(tree: &mut Tree, from: Tree) {
    for (key, value) in from {
        match (tree.get_mut(&key), value) {
            (None, value) => drop(tree.insert(key, value)),
            (Some(Value::Object(ours)), Value::Object(theirs)) => inherit(ours, theirs),
            // Tags are everybody's.
            (Some(Value::Array(ours)), Value::Array(theirs)) if key == "tags" => {
                for tag in theirs {
                    if !ours.contains(&tag) {
                        ours.push(tag);
                    }
                }
            }
            (Some(_), _) => {}
        }
    }
}

/// A value as people write it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
