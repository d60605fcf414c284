//! The contract of [`Store`]: what every implementation must pass.
//!
//! Each test is written to the trait and to a [`Place`], which opens one more handle of
//! one store. `contract!` at the end runs them all for an implementation: a second one
//! is a second `Place` and a second line there.
//!
//! Some tests start processes of their own: this same binary, told by [`CHILD`] what to
//! do, running the test `child` only.

use std::collections::BTreeMap;
use std::future::Future;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::StreamExt;
use pavo::error::Kind;
use pavo::model::owner::Owner;
use pavo::store::etcd::{Access, Etcd, Login};
use pavo::store::pool::{Pool, next_job};
use pavo::store::{
    Change, Check, Commit, Entry, Event, LeaseId, MAX_COMMIT_BYTES, MAX_PAGE, Revision, SCHEMA,
    Seen, Store, Watch, adopt, embedded, get_json, keys, list_all, put_json,
};
use proptest::prelude::*;

// Killing and pausing is for `tests/etcd.rs`.
#[expect(dead_code)]
#[path = "etcd/server.rs"]
mod server;

/// Tells a process of this binary which store it is to use, and for what.
const CHILD: &str = "PAVO_TEST_STORE_CHILD";

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where one store is, empty at first and gone with the test.
trait Place {
    /// The test that is [`child`], for this kind of store.
    const CHILD: &'static str;

    fn new() -> Self;

    /// By which another process finds it.
    fn address(&self) -> String;

    /// One more handle, as another process would have it.
    async fn open(address: &str) -> Box<dyn Store>;

    /// Lets the store forget what came before `now`, the last revision of its
    /// `/t/w/x`, and a little more.
    async fn forget(&self, now: Revision);
}

struct EmbeddedPlace(tempfile::TempDir);

impl Place for EmbeddedPlace {
    const CHILD: &'static str = "embedded_store::child";

    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn address(&self) -> String {
        self.0.path().join("state").to_str().unwrap().into()
    }

    async fn open(address: &str) -> Box<dyn Store> {
        Box::new(embedded::open(address.as_ref()).await.unwrap())
    }

    async fn forget(&self, _now: Revision) {
        let store = &*Self::open(&self.address()).await;
        let large = "x".repeat(1_000_000);
        for _ in 0..10 {
            done(store, &[], &[put("/t/w/x", &large)]).await;
        }
    }
}

struct EtcdPlace(server::Cluster);

impl Place for EtcdPlace {
    const CHILD: &'static str = "etcd_store::child";

    fn new() -> Self {
        Self(server::Cluster::single())
    }

    fn address(&self) -> String {
        self.0.endpoints().join(",")
    }

    async fn open(address: &str) -> Box<dyn Store> {
        let endpoints = address.split(',').map(String::from).collect();
        let access = Access { endpoints, ca: None, certificate: None, login: Login::None };
        Box::new(Etcd::connect(&access).await.unwrap())
    }

    async fn forget(&self, now: Revision) {
        let store = &*Self::open(&self.address()).await;
        let now = done(store, &[Check::Revision("/t/w/x".into(), now)], &[put("/t/w/x", "")]).await;
        let mut etcd = etcd_client::Client::connect(self.0.endpoints(), None).await.unwrap();
        etcd.compact(i64::try_from(now).unwrap(), None).await.unwrap();
    }
}

/// Runs a test on a runtime of its own, with an end.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let outcome = runtime.block_on(async { tokio::time::timeout(PATIENCE, test).await });
    outcome.expect("the test waits for something that does not come")
}

/// Runs `work` with a handle of its own on each of `count` threads.
fn on_threads<P: Place>(place: &P, count: usize, work: impl AsyncFn(usize, &dyn Store) + Sync) {
    let address = place.address();
    std::thread::scope(|scope| {
        for number in 0..count {
            let (address, work) = (&address, &work);
            scope.spawn(move || run(async { work(number, &*P::open(address).await).await }));
        }
    });
}

