//! What one repository promises: layout, atomicity, what deleting frees.

use super::*;

struct Fixture {
    dir: tempfile::TempDir,
    repo: Repository,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::new("user", dir.path().join("images"));
    Fixture { dir, repo }
}

impl Fixture {
    fn add(&self, name: &str, content: &str, replace: bool) -> Result<Revision> {
        let scratch = self.repo.scratch_folder()?;
        let disk = scratch.path().join("disk");
        fs::write(&disk, content).unwrap();
        self.repo.add(name, &disk, "alice", replace)
    }

    /// Every file, without those of the repository itself.
    fn files(&self) -> Vec<String> {
        fn walk(dir: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, found);
                } else {
                    found.push(path.to_str().unwrap().to_owned());
                }
            }
        }
        let mut found = Vec::new();
        walk(self.dir.path(), &mut found);
        found.retain(|path| !path.ends_with(".config"));
        found
    }
}

#[test]
fn what_is_written_is_what_pcocc_reads() {
    let f = fixture();
    f.add("tiny", "hello", false).unwrap();
    let root = f.dir.path().join("images");
    assert_eq!(fs::read_to_string(root.join(".config")).unwrap(), "version: 2\n");
    // sha256sum of "hello"
    let hash = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    let blob = root.join("data/2c").join(hash);
    assert_eq!(fs::read_to_string(&blob).unwrap(), "hello");
    assert_eq!(blob.metadata().unwrap().permissions().mode() & 0o777, 0o444);
    let meta = fs::read(root.join("meta/tiny@0")).unwrap();
    let meta: serde_json::Value = serde_json::from_slice(&meta).unwrap();
    assert_eq!(meta["name"], "tiny");
    assert_eq!(meta["revision"], 0);
    assert_eq!(meta["kind"], "vm");
    assert_eq!(meta["owner"], "alice");
    assert_eq!(meta["data_blobs"], serde_json::json!([hash]));
    assert_eq!(meta["custom_meta"], serde_json::json!({}));
    assert!(meta["timestamp"].is_f64());
    assert!(fs::read_dir(root.join(".tmp")).unwrap().next().is_none(), "nothing is left over");
}

#[test]
fn reading_makes_nothing() {
    let f = fixture();
    assert!(f.repo.newest().unwrap().is_empty());
    assert!(f.repo.revisions("tiny").unwrap().is_empty());
    assert!(!f.dir.path().join("images").exists());
}

#[test]
fn a_name_is_taken_once_unless_it_is_replaced() {
    let f = fixture();
    f.add("tiny", "one", false).unwrap();
    let error = f.add("tiny", "two", false).unwrap_err();
    assert_eq!(error.to_string(), "Image tiny already exists in repo user");
    assert_eq!(f.add("tiny", "two", true).unwrap().revision, 1);
    assert_eq!(f.repo.newest().unwrap(), [("tiny".to_owned(), 1)]);
    assert_eq!(f.files().len(), 4, "{:?}", f.files());
}

#[test]
fn imports_at_once_never_share_a_revision() {
    let f = fixture();
    let revisions = std::thread::scope(|scope| {
        let add = |index| {
            scope.spawn({
                let f = &f;
                move || f.add("tiny", &format!("content {index}"), true).unwrap().revision
            })
        };
        let threads: Vec<_> = (0..8).map(add).collect();
        let mut revisions: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        revisions.sort_unstable();
        revisions
    });
    assert_eq!(revisions, Vec::from_iter(0..8));
    assert_eq!(f.files().len(), 16);
}

#[test]
fn of_two_first_imports_one_wins() {
    let f = fixture();
    let wins = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|i| {
                scope.spawn({
                    let f = &f;
                    move || f.add("a", &i.to_string(), false)
                })
            })
            .collect();
        threads
            .into_iter()
            .filter(|_| true)
            .map(|t| t.join().unwrap())
            .filter(Result::is_ok)
            .count()
    });
    assert_eq!(wins, 1);
    assert_eq!(f.files().len(), 2, "the losers' blobs are not there");
}

#[test]
fn deleting_frees_what_nothing_else_needs() {
    let f = fixture();
    f.add("a", "shared", false).unwrap();
    f.add("a", "own", true).unwrap();
    f.add("b", "shared", false).unwrap();
    let freed = f.repo.delete("a", None).unwrap();
    assert_eq!(freed, Freed { revisions: vec![0, 1], blobs: 1, bytes: 3 });
    let freed = f.repo.delete("b", Some(0)).unwrap();
    assert_eq!(freed, Freed { revisions: vec![0], blobs: 1, bytes: 6 });
    assert!(f.files().is_empty());
}

#[test]
fn no_blob_goes_while_a_revision_cannot_be_read() {
    let f = fixture();
    f.add("a", "content", false).unwrap();
    let meta = f.dir.path().join("images/meta");
    fs::write(meta.join("b@0"), "{}").unwrap();
    let error = f.repo.delete("a", None).unwrap_err();
    assert!(error.report().contains("b@0"), "{error:?}");
    assert!(f.files().iter().any(|path| path.contains("/data/")));
}

