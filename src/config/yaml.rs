//! YAML as PyYAML read it, as a tree in which every node knows its place.
//!
//! One pass over parser events gives what a mapping into serde types loses: the
//! place of every key and value, keys given twice (the last wins), merges (`<<`),
//! and scalars as they were written, so that `yes` can be a boolean where one is
//! wanted and `0x8001` stays text where text is.
//!
//! Nothing here grows without bound: depth is limited, and so is what aliases
//! repeat.

use std::collections::HashMap;
use std::rc::Rc;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Tag};

/// The deepest nesting of lists and mappings.
const MAX_DEPTH: usize = 64;

/// The most that aliases may add to a file, in nodes of 32 bytes of text.
const MAX_REPEATED: u64 = 100_000;

/// A place in a file; both count from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    pub line: usize,
    pub column: usize,
}

impl From<&Marker> for Mark {
    fn from(marker: &Marker) -> Self {
        Self { line: marker.line(), column: marker.col() + 1 }
    }
}

/// A value and where it stands.
#[derive(Debug)]
pub struct Node {
    pub mark: Mark,
    pub body: Body,
    /// How much it is, aliases followed: see [`MAX_REPEATED`].
    weight: u64,
}

#[derive(Debug)]
pub enum Body {
    Scalar(Scalar),
    Sequence(Vec<Rc<Node>>),
    Mapping(Vec<Entry>),
}

/// A scalar as written; what it means depends on what is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scalar {
    pub text: String,
    /// Neither quoted nor a block: `yes` is a boolean, `"yes"` is text.
    pub plain: bool,
}

/// A key with its value.
#[derive(Clone, Debug)]
pub struct Entry {
    pub key: Scalar,
    pub mark: Mark,
    pub value: Rc<Node>,
}

/// What a file holds.
#[derive(Debug)]
pub struct Document {
    pub root: Rc<Node>,
    pub duplicates: Vec<Duplicate>,
}

/// A key given twice in one mapping.
#[derive(Debug, PartialEq, Eq)]
pub struct Duplicate {
    /// With the keys it lies under: `vm1.image`.
    pub path: String,
    pub mark: Mark,
    pub first: Mark,
}

/// Why a text is no YAML that we read.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    pub mark: Mark,
    pub message: String,
}

/// Reads one document; an empty text is a null.
pub fn parse(text: &str) -> Result<Document, Fault> {
    let mut builder = Builder::default();
    let mut parser = Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|e| Fault {
            mark: e.marker().into(),
            message: format!("no YAML: {e}", e = e.info()),
        })?;
        builder.event(event, (&span.start).into())?;
    }
    let null = || Rc::new(Node::scalar(Mark { line: 1, column: 1 }, String::new(), true));
    Ok(Document { root: builder.root.unwrap_or_else(null), duplicates: builder.duplicates })
}

impl Scalar {
    pub fn is_null(&self) -> bool {
        self.plain && matches!(self.text.as_str(), "" | "~" | "null" | "Null" | "NULL")
    }

    /// A boolean of YAML 1.1, whatever its case: `true`, `yes`, `on` and their opposites.
    pub fn as_bool(&self) -> Option<bool> {
        let is = |word: &&str| self.plain && self.text.eq_ignore_ascii_case(word);
        match () {
            () if ["true", "yes", "on"].iter().any(&is) => Some(true),
            () if ["false", "no", "off"].iter().any(is) => Some(false),
            () => None,
        }
    }

    /// An integer of YAML 1.1: `10`, `1_000`, `0x1f`, `0b11`, `0o17` and `017`.
    pub fn as_integer(&self) -> Option<i64> {
        let text = self.text.replace('_', "");
        let (negative, digits) = match text.strip_prefix(['-', '+']) {
            Some(digits) => (text.starts_with('-'), digits),
            None => (false, text.as_str()),
        };
        let (radix, digits) = match digits.as_bytes() {
            [b'0', b'x', ..] => (16, &digits[2..]),
            [b'0', b'b', ..] => (2, &digits[2..]),
            [b'0', b'o', ..] => (8, &digits[2..]),
            [b'0', _, ..] => (8, &digits[1..]),
            _ => (10, digits),
        };
        // `from_str_radix` would take a second sign.
        let clean = self.plain && digits.starts_with(|c: char| c.is_ascii_hexdigit());
        let number = clean.then(|| i64::from_str_radix(digits, radix).ok()).flatten()?;
        Some(if negative { -number } else { number })
    }

