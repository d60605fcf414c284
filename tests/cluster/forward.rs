//! Connections to guests' ports that nobody has published.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;

use super::running::Running;
use super::world::{World, world};

/// What dropbear says first.
const BANNER: &str = "SSH-2.0-dropbear";
/// A user that is neither root nor the one of the cluster.
const STRANGER: u32 = 12_345;

/// Where the first port of a `pavo forward` listens.
fn address(forward: &Running) -> String {
    forward.wait_for(" -> vm");
    forward.stdout().split(" -> ").next().unwrap().to_owned()
}

fn forward(world: &World, words: &[&str]) -> Running {
    let mut command = world.pavo_command(&["forward"]);
    command.args(words);
    world.start(command)
}

#[test]
fn ports_of_a_guest_are_reached_and_by_its_user_alone() {
    world(|world| {
        let alloc = world.alloc(&["tiny:2", "--mem", "128", "--wait", "ssh", "-E", "sleep 600"]);
        alloc.wait_for("vm[0-1] answer ssh\n");
        world.ok(&["ssh", "vm0", "nc -ll -p 7000 -e cat >/dev/null 2>&1 </dev/null &"]);
        ssh_goes_through_nc(world);
        nc_carries_both_ways_and_half_an_end(world);
        a_port_where_nobody_listens_says_so(world);
        let forward = forward(world, &["vm0", "0:7000", "0:22"]);
        programs_here_reach_the_guest(&forward);
        a_strangers_do_not(&forward);
        where_other_machines_are_let_in_so_is_everybody_here(world);
        world.ok(&["cancel"]);
        alloc.finish();
        let output = forward.finish();
        assert_eq!(output.code, Some(4), "{output}");
        assert!(output.stderr.contains("vm0 has ended"), "{output}");
    });
}

fn ssh_goes_through_nc(world: &World) {
    let config = world.ok(&["ssh-config"]);
    let word = |key: &str| {
        let line = config.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap();
        line.trim().trim_matches('"').to_owned()
    };
    let mut ssh = world.command("ssh");
    ssh.arg("-o").arg(format!("ProxyCommand={} nc %h %p", world.program().display()));
    ssh.arg("-o").arg(format!("UserKnownHostsFile={}", word("UserKnownHostsFile")));
    ssh.args(["-F", "none", "-o", "BatchMode=yes", "-i"]).arg(word("IdentityFile"));
    let output = world.run({
        ssh.args(["root@vm1", "hostname"]);
        ssh
    });
    assert_eq!((output.code, &*output.stdout), (Some(0), "vm1\n"), "{output}");
}

fn nc_carries_both_ways_and_half_an_end(world: &World) {
    // More than all buffers on the way hold, from one who sends back before it takes more.
    let text: String = (0..1_500_000).map(|number| format!("{number}\n")).collect();
    let input = world.write("numbers", &text);
    let mut command = world.pavo_command(&["nc", "vm0", "7000"]);
    command.stdin(fs::File::open(input).unwrap());
    let output = world.start_with_input(command).finish();
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    assert!(output.stdout == text, "{} bytes of {}", output.stdout.len(), text.len());
}

fn a_port_where_nobody_listens_says_so(world: &World) {
    let refused = world.pavo(&["nc", "vm0", "7001"]);
    assert_eq!(refused.code, Some(5), "{refused}");
    let expected = "connecting to port 7001 of vm0\n  because: nothing listens at 10.200.0.1\n";
    assert!(refused.stderr.contains(expected), "{refused}");
    let wrong = world.pavo(&["forward", "vm0", "80"]);
    assert_eq!(wrong.code, Some(2), "{wrong}");
    assert!(wrong.stderr.contains("help: such as `8080:80`"), "{wrong}");
    // A caller is reset, as the guest would; the user is told once.
    let forward = forward(world, &["vm0", "0:7001"]);
    let address = address(&forward);
    for _ in 0..3 {
        let mut caller = TcpStream::connect(&address).unwrap();
        assert!(caller.read(&mut [0]).is_err(), "no end as if all were well");
    }
    forward.wait_for("nothing listens at 10.200.0.1");
    forward.signal(Signal::SIGINT);
    let output = forward.finish();
    assert_eq!(output.code, Some(0), "{output}");
    assert_eq!(output.stderr.matches("warning:").count(), 1, "{output}");
}

