//! Guests that boot: the whole of what a user does with a cluster, once as an ordinary
//! user and once, briefly, as root.

use std::fs;
use std::process::Command;

use serde_json::Value;

use super::session::Terminal;
use super::world::{World, root_world, world};

/// A user that is neither root nor the one of the cluster.
const STRANGER: u32 = 12_345;

#[test]
fn two_guests_do_all_that_a_user_wants_of_them() {
    world(|world| {
        let alloc = world.alloc(&["tiny:2", "--mem", "128", "--wait", "ssh", "-E", "sleep 600"]);
        alloc.wait_for("vm[0-1] answer ssh\n");
        guests_are_listed(world);
        commands_run_in_guests(world);
        guests_know_each_other(world);
        files_are_copied(world);
        plain_ssh_works_and_checks_host_keys(world);
        a_stranger_sees_nothing(world);
        the_console_says_all_and_takes_input(world);
        a_reset_guest_comes_back(world);
        world.ok(&["cancel"]);
        let output = alloc.finish();
        assert_eq!(output.code, Some(130), "{output}");
    });
}

#[test]
fn root_has_a_cluster_in_the_hosts_network() {
    root_world(|world| {
        let script = "\"$PAVO\" ssh vm0 hostname";
        let output =
            world.alloc(&["tiny:1", "--mem", "128", "--wait", "ssh", "-E", script]).finish();
        assert_eq!(output.code, Some(0), "{output}");
        assert_eq!(output.stdout.trim(), "vm0");
    });
}

fn guests_are_listed(world: &World) {
    let status: Value = serde_json::from_str(&world.ok(&["status", "-o", "json"])).unwrap();
    for (rank, address) in [(0, "10.200.0.1"), (1, "10.200.0.2")] {
        assert_eq!(status[rank]["rank"], rank);
        assert_eq!(status[rank]["state"], "ssh");
        assert_eq!(status[rank]["addresses"][0], address);
    }
    world.ok(&["wait", "--for", "ssh"]);
    let jobs: Value = serde_json::from_str(&world.ok(&["ps", "-o", "json"])).unwrap();
    assert_eq!(jobs[0]["definition"], "tiny:2");
    assert_eq!(jobs[0]["vms"], 2);
}

fn commands_run_in_guests(world: &World) {
    assert_eq!(world.ok(&["ssh", "vm1", "hostname"]).trim(), "vm1");
    let failed = world.pavo(&["ssh", "vm0", "echo out; echo err >&2; exit 7"]);
    assert_eq!(failed.code, Some(7), "{failed}");
    assert_eq!((&*failed.stdout, &*failed.stderr), ("out\n", "err\n"));
    let input = world.write("input", "to the guest\n");
    let mut command = world.pavo_command(&["ssh", "vm0", "cat"]);
    command.stdin(fs::File::open(input).unwrap());
    assert_eq!(world.start_with_input(command).finish().stdout, "to the guest\n");
}

fn guests_know_each_other(world: &World) {
    let vm0 = |command: &str| world.ok(&["ssh", "vm0", command]);
    let domain = vm0("sed -n 's/^search //p' /etc/resolv.conf").trim().to_owned();
    assert!(!domain.is_empty(), "a search domain is given");
    vm0("ping -c 1 -W 2 vm1");
    vm0(&format!("ping -c 1 -W 2 vm1.{domain}"));
    let reverse = vm0("nslookup 10.200.0.2");
    assert!(reverse.contains(&format!("vm1.{domain}")), "{reverse}");
    let unknown = world.pavo(&["ssh", "vm0", &format!("nslookup vm9.{domain}")]);
    assert_ne!(unknown.code, Some(0), "{unknown}");
    assert!(unknown.stdout.contains("NXDOMAIN"), "{unknown}");
    let mtu = vm0("cat /sys/class/net/eth0/mtu");
    assert_eq!(mtu.trim(), "1500");
}

