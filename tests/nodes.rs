//! `pavo node`: an inventory on one machine, and the older system's command lines.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

struct World {
    dir: tempfile::TempDir,
}

struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
        command.args(line.split_whitespace()).env_clear().current_dir(self.dir.path());
        command.env("HOME", self.dir.path()).env("PAVO_STATE_DIR", self.dir.path().join("state"));
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, line: &str) -> Run {
        let output = self.command(line).output().unwrap();
        Run {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn ok(&self, line: &str) -> String {
        let run = self.run(line);
        assert_eq!(run.code, 0, "{line}: {}{}", run.stdout, run.stderr);
        run.stdout
    }

    fn refused(&self, line: &str, code: i32) -> String {
        let run = self.run(line);
        assert_eq!((run.code, run.stdout.as_str()), (code, ""), "{line}: {}", run.stderr);
        run.stderr
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn show(&self, node: &str) -> serde_json::Value {
        let text = self.ok(&format!("node show {node}"));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()[0]["attr"].clone()
    }
}

#[test]
fn the_older_systems_lines_run() {
    let world = World::new();
    let line = "node create --mgt ipmi --netboot pxe --arch x86_64 \
        --nic mac=43:87:0a:05:00:00,ip=12.0.0.1,name=eth0 \
        --nic mac=43:87:0a:05:00:01,ip=13.0.0.1,name=eth1 \
        --control bmc_address=11.0.0.0,bmc_password=password,bmc_username=admin node0";
    assert_eq!(world.ok(line), "node0: ok\n\nSuccess: 1  Total: 1\n");
    let line = "node create --mgt kvm --netboot pxe --arch ppc64le \
        --control bmc_password=password,bmc_username=admin node[1-25]";
    assert!(world.ok(line).ends_with("node25: ok\n\nSuccess: 25  Total: 25\n"));
    let line = "node update node2,node1 type=node control/bmc_password= mgt=ipmi";
    assert_eq!(world.ok(line), "node1: updated\nnode2: updated\n\nSuccess: 2  Total: 2\n");
    world.ok("node update node[1-16],node[17-24] control/bmc_password=passw0rd control/bmc_username=admin");
    assert_eq!(world.ok("node list").lines().count(), 26);
    assert_eq!(
        world.ok("node list node[1-2],node[4-5]"),
        "node1 (node)\nnode2 (node)\nnode4 (node)\nnode5 (node)\n"
    );
    assert_eq!(
        world.show("node0"),
        serde_json::json!({
            "arch": "x86_64", "mgt": "ipmi", "netboot": "pxe",
            "control": {"bmc_address": "11.0.0.0", "bmc_username": "admin"},
            "nics": {
                "eth0": {"mac": "43:87:0a:05:00:00", "ip": "12.0.0.1"},
                "eth1": {"mac": "43:87:0a:05:00:01", "ip": "13.0.0.1"},
            },
        })
    );
    let text = world.ok("node show node[1-2] --fields control,mgt");
    let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(rows[1]["node"], "node2");
    assert_eq!(
        rows[1]["attr"],
        serde_json::json!({"control": {"bmc_username": "admin"}, "mgt": "ipmi"})
    );
    world.ok("node export node[0-2] -o node.json");
    let run = world.run("node delete node[0-26]");
    assert_eq!(run.code, 1);
    assert!(
        run.stdout.contains("node25: deleted\nnode26: Could not be found.\n"),
        "{}",
        run.stdout
    );
    assert!(run.stdout.ends_with("\nSuccess: 26  Total: 27\n"));
    assert!(world.ok("node import node.json").ends_with("Success: 3  Total: 3\n"));
    assert_eq!(world.show("node0")["nics"]["eth1"]["ip"], "13.0.0.1");
    let run = world.run("node create node[2-3]");
    assert_eq!(run.stdout, "node2: Error: duplicate name\nnode3: ok\n\nSuccess: 1  Total: 2\n");
    assert_eq!(run.code, 1);
}

#[test]
fn what_cannot_be_changes_nothing() {
    let world = World::new();
    assert!(world.refused("node list all", 4).contains("there is no inventory of nodes"));
    world.ok("node create node[1-3] nics/eth0/ip=10.0.0.{n} groups=rack1");
    let stderr = world.refused("node create node[4-5] nics/eth0/ip=10.0.0.{n-3}", 2);
    assert!(stderr.contains("node4: the address 10.0.0.1 is `node1`'s, too"), "{stderr}");
    assert!(stderr.contains("node5: the address 10.0.0.2 is `node2`'s, too"), "{stderr}");
    let stderr = world.refused("node update all nics/eth0/mac=42:00:00:00:00:01", 2);
    assert!(stderr.contains("nothing was changed"), "{stderr}");
    world.refused("node update node[1-3] nics/eth0/ip=10.0.0.{n*200}", 2);
    assert!(world.refused("node update all arhc=x", 2).contains("did you mean `arch`?"));
    assert!(world.refused("node delete all!@rack1", 2).contains("a set without any node"));
    fs::write(world.path("a.csv"), "name,arch\nnode1,x86_64\nnode9,a b\n").unwrap();
    let stderr = world.refused("node import a.csv", 2);
    assert!(stderr.contains("line 3: `node9`: arch: `a b` is not a name"), "{stderr}");
    fs::write(world.path("a.csv"), "name,nics/e/ip\nnode8,10.0.0.3\nnode1,10.0.0.9\n").unwrap();
    let stderr = world.refused("node import a.csv", 2);
    assert!(stderr.contains("line 3: `node1` is there already, and differs"), "{stderr}");
    fs::write(world.path("a.csv"), "name,nics/e/ip\nnode8,10.0.0.3\nnode9,10.0.0.8\n").unwrap();
    let stderr = world.refused("node import a.csv", 2);
    assert!(stderr.contains("line 2: `node8`: the address 10.0.0.3 is `node3`'s"), "{stderr}");
    assert_eq!(world.ok("node list").lines().count(), 3);
    assert_eq!(world.show("node1")["nics"]["eth0"]["ip"], "10.0.0.1");
    // A set knows the inventory everywhere.
    assert_eq!(world.ok("nodeset fold @rack1!node2"), "node[1,3]\n");
    assert_eq!(world.ok("nodeset fold nics/eth0/ip=10.0.0.2"), "node2\n");
    assert_eq!(world.ok("nodeset fold ~[23]$"), "node[2-3]\n");
}

#[test]
fn secrets_are_in_no_file_and_on_no_screen() {
    let world = World::new();
    world.ok("node create n1 control/bmc_password=hunter2-zq");
    let json = r#"{"nodes": [{"name": "n2", "control_info": {"bmc_password": "hunter2-zq"}}]}"#;
    fs::write(world.path("n.json"), json).unwrap();
    world.ok("node import n.json");
    // The same file again is the same nodes.
    world.ok("node import n.json");
    fs::write(world.path("n.json"), json.replace("zq", "other")).unwrap();
    assert!(!world.refused("node import n.json", 2).contains("hunter2"));
    for line in
        ["node show all", "node export all", "node export all --format csv", "node list -o json"]
    {
        let text = world.ok(line);
        assert!(!text.contains("hunter2") && !text.contains("sealed"), "{line}: {text}");
    }
    for entry in fs::read_dir(world.path("state")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        assert!(!bytes.windows(7).any(|it| it == b"hunter2"), "{}", path.display());
    }
}

/// The older system's generator of nodes, in its form.
fn generated(count: usize, file: &Path) {
    let mut text = "{\"nodes\": [".to_owned();
    for n in 0..count {
        let (a, b) = (n / 256, n % 256);
        let comma = if n == 0 { "" } else { "," };
        text += &format!(
            r#"{comma}{{"name": "node{n}", "mgt": "ipmi", "arch": "x86_64", "control_info": {{"bmc_address": "11.0.{a}.{b}", "bmc_username": "admin"}}, "nics_info": {{"nics": [{{"mac": "42:87:0a:05:{a:02x}:{b:02x}", "ip": "12.0.{a}.{b}", "name": "eth0", "primary": true}}, {{"mac": "43:87:0a:05:{a:02x}:{b:02x}", "ip": "13.0.{a}.{b}", "name": "eth1"}}]}}}}"#
        );
    }
    fs::write(file, text + "]}").unwrap();
}

#[test]
fn every_format_gives_the_nodes_back() {
    let world = World::new();
    generated(600, &world.path("data.json"));
    let begun = Instant::now();
    world.ok("node import data.json");
    world.ok("node update node[0-9] groups=rack1");
    let all = world.ok("node export all");
    for ending in ["json", "yaml", "csv"] {
        world.ok(&format!("node export all -o all.{ending}"));
        world.ok("node delete all");
        world.ok(&format!("node import all.{ending}"));
        assert_eq!(world.ok("node export all"), all, "{ending}");
    }
    let groups = world.ok("node export all --format groups");
    assert_eq!(groups, "rack1: node[0-9]\n");
    world.ok("node update all groups=");
    fs::write(world.path("all.groups"), groups).unwrap();
    world.ok("node import all.groups");
    assert_eq!(world.ok("node export all"), all);
    assert!(begun.elapsed().as_secs() < 120);
}

#[test]
fn two_writers_at_once_lose_nothing() {
    let world = World::new();
    world.ok("node create seed");
    let start = |n: usize| {
        let line =
            format!("node create n[{}-{}] nics/e/ip=10.{n}.0.{{n%200}}", n * 200, n * 200 + 199);
        world.command(&line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..4).map(start).collect();
    let mut done = 0;
    for (n, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        match output.status.code() {
            Some(0) => done += 1,
            _ => {
                assert!(stderr.contains("somebody else has changed it"), "{n}: {stderr}");
                // What it has written stays written: the rest follows.
                let first = n * 200;
                world.run(&format!(
                    "node create n[{first}-{}] nics/e/ip=10.{n}.0.{{n%200}}",
                    first + 199
                ));
            }
        }
    }
    assert!(done >= 1);
    assert_eq!(world.ok("node list").lines().count(), 801);
}
