//! `pavo image` as a user meets it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn pavo(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
    command.arg("image").args(args).env_clear();
    command.env("HOME", home).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

fn run(home: &Path, args: &[&str]) -> (i32, String, String) {
    text(&pavo(home, args).output().unwrap())
}

fn text(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn an_image_is_imported_listed_shown_and_deleted() {
    let home = tempfile::tempdir().unwrap();
    let disk = home.path().join("disk.raw");
    fs::write(&disk, [1; 65536]).unwrap();
    let disk = disk.to_str().unwrap();

    let (code, out, _) = run(home.path(), &["list"]);
    assert_eq!((code, out.as_str()), (0, "NAME\tTYPE\tREVISION\tREPO\tOWNER\tDATE\n"));
    assert!(!home.path().join(".local").exists(), "looking makes nothing");

    let (code, _, said) = run(home.path(), &["import", disk, "one"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("Imported user:one@0 (64.0 KiB)"), "{said}");
    let (code, _, said) = run(home.path(), &["import", disk, "one"]);
    assert_eq!(code, 2);
    assert!(said.contains("Image one already exists in repo user"), "{said}");

    let (_, out, _) = run(home.path(), &["list", "^o", "-o", "json"]);
    let rows: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&rows[0]["name"], &rows[0]["type"]), (&"one".into(), &"vm".into()));
    let (_, out, _) = run(home.path(), &["show", "one"]);
    assert!(out.contains("revision  0  "), "{out}");

    let (code, _, said) = run(home.path(), &["show", "onne"]);
    assert_eq!(code, 4);
    assert!(said.contains("Object onne not found in configured repositories"), "{said}");
    assert!(said.contains("did you mean `one`?"), "{said}");
    assert_eq!(run(home.path(), &["delete", "one@7"]).0, 4);
    let (code, _, said) = run(home.path(), &["delete", "one"]);
    assert_eq!(code, 0);
    assert!(said.contains("Deleted 1 revision of one"), "{said}");
    assert_eq!(run(home.path(), &["show", "one"]).0, 4);
}

#[test]
fn what_cannot_be_an_image_is_refused() {
    let home = tempfile::tempdir().unwrap();
    for (source, name, why) in [
        ("/dev/zero", "a", "it is not a regular file"),
        ("/nowhere/disk.qcow2", "a", "No such file"),
        ("/etc/hostname", "../a", "is a path, not an image"),
        ("/etc/hostname", "a\nb", "cannot be the name of an image"),
        ("/etc/hostname", "a@1", "names a revision"),
        ("/etc/hostname", "none:a", "no repository is named `none`"),
        ("qcow2:/etc/hostname", "a", "it looks like raw"),
    ] {
        let (code, _, said) = run(home.path(), &["import", source, name]);
        assert!(said.contains(why), "{source} {name:?}: {said}");
        assert_ne!(code, 0);
        assert_eq!(run(home.path(), &["list", "-o", "ndjson"]).1, "");
    }
}

/// The repository is on a file system of 768 KiB, in a mount namespace of the child.
#[test]
fn a_full_disk_leaves_the_repository_as_it_was() {
    let home = tempfile::tempdir().unwrap();
    let images = home.path().join(".local/share/pavo/images");
    fs::create_dir_all(&images).unwrap();
    let small = home.path().join("small.raw");
    let large = home.path().join("large.raw");
    let noise: Vec<u8> =
        (0..1_u32 << 20).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(&small, b"small").unwrap();
    fs::write(&large, noise).unwrap();

    if !Command::new("unshare").args(["-rm", "true"]).status().is_ok_and(|status| status.success())
    {
        assert!(std::env::var_os("CI").is_none(), "needs user namespaces");
        eprintln!("skipped: needs user namespaces");
        return;
    }
    let script = format!(
        "mount -t tmpfs -o size=768k small {images} \
         && {bin} image import {small} a 2>&1 && find {images} -type f >{home}/before \
         && ! {bin} image import {large} b 2>&1 && find {images} -type f >{home}/after \
         && {bin} image show a && ! {bin} image show b 2>&1",
        bin = env!("CARGO_BIN_EXE_pavo"),
        small = small.display(),
        large = large.display(),
        images = images.display(),
        home = home.path().display(),
    );
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script]).env("HOME", home.path());
    let (code, out, _) = text(&command.output().unwrap());
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("No space left on device"), "{out}");
    let read = |name: &str| fs::read_to_string(home.path().join(name)).unwrap();
    assert_eq!(read("before"), read("after"));
}
