//! `{"nodes": [{"name": "node1", …}]}`, as the older system imports and exports it.

use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Draft, Give, Mistake, Trees, older, titles, without_mark};
use crate::error::{Context, Error, Result};
use crate::model::node::Tree;
use crate::model::node::request::Noun;

/// Reads a file.
///
/// # Errors
/// When it is no such JSON at all.
pub fn read(noun: Noun, text: &str, give: &mut Give<'_>) -> Result<()> {
    let text = without_mark(text);
    let list = List { noun, text, line: 1, seen: 0, give };
    let mut json = serde_json::Deserializer::from_str(text);
    let read = match text.trim_start().starts_with('[') {
        true => list.deserialize(&mut json),
        false => json.deserialize_map(File(list)),
    };
    read.and_then(|()| json.end()).map_err(|error| {
        let (title, key) = (noun.plural(), noun.as_str());
        Error::usage(format!("this is no list of {title} in JSON"))
            .because(error)
            .help(format!(r#"write {{"{title}": [{{"name": "{key}1", …}}]}}"#))
    })
}

/// `{"nodes": […]}`
struct File<'a, 'g>(List<'a, 'g>);

impl<'de> Visitor<'de> for File<'de, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, r#"{{"{}": […]}}"#, self.0.noun.plural())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (noun, mut list) = (self.0.noun, Some(self.0));
        while let Some(key) = map.next_key::<String>()? {
            let known = titles(noun).contains(&key.as_str());
            match list.take().filter(|_| known) {
                Some(list) => map.next_value_seed(list)?,
                None => {
                    let key: String = key.chars().take(60).collect();
                    let what = if known { "is there twice" } else { "is not known here" };
                    let what = format!("`{}` {what}", key.escape_debug());
                    return Err(A::Error::custom(what));
                }
            }
        }
        match list {
            None => Ok(()),
            Some(_) => Err(A::Error::custom(format!("there is no `{}`", noun.plural()))),
        }
    }
}

/// The list, whose parts are given as they come.
struct List<'a, 'g> {
    noun: Noun,
    text: &'a str,
    /// The line of what was given last.
    line: usize,
    seen: usize,
    give: &'g mut Give<'g>,
}

impl<'de> DeserializeSeed<'de> for List<'de, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'de, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of {}", self.noun.plural())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        while let Some(raw) = list.next_element::<&'de RawValue>()? {
            let at = raw.get().as_ptr() as usize - self.text.as_ptr() as usize;
            let between = &self.text.as_bytes()[self.seen..at];
            self.line += between.iter().filter(|byte| **byte == b'\n').count();
            self.seen = at;
            (self.give)(record(self.noun, raw.get(), self.line));
        }
        Ok(())
    }
}

fn record(noun: Noun, text: &str, line: usize) -> Result<Draft, Mistake> {
    let tree = serde_json::from_str::<Once>(text);
    let tree = tree.map_err(|error| {
        let what = error.to_string();
        let what = what.split(" at line ").next().unwrap_or_default().to_owned();
        Mistake { line: line + error.line().saturating_sub(1), what }
    })?;
    let what = noun.what();
    let wrong = |what: String| Mistake { line, what };
    let Value::Object(mut tree) = tree.0 else {
        return Err(wrong(format!("a {what} is `{{…}}`")));
    };
    let name = tree.remove("name").or_else(|| older::name(noun, &mut tree));
    match name {
        Some(Value::String(name)) => {
            older::read(noun, &mut tree);
            Ok(Draft { name, line, tree })
        }
        Some(_) => Err(wrong(format!("a {what}'s name is a text"))),
        None => Err(wrong(format!("a {what} without a `name`"))),
    }
}

/// The records as such a file: a line for each.
///
/// # Errors
/// Those of the trees.
pub fn write(noun: Noun, records: &mut Trees<'_, '_>) -> Result<String> {
    let mut text = format!("{{\"{}\": [", noun.plural());
    for (index, record) in records.enumerate() {
        text += if index == 0 { "\n" } else { ",\n" };
        let (name, tree) = record?;
        let tree = older::write(noun, name, tree);
        text += &serde_json::to_string(&tree).while_doing(|| "writing a record".into())?;
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
