//! Watches: each change once, in order, and lost history is said.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt;
use pavo::store::{Event, Seen, list_all};

use super::helpers::{changes, done, next, put, run};
use super::place::{Place, clear, leased, process, write_numbers};

pub async fn a_watch_gives_a_commit_whole_however_large<P: Place>(place: P) {
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

pub async fn a_watch_that_is_interrupted_again_and_again_misses_nothing<P: Place>(place: P) {
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

pub async fn a_watch_sees_each_change_once_and_in_order<P: Place>(place: P) {
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

pub async fn a_watch_resumes_from_any_revision<P: Place>(place: P) {
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

pub async fn a_watch_sees_all_that_processes_and_threads_write<P: Place>(place: P) {
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

pub async fn a_lost_history_is_said<P: Place>(place: P) {
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
