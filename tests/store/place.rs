//! A kind of store: where it is, more hands on it, and what tests do with them.

use std::process::{Child, Command, Stdio};

use pavo::model::owner::Owner;
use pavo::store::etcd::{Access, Etcd, Login};
use pavo::store::pool::Pool;
use std::time::Duration;

use pavo::store::{Change, Check, Commit, Entry, LeaseId, Revision, Store, embedded, list_all};

use super::helpers::{add_one, done, put, run};
use super::server;

/// Tells a process of this binary which store it is to use, and for what.
const CHILD: &str = "PAVO_TEST_STORE_CHILD";

/// Where one store is, empty at first and gone with the test.
pub trait Place {
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

pub struct EmbeddedPlace(tempfile::TempDir);

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

pub struct EtcdPlace(server::Cluster);

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

/// Runs `work` with a handle of its own on each of `count` threads.
pub fn on_threads<P: Place>(place: &P, count: usize, work: impl AsyncFn(usize, &dyn Store) + Sync) {
    let address = place.address();
    std::thread::scope(|scope| {
        for number in 0..count {
            let (address, work) = (&address, &work);
            scope.spawn(move || run(async { work(number, &*P::open(address).await).await }));
        }
    });
}

/// A process that does `what` of [`child`] to the store at `place`.
pub fn process<P: Place>(place: &P, what: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", P::CHILD, "--nocapture"])
        .env(CHILD, format!("{what} {}", place.address()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// What the processes do that tests start. Without [`CHILD`] there is nothing to do.
pub fn child<P: Place>() {
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

pub async fn increment(store: &dyn Store, times: u32) {
    for _ in 0..times {
        add_one(store).await;
    }
}

pub fn clear(prefix: &str) -> Change {
    Change::DeletePrefix { prefix: prefix.into() }
}

/// Commits what must have one.
pub async fn conflict(store: &dyn Store, checks: &[Check], changes: &[Change]) -> Vec<Entry> {
    match store.commit(checks, changes).await.unwrap() {
        Commit::Conflict(entries) => entries,
        Commit::Done(revision) => panic!("done at {revision}"),
    }
}

pub async fn names(store: &dyn Store, prefix: &str) -> Vec<String> {
    let (entries, _) = list_all(store, prefix).await.unwrap();
    entries.into_iter().map(|entry| entry.key).collect()
}

pub async fn write_numbers(store: &dyn Store, name: &str) {
    for number in 0..50 {
        let own = put(&format!("/t/n/{name}"), &number.to_string());
        done(store, &[], &[own, put("/other/n", "unseen")]).await;
    }
}

/// Puts `key` under a new lease.
pub async fn leased(store: &dyn Store, key: &str, ttl: Duration) -> LeaseId {
    let lease = store.lease(ttl).await.unwrap();
    done(store, &[Check::Absent(key.into())], &[put(key, "held").with_lease(lease)]).await;
    assert_eq!(store.get(key).await.unwrap().unwrap().lease, Some(lease));
    lease
}
