//! What tests of stores do, whichever store it is.

use std::future::Future;
use std::time::Duration;

use futures_util::StreamExt;
use pavo::store::{Change, Check, Commit, Event, Revision, Seen, Store, Watch};

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(90);

/// Runs a test on a runtime of its own, with an end.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let outcome = runtime.block_on(async { tokio::time::timeout(PATIENCE, test).await });
    outcome.expect("the test waits for something that does not come")
}

pub fn put(key: &str, value: &str) -> Change {
    Change::Put { key: key.into(), value: value.into(), lease: None }
}

/// Commits what must not have a conflict.
pub async fn done(store: &dyn Store, checks: &[Check], changes: &[Change]) -> Revision {
    match store.commit(checks, changes).await.unwrap() {
        Commit::Done(revision) => revision,
        Commit::Conflict(entries) => panic!("a conflict with {entries:?}"),
    }
}

pub async fn value(store: &dyn Store, key: &str) -> Option<String> {
    let entry = store.get(key).await.unwrap()?;
    Some(String::from_utf8(entry.value).unwrap())
}

/// Counts up, as one of several who do.
pub async fn add_one(store: &dyn Store) {
    loop {
        let entry = store.get("/t/counter").await.unwrap();
        let number: u32 = entry.as_ref().map_or(0, |entry| entry.json().unwrap());
        let check = Check::unchanged("/t/counter", entry.as_ref());
        let change = Change::put_json("/t/counter", &(number + 1)).unwrap();
        if let Commit::Done(_) = store.commit(&[check], &[change]).await.unwrap() {
            return;
        }
    }
}

pub async fn next(watch: &mut Watch) -> Seen {
    watch.next().await.expect("the watch has ended").unwrap()
}

/// The next changes: their revision, and `key=value` or `-key` for each.
pub async fn changes(watch: &mut Watch) -> (Revision, Vec<String>) {
    let Seen::Changes { revision, events } = next(watch).await else {
        panic!("the history is lost")
    };
    let text = |event: &Event| match event {
        Event::Put(entry) => {
            assert_eq!(entry.revision, revision);
            format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value))
        }
        Event::Delete { key, revision: deleted } => {
            assert_eq!(*deleted, revision);
            format!("-{key}")
        }
    };
    (revision, events.iter().map(text).collect())
}