/// A process that does `what` of [`child`] to the store at `place`.
fn process<P: Place>(place: &P, what: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", P::CHILD, "--nocapture"])
        .env(CHILD, format!("{what} {}", place.address()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// What the processes do that tests start. Without [`CHILD`] there is nothing to do.
fn child<P: Place>() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let (what, address) = order.split_once(' ').unwrap();
    run(async {
        let store = &*P::open(address).await;
        match what {
            "increment" => increment(store, 200).await,
            "write" => write_numbers(store, "process").await,
            "take" => drop(Pool::new(store, "p", 0..=99).take(Owner::local(9), 10).await.unwrap()),
            _ => panic!("`{what}` is unknown"),
        }
    });
}

fn put(key: &str, value: &str) -> Change {
    Change::Put { key: key.into(), value: value.into(), lease: None }
}

fn clear(prefix: &str) -> Change {
    Change::DeletePrefix { prefix: prefix.into() }
}

/// Commits what must not have a conflict.
async fn done(store: &dyn Store, checks: &[Check], changes: &[Change]) -> Revision {
    match store.commit(checks, changes).await.unwrap() {
        Commit::Done(revision) => revision,
        Commit::Conflict(entries) => panic!("a conflict with {entries:?}"),
    }
}

/// Commits what must have one.
async fn conflict(store: &dyn Store, checks: &[Check], changes: &[Change]) -> Vec<Entry> {
    match store.commit(checks, changes).await.unwrap() {
        Commit::Conflict(entries) => entries,
        Commit::Done(revision) => panic!("done at {revision}"),
    }
}

async fn value(store: &dyn Store, key: &str) -> Option<String> {
    let entry = store.get(key).await.unwrap()?;
    Some(String::from_utf8(entry.value).unwrap())
}

async fn names(store: &dyn Store, prefix: &str) -> Vec<String> {
    let (entries, _) = list_all(store, prefix).await.unwrap();
    entries.into_iter().map(|entry| entry.key).collect()
}

async fn increment(store: &dyn Store, times: u32) {
    for _ in 0..times {
        loop {
            let entry = store.get("/t/counter").await.unwrap();
            let number: u32 = entry.as_ref().map_or(0, |entry| entry.json().unwrap());
            let check = Check::unchanged("/t/counter", entry.as_ref());
            let change = Change::put_json("/t/counter", &(number + 1)).unwrap();
            if let Commit::Done(_) = store.commit(&[check], &[change]).await.unwrap() {
                break;
            }
        }
    }
}

async fn write_numbers(store: &dyn Store, name: &str) {
    for number in 0..50 {
        let own = put(&format!("/t/n/{name}"), &number.to_string());
        done(store, &[], &[own, put("/other/n", "unseen")]).await;
    }
}

async fn next(watch: &mut Watch) -> Seen {
    watch.next().await.expect("the watch has ended").unwrap()
}

/// The next changes: their revision, and `key=value` or `-key` for each.
async fn changes(watch: &mut Watch) -> (Revision, Vec<String>) {
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

async fn a_commit_is_done_only_if_all_checks_hold<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let absent = |key: &str| Check::Absent(key.into());
    let exists = |key: &str| Check::Exists(key.into());

    let first = done(store, &[absent("/t/a")], &[put("/t/a", "1"), put("/t/b", "1")]).await;
    let found = conflict(store, &[absent("/t/a")], &[put("/t/a", "2")]).await;
    let [a] = &found[..] else { panic!("{found:?}") };
    assert_eq!(
        (a.key.as_str(), &a.value[..], a.revision, a.created),
        ("/t/a", &b"1"[..], first, first)
    );

    let second = done(store, &[Check::Revision("/t/a".into(), first)], &[put("/t/a", "2")]).await;
    assert!(second > first);
    let late = Check::Revision("/t/a".into(), first);
    let found = conflict(store, &[exists("/t/b"), late], &[put("/t/b", "2")]).await;
    assert_eq!(found.iter().map(|e| e.key.as_str()).collect::<Vec<_>>(), ["/t/a", "/t/b"]);
    assert_eq!((found[0].revision, found[0].created), (second, first));

    assert_eq!(conflict(store, &[exists("/t/c")], &[put("/t/c", "1")]).await, []);
    let gone = Check::Revision("/t/c".into(), second);
    assert_eq!(conflict(store, &[gone], &[put("/t/c", "1")]).await, []);
    assert_eq!(names(store, "/t/").await, ["/t/a", "/t/b"]);
    assert_eq!(value(store, "/t/b").await.unwrap(), "1");

    let third = done(store, &[exists("/t/a")], &[Change::delete("/t/a"), put("/t/c", "3")]).await;
    assert_eq!(names(store, "/t/").await, ["/t/b", "/t/c"]);
    assert_eq!(done(store, &[], &[Change::delete("/t/a")]).await, third, "nothing was changed");
    let again = done(store, &[absent("/t/a")], &[put("/t/a", "4")]).await;
    assert_eq!(store.get("/t/a").await.unwrap().unwrap().created, again);
}

async fn a_commit_as_large_as_the_limits_is_done<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let many: Vec<Change> = (0..128).map(|n| put(&format!("/t/{n:03}"), "x")).collect();
    let checks: Vec<Check> = (0..128).map(|n| Check::Absent(format!("/t/{n:03}"))).collect();
    done(store, &checks, &many).await;
    assert_eq!(names(store, "/t/").await.len(), 128);

    let large = "x".repeat(MAX_COMMIT_BYTES - "/t/large".len());
    done(store, &[], &[put("/t/large", &large)]).await;
    assert_eq!(value(store, "/t/large").await.unwrap().len(), large.len());
    let error = store.commit(&[], &[put("/t/large2", &large)]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Bug);
}

async fn json_is_read_as_it_was_written<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let revision = put_json(store, "/t/j", &vec![Some(1), None]).await.unwrap();
    let read = get_json::<Vec<Option<u8>>>(store, "/t/j").await.unwrap();
    assert_eq!(read, Some((vec![Some(1), None], revision)));
    assert_eq!(get_json::<u8>(store, "/t/none").await.unwrap(), None);
    let report = get_json::<u8>(store, "/t/j").await.unwrap_err().report();
    assert!(report.contains("reading the stored `/t/j`"), "{report}");
}

