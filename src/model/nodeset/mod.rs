//! Sets of nodes: `cn[43-45,47]`, `r[1-3]u[01-10]`, `@rack3!cn7`, `arch=x86_64`, `all`.
//!
//! ```text
//! set     := term ( op term )*       , or blank: union   !: without   &: in both   ^: in one
//! term    := names | '@'group | '@'source':'name | '@'file | '~'regex | 'all'
//!          | attribute ('=' | '!=' | '~=') value | '(' set ')'
//! names   := text with brackets      cn[43-45,47]  r[1-3]u[01-10]  n[0-10/2]  node[1-25]-bmc
//! ```
//!
//! Operators are read from left to right, none binds closer. Zeros in front are part of a
//! name: `n[08-10]` is n08, n09, n10. What [`parse`](parse::parse) reads is an
//! [`Expr`](expr::Expr), which says what it [wants](expr::Want) of others (groups, files,
//! attributes, all nodes there are): whoever knows them gives them, and the expression
//! becomes a [`NodeSet`]. An empty one is an error, never all.
//!
//! - [`name`]: what a node may be called, and the numbers in it;
//! - [`pattern`]: names with brackets, counted before they are expanded;
//! - [`parse`], [`expr`]: the grammar, and what comes of it;
//! - [`lines`]: sets in files, one a line;
//! - [`fold`]: the shortest text of a set, that Slurm can read or not.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::error::{Error, Result};
use name::{Number, Shape};

pub mod expr;
pub mod fold;
pub mod lines;
pub mod name;
pub mod parse;
pub mod pattern;

/// More names than a site has; a larger set is a slip of the finger.
pub const MAX_NAMES: usize = 1_000_000;

/// Distinct names, in the order of their text and then of their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSet {
    /// By shape, `r#u#`; none without rows.
    shapes: BTreeMap<String, Rows>,
}

/// The numbers of all names of one shape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rows {
    /// How many numbers each name has.
    width: usize,
    /// Row after row, ascending, none twice. Empty if there are no numbers in the name.
    flat: Vec<Number>,
}

impl Rows {
    fn len(&self) -> usize {
        self.flat.len().checked_div(self.width).unwrap_or(1)
    }

    fn iter(&self) -> impl Iterator<Item = &[Number]> {
        let lone = (self.width == 0).then_some(&[][..]);
        lone.into_iter().chain(self.flat.chunks_exact(self.width.max(1)))
    }
}

impl NodeSet {
    /// How many names.
    pub fn len(&self) -> usize {
        self.shapes.values().map(Rows::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.shapes.is_empty()
    }

    pub fn contains(&self, name: &str) -> bool {
        let mut shape = Shape::default();
        shape.read(name);
        let Some(rows) = self.shapes.get(shape.text()) else { return false };
        let row = shape.numbers();
        let (mut low, mut high) = (0, rows.len());
        while low < high {
            let middle = low.midpoint(high);
            match rows.flat[middle * rows.width..(middle + 1) * rows.width].cmp(row) {
                std::cmp::Ordering::Equal => return true,
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        false
    }

    /// Calls `take` with each name, in order.
    pub fn each(&self, mut take: impl FnMut(&str)) {
        let mut text = String::new();
        for (shape, rows) in &self.shapes {
            for row in rows.iter() {
                text.clear();
                name::write(shape, row, &mut text);
                take(&text);
            }
        }
    }

    /// The names, in order.
    pub fn names(&self) -> Vec<String> {
        let mut names = Vec::with_capacity(self.len());
        self.each(|name| names.push(name.to_owned()));
        names
    }

    /// At most `parts` sets of as equal sizes as can be, neighbours together.
    pub fn split(&self, parts: usize) -> Vec<NodeSet> {
        let count = self.len();
        let parts = parts.clamp(1, count.max(1));
        let mut split = vec![Builder::default(); parts];
        let mut index = 0;
        self.each(|name| {
            // The first `count % parts` have one more.
            let (size, more) = (count / parts, count % parts);
            let part = match index < more * (size + 1) {
                true => index / (size + 1),
                false => more + (index - more * (size + 1)) / size,
            };
            split[part].push(name);
            index += 1;
        });
        split.into_iter().map(Builder::sorted).collect()
    }

    /// The names that are in one of two sets or both, as `keep(in self, in other)` says.
    fn combine(&self, other: &NodeSet, keep: fn(bool, bool) -> bool) -> NodeSet {
        let none = Rows::default();
        let mut shapes = BTreeMap::new();
        for shape in self.shapes.keys().chain(other.shapes.keys()) {
            if shapes.contains_key(shape) {
                continue;
            }
            let (mine, theirs) = (self.shapes.get(shape), other.shapes.get(shape));
            let kept = match mine.or(theirs).unwrap_or(&none).width {
                0 => keep(mine.is_some(), theirs.is_some()).then(Rows::default),
                width => {
                    let flat = |rows: Option<&Rows>| rows.map_or(vec![], |rows| rows.flat.clone());
                    let flat = merge(width, &flat(mine), &flat(theirs), keep);
                    (!flat.is_empty()).then_some(Rows { width, flat })
                }
            };
            shapes.extend(kept.map(|rows| (shape.clone(), rows)));
        }
        NodeSet { shapes }
    }

    #[must_use]
    pub fn union(&self, other: &NodeSet) -> NodeSet {
        self.combine(other, |mine, theirs| mine || theirs)
    }

    #[must_use]
    pub fn without(&self, other: &NodeSet) -> NodeSet {
        self.combine(other, |mine, theirs| mine && !theirs)
    }

    #[must_use]
    pub fn in_both(&self, other: &NodeSet) -> NodeSet {
        self.combine(other, |mine, theirs| mine && theirs)
    }

    #[must_use]
    pub fn in_one(&self, other: &NodeSet) -> NodeSet {
        self.combine(other, |mine, theirs| mine != theirs)
    }
}

/// Merges two ascending lists of rows.
fn merge(
    width: usize,
    mine: &[Number],
    theirs: &[Number],
    keep: fn(bool, bool) -> bool,
) -> Vec<Number> {
    let mut merged = Vec::with_capacity(mine.len().max(theirs.len()));
    let mut mine = mine.chunks_exact(width).peekable();
    let mut theirs = theirs.chunks_exact(width).peekable();
    loop {
        let (row, first, second) = match (mine.peek(), theirs.peek()) {
            (None, None) => return merged,
            (Some(a), Some(b)) => (*a.min(b), a <= b, b <= a),
            (Some(a), None) => (*a, true, false),
            (None, Some(b)) => (*b, false, true),
        };
        if first {
            mine.next();
        }
        if second {
            theirs.next();
        }
        if keep(first, second) {
            merged.extend_from_slice(row);
        }
    }
}

/// Folded, in full: for people. What others read: [`NodeSet::fold`].
impl fmt::Display for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.fold(fold::Style::Full))
    }
}

