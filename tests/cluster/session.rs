//! A session beside a cluster: its script or shell, its name, its limits, its end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{LocalFlags, tcgetattr};

use super::running::Running;
use super::world::{World, prepared_world, world};

/// A terminal with a program on it.
pub struct Terminal {
    master: PtyMaster,
    seen: String,
    pub program: Running,
}

impl Terminal {
    /// Starts `pavo` with a terminal as its standard streams.
    pub fn new(world: &World, args: &[&str]) -> Self {
        // Not `openpty`: children, of other tests too, would inherit it and keep it open.
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = posix_openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let mut slave = File::options();
        slave.read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits());
        let slave = slave.open(ptsname_r(&master).unwrap()).unwrap();
        let mut command = world.terminal_command(world.program());
        let stream = || slave.try_clone().unwrap();
        command.args(args).stdin(stream()).stdout(stream()).stderr(stream());
        let program = world.launch(command);
        Self { master, seen: String::new(), program }
    }

    pub fn type_in(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen has shown this since the last call, and returns what it
    /// showed before.
    pub fn wait_for(&mut self, text: &str) -> String {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            assert!(Instant::now() < end, "no `{text}` on the screen:\n{}", self.seen);
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(100u8)).unwrap() == 0 {
                continue;
            }
            let mut bytes = [0; 4096];
            // A terminal without programs answers with an error.
            let count = self.master.read(&mut bytes).unwrap_or(0);
            assert!(count > 0, "no `{text}` on the screen at its end:\n{}", self.seen);
            self.seen += &String::from_utf8_lossy(&bytes[..count]);
        }
    }

    /// Waits for the program's end; whether the terminal shows what is typed again.
    pub fn ends_cooked(self) -> bool {
        self.program.finish();
        let modes = tcgetattr(self.master.as_fd()).unwrap().local_flags;
        modes.contains(LocalFlags::ECHO | LocalFlags::ICANON)
    }

    /// Closes the terminal, as the end of a window does.
    pub fn close(self) -> Running {
        self.program
    }
}

#[test]
fn the_scripts_exit_code_is_passed_through_and_it_knows_its_job() {
    world(|world| {
        let script = "echo $PAVO_JOB_ID $PAVO_JOB_NAME $PCOCC_JOB_ID; exit 7";
        let output = world.alloc(&["tiny:1", "--mem", "128", "-J", "mine", "-E", script]).finish();
        assert_eq!(output.code, Some(7), "{output}");
        assert_eq!(output.stdout, "1 mine 1\n");
        assert!(output.stderr.contains("Granted job allocation 1\n"), "{output}");
    });
}

#[test]
fn a_shell_says_in_its_prompt_which_cluster_it_is_in() {
    world(|world| {
        let mut terminal = Terminal::new(world, &["alloc", "tiny:1", "--mem", "128"]);
        terminal.wait_for("(pavo/1) ");
        // In the shell this cluster is meant; what is typed is not what is shown.
        terminal.type_in("\"$PAVO\" status -o ndjson | tr , ' '; \"$PAVO\" alloc tiny\n");
        terminal.wait_for("\"state\":\"running\"");
        terminal.wait_for("Failure in job allocation: already in a job");
        // Ctrl-C is the shell's business.
        // Said by the program that the terminal's keys go to by then.
        terminal.type_in("sh -c 'echo it $((1+1)) sleeps; exec sleep 600'\n");
        terminal.wait_for("it 2 sleeps");
        terminal.type_in("\x03");
        terminal.wait_for("^C");
        terminal.wait_for("(pavo/1) ");
        terminal.type_in("exit 3\n");
        terminal.wait_for("Terminating the cluster...");
        let output = terminal.program.finish();
        assert_eq!(output.code, Some(3));
    });
}

#[test]
fn a_terminal_that_closes_ends_the_cluster() {
    world(|world| {
        let mut terminal = Terminal::new(world, &["alloc", "tiny:1", "--mem", "128"]);
        terminal.wait_for("(pavo/1) ");
        let output = terminal.close().finish();
        // Whichever the kernel tells first: the launcher of the hang-up, or the shell of
        // the end of its input.
        assert!(matches!(output.code, Some(130 | 0)), "{output}");
    });
}

#[test]
fn the_time_limit_ends_a_cluster() {
    world(|world| {
        let alloc = world.alloc(&["tiny:1", "--mem", "128", "-t", "0:02", "-E", "sleep 600"]);
        let output = alloc.finish();
        assert_eq!(output.code, Some(130), "{output}");
        assert!(output.stderr.contains("error: the time limit was reached\n"), "{output}");
    });
}

/// A VM that has not booted and yet shuts down when it is told to: at a reset.
fn mortal(world: &World) -> Running {
    world.template("mortal", "custom-args: [-no-reboot]");
    world.idle(&["mortal:1"])
}