async fn no_increment_is_lost_between_threads<P: Place>(place: P) {
    on_threads(&place, 4, async |_, store| increment(store, 200).await);
    assert_eq!(value(&*P::open(&place.address()).await, "/t/counter").await.unwrap(), "800");
}

async fn no_increment_is_lost_between_processes<P: Place>(place: P) {
    let children: Vec<Child> = (0..3).map(|_| process(&place, "increment")).collect();
    increment(&*P::open(&place.address()).await, 200).await;
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(value(&*P::open(&place.address()).await, "/t/counter").await.unwrap(), "800");
}

async fn a_prefix_ends_at_its_slash<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let all = ["/t/a", "/t/a!", "/t/a/", "/t/a/x", "/t/a/y/z", "/t/a/\u{10ffff}", "/t/a0", "/t/ab"];
    done(store, &[], &all.map(|key| put(key, ""))).await;
    assert_eq!(names(store, "/t/a/").await, ["/t/a/x", "/t/a/y/z", "/t/a/\u{10ffff}"]);
    assert_eq!(store.list("/t/a", None, 1).await.unwrap_err().kind(), Kind::Bug);
    done(store, &[], &[clear("/t/a/")]).await;
    assert_eq!(names(store, "/t/").await, ["/t/a", "/t/a!", "/t/a/", "/t/a0", "/t/ab"]);
}

async fn pages_cover_a_prefix_without_gap_or_overlap<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let keys: Vec<String> = (0..1100).map(|n| format!("/t/p/{n:05}")).collect();
    for some in keys.chunks(128) {
        done(store, &[], &some.iter().map(|key| put(key, "x")).collect::<Vec<_>>()).await;
    }
    done(store, &[], &[put("/t/q", "")]).await;
    assert_eq!(names(store, "/t/p/").await, keys);

    let page = store.list("/t/p/", None, usize::MAX).await.unwrap();
    assert!(page.more && page.entries.len() <= MAX_PAGE);
    let page = store.list("/t/p/", Some("/t/p/00007"), 3).await.unwrap();
    let found: Vec<&str> = page.entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(found, ["/t/p/00008", "/t/p/00009", "/t/p/00010"]);
    assert!(page.more);
    let page = store.list("/t/p/", Some("/t/p/01098"), 1).await.unwrap();
    assert_eq!((page.entries.len(), page.more), (1, false));
    let large = "x".repeat(1_400_000);
    for key in ["/t/l/a", "/t/l/b", "/t/l/c", "/t/l/d"] {
        done(store, &[], &[put(key, &large)]).await;
    }
    assert_eq!(names(store, "/t/l/").await.len(), 4);
}

