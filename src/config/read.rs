//! From nodes of a file to typed values; what does not fit is reported with its
//! place and reading goes on.
//!
//! A reading function returns `None` when there is no usable value. Either the
//! key was absent or null, or a [`Problem`] has been recorded.

use std::cell::RefCell;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;
use std::str::FromStr;

use super::problem::Problem;
use super::yaml::{Body, Mark, Node, Scalar, join};
use crate::model::nearest::nearest;

/// Collects what is found while files are read.
#[derive(Debug, Default)]
pub struct Sink {
    pub problems: RefCell<Vec<Problem>>,
    pub warnings: RefCell<Vec<Problem>>,
    /// Files that are named, and where: they are read only when used.
    pub named_files: RefCell<Vec<(Problem, String)>>,
}

/// A value in a file, with the key it stands under.
#[derive(Clone, Debug)]
pub struct Item<'a> {
    sink: &'a Sink,
    pub file: &'a Path,
    /// With the keys above it; empty for the whole file.
    pub key: String,
    /// Of the key, or of a list's item.
    pub mark: Mark,
    node: &'a Node,
}

impl<'a> Item<'a> {
    pub fn root(sink: &'a Sink, file: &'a Path, node: &'a Node) -> Self {
        Self { sink, file, key: String::new(), mark: node.mark, node }
    }

    fn child(&self, part: &str, mark: Mark, node: &'a Node) -> Self {
        Self { sink: self.sink, file: self.file, key: join(&self.key, part), mark, node }
    }

    pub fn node(&self) -> &'a Node {
        self.node
    }

    pub fn is_null(&self) -> bool {
        self.node.is_null()
    }

    /// Reports the item itself.
    pub fn problem(&self, message: impl Into<String>) {
        self.suggest(message, None);
    }

    /// Reports the item itself, with what was probably meant.
    pub fn suggest(&self, message: impl Into<String>, suggestion: Option<String>) {
        let problem = Problem::new(self.file, self.mark, &*self.key, message);
        self.sink.problems.borrow_mut().push(Problem { suggestion, ..problem });
    }

    pub fn warn(&self, message: impl Into<String>) {
        let warning = Problem::new(self.file, self.mark, &*self.key, message);
        self.sink.warnings.borrow_mut().push(warning);
    }

    /// Where the item stands, as `FILE:LINE`.
    pub fn place(&self) -> String {
        format!("{}:{}", self.file.display(), self.mark.line)
    }

    /// Remembers that the item names a file, for a thorough check.
    pub fn names_file(&self, path: &str) {
        let problem = Problem::new(self.file, self.node.mark, &*self.key, "");
        self.sink.named_files.borrow_mut().push((problem, path.to_owned()));
    }

    /// Reports the item's value, where that stands.
    fn wrong_value(&self, message: impl Into<String>, suggestion: Option<String>) {
        let mark = if self.is_null() { self.mark } else { self.node.mark };
        let problem = Problem::new(self.file, mark, &*self.key, message);
        self.sink.problems.borrow_mut().push(Problem { suggestion, ..problem });
    }

    fn expected<T>(&self, what: impl fmt::Display) -> Option<T> {
        self.wrong_value(format!("expected {what}, found {}", found(self.node)), None);
        None
    }

    fn scalar(&self, what: impl fmt::Display) -> Option<&'a Scalar> {
        match self.node.as_scalar() {
            Some(scalar) if !scalar.is_null() => Some(scalar),
            _ => self.expected(what),
        }
    }

    /// Text, as it is written.
    pub fn any_text(&self) -> Option<String> {
        self.scalar("text").map(|scalar| scalar.text.clone())
    }

    /// Text; a number is taken as it is written, a boolean is not.
    pub fn text(&self) -> Option<String> {
        match self.scalar("text")? {
            scalar if scalar.as_bool().is_some() => {
                self.expected(format_args!("text (in quotes: '{}')", scalar.text))
            }
            scalar => Some(scalar.text.clone()),
        }
    }

    pub fn boolean(&self) -> Option<bool> {
        self.scalar("`yes` or `no`")?.as_bool().or_else(|| self.expected("`yes` or `no`"))
    }

    /// An integer of the range, both ends included.
    pub fn integer<T>(&self, range: RangeInclusive<T>) -> Option<T>
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display,
    {
        let what = format!("a number from {} to {}", range.start(), range.end());
        let number = self.scalar(&what)?.as_integer().and_then(|number| T::try_from(number).ok());
        number.filter(|number| range.contains(number)).or_else(|| self.expected(what))
    }

    /// Text that `T` understands.
    pub fn parse<T: FromStr<Err: fmt::Display>>(&self) -> Option<T> {
        let parsed = self.text()?.parse();
        parsed.map_err(|error: T::Err| self.wrong_value(error.to_string(), None)).ok()
    }

    /// Text for which `valid` holds; `what` says what it should be.
    pub fn text_like(&self, what: &str, valid: impl Fn(&str) -> bool) -> Option<String> {
        let text = self.text()?;
        if valid(&text) { Some(text) } else { self.expected(what) }
    }

    /// One of the words, for what it stands for.
    pub fn word<T: Copy>(&self, words: &[(&'static str, T)]) -> Option<T> {
        let names = || words.iter().map(|(name, _)| *name);
        let all = || names().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let text = &self.scalar(format_args!("one of {}", all()))?.text;
        let chosen = words.iter().find(|(name, _)| name == text);
        if chosen.is_none() {
            let message = format!("{} is not one of {}", found(self.node), all());
            self.wrong_value(message, nearest(text, names()));
        }
        chosen.map(|(_, meaning)| *meaning)
    }

    /// A name that must be among `names`; `what` says of what.
    pub fn known<'n>(
        &self,
        what: &str,
        names: impl Iterator<Item = &'n String> + Clone,
    ) -> Option<String> {
        let text = self.text()?;
        if names.clone().any(|name| *name == text) {
            return Some(text);
        }
        let near = nearest(&text, names.map(String::as_str));
        self.wrong_value(format!("{what} {}", found(self.node)), near);
        None
    }

    /// The items of a list; of null, none.
    pub fn list(&self) -> Vec<Self> {
        match &self.node.body {
            Body::Sequence(nodes) => {
                let item = |(index, node): (usize, &'a std::rc::Rc<Node>)| {
                    self.child(&format!("[{index}]"), node.mark, node)
                };
                nodes.iter().enumerate().map(item).collect()
            }
            _ if self.is_null() => Vec::new(),
            _ => {
                self.expected::<()>("a list");
                Vec::new()
            }
        }
    }

    /// The keys of a mapping with their values; of null, none.
    pub fn entries(&self) -> Vec<(&'a str, Self)> {
        match &self.node.body {
            Body::Mapping(entries) => {
                let item = |entry: &'a super::yaml::Entry| {
                    let name = entry.key.text.as_str();
                    (name, self.child(name, entry.mark, &entry.value))
                };
                entries.iter().map(item).collect()
            }
            _ if self.is_null() => Vec::new(),
            _ => {
                self.expected::<()>("a mapping");
                Vec::new()
            }
        }
    }

    /// A mapping of which these are all the keys there may be.
    pub fn fields(&self, known: &'static [&'static str]) -> Fields<'a> {
        let entries = self.entries();
        for (name, item) in entries.iter().filter(|(name, _)| !known.contains(name)) {
            item.suggest("unknown setting", nearest(name, known.iter().copied()));
        }
        Fields { owner: self.clone(), known, entries }
    }

    pub fn is_mapping(&self) -> bool {
        matches!(self.node.body, Body::Mapping(_))
    }
}

