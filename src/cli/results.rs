//! What became of many nodes: told one by one as it comes, folded on a terminal, or as records;
//! and kept in files for the next command.
//!
//! Who reads along may go away at any time (`| head`). What was done to nodes is then still
//! done, kept in the files and said by the exit code.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::out::{Format, Out, OutputArgs};
use crate::error::{Context, Error, Kind, Result};
use crate::model::nodeset::NodeSet;

/// More nodes than this are folded on a terminal.
const FOLDED: usize = 20;

/// How results are shown, and where they are kept.
#[derive(Debug, clap::Args)]
pub struct ResultArgs {
    #[command(flatten)]
    format: OutputArgs,

    /// Write the nodes with which it went well to this file
    #[arg(long, value_name = "FILE")]
    ok_file: Option<PathBuf>,

    /// Write the others to this file
    #[arg(long, value_name = "FILE")]
    ko_file: Option<PathBuf>,
}

/// What became of one node.
#[derive(Debug, Serialize)]
struct Row {
    node: String,
    ok: bool,
    /// What it is now, or why not.
    text: String,
}

/// What became of all of them, so far.
pub struct Results<'a> {
    out: &'a Out,
    format: OutputArgs,
    folds: bool,
    /// How many there will be.
    total: usize,
    rows: Vec<Row>,
    files: [Option<(File, &'a Path)>; 2],
    /// Why nothing more can be printed.
    broken: Option<Error>,
}

impl std::fmt::Debug for Results<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Results")
    }
}

impl<'a> Results<'a> {
    /// Of `total` nodes. Opens the files, before anything is done.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn new(out: &'a Out, args: &'a ResultArgs, total: usize) -> Result<Self> {
        Ok(Self {
            out,
            format: args.format,
            folds: out.stdout_is_terminal() && total > FOLDED,
            total,
            rows: Vec::new(),
            files: [open(args.ok_file.as_deref())?, open(args.ko_file.as_deref())?],
            broken: None,
        })
    }

    /// There will be so many.
    pub fn expect(&mut self, total: usize) {
        self.total = total;
        self.folds = self.out.stdout_is_terminal() && total > FOLDED;
    }

    pub fn failed(&self) -> usize {
        self.rows.iter().filter(|row| !row.ok).count()
    }

    /// What became of a node: what it is now, or why not.
    pub fn tell(&mut self, node: &str, result: std::result::Result<String, String>) {
        let ok = result.is_ok();
        let row = Row { node: node.to_owned(), ok, text: result.unwrap_or_else(|why| why) };
        match self.format.output {
            None if self.folds => {
                let done = self.rows.len() + 1;
                self.out.transient(&format!("{done} of {} nodes", self.total));
            }
            None => self.print(&format!("{node}: {}\n", row.text)),
            Some(Format::Ndjson) => match serde_json::to_string(&row) {
                Ok(line) => self.print(&format!("{line}\n")),
                Err(error) => self.broken = Some(Error::bug("no JSON of it").because(error)),
            },
            Some(Format::Json | Format::Yaml) => {}
        }
        self.rows.push(row);
    }

    /// A line of what kept a node from it, and why.
    pub fn fail(&mut self, node: &str, error: &Error) {
        let report = error.report();
        self.tell(node, Err(report.trim_start_matches("error: ").trim_end().to_owned()));
    }

    fn print(&mut self, text: &str) {
        if self.broken.is_none() {
            self.broken = self.out.data(text).err();
        }
    }

    /// Shows what was not shown yet and writes the files; the exit code.
    ///
    /// # Errors
    /// When a file cannot be written, or nobody could be told of a success.
    pub fn end(mut self, code: u8) -> Result<u8> {
        self.out.end_progress();
        match self.format.output {
            None => {
                let folded = if self.folds { fold(&self.rows) } else { String::new() };
                let success = self.rows.len() - self.failed();
                self.print(&format!("{folded}\nSuccess: {success}  Total: {}\n", self.total));
            }
            Some(Format::Ndjson) => {}
            Some(Format::Json | Format::Yaml) => {
                self.broken = self.out.list(self.format, &self.rows, &[]).err();
            }
        }
        let files = std::mem::take(&mut self.files);
        for (file, ok) in files.into_iter().zip([true, false]) {
            let nodes = self.rows.iter().filter(|row| row.ok == ok).map(|row| &row.node);
            write(file, &nodes.collect())?;
        }
        let code = match code {
            0 if self.failed() > 0 => Kind::Partial.exit_code(),
            code => code,
        };
        match self.broken {
            // They have read what they wanted.
            Some(error) if code == 0 && !is_gone(&error) => Err(error),
            Some(error) => {
                self.out.status(error.report().trim_end());
                Ok(code)
            }
            None => Ok(code),
        }
    }
}

/// Those alike in one line, `n[1-99] (99): on`.
fn fold(rows: &[Row]) -> String {
    let texts: BTreeSet<&str> = rows.iter().map(|row| row.text.as_str()).collect();
    let line = |text: &str| {
        let alike = rows.iter().filter(|row| row.text == text);
        let nodes: NodeSet = alike.map(|row| &row.node).collect();
        format!("{nodes} ({}): {text}\n", nodes.len())
    };
    // By their texts at once, where there are many of them.
    if texts.len() > rows.len() / 2 {
        return rows.iter().map(|row| format!("{}: {}\n", row.node, row.text)).collect();
    }
    texts.into_iter().map(line).collect()
}

/// Whether it says that whoever read went away.
fn is_gone(error: &Error) -> bool {
    let io = error.source().and_then(|it| it.downcast_ref::<io::Error>());
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn open(file: Option<&Path>) -> Result<Option<(File, &Path)>> {
    let Some(path) = file else { return Ok(None) };
    // What it has is kept until there is something new.
    let file = File::options().create(true).write(true).truncate(false).open(path);
    Ok(Some((file.while_doing(|| format!("opening `{}`", path.display()))?, path)))
}

/// A set of nodes as a file.
fn write(file: Option<(File, &Path)>, nodes: &NodeSet) -> Result<()> {
    let Some((mut file, path)) = file else { return Ok(()) };
    let text = match nodes.is_empty() {
        true => String::new(),
        false => format!("{nodes}\n"),
    };
    // A device or a pipe has no length.
    let _ = file.set_len(0);
    file.write_all(text.as_bytes()).while_doing(|| format!("writing `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(node: &str, text: &str) -> Row {
        Row { node: node.into(), ok: true, text: text.into() }
    }

    #[test]
    fn those_alike_are_one_line() {
        let mut rows: Vec<Row> = (1..=99).map(|it| row(&format!("n{it}"), "on")).collect();
        rows.insert(3, row("x5", "off"));
        assert_eq!(fold(&rows), "x5 (1): off\nn[1-99] (99): on\n");
        // Where nothing is alike they are in the order of their answers.
        let rows = [row("b", "1 s"), row("a", "2 s")];
        assert_eq!(fold(&rows), "b: 1 s\na: 2 s\n");
    }
}
