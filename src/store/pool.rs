//! Numbers that no two owners may have at once: ids from a pool, and job ids.
//!
//! Each taken id is one key that holds its owner, so that taking and freeing concern
//! only the ids in question, however many there are. One key per pool holds its *floor*:
//! below it no id is free but those that were freed since and are named there. It
//! changes in the same commits, and spares reading what lies below:
//!
//! ```text
//!   0 1 2 3 4 5 6 7 …        taken: 0 1 2 4     floor: 3
//!   ■ ■ ■ · ■ · · ·          take 2 → 3 and 5   floor: 6     free 4 → floor: 6, but 4
//! ```
//!
//! The floor only saves time. Ids below it that it does not name (deleted by other
//! hands, or too many to be named) are found again before the pool counts as exhausted.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::RangeInclusive;
use std::time::Duration;

use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};

use super::{Change, Check, Commit, Entry, MAX_OPERATIONS, MAX_PAGE, Store, keys, list_all};
use crate::error::{Context, Error, Result};
use crate::model::owner::{MAX_LOCAL_JOB, Owner};

/// How often a commit is tried that others keep getting ahead of. With the pauses
/// between, some 10 s.
const ATTEMPTS: u32 = 200;

/// How many freed ids a floor names.
const MAX_NAMED: usize = 512;

/// The longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_millis(100);

/// Ids of one kind.
#[derive(Clone, Debug)]
pub struct Pool<'s> {
    store: &'s dyn Store,
    name: String,
    ids: RangeInclusive<u32>,
}

impl<'s> Pool<'s> {
    /// The pool of this name, which everybody gives the same ids.
    pub fn new(store: &'s dyn Store, name: impl Into<String>, ids: RangeInclusive<u32>) -> Self {
        Self { store, name: name.into(), ids }
    }

    /// Takes the `count` smallest free ids, all or none; returns them ascending.
    ///
    /// # Errors
    /// When fewer are free: says how many there are, and who has them.
    pub async fn take(&self, owner: Owner, count: usize) -> Result<Vec<u32>> {
        let taken = self.take_with(owner, count, &[], &|_| Ok(Vec::new())).await?;
        Ok(taken.unwrap_or_default())
    }

    /// The same, with more changes in the same commit, such as a note of the ids: whoever
    /// dies has taken and noted them, or neither. `None`, and nothing done, when one of
    /// `required` does not hold.
    ///
    /// # Errors
    /// As [`take`](Self::take), and those of `more`.
    pub async fn take_with(
        &self,
        owner: Owner,
        count: usize,
        required: &[Check],
        more: &(dyn Fn(&[u32]) -> Result<Vec<Change>> + Send + Sync),
    ) -> Result<Option<Vec<u32>>> {
        self.try_take(owner, count, required, more)
            .await
            .while_doing(|| format!("taking {count} of the pool `{}` for job {owner}", self.name))
    }

    async fn try_take(
        &self,
        owner: Owner,
        count: usize,
        required: &[Check],
        more: &(dyn Fn(&[u32]) -> Result<Vec<Change>> + Send + Sync),
    ) -> Result<Option<Vec<u32>>> {
        if count >= MAX_OPERATIONS {
            return Err(Error::bug(format!("{} ids at once are the limit", MAX_OPERATIONS - 1)));
        }
        // Named as free, and not so: found out by a conflict.
        let mut taken = BTreeSet::new();
        for attempt in 0..ATTEMPTS {
            pause(attempt).await;
            let (floor, entry) = self.floor().await?;
            let Some((free, floor)) = self.find(floor, count, &taken).await? else {
                return Ok(Some(Vec::new()));
            };
            let mut checks: Vec<Check> = vec![self.floor_unchanged(entry.as_ref())];
            let mut changes = vec![self.put_floor(&floor)?];
            for id in &free {
                checks.push(Check::Absent(self.key(*id)));
                changes.push(Change::put_json(self.key(*id), &owner)?);
            }
            changes.extend(more(&free)?);
            checks.extend_from_slice(required);
            match self.store.commit(&checks, &changes).await? {
                Commit::Done(_) => return Ok(Some(free)),
                Commit::Conflict(now) if !Check::all_hold(required, &now) => return Ok(None),
                Commit::Conflict(now) => {
                    let ids = now.iter().filter_map(|entry| keys::parse_pool_id(&entry.key));
                    taken.extend(ids.filter(|id| free.contains(id)));
                }
            }
        }
        Err(self.too_busy())
    }

    /// Gives ids back; those that are not `owner`'s stay as they are. Returns how many
    /// were freed.
    pub async fn free(&self, owner: Owner, ids: &[u32]) -> Result<usize> {
        let ids = Vec::from_iter(BTreeSet::from_iter(ids.iter().copied()));
        let mut freed = 0;
        for some in ids.chunks(MAX_OPERATIONS - 1) {
            freed += self
                .free_with(owner, some, &[], &[])
                .await?
                .ok_or_else(|| Error::bug("what nobody requires cannot fail"))?;
        }
        Ok(freed)
    }

