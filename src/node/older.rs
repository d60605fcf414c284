//! The older system's names and forms, brought into ours and back.

use serde_json::{Map, Value};

use crate::model::node::Tree;
use crate::model::node::request::Noun;

/// What it tells of a node and nobody sets.
const ITS_OWN: &[&str] = &[
    "created_at",
    "updated_at",
    "reservation",
    "state",
    "task_action",
    "conductor_affinity",
    "id",
];

/// What it calls a record's name.
pub fn name(noun: Noun, tree: &mut Tree) -> Option<Value> {
    let key = if noun == Noun::Passwd { "key" } else { return None };
    tree.remove(key)
}

/// Brings a tree into our form.
pub fn read(noun: Noun, tree: &mut Tree) {
    tree.retain(|key, _| !ITS_OWN.contains(&key.as_str()));
    if !matches!(noun, Noun::Node | Noun::Group | Noun::Profile) {
        return;
    }
    // Where both names are used, theirs stays, and is said not to be known.
    for (theirs, ours) in
        [("control_info", "control"), ("console_info", "console"), ("nics_info", "nics")]
    {
        match tree.remove(theirs) {
            Some(value) if tree.contains_key(ours) => drop(tree.insert(theirs.into(), value)),
            Some(value) => drop(tree.insert(ours.into(), value)),
            None => {}
        }
    }
    let nics = match tree.remove("nics") {
        Some(Value::Object(mut info)) if info.len() == 1 && info.contains_key("nics") => {
            info.remove("nics")
        }
        other => other,
    };
    if let Some(nics) = nics {
        tree.insert("nics".into(), by_name(nics));
    }
}

/// A list of interfaces as a map; those without a name are `eth0`, … as they come.
fn by_name(nics: Value) -> Value {
    let Value::Array(list) = nics else {
        let Value::Object(mut named) = nics else { return nics };
        named.values_mut().for_each(nic);
        return Value::Object(named);
    };
    let name_of = |nic: &Value| nic.get("name").and_then(Value::as_str).map(str::to_owned);
    let taken: Vec<String> = list.iter().filter_map(name_of).collect();
    let mut free = (0..).map(|index| format!("eth{index}")).filter(|name| !taken.contains(name));
    let mut named = Map::new();
    for mut one in list {
        let name = name_of(&one).or_else(|| free.next()).unwrap_or_default();
        nic(&mut one);
        // Two of one name: no name that people may choose, so that this is said.
        let name = if named.contains_key(&name) { format!("{name} (twice)") } else { name };
        named.insert(name, one);
    }
    Value::Object(named)
}

fn nic(nic: &mut Value) {
    let Value::Object(nic) = nic else { return };
    nic.remove("name");
    nic.remove("uuid");
    if nic.get("type").is_some_and(|it| it == "primary") {
        nic.remove("type");
        nic.insert("primary".into(), true.into());
    }
    if let Some(Value::Object(extra)) = nic.get_mut("extra") {
        let primary = extra.remove("primary");
        if extra.is_empty() {
            nic.remove("extra");
        }
        if let Some(primary) = primary {
            nic.entry("primary").or_insert(primary);
        }
    }
}

/// Brings a tree of ours into its form.
pub fn write(noun: Noun, name: &str, mut tree: Tree) -> Tree {
    let mut theirs = Tree::new();
    theirs.insert("name".into(), name.into());
    if noun != Noun::Node {
        theirs.extend(tree);
        return theirs;
    }
    for (our, their) in [("control", "control_info"), ("console", "console_info")] {
        if let Some(value) = tree.remove(our) {
            theirs.insert(their.into(), value);
        }
    }
    if let Some(Value::Object(nics)) = tree.remove("nics") {
        let nic = |(name, nic): (String, Value)| match nic {
            Value::Object(mut nic) => {
                nic.insert("name".into(), name.into());
                Value::Object(nic)
            }
            other => other,
        };
        let nics: Vec<Value> = nics.into_iter().map(nic).collect();
        theirs.insert("nics_info".into(), serde_json::json!({ "nics": nics }));
    }
    theirs.extend(tree);
    theirs
}
