//! What the configured repositories promise together.

use std::fs;
use std::process::Command;

use super::*;
use crate::image::testing::two_repositories;

struct Fixture {
    dir: tempfile::TempDir,
    library: Library,
}

fn fixture() -> Fixture {
    let (dir, library) = two_repositories();
    Fixture { dir, library }
}

impl Fixture {
    fn raw(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        fs::write(&path, [1; 4096]).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn import(&self, dest: &str) -> Result<Resolved> {
        self.library.import(Source::of(&self.raw("disk.raw")), dest, "alice")
    }

    /// A qcow2 in a repository's `data`, on top of `below`; returns its hash.
    fn layer(&self, fake: char, below: Option<&str>) -> String {
        let hash = fake.to_string().repeat(64);
        let path = self.library.repos[0].blob(&hash);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]);
        if let Some(below) = below {
            command.args(["-u", "-F", "qcow2", "-b", below]);
        }
        assert!(command.arg(path).arg("8M").status().unwrap().success());
        hash
    }

    fn revision(&self, blobs: &[&String]) -> Revision {
        Revision {
            name: "layered".into(),
            revision: 0,
            kind: Kind::Vm,
            owner: "alice".into(),
            timestamp: 0.0,
            data_blobs: blobs.iter().map(|hash| (*hash).clone()).collect(),
            custom_meta: serde_json::Value::Null,
        }
    }
}

#[test]
fn an_imported_disk_can_be_found_listed_and_deleted() {
    let f = fixture();
    let imported = f.import("tiny").unwrap();
    assert_eq!(imported.uri, "user:tiny@0");
    assert_eq!((imported.format, imported.virtual_size), (DiskFormat::Qcow2, 4096));
    assert!(imported.path.is_absolute() && imported.path.exists());
    for name in ["tiny", "user:tiny", "tiny@0"] {
        assert_eq!(f.library.resolve(name).unwrap(), imported);
    }
    let rows = f.library.list(None, |name| name.contains("in")).unwrap();
    assert_eq!((rows.len(), rows[0].name.as_str(), rows[0].repo.as_str()), (1, "tiny", "user"));
    assert_eq!(f.library.list(None, |_| false).unwrap(), []);
    assert_eq!(f.library.show("tiny").unwrap().revisions.len(), 1);

    assert_eq!(f.library.delete("tiny").unwrap().blobs, 1);
    let error = f.library.resolve("tiny").unwrap_err();
    assert_eq!(error.to_string(), "Object tiny not found in configured repositories");
    assert_eq!(error.kind(), crate::error::Kind::NotFound);
}

#[test]
fn the_first_repository_wins_and_shadowing_is_said() {
    let f = fixture();
    f.import("site:tiny").unwrap();
    assert_eq!(f.library.resolve("tiny").unwrap().uri, "site:tiny@0");
    f.library.take_warnings();
    f.import("tiny").unwrap();
    assert_eq!(f.library.take_warnings(), ["Image tiny shadows or is shadowed by repo site"]);
    assert_eq!(f.library.resolve("tiny").unwrap().uri, "user:tiny@0");
    assert_eq!(f.library.resolve("site:tiny").unwrap().uri, "site:tiny@0");
    let error = f.import("tiny").unwrap_err();
    assert!(error.report().contains("Image tiny already exists in repo user"), "{error:?}");
    let error = f.library.resolve("none:tiny").unwrap_err();
    assert!(error.report().contains("the repositories are: user, site"), "{error:?}");
}

#[test]
fn the_format_is_what_is_said_before_what_is_seen() {
    let f = fixture();
    let plain = f.raw("disk");
    let seen = |source: &str, format| {
        let (path, claimed) = claim(source, format);
        f.library.format_of(Path::new(path), Path::new(path), claimed).unwrap()
    };
    assert_eq!(seen(&plain, None), Format::Raw);
    assert!(f.library.take_warnings()[0].contains("assuming raw VM"));
    assert_eq!(seen(&format!("vmdk:{plain}"), Some(Format::Vdi)), Format::Vmdk);
    assert_eq!(seen(&f.raw("a.VHD"), Some(Format::Vdi)), Format::Vdi);
    assert_eq!(seen(&f.raw("a.VHD"), None), Format::Vpc);
    assert_eq!(seen(&f.raw("a.img"), None), Format::Raw);
    let image = f.import("tiny").unwrap().path;
    fs::copy(image, f.dir.path().join("b.img")).unwrap();
    let image = f.dir.path().join("b.img");
    assert_eq!(seen(image.to_str().unwrap(), None), Format::Qcow2);
    assert_eq!(seen(image.to_str().unwrap(), Some(Format::Raw)), Format::Raw);
    assert_eq!(f.library.take_warnings(), Vec::<String>::new());
}

