//! What commands and the daemon say to each other, as JSON over HTTP.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::node::request::Outcome;

/// The version that paths begin with.
pub const VERSION: u32 = 1;

/// Records that are to be made, or changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// A set of names, `node[1-25]`.
    pub names: String,
    /// Settings, as `path=value`.
    #[serde(default)]
    pub edits: Vec<String>,
    #[serde(default)]
    pub dry_run: bool,
}

/// What came of each record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcomes {
    pub outcomes: Vec<Outcome>,
}

/// A record, as it is shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    pub settings: Map<String, Value>,
}

/// Records, and what was asked for and is not there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rows {
    pub rows: Vec<Row>,
    pub missing: Vec<Outcome>,
}

/// Records that are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Names {
    /// A set of names, `node[1-25]`.
    pub names: String,
}

/// Records as the text of a file, and what was asked for and is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    pub text: String,
    /// How many it has.
    pub count: usize,
    pub missing: Vec<Outcome>,
}

/// A daemon, as it tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub kind: String,
    pub host: String,
    pub version: String,
    pub pid: u32,
    /// When it began, in seconds since 1970.
    pub begun: u64,
    /// Whether it is the one that writes, or waits to be.
    pub active: bool,
}

/// The daemons there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Services {
    pub services: Vec<Service>,
}