    /// The same, with more changes in the same commit, such as the end of what notes the
    /// ids: whoever dies has done all, or nothing. `None`, and nothing done, when one of
    /// `required` does not hold.
    pub async fn free_with(
        &self,
        owner: Owner,
        ids: &[u32],
        required: &[Check],
        more: &[Change],
    ) -> Result<Option<usize>> {
        self.try_free(owner, ids, required, more)
            .await
            .while_doing(|| format!("freeing ids of job {owner} in `{}`", self.name))
    }

    async fn try_free(
        &self,
        owner: Owner,
        ids: &[u32],
        required: &[Check],
        more: &[Change],
    ) -> Result<Option<usize>> {
        for attempt in 0..ATTEMPTS {
            pause(attempt).await;
            let keys: Vec<String> = ids.iter().map(|id| self.key(*id)).collect();
            let reading = try_join_all(keys.iter().map(|key| self.store.get(key)));
            // At once: what was read is checked by the commit.
            let ((floor, entry), found) = tokio::try_join!(self.floor(), reading)?;
            let (mut checks, mut changes) = (Vec::new(), Vec::new());
            let mut named = floor.freed.clone();
            for (id, taken) in ids.iter().zip(found) {
                let Some(taken) = taken else { continue };
                if taken.json::<Owner>()? == owner {
                    checks.push(Check::Revision(taken.key.clone(), taken.revision));
                    changes.push(Change::Delete { key: taken.key });
                    named.insert(*id);
                }
            }
            let freed = changes.len();
            if freed == 0 && more.is_empty() {
                return Ok(Some(0));
            }
            let now = Floor { freed: named, ..floor.clone() }.tidy();
            if freed > 0 {
                checks.push(self.floor_unchanged(entry.as_ref()));
            }
            if now != floor && freed > 0 {
                changes.push(self.put_floor(&now)?);
            }
            checks.extend_from_slice(required);
            changes.extend_from_slice(more);
            match self.store.commit(&checks, &changes).await? {
                Commit::Done(_) => return Ok(Some(freed)),
                Commit::Conflict(now) if !Check::all_hold(required, &now) => return Ok(None),
                Commit::Conflict(_) => {}
            }
        }
        Err(self.too_busy())
    }

    /// Requires that this id is `owner`'s still; `None` if it is not so now.
    pub async fn taken(&self, owner: Owner, id: u32) -> Result<Option<Check>> {
        let Some(entry) = self.store.get(&self.key(id)).await? else { return Ok(None) };
        let is_owners = entry.json::<Owner>()? == owner;
        Ok(is_owners.then_some(Check::Revision(entry.key, entry.revision)))
    }

    /// Gives back all that `owner` has, by reading the whole pool: for those who died
    /// and cannot tell. Returns how many were freed.
    pub async fn free_all(&self, owner: Owner) -> Result<usize> {
        let owners = self.owners().await?;
        let ids = owners.into_iter().filter(|(_, other)| *other == owner).map(|(id, _)| id);
        self.free(owner, &ids.collect::<Vec<_>>()).await
    }

    /// The ids that are taken, and by whom.
    pub async fn owners(&self) -> Result<BTreeMap<u32, Owner>> {
        let (entries, _) = list_all(self.store, &keys::pool(&self.name)).await?;
        entries
            .iter()
            .filter_map(|entry| Some((keys::parse_pool_id(&entry.key)?, entry)))
            .map(|(id, entry)| Ok((id, entry.json()?)))
            .collect()
    }

    /// The `count` smallest ids that are free, and the floor once they are taken; `None`
    /// for none at all.
    async fn find(
        &self,
        mut floor: Floor,
        count: usize,
        taken: &BTreeSet<u32>,
    ) -> Result<Option<(Vec<u32>, Floor)>> {
        if count == 0 {
            return Ok(None);
        }
        floor.freed.retain(|id| self.ids.contains(id) && !taken.contains(id));
        let mut free: Vec<u32> = floor.freed.iter().copied().take(count).collect();
        floor.freed.retain(|id| !free.contains(id));
        if free.len() < count {
            let above = self.free_from(floor.below, count - free.len()).await?;
            free.extend(above);
        }
        if free.len() < count && floor.below > *self.ids.start() {
            free = self.free_from(*self.ids.start(), count).await?;
            floor = Floor::default();
        }
        let Some(last) = free.last().copied().filter(|_| free.len() == count) else {
            return Err(self.exhausted(count, free.len()).await?);
        };
        floor.below = floor.below.max(last.saturating_add(1));
        Ok(Some((free, floor)))
    }

    /// Up to `count` free ids from `first` on.
    async fn free_from(&self, first: u32, count: usize) -> Result<Vec<u32>> {
        let prefix = keys::pool(&self.name);
        // Wider than an id: it may pass the last one.
        let (mut next, end) = (u64::from(first), u64::from(*self.ids.end()) + 1);
        let mut after = first.checked_sub(1).map(|before| self.key(before));
        let mut free: Vec<u32> = Vec::new();
        // The first page is enough nearly always.
        let mut limit = (count + 16).min(MAX_PAGE);
        loop {
            let page = self.store.list(&prefix, after.as_deref(), limit).await?;
            let taken = page.entries.iter().filter_map(|entry| keys::parse_pool_id(&entry.key));
            // What lies behind the last page is free.
            let behind = (!page.more).then_some(end);
            for taken in taken.map(u64::from).chain(behind) {
                let gap = (next..taken.min(end)).filter_map(|id| u32::try_from(id).ok());
                free.extend(gap.take(count - free.len()));
                next = taken + 1;
            }
            if !page.more || free.len() == count {
                return Ok(free);
            }
            after = page.entries.last().map(|entry| entry.key.clone());
            limit = MAX_PAGE;
        }
    }

