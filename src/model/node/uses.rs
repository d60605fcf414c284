//! What records name others: those must be there, and are not deleted under them.

use std::cell::LazyCell;
use std::collections::{BTreeMap, HashMap};

use super::Packed;
use super::glance::Glance;
use super::inventory::{Inventory, Problem};
use super::records::{Project, Record};
use super::request::Noun;
use crate::model::nearest::nearest;
use crate::model::nodeset::NodeSet;

/// How much of a set of users is shown.
const SHOWN: usize = 60;

/// What a node, a group or a profile names, each with its kind.
fn named<'n>(node: &'n Glance<'_>) -> impl Iterator<Item = (Noun, &'n str)> {
    let profiles = node.profiles.iter().map(|it| (Noun::Profile, &**it));
    let networks = node.nics.0.iter().filter_map(|(_, nic)| nic.network.as_deref());
    let passwd = node.control.passwd.as_deref().map(|it| (Noun::Passwd, it));
    let project = node.project.as_deref().map(|it| (Noun::Project, it));
    profiles.chain(networks.map(|it| (Noun::Net, it))).chain(passwd).chain(project)
}

impl Inventory {
    /// What would be wrong with these records of a kind, were they as this says: every MAC
    /// address, IP address and BMC is one node's, what a record names is there, addresses
    /// are in their networks.
    pub fn problems(&self, noun: Noun, new: &BTreeMap<String, Record>) -> Vec<Problem> {
        let mut problems = match noun {
            Noun::Node => self.conflicts(new),
            _ => Vec::new(),
        };
        let nodes = LazyCell::new(|| self.of_projects(|_| true));
        for (name, record) in new {
            let mut wrong = |what: String| problems.push(Problem { name: name.clone(), what });
            match record {
                Record::Settings(it) => self.check_settings(&it.glance(), &mut wrong),
                Record::Network(network) => {
                    network.wrong().into_iter().for_each(&mut wrong);
                    self.check_addresses(name, network, &mut wrong);
                }
                Record::Project(project) => {
                    for network in
                        project.networks.iter().filter(|it| !self.is_stored(Noun::Net, it))
                    {
                        wrong(self.absent(Noun::Net, network));
                    }
                    if project.quota.nodes.is_some() {
                        let nodes = nodes.get(name).copied().unwrap_or(0);
                        project.too_many(nodes).into_iter().for_each(&mut wrong);
                    }
                }
                Record::Passwd(_) => {}
            }
        }
        if noun == Noun::Node {
            self.check_quotas(new, &mut problems);
        }
        problems.sort_by(|one, other| one.name.cmp(&other.name));
        problems
    }

    /// Whether there is such a record; a group that only members name has none.
    pub fn is_stored(&self, noun: Noun, name: &str) -> bool {
        match noun {
            Noun::Node => self.nodes.contains_key(name),
            Noun::Group => self.groups.contains_key(name),
            Noun::Profile => self.profiles.contains_key(name),
            Noun::Net => self.networks.contains_key(name),
            Noun::Passwd => self.passwords.contains_key(name),
            Noun::Project => self.projects.contains_key(name),
        }
    }

    fn absent(&self, noun: Noun, name: &str) -> String {
        let near = nearest(name, self.stored(noun));
        let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
        format!("there is no {} `{name}`{near}", noun.what())
    }

    fn check_settings(&self, node: &Glance<'_>, wrong: &mut dyn FnMut(String)) {
        for (noun, name) in named(node).filter(|(noun, name)| !self.is_stored(*noun, name)) {
            wrong(self.absent(noun, name));
        }
        for (name, nic) in &node.nics.0 {
            let network = nic.network.as_deref();
            let network = network.and_then(|it| Some((it, self.networks.get(it)?)));
            let (Some((network, record)), Some(ip)) = (network, nic.ip) else { continue };
            if record.holds(ip) == Some(false) {
                wrong(format!("nics/{}/ip: {ip} is not in the network `{network}`", &**name));
            } else if record.is_dynamic(ip) {
                wrong(format!("nics/{}/ip: {ip} is in the dynamic range of `{network}`", &**name));
            }
        }
    }

