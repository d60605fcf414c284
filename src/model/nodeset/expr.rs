//! What a text stands for, as far as the text says it: names, operators, and what others
//! know.

use std::fmt;

use super::pattern::Pattern;
use super::{Builder, NodeSet};
use crate::error::Result;

/// A set in which others may still have a say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expr {
    pub(super) first: Term,
    pub(super) rest: Vec<(Operator, Term)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Term {
    Names(Pattern),
    Want(Want),
    Set(Box<Expr>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Union,
    Without,
    InBoth,
    InOne,
}

/// A set that the text names and others know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Want {
    /// `all`
    All,
    /// `@rack3`, `@slurm:debug`. A name without a source may also be that of a file.
    Group { source: Option<String>, name: String },
    /// `@list.txt`, `@./list`; `@-` is the standard input.
    File(String),
    /// `arch=x86_64`
    Attribute { path: String, test: Test, value: String },
    /// `~n[0-9]*5`: the nodes whose names it matches.
    Matching(String),
}

/// How an attribute is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Test {
    Is,
    IsNot,
    /// A regular expression matches it.
    Matches,
}

impl Test {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Is => "=",
            Self::IsNot => "!=",
            Self::Matches => "~=",
        }
    }
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Group { source: None, name } => write!(f, "@{name}"),
            Self::Group { source: Some(source), name } => write!(f, "@{source}:{name}"),
            Self::File(path) => write!(f, "@{path}"),
            Self::Attribute { path, test, value } => write!(f, "{path}{}{value}", test.as_str()),
            Self::Matching(regex) => write!(f, "~{regex}"),
        }
    }
}

/// Gives what an expression wants.
pub type Resolve<'a> = dyn FnMut(&Want) -> Result<NodeSet> + 'a;

impl Expr {
    /// All that it wants, as it is written: the same perhaps twice.
    pub fn wants(&self) -> Vec<&Want> {
        let of = |term| match term {
            &Term::Names(_) => Vec::new(),
            Term::Want(want) => vec![want],
            Term::Set(inner) => inner.wants(),
        };
        let rest = self.rest.iter().map(|(_, term)| term);
        std::iter::once(&self.first).chain(rest).flat_map(of).collect()
    }

    /// How many names the text itself stands for, each as often as it is written; what
    /// others give comes on top. [`MAX_NAMES`](super::MAX_NAMES) at most, as it is read.
    pub fn count(&self) -> usize {
        let of = |term: &Term| match term {
            Term::Names(pattern) => pattern.count(),
            Term::Want(_) => 0,
            Term::Set(inner) => inner.count(),
        };
        of(&self.first) + self.rest.iter().map(|(_, term)| of(term)).sum::<usize>()
    }

    /// The text of the set, in which another takes the place of some of what it wants.
    pub fn rewritten(&self, other: &mut dyn FnMut(&Want) -> Option<String>) -> String {
        let mut text = rewritten(&self.first, other);
        for (operator, term) in &self.rest {
            text.push(match operator {
                Operator::Union => ',',
                Operator::Without => '!',
                Operator::InBoth => '&',
                Operator::InOne => '^',
            });
            text += &rewritten(term, other);
        }
        text
    }

    /// The set; perhaps an empty one.
    ///
    /// # Errors
    /// Those of `resolve`, and when there are too many names.
    pub fn eval(&self, resolve: &mut Resolve<'_>) -> Result<NodeSet> {
        let mut set = Builder::default();
        add(&self.first, &mut set, resolve)?;
        for (operator, term) in &self.rest {
            if *operator == Operator::Union {
                // Many names in a row are sorted once.
                add(term, &mut set, resolve)?;
                continue;
            }
            let mut other = Builder::default();
            add(term, &mut other, resolve)?;
            let (left, right) = (set.finish()?, other.finish()?);
            set = Builder::default();
            set.add_set(&match operator {
                Operator::Union => left.union(&right),
                Operator::Without => left.without(&right),
                Operator::InBoth => left.in_both(&right),
                Operator::InOne => left.in_one(&right),
            })?;
        }
        set.finish()
    }
}

fn add(term: &Term, set: &mut Builder, resolve: &mut Resolve<'_>) -> Result<()> {
    match term {
        Term::Names(pattern) => pattern.add_to(set),
        Term::Want(want) => set.add_set(&resolve(want)?),
        Term::Set(inner) => set.add_set(&inner.eval(resolve)?),
    }
}

fn rewritten(term: &Term, other: &mut dyn FnMut(&Want) -> Option<String>) -> String {
    match term {
        Term::Names(pattern) => pattern.to_string(),
        Term::Set(inner) => format!("({})", inner.rewritten(other)),
        Term::Want(want) => match (other(want), want) {
            (Some(text), _) => format!("({text})"),
            (None, Want::Matching(regex)) => format!("~{}", quoted(regex)),
            (None, Want::File(path)) => format!("@{}", quoted(path)),
            (None, Want::Attribute { path, test, value }) => {
                format!("{path}{}{}", test.as_str(), quoted(value))
            }
            (None, want) => want.to_string(),
        },
    }
}

/// A text that is read as it is, whatever is in it.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
