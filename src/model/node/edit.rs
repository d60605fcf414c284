//! `path=value`: one change of the settings of many records.

use serde_json::Value;

use super::Tree;
use super::request::Noun;
use super::schema::{self, Attribute, Found, Kind};
use super::template::Template;
use crate::error::{Error, Result};

/// A change.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    noun: Noun,
    path: Vec<String>,
    change: Change,
}

#[derive(Clone, Debug, PartialEq)]
enum Change {
    /// To the same value everywhere.
    Set(Value),
    /// To a value that each node has its own of.
    Each(Template, &'static Attribute),
    Remove,
    Add(Vec<Value>),
    Take(Vec<Value>),
}

impl Edit {
    /// Reads `path=value`, `path=`, `path+=value` or `path-=value`. A value that is JSON is
    /// taken as such.
    ///
    /// # Errors
    /// When there is no such setting, naming the nearest, or it cannot have that value.
    pub fn parse(noun: Noun, text: &str) -> Result<Self> {
        let Some((left, value)) = text.split_once('=') else {
            // What is no setting may be a piece of a secret: it is not repeated.
            let known = schema::find(noun, &schema::canonical(text)).is_ok();
            let shown = if known { format!("`{text}`") } else { "this".into() };
            return Err(Error::usage(format!("{shown} is no change of a setting"))
                .help("write `path=value`, `path=` to remove, `path+=value` to add"));
        };
        // The value may be a secret: it is not repeated.
        let shown: String = left.chars().take(60).collect();
        let shown = shown.escape_debug();
        let wrong =
            |what: String| Error::usage(format!("`{shown}` cannot be changed")).because(what);
        let (left_path, sign) = match left.strip_suffix(['+', '-']) {
            Some(path) => (path, left.chars().next_back()),
            None => (left, None),
        };
        let path = schema::canonical(left_path);
        let found = schema::find(noun, &path).map_err(wrong)?;
        let change = match (sign, found) {
            (Some(sign), Found::Setting(attribute)) if attribute.kind.is_list() => {
                let names = attribute.kind.keep(json_or_text(value)).map_err(wrong)?;
                let Value::Array(names) = names else { return Err(wrong("no list".into())) };
                if sign == '+' { Change::Add(names) } else { Change::Take(names) }
            }
            (Some(sign), _) => {
                return Err(wrong(format!("`{sign}=` is for lists, which it is none of")));
            }
            (None, _) if value.is_empty() => Change::Remove,
            (None, Found::Setting(attribute)) => setting(attribute, value).map_err(wrong)?,
            (None, Found::Inside) => Change::Set(json_or_text(value)),
            (None, Found::Group) => group(noun, &path, value).map_err(wrong)?,
        };
        Ok(Self { noun, path, change })
    }

