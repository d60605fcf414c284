//! `pavo power` and `pavo bootdev`, by what the inventory knows.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use pavo_fakes::{Bmcs, Manner, PASSWORD, Tls, USER};

/// `pavo` with a home and state of its own; programs in `bin` there come first.
fn command(home: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
    let path = std::env::var("PATH").unwrap();
    command.args(words).env_clear().env("PATH", format!("{}:{path}", home.join("bin").display()));
    command.env("HOME", home).env("PAVO_STATE_DIR", home.join("state"));
    command.env("PAVO_SYSTEM_CONF_DIR", home.join("etc")).stdin(Stdio::null());
    command
}

fn pavo(home: &Path, words: &[&str]) -> Output {
    command(home, words).output().unwrap()
}

/// Nodes `n1` and so on with the first of the simulator.
fn create(home: &Path, bmcs: &Bmcs, count: u32) {
    let first = Bmcs::address(0).to_string();
    let base = first.rsplit_once('.').unwrap().0.to_owned();
    let create = [
        "node".to_owned(),
        "create".into(),
        format!("n[1-{count}]"),
        "mgt=ipmi".into(),
        format!("control/bmc_address={base}.{{n}}"),
        format!("control/bmc_port={}", bmcs.port()),
        format!("control/bmc_username={USER}"),
        format!("control/bmc_password={PASSWORD}"),
    ];
    said(home, &create.each_ref().map(String::as_str), 0);
}

