//! All nodes, and what is shared among them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::claims::{self, Claim, Claims};
use super::schema::{self, Attribute, Found, Kind};
use super::{Settings, Tree, edit};
use crate::error::{Error, Result};
use crate::model::nearest::nearest;
use crate::model::nodeset::NodeSet;
use crate::model::nodeset::expr::Test;

/// A network of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    pub subnet: Option<std::net::IpAddr>,
    pub netmask: Option<std::net::IpAddr>,
    pub gateway: Option<std::net::IpAddr>,
    pub dhcpserver: Option<std::net::IpAddr>,
    /// Addresses for who is not known yet: `10.0.0.100-10.0.0.200`.
    pub dynamic_range: Option<String>,
    pub nameservers: Vec<std::net::IpAddr>,
    pub ntpservers: Vec<String>,
    pub domain: Option<String>,
    pub vlan: Option<u16>,
}

/// An account's name and password, for BMCs or for nodes (`system`: their root).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Passwd {
    pub username: Option<String>,
    /// Sealed.
    pub password: Option<String>,
    pub crypt_method: Option<String>,
}

/// What is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inventory {
    /// Changed by [`put`](Self::put) and [`remove`](Self::remove) only.
    pub nodes: BTreeMap<String, Arc<Settings>>,
    claims: Claims,
    /// What members have in common; a group that only members name has no entry.
    pub groups: BTreeMap<String, Settings>,
    pub profiles: BTreeMap<String, Settings>,
    pub networks: BTreeMap<String, Network>,
    pub passwords: BTreeMap<String, Passwd>,
}

/// Something that is wrong with the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The node that is to be changed.
    pub node: String,
    pub what: String,
}

impl Inventory {
    /// All nodes.
    pub fn all(&self) -> NodeSet {
        self.nodes.keys().collect()
    }

    /// The members of a group.
    pub fn members(&self, group: &str) -> NodeSet {
        let is_in =
            |(_, node): &(&String, &Arc<Settings>)| node.groups.iter().any(|it| it == group);
        self.nodes.iter().filter(is_in).map(|(name, _)| name).collect()
    }

    /// The groups that there are.
    pub fn group_names(&self) -> Vec<&str> {
        let of_nodes = self.nodes.values().flat_map(|node| &node.groups);
        let mut names: Vec<&str> = of_nodes.chain(self.groups.keys()).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// What holds for a node: its own settings, then its groups', then its profiles' and
    /// those of its groups.
    ///
    /// # Errors
    /// Never for settings that were checked.
    pub fn effective(&self, node: &Settings) -> Result<Settings> {
        let groups: Vec<&Settings> =
            node.groups.iter().filter_map(|name| self.groups.get(name)).collect();
        let profiles = node.profiles.iter().chain(groups.iter().flat_map(|it| &it.profiles));
        let profiles = profiles.filter_map(|name| self.profiles.get(name));
        let above: Vec<&Settings> = groups.iter().copied().chain(profiles).collect();
        if above.is_empty() {
            return Ok(node.clone());
        }
        let mut tree = node.tree()?;
        for settings in above {
            let mut inherited = settings.tree()?;
            // Membership is a node's own.
            inherited.remove("groups");
            inherit(&mut tree, inherited);
        }
        Settings::from_tree(tree)
    }

    /// The nodes of which a setting, their own or inherited, is as wanted.
    ///
    /// # Errors
    /// When there is no such setting, or the expression is none.
    pub fn having(&self, path: &str, test: Test, value: &str) -> Result<NodeSet> {
        let parts = schema::canonical(path);
        let found = schema::find(&parts).map_err(Error::usage)?;
        if let Found::Setting(Attribute { kind: Kind::Secret, .. }) = found {
            return Err(Error::usage(format!("`{path}` is a secret: nodes are not found by it")));
        }
        let regex = match test {
            Test::Matches => {
                Some(regex_lite::Regex::new(value).map_err(|it| Error::usage(it.to_string()))?)
            }
            _ => None,
        };
        // As it is kept: a MAC address in capitals is the same one.
        let wanted = match found {
            Found::Setting(it) if it.kind != Kind::Names => {
                it.kind.keep(value.into()).map_or_else(|_| value.to_owned(), |it| plain(&it))
            }
            _ => value.to_owned(),
        };
        let fits = |value: &Value| match (&regex, value) {
            (Some(regex), Value::Array(list)) => list.iter().any(|it| regex.is_match(&plain(it))),
            (Some(regex), value) => regex.is_match(&plain(value)),
            (None, Value::Array(list)) => list.iter().any(|it| plain(it) == wanted),
            (None, value) => plain(value) == wanted,
        };
        let mut names = Vec::new();
        for (name, node) in &self.nodes {
            let tree = self.effective(node)?.tree()?;
            let has = edit::get(&tree, &parts).is_some_and(fits);
            if has == (test != Test::IsNot) {
                names.push(name);
            }
        }
        Ok(names.into_iter().collect())
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
    pub fn put(&mut self, name: &str, settings: Arc<Settings>) {
        self.remove(name);
        self.claims.add(name, &settings);
        self.nodes.insert(name.to_owned(), settings);
    }

    /// Removes a node; whether there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        let old = self.nodes.remove(name);
        if let Some(old) = &old {
            self.claims.remove(name, old);
        }
        old.is_some()
    }

    /// What would be wrong with these nodes, were they as this says: every MAC address, IP
    /// address and BMC is one node's, and what a node names is there.
    pub fn problems<'a, S: AsRef<Settings> + 'a>(
        &self,
        new: &'a BTreeMap<String, S>,
    ) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut fresh: HashMap<Claim, &'a str> = HashMap::new();
        for (name, node) in new {
            for claim in claims::of(node.as_ref()) {
                // What a node had that is changed, too, counts no more.
                let held = || self.claims.holder(&claim).filter(|it| !new.contains_key(*it));
                match fresh.get(&claim).copied().or_else(held) {
                    Some(holder) => problems.push(Problem {
                        node: name.clone(),
                        what: format!("{claim} is `{holder}`'s, too"),
                    }),
                    None => drop(fresh.insert(claim, name)),
                }
            }
            let unknown = |profile: &&String| !self.profiles.contains_key(*profile);
            for profile in node.as_ref().profiles.iter().filter(unknown) {
                let near = nearest(profile, self.profiles.keys().map(String::as_str));
                let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
                let what = format!("there is no profile `{profile}`{near}");
                problems.push(Problem { node: name.clone(), what });
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
