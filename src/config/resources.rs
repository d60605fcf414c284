//! `resources.yaml`: the networks a VM gets, by name.

use std::collections::{BTreeMap, BTreeSet};

use super::read::Item;
use super::templates::NIC_QUEUES;
use super::types::{Network, ResourceSet};
use crate::model::cluster::plain_name;

pub const KEYS: &[&str] = &["networks", "nic-queues", "default"];

/// The resource sets, and the name of the default one.
pub type Resources = (BTreeMap<String, ResourceSet>, Option<String>);

/// Reads the file; `networks` are those that exist, when that could be read.
pub fn read(file: &Item, networks: Option<&BTreeMap<String, Network>>) -> Resources {
    let mut sets = BTreeMap::new();
    let mut default: Option<String> = None;
    for (name, item) in file.entries() {
        if !plain_name(name) || name.contains(':') {
            item.problem("this cannot be the name of a resource set");
        }
        let fields = item.fields(KEYS);
        let listed = fields.get("networks").map(|item| read_networks(item, networks));
        let mut set = ResourceSet { networks: listed.unwrap_or_default(), nic_queues: 1 };
        fields.read("nic-queues", &mut set.nic_queues, |item| item.integer(NIC_QUEUES));
        sets.insert(name.to_owned(), set);
        if fields.get("default").and_then(Item::boolean) == Some(true) {
            match &default {
                None => default = Some(name.into()),
                Some(first) => item.problem(format!(
                    "multiple default resource sets configured: `{first}` is the default already"
                )),
            }
        }
    }
    if default.is_none() {
        file.warn(
            "no resource set has `default: yes`: every template must name one, and images are \
             no templates of themselves",
        );
    }
    (sets, default)
}

fn read_networks(item: &Item, networks: Option<&BTreeMap<String, Network>>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let name = |item: &Item| {
        let name = match networks {
            Some(networks) => item.known("no such network:", networks.keys()),
            None => item.text(),
        }?;
        if !seen.insert(name.clone()) {
            item.problem(format!("the network `{name}` is listed twice"));
        }
        Some(name)
    };
    item.list().iter().filter_map(name).collect()
}
