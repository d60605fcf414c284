//! Long changes of the inventory: what is told of them while they run, and after.

use serde::{Deserialize, Serialize};

use crate::model::job::ProcessId;

/// A change that takes several commits. Its record changes with each of them, so that what it
/// says is true whatever happens in between.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    pub id: u64,
    /// `update node[1-9999]: arch`
    pub what: String,
    /// Who asked for it.
    pub user: String,
    /// How many records are to be changed.
    pub total: usize,
    pub done: usize,
    pub state: State,
    /// In seconds since 1970.
    pub begun: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
    /// Why it has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Who makes it, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writer: Option<Writer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Running,
    Done,
    Failed,
    /// Whoever made it was gone before its end. The same command finishes it.
    Interrupted,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
        }
    }
}

/// A process, of this boot of a machine or of one long ago.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writer {
    pub boot: String,
    pub process: ProcessId,
}
