//! The only place that prints: data to standard output, the rest to standard error.
//!
//! On a terminal lists are tables cut to its width; on a pipe they are stable
//! columns separated by tabs, never cut. `-o json|yaml|ndjson` gives the whole
//! records.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::error::{Context, Result};

/// The shape of what is shown, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One JSON value
    Json,
    /// One JSON value a line
    Ndjson,
    /// YAML
    Yaml,
}

/// `-o`, for every command that shows something.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct OutputArgs {
    /// Show whole records in this format
    #[arg(short = 'o', long = "output", value_name = "FORMAT")]
    pub output: Option<Format>,
}

/// A column of a list.
pub struct Column<T> {
    pub title: &'static str,
    pub text: fn(&T) -> String,
}

impl<T> std::fmt::Debug for Column<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.title)
    }
}

/// Standard output and standard error.
#[derive(Debug)]
pub struct Out {
    stdout_is_terminal: bool,
    stderr_is_terminal: bool,
    /// Whether a progress line stands unfinished on the terminal.
    in_progress: Cell<bool>,
}

impl Default for Out {
    fn default() -> Self {
        Self::new()
    }
}

impl Out {
    pub fn new() -> Self {
        Self {
            stdout_is_terminal: io::stdout().is_terminal(),
            stderr_is_terminal: io::stderr().is_terminal(),
            in_progress: Cell::new(false),
        }
    }

    /// Shows a list: a table, or records in `format`.
    pub fn list<T: Serialize>(
        &self,
        format: OutputArgs,
        rows: &[T],
        columns: &[Column<T>],
    ) -> Result<()> {
        let text = match format.output {
            Some(Format::Json) => to_json(&rows)?,
            Some(Format::Yaml) => to_yaml(&rows)?,
            Some(Format::Ndjson) => rows.iter().map(to_line).collect::<Result<String>>()?,
            None => self.table(rows, columns),
        };
        self.data(&text)
    }

    /// Shows one record: lines of `title  text`, or the record in `format`.
    pub fn record<T: Serialize>(
        &self,
        format: OutputArgs,
        record: &T,
        lines: &[(&str, String)],
    ) -> Result<()> {
        let text = match format.output {
            Some(Format::Json) => to_json(record)?,
            Some(Format::Yaml) => to_yaml(record)?,
            Some(Format::Ndjson) => to_line(record)?,
            None => {
                let width = lines.iter().map(|(title, _)| title.width()).max().unwrap_or(0);
                let line = |(title, text): &(&str, String)| format!("{title:width$}  {text}\n");
                lines.iter().map(line).collect()
            }
        };
        self.data(&text)
    }

    /// Writes data, as it is, to standard output.
    pub fn data(&self, text: &str) -> Result<()> {
        self.end_progress();
        let mut out = anstream::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).while_doing(|| WRITING.into())
    }

    /// Writes bytes, whatever they are, to standard output: a guest's console to the
    /// terminal of the user who opened it.
    pub fn raw(&self, bytes: &[u8]) -> Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).while_doing(|| WRITING.into())
    }

    /// Writes bytes, whatever they are, to standard error.
    pub fn raw_error(&self, bytes: &[u8]) -> Result<()> {
        let mut out = io::stderr().lock();
        out.write_all(bytes)
            .and_then(|()| out.flush())
            .while_doing(|| "writing to standard error".into())
    }

    /// Says, on standard error, what happened.
    pub fn status(&self, text: &str) {
        self.end_progress();
        // Nobody is left to tell when standard error is gone.
        let _ = writeln!(anstream::stderr(), "{text}");
    }

    /// Says, on standard error, what the user may want to mend.
    pub fn warn(&self, text: &str) {
        let style = anstyle::AnsiColor::Yellow.on_default().bold();
        self.status(&format!("{style}warning:{style:#} {text}"));
    }

    /// Reports a failure.
    pub fn error(&self, report: &str) {
        let style = anstyle::AnsiColor::Red.on_default().bold();
        match report.strip_prefix("error:") {
            Some(rest) => self.status(&format!("{style}error:{style:#}{rest}")),
            None => self.status(report),
        }
    }

    /// Shows what is waited for. On a terminal the line replaces the one before;
    /// elsewhere each is a line of its own, so callers say it only on change.
    pub fn progress(&self, text: &str) {
        if !self.stderr_is_terminal {
            return self.status(text);
        }
        let cut = fit(text, terminal_width().saturating_sub(1));
        let _ = write!(io::stderr(), "\r\x1b[K{cut}");
        let _ = io::stderr().flush();
        self.in_progress.set(true);
    }

    /// Shows what is waited for, on a terminal only: it is of this moment.
    pub fn transient(&self, text: &str) {
        if self.stderr_is_terminal {
            self.progress(text);
        }
    }

    /// Takes the progress line away.
    pub fn end_progress(&self) {
        if self.in_progress.take() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }

    pub fn stdout_is_terminal(&self) -> bool {
        self.stdout_is_terminal
    }

    pub fn stderr_is_terminal(&self) -> bool {
        self.stderr_is_terminal
    }

    /// A list as a table.
    pub fn table<T>(&self, rows: &[T], columns: &[Column<T>]) -> String {
        let cells: Vec<Vec<String>> = rows
            .iter()
            .map(|row| columns.iter().map(|column| (column.text)(row)).collect())
            .collect();
        let titles: Vec<String> = columns.iter().map(|column| column.title.to_owned()).collect();
        self.cells(&titles, cells)
    }

    /// A list as a table, whose columns are known only now.
    pub fn cells(&self, titles: &[String], rows: Vec<Vec<String>>) -> String {
        let titles: Vec<String> = titles.iter().map(|title| title.to_uppercase()).collect();
        let rows: Vec<Vec<String>> =
            rows.into_iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
        if !self.stdout_is_terminal {
            let line = |cells: &Vec<String>| cells.join("\t") + "\n";
            return std::iter::once(&titles).chain(&rows).map(line).collect();
        }
        draw(terminal_width(), titles, rows)
    }
}

