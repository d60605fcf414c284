//! What records name others: those must be there, and are not deleted under them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::Settings;
use super::inventory::{Inventory, Problem};
use super::records::{Project, Record};
use super::request::Noun;
use crate::model::nearest::nearest;
use crate::model::nodeset::NodeSet;

/// How much of a set of users is shown.
const SHOWN: usize = 60;

/// What a node, a group or a profile names, each with its kind.
fn named(settings: &Settings) -> impl Iterator<Item = (Noun, &str)> {
    let profiles = settings.profiles.iter().map(|it| (Noun::Profile, it.as_str()));
    let networks = settings.nics.values().filter_map(|nic| nic.network.as_deref());
    let passwd = settings.control.passwd.as_deref().map(|it| (Noun::Passwd, it));
    let project = settings.project.as_deref().map(|it| (Noun::Project, it));
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
        for (name, record) in new {
            let mut wrong = |what: String| problems.push(Problem { name: name.clone(), what });
            match record {
                Record::Settings(settings) => self.check_settings(settings, &mut wrong),
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
                        let ours = |it: &&Arc<Settings>| it.project.as_deref() == Some(name);
                        let nodes = self.nodes.values().filter(ours).count();
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

    fn check_settings(&self, settings: &Settings, wrong: &mut dyn FnMut(String)) {
        for (noun, name) in named(settings).filter(|(noun, name)| !self.is_stored(*noun, name)) {
            wrong(self.absent(noun, name));
        }
        for (name, nic) in settings.nics.iter() {
            let network = nic.network.as_ref().and_then(|it| Some((it, self.networks.get(it)?)));
            let (Some((network, record)), Some(ip)) = (network, nic.ip) else { continue };
            if record.holds(ip) == Some(false) {
                wrong(format!("nics/{name}/ip: {ip} is not in the network `{network}`"));
            } else if record.is_dynamic(ip) {
                wrong(format!("nics/{name}/ip: {ip} is in the dynamic range of `{network}`"));
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
        for (node, settings) in &self.nodes {
            let ours = settings.nics.values().filter(|nic| nic.network.as_deref() == Some(name));
            for ip in ours.filter_map(|nic| nic.ip) {
                if network.holds(ip) == Some(false) {
                    outside.push(node);
                } else if network.is_dynamic(ip) {
                    dynamic.push(node);
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
        let of = |settings: &Settings| settings.project.clone();
        let mut more: HashMap<String, &str> = HashMap::new();
        for (name, record) in new {
            let project = record.settings().and_then(|it| of(it));
            let Some(project) = project.filter(|it| self.quota_of(it).is_some()) else { continue };
            more.entry(project).or_insert(name);
        }
        for (project, first) in more {
            let is_ours = |it: &Settings| it.project.as_deref() == Some(project.as_str());
            let stay =
                self.nodes.iter().filter(|(name, it)| is_ours(it) && !new.contains_key(*name));
            let come = new.values().filter(|it| it.settings().is_some_and(|it| is_ours(it)));
            let count = stay.count() + come.count();
            if let Some(what) = self.quota_of(&project).and_then(|it| it.too_many(count)) {
                let what = format!("the project `{project}`: {what}");
                problems.push(Problem { name: first.to_owned(), what });
            }
        }
    }

    fn quota_of(&self, project: &str) -> Option<&Project> {
        self.projects.get(project).map(|it| &**it).filter(|it| it.quota.nodes.is_some())
    }

    /// Who names records of a kind: for each that is named, a text.
    pub fn users(&self, noun: Noun) -> HashMap<&str, String> {
        let mut users: HashMap<&str, BTreeMap<Noun, Vec<&String>>> = HashMap::new();
        let each: [(Noun, &BTreeMap<String, Arc<Settings>>); 3] = [
            (Noun::Node, &self.nodes),
            (Noun::Group, &self.groups),
            (Noun::Profile, &self.profiles),
        ];
        for (of, records) in each {
            for (name, settings) in records {
                let groups = settings.groups.iter().filter(|_| of == Noun::Node);
                let groups = groups.map(|it| (Noun::Group, it.as_str()));
                for (_, used) in named(settings).chain(groups).filter(|(it, _)| *it == noun) {
                    let names = users.entry(used).or_default().entry(of).or_default();
                    if names.last() != Some(&name) {
                        names.push(name);
                    }
                }
            }
        }
        for (name, project) in self.projects.iter().filter(|_| noun == Noun::Net) {
            for network in &project.networks {
                users.entry(network).or_default().entry(Noun::Project).or_default().push(name);
            }
        }
        let text = |by: BTreeMap<Noun, Vec<&String>>| {
            let texts: Vec<String> = by.iter().map(|(noun, it)| counted(*noun, it)).collect();
            texts.join(" and ")
        };
        users.into_iter().map(|(name, by)| (name, text(by))).collect()
    }
}

/// `3 nodes: n[1-3]`
fn counted(noun: Noun, names: &[&String]) -> String {
    let many = if names.len() == 1 { "" } else { "s" };
    let set: NodeSet = names.iter().copied().collect();
    let text = set.to_string();
    let cut = text.chars().nth(SHOWN).is_some();
    let shown: String = text.chars().take(SHOWN).collect();
    let dots = if cut { "…" } else { "" };
    format!("{} {}{many}: {shown}{dots}", set.len(), noun.what())
}