    /// Whether the nodes of a network that is changed are still in it.
    fn check_addresses(
        &self,
        name: &str,
        network: &super::records::Network,
        wrong: &mut dyn FnMut(String),
    ) {
        let (mut outside, mut dynamic) = (Vec::new(), Vec::new());
        // Most nodes are passed over unopened: a name is written as it is, or with an escape.
        let may_be = |it: &Packed| it.json().contains(name) || it.json().contains('\\');
        for (node, settings) in self.nodes.iter().filter(|(_, it)| may_be(it)) {
            let glance = settings.glance();
            let nics = glance.nics.0.iter().map(|(_, nic)| nic);
            let ours = nics.filter(|nic| nic.network.as_deref() == Some(name));
            for ip in ours.filter_map(|nic| nic.ip) {
                if network.holds(ip) == Some(false) {
                    outside.push(&**node);
                } else if network.is_dynamic(ip) {
                    dynamic.push(&**node);
                }
            }
        }
        for (nodes, what) in [(outside, "not in it"), (dynamic, "in its dynamic range")] {
            if !nodes.is_empty() {
                wrong(format!("addresses of {} would be {what}", counted(Noun::Node, &nodes)));
            }
        }
    }

    /// Whether projects have more nodes than they may.
    fn check_quotas(&self, new: &BTreeMap<String, Record>, problems: &mut Vec<Problem>) {
        if self.projects.values().all(|it| it.quota.nodes.is_none()) {
            return;
        }
        let mut more: HashMap<String, (&str, usize)> = HashMap::new();
        for (name, record) in new {
            let project = record.settings().and_then(|it| it.glance().project);
            let project = project.map(|it| it.to_string());
            let Some(project) = project.filter(|it| self.quota_of(it).is_some()) else { continue };
            more.entry(project).or_insert((name, 0)).1 += 1;
        }
        if more.is_empty() {
            return;
        }
        let stay = self.of_projects(|name| !new.contains_key(name));
        for (project, (first, come)) in more {
            let count = stay.get(&project).copied().unwrap_or(0) + come;
            if let Some(what) = self.quota_of(&project).and_then(|it| it.too_many(count)) {
                let what = format!("the project `{project}`: {what}");
                problems.push(Problem { name: first.to_owned(), what });
            }
        }
    }

    /// How many of some nodes each project has.
    fn of_projects(&self, which: impl Fn(&str) -> bool) -> HashMap<String, usize> {
        let mut counts = HashMap::new();
        for (_, node) in self.nodes.iter().filter(|(name, _)| which(name)) {
            if let Some(project) = node.glance().project {
                *counts.entry(project.to_string()).or_insert(0) += 1;
            }
        }
        counts
    }

    fn quota_of(&self, project: &str) -> Option<&Project> {
        self.projects.get(project).map(|it| &**it).filter(|it| it.quota.nodes.is_some())
    }

    /// Who names records of a kind: for each that is named, a text.
    pub fn users(&self, noun: Noun) -> HashMap<String, String> {
        let mut users = Users::new();
        if noun == Noun::Group {
            for (group, names) in &self.members {
                names.iter().for_each(|name| note(&mut users, group, Noun::Node, name));
            }
        } else {
            for (name, node) in &self.nodes {
                let node = node.glance();
                let used = named(&node).filter(|(it, _)| *it == noun);
                used.for_each(|(_, used)| note(&mut users, used, Noun::Node, name));
            }
        }
        for (of, records) in [(Noun::Group, &self.groups), (Noun::Profile, &self.profiles)] {
            for (name, settings) in records {
                let settings = Packed::from(&**settings);
                let glance = settings.glance();
                let used = named(&glance).filter(|(it, _)| *it == noun);
                used.for_each(|(_, used)| note(&mut users, used, of, name));
            }
        }
        for (name, project) in self.projects.iter().filter(|_| noun == Noun::Net) {
            project.networks.iter().for_each(|it| note(&mut users, it, Noun::Project, name));
        }
        let text = |by: BTreeMap<Noun, Vec<&str>>| {
            let texts: Vec<String> = by.iter().map(|(noun, it)| counted(*noun, it)).collect();
            texts.join(" and ")
        };
        users.into_iter().map(|(name, by)| (name, text(by))).collect()
    }
}

/// Who names what, by kind.
type Users<'a> = HashMap<String, BTreeMap<Noun, Vec<&'a str>>>;

fn note<'a>(users: &mut Users<'a>, used: &str, of: Noun, name: &'a str) {
    if !users.contains_key(used) {
        users.insert(used.to_owned(), BTreeMap::new());
    }
    let Some(names) = users.get_mut(used).map(|by| by.entry(of).or_default()) else { return };
    if names.last() != Some(&name) {
        names.push(name);
    }
}

/// `3 nodes: n[1-3]`
fn counted(noun: Noun, names: &[&str]) -> String {
    let many = if names.len() == 1 { "" } else { "s" };
    let set: NodeSet = names.iter().copied().collect();
    let text = set.to_string();
    let cut = text.chars().nth(SHOWN).is_some();
    let shown: String = text.chars().take(SHOWN).collect();
    let dots = if cut { "…" } else { "" };
    format!("{} {}{many}: {shown}{dots}", set.len(), noun.what())
}