async fn pages_hold_what_stays_while_others_write<P: Place>(place: P) {
    let keys: Vec<String> = (0..60).map(|n| format!("/t/p/{n:02}")).collect();
    let store = &*P::open(&place.address()).await;
    done(store, &[], &keys.iter().map(|key| put(key, "x")).collect::<Vec<_>>()).await;
    let read_all = std::sync::atomic::AtomicBool::new(false);
    on_threads(&place, 2, async |thread, store| {
        if thread == 0 {
            // Puts and deletes a neighbour of each key, and changes the key.
            for key in keys.iter().cycle().take(100_000) {
                if read_all.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                let neighbour = format!("{key}-");
                done(store, &[], &[put(&neighbour, ""), put(key, "y")]).await;
                done(store, &[], &[Change::delete(neighbour)]).await;
            }
        }
        for limit in [1, 3, 7, 20].repeat(2) {
            let mut found: Vec<String> = Vec::new();
            loop {
                let after = found.last().cloned();
                let page = store.list("/t/p/", after.as_deref(), limit).await.unwrap();
                found.extend(page.entries.into_iter().map(|entry| entry.key));
                if !page.more {
                    break;
                }
            }
            assert!(found.is_sorted_by(|a, b| a < b), "{found:?}");
            found.retain(|key| !key.ends_with('-'));
            assert_eq!(found, keys, "{limit}");
        }
        read_all.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

async fn a_watch_gives_a_commit_whole_however_large<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let keys: Vec<String> = (0..2500).map(|n| format!("/t/w/{n:04}")).collect();
    for some in keys.chunks(128) {
        done(store, &[], &some.iter().map(|key| put(key, "x")).collect::<Vec<_>>()).await;
    }
    let before = done(store, &[], &[put("/t/other", "")]).await;
    let mut watch = store.watch("/t/w/", before).await.unwrap();
    let after = done(store, &[], &[clear("/t/w/")]).await;
    let expected = keys.iter().map(|key| format!("-{key}")).collect();
    assert_eq!(changes(&mut watch).await, (after, expected));
}

async fn a_watch_that_is_interrupted_again_and_again_misses_nothing<P: Place>(place: P) {
    let (store, other) = (&*P::open(&place.address()).await, &*P::open(&place.address()).await);
    let mut watch = other.watch("/t/l/", 0).await.unwrap();
    leased(store, "/t/l/a", Duration::from_secs(1)).await;
    assert_eq!(changes(&mut watch).await.1, ["/t/l/a=held"]);
    // A caller that also does something else drops the wait each time.
    for _ in 0..1500 {
        let wait = tokio::time::timeout(Duration::from_millis(20), watch.next()).await;
        if let Ok(seen) = wait {
            let Some(Ok(Seen::Changes { events, .. })) = seen else { panic!("{seen:?}") };
            assert!(matches!(&events[..], [Event::Delete { key, .. }] if key == "/t/l/a"));
            return;
        }
    }
    panic!("the end of the lease is not told");
}

async fn a_watch_sees_each_change_once_and_in_order<P: Place>(place: P) {
    let (store, other) = (&*P::open(&place.address()).await, &*P::open(&place.address()).await);
    done(other, &[], &[put("/t/w/old", "0")]).await;
    let (_, start) = list_all(store, "/t/w/").await.unwrap();
    let mut watch = store.watch("/t/w/", start).await.unwrap();

    let mut seen = Vec::new();
    done(other, &[], &[put("/t/w/b", "1"), put("/t/w/a", "1"), put("/t/wx", "1")]).await;
    seen.push(changes(&mut watch).await.1);
    done(other, &[], &[put("/t/v", "unseen")]).await;
    done(store, &[], &[put("/t/w/a", "2")]).await;
    done(other, &[], &[put("/t/w/a", "3")]).await;
    done(other, &[], &[clear("/t/w/"), put("/t/v", "unseen too")]).await;
    for _ in 0..3 {
        seen.push(changes(&mut watch).await.1);
    }
    assert_eq!(
        seen,
        [
            vec!["/t/w/b=1", "/t/w/a=1"],
            vec!["/t/w/a=2"],
            vec!["/t/w/a=3"],
            vec!["-/t/w/a", "-/t/w/b", "-/t/w/old"],
        ]
    );
}

async fn a_watch_resumes_from_any_revision<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let start = done(store, &[], &[put("/t/w/x", "0")]).await;
    for number in 1..=20 {
        done(store, &[], &[put("/t/w/x", &number.to_string()), put("/t/w/y", "y")]).await;
    }
    let mut after = start;
    for number in 1..=20 {
        let mut watch = P::open(&place.address()).await.watch("/t/w/", after).await.unwrap();
        let (revision, events) = changes(&mut watch).await;
        assert_eq!(events, [format!("/t/w/x={number}"), "/t/w/y=y".into()]);
        after = revision;
    }
}

async fn a_watch_sees_all_that_processes_and_threads_write<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let mut watch = store.watch("/t/n/", 0).await.unwrap();
    let mut child = process(&place, "write");
    std::thread::scope(|scope| {
        let address = place.address();
        scope.spawn(move || {
            run(async { write_numbers(&*P::open(&address).await, "thread").await });
        });
    });
    let mut expected = BTreeMap::from([("thread", 0), ("process", 0)]);
    let mut last = 0;
    for _ in 0..100 {
        let (revision, events) = changes(&mut watch).await;
        let [event] = &events[..] else { panic!("{events:?}") };
        let (name, number) = event.strip_prefix("/t/n/").unwrap().split_once('=').unwrap();
        assert!(revision > last);
        assert_eq!(number, expected[name].to_string());
        *expected.get_mut(name).unwrap() += 1;
        last = revision;
    }
    assert!(child.wait().unwrap().success());
}