    /// Calls `seal` with each secret that is to be set.
    ///
    /// # Errors
    /// Those of `seal`.
    pub fn seal(&mut self, seal: &mut dyn FnMut(&str) -> Result<String>) -> Result<()> {
        let is_secret = matches!(
            schema::find(self.noun, &self.path),
            Ok(Found::Setting(attribute)) if attribute.kind == Kind::Secret
        );
        match &mut self.change {
            Change::Set(Value::String(text)) if is_secret => *text = seal(text)?,
            Change::Set(Value::Object(tree)) => {
                let mut whole = Tree::new();
                whole.insert(self.path[0].clone(), Value::Object(std::mem::take(tree)));
                schema::secrets(self.noun, &mut whole, &mut |_, secret| seal(secret).map(Some))?;
                if let Some(Value::Object(sealed)) = whole.remove(&self.path[0]) {
                    *tree = sealed;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Where it changes something.
    pub fn path(&self) -> String {
        self.path.join("/")
    }

    /// Changes a record's settings.
    ///
    /// # Errors
    /// When the value cannot be for this record.
    pub fn apply(&self, node: &str, tree: &mut Tree) -> Result<()> {
        match &self.change {
            Change::Set(value) => put(tree, &self.path, value.clone()),
            Change::Each(template, attribute) => {
                let value = attribute.kind.keep(template.of(node)?.into());
                let value = value.map_err(|what| {
                    Error::usage(format!("`{}` of `{node}`: {what}", self.path.join("/")))
                })?;
                put(tree, &self.path, value);
            }
            Change::Remove => remove(tree, &self.path),
            Change::Add(names) => self.list(tree, |list| {
                list.retain(|name| !names.contains(name));
                list.extend(names.iter().cloned());
            }),
            Change::Take(names) => self.list(tree, |list| list.retain(|it| !names.contains(it))),
        }
        Ok(())
    }

    fn list(&self, tree: &mut Tree, change: impl FnOnce(&mut Vec<Value>)) {
        let mut list = match get(tree, &self.path) {
            Some(Value::Array(list)) => list.clone(),
            _ => Vec::new(),
        };
        change(&mut list);
        match list.is_empty() {
            true => remove(tree, &self.path),
            false => put(tree, &self.path, list.into()),
        }
    }
}

fn json_or_text(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| text.into())
}

fn setting(attribute: &'static Attribute, text: &str) -> Result<Change, String> {
    // A password is what it is, braces and all; what it is kept as is not decided here.
    if attribute.kind == Kind::Secret {
        return Ok(Change::Set(text.into()));
    }
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Null) => Ok(Change::Remove),
        // A text of digits, `007`, is no JSON; `7` is, and is text where text is wanted.
        Ok(value @ (Value::Object(_) | Value::Array(_) | Value::String(_))) => {
            attribute.kind.keep(value).map(Change::Set)
        }
        _ => {
            let template = Template::parse(text).map_err(|error| error.to_string())?;
            match template.constant() {
                Some(text) => attribute.kind.keep(text.into()).map(Change::Set),
                None if attribute.kind.is_list() => Err("a list has no expressions".into()),
                None => Ok(Change::Each(template, attribute)),
            }
        }
    }
}

/// All settings below a path at once: JSON.
fn group(noun: Noun, path: &[String], text: &str) -> Result<Change, String> {
    let below = |known: &Attribute| known.path.starts_with(&format!("{}/", path[0]));
    let Ok(Value::Object(mut tree)) = serde_json::from_str(text) else {
        let known: Vec<_> =
            schema::attributes(noun).iter().filter(|it| below(it)).map(|it| it.path).collect();
        return Err(format!("it has settings of its own: {}", known.join(", ")));
    };
    // As it will lie in the whole. Secrets are told from others by their places.
    let mut whole = Value::Object(std::mem::take(&mut tree));
    for part in path.iter().rev() {
        whole = Value::Object([(part.clone(), whole)].into_iter().collect());
    }
    let Value::Object(mut whole) = whole else { return Err("no settings".into()) };
    let mut kept: Vec<String> = Vec::new();
    let placed: Result<(), String> = schema::secrets(noun, &mut whole, &mut |_, secret| {
        kept.push(secret.to_owned());
        Ok(Some(format!("{}{}", schema::SEALED, kept.len() - 1)))
    });
    placed?;
    let mut whole = schema::check(noun, whole).map_err(|wrong| {
        let texts: Vec<_> = wrong.iter().map(|(path, what)| format!("{path}: {what}")).collect();
        texts.join("; ")
    })?;
    let back: Result<(), String> = schema::secrets(noun, &mut whole, &mut |_, place| {
        let index = place.strip_prefix(schema::SEALED).and_then(|it| it.parse::<usize>().ok());
        Ok(index.and_then(|index| kept.get(index).cloned()))
    });
    back?;
    let value = get(&whole, path).cloned();
    value.map(Change::Set).ok_or_else(|| "there is nothing in it".into())
}

/// The value at a path.
pub fn get<'a>(tree: &'a Tree, path: &[String]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    let value = tree.get(first)?;
    match rest {
        [] => Some(value),
        rest => get(value.as_object()?, rest),
    }
}

fn put(tree: &mut Tree, path: &[String], value: Value) {
    match path {
        [] => {}
        [last] => drop(tree.insert(last.clone(), value)),
        [first, rest @ ..] => {
            let below = tree.entry(first.clone()).or_insert_with(|| Tree::new().into());
            if !below.is_object() {
                *below = Tree::new().into();
            }
            if let Value::Object(below) = below {
                put(below, rest, value);
            }
        }
    }
}

/// Takes a value away, and what then has nothing in it.
fn remove(tree: &mut Tree, path: &[String]) {
    let Some((first, rest)) = path.split_first() else { return };
    let empty = match tree.get_mut(first) {
        Some(Value::Object(below)) if !rest.is_empty() => {
            remove(below, rest);
            below.is_empty()
        }
        _ => rest.is_empty(),
    };
    if empty {
        tree.remove(first);
    }
}