#[test]
fn a_hostile_image_never_gets_in() {
    let f = fixture();
    let secret = f.raw("secret");
    let path = f.dir.path().join("hostile.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &secret]);
    assert!(create.arg(&path).status().unwrap().success());
    let error = f.library.import(Source::of(path.to_str().unwrap()), "a", "alice").unwrap_err();
    assert!(error.report().contains("it needs another file below it"), "{error:?}");
    assert_eq!(f.library.list(None, |_| true).unwrap(), []);
    let tmp = f.dir.path().join("user/.tmp");
    assert_eq!(fs::read_dir(tmp).unwrap().count(), 0, "nothing is left over");
}

#[test]
fn between_check_and_use_nobody_can_put_another_file_there() {
    use std::os::unix::fs::PermissionsExt;
    let f = fixture();
    let path = PathBuf::from(f.raw("disk"));
    let (_open, ours) = steady(&path, f.dir.path()).unwrap();
    fs::rename(f.raw("other"), &path).unwrap();
    fs::write(&path, "another").unwrap();
    assert_eq!(fs::read(ours).unwrap(), [1; 4096]);

    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let (_open, copy) = steady(&path, f.dir.path()).unwrap();
    fs::write(&path, "written by anybody").unwrap();
    assert_eq!(fs::read(copy).unwrap(), b"another");
}

#[test]
fn layers_must_lie_exactly_on_each_other() {
    let f = fixture();
    let repo = &f.library.repos[0];
    let bottom = f.layer('a', None);
    let good = f.layer('b', Some(&Repository::relative(&bottom)));
    let resolved = resolve_in(repo, &f.revision(&[&bottom, &good])).unwrap();
    assert_eq!(resolved.path, repo.blob(&good));

    let absolute = f.layer('c', repo.blob(&bottom).to_str());
    let foreign = f.layer('d', Some("/etc/shadow"));
    let skewed = f.layer('e', Some(&Repository::relative(&good)));
    for blobs in [
        vec![&good],
        vec![&bottom, &bottom],
        vec![&good, &bottom],
        vec![&bottom, &absolute],
        vec![&bottom, &foreign],
        vec![&bottom, &skewed],
    ] {
        let error = resolve_in(repo, &f.revision(&blobs)).unwrap_err();
        assert!(error.to_string().contains("does not lie on the one it should"), "{error:?}");
    }
    assert!(resolve_in(repo, &f.revision(&[])).is_err());
    let container = Revision { kind: Kind::Ctr, ..f.revision(&[&bottom]) };
    let error = resolve_in(repo, &container).unwrap_err();
    assert_eq!(error.to_string(), "`layered` is a container image, not a disk");
}

#[test]
fn a_disk_may_come_compressed() {
    let f = fixture();
    let raw = f.raw("disk.raw");
    let qcow2 = f.dir.path().join("disk.qcow2");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2", &raw]).arg(&qcow2);
    assert!(convert.status().unwrap().success());
    for (program, plain, packed) in [
        ("xz", "disk.raw", "disk.raw.xz"),
        ("zstd", "disk.qcow2", "disk.qcow2.zst"),
        ("gzip", "disk.qcow2", "disk.gz"),
        ("gzip", "disk.qcow2", "download"),
    ] {
        let packed = f.dir.path().join(packed);
        let mut command = Command::new(program);
        command.args(["-c", "-q"]).arg(f.dir.path().join(plain));
        assert!(command.stdout(fs::File::create(&packed).unwrap()).status().unwrap().success());
        let name = packed.file_name().unwrap().to_str().unwrap();
        let dest = format!("of-{name}");
        let image = f.library.import(Source::of(packed.to_str().unwrap()), &dest, "alice").unwrap();
        assert_eq!(image.virtual_size, 4096, "{name}");
        assert_eq!(f.library.take_warnings(), Vec::<String>::new(), "{name}");
    }
    // What is in an archive is as foreign as any file.
    let hostile = f.dir.path().join("hostile.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &raw]);
    assert!(create.arg(&hostile).status().unwrap().success());
    assert!(Command::new("zstd").arg("-q").arg(&hostile).status().unwrap().success());
    let packed = format!("{}.zst", hostile.display());
    let error = f.library.import(Source::of(&packed), "hostile", "alice").unwrap_err();
    assert!(error.report().contains("it needs another file below it"), "{error:?}");
    assert_eq!(fs::read_dir(f.dir.path().join("user/.tmp")).unwrap().count(), 0);
}

/// Disks as distributions make them: whatever their qcow2 is like, the same comes in.
#[test]
fn what_distributions_make_is_imported_as_it_is() {
    let f = fixture();
    let raw = f.dir.path().join("disk");
    // A guest's disk: data here and there, and much of nothing.
    let disk = fs::File::create(&raw).unwrap();
    disk.set_len(40 << 20).unwrap();
    for at in [0, 3 << 20, (17 << 20) + 512, (40 << 20) - 4096] {
        std::os::unix::fs::FileExt::write_all_at(&disk, &[at as u8 | 7; 4096], at).unwrap();
    }
    let kinds: [(&str, &[&str]); 8] = [
        ("old.img", &["-o", "compat=0.10"]),
        ("new.img", &["-o", "compat=1.1"]),
        ("lazy.qcow2", &["-o", "compat=1.1,lazy_refcounts=on"]),
        ("zlib.qcow2", &["-c"]),
        ("zstd.qcow2", &["-c", "-o", "compression_type=zstd"]),
        ("oldzlib.img", &["-c", "-o", "compat=0.10"]),
        ("extended.qcow2", &["-o", "extended_l2=on,cluster_size=128k"]),
        ("metadata.img", &["-o", "preallocation=metadata,refcount_bits=64"]),
    ];
    for (name, options) in kinds {
        let source = f.dir.path().join(name);
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args(options);
        assert!(convert.args([&raw, &source]).status().unwrap().success(), "{name}");
        // As an upload to a mirror may leave it.
        let file = fs::File::options().append(true).open(&source).unwrap();
        file.set_len(file.metadata().unwrap().len().next_multiple_of(1 << 20)).unwrap();
        let dest = format!("of-{name}");
        let image = f.library.import(Source::of(source.to_str().unwrap()), &dest, "alice").unwrap();
        assert_eq!(image.virtual_size, 40 << 20, "{name}");
        assert_eq!(f.library.take_warnings(), Vec::<String>::new(), "{name}");
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-q", "-f", "raw", "-F", "qcow2"]).args([&raw, &image.path]);
        assert!(compare.status().unwrap().success(), "{name}");
    }
}
