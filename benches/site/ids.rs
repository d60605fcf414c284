//! Ids of a pool that is nearly full, over TLS, as nodes take them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use pavo::model::owner::{Manager, Owner};
use pavo::store::etcd::{Access, Etcd, Login};
use pavo::store::pool::Pool;
use pavo::store::{Change, Commit, Store};

use super::world::Site;
use super::{median, row, say};

const HELD: u32 = 60_000;
const JOBS: u32 = 100;
const ROUNDS: usize = 31;
const POOL: &str = "bench";

pub fn bench() {
    let site = Site::up(1);
    let host = site.lab.host("n1");
    let store = site.lab.store().unwrap();
    // As the files of the host name them.
    let access = Access {
        endpoints: store.endpoints.clone(),
        ca: Some("/etc/pavo/ca.pem".into()),
        certificate: None,
        login: Login::Certificate {
            cert: "/etc/pavo/node/node.pem".into(),
            key: "/etc/pavo/node/node-key.pem".into(),
        },
    };
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(measure(&access));
        Ok(())
    };
    host.inside(work).unwrap();
}

async fn measure(access: &Access) {
    let store = Etcd::connect(access).await.unwrap();
    let owner = |job| Owner { manager: Manager::Slurm, job };
    for first in (0..HELD).step_by(100) {
        let put = |id| Change::put_json(pavo::store::keys::pool_id(POOL, id), &owner(1)).unwrap();
        let puts: Vec<Change> = (first..first + 100).map(put).collect();
        assert!(matches!(store.commit(&[], &puts).await.unwrap(), Commit::Done(_)));
    }
    let pool = Pool::new(&store, POOL, 0..=u32::from(u16::MAX));
    // The first finds the free ones and remembers where they begin.
    let first = Instant::now();
    pool.take(owner(2), 1).await.unwrap();
    let first = first.elapsed().as_secs_f64() * 1e3;
    let (mut takes, mut puts) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let start = Instant::now();
        pool.take(owner(3), 1).await.unwrap();
        takes.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        let put = Change::put_json(pavo::store::keys::pool_id("other", 1), &round).unwrap();
        drop(store.commit(&[], &[put]).await.unwrap());
        puts.push(start.elapsed().as_secs_f64() * 1e3);
    }
    say(&format!("ids, {HELD} held, median of {ROUNDS}                 pavo        put  ratio"));
    row("one more id (ms)", median(&mut takes), median(&mut puts), "5 ms at most");
    say(&format!("  the very first, by reading all: {first:.0} ms"));
    together(access).await;
}

/// Jobs that come at the same moment, each with a connection of its own.
async fn together(access: &Access) {
    let connections = (0..JOBS).map(|_| Etcd::connect(access));
    let stores: Vec<Etcd> =
        futures_util::future::join_all(connections).await.into_iter().map(Result::unwrap).collect();
    let stores: Vec<Arc<Etcd>> = stores.into_iter().map(Arc::new).collect();
    let start = Instant::now();
    let takes = stores.iter().zip(100..).map(|(store, job)| async move {
        let pool = Pool::new(&**store, POOL, 0..=u32::from(u16::MAX));
        pool.take(Owner { manager: Manager::Slurm, job }, 2).await.unwrap()
    });
    let taken = futures_util::future::join_all(takes).await;
    let all: Vec<u32> = taken.into_iter().flatten().collect();
    let distinct: BTreeSet<u32> = all.iter().copied().collect();
    let took = start.elapsed().as_secs_f64() * 1e3;
    say(&format!(
        "  {JOBS} jobs at once, 2 ids each: {} ids, {} of them twice, in {took:.0} ms    never one twice",
        all.len(),
        all.len() - distinct.len()
    ));
    assert_eq!(all.len(), distinct.len());
}
