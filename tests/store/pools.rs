//! What is built on a store: pools of ids, counters of jobs, the schema's mark.

use pavo::model::owner::Owner;
use pavo::store::pool::{Pool, next_job};
use pavo::store::{Change, SCHEMA, adopt, keys, put_json};

use super::helpers::{done, put, value};
use super::place::{Place, on_threads, process};

pub async fn a_pool_gives_an_id_to_one_owner_only<P: Place>(place: P) {
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

pub async fn a_pool_gives_the_smallest_ids_first<P: Place>(place: P) {
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

pub async fn a_pool_remembers_what_was_freed<P: Place>(place: P) {
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

pub async fn an_empty_pool_says_who_has_it_all<P: Place>(place: P) {
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

pub async fn job_ids_count_up_and_begin_again_at_the_end<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let next = async || next_job(store, "ada").await.unwrap().job;
    assert_eq!((next().await, next().await), (1, 2));
    put_json(store, &keys::job_record("ada", Owner::local(1)), "alive").await.unwrap();
    put_json(store, &keys::job_record("ada", Owner::local(9_999_999)), "alive").await.unwrap();
    put_json(store, &keys::job_counter(), &9_999_997).await.unwrap();
    assert_eq!((next().await, next().await, next().await), (9_999_998, 2, 3));
}

pub async fn a_store_of_a_newer_pavo_is_refused<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    adopt(store).await.unwrap();
    let mark = value(store, &keys::schema()).await.unwrap();
    assert_eq!(mark, format!("{{\"version\":{SCHEMA}}}"));
    done(store, &[], &[put(&keys::schema(), "{\"version\":99}")]).await;
    let report = adopt(store).await.unwrap_err().report();
    assert!(report.contains("written by a newer pavo (schema 99"), "{report}");
    assert!(report.contains("help: run the newer pavo"), "{report}");
}