async fn a_lost_history_is_said<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let start = done(store, &[], &[put("/t/w/x", "")]).await;
    place.forget(start).await;
    let mut watch = store.watch("/t/w/", start - 1).await.unwrap();
    assert_eq!(next(&mut watch).await, Seen::HistoryLost);
    assert!(watch.next().await.is_none());
    // What the watcher does then.
    let (_, now) = list_all(store, "/t/w/").await.unwrap();
    let mut watch = store.watch("/t/w/", now).await.unwrap();
    done(store, &[], &[put("/t/w/x", "new")]).await;
    assert_eq!(changes(&mut watch).await.1, ["/t/w/x=new"]);
}

/// Puts `key` under a new lease.
async fn leased(store: &dyn Store, key: &str, ttl: Duration) -> LeaseId {
    let lease = store.lease(ttl).await.unwrap();
    done(store, &[Check::Absent(key.into())], &[put(key, "held").with_lease(lease)]).await;
    assert_eq!(store.get(key).await.unwrap().unwrap().lease, Some(lease));
    lease
}

async fn gone(store: &dyn Store, key: &str) {
    while store.get(key).await.unwrap().is_some() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn a_lease_takes_its_entries_along<P: Place>(place: P) {
    let (store, other) = (&*P::open(&place.address()).await, &*P::open(&place.address()).await);
    let ttl = Duration::from_secs(3);
    let kept = leased(store, "/t/l/kept", ttl).await;
    let lost = leased(store, "/t/l/lost", ttl).await;
    done(store, &[], &[put("/t/l/freed", "").with_lease(lost)]).await;
    done(store, &[], &[put("/t/l/freed", "stays")]).await;
    while other.get("/t/l/lost").await.unwrap().is_some() {
        assert!(store.keep_alive(kept).await.unwrap(), "this machine stood still");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(names(other, "/t/l/").await, ["/t/l/freed", "/t/l/kept"]);
    assert!(!store.keep_alive(lost).await.unwrap());
    let late = put("/t/l/late", "").with_lease(lost);
    assert_eq!(store.commit(&[], &[late]).await.unwrap_err().kind(), Kind::NotFound);

    store.revoke(kept).await.unwrap();
    store.revoke(kept).await.unwrap();
    assert_eq!(names(other, "/t/l/").await, ["/t/l/freed"]);
    assert!(!store.keep_alive(kept).await.unwrap());
}

async fn the_end_of_a_lease_is_seen_by_watches<P: Place>(place: P) {
    let (store, other) = (&*P::open(&place.address()).await, &*P::open(&place.address()).await);
    let mut watch = other.watch("/t/l/", 0).await.unwrap();
    let lease = leased(store, "/t/l/a", Duration::from_secs(60)).await;
    assert_eq!(changes(&mut watch).await.1, ["/t/l/a=held"]);
    store.revoke(lease).await.unwrap();
    assert_eq!(changes(&mut watch).await.1, ["-/t/l/a"]);

    // Nobody writes here: the lease runs out by itself.
    leased(store, "/t/l/b", Duration::from_secs(1)).await;
    assert_eq!(changes(&mut watch).await.1, ["/t/l/b=held"]);
    assert_eq!(changes(&mut watch).await.1, ["-/t/l/b"]);
    assert_eq!(value(store, "/t/l/b").await, None);
}

async fn a_paused_holder_changes_nothing_when_it_wakes<P: Place>(place: P) {
    let (paused, other) = (&*P::open(&place.address()).await, &*P::open(&place.address()).await);
    leased(paused, "/t/lock", Duration::from_secs(1)).await;
    let mine = paused.get("/t/lock").await.unwrap().unwrap().revision;
    // The holder sleeps. Its lease runs out and another takes the lock.
    gone(other, "/t/lock").await;
    leased(other, "/t/lock", Duration::from_secs(60)).await;
    done(other, &[], &[put("/t/data", "the other's")]).await;

    let fence = Check::Revision("/t/lock".into(), mine);
    let found = conflict(paused, &[fence], &[put("/t/data", "late")]).await;
    assert_eq!(found[0].key, "/t/lock");
    assert_eq!(value(paused, "/t/data").await.unwrap(), "the other's");
}

async fn a_pool_gives_an_id_to_one_owner_only<P: Place>(place: P) {
    let mut child = process(&place, "take");
    on_threads(&place, 4, async |number, store| {
        let (pool, owner) = (Pool::new(store, "p", 0..=99), Owner::local(number as u32));
        let mut mine = pool.take(owner, 3).await.unwrap();
        for _ in 0..10 {
            mine.extend(pool.take(owner, 2).await.unwrap());
            assert_eq!(pool.free(owner, &[mine.remove(0)]).await.unwrap(), 1);
        }
        assert_eq!(mine.len(), 13);
        for id in mine {
            assert_eq!(pool.owners().await.unwrap()[&id], owner);
        }
    });
    assert!(child.wait().unwrap().success());
    let store = &*P::open(&place.address()).await;
    let pool = Pool::new(store, "p", 0..=99);
    assert_eq!(pool.owners().await.unwrap().len(), 4 * 13 + 10);
    assert_eq!(pool.free_all(Owner::local(0)).await.unwrap(), 13);
    assert_eq!(pool.owners().await.unwrap().len(), 3 * 13 + 10);
}

async fn a_pool_gives_the_smallest_ids_first<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let (pool, one, two) = (Pool::new(store, "a/b", 5..=300), Owner::local(1), Owner::local(2));
    assert_eq!(pool.take(one, 100).await.unwrap(), (5..105).collect::<Vec<_>>());
    assert_eq!(pool.take(two, 1).await.unwrap(), [105]);
    assert_eq!(pool.free(one, &[50, 7, 7, 5, 105, 200]).await.unwrap(), 3, "105 is not its own");
    assert_eq!(pool.owners().await.unwrap()[&105], two);
    assert_eq!(pool.take(two, 4).await.unwrap(), [5, 7, 50, 106]);
    assert!(pool.take(one, 0).await.unwrap().is_empty());
    // Deleted by other hands: found again.
    done(store, &[], &[Change::delete(keys::pool_id("a/b", 6))]).await;
    assert_eq!(pool.take(one, 127).await.unwrap().len(), 127);
    assert_eq!(pool.take(one, 68).await.unwrap().first(), Some(&6));
    assert!(Pool::new(store, "other", 5..=300).owners().await.unwrap().is_empty());
}

async fn a_pool_remembers_what_was_freed<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let (pool, owner) = (Pool::new(store, "p", 10..=2000), Owner::local(1));
    for _ in 0..10 {
        pool.take(owner, 100).await.unwrap();
    }
    // More than are remembered, in any order; and ones that nobody has.
    let freed: Vec<u32> = (10..1010).filter(|id| id % 3 != 0).rev().chain([5, 1500]).collect();
    assert_eq!(pool.free(owner, &freed).await.unwrap(), freed.len() - 2);
    assert_eq!(pool.take(owner, 3).await.unwrap(), [10, 11, 13]);
    // One that is named is taken by other hands, which do not say so.
    done(store, &[], &[Change::put_json(keys::pool_id("p", 14), &Owner::local(2)).unwrap()]).await;
    assert_eq!(pool.take(owner, 2).await.unwrap(), [16, 17]);
    let mut mine = vec![];
    while let Ok(some) = pool.take(owner, 50).await {
        mine.extend(some);
    }
    while let Ok(some) = pool.take(owner, 1).await {
        mine.extend(some);
    }
    assert_eq!(pool.owners().await.unwrap().len(), 1991, "all are found in the end");
    assert_eq!(pool.free_all(owner).await.unwrap(), 1990);
    assert_eq!(pool.take(owner, 5).await.unwrap(), [10, 11, 12, 13, 15]);
    // As an earlier version wrote it.
    put_json(store, &keys::pool_floor("p"), &12).await.unwrap();
    assert_eq!(pool.take(owner, 1).await.unwrap(), [16]);
}

