//! What only this store promises; the rest is in `tests/store`.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::error::Kind;
use crate::store::{Seen, keys, list_all, put_json};
use futures_util::StreamExt;

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limit = Duration::from_secs(60);
    runtime.block_on(async { tokio::time::timeout(limit, test).await }).expect("it hangs")
}

fn temp() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("state");
    (temp, dir)
}

fn files(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(name).map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// SQL on the file behind the store's back.
fn sql(dir: &Path, text: &str) {
    Connection::open(dir.join(FILE)).unwrap().execute_batch(text).unwrap();
}

fn holds(report: &str, parts: &[&str]) {
    for part in parts {
        assert!(report.contains(part), "`{part}` is not in\n{report}");
    }
}

#[test]
fn reading_creates_nothing() {
    let (temp, dir) = temp();
    run(async {
        assert!(open_existing(&dir).await.unwrap().is_none());
        assert!(files(temp.path()).is_empty());
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, PermissionsExt::from_mode(0o700)).unwrap();
        assert!(open_existing(&dir).await.unwrap().is_none());
        assert!(files(&dir).is_empty());

        drop(open(&dir).await.unwrap());
        let store = open_existing(&dir).await.unwrap().expect("it was made");
        assert_eq!(list_all(&store, &keys::jobs("ada")).await.unwrap().0, []);
    });
    assert_eq!(files(&dir), [FILE], "and nothing stays beside the file");
    assert_eq!(fs::metadata(dir.join(FILE)).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn many_may_make_the_store_at_once() {
    let (_temp, dir) = temp();
    let make = || {
        run(async {
            let store = open(&dir).await.unwrap();
            put_json(&store, "/t/x", "x").await.unwrap();
        });
    };
    std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(make))));
    assert_eq!(files(&dir), [FILE]);
    let (entries, revision) =
        run(async { list_all(&open(&dir).await.unwrap(), "/t/").await.unwrap() });
    assert_eq!((entries.len(), revision), (1, 9), "the mark, and one change of each");
}

#[test]
fn a_full_disk_is_one_clear_error_and_loses_nothing() {
    let (_temp, dir) = temp();
    run(async {
        let store = open(&dir).await.unwrap();
        let kept = put_json(&store, "/t/kept", "kept").await.unwrap();
        // SQLite's own limit: the same error as the disk's.
        let limit = "PRAGMA max_page_count = 30";
        store.0.connection.lock().unwrap().execute_batch(limit).unwrap();
        let large = "x".repeat(500_000);
        let error = put_json(&store, "/t/large", &large).await.unwrap_err();
        assert_eq!(error.kind(), Kind::System);
        holds(
            &error.report(),
            &["changing the store", "no space is left for `", "help: free some"],
        );
        let (entries, revision) = list_all(&store, "/t/").await.unwrap();
        assert_eq!((entries.len(), revision), (1, kept));
        put_json(&store, "/t/kept", "small").await.unwrap();
    });
}

#[test]
fn a_damaged_store_says_what_to_do() {
    let (_temp, dir) = temp();
    run(async {
        drop(open(&dir).await.unwrap());
        let file = dir.join(FILE);
        let good = fs::read(&file).unwrap();
        let mut torn = good.clone();
        torn[4096..].fill(0x55);
        let text = b"not a database, but long enough to be looked at".repeat(100);
        for bad in [&torn[..], &text, b""] {
            fs::write(&file, bad).unwrap();
            let error = open(&dir).await.unwrap_err();
            assert_eq!(error.kind(), Kind::System, "{error:?}");
            holds(
                &error.report(),
                &["opening the store in `", "is damaged", "help: end your", "mv "],
            );
            assert_eq!(files(&dir), [FILE]);
        }
        fs::write(&file, good).unwrap();
        open(&dir).await.unwrap();
    });
}

#[test]
fn tables_of_a_newer_pavo_are_refused() {
    let (_temp, dir) = temp();
    run(async {
        drop(open(&dir).await.unwrap());
        sql(&dir, "PRAGMA user_version = 2");
        for error in [open(&dir).await.err(), open_existing(&dir).await.err()] {
            holds(&error.unwrap().report(), &["written by a newer pavo (schema 2"]);
        }
    });
}

#[test]
fn a_lock_that_stays_is_an_error_and_one_that_goes_is_waited_for() {
    let (_temp, dir) = temp();
    run(async {
        let store = open(&dir).await.unwrap();
        let other = Connection::open(dir.join(FILE)).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert!(store.get("/t/x").await.unwrap().is_none(), "readers do not wait");
        let put = put_json(&store, "/t/x", "x");
        let free = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            other.execute_batch("COMMIT").unwrap();
        };
        // The runtime goes on while the writer waits, else the lock would stay.
        tokio::join!(put, free).0.unwrap();

        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let error = put_json(&store, "/t/x", "y").await.unwrap_err();
        holds(&error.report(), &["locked by another process for 5 s", "help: find a process"]);
    });
}

