//! Settings as they lie in memory: as they are stored.
//!
//! A hundred thousand nodes are kept, and few are looked at. As text, and in one piece, a node
//! takes a quarter of the room that [`Settings`] take with all that they could say, and there
//! is nothing to be done to store it.

use std::sync::Arc;

use super::glance::Glance;
use super::{Settings, Tree};
use crate::error::{Context, Result};

/// Settings that were read once, or written by us. Who wants to look at them opens them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed(Arc<str>);

impl Packed {
    /// What was stored.
    ///
    /// # Errors
    /// When these are no settings.
    pub fn read(json: &[u8]) -> Result<Self> {
        // Written anew: there are other texts of the same settings, and trees of some are others.
        let settings = serde_json::from_slice::<Settings>(json);
        settings.map(Self::from).while_doing(|| "reading a record".into())
    }

    /// As they are stored.
    pub fn json(&self) -> &str {
        &self.0
    }

    /// As they are looked at.
    ///
    /// # Panics
    /// Never: they were read before.
    pub fn open(&self) -> Settings {
        serde_json::from_str(&self.0).expect("what is packed are settings")
    }

    /// What others want to know of them.
    ///
    /// # Panics
    /// Never: they were read before.
    pub(super) fn glance(&self) -> Glance<'_> {
        serde_json::from_str(&self.0).expect("what is packed are settings")
    }

    /// As a tree.
    ///
    /// # Errors
    /// Never for what was read.
    pub fn tree(&self) -> Result<Tree> {
        serde_json::from_str(&self.0).while_doing(|| "reading a record".into())
    }
}

impl From<&Settings> for Packed {
    fn from(settings: &Settings) -> Self {
        let text = serde_json::to_string(settings).expect("settings are always valid JSON");
        Self(text.into())
    }
}

impl From<Settings> for Packed {
    fn from(settings: Settings) -> Self {
        Self::from(&settings)
    }
}

impl Default for Packed {
    fn default() -> Self {
        Self("{}".into())
    }
}