async fn an_empty_pool_says_who_has_it_all<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let top = u32::MAX - 2..=u32::MAX;
    let pool = Pool::new(store, "uplink", top.clone());
    assert_eq!(pool.take(Owner::local(1), 2).await.unwrap().len(), 2);
    let report = pool.take(Owner::local(2), 2).await.unwrap_err().report();
    assert!(report.contains("taking 2 of the pool `uplink` for job l2"), "{report}");
    assert!(report.contains("2 wanted, 1 of 3 free: job l1 has 2"), "{report}");
    assert!(report.contains("help: end a job"), "{report}");
    assert_eq!(pool.take(Owner::local(2), 1).await.unwrap(), [u32::MAX], "nothing was lost");
    assert!(pool.take(Owner::local(3), 1).await.is_err());
    assert_eq!(pool.free_all(Owner::local(1)).await.unwrap(), 2);
    assert_eq!(pool.take(Owner::local(3), 2).await.unwrap(), top.take(2).collect::<Vec<_>>());
}

async fn job_ids_count_up_and_begin_again_at_the_end<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let next = async || next_job(store, "ada").await.unwrap().job;
    assert_eq!((next().await, next().await), (1, 2));
    put_json(store, &keys::job_record("ada", Owner::local(1)), "alive").await.unwrap();
    put_json(store, &keys::job_record("ada", Owner::local(9_999_999)), "alive").await.unwrap();
    put_json(store, &keys::job_counter(), &9_999_997).await.unwrap();
    assert_eq!((next().await, next().await, next().await), (9_999_998, 2, 3));
}