fn programs_here_reach_the_guest(forward: &Running) {
    // As root: what its users own is looked at, and root's are let in.
    let mut caller = TcpStream::connect(address(forward)).unwrap();
    caller.write_all(b"caller\n").unwrap();
    caller.shutdown(Shutdown::Write).unwrap();
    let mut said = String::new();
    caller.read_to_string(&mut said).unwrap();
    assert_eq!(said, "caller\n");

    let stdout = forward.stdout();
    let ssh = stdout.lines().nth(1).unwrap().strip_suffix(" -> vm0:22").unwrap();
    let callers: Vec<_> = (0..5).map(|_| TcpStream::connect(ssh).unwrap()).collect();
    for mut caller in callers {
        let mut banner = [0; BANNER.len()];
        caller.read_exact(&mut banner).unwrap();
        assert_eq!(&banner, BANNER.as_bytes());
    }
}

fn a_strangers_do_not(forward: &Running) {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let address = address(forward);
    let (host, port) = address.split_once(':').unwrap();
    let script = format!("exec 3<>/dev/tcp/{host}/{port}; echo hello >&3; cat <&3; true");
    let mut stranger = Command::new("bash");
    stranger.args(["-c", &script]).uid(STRANGER).gid(STRANGER);
    let output = stranger.output().unwrap();
    assert_eq!(output.stdout, b"", "{output:?}");
    forward.wait_for(&format!("turned away a program of another user (uid {STRANGER})"));
}

/// In a network of its own, which no other machine reaches.
fn where_other_machines_are_let_in_so_is_everybody_here(world: &World) {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let outside = fs::File::open("/proc/thread-self/ns/net").unwrap();
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let up = "ip link set lo up && ip address add 192.0.2.1/32 dev lo";
    assert!(Command::new("sh").args(["-c", up]).status().unwrap().success());
    let open = forward(world, &["vm0", "0.0.0.0:0:7000", "127.0.0.1:0:7000"]);
    open.wait_for("127.0.0.1:");
    let said = open.stdout();
    let ports: Vec<&str> =
        said.lines().map(|line| line.split([':', ' ']).nth(1).unwrap()).collect();
    let [open_to_all, own] = *ports else { panic!("{said}") };
    for (host, port, answer) in [
        ("192.0.2.1", open_to_all, "hello\n"),
        // It came by loopback, and is of another user all the same.
        ("127.0.0.1", open_to_all, "hello\n"),
        ("127.0.0.1", own, ""),
    ] {
        let script = format!("exec 3<>/dev/tcp/{host}/{port}; echo hello >&3; head -n 1 <&3; true");
        let mut stranger = Command::new("bash");
        stranger.args(["-c", &script]).uid(STRANGER).gid(STRANGER);
        let output = stranger.output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), answer, "{host}:{port} {output:?}");
    }
    open.signal(Signal::SIGINT);
    assert_eq!(open.finish().code, Some(0));
    setns(&outside, CloneFlags::CLONE_NEWNET).unwrap();
}

#[test]
fn a_guest_that_has_not_booted_does_not_answer() {
    world(|world| {
        let alloc = world.idle(&["tiny"]);
        let silent = world.pavo(&["nc", "vm0", "22"]);
        assert_eq!(silent.code, Some(5), "{silent}");
        for expected in ["because: 10.200.0.1 does not answer", "help: wait until"] {
            assert!(silent.stderr.contains(expected), "{silent}");
        }
        let none = world.pavo(&["nc", "vm7", "22"]);
        assert_ne!(none.code, Some(0), "{none}");
        world.ok(&["cancel"]);
        alloc.finish();
    });
}
