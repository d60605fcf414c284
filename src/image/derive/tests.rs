//! What deriving promises: the same disk, in a new revision or file, or nothing at all.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::image::library::Source;
use crate::image::testing::two_repositories;

const MIB: u64 = 1 << 20;

struct Fixture {
    dir: tempfile::TempDir,
    library: Library,
}

/// Two repositories; `site:base` has a revision 0, and a revision 1 of two layers.
fn fixture() -> Fixture {
    let (dir, library) = two_repositories();
    let raw = dir.path().join("disk.raw");
    fs::write(&raw, vec![1; MIB as usize]).unwrap();
    library.import(Source::of(raw.to_str().unwrap()), "site:base", "root").unwrap();
    let base = library.resize("site:base", Size::By(MIB), "root").unwrap();
    assert_eq!((base.uri.as_str(), base.virtual_size), ("site:base@1", 2 * MIB));
    Fixture { dir, library }
}

impl Fixture {
    /// What the disk holds.
    fn content(&self, image: &str) -> Vec<u8> {
        let flat = self.dir.path().join("flat");
        self.library.export(image, &flat, Some(Format::Raw), true).unwrap();
        fs::read(flat).unwrap()
    }

    fn layers(&self, image: &str) -> Vec<usize> {
        let shown = self.library.show(image).unwrap();
        shown.revisions.iter().map(|row| row.layers).collect()
    }

    /// The blobs of a repository.
    fn blobs(&self, repo: &str) -> Vec<PathBuf> {
        let folders = fs::read_dir(self.dir.path().join(repo).join("data")).unwrap();
        let folders = folders.map(|entry| entry.unwrap().path());
        let blobs = folders.flat_map(|folder| fs::read_dir(folder).unwrap());
        blobs.map(|entry| entry.unwrap().path()).collect()
    }
}

fn disk() -> Vec<u8> {
    let mut disk = vec![1; MIB as usize];
    disk.resize(2 * MIB as usize, 0);
    disk
}

#[test]
fn a_copy_is_the_same_disk_and_outlives_its_source() {
    let f = fixture();
    assert_eq!(f.library.copy("site:base", "site:same", "alice").unwrap(), "site:same@0");
    assert_eq!(f.blobs("site").len(), 2, "they share what they are");
    assert_eq!(f.library.copy("site:base@1", "mine", "alice").unwrap(), "user:mine@0");
    assert_eq!(f.library.copy("site:base@0", "first", "alice").unwrap(), "user:first@0");
    assert_eq!((f.layers("mine"), f.layers("first")), (vec![2], vec![1]));
    assert_eq!(f.blobs("user").len(), 2, "what is there is not copied again");
    assert_eq!(f.library.show("mine").unwrap().owner, "alice");
    f.library.delete("site:base").unwrap();
    f.library.delete("first").unwrap();
    for image in ["site:same", "mine"] {
        assert!(f.content(image) == disk(), "{image}");
    }
    let error = f.library.copy("mine", "mine", "alice").unwrap_err().report();
    assert!(error.contains("Image mine already exists in repo user"), "{error}");
    let error = f.library.copy("mine", "none:mine", "alice").unwrap_err().report();
    assert!(error.contains("no repository is named `none`"), "{error}");
}

#[test]
fn a_copy_of_what_is_damaged_is_refused_and_leaves_nothing() {
    let f = fixture();
    let top = f.library.resolve("site:base@0").unwrap().path;
    let mut content = fs::read(&top).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::remove_file(&top).unwrap();
    fs::write(&top, content).unwrap();
    let error = f.library.copy("site:base", "mine", "alice").unwrap_err().report();
    assert!(error.contains("its content is not what its name says"), "{error}");
    assert_eq!(f.library.list(Some("user"), |_| true).unwrap(), []);
    assert_eq!(f.blobs("user"), Vec::<PathBuf>::new());
    assert_eq!(fs::read_dir(f.dir.path().join("user/.tmp")).unwrap().count(), 0);
}

#[test]
fn a_container_image_of_pcocc_is_copied_too() {
    let f = fixture();
    let meta = f.dir.path().join("site/meta");
    let text = fs::read_to_string(meta.join("base@1")).unwrap();
    let mut text: serde_json::Value = serde_json::from_str(&text).unwrap();
    let blob = text["data_blobs"][0].clone();
    text["name"] = "box".into();
    text["kind"] = "ctr".into();
    text["custom_meta"] = serde_json::json!({"oci_index": {"layers": 2}});
    // A container may have one layer twice.
    text["data_blobs"] = serde_json::json!([blob, blob]);
    fs::write(meta.join("box@1"), text.to_string()).unwrap();
    assert_eq!(f.library.copy("box", "user:box", "alice").unwrap(), "user:box@0");
    let copy = fs::read_to_string(f.dir.path().join("user/meta/box@0")).unwrap();
    let copy: serde_json::Value = serde_json::from_str(&copy).unwrap();
    for key in ["kind", "custom_meta", "data_blobs"] {
        assert_eq!(copy[key], text[key], "{key}");
    }
    assert_eq!(f.blobs("user").len(), 1);
    let error = f.library.export("box", &f.dir.path().join("x"), None, false).unwrap_err();
    assert!(error.report().contains("is a container image, not a disk"), "{error:?}");
}

