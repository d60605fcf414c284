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

#[test]
fn an_image_is_resized_squashed_copied_and_exported() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let disk = home.join("disk.raw");
    fs::write(&disk, [1; 65536]).unwrap();
    assert_eq!(run(home, &["import", disk.to_str().unwrap(), "one"]).0, 0);

    let said = |args: &[&str], code: i32, text: &str| {
        let (found, _, said) = run(home, args);
        assert!(found == code && said.contains(text), "{args:?}: {found}: {said}");
    };
    said(&["resize", "one", "+64K"], 0, "Resized to user:one@1 (128 KiB)");
    said(&["resize", "one", "64K"], 2, "the disk has 131072 bytes, and can only grow");
    said(&["resize", "one", "many"], 2, "the units are K, M, G and T");
    said(&["resize", "two", "+1G"], 4, "Object two not found");
    said(&["squash", "one"], 0, "Squashed to user:one@2");
    said(&["squash", "one"], 0, "one has one layer already");
    said(&["copy", "one@1", "two"], 0, "Copied one@1 to user:two@0");
    said(&["copy", "one", "two"], 2, "Image two already exists in repo user");
    said(&["copy", "one", "two@3"], 2, "names a revision");

    let file = home.join("out.raw");
    let file = file.to_str().unwrap();
    said(&["export", "one@0", file], 0, "(raw)");
    assert_eq!(fs::read(file).unwrap(), [1; 65536]);
    said(&["export", "two", file], 2, "`--force` replaces it");
    said(&["export", "--force", "two", file], 0, "(raw)");
    assert_eq!(fs::metadata(file).unwrap().len(), 131_072);
    said(&["export", "-t", "exe", "two", file], 2, "the formats are");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(file).unwrap().permissions());
    assert_eq!(mode & 0o444, 0o444, "as any new file");
}

#[test]
fn repositories_are_listed_and_cleared() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (code, out, _) = run(home, &["repo", "list"]);
    let line = format!("user\t{}/.local/share/pavo/images\t0\t0\t0 B\tyes\n", home.display());
    assert_eq!((code, out), (0, format!("NAME\tPATH\tIMAGES\tREVISIONS\tSIZE\tWRITABLE\n{line}")));
    let disk = home.join("disk.raw");
    fs::write(&disk, [1; 65536]).unwrap();
    assert_eq!(run(home, &["import", disk.to_str().unwrap(), "one"]).0, 0);
    assert_eq!(run(home, &["resize", "one", "+1M"]).0, 0);
    let images = home.join(".local/share/pavo/images");
    let blob = images.join("data/ab").join("ab".repeat(32));
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(&blob, [0; 2048]).unwrap();

    let (_, out, _) = run(home, &["repo", "list", "-o", "json"]);
    let rows: serde_json::Value = serde_json::from_str(&out).unwrap();
    let row = &rows[0];
    assert_eq!((&row["images"], &row["revisions"]), (&1.into(), &2.into()));
    assert!(row["bytes"].as_u64().unwrap() > 65536 + 2048 && row["writable"] == true, "{row}");

    let (code, _, said) = run(home, &["repo", "gc", "--dry-run", "user"]);
    let found = "1 blob and 0 unfinished images, 2.0 KiB";
    assert_eq!((code, said), (0, format!("Would remove {found} would be free\n")));
    assert!(blob.exists());
    let (code, _, said) = run(home, &["repo", "gc", "user"]);
    assert_eq!((code, said), (0, format!("Removed {found} freed\n")));
    assert!(!blob.exists());
    assert_eq!(run(home, &["export", "one", home.join("out").to_str().unwrap()]).0, 0);
    let (code, _, said) = run(home, &["repo", "gc", "site"]);
    assert!(code == 4 && said.contains("the repositories are: user"), "{said}");
}

#[test]
fn whoever_packs_is_missing_is_named() {
    let home = tempfile::tempdir().unwrap();
    let packed = home.path().join("disk.raw.zst");
    fs::write(&packed, b"\x28\xb5\x2f\xfd").unwrap();
    let mut command = pavo(home.path(), &["import", packed.to_str().unwrap(), "one"]);
    let (code, _, said) = text(&command.env("PATH", "/nowhere").output().unwrap());
    assert_eq!(code, 5);
    assert!(said.contains("starting `zstd`") && said.contains("package is `zstd`"), "{said}");
}

