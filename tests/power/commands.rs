//! `pavo power` and `pavo bootdev`, by what the inventory knows.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use pavo_fakes::{Bmcs, Manner, PASSWORD, USER};

/// Runs `pavo` with a home and state of its own.
fn pavo(home: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
    command.args(words).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.env("HOME", home).env("PAVO_STATE_DIR", home.join("state"));
    command.env("PAVO_SYSTEM_CONF_DIR", home.join("etc")).output().unwrap()
}

fn said(home: &Path, words: &[&str], code: i32) -> String {
    let output = pavo(home, words);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
    let mut lines: Vec<_> = std::str::from_utf8(&output.stdout).unwrap().lines().collect();
    // In the order in which they answered.
    lines.sort_unstable();
    lines.join("\n")
}

#[test]
fn nodes_are_switched_by_what_the_inventory_knows() {
    let bmcs = Bmcs::start(4, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let first = Bmcs::address(0).to_string();
    let base = first.rsplit_once('.').unwrap().0;
    assert!(first.ends_with(".1"), "{first}");
    let create = [
        "node".to_owned(),
        "create".into(),
        "n[1-4]".into(),
        "mgt=ipmi".into(),
        format!("control/bmc_address={base}.{{n}}"),
        format!("control/bmc_port={}", bmcs.port()),
        format!("control/bmc_username={USER}"),
        format!("control/bmc_password={PASSWORD}"),
    ];
    said(home, &create.each_ref().map(String::as_str), 0);

    let all = |text: &str| {
        format!("\nSuccess: 4  Total: 4\nn1: {text}\nn2: {text}\nn3: {text}\nn4: {text}")
    };
    assert_eq!(said(home, &["power", "all"], 0), all("off"));
    assert_eq!(
        said(home, &["power", "n[1-4]", "on", "--dry-run"], 0),
        all("would switch on (is off)")
    );
    assert!(!bmcs.with(0, |bmc| bmc.on));
    assert_eq!(said(home, &["power", "all", "on"], 0), all("on"));
    assert!((0..4).all(|index| bmcs.with(index, |bmc| bmc.on)));
    assert_eq!(said(home, &["bootdev", "all", "net"], 0), all("net"));
    assert_eq!(said(home, &["bootdev", "all"], 0), all("net"));

    // One that has a mistake of its own, one that nobody knows.
    said(home, &["node", "update", "n3", "control/bmc_password=hunter2"], 0);
    said(home, &["node", "update", "n4", "mgt=virsh"], 0);
    let (ok, ko) = (home.join("ok"), home.join("ko"));
    let files = [ok.to_str().unwrap(), ko.to_str().unwrap()];
    let words = ["power", "n[1-5]", "off", "--ok-file", files[0], "--ko-file", files[1]];
    let text = said(home, &words, 1);
    for wanted in [
        "Success: 2  Total: 5",
        "n1: off",
        "n3: ",
        "n4: the driver `virsh` is not there yet",
        "n5: Could not be found.",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert!(!text.contains("hunter2"), "no secret is shown: {text}");
    let file = |path| std::fs::read_to_string(path).unwrap();
    assert_eq!((file(&ok), file(&ko)), ("n[1-2]\n".to_owned(), "n[3-5]\n".to_owned()));
    assert!(bmcs.with(2, |bmc| bmc.on), "nobody was let in");

    // The dead are told, and after too many nobody else is tried.
    (0..2).for_each(|index| bmcs.with(index, |bmc| bmc.manner = Manner::Dead));
    let limits = ["--timeout", "1", "--retries", "0", "-f", "1", "--fail-limit", "0"];
    let text = said(home, &[&["power", "n[1-2]", "on"], &limits[..]].concat(), 6);
    assert!(text.contains("n2: not started"), "{text}");
    let output = pavo(home, &["power", "n[1-"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
