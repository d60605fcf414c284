//! The grammar of node sets: text to [`Expr`], errors that point at their place.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::expr::{Expr, Operator, Term, Test, Want};
use super::name;
use super::pattern::{Pattern, Wrong};
use super::{MAX_NAMES, NodeSet, expr::Resolve};
use crate::error::{Error, Result};

/// How deep parentheses may be.
const MAX_DEPTH: usize = 50;

/// The most groups that one pattern of groups, `@rack[1-9]`, names.
const MAX_GROUPS: usize = 10_000;

/// The most brackets and texts between them in such a pattern.
const MAX_PIECES: usize = 64;

/// How much of a long text is shown, on each side of the mistake.
const SHOWN: usize = 30;

/// Reads a set.
///
/// # Errors
/// When it is none: the error shows the place.
pub fn parse(text: &str) -> Result<Expr> {
    let mut parser = Parser { text, at: 0, depth: 0, names: 0 };
    let parsed = parser.set().and_then(|set| match parser.rest() {
        "" => Ok(set),
        _ => Err(Wrong::new(parser.at, "this parenthesis was never opened")),
    });
    parsed.map_err(|wrong| explain(text, &wrong))
}

/// Reads a set and lets `resolve` give what it wants.
///
/// # Errors
/// When it is no set, or an empty one.
pub fn nodes(text: &str, resolve: &mut Resolve<'_>) -> Result<NodeSet> {
    let set = parse(text)?.eval(resolve)?;
    if set.is_empty() { Err(empty(text)) } else { Ok(set) }
}

