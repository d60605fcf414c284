//! What is wrong in a file, where, and what was probably meant.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::yaml::Mark;

/// A mistake in a configuration file, or something its owner should know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    pub file: PathBuf,
    /// From 1; 0 when the file as a whole is meant.
    pub line: usize,
    /// In characters, from 1; 0 when the file as a whole is meant.
    pub column: usize,
    /// The key with those it lies under, such as `nat.settings.mtu`; may be empty.
    pub key: String,
    pub message: String,
    /// The valid word nearest to the one found.
    pub suggestion: Option<String>,
}

impl Problem {
    pub(super) fn new(
        file: impl Into<PathBuf>,
        mark: Mark,
        key: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            file: file.into(),
            line: mark.line,
            column: mark.column,
            key: key.into(),
            message: message.into(),
            suggestion: None,
        }
    }
}

impl fmt::Display for Problem {
    /// `FILE:LINE:COLUMN: KEY: message; did you mean `word`?`, always one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.line > 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        if !self.key.is_empty() {
            write!(f, " {}:", one_line(&self.key))?;
        }
        write!(f, " {}", one_line(&self.message))?;
        match &self.suggestion {
            Some(word) => write!(f, "; did you mean `{}`?", one_line(word)),
            None => Ok(()),
        }
    }
}

/// The text without anything that ends a line or that a terminal would obey.
fn one_line(text: &str) -> String {
    let escaped = |letter: char| match letter {
        letter if letter.is_control() => letter.escape_default().to_string(),
        letter => letter.to_string(),
    };
    text.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::nearest::nearest;

    #[test]
    fn the_nearest_word_is_found_and_a_far_one_is_not_offered() {
        let words = ["image", "inherits", "description", "disk-model"];
        assert_eq!(nearest("descripton", words).as_deref(), Some("description"));
        assert_eq!(nearest("Image", words).as_deref(), Some("image"));
        assert_eq!(nearest("disk-modle", words).as_deref(), Some("disk-model"));
        assert_eq!(nearest("cores", words), None);
        assert_eq!(nearest("", words), None);
    }

    #[test]
    fn a_problem_is_one_line_whatever_the_file_holds() {
        let mark = Mark { line: 3, column: 7 };
        let mut problem = Problem::new("a.yaml", mark, "x\n\x1b[2J", "unknown setting");
        problem.suggestion = Some("y".into());
        assert_eq!(
            problem.to_string(),
            "a.yaml:3:7: x\\n\\u{1b}[2J: unknown setting; did you mean `y`?"
        );
        let whole = Problem::new("a.yaml", Mark::default(), "", "permission denied");
        assert_eq!(whole.to_string(), "a.yaml: permission denied");
    }
}
