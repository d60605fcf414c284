//! The inventory in a store: read whole, changed in commits that each require that nobody
//! else has changed it since.
//!
//! A change is checked as a whole before its first commit: [`plan`]. It may be larger than a
//! commit: then an [`Operation`] beside it says how far it is, in each commit anew
//! ([`journal`]). Who is interrupted has written some records and not others, and the same
//! command finishes.
//!
//! [`Book`] lives as long as a command, or for weeks in a daemon. What it has in memory is
//! what the store has, also after a commit has failed; [`shown`] tells from memory alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Context, Error, Result};
use crate::host::crash;
use crate::model::node::inventory::Inventory;
use crate::model::node::operation::Operation;
use crate::model::node::records::Record;
use crate::model::node::request::{Noun, Outcome, Request};
use crate::store::embedded;
use crate::store::secret::vault::Vault;
use crate::store::{
    Change, Check, Commit, Entry, MAX_COMMIT_BYTES, MAX_OPERATIONS, MAX_PAGE, Revision, Store, keys,
};

mod heed;
mod journal;
mod plan;
mod shown;

pub use journal::Ids;
pub use shown::{Rows, export, export_locked, lock, opened, rows};

/// How often a change is decided anew, when others have changed what it was decided on.
const TRIES: usize = 5;

/// What the store in `dir` knows of the machines below; without a store, nothing.
///
/// # Errors
/// When the store cannot be read.
pub async fn read(dir: &Path) -> Result<Inventory> {
    match embedded::open_existing(dir).await? {
        Some(store) => Ok(load(&store).await?.0),
        None => Ok(Inventory::default()),
    }
}

/// The latest long changes of the inventory of the store in `dir`.
///
/// # Errors
/// When the store cannot be read.
pub async fn operations(dir: &Path) -> Result<Vec<Operation>> {
    match embedded::open_existing(dir).await? {
        Some(store) => Ok(journal::load(&store).await?.into_values().collect()),
        None => Ok(Vec::new()),
    }
}

/// The inventory, and the revision of its latest change.
async fn load(store: &dyn Store) -> Result<(Inventory, Option<Revision>)> {
    // Before the rest: whoever changes that meanwhile has changed this, too.
    let latest = store.get(&keys::inventory_counter()).await?.map(|entry| entry.revision);
    let mut inventory = Inventory::default();
    for noun in Noun::ALL {
        let mut take = |entry: &Entry| {
            let Some(name) = keys::parse_record(noun, &entry.key) else { return Ok(()) };
            inventory.put_record(noun, &name, record(noun, entry)?);
            Ok(())
        };
        pages(store, &keys::records(noun), &mut take).await?;
    }
    Ok((inventory, latest))
}

/// A record. One that cannot be read can be deleted, and is not the end of all others.
fn record(noun: Noun, entry: &Entry) -> Result<Record> {
    Record::from_json(noun, &entry.value).or_else(|error| {
        let what = format!("what is stored of it cannot be read: {}", error.report());
        Record::from_tree(noun, [("notes".to_owned(), what.into())].into_iter().collect())
    })
}

/// Reads what is below a prefix, a page at a time.
async fn pages(
    store: &dyn Store,
    prefix: &str,
    take: &mut (dyn FnMut(&Entry) -> Result<()> + Send),
) -> Result<()> {
    let mut page = store.list(prefix, None, MAX_PAGE).await?;
    loop {
        page.entries.iter().try_for_each(&mut *take)?;
        let Some(last) = page.entries.last().filter(|_| page.more) else { return Ok(()) };
        page = store.list(prefix, Some(&last.key.clone()), MAX_PAGE).await?;
    }
}

/// The inventory, to be changed.
#[derive(Debug)]
pub struct Book {
    store: Arc<dyn Store>,
    vault: Vault,
    /// What must hold besides, so that the change is ours to make.
    fence: Option<Check>,
    /// The latest change, when the rest was read, or ours.
    latest: Option<Revision>,
    /// A commit has failed, and what it did is not known.
    in_doubt: bool,
    ops: BTreeMap<u64, Operation>,
    /// Our latest commits.
    own: BTreeSet<Revision>,
    ids: Ids,
    /// Who asks for changes, as operations say.
    pub user: String,
    pub inventory: Inventory,
}