fn files_are_copied(world: &World) {
    let file = world.write("data", "some data\n");
    let there = file.to_str().unwrap();
    world.ok(&["scp", "-q", there, "vm1:/tmp/data"]);
    let back = world.path("home/back");
    world.ok(&["scp", "-q", "vm1:/tmp/data", back.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(back).unwrap(), "some data\n");
}

fn plain_ssh_works_and_checks_host_keys(world: &World) {
    let config = world.ok(&["ssh-config"]);
    let ssh = |config: &str| {
        let file = world.write("ssh-config", config);
        let mut command = world.command("ssh");
        command.arg("-F").arg(file).args(["vm0", "true"]);
        world.run(command)
    };
    let good = ssh(&config);
    assert_eq!(good.code, Some(0), "{good}");
    // Another key under the guest's name: that of vm1.
    let known = config.lines().find_map(|line| line.trim().strip_prefix("UserKnownHostsFile "));
    let known = fs::read_to_string(known.unwrap().trim_matches('"')).unwrap();
    let key = known.lines().find_map(|line| line.strip_prefix("vm1 ")).unwrap();
    let wrong = world.write("known", &format!("vm0 {key}\n"));
    let wrong = format!("    UserKnownHostsFile \"{}\"", wrong.display());
    let lines = config.lines();
    let changed = lines.map(|line| if line.contains("UserKnown") { &*wrong } else { line });
    let refused = ssh(&changed.collect::<Vec<_>>().join("\n"));
    assert_eq!(refused.code, Some(255), "{refused}");
    assert!(refused.stderr.contains("Host key verification failed"), "{refused}");
}

fn a_stranger_sees_nothing(world: &World) {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let job = world.job_dir();
    let stranger = |script: &str| {
        let mut command = Command::new("setpriv");
        let id = STRANGER.to_string();
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "sh", "-c", script]);
        command.env("DIR", &job).output().unwrap()
    };
    for path in ["", "/ssh/id_ed25519", "/vm0/control.sock", "/vm0/disk.qcow2", "/cell.log"] {
        let path = format!("{}{path}", job.display());
        assert!(fs::metadata(&path).is_ok(), "{path} exists");
        let tried = stranger(&format!("ls -d '{path}' && head -c 1 '{path}'"));
        assert!(!tried.status.success(), "{path}");
    }
    let store = world.path("home/state");
    let tried = stranger(&format!("cat '{}'/*", store.display()));
    assert!(!tried.status.success(), "the store is readable");
    let folder = world.path("stranger");
    fs::create_dir(&folder).unwrap();
    std::os::unix::fs::chown(&folder, Some(STRANGER), Some(STRANGER)).unwrap();
    let pavo = world.program().display();
    let listed = stranger(&format!(
        "HOME={0} PAVO_STATE_DIR={0}/state PAVO_TMPDIR={0} '{pavo}' ps -o ndjson",
        folder.display()
    ));
    assert!(listed.status.success() && listed.stdout.is_empty(), "{listed:?}");
}

fn the_console_says_all_and_takes_input(world: &World) {
    let log = world.ok(&["console", "-l", "vm1"]);
    // The demo image says nothing before.
    assert!(log.starts_with("tiny vm1 ready"), "from the first byte on: {log}");
    let mut console = Terminal::new(world, &["console", "vm1"]);
    console.wait_for("leave with three times Ctrl-C");
    console.type_in("\n");
    console.type_in("echo the sum is $((20+22))\n");
    console.wait_for("the sum is 42");
    console.type_in("\x03\x03\x03");
    assert!(console.ends_cooked(), "the terminal is as it was");
}

fn a_reset_guest_comes_back(world: &World) {
    let boots = || world.ok(&["console", "-l", "vm0"]).matches("tiny vm0 ready").count();
    assert_eq!(boots(), 1);
    let mark = "touch /tmp/mark; sync";
    world.ok(&["ssh", "vm0", mark]);
    world.ok(&["reset", "vm0"]);
    world.until("vm0 has booted again", || {
        let fresh = world.pavo(&["ssh", "-o", "ConnectTimeout=2", "vm0", "test ! -e /tmp/mark"]);
        fresh.code == Some(0)
    });
    assert_eq!(boots(), 2);
}
