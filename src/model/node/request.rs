//! What is asked of an inventory, be it here or of its daemon.

use serde::{Deserialize, Serialize};

/// What an inventory keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Noun {
    Node,
    /// What nodes inherit that are in it.
    Group,
    /// What nodes and groups inherit that name it.
    Profile,
    Net,
    Passwd,
    Project,
}

impl Noun {
    pub const ALL: [Self; 6] =
        [Self::Node, Self::Group, Self::Profile, Self::Net, Self::Passwd, Self::Project];

    /// As commands and messages have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Group => "group",
            Self::Profile => "profile",
            Self::Net => "net",
            Self::Passwd => "passwd",
            Self::Project => "project",
        }
    }

    /// In a sentence.
    pub fn what(self) -> &'static str {
        match self {
            Self::Net => "network",
            Self::Passwd => "password record",
            other => other.as_str(),
        }
    }

    /// As paths of the API have it.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Node => "nodes",
            Self::Group => "groups",
            Self::Profile => "profiles",
            Self::Net => "nets",
            Self::Passwd => "passwds",
            Self::Project => "projects",
        }
    }
}

/// What a file of records is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `{"nodes": [{"name": …}]}`, xcat3's.
    Json,
    /// `nodes: {node1: …}`
    Yaml,
    /// A line for each record, a column for each setting.
    Csv,
    /// ClusterShell's groups, `rack1: node[1-4]`: who is in which.
    Groups,
}

/// A change of records of one kind.
///
/// `names` is the text of a set. What it leaves to others than the inventory (files, Slurm) is
/// filled in before, by who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub noun: Noun,
    pub verb: Verb,
    /// Only say what would be.
    pub dry_run: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verb {
    /// With settings as `path=value`.
    Create {
        names: String,
        edits: Vec<String>,
    },
    Update {
        names: String,
        edits: Vec<String>,
    },
    Delete {
        names: String,
    },
    /// The records of a file, which messages call `what`.
    Import {
        format: Format,
        text: String,
        what: String,
    },
}

impl Verb {
    /// As commands and messages have it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Create { .. } => "create",
            Self::Update { .. } => "update",
            Self::Delete { .. } => "delete",
            Self::Import { .. } => "import",
        }
    }
}

/// What came of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub name: String,
    pub ok: bool,
    /// `updated`, or what was wrong.
    pub text: String,
}

impl Outcome {
    pub fn ok(name: impl Into<String>, text: &str) -> Self {
        Self { name: name.into(), ok: true, text: text.into() }
    }

    pub fn failed(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { name: name.into(), ok: false, text: text.into() }
    }

    /// A record that is not there.
    pub fn missing(name: impl Into<String>) -> Self {
        Self::failed(name, "Could not be found.")
    }
}
