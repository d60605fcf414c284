//! A line for each node, a column for each setting: `name,arch,nics/eth0/mac`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Draft, Give, Mistake, Trees, plain, without_mark};
use crate::error::{Error, Result};
use crate::model::node::Tree;
use crate::model::node::request::Noun;
use crate::model::node::schema::{Found, Kind, canonical, find};

/// Reads a file. The first line names the columns; an empty cell says nothing.
///
/// # Errors
/// When a column is no setting.
pub fn read(noun: Noun, text: &str, give: &mut Give<'_>) -> Result<()> {
    let mut rows = Rows { text: without_mark(text), at: 0, line: 1 };
    let (line, titles, wrong) = rows.next().unwrap_or_default();
    if let Some(what) = wrong {
        give(Err(Mistake { line, what }));
        return Ok(());
    }
    let paths: Vec<Vec<String>> = titles.iter().map(|title| canonical(title.trim())).collect();
    if paths.first().is_none_or(|path| *path != ["name"]) {
        return Err(Error::usage("the first line names no columns")
            .help("as in `name,arch,control/bmc_address,nics/eth0/mac`"));
    }
    let (mut kinds, mut wrong) = (Vec::new(), false);
    for (index, path) in paths.iter().enumerate().skip(1) {
        let what = match find(noun, path) {
            _ if paths[..index].contains(path) => "it is there twice".to_owned(),
            Ok(Found::Setting(attribute)) => {
                kinds.push(attribute.kind);
                continue;
            }
            Ok(Found::Group | Found::Inside) => "it is not one setting".to_owned(),
            Err(what) => what,
        };
        give(Err(Mistake { line: 1, what: format!("column {}: {what}", index + 1) }));
        wrong = true;
    }
    if wrong {
        return Ok(());
    }
    for (line, cells, broken) in rows {
        let mut wrong = |what: String| give(Err(Mistake { line, what }));
        if let Some(what) = broken {
            wrong(what);
            continue;
        }
        if cells.len() == 1 && cells[0].is_empty() {
            continue;
        }
        if cells.len() != paths.len() {
            wrong(format!("{} cells, and there are {} columns", cells.len(), paths.len()));
            continue;
        }
        let mut tree = Tree::new();
        for ((path, kind), cell) in paths[1..].iter().zip(&kinds).zip(&cells[1..]) {
            if cell.is_empty() {
                continue;
            }
            match kind {
                Kind::Free => match serde_json::from_str(cell) {
                    Ok(value) => put(&mut tree, path, value),
                    Err(error) => wrong(format!("{}: {error}", path.join("/"))),
                },
                _ => put(&mut tree, path, cell.as_str().into()),
            }
        }
        give(Ok(Draft { name: cells[0].clone(), line, tree }));
    }
    Ok(())
}

fn put(tree: &mut Tree, path: &[String], value: Value) {
    match path {
        [] => {}
        [last] => drop(tree.insert(last.clone(), value)),
        [first, rest @ ..] => {
            let below = tree.entry(first.clone()).or_insert_with(|| Tree::new().into());
            if let Value::Object(below) = below {
                put(below, rest, value);
            }
        }
    }
}

/// Lines of cells, with the numbers of the lines they begin in, and what is wrong there.
struct Rows<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl Iterator for Rows<'_> {
    type Item = (usize, Vec<String>, Option<String>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.text.len() {
            return None;
        }
        let (begun, mut cells, mut cell) = (self.line, Vec::new(), String::new());
        let mut letters = self.text[self.at..].char_indices().peekable();
        let (mut quoted, mut closed, mut wrong) = (None, false, None);
        let mut end = self.text.len() - self.at;
        while let Some((at, letter)) = letters.next() {
            self.line += usize::from(letter == '\n');
            match letter {
                '"' if quoted.is_some() && letters.next_if(|(_, next)| *next == '"').is_some() => {
                    cell.push('"')
                }
                '"' if quoted.is_some() => (quoted, closed) = (None, true),
                '"' if cell.is_empty() && !closed => quoted = Some(self.line),
                ',' if quoted.is_none() => {
                    cells.push(std::mem::take(&mut cell));
                    closed = false;
                }
                '\r' if quoted.is_none() && letters.peek().is_some_and(|it| it.1 == '\n') => {}
                '\n' if quoted.is_none() => {
                    end = at + 1;
                    break;
                }
                _ if closed => wrong = Some("something is behind a closing quote".to_owned()),
                letter => cell.push(letter),
            }
        }
        if let Some(line) = quoted {
            wrong = Some(format!("the quote of line {line} is not closed"));
        }
        self.at += end;
        cells.push(cell);
        Some((begun, cells, wrong))
    }
}

/// The records as such a file.
///
/// # Errors
/// Those of the trees.
pub fn write(noun: Noun, records: &mut Trees<'_, '_>) -> Result<String> {
    let mut rows: Vec<(&str, BTreeMap<String, String>)> = Vec::new();
    for record in records {
        let (name, tree) = record?;
        let mut row = BTreeMap::new();
        flatten(noun, &mut Vec::new(), &Value::Object(tree), &mut row);
        rows.push((name, row));
    }
    let mut columns: Vec<&String> = rows.iter().flat_map(|(_, row)| row.keys()).collect();
    columns.sort_unstable();
    columns.dedup();
    let mut text = "name".to_owned();
    for column in &columns {
        text.push(',');
        text += &cell(column);
    }
    text.push('\n');
    for (name, row) in &rows {
        text += name;
        for column in &columns {
            text.push(',');
            text += &row.get(*column).map_or(String::new(), |value| cell(value));
        }
        text.push('\n');
    }
    Ok(text)
}

fn flatten(noun: Noun, path: &mut Vec<String>, value: &Value, row: &mut BTreeMap<String, String>) {
    let is_free = matches!(find(noun, path), Ok(Found::Setting(it)) if it.kind == Kind::Free);
    match value {
        Value::Object(below) if !is_free => {
            for (key, value) in below {
                path.push(key.clone());
                flatten(noun, path, value, row);
                path.pop();
            }
        }
        Value::Array(list) if !is_free => {
            let words: Vec<String> = list.iter().map(plain).collect();
            row.insert(path.join("/"), words.join(","));
        }
        value if is_free => drop(row.insert(path.join("/"), value.to_string())),
        value => drop(row.insert(path.join("/"), plain(value))),
    }
}

/// A cell, in quotes where it must be.
fn cell(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}
