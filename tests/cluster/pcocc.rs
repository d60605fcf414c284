//! A guest that has pcocc's agent and none of ours, as images have that were made for pcocc.
//!
//! What speaks there is a program of these tests (`pcocc/guest.rs`), or, to try the real one,
//! the static program that `PAVO_TEST_PCOCC_AGENT` names.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nix::sys::signal::Signal;

use super::probe;
use super::running::{Output, Running};
use super::session::Terminal;
use super::world::{World, world};

/// What makes a guest of the probe one with users and programs. What a shell starts beside it has
/// interrupts ignored, and the agent is not started so by systemd.
const SCRIPT: &str = "busybox --install -s /bin
mkdir -p /etc /root /tmp /dev/pts /home/ada
mount -t devpts devpts /dev/pts
echo 'root:x:0:0:root:/root:/bin/sh
ada:x:1000:1000::/home/ada:/bin/sh' >/etc/passwd
echo 'root:x:0:
ada:x:1000:' >/etc/group
chmod 1777 /tmp
hostname old-image
start-stop-daemon -S -b -x /bin/sh -- -c 'while :; do pcocc-agent; sleep 1; done'";

/// The program, built once.
fn agent() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(path) = std::env::var_os("PAVO_TEST_PCOCC_AGENT") {
            return path.into();
        }
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap().keep();
        let path = dir.join("pcocc-agent");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/pcocc/guest.rs");
        let mut compiler = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
        compiler.args(["--edition", "2024", "-O", "-Cstrip=symbols"]);
        compiler.args(["-Ctarget-feature=+crt-static", "-o"]).arg(&path).arg(source);
        assert!(compiler.status().unwrap().success(), "it does not build");
        path
    })
}

/// A cluster of one such VM, which answers.
fn cluster(world: &World) -> Running {
    probe::template_with(world, "", SCRIPT, &[("pcocc-agent", agent())]);
    let words = ["--mem", "192", "--wait", "agent", "-E", "sleep 900", "probe:1"];
    let alloc = world.alloc(&words);
    alloc.wait_for("vm0 answers\n");
    alloc
}

fn run(world: &World, words: &[&str]) -> Output {
    world.pavo(&[&["run"], words].concat())
}

/// How many processes the guest has whose words begin so.
fn count(world: &World, words: &str) -> usize {
    let line = "for at in /proc/[0-9]*; do tr '\\0' ' ' <$at/cmdline; echo; done 2>/dev/null";
    let line = format!("{line} | grep -c '^{words}' || true");
    world.ok(&["run", "sh", "-c", &line]).trim().parse().unwrap()
}

/// The same of a program's own name: busybox runs some of its own as themselves.
fn named(world: &World, name: &str) -> usize {
    let line = format!("cat /proc/[0-9]*/comm 2>/dev/null | grep -cx '{name}' || true");
    world.ok(&["run", "sh", "-c", &line]).trim().parse().unwrap()
}