/// What is said of a set with nothing in it.
pub fn empty(text: &str) -> Error {
    Error::usage(format!("`{}` is a set without any node", short(text)))
        .help("to mean all nodes, write `all`")
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    /// How many names the text stands for so far.
    names: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn wrong<T>(&self, what: impl Into<String>) -> Result<T, Wrong> {
        Err(Wrong::new(self.at, what))
    }

    /// Goes on behind blanks; whether there were any.
    fn blanks(&mut self) -> bool {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches([' ', '\t']).len();
        self.rest().len() < rest.len()
    }

    /// Terms up to the end or a closing parenthesis.
    fn set(&mut self) -> Result<Expr, Wrong> {
        self.blanks();
        let first = match self.peek() {
            Some('!') => {
                let wrong = Wrong::new(self.at, "nothing is before `!` to take it from");
                return Err(wrong.help("to mean all others, write `all!…`"));
            }
            None if self.text.is_empty() => return self.wrong("the text is empty"),
            _ => self.term()?,
        };
        let mut rest = Vec::new();
        loop {
            let blank = self.blanks();
            let Some(letter) = self.peek().filter(|letter| *letter != ')') else {
                return Ok(Expr { first, rest });
            };
            let mut operator = operator(letter);
            self.at += usize::from(operator.is_some());
            if letter == ',' {
                // As in `n[1-9],!n3`.
                self.blanks();
                if self.peek() == Some('!') {
                    self.at += 1;
                    operator = Some(Operator::Without);
                }
            }
            self.blanks();
            match operator.or(blank.then_some(Operator::Union)) {
                Some(operator) => rest.push((operator, self.term()?)),
                None => return self.wrong(name::no_letter(letter)),
            }
        }
    }

    fn term(&mut self) -> Result<Term, Wrong> {
        match self.peek() {
            None => self.wrong("a set is missing at the end"),
            Some('(') => self.parenthesis(),
            Some('@') => self.group(),
            Some('~') => self.matching(),
            Some(letter) if operator(letter).is_some() || letter == ')' => {
                self.wrong(format!("a set is missing before `{letter}`"))
            }
            Some(']') => self.wrong("this bracket was never opened"),
            Some(_) => match self.attribute()? {
                Some(want) => Ok(Term::Want(want)),
                None => self.names(),
            },
        }
    }

    fn parenthesis(&mut self) -> Result<Term, Wrong> {
        let open = self.at;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return self.wrong(format!("parentheses are more than {MAX_DEPTH} deep"));
        }
        self.at += 1;
        let inner = self.set()?;
        if self.peek() != Some(')') {
            return Err(Wrong::new(open, "this parenthesis is not closed"));
        }
        self.at += 1;
        self.depth -= 1;
        Ok(Term::Set(Box::new(inner)))
    }

    fn names(&mut self) -> Result<Term, Wrong> {
        let (start, pattern) = (self.at, self.pattern(&[])?);
        let text = &self.text[start..self.at];
        if text == "all" {
            return Ok(Term::Want(Want::All));
        }
        if let Some(letter) = self.peek().filter(|letter| !ends_term(*letter)) {
            let wrong = Wrong::new(self.at, name::no_letter(letter));
            return Err(match letter {
                ']' => Wrong::new(self.at, "this bracket was never opened"),
                '*' | '?' => wrong.help("write `all`, or a regular expression: `~^n1.*`"),
                '\n' | '\r' => wrong.help("sets in lines: write them to a file and `@FILE`"),
                _ => wrong,
            });
        }
        if let Some(wrong) = pattern.wrong_name(text) {
            return Err(Wrong { at: start + wrong.at, ..wrong });
        }
        self.names = self.names.saturating_add(pattern.count());
        if self.names > MAX_NAMES {
            let what = format!("with this it names more than {MAX_NAMES} nodes");
            return Err(Wrong::new(start, what));
        }
        Ok(Term::Names(pattern))
    }

    fn pattern(&mut self, more: &[char]) -> Result<Pattern, Wrong> {
        let start = self.at;
        let (pattern, length) = Pattern::read(self.rest(), more)
            .map_err(|wrong| Wrong { at: start + wrong.at, ..wrong })?;
        self.at += length;
        Ok(pattern)
    }

    /// `@rack3`, `@rack[1-3]`, `@slurm:debug`, `@list.txt`, `@"a file"`
    fn group(&mut self) -> Result<Term, Wrong> {
        self.at += 1;
        if self.peek() == Some('"') {
            return Ok(Term::Want(Want::File(self.quoted()?)));
        }
        let word = &self.rest()[..word_length(self.rest())];
        if word == "-" || (word.contains(['/', '.']) && !word.contains([':', '['])) {
            self.at += word.len();
            return Ok(Term::Want(Want::File(word.to_owned())));
        }
        let (source, length) = match word.split_once(':') {
            Some((source, _)) => (Some(source.to_owned()), source.len() + 1),
            None => (None, 0),
        };
        if source.as_ref().is_some_and(|it| it.is_empty() || !it.chars().all(name::is_letter)) {
            return self.wrong("the name of a source of groups, such as `slurm`, is missing");
        }
        self.at += length;
        let start = self.at;
        let pattern = self.pattern(&['+', '@'])?;
        match self.peek().filter(|letter| !ends_term(*letter)) {
            Some(letter) => {
                let letter = letter.escape_debug();
                return self.wrong(format!("`{letter}` cannot be in a group's name"));
            }
            None if self.at == start => return self.wrong("the name of a group is missing"),
            None => {}
        }
        if pattern.pieces() > MAX_PIECES {
            let what = format!("a group's name of more than {MAX_PIECES} pieces");
            return Err(Wrong::new(start, what));
        }
        if pattern.count() > MAX_GROUPS {
            let what = format!("{} groups, more than {MAX_GROUPS}", pattern.count());
            return Err(Wrong::new(start, what));
        }
        let mut groups = Vec::new();
        let mut take = |name: &str| {
            groups.push(Term::Want(Want::Group { source: source.clone(), name: name.to_owned() }));
            Ok(())
        };
        pattern.each(&mut take).map_err(|error| Wrong::new(start, error.to_string()))?;
        let first = groups.remove(0);
        if groups.is_empty() {
            return Ok(first);
        }
        let rest = groups.into_iter().map(|term| (Operator::Union, term)).collect();
        Ok(Term::Set(Box::new(Expr { first, rest })))
    }

    /// `~n[0-9]*5`
    fn matching(&mut self) -> Result<Term, Wrong> {
        self.at += 1;
        self.regex().map(|text| Term::Want(Want::Matching(text)))
    }

    /// A regular expression goes to the next comma or blank that is in no bracket.
    fn regex(&mut self) -> Result<String, Wrong> {
        let start = self.at;
        let text = match self.peek() {
            Some('"') => self.quoted()?,
            _ => {
                let text = &self.rest()[..regex_length(self.rest())];
                self.at += text.len();
                text.to_owned()
            }
        };
        if text.is_empty() {
            return Err(Wrong::new(start, "a regular expression is missing"));
        }
        match regex_lite::Regex::new(&text) {
            Ok(_) => Ok(text),
            Err(error) => Err(Wrong::new(start, error.to_string())),
        }
    }

    /// `arch=x86_64`, `control/bmc_address!=10.0.0.1`, `notes~="a b"`; `None` if it is none.
    fn attribute(&mut self) -> Result<Option<Want>, Wrong> {
        let rest = self.rest();
        let is_path = |letter| name::is_letter(letter) || letter == '/';
        let length = rest.find(|letter| !is_path(letter)).unwrap_or(rest.len());
        let (path, after) = rest.split_at(length);
        let found = [(Test::IsNot, "!="), (Test::Matches, "~="), (Test::Is, "=")];
        let Some((test, sign)) = found.into_iter().find(|(_, sign)| after.starts_with(sign)) else {
            return Ok(None);
        };
        if path.is_empty() {
            return self.wrong("the name of an attribute is missing");
        }
        self.at += length + sign.len();
        let value = match self.peek() {
            _ if test == Test::Matches => self.regex()?,
            Some('"') => self.quoted()?,
            _ => {
                let value = &self.rest()[..word_length(self.rest())];
                self.at += value.len();
                value.to_owned()
            }
        };
        Ok(Some(Want::Attribute { path: path.to_owned(), test, value }))
    }

    /// Text between double quotes, in which `\` keeps the next letter from meaning anything.
    fn quoted(&mut self) -> Result<String, Wrong> {
        let open = self.at;
        let mut text = String::new();
        let mut letters = self.rest().char_indices().skip(1);
        while let Some((at, letter)) = letters.next() {
            match letter {
                '"' => {
                    self.at += at + 1;
                    return Ok(text);
                }
                '\\' => text.extend(letters.next().map(|(_, letter)| letter)),
                letter => text.push(letter),
            }
        }
        Err(Wrong::new(open, "this quote is not closed"))
    }
}