/// Why a change was not made.
#[derive(Debug)]
enum Failure {
    /// Somebody else has changed the inventory; nothing of this was done.
    Conflict,
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Book {
    /// Opens the inventory of the store in `dir`; makes both.
    ///
    /// # Errors
    /// When the store cannot be opened or read.
    pub async fn open(dir: &Path) -> Result<Self> {
        Self::over(Arc::new(embedded::open(dir).await?), Vault::open(dir)?, None).await
    }

    /// The inventory of a store; its changes are made only while `fence` holds. Who has one
    /// is the only writer.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn over(store: Arc<dyn Store>, vault: Vault, fence: Option<Check>) -> Result<Self> {
        let uid = nix::unistd::Uid::effective();
        let account = nix::unistd::User::from_uid(uid).ok().flatten();
        let mut book = Self {
            store,
            vault,
            fence,
            latest: None,
            in_doubt: true,
            ops: BTreeMap::new(),
            own: BTreeSet::new(),
            ids: Ids::default(),
            user: account.map_or_else(|| uid.to_string(), |account| account.name),
            inventory: Inventory::default(),
        };
        book.settle().await.while_doing(|| "reading the inventory".into())?;
        book.bury().await;
        Ok(book)
    }

    /// Where operations get their numbers from.
    pub fn ids(&self) -> Ids {
        self.ids.clone()
    }

    /// What opens its secrets.
    pub fn vault(&self) -> &Vault {
        &self.vault
    }

    /// Does what is asked, or, if it is asked so, only says what that would be.
    ///
    /// # Errors
    /// When it cannot be done; then nothing was. When the store fails while it is done: then
    /// some of it was, if it takes several commits, and an operation says how much.
    pub async fn apply(&mut self, request: &Request) -> Result<Vec<Outcome>> {
        // Others may have changed it, unless a fence keeps them from that.
        self.in_doubt |= self.fence.is_none();
        for _ in 0..TRIES {
            self.settle().await.while_doing(|| "reading the inventory anew".into())?;
            self.bury().await;
            let plan = self.plan(request)?;
            if request.dry_run {
                return Ok(plan.outcomes);
            }
            let noun = plan::changed(request);
            let before = self.latest;
            match self.carry_out(noun, plan::words(request), plan.changes).await {
                Ok(()) => return Ok(plan.outcomes),
                Err(Failure::Other(error)) => return Err(error),
                Err(Failure::Conflict) => {}
            }
            self.settle().await.while_doing(|| "reading the inventory anew".into())?;
            if self.latest == before {
                return Err(Error::system("somebody else is to change the inventory now"))
                    .while_doing(|| "changing the inventory".into());
            }
        }
        Err(crowded()).while_doing(|| "changing the inventory".into())
    }

    /// Makes memory what the store is, if that is not known.
    async fn settle(&mut self) -> Result<()> {
        if !self.in_doubt {
            return Ok(());
        }
        let latest = self.store.get(&keys::inventory_counter()).await?.map(|it| it.revision);
        // A commit that is still to come fails: its counter is not the latest then.
        if latest != self.latest || latest.is_none() {
            let (inventory, latest) = load(&*self.store).await?;
            self.ops = journal::load(&*self.store).await?;
            self.ops.keys().for_each(|id| self.ids.seen(*id));
            // Orders are kept elsewhere.
            self.ops.retain(|_, operation| operation.order.is_none());
            (self.inventory, self.latest) = (inventory, latest);
        }
        self.in_doubt = false;
        Ok(())
    }