#[test]
fn a_cluster_ends_when_its_last_guest_has_shut_down() {
    world(|world| {
        let alloc = mortal(world);
        world.ok(&["reset", "vm0"]);
        let output = alloc.finish();
        assert_eq!(output.code, Some(0), "{output}");
        assert!(output.stderr.ends_with("The cluster has shut down\n"), "{output}");
    });
}

#[test]
fn a_failed_vm_is_a_warning_as_long_as_there_is_another() {
    world(|world| {
        let alloc = world.idle(&["tiny:2"]);
        world.process("qemu-system").unwrap().kill();
        alloc.wait_for("QEMU was killed by signal 9");
        let states = world.ok(&["status", "-o", "ndjson"]);
        assert_eq!(states.matches("\"state\":\"failed\"").count(), 1, "{states}");
        assert_eq!(states.matches("\"state\":\"running\"").count(), 1, "{states}");
        world.process("qemu-system").unwrap().kill();
        let output = alloc.finish();
        assert_eq!(output.code, Some(5), "{output}");
    });
}

#[test]
fn four_at_once_get_ids_and_ports_of_their_own() {
    world(|world| {
        let allocs: Vec<Running> =
            (0..4).map(|_| world.alloc(&["tiny:1", "--mem", "128", "-E", "sleep 600"])).collect();
        let ids: Vec<String> = allocs.iter().map(Running::id).collect();
        allocs.iter().for_each(|alloc| alloc.wait_for("vm0 runs\n"));
        let ports = ids.iter().map(|id| world.ok(&["status", "-j", id, "-o", "json"]));
        let port = |status: String| {
            let status: serde_json::Value = serde_json::from_str(&status).unwrap();
            status[0]["ports"][0]["host_port"].as_u64().unwrap()
        };
        let mut ports: Vec<u64> = ports.map(port).collect();
        let mut sorted = ids.clone();
        sorted.sort();
        assert_eq!(sorted, ["1", "2", "3", "4"]);
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 4);
        for (id, alloc) in ids.iter().zip(allocs) {
            world.ok(&["cancel", id]);
            assert_eq!(alloc.finish().code, Some(130));
        }
    });
}

#[test]
fn a_job_is_meant_by_its_name_its_id_or_because_there_is_no_other() {
    world(|world| {
        let first = world.idle(&["tiny:1", "-J", "red"]);
        world.ok(&["status"]);
        world.ok(&["status", "-J", "red"]);
        let nobody = world.pavo(&["status", "-J", "blue"]);
        assert_eq!(nobody.code, Some(4));
        assert!(nobody.stderr.contains("no valid match for name blue\n"), "{nobody}");

        let second = world.idle(&["tiny:1", "-J", "red"]);
        for args in [&["status"][..], &["status", "-J", "red"]] {
            let doubt = world.pavo(args);
            assert_eq!(doubt.code, Some(2), "{doubt}");
            assert!(doubt.stderr.contains("1 (`red`), 2 (`red`)"), "{doubt}");
        }
        let listed = world.ok(&["ps"]);
        let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split('\t').collect()).collect();
        assert_eq!(lines[0][..5], ["ID", "NAME", "USER", "CLUSTER", "VMS"]);
        assert_eq!(lines[2][..2], ["2", "red"]);
        let yaml = world.ok(&["ps", "-o", "yaml"]);
        assert!(yaml.starts_with("- id: 1\n  name: red\n"), "{yaml}");

        world.ok(&["cancel", "1"]);
        assert_eq!(first.finish().code, Some(130));
        let said = world.pavo(&["cancel"]);
        assert_eq!(said.stderr, "Waiting for job 2 to end…\nJob 2 has ended.\n");
        let output = second.finish();
        assert_eq!(output.code, Some(130));
        assert!(output.stderr.ends_with("error: cancelled\n"), "{output}");
    });
}

#[test]
fn waiting_has_an_end_and_says_who_was_waited_for() {
    world(|world| {
        let alloc = mortal(world);
        world.ok(&["wait", "--for", "running"]);
        let late = world.pavo(&["wait", "--for", "stopped", "--timeout", "1"]);
        assert_eq!(late.code, Some(5), "{late}");
        assert!(
            late.stderr.contains(" did not reach `stopped` within 1 s, it is `running`\n"),
            "{late}"
        );
        let waiting = world.start(world.pavo_command(&["wait", "--for", "stopped"]));
        waiting.wait_for("Waiting for vm0");
        world.ok(&["reset", "vm0"]);
        assert_eq!(waiting.finish().code, Some(0));
        assert_eq!(alloc.finish().code, Some(0));
    });
}

#[test]
fn a_machine_without_a_network_has_clusters_without_a_way_out() {
    prepared_world(|world| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.unwrap().success());
        let output = world.alloc(&["tiny:1", "--mem", "128", "-E", "exit 7"]).finish();
        assert_eq!(output.code, Some(7), "{output}");
        assert!(output.stderr.contains("the cluster has no way out"), "{output}");
    });
}