#[test]
fn commands_run_where_only_pcoccs_agent_answers() {
    world(|world| {
        let alloc = cluster(world);
        world.ok(&["wait", "--for", "agent"]);
        let ping = world.pavo(&["agent", "ping"]);
        assert!(ping.stdout.starts_with("1 VM answered in "), "{ping}");
        assert!(ping.stderr.contains("vm0: only pcocc's agent answers"), "{ping}");
        streams_and_codes(world);
        what_commands_are_given(world);
        bytes_arrive_as_they_are(world);
        a_terminal(world);
        who_is_gone_runs_nothing(world);
        lists_and_kills(world);
        one_that_nobody_reads(world);
        what_it_cannot_do(world);
        the_agent_begins_anew(world);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

fn streams_and_codes(world: &World) {
    let said = run(world, &["sh", "-c", "echo $(hostname); echo e >&2; exit 3"]);
    assert_eq!((&*said.stdout, said.code), ("old-image\n", Some(3)), "{said}");
    assert!(said.stderr.starts_with("e\n"), "{said}");
    assert_eq!(run(world, &["sh", "-c", "kill -9 $$"]).code, Some(137));
    assert_eq!(run(world, &["sh", "-c", "kill -11 $$"]).code, Some(139));
    let said = run(world, &["no-such-program"]);
    assert_eq!(said.code, Some(127), "{said}");
    assert!(said.stderr.contains("there is no program `no-such-program`"), "{said}");
    assert_eq!(run(world, &["/etc"]).code, Some(126));
    let said = run(world, &["--timeout", "1", "sleep", "600"]);
    assert_eq!(said.code, Some(124), "{said}");
    assert!(said.stderr.contains("vm0: killed by signal 15"), "{said}");
    // No input is an empty one.
    assert_eq!(run(world, &["cat"]).code, Some(0));
}

fn what_commands_are_given(world: &World) {
    world.write("home/script", "#!/bin/sh\necho \"$1 $A\"; pwd; echo $PATH; id -u; exit 4\n");
    let words = ["--cwd", "/etc", "-e", "A=b", "--path-prefix", "PATH=/x", "--path-suffix", "A=c"];
    let said = run(world, &[&words[..], &["--script", "script", "a  word"]].concat());
    let path = "/x:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(said.stdout, format!("a  word b:c\n/etc\n{path}\n0\n"), "{said}");
    assert_eq!(said.code, Some(4), "{said}");
    assert_eq!(run(world, &["sh", "-c", "ls -A /tmp | grep pavo"]).stdout, "", "it is removed");
    let said = run(world, &["--user", "ada", "sh", "-c", "id -u; pwd; echo $USER $HOME; cat /x"]);
    assert_eq!(said.stdout, "1000\n/home/ada\nada /home/ada\n", "{said}");
    let said = run(world, &["--user", "nobody-there", "true"]);
    assert!(said.stderr.contains("the guest has no user `nobody-there`"), "{said}");
    let said = run(world, &["--cwd", "/no/such", "true"]);
    assert_eq!(said.code, Some(126), "{said}");
    assert!(said.stderr.contains("there is no folder `/no/such`"), "{said}");
    // Words are words, and no program of the shell is taken for one.
    let said = run(world, &["printf", "%s|", "$HOME", "a b", "", "*", "-n", "é"]);
    assert_eq!(said.stdout, "$HOME|a b||*|-n|é|", "{said}");
    assert_eq!(run(world, &["-n", "1", "-c", "1", "hostname"]).stdout, "old-image\n");
}

fn bytes_arrive_as_they_are(world: &World) {
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let mut command = world.pavo_command(&["run", "cat"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let sent = bytes.clone();
    let typist = std::thread::spawn(move || input.write_all(&sent));
    let mut back = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut back).unwrap();
    typist.join().unwrap().unwrap();
    assert!(child.wait().unwrap().success());
    assert!(back == bytes, "{} bytes came back", back.len());
    // One that reads no more keeps nobody waiting.
    let mut command = world.pavo_command(&["run", "head", "-c", "5"]);
    command.stdin(File::open(world.program()).unwrap());
    let said = world.start_with_input(command).finish();
    assert_eq!(said.code, Some(0), "{said}");
}

fn a_terminal(world: &World) {
    let mut terminal = Terminal::new(world, &["run", "--pty", "sh"]);
    terminal.wait_for("#");
    terminal.type_in("tty; stty size; exit 5\r");
    terminal.wait_for("/dev/pts/");
    let said = terminal.program.finish();
    assert_eq!(said.code, Some(5), "{said}");
}

fn who_is_gone_runs_nothing(world: &World) {
    let client = world.start(world.pavo_command(&["run", "sh", "-c", "sleep 4242; true"]));
    world.until("it runs", || count(world, "sleep 4242") == 1);
    client.signal(Signal::SIGKILL);
    client.finish();
    world.until("it is ended", || count(world, "sleep 4242") == 0);
    // One that ignores its end is killed.
    let words = ["run", "sh", "-c", "trap '' HUP TERM; echo on; while :; do sleep 1.25; done"];
    let client = world.start(world.pavo_command(&words));
    client.wait_for("on\n");
    client.signal(Signal::SIGKILL);
    client.finish();
    world.until("it is killed", || count(world, "sleep 1.25") == 0);
    // A signal is passed on, and the command's end is ours.
    let words = ["run", "sh", "-c", "trap 'exit 7' INT; echo on; while :; do sleep 0.1; done"];
    let client = world.start(world.pavo_command(&words));
    client.wait_for("on\n");
    client.signal(Signal::SIGINT);
    assert_eq!(client.finish().code, Some(7));
}

fn lists_and_kills(world: &World) {
    let client = world.start(world.pavo_command(&["run", "--user", "ada", "sleep", "777"]));
    // Its number is known once it has begun; who was killed before may still be listed.
    let find = || {
        let list = world.ok(&["agent", "list"]);
        let row = list.lines().find(|line| line.ends_with("\tsleep 777")).map(str::to_owned);
        row.filter(|row| row.split('\t').nth(2) != Some("0"))
    };
    world.until("it is listed", || find().is_some());
    let line = find().unwrap();
    let parts: Vec<&str> = line.split('\t').collect();
    assert_eq!((parts[0], parts[3], parts[5]), ("vm0", "ada", "attached"), "{line}");
    assert_eq!(world.pavo(&["agent", "kill", "vm0", "999"]).code, Some(4));
    world.ok(&["agent", "kill", "vm0", parts[1], "-s", "USR1"]);
    assert_eq!(client.finish().code, Some(128 + 10));
    assert_eq!(find(), None);
}

fn one_that_nobody_reads(world: &World) {
    let mut command = world.pavo_command(&["run", "yes"]);
    let (unread, end) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    command.stdin(Stdio::null()).stdout(end).stderr(Stdio::null());
    let stuck = world.launch(command);
    world.until("it runs", || named(world, "yes") == 1);
    for _ in 0..2 {
        let said = run(world, &["sh", "-c", "head -c 3000000 /dev/zero | wc -c"]);
        assert_eq!(said.stdout, "3000000\n", "{said}");
    }
    stuck.signal(Signal::SIGKILL);
    stuck.finish();
    drop(unread);
    world.until("it is ended", || named(world, "yes") == 0);
    // What is read slowly arrives whole.
    let line = "\"$PAVO\" run sh -c 'head -c 2000000 /dev/zero' | (sleep 3; wc -c)";
    let mut command = world.command("sh");
    command.args(["-c", line]);
    let said = world.run(command);
    assert_eq!(said.stdout.trim(), "2000000", "{said}");
}

fn what_it_cannot_do(world: &World) {
    let said = run(world, &["--detach", "true"]);
    assert_eq!(said.code, Some(255), "{said}");
    assert!(said.stderr.contains("pcocc's agent") && said.stderr.contains("agent: inject"));
    let said = world.pavo(&["cp", "vm0:/etc/passwd", "."]);
    assert!(said.stderr.contains("only pcocc's agent answers in this guest, and it copies no"));
}

fn the_agent_begins_anew(world: &World) {
    let client = world.start(world.pavo_command(&["run", "sh", "-c", "echo on; sleep 3333"]));
    client.wait_for("on\n");
    let said = run(world, &["sh", "-c", "kill -9 $(pidof pcocc-agent); sleep 600"]);
    assert_eq!(said.code, Some(255), "{said}");
    assert!(said.stderr.contains("vm0: the guest's agent has ended"), "{said}");
    assert_eq!(client.finish().code, Some(255));
    world.ok(&["wait", "--for", "agent", "--timeout", "50"]);
    world.until("it answers", || run(world, &["true"]).code == Some(0));
}