    /// Makes changes, as many at once as a store takes.
    async fn carry_out(
        &mut self,
        noun: Noun,
        words: String,
        changes: Vec<(String, Option<Record>)>,
    ) -> Result<(), Failure> {
        if changes.is_empty() {
            return Ok(());
        }
        crash::point("inventory.planned")?;
        let (first, taken) = match self.is_all(noun, &changes) {
            true => (vec![Change::DeletePrefix { prefix: keys::records(noun) }], changes.len()),
            false => batch(noun, &changes, MAX_OPERATIONS - 1)?,
        };
        if taken == changes.len() {
            self.commit(first).await?;
            changes.into_iter().for_each(|change| self.take(noun, change));
            return Ok(crash::point("inventory.done")?);
        }
        let (mut operation, opening) = self.begin(words, changes.len());
        let mut rest = changes.into_iter();
        let mut begun = Some(opening);
        while !rest.as_slice().is_empty() {
            let mut whole = begun.clone().unwrap_or_default();
            let result = match batch(noun, rest.as_slice(), MAX_OPERATIONS - 2 - whole.len()) {
                Ok((changes, taken)) => {
                    operation.done += taken;
                    if taken == rest.len() {
                        journal::finish(&mut operation);
                    }
                    whole.extend(changes);
                    whole.push(Change::put_json(keys::op(operation.id), &operation)?);
                    self.commit(whole).await.map(|()| taken)
                }
                Err(error) => Err(Failure::Other(error)),
            };
            match result {
                Ok(taken) => {
                    rest.by_ref().take(taken).for_each(|change| self.take(noun, change));
                    let is_first = begun.take().is_some();
                    self.note(&operation, is_first);
                    crash::point(if is_first { "inventory.begun" } else { "inventory.shard" })?;
                }
                Err(failure) if begun.is_some() => return Err(failure),
                Err(failure) => return Err(Failure::Other(self.stop(operation, failure).await)),
            }
        }
        Ok(crash::point("inventory.done")?)
    }

    /// Whether these are all records of a kind, to be deleted.
    fn is_all(&self, noun: Noun, changes: &[(String, Option<Record>)]) -> bool {
        changes.len() == self.inventory.stored(noun).count()
            && changes.iter().all(|(_, record)| record.is_none())
    }

    /// Takes into memory what was stored.
    fn take(&mut self, noun: Noun, (name, record): (String, Option<Record>)) {
        match record {
            Some(record) => self.inventory.put_record(noun, &name, record),
            None => drop(self.inventory.remove_record(noun, &name)),
        }
    }

    /// Makes some changes at once, if nobody else has made any.
    async fn commit(&mut self, mut changes: Vec<Change>) -> Result<(), Failure> {
        let key = keys::inventory_counter();
        let check = match self.latest {
            Some(revision) => Check::Revision(key.clone(), revision),
            None => Check::Absent(key.clone()),
        };
        let checks: Vec<Check> = self.fence.iter().cloned().chain([check]).collect();
        changes.push(Change::put_json(key, &())?);
        let doing = || "changing the inventory".to_owned();
        // What comes of it is not known before it is; also if nobody waits for it any more.
        self.in_doubt = true;
        match self.store.commit(&checks, &changes).await.while_doing(doing)? {
            Commit::Done(revision) => {
                crash::point("inventory.committed")?;
                self.own(revision);
                self.latest = Some(revision);
                self.in_doubt = false;
                Ok(())
            }
            Commit::Conflict(_) => Err(Failure::Conflict),
        }
    }
}

fn crowded() -> Error {
    Error::system("somebody else has changed it at the same time").help("run the command again")
}

/// The first of these changes, as many as fit into a commit with `most` of them.
fn batch(
    noun: Noun,
    changes: &[(String, Option<Record>)],
    most: usize,
) -> Result<(Vec<Change>, usize)> {
    let (mut batch, mut bytes) = (Vec::new(), 4096);
    for (name, record) in changes.iter().take(most) {
        let key = keys::record(noun, name);
        let change = match record {
            None => Change::delete(key),
            Some(record) => Change::Put { key, value: record.to_json()?, lease: None },
        };
        bytes += match &change {
            Change::Put { key, value, .. } => 2 * key.len() + value.len(),
            Change::Delete { key } | Change::DeletePrefix { prefix: key } => 2 * key.len(),
        };
        if bytes > MAX_COMMIT_BYTES {
            break;
        }
        batch.push(change);
    }
    match (batch.len(), changes.first()) {
        (0, Some((name, _))) => Err(Error::usage(format!("what `{name}` says is too much"))),
        (taken, _) => Ok((batch, taken)),
    }
}

#[cfg(test)]
mod tests;