    async fn floor(&self) -> Result<(Floor, Option<Entry>)> {
        let entry = self.store.get(&keys::pool_floor(&self.name)).await?;
        let mut floor: Floor = entry.as_ref().map_or(Ok(Floor::default()), Entry::json)?;
        floor.below = floor.below.max(*self.ids.start());
        Ok((floor, entry))
    }

    fn floor_unchanged(&self, entry: Option<&Entry>) -> Check {
        Check::unchanged(&keys::pool_floor(&self.name), entry)
    }

    fn put_floor(&self, floor: &Floor) -> Result<Change> {
        Change::put_json(keys::pool_floor(&self.name), floor)
    }

    fn key(&self, id: u32) -> String {
        keys::pool_id(&self.name, id)
    }

    /// The error that says who has all the ids, those with the most first.
    async fn exhausted(&self, wanted: usize, free: usize) -> Result<Error> {
        let mut counts: BTreeMap<Owner, usize> = BTreeMap::new();
        for owner in self.owners().await?.into_values() {
            *counts.entry(owner).or_default() += 1;
        }
        let mut holders: Vec<(Owner, usize)> = counts.into_iter().collect();
        holders.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let shown: Vec<String> = holders
            .iter()
            .take(5)
            .map(|(owner, count)| format!("job {owner} has {count}"))
            .collect();
        let more = holders.len().saturating_sub(shown.len());
        let more = if more == 0 { String::new() } else { format!(", {more} more jobs the rest") };
        let total = u64::from(*self.ids.end()) + 1 - u64::from(*self.ids.start());
        Ok(Error::system(format!(
            "{wanted} wanted, {free} of {total} free: {}{more}",
            shown.join(", ")
        ))
        .help("end a job that is not needed: `pavo cancel -j JOB`"))
    }

    fn too_busy(&self) -> Error {
        Error::system(format!("others were faster {ATTEMPTS} times")).help("try again")
    }
}

/// What is known of a pool without reading it: a number, or `{"below":9,"freed":[2,5]}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
struct Floor {
    /// No id below is free …
    below: u32,
    /// … but these.
    freed: BTreeSet<u32>,
}

impl Floor {
    /// Names what lies below only, and no more than is good.
    fn tidy(mut self) -> Self {
        self.freed = self.freed.into_iter().filter(|id| *id < self.below).take(MAX_NAMED).collect();
        self
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Stored {
    Below(u32),
    Freed { below: u32, freed: BTreeSet<u32> },
}

impl From<Stored> for Floor {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::Below(below) => Self { below, freed: BTreeSet::new() },
            Stored::Freed { below, freed } => Self { below, freed },
        }
    }
}

impl From<Floor> for Stored {
    fn from(floor: Floor) -> Self {
        if floor.freed.is_empty() {
            return Self::Below(floor.below);
        }
        Self::Freed { below: floor.below, freed: floor.freed }
    }
}

/// A new local job id, which no living job of the user has: they are counted up, and
/// begin at 1 again behind [`MAX_LOCAL_JOB`], so that an id is not soon another job's.
pub async fn next_job(store: &dyn Store, user: &str) -> Result<Owner> {
    let key = keys::job_counter();
    let mut step = 1;
    for attempt in 0..ATTEMPTS {
        pause(attempt).await;
        let entry = store.get(&key).await?;
        let last: u32 = entry.as_ref().map_or(Ok(0), Entry::json)?;
        let job = Owner::local((last.saturating_add(step) - 1) % MAX_LOCAL_JOB + 1);
        let record = keys::job_record(user, job);
        let checks = [Check::unchanged(&key, entry.as_ref()), Check::Absent(record.clone())];
        match store.commit(&checks, &[Change::put_json(key.as_str(), &job.job)?]).await? {
            Commit::Done(_) => return Ok(job),
            // A job that has been running since the ids last began at 1.
            Commit::Conflict(now) if now.iter().any(|entry| entry.key == record) => step += 1,
            Commit::Conflict(_) => step = 1,
        }
    }
    Err(Error::system(format!("no job id was free in {ATTEMPTS} attempts")).help("try again"))
}

/// Waits before an attempt: not at all before the first, then up to twice as long each
/// time, at random, so that those who met do not meet again.
async fn pause(attempt: u32) {
    if attempt > 0 {
        let longest = Duration::from_millis(1 << attempt.min(10)).min(MAX_PAUSE);
        let share = RandomState::new().build_hasher().finish() % 1000;
        tokio::time::sleep(longest * u32::try_from(share).unwrap_or(0) / 1000).await;
    }
}