fn operator(letter: char) -> Option<Operator> {
    match letter {
        ',' => Some(Operator::Union),
        '!' => Some(Operator::Without),
        '&' => Some(Operator::InBoth),
        '^' => Some(Operator::InOne),
        _ => None,
    }
}

/// Whether a letter is behind a term.
fn ends_term(letter: char) -> bool {
    operator(letter).is_some() || matches!(letter, ' ' | '\t' | '(' | ')')
}

/// How long the word is that the text begins with; what is in brackets belongs to it.
fn word_length(text: &str) -> usize {
    let mut depth = 0_usize;
    let end = text.find(|letter| {
        match letter {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && ends_term(letter)
    });
    end.unwrap_or(text.len())
}

/// How long the regular expression is that the text begins with.
fn regex_length(text: &str) -> usize {
    let (mut depth, mut escaped) = (0_usize, false);
    let end = text.find(|letter| {
        let ends = depth == 0 && !escaped && matches!(letter, ',' | ' ' | '\t' | ')');
        match letter {
            _ if escaped => {}
            '[' | '(' | '{' => depth += 1,
            ']' | ')' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        escaped = letter == '\\' && !escaped;
        ends
    });
    end.unwrap_or(text.len())
}

/// The error, with the part of the text where it is and a mark below.
fn explain(text: &str, wrong: &Wrong) -> Error {
    let (before, after) = text.split_at_checked(wrong.at).unwrap_or((text, ""));
    let dots = |cut: bool| if cut { "…" } else { "" };
    let skipped = before.chars().count().saturating_sub(SHOWN);
    let before: String = before.chars().skip(skipped).map(visible).collect();
    let before = format!("{}{before}", dots(skipped > 0));
    let cut = dots(after.chars().nth(SHOWN).is_some());
    let after: String = after.chars().take(SHOWN).map(visible).collect();
    let mark = " ".repeat(before.width());
    let what = &wrong.what;
    let error = Error::usage(format!("`{}` is no set of nodes", short(text)))
        .because(format!("{what}:\n{before}{after}{cut}\n{mark}^"));
    match &wrong.help {
        Some(help) => error.help(help),
        None => error,
    }
}

/// A letter as one that a terminal shows and does not obey.
fn visible(letter: char) -> char {
    if letter.width().is_none() { '·' } else { letter }
}

/// The beginning of a text.
fn short(text: &str) -> String {
    let cut = text.chars().nth(2 * SHOWN).is_some();
    let shown: String = text.chars().take(2 * SHOWN).map(visible).collect();
    format!("{shown}{}", if cut { "…" } else { "" })
}