async fn a_store_of_a_newer_pavo_is_refused<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    adopt(store).await.unwrap();
    let mark = value(store, &keys::schema()).await.unwrap();
    assert_eq!(mark, format!("{{\"version\":{SCHEMA}}}"));
    done(store, &[], &[put(&keys::schema(), "{\"version\":99}")]).await;
    let report = adopt(store).await.unwrap_err().report();
    assert!(report.contains("written by a newer pavo (schema 99"), "{report}");
    assert!(report.contains("help: run the newer pavo"), "{report}");
}

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

async fn any_commits_leave_what_a_map_would_hold<P: Place>(place: P) {
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

/// Runs the contract for each kind of store.
macro_rules! contract {
    ($($store:ident: $place:ty;)*) => {
        $(mod $store {
            each_test!($place);
        })*
    };
}

macro_rules! tests {
    ($($test:ident)*) => {
        macro_rules! each_test {
            ($place:ty) => {
                #[test]
                fn child() {
                    super::child::<$place>();
                }

                $(#[test]
                fn $test() {
                    super::run(super::$test::<$place>(super::Place::new()));
                })*
            };
        }
    };
}

tests! {
    a_commit_is_done_only_if_all_checks_hold
    a_commit_as_large_as_the_limits_is_done
    json_is_read_as_it_was_written
    no_increment_is_lost_between_threads
    no_increment_is_lost_between_processes
    a_prefix_ends_at_its_slash
    pages_cover_a_prefix_without_gap_or_overlap
    pages_hold_what_stays_while_others_write
    a_watch_gives_a_commit_whole_however_large
    a_watch_that_is_interrupted_again_and_again_misses_nothing
    a_watch_sees_each_change_once_and_in_order
    a_watch_resumes_from_any_revision
    a_watch_sees_all_that_processes_and_threads_write
    a_lost_history_is_said
    a_lease_takes_its_entries_along
    the_end_of_a_lease_is_seen_by_watches
    a_paused_holder_changes_nothing_when_it_wakes
    a_pool_gives_an_id_to_one_owner_only
    a_pool_gives_the_smallest_ids_first
    a_pool_remembers_what_was_freed
    an_empty_pool_says_who_has_it_all
    job_ids_count_up_and_begin_again_at_the_end
    a_store_of_a_newer_pavo_is_refused
    any_commits_leave_what_a_map_would_hold
}

contract! {
    embedded_store: super::EmbeddedPlace;
    etcd_store: super::EtcdPlace;
}
