//! A site's etcd that misbehaves: members that die, hang, fill up; log-ins that end.
//!
//! `tests/store` holds what every store must do; here is what only a cluster of
//! servers can do wrong. Who may do what is in `site.rs`.

use std::time::{Duration, Instant};

use etcd_client::Client;
use helpers::{add_one, changes, done, put, run, value};
use pavo::error::Kind;
use pavo::model::owner::Owner;
use pavo::store::etcd::{Access, Etcd, Login};
use pavo::store::pool::Pool;
use pavo::store::{Change, Check, Store, keys, list_all};
use server::{Cluster, Setup};

mod certificates;
#[path = "../shared/store.rs"]
mod helpers;
mod lost;
mod server;
mod site;

fn plain(cluster: &Cluster, login: Login) -> Access {
    Access { endpoints: cluster.endpoints(), ca: None, certificate: None, login }
}

async fn open(cluster: &Cluster) -> Etcd {
    Etcd::connect(&plain(cluster, Login::None)).await.unwrap()
}

fn three() -> Cluster {
    Cluster::start(Setup { members: 3, ..Setup::default() })
}

/// The number of the member that leads.
async fn leader(cluster: &Cluster) -> usize {
    loop {
        for (number, endpoint) in cluster.endpoints().iter().enumerate() {
            let mut client = Client::connect([endpoint], None).await.unwrap();
            if let Ok(status) = client.status().await {
                if status.header().unwrap().member_id() == status.leader() {
                    return number;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Counts up, as one of several who do.
async fn increment(store: &Etcd, times: u32) {
    for _ in 0..times {
        add_one(store).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Follows the counter to its last value: each once, in order.
async fn follow(store: &Etcd, last: u32) {
    let mut watch = store.watch("/t/", 0).await.unwrap();
    for number in 1..=last {
        assert_eq!(changes(&mut watch).await.1, [format!("/t/counter={number}")]);
    }
}

#[test]
fn no_commit_is_lost_or_done_twice_while_leaders_die() {
    run(async {
        let mut cluster = three();
        let (a, b, c) = (open(&cluster).await, open(&cluster).await, open(&cluster).await);
        let work = async { tokio::join!(increment(&a, 300), increment(&b, 300), follow(&c, 600)) };
        let trouble = async {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_millis(300)).await;
                let number = leader(&cluster).await;
                cluster.members[number].kill();
                tokio::time::sleep(Duration::from_millis(1500)).await;
                cluster.run(number);
                tokio::time::sleep(Duration::from_millis(700)).await;
            }
        };
        tokio::join!(work, trouble);
        assert_eq!(value(&a, "/t/counter").await.unwrap(), "600");
    });
}

#[test]
fn a_lost_leader_is_hidden() {
    run(async {
        let mut cluster = three();
        let store = open(&cluster).await;
        done(&store, &[], &[put("/t/a", "1")]).await;
        let number = leader(&cluster).await;
        cluster.members[number].kill();
        let begun = Instant::now();
        let entry = store.get("/t/a").await.unwrap().unwrap();
        let read = begun.elapsed();
        let check = Check::Revision("/t/a".into(), entry.revision);
        done(&store, &[check], &[put("/t/a", "2")]).await;
        assert_eq!(value(&store, "/t/a").await.unwrap(), "2");
        println!("leader killed: read after {read:.1?}, written after {:.1?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_member_that_hangs_is_left_and_what_it_was_told_comes_too_late() {
    run(async {
        let cluster = three();
        let store = open(&cluster).await;
        done(&store, &[], &[put("/t/a", "0")]).await;
        let mut watch = store.watch("/t/", 0).await.unwrap();
        assert_eq!(changes(&mut watch).await.1, ["/t/a=0"]);
        let used = store.member().unwrap();
        let hanging = cluster.members.iter().find(|member| member.client == used).unwrap();
        hanging.pause();
        let begun = Instant::now();
        // Told to the one that hangs, then to another; both have no check of ours.
        done(&store, &[], &[put("/t/a", "1")]).await;
        println!("member paused: written after {:.1?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
        assert_ne!(store.member().unwrap(), used);
        done(&store, &[], &[put("/t/a", "2")]).await;
        assert_eq!(changes(&mut watch).await.1, ["/t/a=1"]);
        println!("member paused: watched after {:.1?}", begun.elapsed());
        assert_eq!(changes(&mut watch).await.1, ["/t/a=2"]);
        hanging.resume();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(value(&store, "/t/a").await.unwrap(), "2");
        done(&store, &[], &[put("/t/a", "3")]).await;
        assert_eq!(changes(&mut watch).await.1, ["/t/a=3"], "1 does not come again");
    });
}

#[test]
fn a_cluster_that_does_not_answer_is_named_with_reasons() {
    run(async {
        let mut cluster = three();
        let store = open(&cluster).await;
        done(&store, &[], &[put("/t/a", "1")]).await;
        for number in [0, 1] {
            cluster.members[number].kill();
        }
        let begun = Instant::now();
        let report = store.get("/t/a").await.unwrap_err().report();
        println!("{:.1?}: {report}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        assert!(report.contains("reading `/t/a`"), "{report}");
        assert!(report.contains("etcd does not answer"), "{report}");
        for member in &cluster.members {
            assert!(report.contains(&format!("`{}`: ", member.client)), "{report}");
        }
        assert!(report.contains("refused"), "{report}");
        assert!(report.contains("help: look at its members"), "{report}");
        // It comes back, and so do we, with the same handle.
        cluster.run(0);
        while store.get("/t/a").await.is_err() {}
        done(&store, &[], &[put("/t/a", "2")]).await;

        let begun = Instant::now();
        let nobody =
            Access { endpoints: vec!["http://127.0.0.1:1".into()], ..plain(&cluster, Login::None) };
        let report = Etcd::connect(&nobody).await.unwrap_err().report();
        assert!(report.contains("connecting to etcd"), "{report}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    });
}

#[test]
fn members_that_are_down_do_not_delay_the_others() {
    run(async {
        let mut cluster = three();
        let hanging = leader(&cluster).await;
        let dead = (hanging + 1) % 3;
        let store = open(&cluster).await;
        done(&store, &[], &[put("/t/a", "1")]).await;
        cluster.members[dead].kill();
        let begun = Instant::now();
        for _ in 0..5 {
            assert_eq!(value(&open(&cluster).await, "/t/a").await.unwrap(), "1");
        }
        // One of them waiting for the dead or the hanging would take its whole limit.
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_full_etcd_says_so_and_is_still_read() {
    run(async {
        let args = vec!["--quota-backend-bytes=4000000".into()];
        let cluster = Cluster::start(Setup { members: 1, args, tls: None });
        let store = open(&cluster).await;
        let large = "x".repeat(1_000_000);
        let mut error = None;
        for number in 0..100 {
            let change = put(&format!("/t/{number}"), &large);
            match store.commit(&[], &[change]).await {
                // etcd counts what it has written, a tenth of a second later.
                Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(full) => {
                    error = Some(full);
                    break;
                }
            }
        }
        let error = error.expect("a quota that holds");
        assert_eq!(error.kind(), Kind::System);
        let report = error.report();
        assert!(report.contains("etcd is full") && report.contains("NOSPACE"), "{report}");
        assert!(report.contains("etcdctl alarm disarm"), "{report}");
        assert_eq!(value(&store, "/t/0").await.unwrap().len(), large.len());
        let all = Change::DeletePrefix { prefix: "/t/".into() };
        done(&store, &[], &[all]).await;
        assert!(list_all(&store, "/t/").await.unwrap().0.is_empty());
    });
}

#[test]
fn a_hundred_takers_never_get_the_same_id() {
    run(async {
        let cluster = three();
        let begun = Instant::now();
        let take = async |number: u32| {
            let store = open(&cluster).await;
            let pool = Pool::new(&store, "vni", 1..=1000);
            pool.take(Owner::local(number), 3).await.unwrap()
        };
        let taken = futures_util::future::join_all((1..=100).map(take)).await;
        println!("100 takers of 3 ids: {:.1?}", begun.elapsed());
        let mut all: Vec<u32> = taken.concat();
        all.sort_unstable();
        assert_eq!(all, (1..=300).collect::<Vec<_>>());
    });
}

#[test]
fn an_id_is_taken_quickly_however_many_are_held() {
    run(async {
        let cluster = Cluster::single();
        let store = open(&cluster).await;
        let (held, mine) = (Owner::local(1), Owner::local(2));
        let pool = Pool::new(&store, "vni", 0..=99_999);
        let ids: Vec<u32> = (0..60_000).collect();
        for some in ids.chunks(120) {
            let put = |id: &u32| Change::put_json(keys::pool_id("vni", *id), &held).unwrap();
            done(&store, &[], &some.iter().map(put).collect::<Vec<_>>()).await;
        }
        // The first finds where the free ones begin.
        assert_eq!(pool.take(mine, 1).await.unwrap(), [60_000]);
        let measure = async || {
            let begun = Instant::now();
            let id = pool.take(mine, 1).await.unwrap();
            (id[0], begun.elapsed())
        };
        let mut times = Vec::new();
        for number in 1..=20 {
            let (id, time) = measure().await;
            assert_eq!(id, 60_000 + number);
            times.push(time);
        }
        times.sort_unstable();
        // Some of the first are free again: all the others lie behind them.
        assert_eq!(pool.free(held, &[5, 7]).await.unwrap(), 2);
        let (id, low) = measure().await;
        assert_eq!(id, 5);
        assert_eq!(measure().await.0, 7);
        let (id, after) = measure().await;
        assert_eq!(id, 60_021);
        println!(
            "60,000 ids held: take {:.1?} (median of 20), a low one {low:.1?}, then {after:.1?}",
            times[10]
        );
    });
}
