//! The units of compute nodes, read by systemd itself.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Where `systemd-analyze` comes from: see scripts/packages.
#[expect(clippy::print_stderr, reason = "a skip is never silent")]
fn analyze(words: &[&str], dir: &Path, units: &[String]) -> Option<Output> {
    let mut command = Command::new("systemd-analyze");
    let output = command.args(words).args(units).current_dir(dir).env("LC_ALL", "C").output();
    if output.is_err() {
        let why = "systemd-analyze is not installed (scripts/packages test)";
        assert!(std::env::var_os("CI").is_none(), "{why}");
        eprintln!("skipped: {why}");
    }
    output.ok()
}

/// The units, with the `pavo` that was built; their names.
fn units(dir: &Path) -> Vec<String> {
    let pavo = env!("CARGO_BIN_EXE_pavo");
    let mut names = Vec::new();
    for entry in fs::read_dir("systemd").unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(dir.join(&name), text.replace("/usr/bin/pavo", pavo)).unwrap();
        names.push(name);
    }
    names.sort();
    names
}

#[test]
fn systemd_finds_nothing_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let names = units(dir.path());
    let all =
        ["pavo-daemon.service", "pavo-node.service", "pavo-sweep.service", "pavo-sweep.timer"];
    assert_eq!(names, all);
    let paths: Vec<String> = names.iter().map(|name| format!("./{name}")).collect();
    // Manual pages come with the package.
    let Some(output) = analyze(&["verify", "--man=no"], dir.path(), &paths) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    // Units of the machine's own may have mistakes, too.
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("pavo")).collect();
    assert!(ours.is_empty(), "{said}");

    // It does find what is wrong.
    let node = fs::read_to_string(dir.path().join("pavo-node.service")).unwrap();
    fs::write(dir.path().join("pavo-node.service"), node.replace("UMask=", "UMaks=")).unwrap();
    let output = analyze(&["verify", "--man=no"], dir.path(), &paths[1..2]).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("'UMaks'"), "{said}");
}

#[test]
fn services_keep_no_right_that_they_do_not_need() {
    let dir = tempfile::tempdir().unwrap();
    for name in units(dir.path()).iter().filter(|name| name.ends_with(".service")) {
        // Tenths; a service without any of it has 96.
        let words = ["security", "--offline=yes", "--threshold=70", "--no-pager"];
        let unit = [format!("./{name}")];
        let Some(output) = analyze(&words, dir.path(), &unit) else { return };
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}\n{output:?}");
        assert!(said.contains("Overall exposure level"), "{said}");
    }
}

#[test]
fn what_units_start_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut started = 0;
    for name in units(dir.path()) {
        let text = fs::read_to_string(dir.path().join(&name)).unwrap();
        for line in text.lines().filter_map(|line| line.strip_prefix("ExecStart=")) {
            let words: Vec<&str> = line.split(' ').chain(["--help"]).collect();
            let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
            assert!(output.status.success(), "{name}: {output:?}");
            started += 1;
        }
    }
    assert_eq!(started, 3);
}