#[test]
fn what_is_not_ours_is_refused() {
    let f = fixture();
    let root = f.dir.path().join("images");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("thesis.tex"), "").unwrap();
    let error = f.add("a", "x", false).unwrap_err();
    assert!(error.report().contains("the folder is not empty, and no repository"), "{error:?}");
    fs::write(root.join(".config"), "version: 1\n").unwrap();
    let error = f.repo.newest().unwrap_err();
    assert_eq!(error.to_string(), "the repository `user` has version 1, not 2");
}

#[test]
fn a_repository_can_be_made_by_many_at_once() {
    for _ in 0..100 {
        let f = fixture();
        let barrier = std::sync::Barrier::new(4);
        let make = || {
            barrier.wait();
            f.repo.initialise().unwrap();
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(make);
            }
        });
        assert!(f.repo.is_initialised().unwrap());
    }
}

#[test]
fn metadata_cannot_lead_out_of_the_repository() {
    let f = fixture();
    f.add("a", "x", false).unwrap();
    let path = f.dir.path().join("images/meta/a@0");
    let text = fs::read_to_string(&path).unwrap();
    let hash = f.repo.read("a", 0).unwrap().data_blobs[0].clone();
    for bad in ["../../../../etc/shadow", "é", "", &hash.to_uppercase()] {
        fs::remove_file(&path).unwrap();
        fs::write(&path, text.replace(&hash, bad)).unwrap();
        let error = f.repo.read("a", 0).unwrap_err();
        assert!(error.report().contains("is no hash"), "{error:?}");
    }
}

#[test]
fn what_nothing_needs_is_collected_and_nothing_else() {
    let f = fixture();
    assert_eq!(f.repo.collect(false).unwrap(), Collected::default());
    assert!(!f.dir.path().join("images").exists(), "looking makes nothing");
    f.add("a", "needed", false).unwrap();
    f.add("b", "not needed", false).unwrap();
    let root = f.dir.path().join("images");
    fs::remove_file(root.join("meta/b@0")).unwrap();
    // Not ours: never touched.
    fs::write(root.join("data/README"), "").unwrap();
    let running = f.repo.scratch_folder().unwrap();
    fs::write(running.path().join("disk"), "of an import").unwrap();
    let killed = root.join(".tmp/killed");
    fs::create_dir(&killed).unwrap();
    fs::write(killed.join("lock"), "").unwrap();
    fs::write(killed.join("disk"), "half").unwrap();

    let before = f.files();
    let expected = Collected { blobs: 1, unfinished: 1, bytes: 14 };
    assert_eq!(f.repo.collect(true).unwrap(), expected);
    assert_eq!(f.files(), before, "it only looked");
    assert_eq!(f.repo.collect(false).unwrap(), expected);
    assert_eq!(f.files().len(), before.len() - 3);
    assert_eq!(f.repo.collect(false).unwrap(), Collected::default());
    let revision = f.repo.add("c", &running.path().join("disk"), "alice", false).unwrap();
    for hash in [&revision.data_blobs[0], &f.repo.read("a", 0).unwrap().data_blobs[0]] {
        assert!(f.repo.blob(hash).exists());
    }
}

#[test]
fn nothing_is_collected_while_somebody_may_need_it() {
    let f = fixture();
    f.add("a", "content", false).unwrap();
    f.add("b", "not needed", false).unwrap();
    let meta = f.dir.path().join("images/meta");
    fs::remove_file(meta.join("b@0")).unwrap();
    // pcocc allows this name, pavo does not: its blobs are needed all the same.
    let strange = meta.join("..a@0");
    fs::copy(meta.join("a@0"), &strange).unwrap();
    let error = f.repo.collect(false).unwrap_err();
    assert!(error.report().contains("..a@0"), "{error:?}");
    let error = f.repo.delete("a", None).unwrap_err();
    assert!(error.report().contains("nobody knows which blobs it needs"), "{error:?}");
    assert_eq!(f.files().iter().filter(|path| path.contains("/data/")).count(), 2);
    fs::remove_file(&strange).unwrap();
    fs::write(meta.join(".nfs000000000012345600000001"), "").unwrap();
    assert_eq!(f.repo.collect(false).unwrap().blobs, 2);
}

#[test]
fn collecting_while_others_import_takes_nothing_of_theirs() {
    let f = fixture();
    std::thread::scope(|scope| {
        let importer = |name: &'static str| {
            let f = &f;
            move || {
                for number in 0..10 {
                    f.add(name, &format!("{name} {number}"), true).unwrap();
                }
            }
        };
        let importers = [scope.spawn(importer("a")), scope.spawn(importer("b"))];
        while !importers.iter().all(|thread| thread.is_finished()) {
            assert_eq!(f.repo.collect(false).unwrap(), Collected::default());
            // The others must get the lock, too.
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    assert_eq!(f.files().len(), 40);
}
