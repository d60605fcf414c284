//! `{"nodes": [{"name": "node1", …}]}`, as the older system imports and exports it.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Draft, Drafts, Mistake, older, shown, without_mark};
use crate::error::{Error, Result};
use crate::model::node::{Settings, Tree};

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct File<'a> {
    #[serde(borrow)]
    nodes: Vec<&'a RawValue>,
}

/// Reads a file.
///
/// # Errors
/// When it is no such JSON at all.
pub fn read(text: &str) -> Result<Drafts> {
    let text = without_mark(text);
    let parsed = match text.trim_start().starts_with('[') {
        true => serde_json::from_str(text).map(|nodes| File { nodes }),
        false => serde_json::from_str::<File<'_>>(text),
    };
    let file = parsed.map_err(|error| {
        Error::usage("this is no list of nodes in JSON")
            .because(error)
            .help(r#"write {"nodes": [{"name": "node1", "arch": "x86_64"}]}"#)
    })?;
    let mut drafts = Drafts::default();
    let (mut line, mut seen) = (1, 0);
    for raw in file.nodes {
        let at = raw.get().as_ptr() as usize - text.as_ptr() as usize;
        line += text.as_bytes()[seen..at].iter().filter(|byte| **byte == b'\n').count();
        seen = at;
        match node(raw.get(), line) {
            Ok(draft) => drafts.nodes.push(draft),
            Err(mistake) => drafts.mistakes.push(mistake),
        }
    }
    Ok(drafts)
}

fn node(text: &str, line: usize) -> Result<Draft, Mistake> {
    let tree = serde_json::from_str::<Once>(text);
    let tree = tree.map_err(|error| {
        let what = error.to_string();
        let what = what.split(" at line ").next().unwrap_or_default().to_owned();
        Mistake { line: line + error.line().saturating_sub(1), what }
    })?;
    let wrong = |what: &str| Mistake { line, what: what.into() };
    let Value::Object(mut tree) = tree.0 else { return Err(wrong("a node is `{…}`")) };
    match tree.remove("name") {
        Some(Value::String(name)) => {
            older::read(&mut tree);
            Ok(Draft { name, line, tree })
        }
        Some(_) => Err(wrong("a node's name is a text")),
        None => Err(wrong("a node without a `name`")),
    }
}

/// The nodes as such a file: a line for each.
///
/// # Errors
/// Never for what was checked.
pub fn write<'a>(nodes: impl Iterator<Item = (&'a str, &'a Settings)>) -> Result<String> {
    let mut text = "{\"nodes\": [".to_owned();
    for (index, (name, settings)) in nodes.enumerate() {
        text += if index == 0 { "\n" } else { ",\n" };
        text += &Value::Object(older::write(name, shown(settings)?)).to_string();
    }
    Ok(text + "\n]}\n")
}

/// A value in which no key is twice.
struct Once(Value);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(OnceVisitor).map(Once)
    }
}

struct OnceVisitor;

impl<'de> Visitor<'de> for OnceVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Once(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut tree = Tree::new();
        while let Some(key) = map.next_key::<String>()? {
            let Once(value) = map.next_value()?;
            if tree.contains_key(&key) {
                let key = key.escape_debug();
                return Err(A::Error::custom(format!("`{key}` is there twice")));
            }
            tree.insert(key, value);
        }
        Ok(tree.into())
    }
}
