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
    assert!(stderr.contains("`pavo node delete` makes room"), "{stderr}");
    fs::write(world.path("a.csv"), "name,nics/e/ip\nnode8,10.0.0.3\nnode9,10.0.0.8\n").unwrap();
    let stderr = world.refused("node import a.csv", 2);
    assert!(stderr.contains("line 2: `node8`: the address 10.0.0.3 is `node3`'s"), "{stderr}");
    assert!(!stderr.contains("makes room"), "{stderr}");
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

/// The older system's lines on networks, password records and interfaces.
#[test]
fn the_older_systems_other_lines_run() {
    let world = World::new();
    let line = "net create c920 subnet=10.0.0.0 netmask=255.0.0.0 gateway=10.0.0.103 \
        dhcpserver=10.4.40.22 dynamic_range=10.5.107.100-10.5.107.200 nameservers=10.0.0.103 \
        domain=cluster.com";
    assert_eq!(world.ok(line), "c920: ok\n\nSuccess: 1  Total: 1\n");
    assert_eq!(world.ok("net list"), "c920 (network)\n");
    assert_eq!(
        world.ok("net update c920 gateway= domain=pok.example"),
        "c920: updated\n\nSuccess: 1  Total: 1\n"
    );
    let rows: serde_json::Value =
        serde_json::from_str(&world.ok("net show c920 --fields gateway,dynamic_range")).unwrap();
    let attr = serde_json::json!({"dynamic_range": "10.5.107.100-10.5.107.200"});
    assert_eq!(rows, serde_json::json!([{"net": "c920", "attr": attr}]));
    let run = world.run("net delete c920,c921");
    assert_eq!(run.code, 1);
    let text = "c920: deleted\nc921: Could not be found.\n\nSuccess: 1  Total: 2\n";
    assert_eq!(run.stdout, text);

    world.ok("passwd create system username=root password=cluster-zq crypt_method=sha512");
    assert_eq!(world.ok("passwd list"), "system (passwd)\n");
    let text = world.ok("passwd show system");
    assert!(text.contains("sha512") && !text.contains("cluster-zq"), "{text}");
    assert_eq!(world.ok("passwd update system username=admin").lines().count(), 3);
    assert!(world.ok("passwd delete system").starts_with("system: deleted\n"));

    world.ok("node create node[0-1] mgt=ipmi");
    let line = "nic create mac=42:87:0a:05:65:0 node=node0 ip=12.0.0.1 uuid=153c7c44";
    assert!(world.ok(line).starts_with("node0/eth0: ok\n"));
    world.ok("nic create mac=43:87:0a:05:65:0 node=node0 name=ib0");
    world.ok("nic create mac=43:87:0a:05:65:1 node=node0");
    assert_eq!(
        world.ok("nic list"),
        "node0/eth0 (nic) 42:87:0a:05:65:00 (mac)\nnode0/eth1 (nic) 43:87:0a:05:65:01 (mac)\n\
         node0/ib0 (nic) 43:87:0a:05:65:00 (mac)\n"
    );
    let text = world.ok("nic show --mac 43-87-0A-05-65-00 --fields node");
    let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(rows, serde_json::json!([{"nic": "node0/ib0", "attr": {"node": "node0"}}]));
    assert!(world.ok("nic update node0/ib0 ip=13.0.0.1").starts_with("node0/ib0: updated\n"));
    assert_eq!(
        world.ok("nic list --mac 43:87:0a:05:65:00 --fields ip"),
        "NAME\tIP\nnode0/ib0\t13.0.0.1\n"
    );
    let run = world.run("nic delete node[0-2]/ib0");
    let text = "node0/ib0: deleted\nnode1/ib0: Could not be found.\nnode2/ib0: Could not be found.\n\
        \nSuccess: 1  Total: 3\n";
    assert_eq!((run.code, run.stdout.as_str()), (1, text));
    let run = world.run("nic create mac=44:87:0a:05:65:1 node=node0 name=eth1");
    assert_eq!(
        (run.code, run.stdout.lines().next()),
        (1, Some("node0/eth1: Error: duplicate name"))
    );
    let stderr = world.refused("nic create mac=42:87:0a:05:65:00 node=node1", 2);
    assert!(stderr.contains("the MAC address 42:87:0a:05:65:00 is `node0`'s, too"), "{stderr}");
    world.refused("nic create mac=1 ip=10.0.0.1", 2);
    world.refused("nic delete node0", 2);
    world.refused("nic show --mac 02:00:00:00:00:09", 4);
}

