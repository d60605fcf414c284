//! Random commits, against the obvious store.

use std::collections::BTreeMap;

use pavo::store::{Change, Check, Commit, Entry, Event, Revision, Seen, Store, list_all};
use proptest::prelude::*;

use super::helpers::{done, next, run};
use super::place::{Place, clear};

/// What a random commit is made of: a few keys, so that checks and prefixes meet them.
const KEYS: [&str; 6] = ["/t/a", "/t/a/x", "/t/a/y", "/t/ab", "/t/b/x", "/t/b/x/z"];
const PREFIXES: [&str; 4] = ["/t/", "/t/a/", "/t/b/", "/t/b/x/"];

fn any_key() -> impl Strategy<Value = String> {
    prop::sample::select(&KEYS[..]).prop_map(String::from)
}

fn any_check() -> impl Strategy<Value = Check> {
    prop_oneof![
        any_key().prop_map(Check::Absent),
        any_key().prop_map(Check::Exists),
        // Relative to the revision when the test began.
        (any_key(), 0..30_u64).prop_map(|(key, revision)| Check::Revision(key, revision)),
    ]
}

/// Changes of different keys, or of one prefix.
fn any_changes() -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        3 => any::<u8>().prop_map(Some),
        1 => Just(None),
    ];
    let single = prop::collection::btree_map(any_key(), change, 0..4).prop_map(|changes| {
        let each = |(key, value): (String, Option<u8>)| match value {
            Some(value) => Change::Put { key, value: vec![value], lease: None },
            None => Change::Delete { key },
        };
        changes.into_iter().map(each).collect()
    });
    let prefix = prop::sample::select(&PREFIXES[..]).prop_map(|prefix| vec![clear(prefix)]);
    prop_oneof![4 => single, 1 => prefix]
}

/// The obvious store.
#[derive(Default)]
struct Model {
    entries: BTreeMap<String, Entry>,
    revision: Revision,
}

impl Model {
    fn commit(&mut self, checks: &[Check], changes: &[Change]) -> Commit {
        let holds = |check: &Check| {
            let entry = self.entries.get(check.key());
            match check {
                Check::Absent(_) => entry.is_none(),
                Check::Exists(_) => entry.is_some(),
                Check::Revision(_, revision) => entry.is_some_and(|e| e.revision == *revision),
            }
        };
        if !checks.iter().all(holds) {
            let checked: BTreeMap<_, _> =
                checks.iter().filter_map(|check| self.entries.get_key_value(check.key())).collect();
            return Commit::Conflict(checked.into_values().cloned().collect());
        }
        let (before, next) = (self.entries.clone(), self.revision + 1);
        for change in changes {
            match change {
                Change::Put { key, value, lease } => {
                    let created = before.get(key).map_or(next, |entry| entry.created);
                    let (key, value, lease) = (key.clone(), value.clone(), *lease);
                    let entry = Entry { key: key.clone(), value, revision: next, created, lease };
                    self.entries.insert(key, entry);
                }
                Change::Delete { key } => drop(self.entries.remove(key)),
                Change::DeletePrefix { prefix } => {
                    self.entries.retain(|key, _| !key.starts_with(prefix));
                }
            }
        }
        self.revision += u64::from(before != self.entries);
        Commit::Done(self.revision)
    }
}

async fn a_watch_brings_a_copy_up_to_date(store: &dyn Store, model: &Model, start: Revision) {
    let mut copy: BTreeMap<String, Entry> = BTreeMap::new();
    let mut watch = store.watch("/t/", start).await.unwrap();
    let mut at = start;
    while at < model.revision {
        let Seen::Changes { revision, events } = next(&mut watch).await else { panic!("lost") };
        for event in events {
            match event {
                Event::Put(entry) => drop(copy.insert(entry.key.clone(), entry)),
                Event::Delete { key, .. } => assert!(copy.remove(&key).is_some(), "{key}"),
            }
        }
        at = revision;
    }
    assert_eq!(copy, model.entries);
}

pub async fn any_commits_leave_what_a_map_would_hold<P: Place>(place: P) {
    let commits =
        prop::collection::vec((prop::collection::vec(any_check(), 0..3), any_changes()), 1..20);
    let address = place.address();
    let test = |mut commits: Vec<(Vec<Check>, Vec<Change>)>| {
        run(async {
            let store = &*P::open(&address).await;
            done(store, &[], &[clear("/t/")]).await;
            let start = done(store, &[], &[]).await;
            let mut model = Model { revision: start, ..Model::default() };
            for (checks, changes) in &mut commits {
                for check in checks.iter_mut() {
                    if let Check::Revision(_, revision) = check {
                        *revision += start;
                    }
                }
                let outcome = store.commit(checks, changes).await.unwrap();
                assert_eq!(outcome, model.commit(checks, changes));
                let (entries, revision) = list_all(store, "/t/").await.unwrap();
                assert_eq!(entries, model.entries.values().cloned().collect::<Vec<_>>());
                assert_eq!(revision, model.revision);
            }
            a_watch_brings_a_copy_up_to_date(store, &model, start).await;
        });
        Ok(())
    };
    // A thread: the runtime of this test is in use here.
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() };
    let work = || proptest::test_runner::TestRunner::new(config).run(&commits, test);
    std::thread::scope(|scope| scope.spawn(work).join().unwrap()).unwrap();
}