/// A program that comes before others of its name.
fn program(home: &Path, name: &str, script: &str) {
    use std::os::unix::fs::PermissionsExt;
    let file = home.join("bin").join(name);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Nobody is at that store: power asks Slurm alone.
const SLURM: &str = "type: slurm
settings:
  etcd-servers: [127.0.0.1]
  etcd-client-port: 1
  etcd-protocol: http
  etcd-auth-type: none
";

fn with_slurm(home: &Path) {
    std::fs::create_dir_all(home.join("etc")).unwrap();
    std::fs::write(home.join("etc/batch.yaml"), SLURM).unwrap();
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
    create(home, &bmcs, 4);

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
    said(home, &["node", "update", "n4", "mgt=openbmc"], 0);
    let (ok, ko) = (home.join("ok"), home.join("ko"));
    let files = [ok.to_str().unwrap(), ko.to_str().unwrap()];
    let words = ["power", "n[1-5]", "off", "--ok-file", files[0], "--ko-file", files[1]];
    let text = said(home, &words, 1);
    for wanted in [
        "Success: 2  Total: 5",
        "n1: off",
        "n3: ",
        "n4: the driver `openbmc` is not there yet",
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

/// What Slurm says of nodes that are idle.
const IDLE: &str = "echo 'n1|n1|idle|0/4/0/4'; echo 'n2|h2.site|idle|0/4/0/4'";

#[test]
fn no_variable_of_the_environment_hides_a_job() {
    let bmcs = Bmcs::start(3, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    create(home, &bmcs, 3);
    with_slurm(home);
    (0..3).for_each(|index| bmcs.with(index, |bmc| bmc.on = true));
    // As the real ones do, they believe these variables.
    let unless =
        "case \"$SQUEUE_USERS$SQUEUE_PARTITION$SINFO_PARTITION$SLURM_CLUSTERS\" in ?*) exit;; esac";
    let queue = format!("{unless}; case \"$*\" in *--all*) echo 'RUNNING|n2';; esac");
    program(home, "squeue", &queue);
    program(home, "sinfo", &format!("{unless}; {IDLE}"));
    for variable in ["SQUEUE_USERS", "SQUEUE_PARTITION", "SINFO_PARTITION", "SLURM_CLUSTERS"] {
        let output = command(home, &["power", "n2", "off"]).env(variable, "x").output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.starts_with("n2: a job runs there\n"), "{variable}: {said}");
        assert_eq!(output.status.code(), Some(1));
    }
    // By the name of its host, with or without its domain.
    said(home, &["node", "create", "h2", "mgt=ipmi", "control/bmc_address=127.9.9.9"], 0);
    let text = said(home, &["power", "h2,n1", "off"], 1);
    assert!(text.contains("h2: a job runs there") && text.contains("n1: off"), "{text}");

    // Who may not see the job sees that the node is taken.
    program(home, "squeue", "exit 0");
    for state in ["mixed|1/3/0/4", "draining*|4/0/0/4", "reserved|2/2/0/4", "completing|0/4/0/4"] {
        program(home, "sinfo", &format!("echo 'n3|n3|{state}'"));
        let text = said(home, &["power", "n3", "reset"], 1);
        assert!(text.contains("n3: a job runs there"), "{state}: {text}");
    }
    // Who was not understood has not said that nothing runs.
    for wrong in ["echo nonsense", "exit 1", "echo 'RUNNING|n[1-' ;"] {
        program(home, if wrong.contains("RUN") { "squeue" } else { "sinfo" }, wrong);
        let output = pavo(home, &["power", "n3", "off"]);
        assert_ne!(output.status.code(), Some(0), "{wrong}");
        let why = String::from_utf8(output.stderr).unwrap();
        assert!(why.contains("without knowing what runs there: `--force`"), "{wrong}: {why}");
        program(home, "sinfo", IDLE);
    }
    assert!(bmcs.with(2, |bmc| bmc.on && bmc.changes.is_empty()));
    said(home, &["power", "n3", "off", "--force"], 0);
    assert!(!bmcs.with(2, |bmc| bmc.on));
}

#[test]
fn a_job_that_starts_while_others_wait_keeps_its_node() {
    let bmcs = Bmcs::start(2, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    create(home, &bmcs, 2);
    with_slurm(home);
    (0..2).for_each(|index| bmcs.with(index, |bmc| bmc.on = true));
    // It starts once the first node is off.
    let jobs = home.join("jobs");
    program(home, "squeue", &format!("cat {} 2>/dev/null; exit 0", jobs.display()));
    program(home, "sinfo", IDLE);
    std::thread::scope(|scope| {
        let words = ["power", "n[1-2]", "off", "--window", "1", "--interval", "8"];
        let all = scope.spawn(move || said(home, &words, 1));
        while bmcs.with(0, |bmc| bmc.on) {
            assert!(!all.is_finished(), "it ended early");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::fs::write(&jobs, "RUNNING|n2\n").unwrap();
        let text = all.join().unwrap();
        assert!(text.contains("n1: off") && text.contains("n2: a job runs there"), "{text}");
    });
    assert!(bmcs.with(1, |bmc| bmc.on));
}

#[test]
fn without_a_scheduler_it_is_said_that_nobody_was_asked() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    create(home.path(), &bmcs, 1);
    let noted = |words: &[&str]| {
        let output = pavo(home.path(), words);
        String::from_utf8(output.stderr).unwrap().contains("is not looked at")
    };
    assert!(noted(&["power", "n1", "on"]));
    assert!(!noted(&["power", "n1"]) && !noted(&["power", "n1", "on", "--force"]));
}

#[test]
fn what_fails_before_the_first_is_asked_counts() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    create(home, &bmcs, 1);
    for limit in ["0", "49", "97%"] {
        let text = said(home, &["power", "n1,zz[1-50]", "on", "--fail-limit", limit], 6);
        assert!(text.contains("n1: not started"), "{text}");
    }
    assert_eq!(bmcs.with(0, |bmc| bmc.packets), 0);
    said(home, &["power", "n1,zz[1-50]", "on", "--fail-limit", "50"], 1);
    assert!(bmcs.with(0, |bmc| bmc.on));
}

#[test]
fn who_stops_reading_loses_no_result() {
    let bmcs = Bmcs::start(2, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    create(home, &bmcs, 2);
    let (ok, ko) = (home.join("ok"), home.join("ko"));
    let files = ["--ok-file", ok.to_str().unwrap(), "--ko-file", ko.to_str().unwrap()];
    let closed = |set: &str| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let words = [&["power", set, "on"], &files[..]].concat();
        let status = command(home, &words).stdout(writer).status().unwrap();
        let file = |path| std::fs::read_to_string(path).unwrap();
        (status.code(), file(&ok), file(&ko))
    };
    assert_eq!(closed("n[1-2]"), (Some(0), "n[1-2]\n".into(), String::new()));
    assert!(bmcs.with(1, |bmc| bmc.on));
    // The first line is of one that is not there; the files were longer.
    assert_eq!(closed("a1,n1"), (Some(1), "n1\n".into(), "a1\n".into()));
    // A disk that is full loses what nobody else has read.
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let status = command(home, &["power", "n1"]).stdout(full).status().unwrap();
    assert_eq!(status.code(), Some(5));

    // What cannot be written is found before anything is done.
    let words = ["power", "n1", "off", "--ko-file", "/no/such/folder"];
    let output = pavo(home, &words);
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert!(bmcs.with(0, |bmc| bmc.on));
}

#[test]
fn times_that_nobody_can_wait_are_refused() {
    let home = tempfile::tempdir().unwrap();
    for option in ["--timeout", "--interval", "--settle", "--window", "--retries", "--fanout"] {
        let words = ["power", "n1", option, "18446744073709551615", "--window", "1"];
        let words = if option == "--window" { &words[..4] } else { &words[..] };
        let output = pavo(home.path(), words);
        assert_eq!(output.status.code(), Some(2), "{option}: {output:?}");
    }
}

#[test]
fn where_there_is_no_inventory_nothing_is_made() {
    let home = tempfile::tempdir().unwrap();
    let text = said(home.path(), &["power", "n1"], 1);
    assert!(text.contains("n1: Could not be found."), "{text}");
    assert!(!home.path().join("state").exists());
}

#[test]
fn who_has_no_password_is_not_asked() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    create(home, &bmcs, 1);
    for setting in ["control/bmc_username", "control/bmc_password"] {
        said(home, &["node", "update", "n1", &format!("{setting}=")], 0);
        let text = said(home, &["power", "n1"], 1);
        let wanted = format!("n1: `{setting}` is not set");
        assert!(text.contains(&wanted) && text.contains("pavo node update n1"), "{text}");
        said(home, &["node", "update", "n1", &format!("control/bmc_username={USER}")], 0);
    }
    assert_eq!(bmcs.with(0, |bmc| bmc.packets), 0);
}

#[test]
fn results_are_records_for_programs() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    create(home.path(), &bmcs, 1);
    let words = |format: &'static str| ["power", "n1,zz", "-o", format];
    let there = r#"{"node":"n1","ok":true,"text":"off"}"#;
    let missing = r#"{"node":"zz","ok":false,"text":"Could not be found."}"#;
    assert_eq!(said(home.path(), &words("ndjson"), 1), format!("{there}\n{missing}"));
    let output = pavo(home.path(), &words("json"));
    let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let wanted: Vec<serde_json::Value> =
        [missing, there].map(|it| serde_json::from_str(it).unwrap()).to_vec();
    assert_eq!(all, serde_json::Value::from(wanted));
}

#[test]
fn a_program_of_the_site_and_a_virtual_machine_are_reached_by_the_inventory() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    program(home, "relay", "echo \"$*\" >>\"${0%/*}/said\"; case $4 in status) echo on;; esac");
    let relay = format!("control/exec={}/bin/relay --board 3", home.display());
    said(home, &["node", "create", "n1", "mgt=exec", &relay], 0);
    assert!(said(home, &["power", "n1"], 0).contains("n1: on"));
    assert!(said(home, &["power", "n1", "off"], 0).contains("n1: off"));
    let asked = std::fs::read_to_string(home.join("bin/said")).unwrap();
    assert_eq!(asked, "--board 3 n1 status\n--board 3 n1 off\n");
    said(home, &["node", "update", "n1", "control/exec=relay"], 0);
    let text = said(home, &["power", "n1"], 1);
    assert!(text.contains("is no path of a program"), "{text}");

    said(home, &["node", "create", "v1", "mgt=qmp"], 0);
    let text = said(home, &["power", "v1"], 1);
    assert!(text.contains("v1: `control/qmp_socket` is not set"), "{text}");
    let socket = home.join("qmp");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let qemu = std::thread::spawn(move || {
        use std::io::{BufRead, BufReader, Write};
        let (stream, _) = listener.accept().unwrap();
        let mut say = stream.try_clone().unwrap();
        say.write_all(b"{\"QMP\": {}}\n").unwrap();
        for line in BufReader::new(stream).lines() {
            let running = line.unwrap().contains("query-status");
            let answer = serde_json::json!({ "return": { "running": running } });
            say.write_all(format!("{answer}\n").as_bytes()).unwrap();
        }
    });
    let setting = format!("control/qmp_socket={}", socket.display());
    said(home, &["node", "update", "v1", &setting], 0);
    assert!(said(home, &["power", "v1"], 0).contains("v1: on"));
    qemu.join().unwrap();
}

