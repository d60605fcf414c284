//! Commits and reads: what holds when several write.

use std::process::Child;

use pavo::error::Kind;
use pavo::store::{Change, Check, MAX_COMMIT_BYTES, MAX_PAGE, get_json, put_json};

use super::helpers::{done, put, value};
use super::place::{Place, clear, conflict, increment, names, on_threads, process};

pub async fn a_commit_is_done_only_if_all_checks_hold<P: Place>(place: P) {
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

pub async fn a_commit_as_large_as_the_limits_is_done<P: Place>(place: P) {
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

pub async fn json_is_read_as_it_was_written<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let revision = put_json(store, "/t/j", &vec![Some(1), None]).await.unwrap();
    let read = get_json::<Vec<Option<u8>>>(store, "/t/j").await.unwrap();
    assert_eq!(read, Some((vec![Some(1), None], revision)));
    assert_eq!(get_json::<u8>(store, "/t/none").await.unwrap(), None);
    let report = get_json::<u8>(store, "/t/j").await.unwrap_err().report();
    assert!(report.contains("reading the stored `/t/j`"), "{report}");
}

pub async fn no_increment_is_lost_between_threads<P: Place>(place: P) {
    on_threads(&place, 4, async |_, store| increment(store, 200).await);
    assert_eq!(value(&*P::open(&place.address()).await, "/t/counter").await.unwrap(), "800");
}

pub async fn no_increment_is_lost_between_processes<P: Place>(place: P) {
    let children: Vec<Child> = (0..3).map(|_| process(&place, "increment")).collect();
    increment(&*P::open(&place.address()).await, 200).await;
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(value(&*P::open(&place.address()).await, "/t/counter").await.unwrap(), "800");
}

pub async fn a_prefix_ends_at_its_slash<P: Place>(place: P) {
    let store = &*P::open(&place.address()).await;
    let all = ["/t/a", "/t/a!", "/t/a/", "/t/a/x", "/t/a/y/z", "/t/a/\u{10ffff}", "/t/a0", "/t/ab"];
    done(store, &[], &all.map(|key| put(key, ""))).await;
    assert_eq!(names(store, "/t/a/").await, ["/t/a/x", "/t/a/y/z", "/t/a/\u{10ffff}"]);
    assert_eq!(store.list("/t/a", None, 1).await.unwrap_err().kind(), Kind::Bug);
    done(store, &[], &[clear("/t/a/")]).await;
    assert_eq!(names(store, "/t/").await, ["/t/a", "/t/a!", "/t/a/", "/t/a0", "/t/ab"]);
}

pub async fn pages_cover_a_prefix_without_gap_or_overlap<P: Place>(place: P) {
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

pub async fn pages_hold_what_stays_while_others_write<P: Place>(place: P) {
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
