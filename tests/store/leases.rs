//! Leases: what goes when its holder does.

use std::time::Duration;

use pavo::error::Kind;
use pavo::store::{Check, Store};

use super::helpers::{changes, done, put, value};
use super::place::{Place, conflict, leased, names};

async fn gone(store: &dyn Store, key: &str) {
    while store.get(key).await.unwrap().is_some() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn a_lease_takes_its_entries_along<P: Place>(place: P) {
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

pub async fn the_end_of_a_lease_is_seen_by_watches<P: Place>(place: P) {
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

pub async fn a_paused_holder_changes_nothing_when_it_wakes<P: Place>(place: P) {
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
