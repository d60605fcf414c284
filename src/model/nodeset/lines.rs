//! Sets in files and on standard input: one a line, `#` begins a comment.

use super::Builder;
use super::expr::Expr;
use super::name;
use super::parse::parse;
use crate::error::{Context, Result};

/// What a text of many lines holds.
#[derive(Debug, Default)]
pub struct Lines {
    /// Plain names, which most lines are.
    pub names: Builder,
    /// The others, with their line numbers.
    pub exprs: Vec<(usize, Expr)>,
}

/// Reads a file's text; `what` is its name, for errors.
///
/// # Errors
/// When a line is no set: it is named with its number.
pub fn read(text: &str, what: &str) -> Result<Lines> {
    let mut lines = Lines::default();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (index, line) in text.lines().enumerate() {
        let line = without_comment(line).trim();
        if line.is_empty() {
            continue;
        }
        let doing = || format!("reading line {} of {what}", index + 1);
        if name::wrong_with(line).is_none() {
            lines.names.add(line).while_doing(doing)?;
        } else {
            lines.exprs.push((index + 1, parse(line).while_doing(doing)?));
        }
    }
    Ok(lines)
}

/// What comes before a `#` at the beginning, or after a blank.
fn without_comment(line: &str) -> &str {
    let comment = line.match_indices('#').map(|(at, _)| at).find(|at| {
        let before = line[..*at].chars().next_back();
        before.is_none_or(char::is_whitespace)
    });
    &line[..comment.unwrap_or(line.len())]
}
