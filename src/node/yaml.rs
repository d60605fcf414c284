//! Nodes by name: `nodes: {node1: {arch: x86_64, nics: {eth0: {mac: …}}}}`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Draft, Give, Mistake, Trees, older, titles, without_mark};
use crate::config::yaml::{self, Body, Node};
use crate::error::{Context, Error, Result};
use crate::model::node::Tree;
use crate::model::node::request::Noun;

/// Reads a file.
///
/// # Errors
/// When it is no YAML, or no such records are in it.
pub fn read(noun: Noun, text: &str, give: &mut Give<'_>) -> Result<()> {
    let document = yaml::parse(without_mark(text)).map_err(|fault| {
        let place = format!("line {}, column {}", fault.mark.line, fault.mark.column);
        Error::usage("this is no YAML").because(format!("{place}: {}", fault.message))
    })?;
    for twice in &document.duplicates {
        let what = format!("`{}` is in line {}, too", twice.path, twice.first.line);
        give(Err(Mistake { line: twice.mark.line, what }));
    }
    let title = noun.plural();
    let Body::Mapping(entries) = &document.root.body else {
        let (what, name) = (format!("no {title} are in it"), noun.as_str());
        return Err(Error::usage(what).help(format!("write `{title}: {{{name}1: {{…}}}}`")));
    };
    for entry in entries {
        let line = entry.mark.line;
        let known = titles(noun).contains(&entry.key.text.as_str());
        match &entry.value.body {
            Body::Mapping(records) if known => {
                records
                    .iter()
                    .for_each(|it| give(record(noun, &it.key.text, it.mark.line, &it.value)));
            }
            _ if known && entry.value.is_null() => {}
            _ => {
                let key: String = entry.key.text.chars().take(60).collect();
                let what = if known { "is not a map of names" } else { "is not known here" };
                let what = format!("`{}` {what}", key.escape_debug());
                give(Err(Mistake { line, what }));
            }
        }
    }
    Ok(())
}

fn record(noun: Noun, name: &str, line: usize, node: &Node) -> Result<Draft, Mistake> {
    let mut tree = match value(node) {
        Value::Object(tree) => tree,
        Value::Null => Tree::new(),
        _ => {
            let name: String = name.chars().take(60).collect();
            let what = format!("`{}` has no settings", name.escape_debug());
            return Err(Mistake { line, what });
        }
    };
    older::read(noun, &mut tree);
    Ok(Draft { name: name.to_owned(), line, tree })
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

/// The records as such a file.
///
/// # Errors
/// Those of the trees.
pub fn write(noun: Noun, records: &mut Trees<'_, '_>) -> Result<String> {
    let mut named: BTreeMap<&str, Tree> = BTreeMap::new();
    for record in records {
        let (name, tree) = record?;
        named.insert(name, tree);
    }
    let whole = BTreeMap::from([(noun.plural(), named)]);
    serde_yaml::to_string(&whole).while_doing(|| "writing YAML".into())
}