    /// As it was written, on one line: what was plain stays so, since whether `1:30`
    /// is text or a number is for its reader to say.
    fn to_yaml(&self) -> String {
        if self.is_null() {
            return "null".into();
        }
        if self.plain && !self.text.contains('\n') {
            return self.text.clone();
        }
        let escaped = |letter: char| match letter {
            '"' => "\\\"".into(),
            '\\' => "\\\\".into(),
            '\n' => "\\n".into(),
            '\t' => "\\t".into(),
            letter if letter.is_control() || "\u{2028}\u{2029}\u{feff}".contains(letter) => {
                format!("\\u{:04x}", u32::from(letter))
            }
            letter => letter.to_string(),
        };
        format!("\"{}\"", self.text.chars().map(escaped).collect::<String>())
    }
}

impl Node {
    fn scalar(mark: Mark, text: String, plain: bool) -> Self {
        let weight = 1 + text.len() as u64 / 32;
        Self { mark, body: Body::Scalar(Scalar { text, plain }), weight }
    }

    pub fn as_scalar(&self) -> Option<&Scalar> {
        match &self.body {
            Body::Scalar(scalar) => Some(scalar),
            _ => None,
        }
    }

    pub fn is_null(&self) -> bool {
        self.as_scalar().is_some_and(Scalar::is_null)
    }

    /// The value as YAML in block style, with aliases and merges replaced.
    ///
    /// Every scalar is as it was written. A library that writes values would leave
    /// out the quotes of `"1:30"` or `"017"`, which are numbers to cloud-init.
    pub fn to_yaml(&self) -> String {
        let mut text = String::new();
        self.write(0, &mut text);
        text.trim_start().to_owned() + "\n"
    }

    /// Writes the value after a key, a `-` or nothing.
    fn write(&self, depth: usize, text: &mut String) {
        let line = format!("\n{}", "  ".repeat(depth));
        match &self.body {
            Body::Scalar(scalar) => *text += &format!(" {}", scalar.to_yaml()),
            Body::Sequence(items) if items.is_empty() => *text += " []",
            Body::Mapping(entries) if entries.is_empty() => *text += " {}",
            Body::Sequence(items) => {
                for item in items {
                    let mut below = String::new();
                    item.write(depth + 1, &mut below);
                    // A list or mapping begins in the line of its `-`.
                    let begun = below.strip_prefix(&format!("{line}  ")).unwrap_or(&below[1..]);
                    *text += &format!("{line}- {begun}");
                }
            }
            Body::Mapping(entries) => {
                for entry in entries {
                    *text += &format!("{line}{}:", entry.key.to_yaml());
                    entry.value.write(depth + 1, text);
                }
            }
        }
    }
}

/// A list or mapping that is not finished.
struct Frame {
    mark: Mark,
    anchor: usize,
    open: Open,
}

enum Open {
    Sequence(Vec<Rc<Node>>),
    Mapping(Mapping),
}

#[derive(Default)]
struct Mapping {
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    /// What `<<` names, the strongest first.
    merged: Vec<Rc<Node>>,
    /// The key whose value comes next.
    key: Option<(Scalar, Mark)>,
}

#[derive(Default)]
struct Builder {
    frames: Vec<Frame>,
    anchors: HashMap<usize, Rc<Node>>,
    repeated: u64,
    duplicates: Vec<Duplicate>,
    root: Option<Rc<Node>>,
}