#[test]
fn nodes_inherit_and_lists_show_it() {
    let world = World::new();
    assert_eq!(world.run("group list").stdout, "");
    world.ok("passwd create bmc username=admin password=hunter2-zq");
    world.ok("profile create base netboot=pxe control/passwd=bmc");
    world.ok("group create rack[1-2] mgt=ipmi profiles=base");
    world.ok("node create n[1-4] arch=x86_64 groups=rack1");
    world.ok("node update n4 mgt=redfish groups=rack2,gpu");
    assert_eq!(world.ok("group list"), "gpu (group)\nrack1 (group)\nrack2 (group)\n");
    assert_eq!(
        world.ok("group list --fields members"),
        "NAME\tMEMBERS\ngpu\tn4\nrack1\tn[1-3]\nrack2\tn4\n"
    );
    assert_eq!(
        world.ok("node list --fields mgt,netboot,control/passwd n[3-4]"),
        "NAME\tMGT\tNETBOOT\tCONTROL/PASSWD\nn3\tipmi\tpxe\tbmc\nn4\tredfish\tpxe\tbmc\n"
    );
    assert_eq!(world.ok("node list --own --fields mgt n3"), "NAME\tMGT\nn3\t\n");
    let text = world.ok("node list -o ndjson --fields mgt mgt=ipmi");
    assert_eq!(text.lines().next(), Some(r#"{"mgt":"ipmi","name":"n1"}"#));
    assert_eq!(text.lines().count(), 3);
    assert_eq!(world.ok("node list -o yaml n1"), "- name: n1\n");
    // Nothing is changed by a look at what would be.
    let run = world.run("node update all mgt=kvm --dry-run");
    assert!(run.stdout.ends_with("\nSuccess: 4  Total: 4\n"));
    assert_eq!(run.stderr, "Dry run: nothing was changed.\n");
    assert!(world.refused("node list mgt=kvm", 2).contains("a set without any node"));
}

#[test]
fn secrets_leave_sealed_to_a_passphrase_and_come_back() {
    let world = World::new();
    fs::write(world.path("secret"), "hunter2-zq,\"{}\n").unwrap();
    fs::write(world.path("phrase"), "correct horse\n").unwrap();
    fs::write(world.path("wrong"), "wrong horse\n").unwrap();
    use std::os::unix::fs::PermissionsExt;
    let private = |name: &str, mode| {
        fs::set_permissions(world.path(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    let stderr = world.refused("node create n1 control/bmc_password=@secret", 5);
    assert!(stderr.contains("others may read it"), "{stderr}");
    ["secret", "phrase", "wrong"].iter().for_each(|name| private(name, 0o600));
    world.ok("node create n1 mgt=ipmi control/bmc_password=@secret");
    world.ok("node create n2 control/bmc_password=@@literal");
    for ending in ["json", "yaml"] {
        let file = format!("all.{ending}");
        world.ok(&format!("node export all --with-secrets --passphrase-file phrase -o {file}"));
        let text = fs::read_to_string(world.path(&file)).unwrap();
        assert!(text.contains("locked:15:") && !text.contains("hunter2"), "{text}");
        world.ok(&format!("node import {file} --passphrase-file phrase"));
        world.ok("node delete all");
        let stderr = world.refused(&format!("node import {file} --passphrase-file wrong"), 2);
        assert!(stderr.contains("the passphrase is another"), "{stderr}");
        let stderr = world.refused(&format!("node import {file}"), 2);
        assert!(stderr.contains("no terminal to ask"), "{stderr}");
        world.ok(&format!("node import {file} --passphrase-file phrase"));
    }
    let same = r#"{"nodes": [{"name": "n1", "mgt": "ipmi",
        "control_info": {"bmc_password": "hunter2-zq,\"{}"}}]}"#;
    fs::write(world.path("same.json"), same).unwrap();
    world.ok("node import same.json");
    world.refused("node export all --with-secrets --format csv", 2);
    let line = "node create n3 --control bmc_password=abc,hunter2-zq,bmc_username=x";
    assert!(world.ok(line).starts_with("n3: ok"));
    assert_eq!(world.show("n3")["control"]["bmc_username"], "x");
}
