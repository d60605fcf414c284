//! What befalls the daemon's etcd: it is full, it is slow, it asks who comes, others write to it.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pavo::ops::site_store::{Persons, prepare};
use pavo::store::etcd::{Access, Login};
use serde_json::Value;

use crate::leading::second;
use crate::server::{Cluster, Setup};
use crate::world::{PATIENCE, World};

/// etcd's own tool, with this on its standard input.
fn try_etcdctl(etcd: &Cluster, words: &[&str], input: &str) -> Output {
    let mut command = Command::new("etcdctl");
    command.arg("--endpoints").arg(etcd.endpoints().join(",")).args(words).env("ETCDCTL_API", "3");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the Debian package `etcd-client`");
    // It may have ended already.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

#[track_caller]
fn etcdctl(etcd: &Cluster, words: &[&str]) -> String {
    let output = try_etcdctl(etcd, words, "");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn compact(etcd: &Cluster) {
    let status = etcdctl(etcd, &["endpoint", "status", "-w", "json"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].as_u64().unwrap();
    etcdctl(etcd, &["compact", &revision.to_string()]);
}

/// Waits until the command says this.
#[track_caller]
fn until(world: &World, line: &str, says: &str) {
    let end = Instant::now() + PATIENCE;
    loop {
        let run = world.run(line);
        if run.stdout.contains(says) {
            return;
        }
        assert!(Instant::now() < end, "{line}: {}{}", run.stdout, run.stderr);
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_full_etcd_is_named_what_is_in_memory_is_read_and_with_room_all_goes_on() {
    let args = vec!["--quota-backend-bytes=4194304".into()];
    let etcd = Cluster::start(Setup { members: 1, args, tls: None });
    let world = World::with_etcd(&etcd.endpoints());
    let _daemon = world.active();
    world.ok("node create n[1-20] mgt=ipmi control/bmc_address=127.0.0.{n}");
    // Somebody else fills it.
    let much = "x".repeat(900_000);
    let is_full = |number| {
        let output = try_etcdctl(&etcd, &["put", &format!("/elsewhere/{number}")], &much);
        String::from_utf8_lossy(&output.stderr).contains("space exceeded")
    };
    assert!((0..20).any(is_full));
    for line in ["node create m1 arch=x86_64", "node update all arch=x86_64", "power n1 cycle"] {
        let error = world.refused(line, 5);
        for part in ["etcd is full", "NOSPACE", "help:", "etcdctl compact", "etcdctl alarm disarm"]
        {
            assert!(error.contains(part), "{line}: {part}: {error}");
        }
    }
    assert_eq!(world.ok("node list").lines().count(), 20);
    assert!(!world.ok("node show n1 -o json").contains("x86_64"));
    assert_eq!(world.ok("op list").lines().count(), 1);
    // One that begins now cannot say that it is there, and says why.
    let other = second(&world, &etcd);
    let mut late = other.start();
    late.says("etcd is full");
    assert!(other.refused("node list", 5).contains("etcdctl alarm disarm"));
    etcdctl(&etcd, &["del", "--prefix", "/elsewhere/"]);
    compact(&etcd);
    etcdctl(&etcd, &["defrag"]);
    etcdctl(&etcd, &["alarm", "disarm"]);
    world.ok("node create m1 arch=x86_64");
    assert_eq!(world.ok("nodeset count all").trim(), "21");
    late.says("waiting");
}

#[test]
fn a_slow_etcd_is_waited_for_and_one_that_is_silent_is_named() {
    let etcd = Cluster::start(Setup { members: 3, ..Setup::default() });
    let world = World::with_etcd(&etcd.endpoints());
    let _daemon = world.active();
    world.ok("node create n[1-3]");
    let all = |what: fn(&crate::server::Member)| etcd.members.iter().for_each(what);
    // One of three: nobody need wait long.
    etcd.members[0].pause();
    world.ok("node create n4");
    etcd.members[0].resume();
    // All, for a while.
    all(|member| member.pause());
    assert_eq!(world.ok("node list").lines().count(), 4);
    let create = world.command("node create n5").spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    all(|member| member.resume());
    assert!(create.wait_with_output().unwrap().status.success());
    // All, for longer than anybody waits.
    all(|member| member.pause());
    let error = world.refused("node create n6 arch=x86_64", 5);
    assert!(error.contains("etcd does not answer") && error.contains("endpoint status"), "{error}");
    all(|member| member.resume());
    // Whether it was made or not: the same command makes sure.
    until(&world, "node create n6 arch=x86_64", "n6: ok");
    assert_eq!(world.ok("nodeset count all").trim(), "6");
}

#[test]
fn what_others_write_is_seen_and_is_what_later_changes_begin_with() {
    let mut etcd = Cluster::single();
    let world = World::with_etcd(&etcd.endpoints());
    let mut daemon = world.active();
    world.ok("node create n[1-3] arch=x86_64");
    let record = etcdctl(&etcd, &["get", "--print-value-only", "/pavo/v1/node/n1"]);
    let other = record.trim().replace("x86_64", "aarch64");
    assert_ne!(record.trim(), other);
    etcdctl(&etcd, &["put", "/pavo/v1/node/n9", record.trim()]);
    until(&world, "node list", "n9");
    etcdctl(&etcd, &["del", "/pavo/v1/node/n2"]);
    until(&world, "nodeset count all", "3");
    etcdctl(&etcd, &["put", "/pavo/v1/node/n1", &other]);
    until(&world, "node show n1 -o json", "aarch64");
    daemon.says("others have changed the inventory");
    world.ok("node update all tags+=new");
    let stored = etcdctl(&etcd, &["get", "--print-value-only", "/pavo/v1/node/n1"]);
    assert!(stored.contains("aarch64") && stored.contains("new"), "{stored}");
    // What cannot be read is told, and can be deleted.
    etcdctl(&etcd, &["put", "/pavo/v1/group/odd", "{"]);
    until(&world, "group show odd -o json", "cannot be read");
    world.ok("group delete odd");

    // etcd goes and comes back, and has forgotten what was written meanwhile.
    daemon.signal(Signal::SIGSTOP);
    etcd.members[0].kill();
    etcd.run(0);
    let end = Instant::now() + PATIENCE;
    while !try_etcdctl(&etcd, &["put", "/pavo/v1/node/n7", record.trim()], "").status.success() {
        assert!(Instant::now() < end);
    }
    compact(&etcd);
    daemon.signal(Signal::SIGCONT);
    until(&world, "node list", "n7");
    // And it listens again.
    etcdctl(&etcd, &["put", "/pavo/v1/node/n8", record.trim()]);
    until(&world, "node list", "n8");
    world.ok("node update n8 tags+=last");
}

#[test]
fn an_etcd_that_asks_who_comes_lets_the_daemon_do_its_own_work_alone() {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "only root prepares a site");
        eprintln!("SKIPPED: only root prepares a site");
        return;
    }
    let etcd = Cluster::single();
    let world = World::with_etcd(&etcd.endpoints());
    let batch = fs::read_to_string(world.path("conf/batch.yaml")).unwrap();
    let batch = batch.replace("etcd-auth-type: none", "etcd-auth-type: password");
    fs::write(world.path("conf/batch.yaml"), batch).unwrap();
    let access =
        Access { endpoints: etcd.endpoints(), ca: None, certificate: None, login: Login::None };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let keep = |secret: &pavo::store::secret::Secret| {
        fs::write(world.path("conf/etcd-password"), secret.expose()).unwrap();
        Ok(())
    };
    runtime.block_on(prepare(&access, Persons::MadeByNodes, keep)).unwrap();
    // Before it is let in, the daemon says what it lacks.
    let mut daemon = world.start();
    daemon.says("no way to log in to etcd");
    // With an /etc/pavo of its own, which nobody else sees.
    let setup = || {
        let script = "mount -t tmpfs none /mnt && mkdir /mnt/up /mnt/work && \
            mount -t overlay none -o lowerdir=/etc,upperdir=/mnt/up,workdir=/mnt/work /etc && \
            rm -rf /etc/pavo && mkdir /etc/pavo && cp conf/* /etc/pavo/ && \
            chmod 600 /etc/pavo/etcd-password && exec \"$0\" internal setup daemon";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script]);
        command.arg(env!("CARGO_BIN_EXE_pavo")).current_dir(world.dir.path()).env_clear();
        let output = command.env("PATH", std::env::var_os("PATH").unwrap()).output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success(), "{said}");
        said
    };
    assert!(setup().contains("the daemon may use etcd"));
    assert!(setup().contains("everything was there already"));
    daemon.says(" active ");
    world.ok("node create n[1-200] arch=x86_64 control/bmc_password=hunter2");
    world.ok("node update all tags+=new");
    assert_eq!(world.ok("nodeset count tags=new").trim(), "200");
    assert!(world.ok("service list").contains("active"));
    let password = fs::read_to_string(world.path("state/etcd-password")).unwrap();
    let as_daemon = format!("--user=pavo-daemon:{}", password.trim());
    let may = |words: &[&str]| {
        let output = try_etcdctl(&etcd, &[&[as_daemon.as_str()], words].concat(), "");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || said.contains("permission denied"), "{words:?}: {said}");
        output.status.success()
    };
    for place in ["node/", "group/", "op/", "result/", "lock/", "svc/", "daemon/", "meta/"] {
        assert!(may(&["get", "--prefix", &format!("/pavo/v1/{place}")]), "{place}");
    }
    for place in ["", "job/", "host/", "drive/", "pool/", "counter/", "fence/", "fence/pavo-node/"]
    {
        assert!(!may(&["get", "--prefix", &format!("/pavo/v1/{place}")]), "{place}");
        assert!(!may(&["put", &format!("/pavo/v1/{place}x"), "x"]), "{place}");
    }
    assert!(!may(&["put", "/pavo/v1/meta/schema", "{}"]));
    assert!(!may(&["user", "list"]));
    // What others write is heard of with these rights, too.
    let stored = try_etcdctl(&etcd, &[&as_daemon, "del", "/pavo/v1/node/n7"], "");
    assert!(stored.status.success());
    until(&world, "nodeset count all", "199");
}
