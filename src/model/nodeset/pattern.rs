//! Names with brackets, `r[1-3]u[01-10/2]-ib`, counted before they are expanded.

use std::fmt;

use super::name::{self, Number};
use super::{Builder, MAX_NAMES};
use crate::error::{Error, Result};

/// The most texts and brackets in a name: each takes room on the stack.
const MAX_PIECES: usize = 256;

/// The names that one text with brackets stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Ranges(Vec<Range>),
}

/// `01-10/2`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u64,
    last: u64,
    step: u64,
    digits: usize,
}

impl Range {
    fn count(self) -> u64 {
        (self.last - self.first) / self.step + 1
    }
}

/// What is wrong, and at which byte of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    pub at: usize,
    pub what: String,
    pub help: Option<String>,
}

impl Wrong {
    pub fn new(at: usize, what: impl Into<String>) -> Self {
        Self { at, what: what.into(), help: None }
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => f.write_str(text)?,
                Piece::Ranges(ranges) => {
                    for (index, range) in ranges.iter().enumerate() {
                        let Range { first, last, step, digits } = range;
                        let before = if index == 0 { '[' } else { ',' };
                        write!(f, "{before}{first:0digits$}")?;
                        match (last > first, *step) {
                            (false, _) => {}
                            (true, 1) => write!(f, "-{last:0digits$}")?,
                            (true, step) => write!(f, "-{last:0digits$}/{step}")?,
                        }
                    }
                    f.write_str("]")?;
                }
            }
        }
        Ok(())
    }
}

impl Pattern {
    /// Reads a pattern from the beginning of `text` up to the first letter that is in no
    /// name, and says how long it is. `more` are letters that may be in it too.
    ///
    /// # Errors
    /// When a bracket is not as it should be, or there are more than [`MAX_NAMES`].
    pub fn read(text: &str, more: &[char]) -> Result<(Self, usize), Wrong> {
        let (mut pieces, mut at) = (Vec::new(), 0);
        let mut count = 1_u64;
        while at < text.len() {
            if pieces.len() == MAX_PIECES {
                return Err(Wrong::new(at, "there are too many brackets"));
            }
            let rest = &text[at..];
            let plain = rest.find(|c| !name::is_letter(c) && !more.contains(&c));
            match plain.unwrap_or(rest.len()) {
                0 if rest.starts_with('[') => {
                    let (ranges, length) = read_ranges(text, at)?;
                    let sum = ranges.iter().fold(0_u64, |sum, it| sum.saturating_add(it.count()));
                    count = count.saturating_mul(sum);
                    if count > MAX_NAMES as u64 {
                        let help = "are the brackets what you mean?";
                        return Err(Wrong::new(at, too_many(count)).help(help));
                    }
                    pieces.push(Piece::Ranges(ranges));
                    at += length;
                }
                0 => break,
                length => {
                    pieces.push(Piece::Text(rest[..length].to_owned()));
                    at += length;
                }
            }
        }
        Ok((Self { pieces }, at))
    }

    /// Of how many brackets, and texts between them, it is made.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// How many names it stands for, each as often as it is written.
    pub fn count(&self) -> usize {
        let of = |piece: &Piece| match piece {
            Piece::Text(_) => 1,
            Piece::Ranges(ranges) => ranges.iter().map(|range| range.count() as usize).sum(),
        };
        self.pieces.iter().map(of).product()
    }

    /// Calls `take` with each name, in the order they are written.
    ///
    /// # Errors
    /// The first that `take` returns.
    pub fn each(&self, take: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        each(&self.pieces, &mut String::new(), take)
    }

    /// Adds all names to a set.
    ///
    /// # Errors
    /// When the set has too many then.
    pub fn add_to(&self, set: &mut Builder) -> Result<()> {
        self.each(&mut |name| set.add(name))
    }

    /// What is wrong with the names, if they are to be those of nodes, and at which byte of
    /// the text that was read.
    pub fn wrong_name(&self, text: &str) -> Option<Wrong> {
        // All have the same text between the numbers; the longest has the longest numbers.
        let mut longest = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => longest.push_str(text),
                Piece::Ranges(ranges) => {
                    let last = |range: &Range| Number::padded(range.last, range.digits);
                    if let Some(number) = ranges.iter().map(last).max_by_key(|it| it.digits()) {
                        number.write(&mut longest);
                    }
                }
            }
        }
        let (at, what) = name::wrong_with(&longest)?;
        // Without brackets before it the place is the same.
        let at = if text.starts_with(&longest[..at]) { at } else { 0 };
        Some(Wrong::new(at, what))
    }
}

