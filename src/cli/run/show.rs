//! What the commands say, as it is shown: as it comes, line by line, or what is alike once.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use super::super::out::Out;
use super::super::tame::{Wild, tame};
use crate::error::{Context, Result};
use crate::model::vmset::fold;

/// A line that is longer is shown in parts, between which others may come.
const LINE: usize = 64 << 10;
/// What is held of one command, and of all, to be compared; beyond it, it is shown at once.
const HELD: usize = 1 << 20;
const HELD_IN_ALL: usize = 64 << 20;

/// Where it cannot be said how commands ended, none is begun.
pub fn openable(path: &Path) -> Result<()> {
    let file = File::options().append(true).create(true).open(path);
    file.map(drop).while_doing(|| format!("opening `{}`", path.display()))
}

/// Where something is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    Output,
    Errors,
}

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As it comes: there is one command only.
    Bytes,
    Lines,
    /// With the command's name before each line.
    Labelled,
    /// When all have ended, what is alike once.
    Folded,
}

/// What has not been shown yet.
#[derive(Debug)]
pub struct Show<'a> {
    out: &'a Out,
    style: Style,
    /// Of each command.
    names: Vec<String>,
    ranks: Vec<u32>,
    held: BTreeMap<(Stream, usize), Vec<u8>>,
    in_all: usize,
    /// Too long to be compared.
    loud: Vec<bool>,
}

impl<'a> Show<'a> {
    pub fn new(out: &'a Out, style: Style, names: Vec<String>, ranks: Vec<u32>) -> Self {
        let loud = vec![false; names.len()];
        Self { out, style, names, ranks, held: BTreeMap::new(), in_all: 0, loud }
    }

    /// Takes what a command has said.
    pub fn said(&mut self, index: usize, stream: Stream, bytes: &[u8]) -> Result<()> {
        match self.style {
            Style::Bytes => self.write(stream, bytes),
            Style::Folded if !self.loud[index] => {
                let held = self.held.entry((stream, index)).or_default();
                held.extend_from_slice(bytes);
                self.in_all += bytes.len();
                if held.len() > HELD || self.in_all > HELD_IN_ALL {
                    self.loud[index] = true;
                    self.lines(index, Stream::Output, true)?;
                    self.lines(index, Stream::Errors, true)?;
                }
                Ok(())
            }
            _ => {
                self.held.entry((stream, index)).or_default().extend_from_slice(bytes);
                self.lines(index, stream, self.style != Style::Lines)
            }
        }
    }

    /// Nothing more comes of a command.
    pub fn ended(&mut self, index: usize) -> Result<()> {
        if self.style == Style::Folded && !self.loud[index] {
            return Ok(());
        }
        for stream in [Stream::Output, Stream::Errors] {
            if let Some(rest) = self.held.remove(&(stream, index)) {
                // A line that was never ended, so that no other's goes on with it.
                let mut text = Vec::new();
                self.add_line(&mut text, index, &rest, self.style != Style::Lines);
                if self.style != Style::Lines && !rest.ends_with(b"\n") && !rest.is_empty() {
                    text.push(b'\n');
                }
                self.write(stream, &text)?;
            }
        }
        Ok(())
    }

    /// Shows what was kept.
    pub fn finish(&mut self) -> Result<()> {
        for stream in [Stream::Output, Stream::Errors] {
            let mut groups: Vec<(Vec<u8>, Vec<usize>)> = Vec::new();
            for index in 0..self.names.len() {
                let Some(text) = self.held.remove(&(stream, index)) else { continue };
                match groups.iter_mut().find(|(known, _)| *known == text) {
                    Some((_, who)) => who.push(index),
                    None => groups.push((text, vec![index])),
                }
            }
            for (text, who) in groups {
                let shown = self.group(&text, &who);
                self.write(stream, &shown)?;
            }
        }
        Ok(())
    }

    /// What these have said: behind their names if it is a line, below them if it is more.
    fn group(&self, text: &[u8], who: &[usize]) -> Vec<u8> {
        let head = match who {
            [one] => self.names[*one].clone(),
            _ => {
                let mut ranks: Vec<u32> = who.iter().map(|index| self.ranks[*index]).collect();
                ranks.dedup();
                format!("{} ({})", fold(&ranks), who.len())
            }
        };
        let body = text.strip_suffix(b"\n").unwrap_or(text);
        let between: &[u8] = if body.contains(&b'\n') { b":\n" } else { b": " };
        [head.as_bytes(), between, body, b"\n"].concat()
    }

    /// Shows the whole lines of what was said.
    fn lines(&mut self, index: usize, stream: Stream, labelled: bool) -> Result<()> {
        let Some(held) = self.held.get_mut(&(stream, index)) else { return Ok(()) };
        let whole = held.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
        let count = whole.or((held.len() > LINE).then_some(held.len()));
        let Some(count) = count else { return Ok(()) };
        let rest = held.split_off(count);
        let shown = std::mem::replace(held, rest);
        let mut text = Vec::with_capacity(shown.len());
        for line in shown.split_inclusive(|byte| *byte == b'\n') {
            self.add_line(&mut text, index, line, labelled);
        }
        if labelled && !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        self.write(stream, &text)
    }

    fn add_line(&self, text: &mut Vec<u8>, index: usize, line: &[u8], labelled: bool) {
        if labelled && !line.is_empty() {
            text.extend_from_slice(self.names[index].as_bytes());
            text.extend_from_slice(b": ");
        }
        text.extend_from_slice(line);
    }

    fn write(&self, stream: Stream, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.out.end_progress();
        let at_terminal = match stream {
            Stream::Output => self.out.stdout_is_terminal(),
            Stream::Errors => self.out.stderr_is_terminal(),
        };
        // One command may do with its user's terminal what it likes; none of several may
        // pretend to be another.
        let tamed = (at_terminal && self.style != Style::Bytes).then(|| tame(Wild::Shown, bytes));
        let bytes = tamed.as_deref().unwrap_or(bytes);
        match stream {
            Stream::Output => self.out.raw(bytes),
            Stream::Errors => self.out.raw_error(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(out: &Out, style: Style) -> Show<'_> {
        let names = ["vm0", "vm1", "vm3.0", "vm3.1"].map(String::from).into();
        Show::new(out, style, names, vec![0, 1, 3, 3])
    }

    #[test]
    fn what_is_alike_is_named_by_a_set_and_a_count() {
        let out = Out::new();
        let show = show(&out, Style::Folded);
        let group = |text: &str, who: &[usize]| {
            String::from_utf8(show.group(text.as_bytes(), who)).unwrap()
        };
        assert_eq!(group("hello\n", &[0, 1]), "vm[0-1] (2): hello\n");
        assert_eq!(group("a\nb\n", &[1, 2, 3]), "vm[1,3] (3):\na\nb\n");
        assert_eq!(group("no end", &[3]), "vm3.1: no end\n");
        assert_eq!(group("\n", &[0]), "vm0: \n");
    }
}