/// A mapping with a fixed set of keys.
#[derive(Debug)]
pub struct Fields<'a> {
    pub owner: Item<'a>,
    known: &'static [&'static str],
    entries: Vec<(&'a str, Item<'a>)>,
}

impl<'a> Fields<'a> {
    /// The setting as it is given, a null too.
    pub fn given(&self, key: &str) -> Option<&Item<'a>> {
        debug_assert!(self.known.contains(&key), "`{key}` is not declared");
        self.entries.iter().find(|(name, _)| *name == key).map(|(_, item)| item)
    }

    /// The setting, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Item<'a>> {
        self.given(key).filter(|item| !item.is_null())
    }

    /// The setting, whose absence is reported.
    pub fn required(&self, key: &str) -> Option<&Item<'a>> {
        let item = self.get(key);
        // What is no mapping has been reported as that.
        let could_hold_it = self.owner.is_mapping() || self.owner.is_null();
        if item.is_none() && could_hold_it {
            self.owner.problem(format!("the setting `{key}` is missing"));
        }
        item
    }

    /// Replaces `field` by what is given, if something usable is.
    pub fn read<T>(&self, key: &str, field: &mut T, read: impl FnOnce(&Item<'a>) -> Option<T>) {
        if let Some(value) = self.get(key).and_then(read) {
            *field = value;
        }
    }
}

/// What a node is, for a message.
fn found(node: &Node) -> String {
    match &node.body {
        Body::Scalar(scalar) if scalar.is_null() => "nothing".into(),
        Body::Scalar(scalar) => {
            let cut: String = scalar.text.chars().take(60).collect();
            let dots = if cut.len() < scalar.text.len() { "…" } else { "" };
            let text = if scalar.plain { "" } else { "the text " };
            format!("{text}`{cut}{dots}`")
        }
        Body::Sequence(_) => "a list".into(),
        Body::Mapping(_) => "a mapping".into(),
    }
}
