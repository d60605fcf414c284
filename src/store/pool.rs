//! Pools of ids: one key an id, taken by conditional commits.
//!
//! Taking ids costs one page from where the last search ended and one commit, however
//! many are taken already. Nothing sweeps a pool: ids are freed with their owner.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{Change, Check, Commit, MAX_OPERATIONS, MAX_PAGE, Store, keys};
use crate::error::{Error, Result};
use crate::model::owner::MAX_LOCAL_JOB;

/// How often a commit that lost a race is decided anew.
const MAX_TRIES: u32 = 200;

/// The next id of a local job: ids go up and begin again at 1 after
/// [`MAX_LOCAL_JOB`], so that an id is not soon used again.
pub async fn next_job_id(store: &dyn Store) -> Result<u32> {
    let key = keys::job_counter();
    for attempt in 0..MAX_TRIES {
        let last = store.get(&key).await?;
        let (check, number) = match &last {
            None => (Check::Absent(key.clone()), 0),
            Some(entry) => {
                let number = serde_json::from_slice(&entry.value)
                    .map_err(|_| Error::bug("the job counter is not a number"))?;
                (Check::Revision(key.clone(), entry.revision), number)
            }
        };
        let next: u32 = if number >= MAX_LOCAL_JOB { 1 } else { number + 1 };
        if store.commit(&[check], &[Change::put_json(key.clone(), &next)]).await?.is_done() {
            return Ok(next);
        }
        pause(attempt).await;
    }
    Err(contended("the job counter"))
}

/// Takes `count` free ids of `range` for `owner`, all or none.
///
/// # Errors
/// When fewer are free, with how many are taken and by whom.
pub async fn take(
    store: &dyn Store,
    pool: &str,
    range: RangeInclusive<u32>,
    count: usize,
    owner: &str,
) -> Result<Vec<u32>> {
    if count >= MAX_OPERATIONS {
        return Err(Error::usage(format!("{count} ids of `{pool}` are too many at once")));
    }
    for attempt in 0..MAX_TRIES {
        let hint = hint(store, pool, &range).await?;
        let mut free = free_ids(store, pool, hint..=*range.end(), count).await?;
        if free.len() < count && hint > *range.start() {
            let missing = count - free.len();
            free.extend(free_ids(store, pool, *range.start()..=hint - 1, missing).await?);
        }
        if free.len() < count {
            return Err(exhausted(store, pool, &range, count).await?);
        }
        let checks: Vec<Check> =
            free.iter().map(|id| Check::Absent(keys::pool_id(pool, *id))).collect();
        let value = owner.as_bytes().to_vec();
        let mut changes: Vec<Change> = free
            .iter()
            .map(|id| Change::Put {
                key: keys::pool_id(pool, *id),
                value: value.clone(),
                lease: None,
            })
            .collect();
        let next = free.last().map_or(hint, |last| last.saturating_add(1));
        changes.push(Change::put_json(keys::pool_hint(pool), &next));
        if store.commit(&checks, &changes).await?.is_done() {
            return Ok(free);
        }
        pause(attempt).await;
    }
    Err(contended(&format!("the pool `{pool}`")))
}

/// Gives ids back. Those that are not `owner`'s are left alone.
pub async fn free(store: &dyn Store, pool: &str, ids: &[u32], owner: &str) -> Result<()> {
    for id in ids {
        let key = keys::pool_id(pool, *id);
        if let Some(entry) = store.get(&key).await?.filter(|e| e.value == owner.as_bytes()) {
            let check = Check::Revision(key.clone(), entry.revision);
            // If it changed since, it is not ours any more.
            let (Commit::Done(_) | Commit::Conflict(_)) =
                store.commit(&[check], &[Change::Delete { key }]).await?;
        }
    }
    Ok(())
}

async fn hint(store: &dyn Store, pool: &str, range: &RangeInclusive<u32>) -> Result<u32> {
    let entry = store.get(&keys::pool_hint(pool)).await?;
    let hint = entry.and_then(|entry| serde_json::from_slice(&entry.value).ok());
    Ok(hint.filter(|id| range.contains(id)).unwrap_or(*range.start()))
}

/// The first `count` ids of the range that nobody has, or fewer.
async fn free_ids(
    store: &dyn Store,
    pool: &str,
    range: RangeInclusive<u32>,
    count: usize,
) -> Result<Vec<u32>> {
    let prefix = keys::pool_prefix(pool);
    let mut candidate = u64::from(*range.start());
    let end = u64::from(*range.end());
    let mut free = Vec::new();
    let mut after = range.start().checked_sub(1).map(|id| keys::pool_id(pool, id));
    loop {
        let page = store.list(&prefix, after.as_deref(), MAX_PAGE).await?;
        let taken = page.entries.iter().filter_map(|entry| keys::id_of_pool_key(&entry.key));
        for id in taken.map(u64::from).chain((!page.more).then_some(end + 1)) {
            while candidate < id.min(end + 1) && free.len() < count {
                free.push(u32::try_from(candidate).expect("inside the range"));
                candidate += 1;
            }
            candidate = candidate.max(id.saturating_add(1));
        }
        if !page.more || free.len() >= count || candidate > end {
            return Ok(free);
        }
        after = page.entries.last().map(|entry| entry.key.clone());
    }
}

async fn exhausted(
    store: &dyn Store,
    pool: &str,
    range: &RangeInclusive<u32>,
    count: usize,
) -> Result<Error> {
    let mut owners: BTreeMap<String, usize> = BTreeMap::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.list(&keys::pool_prefix(pool), after.as_deref(), MAX_PAGE).await?;
        for entry in &page.entries {
            *owners.entry(String::from_utf8_lossy(&entry.value).into_owned()).or_default() += 1;
        }
        match page.entries.last() {
            Some(last) if page.more => after = Some(last.key.clone()),
            _ => break,
        }
    }
    let taken: usize = owners.values().sum();
    let mut most: Vec<(usize, String)> = owners.into_iter().map(|(o, n)| (n, o)).collect();
    most.sort_by(|a, b| b.cmp(a));
    let most: Vec<String> =
        most.iter().take(5).map(|(number, owner)| format!("{owner}: {number}")).collect();
    Ok(Error::system(format!("Not enough free ids in {pool}"))
        .because(Error::system(format!(
            "{count} are needed of {}–{}, and {taken} are taken ({})",
            range.start(),
            range.end(),
            most.join(", ")
        )))
        .help("widen the range in the configuration, or end jobs that hold ids"))
}

/// Waits a little, more each time, never in step with others.
async fn pause(attempt: u32) {
    let spread = u64::from(std::process::id() ^ attempt.wrapping_mul(2_654_435_761)) % 1000;
    let most = 200_u64 << attempt.min(5);
    tokio::time::sleep(Duration::from_micros(most * spread / 1000)).await;
}

fn contended(what: &str) -> Error {
    Error::system(format!("{what} is changed by too many at once")).help("try again in a moment")
}
