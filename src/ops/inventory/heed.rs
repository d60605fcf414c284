//! What others write into the inventory behind a book's back: somebody with etcd's own tools, a
//! backup that is put back.
//!
//! A watch tells of it, some time later: what is taken then is what the store has now, so that
//! it matters neither how late nor in which order one hears of it.

use super::{Book, record};
use crate::error::{Context, Result};
use crate::model::node::request::Noun;
use crate::store::{Revision, keys};

/// How many of our own commits are remembered. One that is forgotten is read again, in vain.
const OWN: usize = 4096;

impl Book {
    /// This commit was ours.
    pub(super) fn own(&mut self, revision: Revision) {
        self.own.insert(revision);
        if self.own.len() > OWN {
            self.own.pop_first();
        }
    }

    /// Takes into memory what a commit of others did to these records. Says whether it was
    /// one of others.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn heed(&mut self, noun: Noun, at: Revision, changed: &[String]) -> Result<bool> {
        if self.own.contains(&at) {
            return Ok(false);
        }
        for key in changed {
            let Some(name) = keys::parse_record(noun, key) else { continue };
            match self.store.get(key).await? {
                Some(entry) => self.inventory.put_record(noun, &name, record(noun, &entry)?),
                None => drop(self.inventory.remove_record(noun, &name)),
            }
        }
        Ok(true)
    }

    /// Takes all into memory anew, when it is not known what others did.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn reread(&mut self) -> Result<()> {
        (self.latest, self.in_doubt) = (None, true);
        self.settle().await.while_doing(|| "reading the inventory anew".into())
    }
}
