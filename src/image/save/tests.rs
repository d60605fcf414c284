//! What saving promises: a whole image or none, on top of what the VM ran from.

use std::fs;
use std::process::Command;

use super::*;
use crate::image::library::Source;
use crate::image::testing::two_repositories;

struct Fixture {
    dir: tempfile::TempDir,
    library: Library,
}

fn fixture() -> Fixture {
    let (dir, library) = two_repositories();
    fs::write(dir.path().join("disk.raw"), [1; 1 << 20]).unwrap();
    let raw = dir.path().join("disk.raw").display().to_string();
    library.import(Source::of(&raw), "site:base", "root").unwrap();
    Fixture { dir, library }
}

/// What a VM's process does.
fn write(saving: &Saving<'_>) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(below) = saving.below() {
        command.args(["-u", "-F", "qcow2", "-b"]).arg(below);
    }
    assert!(command.arg(saving.file().unwrap()).arg("1M").status().unwrap().success());
}

/// What the disk holds.
fn content(image: &Resolved) -> Vec<u8> {
    let flat = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-O", "raw"]).arg(&image.path).arg(flat.path());
    assert!(command.status().unwrap().success());
    fs::read(flat.path()).unwrap()
}

impl Fixture {
    fn save(&self, base: &str, dest: Option<&str>, full: bool) -> Result<Resolved> {
        let saving = self.library.begin_save(base, dest, full)?;
        write(&saving);
        saving.finish("alice")
    }
}

#[test]
fn a_layer_becomes_the_next_revision() {
    let f = fixture();
    let saved = f.save("site:base@0", None, false).unwrap();
    assert_eq!(saved.uri, "site:base@1");
    assert_eq!(content(&saved), vec![1; 1 << 20]);
    // Of the revision that the VM ran from, not of the newest.
    assert_eq!(f.save("site:base@0", None, false).unwrap().uri, "site:base@2");
    let layers = f.library.show("site:base").unwrap().revisions;
    assert_eq!(layers.iter().map(|row| row.layers).collect::<Vec<_>>(), [1, 2, 2]);
    let saved = f.save("site:base@2", None, true).unwrap();
    assert_eq!((saved.uri.as_str(), content(&saved)[0]), ("site:base@3", 0), "it stands alone");
}

#[test]
fn a_new_image_in_another_repository_takes_its_layers_along() {
    let f = fixture();
    let saved = f.save("site:base@0", Some("mine"), false).unwrap();
    assert_eq!((saved.uri.as_str(), content(&saved)[0]), ("user:mine@0", 1));
    f.library.delete("site:base").unwrap();
    assert_eq!(content(&saved)[0], 1);
    let error = f.save("mine@0", Some("mine"), false).unwrap_err();
    assert_eq!(error.to_string(), "Image mine already exists in repo user");
}

#[test]
fn two_at_once_make_two_revisions() {
    let f = fixture();
    let one = f.library.begin_save("site:base@0", None, false).unwrap();
    let two = f.library.begin_save("site:base@0", None, false).unwrap();
    write(&one);
    write(&two);
    let uris = [two, one].map(|saving| saving.finish("alice").unwrap().uri);
    assert_eq!(uris, ["site:base@1", "site:base@2"]);
}

#[test]
fn what_lies_below_may_go_meanwhile_and_then_nothing_is_saved() {
    let f = fixture();
    let saving = f.library.begin_save("site:base@0", None, false).unwrap();
    write(&saving);
    f.library.delete("site:base").unwrap();
    let error = saving.finish("alice").unwrap_err().report();
    assert!(error.contains("deleted meanwhile") && error.contains("--full"), "{error}");
    assert!(f.library.list(None, |_| true).unwrap().is_empty());
    let left = walk(&f.dir.path().join("site/data"));
    assert_eq!(left, 0, "blobs that nothing needs");
    assert_eq!(walk(&f.dir.path().join("site/.tmp")), 0);
}

/// The files below a folder.
fn walk(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { walk(&path) } else { 1 }).sum()
}

#[test]
fn a_disk_that_lies_on_something_else_is_refused() {
    let f = fixture();
    let saving = f.library.begin_save("site:base@0", None, false).unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow"]);
    assert!(command.arg(saving.file().unwrap()).arg("1M").status().unwrap().success());
    let error = saving.finish("alice").unwrap_err().to_string();
    assert_eq!(error, "the VM has written something else than its disk");
    assert_eq!(f.library.show("site:base").unwrap().revisions.len(), 1);
}

#[test]
fn a_folder_of_the_older_form_gets_the_next_revision() {
    let f = fixture();
    let home = f.dir.path().join("old");
    fs::create_dir(&home).unwrap();
    let raw = f.dir.path().join("disk.raw");
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(raw).arg(home.join("image"));
    assert!(command.status().unwrap().success());
    let base = f.library.resolve(&format!("{}/", home.display())).unwrap();
    let saved = f.save(&base.uri, None, false).unwrap();
    assert!(saved.path.ends_with("image-rev1"), "{saved:?}");
    assert_eq!(content(&saved)[0], 1);
    let newest = f.library.resolve(&format!("{}/", home.display())).unwrap();
    assert_eq!(newest, saved);
    assert_eq!(walk(&home), 2);
    let error = f.save(&saved.uri, Some("mine"), false).unwrap_err().report();
    assert!(error.contains("--full"), "{error}");
    assert_eq!(f.save(&saved.uri, Some("mine"), true).unwrap().uri, "user:mine@0");
}
