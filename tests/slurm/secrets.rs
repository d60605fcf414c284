//! What others can learn of a cluster, and do with it: nothing.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::world::Site;

/// A cluster of alice's that stays until it is dropped.
struct Alices<'a> {
    site: &'a Site,
    child: Child,
}

impl<'a> Alices<'a> {
    fn start(site: &'a Site) -> Self {
        let argv = ["pavo", "alloc", "-c1", "-E", "sleep 600", "tiny:1"];
        let mut command = site.lab.login().command(Some("alice"), &argv).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let alices = Self { site, child: command.spawn().unwrap() };
        let start = Instant::now();
        while !site.run("alice", &["pavo", "status"]).stdout.contains("running") {
            assert!(start.elapsed() < Duration::from_secs(60), "alice's cluster does not run");
            std::thread::sleep(Duration::from_millis(200));
        }
        alices
    }
}

impl Drop for Alices<'_> {
    fn drop(&mut self) {
        let _ = self.site.run("alice", &["pavo", "cancel"]);
        let _ = self.child.wait();
    }
}

#[test]
fn another_user_learns_nothing_and_cannot_pass_for_alice() {
    let site = Site::up(1);
    let node = site.lab.host("n1");
    // So that bob is somebody for the store.
    let bobs = site.run("bob", &["pavo", "alloc", "-c1", "-E", "true", "tiny:1"]);
    assert!(bobs.status.success(), "{bobs:?}");
    let _alices = Alices::start(&site);

    assert_eq!(site.run("bob", &["pavo", "status", "-j", "2"]).status.code(), Some(4));
    assert_eq!(site.run("bob", &["pavo", "ps", "-o", "ndjson"]).stdout, "");
    assert!(site.run("bob", &["pavo", "ps", "-a"]).stdout.contains("alice"));

    let endpoint = &site.lab.store().unwrap().endpoints[0];
    let etcdctl = |words: &str| {
        let tls =
            "--cacert=/etc/pavo/ca.pem --cert=/etc/pavo/user.pem --key=/etc/pavo/user-key.pem";
        let login = "--user=pavo-user-bob:$(cat ~/.pavo/etcd-secret)";
        let line = format!("ETCDCTL_API=3 etcdctl --endpoints={endpoint} {tls} {login} {words}");
        site.run("bob", &["sh", "-c", &line])
    };
    let own = etcdctl("get --prefix /pavo/v1/job/bob/");
    assert!(own.status.success(), "{own:?}");
    for words in [
        "get --prefix /pavo/v1/job/alice/",
        "get --prefix /pavo/v1/host/alice/",
        "get --prefix /pavo/",
        "put /pavo/v1/job/alice/2/record x",
        "put /pavo/v1/host/bob/2/node/00000 x",
        "put /pavo/v1/pool/vni/0000065536 x",
        "user list",
    ] {
        let denied = etcdctl(words);
        assert!(denied.stderr.contains("permission denied"), "{words}: {denied:?}");
    }

    for file in [
        "/run/pavo/2.0/state.json",
        "/run/pavo/2.0/host.json",
        "/run/pavo/journal/2.json",
        "/home/alice/.pavo/etcd-secret",
    ] {
        let denied = node.run(Some("bob"), &["cat", file]).unwrap();
        assert!(denied.stderr.contains("Permission denied"), "{file}: {denied:?}");
    }
    let denied = node.run(Some("bob"), &["ls", "/var/lib/pavo/run/2.0"]).unwrap();
    assert!(denied.stderr.contains("Permission denied"), "{denied:?}");
}

#[test]
fn no_secret_is_in_a_command_line_an_environment_or_slurms_records() {
    let site = Site::up(1);
    let _alices = Alices::start(&site);
    let (login, node) = (site.lab.login(), site.lab.host("n1"));
    let secret = login.sh("cat /home/alice/.pavo/etcd-secret").unwrap();
    let key = login.sh("cat /tmp/pavo-1-*/identity.json").unwrap();
    let key = key.split("\"key\":\"").nth(1).unwrap().split('"').next().unwrap();
    let sealed = login
        .sh("cat /proc/[0-9]*/environ | tr '\\0' '\\n' | sed -n 's/^PAVO_SEALED=//p' | head -1")
        .unwrap();
    assert!(sealed.trim().len() > 40, "{sealed}");
    for host in [login, node] {
        let said =
            host.sh("cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'").unwrap();
        assert!(said.contains("alloc") || said.contains("task"), "{said}");
        assert!(!said.contains(secret.trim()), "the person's secret");
        assert!(!said.contains(key), "the cluster's key");
    }
    let records = login.sh("scontrol show job -dd; scontrol show step; squeue -o '%all'").unwrap();
    for text in [secret.trim(), key, sealed.trim()] {
        assert!(!records.contains(text), "{records}");
    }
    // What was sealed for alice does not make bob alice.
    let argv = ["env", &format!("PAVO_SEALED={}", sealed.trim()), "srun", "--vm=default:1", "true"];
    let refused = site.run("bob", &argv);
    assert!(!refused.status.success(), "{refused:?}");
    assert!(refused.stderr.contains("pavo: host"), "{refused:?}");
    assert!(refused.stderr.contains("seal"), "{refused:?}");
}