/// Killed at any moment, a copy is there entirely or not at all, and what it left goes.
#[test]
fn a_killed_copy_leaves_an_image_or_nothing() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let conf = home.join("conf");
    fs::create_dir(&conf).unwrap();
    let repos = ["user", "site"]
        .map(|name| format!("  - name: {name}\n    path: {}/{name}\n", home.display()));
    fs::write(conf.join("repos.yaml"), format!("repos:\n{}", repos.concat())).unwrap();
    let with = |args: &[&str]| {
        let mut command = pavo(home, args);
        command.env("PAVO_USER_CONF_DIR", &conf).env("PAVO_SYSTEM_CONF_DIR", home.join("none"));
        command
    };
    let noise: Vec<u8> =
        (0..4_u32 << 20).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let disk = home.join("disk.raw");
    fs::write(&disk, &noise).unwrap();
    let import = text(&with(&["import", disk.to_str().unwrap(), "site:big"]).output().unwrap());
    assert_eq!(import.0, 0, "{}", import.2);

    let mut whole = 0;
    for round in 0..12 {
        let name = format!("copy-{round}");
        let mut copy = with(&["copy", "site:big", &name]);
        let mut copy = copy.stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(15 * round));
        copy.kill().unwrap();
        copy.wait().unwrap();
        let out = home.join("out");
        let words = ["export", "--force", &format!("user:{name}"), out.to_str().unwrap()];
        match text(&with(&words).output().unwrap()) {
            (0, ..) => {
                whole += 1;
                assert!(fs::read(&out).unwrap() == noise);
                assert_eq!(text(&with(&["delete", &name]).output().unwrap()).0, 0);
            }
            (code, _, said) => assert!(code == 4 && said.contains("not found"), "{said}"),
        }
    }
    assert_eq!(text(&with(&["repo", "gc", "user"]).output().unwrap()).0, 0);
    let row = text(&with(&["repo", "list", "-o", "ndjson"]).output().unwrap()).1;
    let row: serde_json::Value = serde_json::from_str(row.lines().next().unwrap()).unwrap();
    assert_eq!((&row["images"], &row["bytes"]), (&0.into(), &0.into()), "{whole} were whole");
    // What is to become a revision's file is small, and may be a living program's: it stays
    // for a day.
    let left = fs::read_dir(home.join("user/.tmp")).unwrap().map(|entry| entry.unwrap().path());
    let left: Vec<_> = left.filter(|path| path.is_dir()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Killed at any moment, an export leaves its file or, after the next one, nothing.
#[test]
fn a_killed_export_leaves_a_file_or_nothing() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let noise: Vec<u8> =
        (0..2_u32 << 20).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let disk = home.join("disk.raw");
    fs::write(&disk, &noise).unwrap();
    assert_eq!(run(home, &["import", disk.to_str().unwrap(), "big"]).0, 0);
    let folder = home.join("out");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("big.raw");
    let names = || {
        let entries = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name());
        entries.collect::<Vec<_>>()
    };
    let mut killed = 0;
    for round in 0..12 {
        let mut words = vec!["export", "big", file.to_str().unwrap()];
        words.extend((round % 2 == 1).then_some("--force"));
        let mut export = pavo(home, &words);
        let mut export = export.stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(12 * round));
        export.kill().unwrap();
        killed += u32::from(!export.wait().unwrap().success());
        if file.exists() {
            assert!(fs::read(&file).unwrap() == noise);
            fs::remove_file(&file).unwrap();
        }
        if round % 2 == 0 {
            // Without a name it never had one.
            assert_eq!(names(), [""; 0], "round {round}");
        }
    }
    assert!(killed > 0);
    assert_eq!(run(home, &["export", "big", file.to_str().unwrap()]).0, 0);
    assert_eq!(names(), ["big.raw"]);
}
