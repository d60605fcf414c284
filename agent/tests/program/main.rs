//! The program as a VM's process meets it, on this machine: its port is a socket.

mod harness;

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use pavo_agent::copy::{Entry, Record};
use pavo_agent::{Copy, Credit, Exec, Exit, Frame, Kind, Opening, PIECE, REPLAY, Size, WINDOW};

use harness::*;

#[test]
fn a_command_runs_with_its_streams_apart_and_its_exit_told() {
    let mut agent = Agent::start();
    let said = agent.run("echo out; echo err >&2; exit 3");
    assert_eq!((&*said.output, &*said.errors), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(said.exit, Some(Exit::Code(3)));
    assert_eq!(agent.run("kill -9 $$").exit, Some(Exit::Signal(9)));
    assert_eq!(agent.run("cat").exit, Some(Exit::Code(0)), "no input is an empty one");
    for (argv, code) in [(&["/no/such"][..], 127), (&["/etc"], 126), (&[], 127)] {
        let argv = argv.iter().map(|word| word.as_bytes().to_vec()).collect();
        let stream = agent.open(Opening::Exec(Exec { argv, ..Exec::default() }));
        assert_eq!(agent.until_end(stream).failure.unwrap().code, code);
    }
}

#[test]
fn a_long_word_is_an_error_of_its_command_alone() {
    let mut agent = Agent::start();
    let long = vec![b'x'; 200_000];
    for exec in [
        Exec { argv: vec![long.clone()], ..Exec::default() },
        Exec { argv: vec![b"true".into()], user: Some(long.clone()), ..Exec::default() },
        Exec { argv: vec![b"true".into()], cwd: Some(long), ..Exec::default() },
    ] {
        let stream = agent.open_long(&Opening::Exec(exec));
        let failure = agent.until_end(stream).failure.unwrap();
        assert!(failure.why.ends_with("xxxx"), "{failure:?}");
    }
    assert_eq!(agent.run("echo on").output, b"on\n");
}

#[test]
fn what_it_is_given_reaches_a_command() {
    let mut agent = Agent::start();
    let line = "echo $A-$B-$C; pwd; echo ${HOME:+home} $1";
    let (stream, _) = agent.sh(line, |exec| {
        exec.argv.extend([b"sh".to_vec(), b"\xff".to_vec()]);
        exec.env = ["A=1", "B=b", "C=2=3"].map(|word| word.as_bytes().to_vec()).into();
        exec.prefixes = vec![b"B=before".into()];
        exec.suffixes = vec![b"B=after".into()];
        exec.cwd = Some(b"/usr".into());
    });
    let said = agent.until_end(stream);
    assert_eq!(said.output, b"1-before:b:after-2=3\n/usr\nhome \xff\n");
    let (stream, _) = agent.sh("taskset -p $$ 2>&1 || nproc", |exec| exec.cpus = vec![0]);
    let said = text(&agent.until_end(stream).output);
    assert!(said.trim_end().ends_with('1'), "{said}");
    for wrong in [
        Exec { cwd: Some(b"/no/such".into()), argv: vec![b"true".into()], ..Exec::default() },
        Exec { user: Some(b"nobody-here".into()), argv: vec![b"true".into()], ..Exec::default() },
    ] {
        let stream = agent.open(Opening::Exec(wrong));
        let failure = agent.until_end(stream).failure.unwrap();
        assert!(failure.why.contains("/no/such") || failure.why.contains("nobody-here"));
    }
}

#[test]
fn a_command_waits_for_its_children_as_anywhere() {
    let mut agent = Agent::start();
    let said = text(&agent.run("grep SigBlk: /proc/self/status").output);
    assert!(said.ends_with("0000000000000000\n"), "{said}");
    let said = agent.run("true & wait $!; echo waited");
    assert_eq!(said.output, b"waited\n");
}

#[test]
fn a_script_runs_with_its_interpreter_however_long_it_is() {
    let mut agent = Agent::start();
    let long = format!("#!/bin/sh\n# {}\necho \"$1 of $#\"\n", "x".repeat(200_000));
    for script in ["echo \"$1 of $#\"\n", &*long] {
        let argv = ["name", "a", "b"].map(|word| word.as_bytes().to_vec()).into();
        let exec = Exec { argv, script: Some(script.into()), ..Exec::default() };
        let stream = agent.open_long(&Opening::Exec(exec));
        let said = agent.until_end(stream);
        assert_eq!(text(&said.output), "a of 2\n", "{said:?}");
    }
}

#[test]
fn input_arrives_whole_as_far_as_it_is_read() {
    let mut agent = Agent::start();
    let (stream, _) = agent.sh("sleep 0.2; cat", |exec| exec.input = true);
    let input: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    let (mut said, mut credit, mut at) = (Said::default(), WINDOW as usize, 0);
    while said.exit.is_none() {
        if at < input.len() && credit >= PIECE {
            let piece = &input[at..input.len().min(at + PIECE)];
            (at, credit) = (at + piece.len(), credit - piece.len());
            agent.say(stream, Kind::Data, piece);
            if at == input.len() {
                agent.say(stream, Kind::End, []);
            }
            continue;
        }
        let frame = agent.frame();
        if frame.kind == Kind::Credit {
            credit += Credit::decode(&frame.payload).unwrap().0 as usize;
            assert!(credit <= WINDOW as usize);
        }
        agent.take(frame, &mut said);
    }
    assert!(said.output == input, "{} bytes", said.output.len());
    // One that does not read is no obstacle.
    let (stream, _) = agent.sh("exec <&-; sleep 0.1", |exec| exec.input = true);
    for _ in 0..WINDOW as usize / PIECE {
        agent.say(stream, Kind::Data, [0; PIECE]);
    }
    assert_eq!(agent.until_end(stream).exit, Some(Exit::Code(0)));
}

#[test]
fn output_stays_within_its_credit_and_one_that_nobody_reads_stops_no_other() {
    let mut agent = Agent::start();
    let (noisy, started) = agent.sh("yes", |_| {});
    let mut come = 0;
    while come < WINDOW as usize {
        let frame = agent.frame();
        assert_eq!((frame.stream, frame.kind), (noisy, Kind::Data));
        come += frame.payload.len();
    }
    assert_eq!(come, WINDOW as usize);
    // From here on only others speak.
    for _ in 0..3 {
        let said = agent.run("head -c 1000000 /dev/zero");
        assert_eq!(said.output.len(), 1_000_000);
    }
    agent.say(noisy, Kind::Close, []);
    let said = agent.until_end(noisy);
    assert_eq!((said.exit, said.output.len()), (Some(Exit::Left), 0));
    until("it is ended", || !is_alive(started.pid));
}

#[test]
fn signals_reach_the_whole_group() {
    let mut agent = Agent::start();
    let said = agent.run("kill -INT $$; echo survived");
    assert_eq!((&*said.output, said.exit), (&b""[..], Some(Exit::Signal(2))));
    let line = "trap 'echo got; exit 5' TERM; sh -c 'echo $$; exec sleep 1000' & wait";
    let (stream, _) = agent.sh(line, |_| {});
    let sleeper: u32 = text(&agent.frame().payload).trim().parse().unwrap();
    agent.say(stream, Kind::Signal, [15]);
    let said = agent.until_end(stream);
    assert_eq!((text(&said.output).as_str(), said.exit), ("got\n", Some(Exit::Code(5))));
    until("the sleeper is ended", || !is_alive(sleeper));
    // A request that never ends is over with who made it.
    agent.streams += 1;
    let stream = agent.streams;
    agent.say(stream, Kind::Part, [1; 100]);
    agent.say(stream, Kind::Close, []);
    assert_eq!(agent.until_end(stream).exit, Some(Exit::Left));
    // What stays behind does not keep its caller waiting.
    let said = agent.run("sleep 1000 >&1 & echo $!");
    assert_eq!(said.exit, Some(Exit::Code(0)));
    let sleeper = nix::unistd::Pid::from_raw(text(&said.output).trim().parse().unwrap());
    nix::sys::signal::kill(sleeper, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn a_command_that_ignores_its_end_is_killed() {
    let mut agent = Agent::start();
    let (stream, started) = agent.sh("trap '' HUP TERM; echo; while :; do sleep 0.1; done", |_| {});
    assert_eq!(agent.frame().kind, Kind::Data);
    agent.say(stream, Kind::Close, []);
    assert_eq!(agent.until_end(stream).exit, Some(Exit::Left));
    assert!(is_alive(started.pid));
    until("it is killed", || !is_alive(started.pid));
    assert_eq!(agent.run("echo on").output, b"on\n");
}

#[test]
fn what_a_command_leaves_behind_is_killed_with_it_when_nobody_is_there() {
    let line = "trap '' HUP; sleep 1000 & trap - HUP; echo $!; wait";
    let sleeper = |agent: &mut Agent| text(&agent.frame().payload).trim().parse().unwrap();
    let mut agent = Agent::start();
    let (stream, started) = agent.sh(line, |_| {});
    let first: u32 = sleeper(&mut agent);
    agent.say(stream, Kind::Close, []);
    assert_eq!(agent.until_end(stream).exit, Some(Exit::Left));
    until("the shell has ended", || !is_alive(started.pid));
    assert_eq!(agent.list(), []);
    until("it is killed", || !is_alive(first));
    let (_, _) = agent.sh(line, |_| {});
    let second: u32 = sleeper(&mut agent);
    agent.port.shutdown(std::net::Shutdown::Both).unwrap();
    until("the second is killed", || !is_alive(second));
}

#[test]
fn one_that_cannot_begin_yet_keeps_no_other_waiting() {
    let dir = std::env::temp_dir().join(format!("pavo-agent-slow-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    // A directory service that does not answer for a while.
    let getent = "#!/bin/sh\ncd ${0%/*}; until [ -e go ]; do sleep 0.05; done\n\
                  echo slow:x:$(id -u):$(id -g)::/:/bin/sh\n";
    std::fs::write(dir.join("getent"), getent).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.join("getent"), mode).unwrap();
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap());
    let mut agent = Agent::start_with(|child| {
        child.env("PATH", path);
    });
    let slow = |line: &str| {
        let argv = ["sh", "-c", line].map(|word| word.as_bytes().to_vec()).into();
        let (user, input) = (Some(b"slow".to_vec()), true);
        Opening::Exec(Exec { argv, user, input, ..Exec::default() })
    };
    let stream = agent.open(slow("cat; echo $USER"));
    let left = agent.open(slow("exec sleep 20"));
    agent.say(stream, Kind::Data, b"early\n".as_slice());
    agent.say(stream, Kind::End, []);
    agent.say(left, Kind::Close, []);
    assert_eq!(agent.until_end(left).exit, Some(Exit::Left));
    assert_eq!(agent.run("echo on").output, b"on\n");
    std::fs::write(dir.join("go"), "").unwrap();
    let said = agent.until_end(stream);
    assert_eq!((text(&said.output).as_str(), said.exit), ("early\nslow\n", Some(Exit::Code(0))));
    let end = Instant::now() + PATIENCE;
    while !agent.list().is_empty() {
        assert!(Instant::now() < end, "what was left still runs");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_terminal_has_its_size_and_ends_with_its_command() {
    let mut agent = Agent::start();
    let size = Size { rows: 31, columns: 77 };
    let (stream, _) =
        agent.sh("tty >/dev/null && stty size; read x; stty size; echo $x; exit 4", |exec| {
            exec.terminal = Some(size);
            exec.input = true;
        });
    assert_eq!(text(&agent.frame().payload), "31 77\r\n");
    agent.say(stream, Kind::Resize, Size { rows: 10, columns: 20 }.encode());
    agent.say(stream, Kind::Data, b"hi\n".as_slice());
    let said = agent.until_end(stream);
    let output = text(&said.output);
    assert!(output.ends_with("10 20\r\nhi\r\n"), "{output:?}");
    assert_eq!(said.exit, Some(Exit::Code(4)));
    // Ctrl-C is a signal there.
    let (stream, _) = agent.sh("echo; exec sleep 1000", |exec| exec.terminal = Some(size));
    agent.frame();
    agent.say(stream, Kind::Data, [3]);
    assert_eq!(agent.until_end(stream).exit, Some(Exit::Signal(2)));
}

/// Takes what a stream says to its end, and counts the credit it gives for input.
fn credit_until_end(agent: &mut Agent, stream: u32) -> (Said, u32) {
    let (mut said, mut credit) = (Said::default(), 0);
    while said.exit.is_none() {
        let frame = agent.frame();
        assert_eq!(frame.stream, stream, "{frame:?}");
        if frame.kind == Kind::Credit {
            credit += Credit::decode(&frame.payload).unwrap().0;
        }
        agent.take(frame, &mut said);
    }
    (said, credit)
}

#[test]
fn credit_is_given_for_what_this_stream_has_typed_and_no_more() {
    let mut agent = Agent::start();
    let size = Size { rows: 25, columns: 80 };
    let (stream, _) = agent.sh("cat >/dev/null; echo over", |exec| exec.terminal = Some(size));
    agent.say(stream, Kind::Data, b"hi\n".as_slice());
    agent.say(stream, Kind::End, []);
    let (said, credit) = credit_until_end(&mut agent, stream);
    assert_eq!((said.exit, credit), (Some(Exit::Code(0)), 3));
    assert!(text(&said.output).ends_with("over\r\n"), "{said:?}");
    // What somebody typed who has left is not credited to who comes next.
    let line = "read word; until read word <&3; do sleep 0.05; done 3<$0; wc -c";
    let go = std::env::temp_dir().join(format!("pavo-agent-go-{}", std::process::id()));
    std::fs::write(&go, "").unwrap();
    let (stream, started) = agent.sh(line, |exec| {
        exec.argv.push(go.as_os_str().as_encoded_bytes().to_vec());
        (exec.keep, exec.input) = (true, true);
    });
    agent.say(stream, Kind::Data, b"word\n".as_slice());
    for _ in 0..(WINDOW as usize - PIECE) / PIECE {
        agent.say(stream, Kind::Data, [b'x'; PIECE]);
    }
    agent.say(stream, Kind::Close, []);
    agent.until_end(stream);
    let stream = agent.open(Opening::Attach { id: started.id, unseen: false });
    agent.say(stream, Kind::Data, b"12345".as_slice());
    agent.say(stream, Kind::End, []);
    std::fs::write(&go, "go\n").unwrap();
    let (said, credit) = credit_until_end(&mut agent, stream);
    std::fs::remove_file(&go).unwrap();
    assert_eq!((said.exit, credit), (Some(Exit::Code(0)), 5), "{said:?}");
    assert_eq!(agent.run("echo on").output, b"on\n");
}

#[test]
fn a_command_that_is_left_goes_on_and_is_come_back_to() {
    let mut agent = Agent::start();
    let line = "head -c 300000 /dev/zero | tr '\\0' x; echo; echo end; read y; echo $y; exit 6";
    let (stream, started) = agent.sh(line, |exec| (exec.keep, exec.input) = (true, true));
    agent.say(stream, Kind::Close, []);
    assert_eq!(agent.until_end(stream).exit, Some(Exit::Left));
    let listed = agent.list();
    let [command] = &*listed else { panic!("{listed:?}") };
    assert_eq!((command.id, command.pid, command.attached), (started.id, started.pid, false));
    // It did not wait for us: what it wrote is there, the newest of it.
    std::thread::sleep(Duration::from_millis(300));
    let stream = agent.open(Opening::Attach { id: started.id, unseen: false });
    let other = agent.open(Opening::Attach { id: started.id, unseen: false });
    let (mut said, mut refused) = (Said::default(), Said::default());
    while !said.output.ends_with(b"end\n") || refused.failure.is_none() {
        let frame = agent.frame();
        let to = if frame.stream == stream { &mut said } else { &mut refused };
        agent.take(frame, to);
    }
    assert!(refused.failure.unwrap().why.contains("somebody is attached"), "{other}");
    assert!(said.output.len() <= REPLAY || said.output.len() > 290_000, "{}", said.output.len());
    agent.say(stream, Kind::Data, b"back\n".as_slice());
    let said = agent.until_end(stream);
    assert_eq!((said.output, said.exit), (b"back\n".to_vec(), Some(Exit::Code(6))));
    assert_eq!(agent.list(), []);
}

#[test]
fn who_comes_back_is_shown_output_and_errors_apart() {
    let mut agent = Agent::start();
    let line = "echo out; echo err >&2; echo more; read go; exit 3";
    let (stream, started) = agent.sh(line, |exec| (exec.keep, exec.input) = (true, true));
    // Seen once, and again by who comes back.
    let mut seen = Said::default();
    while seen.output.len() + seen.errors.len() < 13 {
        let frame = agent.frame();
        agent.take(frame, &mut seen);
    }
    agent.say(stream, Kind::Close, []);
    assert_eq!(agent.until_end(stream).exit, Some(Exit::Left));
    let stream = agent.open(Opening::Attach { id: started.id, unseen: false });
    agent.say(stream, Kind::Data, b"go\n".as_slice());
    let said = agent.until_end(stream);
    assert_eq!((&*said.output, &*said.errors), (&b"out\nmore\n"[..], &b"err\n"[..]), "{said:?}");
    assert_eq!(said.exit, Some(Exit::Code(3)));
}

#[test]
fn a_command_of_which_all_is_to_be_seen_waits_for_who_comes_back() {
    let mut agent = Agent::start();
    // More than is kept, and than may be on its way.
    let line = "echo first; read go; seq 100000; echo over >&2; exit 4";
    let (stream, started) =
        agent.sh(line, |exec| (exec.keep, exec.whole, exec.input) = (true, true, true));
    assert_eq!(agent.frame().payload, b"first\n");
    agent.say(stream, Kind::Credit, Credit(6).encode());
    // What of this has arrived nobody tells: all of it comes again.
    agent.say(stream, Kind::Data, b"go\n".as_slice());
    let hello = agent.begin([3; 16]);
    assert_eq!(hello.version, pavo_agent::VERSION);
    std::thread::sleep(Duration::from_millis(500));
    let [command] = &*agent.list() else { panic!("it is kept") };
    assert_eq!((command.exit, command.attached), (None, false), "it waits");
    let stream = agent.open(Opening::Attach { id: started.id, unseen: true });
    let said = agent.until_end(stream);
    let numbers: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    assert!(text(&said.output) == numbers, "{} bytes", said.output.len());
    assert_eq!((&*said.errors, said.exit), (&b"over\n"[..], Some(Exit::Code(4))));
    assert_eq!(agent.list(), []);
}

#[test]
fn a_command_that_is_left_at_once_is_known_however_short_it_is() {
    let mut agent = Agent::start();
    let (stream, started) =
        agent.sh("echo short; exit 3", |exec| (exec.keep, exec.leave) = (true, true));
    let said = agent.until_end(stream);
    assert_eq!((&*said.output, said.exit), (&b""[..], Some(Exit::Left)));
    let end = Instant::now() + PATIENCE;
    while agent.list()[0].exit != Some(Exit::Code(3)) {
        assert!(Instant::now() < end);
    }
    let stream = agent.open(Opening::Attach { id: started.id, unseen: false });
    let said = agent.until_end(stream);
    assert_eq!((text(&said.output).as_str(), said.exit), ("short\n", Some(Exit::Code(3))));
}

#[test]
fn a_command_that_was_left_is_ended_by_a_signal_and_still_tells_how() {
    let mut agent = Agent::start();
    let (stream, started) = agent.sh("echo here; exec sleep 1000", |exec| exec.keep = true);
    assert_eq!(agent.frame().payload, b"here\n");
    agent.say(stream, Kind::Close, []);
    agent.until_end(stream);
    let stream = agent.open(Opening::Kill { id: started.id, signal: 15 });
    assert_eq!(agent.until_end(stream).exit, Some(Exit::Code(0)));
    until("it is dead", || !is_alive(started.pid));
    let end = Instant::now() + PATIENCE;
    while agent.list()[0].exit.is_none() {
        assert!(Instant::now() < end);
    }
    let stream = agent.open(Opening::Attach { id: started.id, unseen: false });
    let said = agent.until_end(stream);
    assert_eq!((text(&said.output).as_str(), said.exit), ("here\n", Some(Exit::Signal(15))));
    let stream = agent.open(Opening::Kill { id: 99, signal: 15 });
    assert_eq!(agent.until_end(stream).failure.unwrap().code, 1);
}

#[test]
fn a_new_conversation_ends_what_was_and_takes_nothing_of_it() {
    let mut agent = Agent::start();
    let (_, lost) = agent.sh("exec sleep 1000", |_| {});
    let (_, kept) = agent.sh("exec sleep 1000", |exec| exec.keep = true);
    // In the middle of nothing a frame was left half said.
    let half = Frame::new(7, Kind::Data, [0; 100]).bytes();
    agent.port.write_all(&half[..40]).unwrap();
    // It is taken for the rest of that frame, and then found.
    agent.port.write_all(&[0; 69]).unwrap();
    let hello = agent.begin([2; 16]);
    assert_eq!(hello.version, pavo_agent::VERSION);
    assert!(hello.cores > 0 && hello.uptime > 0 && !hello.boot_id.is_empty(), "{hello:?}");
    until("it is ended", || !is_alive(lost.pid));
    assert!(is_alive(kept.pid));
    let stream = agent.open(Opening::Kill { id: kept.id, signal: 9 });
    agent.until_end(stream);
    // Rubbish is passed over until the next mark.
    agent.port.write_all(&[0xee; 5000]).unwrap();
    agent.begin([3; 16]);
    assert_eq!(agent.run("echo on").output, b"on\n");
}

#[test]
fn it_ends_with_its_port_and_its_commands_with_it() {
    let mut agent = Agent::start();
    let (_, started) = agent.sh("exec sleep 1000", |_| {});
    agent.port.shutdown(std::net::Shutdown::Both).unwrap();
    until("the command is ended", || !is_alive(started.pid));
    assert!(agent.child.wait().unwrap().success());
    let mut rest = Vec::new();
    match agent.port.read_to_end(&mut rest) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => {}
    }
}

/// What a copy says to its end, as the agent carries it; the stream that it has.
fn copy(agent: &mut Agent, comes: bool, path: &std::path::Path) -> u32 {
    let paths = vec![path.as_os_str().as_encoded_bytes().to_vec()];
    let stream = agent.open(Opening::Copy(Copy { comes, paths, ..Copy::default() }));
    assert_eq!(agent.frame().kind, Kind::Started);
    stream
}

#[test]
fn files_come_and_go_by_a_process_of_their_own() {
    let dir = std::env::temp_dir().join(format!("pavo-agent-files-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let mut agent = Agent::start();
    let record = |record: Record<'_>| {
        let mut bytes = Vec::new();
        record.write(&mut bytes).unwrap();
        bytes
    };
    let file = |size| Entry { name: b"x".into(), mode: 0o640, size, ..Entry::default() };
    let said = [
        record(Record::File(file(5))),
        record(Record::Content(b"hello")),
        record(Record::End),
        record(Record::Finish),
    ];
    let stream = copy(&mut agent, true, &dir.join("new"));
    agent.say(stream, Kind::Data, said.concat());
    let heard = agent.until_end(stream);
    assert_eq!((heard.output, heard.exit), (record(Record::Done), Some(Exit::Code(0))));
    assert_eq!(std::fs::read_to_string(dir.join("new")).unwrap(), "hello");
    // The other way: it waits for our word.
    let stream = copy(&mut agent, false, &dir.join("new"));
    agent.say(stream, Kind::Data, record(Record::Done));
    let heard = agent.until_end(stream);
    assert_eq!(heard.exit, Some(Exit::Code(0)));
    let told = record(Record::Total(5));
    assert!(heard.output.starts_with(&told) && heard.output.ends_with(&said[1..].concat()));
    // Of one that is left nothing stays but a part that is worth it.
    for (size, parts) in [(100, 0), (2 << 20, 1)] {
        let stream = copy(&mut agent, true, &dir.join("cut"));
        let asks = size > 1 << 20;
        agent.say(stream, Kind::Data, record(Record::File(Entry { asks, ..file(size) })));
        if asks {
            assert_eq!(agent.frame().kind, Kind::Credit);
            assert_eq!(agent.frame().kind, Kind::Data, "what it has");
            agent.say(stream, Kind::Data, record(Record::From(0)));
        }
        agent.say(stream, Kind::Data, record(Record::Content(b"so far")));
        let part = dir.join(".cut.pavo-part");
        until("it has come", || part.metadata().is_ok_and(|about| about.len() == 6));
        agent.say(stream, Kind::Close, []);
        assert_eq!(agent.until_end(stream).exit, Some(Exit::Left));
        until("its process has ended", || {
            let words = dir.join("cut").into_os_string().into_encoded_bytes();
            !std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
                let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                line.windows(words.len()).any(|part| part == words)
            })
        });
        assert_eq!(usize::from(part.exists()), parts);
    }
    assert_eq!(agent.run("echo on").output, b"on\n");
    std::fs::remove_dir_all(&dir).unwrap();
}