impl<S: AsRef<str>> FromIterator<S> for NodeSet {
    /// The set of these names, which have passed [`name::check`].
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        let mut builder = Builder::default();
        names.into_iter().for_each(|name| builder.push(name.as_ref()));
        builder.sorted()
    }
}

/// A set that grows by names in any order.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    shapes: HashMap<String, Rows>,
    /// Rows there are, the same one perhaps more than once.
    rows: usize,
    scratch: Shape,
}

impl Builder {
    /// Adds a name.
    ///
    /// # Errors
    /// When there are more than [`MAX_NAMES`] then.
    pub fn add(&mut self, name: &str) -> Result<()> {
        self.push(name);
        // Sorting finds those that are there twice: not each time.
        if self.rows > 2 * MAX_NAMES { self.compact() } else { Ok(()) }
    }

    /// Adds all names of a set.
    ///
    /// # Errors
    /// When there are more than [`MAX_NAMES`] then.
    pub fn add_set(&mut self, set: &NodeSet) -> Result<()> {
        for (shape, rows) in &set.shapes {
            match self.shapes.get_mut(shape) {
                Some(ours) => ours.flat.extend_from_slice(&rows.flat),
                None => drop(self.shapes.insert(shape.clone(), rows.clone())),
            }
        }
        self.rows += set.len();
        if self.rows > 2 * MAX_NAMES { self.compact() } else { Ok(()) }
    }

    fn compact(&mut self) -> Result<()> {
        let set = std::mem::take(self).finish()?;
        self.add_set(&set)
    }

    fn push(&mut self, name: &str) {
        self.scratch.read(name);
        let (shape, row) = (self.scratch.text(), self.scratch.numbers());
        match self.shapes.get_mut(shape) {
            Some(rows) => rows.flat.extend_from_slice(row),
            None => {
                let rows = Rows { width: row.len(), flat: row.to_vec() };
                self.shapes.insert(shape.to_owned(), rows);
            }
        }
        self.rows += 1;
    }

    /// The set.
    ///
    /// # Errors
    /// When it has more than [`MAX_NAMES`].
    pub fn finish(self) -> Result<NodeSet> {
        let set = self.sorted();
        match set.len() {
            0..=MAX_NAMES => Ok(set),
            count => Err(Error::usage(format!("these are {count} nodes, more than {MAX_NAMES}"))),
        }
    }

    fn sorted(self) -> NodeSet {
        let sorted = |(shape, mut rows): (String, Rows)| {
            rows.flat = sort(rows.width, rows.flat);
            (shape, rows)
        };
        NodeSet { shapes: self.shapes.into_iter().map(sorted).collect() }
    }
}

/// Sorts rows, and drops those that are there twice.
fn sort(width: usize, mut flat: Vec<Number>) -> Vec<Number> {
    /// Rows of a fixed width lie together and are fast to compare.
    fn fixed<const N: usize>(flat: &[Number]) -> Vec<Number> {
        let row = |row: &[Number]| std::array::from_fn(|index| row[index]);
        let mut rows: Vec<[Number; N]> = flat.chunks_exact(N).map(row).collect();
        rows.sort_unstable();
        rows.dedup();
        rows.into_flattened()
    }
    match width {
        0 => flat,
        1 => {
            flat.sort_unstable();
            flat.dedup();
            flat
        }
        2 => fixed::<2>(&flat),
        3 => fixed::<3>(&flat),
        _ => {
            let mut rows: Vec<&[Number]> = flat.chunks_exact(width).collect();
            rows.sort_unstable();
            rows.dedup();
            rows.concat()
        }
    }
}

#[cfg(test)]
mod tests;
