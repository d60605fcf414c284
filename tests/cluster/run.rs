//! Commands in real guests, by the agent.

use std::io::{Read, Write};
use std::process::Stdio;

use nix::sys::signal::Signal;

use super::running::{Output, Running};
use super::session::Terminal;
use super::world::{World, world};

/// A cluster of two VMs whose agents answer.
fn cluster(world: &World) -> Running {
    let alloc = world.alloc(&["tiny:2", "--mem", "128", "--wait", "agent", "-E", "sleep 600"]);
    alloc.wait_for("vm[0-1] answer\n");
    alloc
}

fn run(world: &World, words: &[&str]) -> Output {
    world.pavo(&[&["run"], words].concat())
}

/// How many processes of this name a guest has.
fn count(world: &World, vm: &str, name: &str) -> usize {
    let line = format!("ps | grep -c '[ ]{name}' || true");
    world.ok(&["run", "-w", vm, "sh", "-c", &line]).trim().parse().unwrap()
}

#[test]
fn commands_run_in_all_vms_or_some_and_end_as_they_should() {
    world(|world| {
        let alloc = cluster(world);
        let ping = world.ok(&["agent", "ping"]);
        assert!(ping.starts_with("2 VMs answered in "), "{ping}");
        let rows: serde_json::Value =
            serde_json::from_str(&world.ok(&["agent", "ping", "-o", "json"])).unwrap();
        let row = (&rows[1]["vm"], &rows[1]["agent"]);
        assert_eq!(row, (&1.into(), &"pavo-agent".into()), "{rows}");
        world.ok(&["wait", "--for", "agent"]);
        streams_and_codes(world);
        placement_and_what_commands_are_given(world);
        variables_of_here(world);
        who_is_given_the_input(world);
        bytes_arrive_as_they_are(world);
        a_terminal(world);
        one_that_nobody_reads(world);
        who_is_gone_runs_nothing(world);
        left_and_come_back_to(world);
        who_has_not_answered_is_named(world);
        one_that_stands_still(world);
        one_that_is_off(world);
        the_agent_begins_anew(world);
        a_vm_is_lost(world);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

#[test]
fn a_script_in_the_first_vm_ends_the_cluster_with_its_exit_code() {
    world(|world| {
        let script = "#!/bin/sh\nhostname; id -u; echo to errors >&2; cat; exit 7\n";
        let script = world.write("home/script", script);
        let words = ["-b", script.to_str().unwrap(), "tiny:2", "--mem", "128"];
        let alloc = world.alloc(&words);
        alloc.wait_for("Waiting for the agent of vm0");
        alloc.wait_for("vm0\n0\n");
        let said = alloc.finish();
        assert_eq!((&*said.stdout, said.code), ("vm0\n0\n", Some(7)), "{said}");
        assert!(said.stderr.contains("to errors\n"), "{said}");
        // Mistakes cost no cluster.
        let said = world.pavo(&["alloc", "-b", "/nonexistent", "tiny"]);
        assert_eq!((&*said.stdout, said.code), ("", Some(5)), "{said}");
        assert!(said.stderr.contains("reading the script `/nonexistent`"), "{said}");
        let said = world.pavo(&["alloc", "-b", "x", "-E", "true", "tiny"]);
        assert_eq!(said.code, Some(2), "{said}");
    });
}

/// Those that are named, or match, or all but the user's; and paths put together.
fn variables_of_here(world: &World) {
    let said = |words: &[&str]| {
        let mut command = world.pavo_command(&["run", "-w", "vm0"]);
        command.envs([("GREETING", "it's \"hi\""), ("GREEN", "x"), ("OTHER", "y")]);
        let said = world.run({
            command.args(words);
            command
        });
        assert_eq!(said.code, Some(0), "{words:?}: {said}");
        said.stdout
    };
    let echo = ["sh", "-c", "echo $GREETING-$GREEN-$OTHER-$HOME"];
    for (option, expected) in [
        (&["-e", "GREETING"][..], "it's \"hi\"---/root\n"),
        (&["-e", "re(GREE.*)"], "it's \"hi\"-x--/root\n"),
        (&["-e", "OTHER=z", "-e", "GREEN"], "-x-z-/root\n"),
        (&["--mirror-env"], "it's \"hi\"-x-y-/root\n"),
    ] {
        assert_eq!(said(&[option, &echo].concat()), expected, "{option:?}");
    }
    let before = said(&["sh", "-c", "echo $PATH"]);
    let after = said(&["--path-suffix", "PATH=/y", "sh", "-c", "echo $PATH"]);
    assert_eq!(after, format!("{}:/y\n", before.trim()));
}

fn who_is_given_the_input(world: &World) {
    let input = world.write("home/input", "word\n");
    for (option, expected) in [
        ("--input-all", &["vm0: word", "vm1: word"][..]),
        ("--input-first", &["vm0: word"]),
        ("--input-none", &[]),
    ] {
        let mut command = world.pavo_command(&["run", option, "--label", "cat"]);
        command.stdin(std::fs::File::open(&input).unwrap());
        let said = world.start_with_input(command).finish();
        let mut lines: Vec<&str> = said.stdout.lines().collect();
        lines.sort_unstable();
        assert_eq!((&*lines, said.code), (expected, Some(0)), "{option}: {said}");
    }
}

#[test]
fn processes_have_cpus_of_their_own() {
    world(|world| {
        let words = ["tiny:2", "-c", "2", "--mem", "128", "--wait", "agent", "-E", "sleep 600"];
        let alloc = world.alloc(&words);
        alloc.wait_for("vm[0-1] answer\n");
        let masks = |words: &[&str]| {
            let line = "taskset -p $$ | sed 's/.*: //'";
            let said = run(world, &[words, &["--label", "sh", "-c", line]].concat());
            assert_eq!(said.code, Some(0), "{said}");
            let mut lines: Vec<String> = said.stdout.lines().map(str::to_owned).collect();
            lines.sort_unstable();
            lines
        };
        assert_eq!(masks(&["-n", "3"]), ["vm0.0: 1", "vm0.1: 2", "vm1: 3"]);
        assert_eq!(masks(&["-n", "2", "-N", "2"]), ["vm0: 3", "vm1: 3"]);
        assert_eq!(masks(&["-n", "2", "-c", "2"]), ["vm0: 3", "vm1: 3"]);
        let said = run(world, &["-n", "3", "-c", "2", "true"]);
        assert_eq!(said.code, Some(2), "{said}");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

fn streams_and_codes(world: &World) {
    let said = run(world, &["--label", "sh", "-c", "echo $(hostname); echo e >&2; exit 3"]);
    let mut lines: Vec<&str> = said.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!((lines, said.code), (vec!["vm0: vm0", "vm1: vm1"], Some(3)), "{said}");
    assert!(said.stderr.contains("vm1: e\n") && said.stderr.contains("vm[0-1]: exit code 3\n"));
    let said = run(world, &["--fold", "echo", "hello"]);
    assert_eq!((&*said.stdout, &*said.stderr), ("vm[0-1] (2): hello\n", ""), "{said}");
    let said = run(world, &["-w", "vm1", "hostname"]);
    assert_eq!((&*said.stdout, said.code), ("vm1\n", Some(0)), "{said}");
    let said = run(world, &["sh", "-c", "exit $PAVO_PROCESS"]);
    assert_eq!(said.code, Some(1), "the highest: {said}");
    assert_eq!(run(world, &["-w", "vm0", "sh", "-c", "kill -9 $$"]).code, Some(137));
    let said = run(world, &["no-such-program"]);
    assert_eq!(said.code, Some(127), "{said}");
    assert!(said.stderr.contains("vm[0-1]: there is no program `no-such-program`"), "{said}");
    let said = run(world, &["--timeout", "1", "sleep", "600"]);
    assert_eq!(said.code, Some(124), "{said}");
    assert!(said.stderr.contains("vm[0-1]: killed by signal 15"), "{said}");
    let sets = ["ok", "ko"].map(|name| world.path("home").join(name));
    let [ok, ko] = sets.each_ref().map(|path| path.to_str().unwrap());
    let words = ["--kill-on-fail", "--ok-file", ok, "--ko-file", ko, "sh", "-c"];
    let said =
        run(world, &[&words[..], &["[ $PAVO_PROCESS = 0 ] || exit 9; exec sleep 600"]].concat());
    assert_eq!(said.code, Some(143), "{said}");
    let sets = sets.map(|path| std::fs::read_to_string(path).unwrap());
    assert_eq!(sets, ["", "vm[0-1]\n"]);
}

fn placement_and_what_commands_are_given(world: &World) {
    // Where it could not be said how it went, it does not begin.
    let said = run(world, &["--ok-file", "/nonexistent/x", "touch", "/tmp/begun"]);
    assert_eq!(said.code, Some(5), "{said}");
    assert!(said.stderr.contains("opening `/nonexistent/x`"), "{said}");
    assert_eq!(run(world, &["test", "-e", "/tmp/begun"]).code, Some(1));
    let said = run(world, &["-e", "re(PAVO_", "true"]);
    assert_eq!(said.code, Some(2), "{said}");
    let said = run(world, &["-n", "2", "-c", "1", "--label", "taskset", "-p", "1"]);
    assert_eq!(said.stdout.lines().count(), 2, "{said}");
    let said = run(world, &["-n", "3", "true"]);
    assert_eq!(said.code, Some(2), "{said}");
    assert!(said.stderr.contains("3 processes with a CPU each do not fit: the 2 VMs have 2 CPUs"));
    assert_eq!(run(world, &["-N", "1", "hostname"]).stdout, "vm0\n");
    world.write("home/script", "#!/bin/sh\necho \"$1 $A\"; pwd; echo $PATH; id -u\n");
    let words = ["-w", "vm0", "--cwd", "/etc", "-e", "A=b", "--path-prefix", "PATH=/x"];
    let said = run(world, &[&words[..], &["--script", "script", "word"]].concat());
    let path = "/x:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(said.stdout, format!("word b\n/etc\n{path}\n0\n"), "{said}");
    world.ok(&["run", "sh", "-c", "echo ada:x:1000:1000::/tmp:/bin/sh >>/etc/passwd"]);
    let said = run(world, &["--user", "ada", "-w", "vm1", "sh", "-c", "id -u; pwd; echo $USER"]);
    assert_eq!(said.stdout, "1000\n/tmp\nada\n", "{said}");
}

fn bytes_arrive_as_they_are(world: &World) {
    let bytes: Vec<u8> = (0..10_000_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let mut command = world.pavo_command(&["run", "-w", "vm0", "cat"]);
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
    // To all that there is, each reads all of it.
    let mut command = world.pavo_command(&["run", "--fold", "wc", "-c"]);
    command.stdin(std::fs::File::open(world.program()).unwrap());
    let said = world.start_with_input(command).finish();
    let size = world.program().metadata().unwrap().len();
    assert_eq!(said.stdout, format!("vm[0-1] (2): {size}\n"), "{said}");
}

fn a_terminal(world: &World) {
    let mut terminal = Terminal::new(world, &["run", "-w", "vm1", "--pty", "sh"]);
    terminal.wait_for("#");
    terminal.type_in("tty; exit 5\r");
    terminal.wait_for("/dev/pts/");
    let said = terminal.program.finish();
    assert_eq!(said.code, Some(5), "{said}");
}

fn one_that_nobody_reads(world: &World) {
    let mut command = world.pavo_command(&["run", "-w", "vm0", "yes"]);
    let (unread, end) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    command.stdin(Stdio::null()).stdout(end).stderr(Stdio::null());
    let stuck = world.launch(command);
    world.until("it runs", || count(world, "vm0", "yes") == 1);
    for _ in 0..2 {
        let said = run(world, &["-w", "vm0", "sh", "-c", "head -c 3000000 /dev/zero | wc -c"]);
        assert_eq!(said.stdout, "3000000\n", "{said}");
    }
    stuck.signal(Signal::SIGKILL);
    stuck.finish();
    drop(unread);
    world.until("it is ended", || count(world, "vm0", "yes") == 0);
}

fn who_is_gone_runs_nothing(world: &World) {
    let sleeps = |seconds: &str| count(world, "vm1", &format!("sleep {seconds}"));
    let client = world.start(world.pavo_command(&["run", "-w", "vm1", "sleep", "4242"]));
    world.until("it runs", || sleeps("4242") == 1);
    client.signal(Signal::SIGKILL);
    client.finish();
    world.until("it is ended", || sleeps("4242") == 0);
    // A signal is passed on, and the command's end is ours.
    let words =
        ["run", "-w", "vm1", "sh", "-c", "trap 'exit 7' INT; echo on; while :; do sleep 0.1; done"];
    let client = world.start(world.pavo_command(&words));
    client.wait_for("on\n");
    client.signal(Signal::SIGINT);
    assert_eq!(client.finish().code, Some(7));
    // Only an interrupt said twice means us.
    let words = [
        "run",
        "-w",
        "vm1",
        "sh",
        "-c",
        "trap 'echo got' USR1; trap 'exit 7' TERM; echo on; while :; do sleep 0.1; done",
    ];
    let client = world.start(world.pavo_command(&words));
    client.wait_for("on\n");
    client.signal(Signal::SIGUSR1);
    client.wait_for("got\n");
    client.signal(Signal::SIGUSR1);
    client.signal(Signal::SIGTERM);
    assert_eq!(client.finish().code, Some(7));
}

fn left_and_come_back_to(world: &World) {
    let words = [
        "--detach",
        "-w",
        "vm1",
        "sh",
        "-c",
        "echo begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; echo over; exit 6",
    ];
    let said = run(world, &words);
    let id = said.stdout.trim().strip_prefix("vm1 ").unwrap().to_owned();
    let list = world.ok(&["agent", "list"]);
    assert!(list.contains(&format!("vm1\t{id}\t")) && list.contains("\tleft\t"), "{list}");
    // What is there to be read is not for it.
    let line = "{ \"$0\" agent attach vm1 \"$1\"; code=$?; cat; exit $code; }";
    let mut command = world.command("sh");
    command.args(["-c", line]).arg(world.program()).arg(&id);
    command.stdin(std::fs::File::open(world.write("home/unread", "unread\n")).unwrap());
    let attached = world.start_with_input(command);
    attached.wait_for("begun\n");
    let second = world.pavo(&["agent", "attach", "vm1", &id]);
    assert!(second.stderr.contains("somebody is attached"), "{second}");
    world.ok(&["run", "-w", "vm1", "touch", "/tmp/go"]);
    let said = attached.finish();
    assert_eq!((&*said.stdout, said.code), ("begun\nover\nunread\n", Some(6)), "{said}");
    // The shortest has its id, output and end, too.
    let id = world.ok(&["run", "--detach", "-w", "vm0", "sh", "-c", "echo short; exit 5"]);
    let id = id.trim().strip_prefix("vm0 ").unwrap().to_owned();
    let said = world.pavo(&["agent", "attach", "vm0", &id]);
    assert_eq!((&*said.stdout, said.code), ("short\n", Some(5)), "{said}");
    let id = world.ok(&["run", "--detach", "-w", "vm0", "sleep", "600"]);
    let id = id.trim().strip_prefix("vm0 ").unwrap().to_owned();
    world.ok(&["agent", "kill", "vm0", &id, "-s", "KILL"]);
    let said = world.pavo(&["agent", "attach", "vm0", &id]);
    assert_eq!(said.code, Some(137), "{said}");
    for verb in ["kill", "attach"] {
        let said = world.pavo(&["agent", verb, "vm0", "999"]);
        assert!(said.stderr.starts_with("error: there is no command 999 in vm0\n"), "{said}");
        assert_eq!(said.code, Some(4), "{said}");
    }
}

/// At a terminal; it answers when it can.
fn who_has_not_answered_is_named(world: &World) {
    let qemu = world.process("vm1/disk.qcow2").unwrap();
    qemu.signal(Signal::SIGSTOP);
    let mut terminal = Terminal::new(world, &["run", "hostname"]);
    let before = terminal.wait_for("Waiting for vm1 (");
    assert!(!before.contains("Waiting for vm[0-1]"), "{before}");
    terminal.wait_for(" s)");
    qemu.signal(Signal::SIGCONT);
    let after = terminal.wait_for("vm1\r\n");
    assert!(after.contains("vm0"), "what has come is shown: {after}");
    let said = terminal.program.finish();
    assert_eq!(said.code, Some(0), "{said}");
}

fn one_that_stands_still(world: &World) {
    world.ok(&["pause", "vm1"]);
    let ping = world.pavo(&["agent", "ping", "--timeout", "0"]);
    assert_eq!(ping.code, Some(1), "{ping}");
    assert!(ping.stderr.contains("vm1: vm1 is paused"), "{ping}");
    // It is not waited for, and the guest hears of none of it.
    let said = run(world, &["sh", "-c", "hostname; touch /tmp/late"]);
    assert_eq!((&*said.stdout, said.code), ("vm0\n", Some(255)), "{said}");
    assert!(
        said.stderr.contains("vm1 is paused\n  help: let it go on: `pavo resume vm1`"),
        "{said}"
    );
    let said = world.pavo(&["ssh", "vm1", "true"]);
    assert!(said.stderr.contains("vm1 is paused") && said.code == Some(5), "{said}");
    world.ok(&["resume", "vm1"]);
    // What it had shown before it shows again.
    let answers = || world.ok(&["status", "-o", "json"]).matches("\"agent\"").count() == 2;
    world.until("its state is `agent` again", answers);
    assert_eq!(run(world, &["-w", "vm1", "hostname"]).stdout, "vm1\n");
    assert_eq!(run(world, &["-w", "vm1", "test", "-e", "/tmp/late"]).code, Some(1));
}

fn one_that_is_off(world: &World) {
    world.ok(&["powerdown", "vm1"]);
    world.until("it is off", || world.ok(&["status", "-o", "json"]).contains("\"off\""));
    for words in [
        &["run", "-w", "vm1", "hostname"][..],
        &["pause", "vm1"],
        &["resume", "vm1"],
        &["powerdown", "vm1"],
        &["nc", "vm1", "22"],
        &["ssh", "root@vm1", "true"],
    ] {
        let said = world.pavo(words);
        assert!(said.code != Some(0), "{words:?}: {said}");
        assert!(said.stderr.contains("vm1 is off: the guest powered off\n"), "{words:?}: {said}");
        assert!(said.stderr.contains("help: start its guest again: `pavo reset vm1`"), "{said}");
    }
    world.ok(&["reset", "vm1"]);
    world.until("it answers", || run(world, &["-w", "vm1", "true"]).code == Some(0));
}

fn the_agent_begins_anew(world: &World) {
    let said = run(world, &["-w", "vm0", "sh", "-c", "kill -9 $PPID; sleep 600"]);
    assert_eq!(said.code, Some(255), "{said}");
    assert!(said.stderr.contains("vm0: the guest's agent has ended"), "{said}");
    world.ok(&["wait", "--for", "agent", "--timeout", "50"]);
    world.until("it answers", || run(world, &["-w", "vm0", "true"]).code == Some(0));
}

fn a_vm_is_lost(world: &World) {
    let client =
        world.start(world.pavo_command(&["run", "--label", "sh", "-c", "echo on; sleep 3"]));
    client.wait_for("vm0: on\n");
    client.wait_for("vm1: on\n");
    let qemu = |vm: &str| {
        let all = world.processes();
        let name = format!("-{vm} ");
        all.into_iter().find(|it| it.command.contains("guest=pavo-") && it.command.contains(&name))
    };
    qemu("vm1").expect("its QEMU").kill();
    let said = client.finish();
    assert_eq!(said.code, Some(255), "{said}");
    assert!(said.stderr.contains("error: vm1: "), "{said}");
    assert!(!said.stderr.contains("vm0: the"), "{said}");
    let ping = world.pavo(&["agent", "ping", "--timeout", "0"]);
    assert_eq!(ping.code, Some(1), "{ping}");
    assert!(ping.stdout.starts_with("1 VM answered in "), "{ping}");
    let why = "vm1 has failed: QEMU was killed by signal 9";
    assert!(ping.stderr.contains(why), "{ping}");
    for words in [
        &["run", "-w", "vm1", "true"][..],
        &["cp", "vm1:/etc/hostname", "x"],
        &["reset", "vm1"],
        &["pause", "vm1"],
        &["dump", "vm1", "x"],
        &["console", "vm1"],
        &["display", "vm1"],
        &["forward", "vm1", "0:22"],
        &["ssh", "vm1", "true"],
    ] {
        let said = world.pavo(words);
        assert!(said.code != Some(0) && said.stderr.contains(why), "{words:?}: {said}");
    }
    world.ok(&["console", "-l", "vm1"]);
}