#[test]
fn a_lease_of_an_earlier_boot_is_over() {
    let (_temp, dir) = temp();
    run(async {
        let store = open(&dir).await.unwrap();
        let lease = store.lease(Duration::from_secs(3600)).await.unwrap();
        let put = Change::put_json("/t/l", "x").unwrap().with_lease(lease);
        assert!(matches!(store.commit(&[], &[put]).await.unwrap(), Commit::Done(_)));
        let mut watch = store.watch("/t/", 0).await.unwrap();
        watch.next().await.unwrap().unwrap();

        sql(&dir, "UPDATE lease SET boot = 'another'");
        assert!(store.get("/t/l").await.unwrap().is_none(), "gone before anybody wrote");
        assert_eq!(list_all(&store, "/t/").await.unwrap().0, []);
        assert!(!store.keep_alive(lease).await.unwrap());
        put_json(&store, "/other", "a writer").await.unwrap();
        let Seen::Changes { events, .. } = watch.next().await.unwrap().unwrap() else {
            panic!("lost")
        };
        assert!(matches!(&events[..], [super::super::Event::Delete { key, .. }] if key == "/t/l"));
    });
}

#[test]
fn a_store_that_was_deleted_is_not_written_in_secret() {
    let (_temp, dir) = temp();
    run(async {
        let store = open(&dir).await.unwrap();
        let mut watch = store.watch("/t/", 1).await.unwrap();
        // Let the watch begin to wait.
        assert!(tokio::time::timeout(Duration::from_millis(20), watch.next()).await.is_err());
        fs::remove_file(dir.join(FILE)).unwrap();
        let report = watch.next().await.unwrap().unwrap_err().report();
        holds(&report, &["was deleted while in use", "help: end the clusters"]);
        open(&dir).await.unwrap();
        assert!(put_json(&store, "/t/x", "x").await.is_err());
    });
}

#[test]
fn history_and_file_stay_small() {
    let (_temp, dir) = temp();
    run(async {
        let store = open(&dir).await.unwrap();
        let value = "x".repeat(20_000);
        for _ in 0..1000 {
            put_json(&store, "/t/x", &value).await.unwrap();
        }
        let size = fs::metadata(dir.join(FILE)).unwrap().len();
        assert!(size < 12 << 20, "{size} bytes after 20 MB of changes to one key");
    });
}

/// Runs where `dir` is a disk of 1 MiB that nobody else sees. Mounting it needs root.
fn on_small_disk(dir: &Path, test: impl FnOnce() + Send) {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "needs root");
        let _ = writeln!(std::io::stderr(), "skipped: mounting a small disk needs root");
        return;
    }
    fs::create_dir_all(dir).unwrap();
    let (none, tmpfs) = (None::<&str>, Some("tmpfs"));
    // The mounts of a thread are its own, once it has asked for that.
    let mounted = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(tmpfs, dir, tmpfs, MsFlags::empty(), Some("size=1m,mode=700")).unwrap();
        test();
    };
    std::thread::scope(|scope| scope.spawn(mounted).join().unwrap());
}

#[test]
fn what_a_full_disk_refused_is_not_half_there() {
    let (_temp, dir) = temp();
    on_small_disk(&dir, || {
        run(async {
            let store = open(&dir).await.unwrap();
            let mut written = 0;
            let error = loop {
                let pair = ["a", "b"].map(|side| {
                    Change::put_json(format!("/t/{side}/{written}"), &"x".repeat(20_000)).unwrap()
                });
                match store.commit(&[], &pair).await {
                    Ok(commit) => assert!(matches!(commit, Commit::Done(_))),
                    Err(error) => break error,
                }
                written += 1;
                assert!(written < 100, "the disk does not get full");
            };
            holds(&error.report(), &["no space is left for `", "help: free some"]);
            let again = open_existing(&dir).await.unwrap().unwrap();
            for store in [&store, &again] {
                for prefix in ["/t/a/", "/t/b/"] {
                    assert_eq!(list_all(store, prefix).await.unwrap().0.len(), written);
                }
            }
        });
    });
}

#[test]
fn a_store_that_finds_no_room_is_made_whole_or_not_at_all() {
    let (_temp, dir) = temp();
    on_small_disk(&dir, || {
        let (filler, state) = (dir.join("filler"), dir.join("state"));
        fs::create_dir(&state).unwrap();
        fs::set_permissions(&state, PermissionsExt::from_mode(0o700)).unwrap();
        // One page more is free each time, so that it fails at one place after another.
        let mut made = 0;
        for pages in 0..48 {
            fs::write(&filler, vec![0; (1 << 20) - pages * 4096]).ok();
            match run(open(&state)) {
                Ok(_) => made += 1,
                Err(error) => holds(&error.report(), &["space"]),
            }
            fs::remove_file(&filler).unwrap();
            run(open(&state)).map(drop).unwrap_or_else(|e| panic!("{pages} pages: {e:?}"));
            assert_eq!(files(&state), [FILE]);
            fs::remove_file(state.join(FILE)).unwrap();
        }
        assert!((1..48).contains(&made), "{made}");
    });
}