#[test]
fn what_is_set_of_ipmi_is_used() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    create(home, &bmcs, 1);
    bmcs.with(0, |bmc| bmc.key = Some("its own".into()));
    let text = said(home, &["power", "n1"], 1);
    assert!(text.contains("help: say it: `control/bmc_key=-`"), "{text}");
    let set = ["node", "update", "n1", "control/bmc_key=its own", "control/bmc_cipher=17"];
    said(home, &set, 0);
    said(home, &["power", "n1", "on"], 0);
    said(home, &["node", "update", "n1", "control/bmc_privilege=user"], 0);
    let text = said(home, &["power", "n1", "off"], 1);
    assert!(text.contains("this privilege"), "{text}");
    let text = said(home, &["node", "show", "n1"], 0);
    assert!(!text.contains("its own") && !text.contains("bmc_key"), "{text}");
}

/// Each that does not answer holds a descriptor for as long as it is waited for.
#[test]
fn more_silent_controllers_than_files_may_be_open_are_told_for_what_they_are() {
    let home = tempfile::tempdir().unwrap();
    let bmcs = Bmcs::start(200, Duration::ZERO, 0).unwrap();
    let redfish = bmcs.redfish(Tls::None).unwrap();
    for index in 0..200 {
        bmcs.with(index, |bmc| bmc.manner = Manner::Dead);
    }
    create(home.path(), &bmcs, 200);
    let port = format!("control/bmc_port={}", redfish.port());
    let update = ["node", "update", "n[1-200]", "mgt=redfish", "control/bmc_trust=plain", &port];
    said(home.path(), &update, 0);
    let mut limited = Command::new("prlimit");
    limited.args(["--nofile=100:4096", "--", env!("CARGO_BIN_EXE_pavo")]);
    let power = command(home.path(), &["power", "n[1-200]", "--timeout", "2"]);
    limited.args(power.get_args()).env_clear().stdin(Stdio::null());
    limited.envs(power.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = limited.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(!said.contains("Too many open files"), "{said}");
    assert_eq!(said.matches("because: no answer within 2 s").count(), 200, "{said}");
}