impl Builder {
    fn event(&mut self, event: Event<'_>, mark: Mark) -> Result<(), Fault> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain && !means_text(tag.as_deref(), mark)?;
                self.place(Node::scalar(mark, text.into_owned(), plain).into(), anchor, mark)
            }
            Event::SequenceStart(anchor, tag) => {
                means_text(tag.as_deref(), mark)?;
                self.open(Frame { mark, anchor, open: Open::Sequence(Vec::new()) })
            }
            Event::MappingStart(anchor, tag) => {
                means_text(tag.as_deref(), mark)?;
                self.open(Frame { mark, anchor, open: Open::Mapping(Mapping::default()) })
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            Event::Alias(anchor) => {
                let inside = || fault(mark, "the alias stands inside what it names");
                let node = Rc::clone(self.anchors.get(&anchor).ok_or_else(inside)?);
                self.repeated = self.repeated.saturating_add(node.weight);
                if self.repeated > MAX_REPEATED {
                    return Err(fault(mark, "the aliases repeat too much"));
                }
                self.place(node, 0, mark)
            }
            Event::DocumentStart(_) if self.root.is_some() => {
                Err(fault(mark, "a second document begins: one is read from a file"))
            }
            _ => Ok(()),
        }
    }

    fn open(&mut self, frame: Frame) -> Result<(), Fault> {
        if self.frames.len() >= MAX_DEPTH {
            return Err(fault(frame.mark, "nested too deeply"));
        }
        self.frames.push(frame);
        Ok(())
    }

    fn close(&mut self) -> Result<(), Fault> {
        let Some(frame) = self.frames.pop() else { return Ok(()) };
        let (body, weight) = match frame.open {
            Open::Sequence(items) => {
                let weight = items.iter().map(|item| item.weight).sum();
                (Body::Sequence(items), weight)
            }
            Open::Mapping(mapping) => {
                let entries = mapping.merge();
                let weight = entries.iter().map(|entry| entry.value.weight).sum();
                (Body::Mapping(entries), weight)
            }
        };
        let node = Node { mark: frame.mark, body, weight: u64::saturating_add(weight, 1) };
        self.place(node.into(), frame.anchor, frame.mark)
    }

    /// Puts a finished node where it belongs: at the root, in a list, or as the
    /// next key or value. `mark` is where it is written, or its alias.
    fn place(&mut self, node: Rc<Node>, anchor: usize, mark: Mark) -> Result<(), Fault> {
        if anchor != 0 {
            self.anchors.insert(anchor, Rc::clone(&node));
        }
        let Some(frame) = self.frames.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        let mapping = match &mut frame.open {
            Open::Sequence(items) => {
                items.push(node);
                return Ok(());
            }
            Open::Mapping(mapping) => mapping,
        };
        match mapping.key.take() {
            None => {
                let key = node.as_scalar().ok_or_else(|| fault(mark, "a key must be text"))?;
                mapping.key = Some((key.clone(), mark));
            }
            Some((key, at)) if key.plain && key.text == "<<" => mapping.inherit(node, at)?,
            Some((key, at)) => {
                let name = key.text.clone();
                if let Some(first) = mapping.insert(key, at, node) {
                    let path = self.path(&name);
                    self.duplicates.push(Duplicate { path, mark: at, first });
                }
            }
        }
        Ok(())
    }

    /// The path of `key` in the mapping that is being read.
    fn path(&self, key: &str) -> String {
        let above = self.frames.iter().filter_map(|frame| match &frame.open {
            Open::Sequence(items) => Some(format!("[{}]", items.len())),
            Open::Mapping(mapping) => mapping.key.as_ref().map(|(key, _)| key.text.clone()),
        });
        above.chain([key.to_owned()]).fold(String::new(), |path, part| join(&path, &part))
    }
}

impl Mapping {
    /// Sets a key; gives the place where it was set before.
    fn insert(&mut self, key: Scalar, mark: Mark, value: Rc<Node>) -> Option<Mark> {
        match self.index.get(&key.text) {
            Some(&index) => {
                let old = std::mem::replace(&mut self.entries[index], Entry { key, mark, value });
                Some(old.mark)
            }
            None => {
                self.index.insert(key.text.clone(), self.entries.len());
                self.entries.push(Entry { key, mark, value });
                None
            }
        }
    }

