//! The crate's one error type.
//!
//! An [`Error`] answers three questions in order: what was being done (the
//! chain, outermost first), why it failed (the innermost source) and what the
//! reader can do about it (`help`). `Display` prints only the error's own line;
//! [`Error::report`] is the single place that walks the chain, so no message is
//! ever printed twice.

use std::error::Error as StdError;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A result whose error is, unless said otherwise, an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who has to act on a failure. Decides the exit code, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Some of several targets failed; each has said so already.
    Partial = 1,
    /// The request itself is wrong: the user changes the command line.
    Usage = 2,
    /// A configuration file is wrong: its owner edits it.
    Config = 3,
    /// The thing named does not exist, or is not the caller's.
    NotFound = 4,
    /// The host, the scheduler, the store or QEMU refused: look at the cause.
    System = 5,
    /// More of several targets failed than were allowed to; the rest were not tried.
    FailLimit = 6,
    /// An invariant of ours is broken: please report it.
    Bug = 70,
    /// The user, or the time limit, ended it.
    Interrupted = 130,
}

impl Kind {
    /// The process exit code that documents this kind (DESIGN, "Exit codes").
    pub fn exit_code(self) -> u8 {
        self as u8
    }
}

/// A failure, with the operation it interrupted and what to do next.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    what: String,
    help: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Returns an error saying `what` went wrong, as a fragment that would
    /// follow "error: " (lower case, no final period).
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, what: what.into(), help: None, source: None }))
    }

    /// The request is wrong ([`Kind::Usage`]).
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Kind::Usage, what)
    }

    /// A configuration file is wrong ([`Kind::Config`]).
    pub fn config(what: impl Into<String>) -> Self {
        Self::new(Kind::Config, what)
    }

    /// Something named does not exist ([`Kind::NotFound`]).
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, what)
    }

    /// The machine refused ([`Kind::System`]).
    pub fn system(what: impl Into<String>) -> Self {
        Self::new(Kind::System, what)
    }

    /// An invariant of ours is broken ([`Kind::Bug`]).
    pub fn bug(what: impl Into<String>) -> Self {
        Self::new(Kind::Bug, what)
    }

    /// Adds one line telling the reader how to get out of it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.0.help = Some(help.into());
        self
    }

    /// Adds what caused it.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Who has to act.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Renders the whole chain, then every help line, for a terminal or a log.
    pub fn report(&self) -> String {
        let mut text = format!("error: {self}");
        let mut help = Vec::from_iter(self.0.help.as_deref());
        let mut cause = self.source();
        while let Some(error) = cause {
            text += &format!("\n  because: {}", error.to_string().replace('\n', "\n    "));
            help.extend(error.downcast_ref::<Error>().and_then(|e| e.0.help.as_deref()));
            cause = error.source();
        }
        for line in help {
            text += &format!("\n  help: {line}");
        }
        text
    }

    /// The error as plain data, to cross a process boundary.
    pub fn to_wire(&self) -> WireError {
        let mut because = Vec::new();
        let mut help = Vec::from_iter(self.0.help.clone());
        let mut cause = self.source();
        while let Some(error) = cause {
            because.push(error.to_string());
            help.extend(error.downcast_ref::<Error>().and_then(|e| e.0.help.clone()));
            cause = error.source();
        }
        WireError { kind: self.kind(), what: self.to_string(), because, help }
    }
}

/// An [`Error`] as data: what one process tells another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireError {
    pub kind: Kind,
    pub what: String,
    pub because: Vec<String>,
    pub help: Vec<String>,
}

impl From<WireError> for Error {
    fn from(wire: WireError) -> Self {
        let mut help = wire.help.into_iter().rev();
        let mut source: Option<Error> = None;
        for what in wire.because.into_iter().rev() {
            let mut error = Error::new(wire.kind, what);
            error.0.help = if source.is_none() { help.next() } else { None };
            error.0.source = source.map(Into::into);
            source = Some(error);
        }
        let mut error = Error::new(wire.kind, wire.what);
        error.0.source = source.map(Into::into);
        let rest: Vec<String> = help.rev().collect();
        if !rest.is_empty() {
            error.0.help = Some(rest.join("\n  help: "));
        }
        error
    }
}

/// Says what was being attempted when a lower layer failed.
pub trait Context<T> {
    /// Wraps the error as having happened while doing `what` ("reading `…`").
    /// An [`Error`] keeps its kind; anything else becomes [`Kind::System`].
    fn while_doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for Result<T, E> {
    fn while_doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| {
            let source = source.into();
            let kind = source.downcast_ref::<Error>().map_or(Kind::System, Error::kind);
            let mut error = Error::new(kind, what());
            error.0.source = Some(source);
            error
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.report())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed_port() -> Error {
        let missing = std::io::Error::other("no such device");
        Err::<(), _>(missing)
            .while_doing(|| "adding port `pt42-0` to bridge `pb42`".into())
            .map_err(|e| e.help("load the kernel module: `modprobe openvswitch`"))
            .while_doing(|| "setting up job 42 on `node7`".into())
            .unwrap_err()
    }

    const REPORT: &str = "error: setting up job 42 on `node7`\
         \n  because: adding port `pt42-0` to bridge `pb42`\
         \n  because: no such device\
         \n  help: load the kernel module: `modprobe openvswitch`";

    #[test]
    fn a_report_reads_from_the_goal_down_to_the_cause_then_helps() {
        let error = failed_port();
        assert_eq!(error.kind(), Kind::System);
        assert_eq!(error.report(), REPORT);
    }

    #[test]
    fn an_error_reads_the_same_on_the_other_side_of_a_process_boundary() {
        let wire = serde_json::to_string(&failed_port().to_wire()).unwrap();
        let error: Error = serde_json::from_str::<WireError>(&wire).unwrap().into();
        assert_eq!(error.kind(), Kind::System);
        assert_eq!(error.report(), REPORT);
    }
}