#[test]
fn a_disk_grows_and_never_shrinks() {
    let f = fixture();
    let grown = f.library.resize("site:base@0", Size::To(3 * MIB + 1), "alice").unwrap();
    assert_eq!((grown.uri.as_str(), grown.virtual_size), ("site:base@2", 3 * MIB + 512));
    assert_eq!(f.layers("site:base"), [1, 2, 2]);
    assert!(f.content("site:base@1") == disk());
    for (size, why) in [
        (Size::To(MIB), "can only grow"),
        (Size::To(2 * MIB), "the disk has 2097152 bytes already"),
        (Size::By(0), "already"),
        (Size::By(u64::MAX), "is absurd"),
    ] {
        let error = f.library.resize("site:base@1", size, "alice").unwrap_err();
        assert!(error.report().contains(why), "{size:?}: {error:?}");
    }
    assert_eq!(f.layers("site:base").len(), 3);
}

#[test]
fn sizes_are_read_as_they_are_written() {
    for (text, size) in [
        ("20G", Size::To(20 << 30)),
        ("+5g", Size::By(5 << 30)),
        ("512", Size::To(512)),
        ("1TiB", Size::To(1 << 40)),
        ("64MB", Size::To(64 << 20)),
    ] {
        assert_eq!(text.parse::<Size>().unwrap(), size, "{text}");
    }
    for text in ["", "+", "G", "-5G", "5X", "1.5G", "++1", "5iB", "99999999999T", "1 G", "5é"] {
        assert!(text.parse::<Size>().is_err(), "{text}");
    }
}

#[test]
fn squashed_it_needs_nothing_below() {
    let f = fixture();
    let made = f.library.squash("site:base", "alice").unwrap().unwrap();
    assert_eq!((made.uri.as_str(), made.virtual_size), ("site:base@2", 2 * MIB));
    assert_eq!(f.layers("site:base"), [1, 2, 1]);
    for revision in [0, 1] {
        f.library.delete(&format!("site:base@{revision}")).unwrap();
    }
    assert!(f.content("site:base") == disk());
    assert_eq!(f.library.squash("site:base", "alice").unwrap(), None);
    assert_eq!(f.layers("site:base"), [1]);
}

#[test]
fn too_many_layers_are_refused_before_they_are_made() {
    let f = fixture();
    let meta = f.dir.path().join("site/meta/base@1");
    let text = fs::read_to_string(&meta).unwrap();
    let mut text: serde_json::Value = serde_json::from_str(&text).unwrap();
    text["data_blobs"] = vec![text["data_blobs"][0].clone(); 200].into();
    fs::remove_file(&meta).unwrap();
    fs::write(&meta, text.to_string()).unwrap();
    let error = f.library.begin_save("site:base@1", None, false).unwrap_err().report();
    assert!(error.contains("pavo image squash base"), "{error}");
}

#[test]
fn an_exported_file_is_whole_and_of_the_format_asked_for() {
    let f = fixture();
    let file = |name: &str| f.dir.path().join(name);
    for (name, said, format) in [
        ("a", None, Format::Raw),
        ("a.VMDK", None, Format::Vmdk),
        ("a.vdi", Some(Format::Qcow2), Format::Qcow2),
        ("a.vhd", None, Format::Vpc),
        ("b.vdi", None, Format::Vdi),
        ("a.qed", None, Format::Qed),
        ("json:{}", None, Format::Raw),
    ] {
        assert_eq!(f.library.export("base", &file(name), said, false).unwrap(), format, "{name}");
        assert_eq!(header::inspect(&file(name)).unwrap().format, format, "{name}");
        let error = f.library.export("base", &file(name), said, false).unwrap_err().report();
        assert!(error.contains("exists") && error.contains("--force"), "{error}");
    }
    assert!(fs::read(file("a")).unwrap() == disk());
    fs::write(file("old"), "old").unwrap();
    f.library.export("base@0", &file("old"), None, true).unwrap();
    assert!(fs::read(file("old")).unwrap() == vec![1; MIB as usize]);

    std::os::unix::fs::symlink("/dev/null", file("link")).unwrap();
    for (name, why) in
        [("link", "is not a regular file"), ("site", "is a folder"), ("no/where", "No such file")]
    {
        let error = f.library.export("base", &file(name), None, true).unwrap_err();
        assert!(error.report().contains(why), "{error:?}");
    }
    let hidden = fs::read_dir(f.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(hidden.filter(|name| name.as_encoded_bytes()[0] == b'.').count(), 0);
}

#[test]
fn images_of_the_older_form_take_part() {
    let f = fixture();
    let home = f.dir.path().join("old");
    fs::create_dir(&home).unwrap();
    f.library.export("base@0", &home.join("image"), Some(Format::Qcow2), false).unwrap();
    let folder = format!("{}/", home.display());
    let grown = f.library.resize(&folder, Size::By(MIB), "alice").unwrap();
    assert!(grown.path.ends_with("image-rev1"), "{grown:?}");
    assert!(f.content(&folder) == disk());
    assert_eq!(f.library.copy(&folder, "mine", "alice").unwrap(), "user:mine@0");
    assert_eq!(f.layers("mine"), [1]);
    assert!(f.content("mine") == disk());
    let squashed = f.library.squash(&folder, "alice").unwrap().unwrap();
    assert!(squashed.path.ends_with("image-rev2"), "{squashed:?}");
    assert!(f.content(&folder) == disk());
}