    /// Takes in what `<<` names: a mapping or a list of them, the first the
    /// strongest. Of two `<<` in a mapping, the second is the stronger.
    fn inherit(&mut self, node: Rc<Node>, mark: Mark) -> Result<(), Fault> {
        let parents = match &node.body {
            Body::Sequence(parents) => parents.clone(),
            _ => vec![node],
        };
        if !parents.iter().all(|parent| matches!(parent.body, Body::Mapping(_))) {
            return Err(fault(mark, "`<<` takes a mapping, or a list of mappings"));
        }
        self.merged.splice(0..0, parents);
        Ok(())
    }

    /// The mapping's own entries, then those that only its parents have.
    fn merge(mut self) -> Vec<Entry> {
        for parent in std::mem::take(&mut self.merged) {
            let Body::Mapping(entries) = &parent.body else { continue };
            for entry in entries.iter().filter(|entry| !self.index.contains_key(&entry.key.text)) {
                self.entries.push(entry.clone());
            }
            self.index.extend(entries.iter().map(|entry| (entry.key.text.clone(), usize::MAX)));
        }
        self.entries
    }
}

/// `vm1` and `image` make `vm1.image`; `drives` and `[0]` make `drives[0]`.
pub fn join(path: &str, part: &str) -> String {
    match (path, part) {
        ("", part) => part.to_owned(),
        (path, part) if part.starts_with('[') => format!("{path}{part}"),
        (path, part) => format!("{path}.{part}"),
    }
}

fn fault(mark: Mark, message: &str) -> Fault {
    Fault { mark, message: message.to_owned() }
}

