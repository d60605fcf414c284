//! Answers that are lost after what was asked has been done.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use etcd_client::{Client, GetOptions};
use pavo::model::owner::Owner;
use pavo::store::etcd::{Access, Etcd, Login};
use pavo::store::pool::Pool;
use pavo::store::{Change, Check, Commit, Entry, Store, keys};

use crate::server::Cluster;
use crate::{done, increment, open, plain, put, run, value};

/// How long the answers are swallowed before the connection ends.
const SILENCE: Duration = Duration::from_millis(200);

/// The way to a member, on which answers can be lost.
struct Way {
    endpoint: String,
    lose: Arc<AtomicBool>,
}

impl Way {
    fn to(endpoint: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let way = format!("http://{}", listener.local_addr().unwrap());
        let lose = Arc::new(AtomicBool::new(false));
        let (target, flag) = (endpoint.strip_prefix("http://").unwrap().to_owned(), lose.clone());
        // Ends with the test's process: it waits in `accept`.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, flag) = (client.unwrap(), flag.clone());
                let Ok(server) = TcpStream::connect(&target) else { continue };
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || forward(from, to, None));
                std::thread::spawn(move || forward(server, client, Some(&flag)));
            }
        });
        Self { endpoint: way, lose }
    }

    /// What is answered from now on is swallowed, until the connection is over.
    fn lose_next(&self) {
        self.lose.store(true, Ordering::SeqCst);
    }

    fn has_lost(&self) -> bool {
        !self.lose.load(Ordering::SeqCst)
    }

    async fn open(&self, cluster: &Cluster) -> Etcd {
        let endpoints = vec![self.endpoint.clone()];
        let access = Access { endpoints, ..plain(cluster, Login::None) };
        Etcd::connect(&access).await.unwrap()
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, lose: Option<&AtomicBool>) {
    let mut buffer = [0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if lose.is_some_and(|lose| lose.load(Ordering::SeqCst)) {
            std::thread::sleep(SILENCE);
            lose.unwrap().store(false, Ordering::SeqCst);
            break;
        }
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for end in [from, to] {
        let _ = end.shutdown(Shutdown::Both);
    }
}

async fn commit(way: &Way, store: &Etcd, checks: &[Check], changes: &[Change]) -> Commit {
    way.lose_next();
    let outcome = store.commit(checks, changes).await.unwrap();
    assert!(way.has_lost(), "no answer was lost");
    outcome
}

async fn get(store: &Etcd, key: &str) -> Entry {
    store.get(key).await.unwrap().unwrap()
}

#[test]
fn a_commit_whose_answer_is_lost_is_done_once_and_known_to_be() {
    run(async {
        let cluster = Cluster::single();
        let way = Way::to(&cluster.endpoints()[0]);
        let store = way.open(&cluster).await;

        // Without a check.
        let outcome = commit(&way, &store, &[], &[put("/t/a", "1")]).await;
        let a = get(&store, "/t/a").await;
        assert_eq!(outcome, Commit::Done(a.revision));
        // One that would not be repeated with its check.
        let check = [Check::Revision("/t/a".into(), a.revision)];
        let outcome = commit(&way, &store, &check, &[put("/t/a", "2")]).await;
        assert_eq!(outcome, Commit::Done(get(&store, "/t/a").await.revision));
        // One whose check holds afterwards as well.
        let exists = [Check::Exists("/t/a".into())];
        let outcome = commit(&way, &store, &exists, &[put("/t/b", "1")]).await;
        let b = get(&store, "/t/b").await;
        assert_eq!((outcome, b.created), (Commit::Done(b.revision), b.revision), "not put twice");
        // One that fails stays a failure, and does not happen later.
        let outcome = commit(&way, &store, &check, &[put("/t/a", "3")]).await;
        assert_eq!(outcome, Commit::Conflict(vec![get(&store, "/t/a").await]));
        assert_eq!(value(&store, "/t/a").await.unwrap(), "2");
        // A deletion.
        let outcome = commit(&way, &store, &exists, &[Change::delete("/t/a")]).await;
        assert!(matches!(outcome, Commit::Done(revision) if revision > b.revision));
        assert_eq!(store.get("/t/a").await.unwrap(), None);
        // One that changes nothing, which has no fence.
        let outcome = commit(&way, &store, &[], &[Change::delete("/t/a")]).await;
        assert!(matches!(outcome, Commit::Done(_)));
    });
}

#[test]
fn nothing_is_counted_twice_though_answers_are_lost() {
    run(async {
        let cluster = Cluster::single();
        let way = Way::to(&cluster.endpoints()[0]);
        let (store, other) = (way.open(&cluster).await, open(&cluster).await);
        let losing = async {
            let mut lost = 0;
            while lost < 10 {
                let entry = store.get("/t/counter").await.unwrap();
                let number: u32 = entry.as_ref().map_or(0, |entry| entry.json().unwrap());
                let check = Check::unchanged("/t/counter", entry.as_ref());
                let change = Change::put_json("/t/counter", &(number + 1)).unwrap();
                if let Commit::Done(_) = commit(&way, &store, &[check], &[change]).await {
                    lost += 1;
                }
            }
        };
        tokio::join!(losing, increment(&other, 100));
        assert_eq!(value(&store, "/t/counter").await.unwrap(), "110");

        let pool = Pool::new(&store, "p", 1..=100);
        for number in 1..=8 {
            // Now and then it is the last of its three requests.
            let lose = async {
                tokio::time::sleep(Duration::from_millis((number / 2).into())).await;
                way.lose_next();
            };
            let (taken, ()) = tokio::join!(pool.take(Owner::local(1), 1), lose);
            assert_eq!(taken.unwrap(), [number], "no id is lost");
        }
        way.lose_next();
        let lease = store.lease(Duration::from_secs(60)).await.unwrap();
        let mut client = Client::connect(cluster.endpoints(), None).await.unwrap();
        let leases = client.leases().await.unwrap();
        let leases: Vec<i64> = leases.leases().iter().map(|lease| lease.id()).collect();
        assert_eq!(leases, [lease.0]);
        way.lose_next();
        store.revoke(lease).await.unwrap();
        assert!(!store.keep_alive(lease).await.unwrap());
    });
}

/// Two handles that share a fence: what the first wrote there is history when it looks.
#[test]
fn a_fence_that_another_has_moved_still_tells() {
    run(async {
        let cluster = Cluster::single();
        let way = Way::to(&cluster.endpoints()[0]);
        let store = way.open(&cluster).await;
        done(&store, &[], &[put("/t/a", "0")]).await;
        let mut client = Client::connect(cluster.endpoints(), None).await.unwrap();
        let fences = GetOptions::new().with_prefix();
        let found = client.get(keys::fences(""), Some(fences)).await.unwrap();
        let [fence] = found.kvs() else { panic!("one commit, one fence") };
        let fence = fence.key().to_vec();

        let direct = open(&cluster).await;
        let other = async {
            while direct.get("/t/b").await.unwrap().is_none() {}
            // While the first waits for its answer.
            for mark in ["one", "two", "three"] {
                client.put(fence.clone(), mark, None).await.unwrap();
            }
            assert!(!way.has_lost(), "this machine is too slow for this test");
        };
        let change = [put("/t/b", "1")];
        let (outcome, ()) = tokio::join!(commit(&way, &store, &[], &change), other);
        let b = get(&store, "/t/b").await;
        assert_eq!((outcome, b.created), (Commit::Done(b.revision), b.revision), "not put twice");
        // Moved by another, and nothing lost.
        client.put(fence.clone(), "four", None).await.unwrap();
        done(&store, &[], &[put("/t/a", "2")]).await;
        assert_eq!(value(&store, "/t/a").await.unwrap(), "2");
    });
}