/// What is said of a set that stands for so many names.
fn too_many(count: u64) -> String {
    let count = match count {
        u64::MAX => "more names than can be counted".to_owned(),
        count => format!("{count} names"),
    };
    format!("with this it stands for {count}, more than {MAX_NAMES}")
}

fn each(
    pieces: &[Piece],
    name: &mut String,
    take: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let length = name.len();
    match pieces.split_first() {
        None => take(name)?,
        Some((Piece::Text(text), rest)) => {
            name.push_str(text);
            each(rest, name, take)?;
        }
        Some((Piece::Ranges(ranges), rest)) => {
            for range in ranges {
                for index in 0..range.count() {
                    name.truncate(length);
                    let value = range.first + index * range.step;
                    Number::padded(value, range.digits).write(name);
                    each(rest, name, take)?;
                }
            }
        }
    }
    name.truncate(length);
    Ok(())
}

/// Reads `[1-3,07]` at a place of `text`; and says how long it is.
fn read_ranges(text: &str, open: usize) -> Result<(Vec<Range>, usize), Wrong> {
    let inside = open + 1;
    let length = text[inside..].find([']', '[']);
    let close = length.map(|length| inside + length).filter(|at| text[*at..].starts_with(']'));
    let Some(close) = close else {
        return Err(Wrong::new(open, "this bracket is not closed").help("write `]` at its end"));
    };
    let (mut ranges, mut at) = (Vec::new(), inside);
    for item in text[inside..close].split(',') {
        let start = at + item.len() - item.trim_start_matches(' ').len();
        ranges.push(read_range(item.trim_matches(' '), start)?);
        at += item.len() + 1;
    }
    Ok((ranges, close + 1 - open))
}

/// Reads `01-10/2`, which is at byte `at`.
fn read_range(item: &str, at: usize) -> Result<Range, Wrong> {
    let (ends, step) = match item.split_once('/') {
        Some((ends, step)) => (ends, number(step, at + ends.len() + 1)?),
        None => (item, 1),
    };
    if step == 0 {
        return Err(Wrong::new(at + ends.len() + 1, "a step of 0 has no end"));
    }
    let (first, last) = ends.split_once('-').unwrap_or((ends, ends));
    let last_at = at + ends.len() - last.len();
    let (from, to) = (number(first, at)?, number(last, last_at)?);
    let padded = |digits: &str| digits.len() > 1 && digits.starts_with('0');
    if padded(last) && last.len() != first.len() {
        let what = format!("`{first}` and `{last}` have not as many digits");
        let digits = last.len();
        return Err(Wrong::new(at, what).help(format!("write `{from:0digits$}-{last}`")));
    }
    if from > to {
        let help = format!("write `{last}-{first}`");
        return Err(Wrong::new(at, format!("`{ends}` runs backwards")).help(help));
    }
    let digits = if padded(first) { first.len() } else { 1 };
    Ok(Range { first: from, last: to, step, digits })
}

fn number(digits: &str, at: usize) -> Result<u64, Wrong> {
    if digits.is_empty() {
        return Err(Wrong::new(at, "a number is missing here"));
    }
    if let Some(other) = digits.find(|c: char| !c.is_ascii_digit()) {
        let letter = digits[other..].chars().next().unwrap_or_default().escape_debug();
        let what = format!("`{letter}` is no part of a number");
        return Err(Wrong::new(at + other, what).help("in brackets: `[1-3,7]`, `[0-10/2]`"));
    }
    match digits.parse() {
        Ok(number) if digits.len() <= name::MAX_DIGITS => Ok(number),
        _ => {
            let what = format!("a number of more than {} digits", name::MAX_DIGITS);
            Err(Wrong::new(at, what))
        }
    }
}

impl From<Wrong> for Error {
    fn from(wrong: Wrong) -> Self {
        let error = Error::usage(wrong.what);
        match wrong.help {
            Some(help) => error.help(help),
            None => error,
        }
    }
}