/// Whether a tag makes a plain scalar text (`!!str`). Tags that would make it
/// anything but YAML's own types are refused.
fn means_text(tag: Option<&Tag>, mark: Mark) -> Result<bool, Fault> {
    let Some(tag) = tag else { return Ok(false) };
    match tag.suffix.as_str() {
        "" | "!" => Ok(true),
        "str" if tag.is_yaml_core_schema() => Ok(true),
        "int" | "float" | "bool" | "null" | "seq" | "map" if tag.is_yaml_core_schema() => Ok(false),
        _ => Err(fault(mark, &format!("the tag `{tag}` is not known here"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Document {
        parse(text).unwrap_or_else(|fault| panic!("{text:?}: {fault:?}"))
    }

    fn yaml(text: &str) -> String {
        read(text).root.to_yaml()
    }

    fn scalar(text: &str) -> Scalar {
        read(text).root.as_scalar().unwrap().clone()
    }

    fn message(text: &str) -> String {
        let fault = parse(text).unwrap_err();
        format!("{}:{}: {}", fault.mark.line, fault.mark.column, fault.message)
    }

    #[test]
    fn scalars_mean_what_they_meant_to_pyyaml() {
        let boolean = |text| scalar(text).as_bool();
        assert_eq!(["yes", "On", "TRUE"].map(boolean), [Some(true); 3]);
        assert_eq!(["no", "oFF", "False"].map(boolean), [Some(false); 3]);
        assert_eq!(["y", "1", "'yes'", "!!str yes"].map(boolean), [None; 4]);
        let integer = |text| scalar(text).as_integer();
        let numbers = ["1_000", "0x1F", "0o17", "017", "0b11", "-3", "+0"].map(integer);
        assert_eq!(numbers, [1000, 31, 15, 15, 3, -3, 0].map(Some));
        assert_eq!(["'3'", "09", "1:30", "--3", "0x", "1.0", "a"].map(integer), [None; 7]);
        assert_eq!(
            ["~", "null", "''", "'~'"].map(|text| scalar(text).is_null()),
            [true, true, false, false]
        );
    }

    #[test]
    fn what_is_written_again_means_the_same() {
        let text = "a: [x, 'yes', yes, '1:30', 1:30, ~, \"t\\x7f\\\"\\n\"]\n'~': {}\n\
                    l:\n- - b: 1\n    c: []\n  - d\n- |\n  one\n  two\n";
        let written = "a:\n  - x\n  - \"yes\"\n  - yes\n  - \"1:30\"\n  - 1:30\n  - null\n  \
                       - \"t\\u007f\\\"\\n\"\n\"~\": {}\nl:\n  - - b: 1\n      c: []\n    - d\n  \
                       - \"one\\ntwo\\n\"\n";
        assert_eq!(yaml(text), written);
        assert_eq!(yaml(written), written);
    }

    #[test]
    fn merges_fill_in_what_a_mapping_does_not_say() {
        let common = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nm: ";
        let merged =
            |text: &str| yaml(&format!("{common}{text}")).split_once("m:\n").unwrap().1.to_owned();
        assert_eq!(merged("{<<: *a, x: 0}"), "  x: 0\n  y: 1\n");
        assert_eq!(merged("{z: 0, <<: [*b, *a]}"), "  z: 0\n  y: 2\n  x: 1\n");
        assert_eq!(merged("{<<: {<<: *a, y: 3}}"), "  y: 3\n  x: 1\n");
        assert_eq!(message("a: {<<: 5}"), "1:5: `<<` takes a mapping, or a list of mappings");
    }

    #[test]
    fn of_a_key_given_twice_the_last_wins_and_both_places_are_known() {
        let document = read("vm:\n  a: [{b: 1, b: 2}]\n  a: 3\n");
        let at = |line, column| Mark { line, column };
        assert_eq!(
            document.duplicates,
            [
                Duplicate { path: "vm.a[0].b".into(), mark: at(2, 14), first: at(2, 8) },
                Duplicate { path: "vm.a".into(), mark: at(3, 3), first: at(2, 3) },
            ]
        );
        assert_eq!(yaml("a: 1\na: 2"), "a: 2\n");
    }

    #[test]
    fn what_is_no_yaml_or_too_much_is_refused_with_its_place() {
        assert!(message("a: b\n c: [").starts_with("2:"), "{}", message("a: b\n c: ["));
        let second = "2:1: a second document begins: one is read from a file";
        assert_eq!(message("a: 1\n---\nb: 2"), second);
        assert_eq!(message("? [a]\n: b"), "1:3: a key must be text");
        assert_eq!(message("a: &a [*a]"), "1:8: the alias stands inside what it names");
        assert!(message("a: !!python/object/apply:os.system [ls]").contains("not known here"));
        assert!(message("a: !secret b").contains("not known here"));
        assert!(message(&"[".repeat(100)).contains("nested too deeply"));
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&"- ".repeat(100_000)).is_err());
        let bomb = (1..12).fold("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned(), |text, n| {
            let alias = format!("*a{}", n - 1);
            text + &format!("a{n}: &a{n} [{}]\n", vec![alias; 10].join(","))
        });
        assert!(message(&bomb).contains("repeat too much"), "{}", message(&bomb));
        let long = format!("a: &a {}\nb: [{}]", "x".repeat(100_000), "*a,".repeat(100));
        assert!(message(&long).contains("repeat too much"));
    }

    #[test]
    fn nothing_is_an_empty_file() {
        for text in ["", "\n", "# only a comment\n", "---\n", "\u{feff}"] {
            assert!(read(text).root.is_null(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[-a-z0-9:,#&*!|>'\"%@{}?~<\\[\\] \n\t\\PC]{0,60}") {
            let _ = parse(&text).map(|document| document.root.to_yaml());
        }

        #[test]
        fn quoted_text_is_read_back_by_others(words in prop::collection::vec(any::<String>(), 1..4)) {
            let nodes = words.iter().map(|word| Node::scalar(Mark::default(), word.clone(), false));
            let body = Body::Sequence(nodes.map(Rc::new).collect());
            let list = Node { mark: Mark::default(), body, weight: 1 };
            prop_assert_eq!(serde_yaml::from_str::<Vec<String>>(&list.to_yaml()).unwrap(), words);
        }
    }
}
