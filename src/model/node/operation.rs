//! Long work, changes of the inventory and orders to machines: what is told of it while it
//! runs, and after.

use serde::{Deserialize, Serialize};

use crate::model::job::ProcessId;
use crate::model::order::Order;

/// A change that takes several commits, or an order. Its record changes with each of them, so
/// that what it says is true whatever happens in between.
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
    /// Of an order: with how many nodes it did not go well.
    #[serde(default)]
    pub failed: usize,
    pub state: State,
    /// In seconds since 1970.
    pub begun: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
    /// Why it has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What stopped one that is aborted. Older records do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_by: Option<StoppedBy>,
    /// What machines were told to do; a change of the inventory has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
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
    /// Somebody, or a limit, stopped it.
    Aborted,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
            Self::Aborted => "aborted",
        }
    }
}

/// What stops an order before all its nodes were started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoppedBy {
    /// More nodes failed than it allows.
    FailLimit,
    /// Somebody.
    Request,
}

impl StoppedBy {
    /// As the reason says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FailLimit => "more failed than `--fail-limit` allows",
            Self::Request => "it was aborted",
        }
    }
}

/// A process, of this boot of a machine or of one long ago.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writer {
    pub boot: String,
    pub process: ProcessId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_records_that_do_not_say_what_stopped_them_are_read() {
        let text = r#"{"id": 7, "what": "power on n1", "user": "root", "total": 2, "done": 1,
            "state": "aborted", "begun": 1, "reason": "it was aborted"}"#;
        let mut operation: Operation = serde_json::from_str(text).unwrap();
        assert_eq!(operation.stopped_by, None);
        operation.stopped_by = Some(StoppedBy::FailLimit);
        let text = serde_json::to_string(&operation).unwrap();
        assert!(text.contains(r#""stopped_by":"fail-limit""#), "{text}");
        assert_eq!(serde_json::from_str::<Operation>(&text).unwrap(), operation);
    }
}
