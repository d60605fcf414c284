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
        Self::over(site, 1)
    }

    /// One with a VM on each of so many hosts.
    fn over(site: &'s Site, hosts: u8) -> Self {
        let home = site.lab.home("alice");
        for file in ["up", "go"] {
            let _ = std::fs::remove_file(home.join(file));
        }
        let script = "touch up; until test -e go; do sleep 0.1; done";
        let (count, vms) = (format!("-N{hosts}"), format!("tiny:{hosts}"));
        let argv = ["pavo", "alloc", "-c1", &count, "--wait", "running", "-E", script, &vms];
        let mut command = site.lab.login().command(Some("alice"), &argv).unwrap();
        let said = std::fs::File::create(home.join("said")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
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

    /// What pavo has said at the terminal.
    fn said(&self) -> String {
        std::fs::read_to_string(self.site.lab.home("alice").join("said")).unwrap()
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
    let disk = || n1.sh("find /var/lib/pavo 2>/dev/null || true").unwrap();
    let look = || (site.lab.leaks("n1").unwrap(), forward());
    n1.sh("echo 0 >/proc/sys/net/ipv4/ip_forward").unwrap();
    let (bare, bare_disk) = (look(), disk());
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
    // Who waits for another's lock does so while there is time to say for what.
    let create = "flock /run/pavo/lock pavo internal setup create";
    let told = n1.sh(&format!("printf '{ask}limit=2\n' | {create} || true")).unwrap();
    let why = "error: another process of pavo has held `/run/pavo/lock` for 1 s";
    assert!(told.contains(why), "{told}");

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
    assert_eq!(disk(), bare_disk);
}

#[test]
fn whatever_is_killed_nothing_stays() {
    let site = Site::up(1);
    let n1 = site.lab.host("n1");
    let sites = site.snapshot();
    let before = site.lab.leaks("n1").unwrap();

    // A responder, which runs as a user of its own and has no rights: the user is told.
    let cluster = Cluster::start(&site);
    let responder = "pgrep -f '^pavo internal responder'";
    let fields = n1.sh(&format!("cat /proc/$({responder} | head -1)/status")).unwrap();
    for field in ["Uid:\t60578\t60578\t60578\t60578", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(fields.contains(field), "{field}: {fields}");
    }
    assert!(fields.contains("CapEff:\t0000000000000000"), "{fields}");
    n1.sh(&format!("kill -9 $({responder})")).unwrap();
    let text = format!("the responder of network `nat` on {} has ended", n1.name());
    site.until("alice", "pavo status", &text);

    // The step's process: the guard cleans.
    cluster.kill(&[cluster.process("keeper")]);
    until("no cluster", || status(n1)["clusters"] == serde_json::json!([]));
    cluster.end();
    nothing_left(&site, &before);

    // The guard: the step's end cleans.
    let cluster = Cluster::start(&site);
    cluster.kill(&[cluster.process("guard")]);
    until("no guard", || status(n1)["clusters"][0]["guard_alive"] == false);
    // The user reads it, where the cluster was started and wherever they ask.
    let text = format!("the processes that answer the guests on {} have ended", n1.name());
    site.until("alice", "pavo status", &text);
    let said = site.sh("alice", "pavo ps; pavo ps -o ndjson");
    assert!(said.contains(&format!("\tvm0: {text}")), "{said}");
    assert!(said.contains(&format!("\"trouble\":\"vm0: {text}")), "{said}");
    let said = cluster.said();
    assert_eq!(said.matches(&text).count(), 1, "{said}");
    assert!(said.contains("help: was it killed"), "{said}");
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
    what_cannot_be_read_is_in_nobodys_way(&site, &before);
    drop(sites);
}

/// What is noted of a cluster is damaged while it runs, or after its death.
fn what_cannot_be_read_is_in_nobodys_way(site: &Site, before: &Snapshot) {
    let n1 = site.lab.host("n1");
    let damage = "echo '{\"ask\":{}' >$(echo /run/pavo/*.*/state.json)";

    // It lives: others go on, and it is removed at its end.
    let cluster = Cluster::start(site);
    let job = status(n1)["clusters"][0]["job"].to_string();
    n1.sh(damage).unwrap();
    let known = status(n1)["unreadable"].to_string();
    assert!(known.contains(&format!("step {job}.0 cannot be read")), "{known}");
    assert!(known.contains(&format!("scancel {job}")), "{known}");
    let swept = setup(n1, &["sweep"]);
    assert!(
        !swept.status.success() && swept.stderr.contains("state.json` is damaged"),
        "{swept:?}"
    );
    let refused = setup(n1, &["cleanup"]);
    assert!(refused.stderr.contains(&format!("scancel {job}")), "{refused:?}");
    let doctor = n1.run(None, &["pavo", "doctor"]).unwrap();
    assert!(doctor.stdout.contains("cannot be read"), "{doctor:?}");
    let ask = format!(
        "version=1\njob=999\nstep=0\nuid=2001\ngid=2001\nnode={}\nnode_id=0\nnodes=1\ntasks=1\n\
         local_tasks=0\nvm=default:1\nkeeper=1\n",
        n1.name()
    );
    let plan = n1.sh(&format!("printf '{ask}' | pavo internal setup create --dry-run")).unwrap();
    assert!(!plan.contains("address 10.201.0.0/31"), "its addresses are its own: {plan}");
    cluster.end();
    until("nothing that cannot be read", || status(n1)["unreadable"] == serde_json::json!([]));
    // Its keys in the store are looked for as after a boot.
    done(n1, &["sweep"]);
    nothing_left(site, before);

    // It is dead: the sweep cleans.
    let cluster = Cluster::start(site);
    let processes = [cluster.process("guard"), cluster.process("keeper")];
    n1.sh(damage).unwrap();
    cluster.kill(&processes);
    cluster.end();
    let known = status(n1);
    assert!(known["unreadable"].to_string().contains("`pavo internal setup sweep`"), "{known}");
    assert!(known["leftovers"].to_string().contains("delete bridge `pb"), "{known}");
    let told = done(n1, &["sweep"]).stderr;
    assert!(told.contains("is damaged"), "{told}");
    nothing_left(site, before);
    assert_eq!(status(n1)["unreadable"], serde_json::json!([]));
}

/// What the nodes have in the store.
fn stored(site: &Site) -> String {
    let list = |prefix| site.lab.etcdctl(&["get", "--prefix", "--keys-only", prefix]).unwrap();
    ["/pavo/v1/host/", "/pavo/v1/pool/"].map(list).concat().trim().to_owned()
}

fn put(site: &Site, key: &str, value: &Value) {
    site.lab.etcdctl(&["put", key, &value.to_string()]).unwrap();
}

#[test]
fn what_dead_jobs_and_hosts_have_in_the_store_is_taken_back() {
    let site = Site::up(2);
    let (n1, n2) = (site.lab.host("n1"), site.lab.host("n2"));
    drop(site.snapshot());
    let before = site.lab.leaks("n1").unwrap();
    let etcd = site.lab.stores().next().unwrap().service("etcd").unwrap();

    // etcd is away when a cluster ends: only its keys are left, and nobody's place is taken.
    let cluster = Cluster::over(&site, 2);
    let job = status(n1)["clusters"][0]["job"].to_string();
    etcd.stop().unwrap();
    cluster.end();
    until("only keys", || status(n1)["pending"] == serde_json::json!([format!("{job}.0")]));
    let known = status(n1);
    assert_eq!(known["clusters"], serde_json::json!([]), "{known}");
    let left = left(&site, &before);
    let is_known = |line: &str| line.contains(&format!("+ file /run/pavo/{job}.0"));
    assert!(left.lines().all(is_known), "{left}");
    let ask = format!(
        "version=1\njob=999\nstep=0\nuid=2001\ngid=2001\nnode={}\nnode_id=0\nnodes=1\ntasks=1\n\
         local_tasks=0\nvm=default:1\nkeeper=1\n",
        n1.name()
    );
    let plan = n1.sh(&format!("printf '{ask}' | pavo internal setup create --dry-run")).unwrap();
    assert!(plan.contains("address 10.201.0.0/31"), "{plan}");
    etcd.start().unwrap();
    assert!(stored(&site).contains(&format!("/alice/{job}/0/node/00000")), "{}", stored(&site));
    for host in [n1, n2] {
        done(host, &["sweep"]);
    }
    assert_eq!(stored(&site), "");
    nothing_left(&site, &before);

    // A host loses its power, and comes back with its disk.
    let cluster = Cluster::over(&site, 2);
    n2.kill().unwrap();
    n2.restart().unwrap();
    let disks = || n2.sh("ls /var/lib/pavo/run").unwrap();
    assert!(!disks().is_empty());
    done(n2, &["init"]);
    assert_eq!(disks(), "");
    assert!(!stored(&site).contains("node/00001"), "{}", stored(&site));
    cluster.end();
    until("no keys", || stored(&site).is_empty());
    nothing_left(&site, &before);

    // A host never comes back: the administrator frees what its jobs had.
    let record = |node: &str| serde_json::json!({ "node": node, "address": "192.0.2.9", "ranks": [0], "step": 0, "restart": 0 });
    for (number, job) in (65_536..).zip(["9001", "9002", "9003"]) {
        put(&site, &format!("/pavo/v1/pool/vni/{number:010}"), &job.into());
    }
    put(&site, "/pavo/v1/host/alice/9002/0/node/00000", &record("gone"));
    put(&site, "/pavo/v1/host/alice/9003/0/node/00000", &record(n1.name()));
    let all = stored(&site);
    let told = done(site.lab.login(), &["sweep", "--ids", "--dry-run"]).stderr;
    assert!(told.contains("Would free 1 VXLAN keys of job 9001"), "{told}");
    assert_eq!(stored(&site), all);
    let told = done(site.lab.login(), &["sweep", "--ids"]).stderr;
    assert!(told.contains("Freed 1 VXLAN keys of job 9002"), "{told}");
    assert!(told.contains(&format!("job 9003 is gone, but not for {}", n1.name())), "{told}");
    let left = stored(&site);
    let left: Vec<&str> = left.split_whitespace().collect();
    assert_eq!(left, ["/pavo/v1/host/alice/9003/0/node/00000", "/pavo/v1/pool/vni/0000065538"]);
}