/// What is done when output is not taken.
pub const WRITING: &str = "writing to standard output";

/// Of a list that is too wide: what it can do without, and what stands below its line instead.
const LEAST: [&str; 3] = ["HOST", "IMAGE", "TEMPLATE"];
const BELOW: [&str; 2] = ["DETAIL", "TROUBLE"];

fn widths(titles: &[String], cells: &[Vec<String>]) -> Vec<usize> {
    let mut widths: Vec<usize> = titles.iter().map(|title| title.width()).collect();
    for row in cells {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.width());
        }
    }
    widths
}

fn room(widths: &[usize]) -> usize {
    widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1)
}

/// Pads columns, and makes lines fit: what says why stands below, what is the same for most goes,
/// then the widest is shortened.
fn draw(limit: usize, mut titles: Vec<String>, mut cells: Vec<Vec<String>>) -> String {
    let mut below = vec![String::new(); cells.len()];
    let is_wide = |titles: &[String], cells: &[Vec<String>]| room(&widths(titles, cells)) > limit;
    let reason = titles.iter().position(|title| BELOW.contains(&&**title));
    if let Some(at) = reason.filter(|_| is_wide(&titles, &cells)) {
        titles.remove(at);
        below = cells.iter_mut().map(|row| row.remove(at)).collect();
        for least in LEAST {
            let at = titles.iter().position(|title| title == least);
            if let Some(at) = at.filter(|_| is_wide(&titles, &cells)) {
                titles.remove(at);
                cells.iter_mut().for_each(|row| drop(row.remove(at)));
            }
        }
    }
    let mut widths = widths(&titles, &cells);
    while room(&widths) > limit {
        let Some(widest) = widths.iter_mut().max().filter(|width| **width > 8) else { break };
        *widest -= 1;
    }
    let line = |row: &Vec<String>| {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let cell = fit(cell, *width);
            text += &cell;
            text += &" ".repeat(width + 2 - cell.width());
        }
        text.trim_end().to_owned() + "\n"
    };
    let rows = cells.iter().zip(&below).map(|(row, why)| line(row) + &wrapped(why, limit));
    line(&titles) + &rows.collect::<String>()
}

/// A text below its line, as many lines as it needs.
fn wrapped(text: &str, limit: usize) -> String {
    const INDENT: &str = "    ";
    let (mut lines, mut line) = (String::new(), String::new());
    for word in text.split_whitespace() {
        let is_full = INDENT.len() + line.width() + 1 + word.width() > limit;
        if is_full && !line.is_empty() {
            lines += &format!("{INDENT}{line}\n");
            line.clear();
        }
        line += if line.is_empty() { "" } else { " " };
        line += word;
    }
    if line.is_empty() { lines } else { lines + INDENT + &line + "\n" }
}

/// The text, shortened with `…` to `width` columns.
pub fn fit(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut cut = String::new();
    for letter in text.chars() {
        if cut.width() + letter.to_string().width() + 1 > width {
            break;
        }
        cut.push(letter);
    }
    cut + "…"
}

/// One line, without anything a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

fn terminal_width() -> usize {
    let size = terminal_size::terminal_size_of(io::stdout())
        .or_else(|| terminal_size::terminal_size_of(io::stderr()));
    size.map_or(80, |(width, _)| width.0.into())
}

fn to_json<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    let text = serde_json::to_string_pretty(value).while_doing(|| "writing JSON".into())?;
    Ok(text + "\n")
}

fn to_line<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    let text = serde_json::to_string(value).while_doing(|| "writing JSON".into())?;
    Ok(text + "\n")
}

fn to_yaml<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    serde_yaml::to_string(value).while_doing(|| "writing YAML".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_by_columns_not_by_bytes() {
        assert_eq!(fit("short", 10), "short");
        assert_eq!(fit("a long sentence", 8), "a long …");
        assert_eq!(fit("日本語日本語", 7), "日本語…");
    }

    #[test]
    fn a_narrow_list_keeps_what_matters() {
        let titles = ["VM", "STATE", "HOST", "IMAGE", "ADDRESS", "DETAIL"].map(String::from);
        let row = |cells: [&str; 6]| cells.map(String::from).to_vec();
        let failed = "QEMU was killed by signal 9";
        let cells = vec![
            row(["vm0", "running", "login", "user:tiny@0", "10.200.0.10", ""]),
            row(["vm1", "failed", "login", "user:tiny@0", "10.200.0.11", failed]),
        ];
        let drawn = |limit| draw(limit, titles.to_vec(), cells.clone());
        assert!(drawn(80).contains("10.200.0.11  QEMU was killed by signal 9\n"), "{}", drawn(80));
        let expected = "VM   STATE    ADDRESS\n\
                        vm0  running  10.200.0.10\n\
                        vm1  failed   10.200.0.11\n    QEMU was killed by\n    signal 9\n";
        assert_eq!(drawn(26), expected);
    }

    #[test]
    fn a_guest_cannot_write_to_the_terminal_through_a_list() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a [2Jb c");
    }
}
