//! Nodes by name: `nodes: {node1: {arch: x86_64, nics: {eth0: {mac: …}}}}`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Draft, Drafts, Mistake, older, shown, without_mark};
use crate::config::yaml::{self, Body, Node};
use crate::error::{Context, Error, Result};
use crate::model::node::{Settings, Tree};

/// Reads a file.
///
/// # Errors
/// When it is no YAML, or no nodes are in it.
pub fn read(text: &str) -> Result<Drafts> {
    let document = yaml::parse(without_mark(text)).map_err(|fault| {
        let place = format!("line {}, column {}", fault.mark.line, fault.mark.column);
        Error::usage("this is no YAML").because(format!("{place}: {}", fault.message))
    })?;
    let twice = document.duplicates.iter().map(|twice| Mistake {
        line: twice.mark.line,
        what: format!("`{}` is in line {}, too", twice.path, twice.first.line),
    });
    let mut drafts = Drafts { nodes: Vec::new(), mistakes: twice.collect() };
    let Body::Mapping(entries) = &document.root.body else {
        return Err(Error::usage("no nodes are in it").help("write `nodes: {node1: {arch: …}}`"));
    };
    for entry in entries {
        let line = entry.mark.line;
        let mut wrong = |what: String| drafts.mistakes.push(Mistake { line, what });
        match (entry.key.text.as_str(), &entry.value.body) {
            ("nodes", Body::Mapping(nodes)) => {
                for node in nodes {
                    let line = node.mark.line;
                    let name = node.key.text.clone();
                    let tree = match value(&node.value) {
                        Value::Object(tree) => tree,
                        Value::Null => Tree::new(),
                        _ => {
                            let what = format!("`{}` has no settings", name.escape_debug());
                            drafts.mistakes.push(Mistake { line, what });
                            continue;
                        }
                    };
                    let mut tree = tree;
                    older::read(&mut tree);
                    drafts.nodes.push(Draft { name, line, tree });
                }
            }
            ("nodes", _) if entry.value.is_null() => {}
            ("nodes", _) => wrong("`nodes` is not a map of names".into()),
            (other, _) => wrong(format!("`{}` is not known here", other.escape_debug())),
        }
    }
    Ok(drafts)
}

/// What lies there. A plain word that is a number or a flag is one.
fn value(node: &Node) -> Value {
    match &node.body {
        _ if node.is_null() => Value::Null,
        Body::Scalar(scalar) => match serde_json::from_str(&scalar.text) {
            Ok(value @ (Value::Number(_) | Value::Bool(_))) if scalar.plain => {
                // Not where digits would be lost, as of `1e5`.
                let written = value.to_string();
                if written == scalar.text { value } else { scalar.text.clone().into() }
            }
            _ => scalar.text.clone().into(),
        },
        Body::Sequence(items) => items.iter().map(|item| value(item)).collect(),
        Body::Mapping(entries) => {
            let pairs = entries.iter().map(|it| (it.key.text.clone(), value(&it.value)));
            Value::Object(pairs.collect())
        }
    }
}

/// The nodes as such a file.
///
/// # Errors
/// Never for what was checked.
pub fn write<'a>(nodes: impl Iterator<Item = (&'a str, &'a Settings)>) -> Result<String> {
    let mut named: BTreeMap<&str, Tree> = BTreeMap::new();
    for (name, settings) in nodes {
        named.insert(name, shown(settings)?);
    }
    serde_yaml::to_string(&BTreeMap::from([("nodes", named)])).while_doing(|| "writing YAML".into())
}
