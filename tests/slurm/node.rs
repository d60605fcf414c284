//! A compute host from `setup init` to `setup cleanup`, and after all that may kill a
//! cluster's processes there.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pavo_lab::{Host, Output, Snapshot};
use serde_json::Value;

use super::world::Site;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(90);

const NETWORKS: &str = "\
nat:
  type: ethernet
  settings:
    network-layer: L3
    dev-prefix: nat
    int-network: 10.200.0.0/16
    ext-network: 10.201.0.0/16
    reverse-nat: { vm-port: 22, min-host-port: 60222, max-host-port: 60999 }
";
const RESOURCES: &str = "default:\n  default: yes\n  networks: [nat]\n";

fn setup(host: &Host, words: &[&str]) -> Output {
    let argv = [&["pavo", "internal", "setup"], words].concat();
    host.run(None, &argv).unwrap()
}

#[track_caller]
fn done(host: &Host, words: &[&str]) -> Output {
    let output = setup(host, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    output
}

fn status(host: &Host) -> Value {
    serde_json::from_str(&done(host, &["status", "-o", "json"]).stdout).unwrap()
}

/// What pavo could have left; the rest is Slurm's, whose daemon was killed as well.
fn left(site: &Site, before: &Snapshot) -> String {
    let diff = before.diff(&site.lab.leaks("n1").unwrap());
    diff.lines().filter(|line| !line.contains("/slurm_")).map(|line| format!("{line}\n")).collect()
}

#[track_caller]
fn nothing_left(site: &Site, before: &Snapshot) {
    let start = Instant::now();
    while !left(site, before).is_empty() {
        assert!(start.elapsed() < PATIENCE, "{}", left(site, before));
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A cluster of one VM on n1 that runs until it is told to end.
struct Cluster<'s> {
    site: &'s Site,
    pavo: Child,
}

impl<'s> Cluster<'s> {
    fn start(site: &'s Site) -> Self {
        let home = site.lab.home("alice");
        for file in ["up", "go"] {
            let _ = std::fs::remove_file(home.join(file));
        }
        let script = "touch up; until test -e go; do sleep 0.1; done";
        let argv = ["pavo", "alloc", "-c1", "--wait", "running", "-E", script, "tiny:1"];
        let mut command = site.lab.login().command(Some("alice"), &argv).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let pavo = command.spawn().unwrap();
        let cluster = Self { site, pavo };
        until("a cluster that runs", || home.join("up").exists());
        cluster
    }

    /// A process on n1, as the host numbers it.
    fn process(&self, what: &str) -> u32 {
        let file = "cat /run/pavo/*.*/state.json";
        let state: Value = serde_json::from_str(&self.n1().sh(file).unwrap()).unwrap();
        state[what]["pid"].as_u64().unwrap().try_into().unwrap()
    }

    fn n1(&self) -> &Host {
        self.site.lab.host("n1")
    }

    fn kill(&self, processes: &[u32]) {
        let ids: Vec<String> = processes.iter().map(u32::to_string).collect();
        self.n1().sh(&format!("kill -9 {}", ids.join(" "))).unwrap();
    }

    fn end(mut self) {
        std::fs::write(self.site.lab.home("alice").join("go"), "").unwrap();
        self.pavo.wait().unwrap();
        let login = self.site.lab.login();
        let _ = login.run(Some("alice"), &["scancel", "--user", "alice"]).unwrap();
        until("an empty queue", || login.run(None, &["squeue", "-h"]).unwrap().stdout.is_empty());
    }
}

#[test]
fn a_host_is_after_cleanup_as_it_was_before_init() {
    let site = Site::up(1);
    site.write("networks.yaml", NETWORKS);
    site.write("resources.yaml", RESOURCES);
    let n1 = site.lab.host("n1");
    let forward = || n1.sh("cat /proc/sys/net/ipv4/ip_forward").unwrap();
    let look = || (site.lab.leaks("n1").unwrap(), forward());
    n1.sh("echo 0 >/proc/sys/net/ipv4/ip_forward").unwrap();
    let bare = look();
    let same = |what: &str, before: &(Snapshot, String)| {
        let now = look();
        assert_eq!(before.0.diff(&now.0), "", "{what}");
        assert_eq!(before.1, now.1, "{what}");
    };

    // Looking changes nothing.
    for words in [
        &["init", "--dry-run"][..],
        &["cleanup", "--dry-run"],
        &["sweep", "--dry-run"],
        &["status"],
    ] {
        done(n1, words);
        same(&words.join(" "), &bare);
    }
    let plan = done(n1, &["init", "--dry-run"]).stdout;
    assert!(plan.contains("node: create bridge `nat_xbr`\n"), "{plan}");
    assert!(plan.contains("ip_forward` = 1 (was 0)"), "{plan}");

    // A firewall of the site's, and frames on bridges that pass it.
    n1.sh("nft 'add table inet site; add chain inet site through { type filter hook forward priority 0; policy drop; }'
        echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null || true")
        .unwrap();
    let output = done(n1, &["init"]);
    let rule = "help: nft insert rule inet site through iifname '\"pv*\"' accept";
    assert!(output.stderr.contains("warning: nft chain `inet site through` drops"), "{output:?}");
    assert!(output.stderr.contains(rule), "{output:?}");
    n1.sh(rule.strip_prefix("help: ").unwrap()).unwrap();
    if n1.sh("test -e /proc/sys/net/bridge/bridge-nf-call-iptables").is_ok() {
        assert!(output.stderr.contains("bridge-nf-call-iptables=0"), "{output:?}");
    }
    n1.sh("nft delete table inet site; echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null || true").unwrap();
    assert_eq!(done(n1, &["init"]).stderr, "", "nothing to warn of any more");
    assert!(n1.sh("ip link show nat_xbr").unwrap().contains("UP"));
    assert_eq!(forward(), "1\n");
    let ready = look();
    done(n1, &["init"]);
    same("a second init", &ready);
    assert!(status(n1)["node"].to_string().contains("bridge `nat_xbr`"));

    // With a cluster, which a set-up that is only pretended leaves alone.
    let cluster = Cluster::start(&site);
    let busy = look();
    let ask = format!(
        "version=1\njob=999\nstep=0\nuid=2001\ngid=2001\nnode={}\nnode_id=0\nnodes=1\ntasks=2\n\
         local_tasks=0,1\nvm=default:2\nkeeper=1\n",
        n1.name()
    );
    let pretend = format!("printf '{ask}' | pavo internal setup create --dry-run");
    let plan = n1.sh(&pretend).unwrap();
    assert!(plan.contains("999: create bridge `pb999-0`\n"), "{plan}");
    // The cluster that runs has the first.
    assert!(plan.contains("999: create address 10.201.0.16/31 on `pv999-0`\n"), "{plan}");
    let json = n1.sh(&format!("{pretend} -o json")).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json[0]["owner"], &json[0]["action"]), (&"999".into(), &"create".into()));
    assert!(n1.sh(&pretend.replace("create", "delete")).unwrap().is_empty());

    let known = status(n1);
    let here = &known["clusters"][0];
    assert_eq!((&here["user"], &here["switch"]), (&"alice".into(), &"linux".into()), "{known}");
    assert_eq!((&here["keeper_alive"], &here["guard_alive"]), (&true.into(), &true.into()));
    assert_eq!(here["vms"], serde_json::json!([0]));
    assert_eq!(known["leftovers"], serde_json::json!([]));
    let job = here["job"].to_string();
    let refused = setup(n1, &["cleanup"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(refused.stderr.contains(&format!("scancel {job}")), "{refused:?}");
    let plan = done(n1, &["cleanup", "--dry-run"]).stdout;
    assert!(plan.contains(&format!("{job}: delete bridge `pb{job}-0`")), "{plan}");
    same("all of this", &busy);
    cluster.end();
    nothing_left(&site, &ready.0);
    assert_eq!(forward(), "1\n", "a job does not put back what is the host's");

    done(n1, &["cleanup"]);
    assert_eq!(left(&site, &bare.0), "");
    assert_eq!(forward(), bare.1);
    done(n1, &["cleanup"]);
    assert_eq!(left(&site, &bare.0), "", "a second time");

    // By force also under a cluster.
    done(n1, &["init"]);
    let cluster = Cluster::start(&site);
    done(n1, &["cleanup", "--force"]);
    cluster.end();
    nothing_left(&site, &bare.0);
    assert_eq!(forward(), bare.1);
}

#[test]
fn whatever_is_killed_nothing_stays() {
    let site = Site::up(1);
    let n1 = site.lab.host("n1");
    let sites = site.snapshot();
    let before = site.lab.leaks("n1").unwrap();

    // The step's process: the guard cleans.
    let cluster = Cluster::start(&site);
    cluster.kill(&[cluster.process("keeper")]);
    until("no cluster", || status(n1)["clusters"] == serde_json::json!([]));
    cluster.end();
    nothing_left(&site, &before);

    // The guard: the step's end cleans.
    let cluster = Cluster::start(&site);
    cluster.kill(&[cluster.process("guard")]);
    until("no guard", || status(n1)["clusters"][0]["guard_alive"] == false);
    cluster.end();
    nothing_left(&site, &before);

    // Both: the sweep cleans, and says before what it will do.
    let cluster = Cluster::start(&site);
    cluster.kill(&[cluster.process("guard"), cluster.process("keeper")]);
    cluster.end();
    assert!(!left(&site, &before).is_empty());
    let known = status(n1);
    assert_eq!(known["clusters"][0]["keeper_alive"], false, "{known}");
    assert!(known["leftovers"].to_string().contains("delete control groups"), "{known}");
    let told = done(n1, &["sweep", "--dry-run"]).stdout;
    assert!(!left(&site, &before).is_empty());
    done(n1, &["sweep"]);
    nothing_left(&site, &before);
    assert!(told.contains("delete bridge `pb"), "{told}");
    assert_eq!(done(n1, &["sweep", "--dry-run"]).stdout, "");
    drop(sites);
}
