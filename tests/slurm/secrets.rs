//! What others can learn of a cluster, and do with it: nothing.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64ct::{Base64, Encoding};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use pavo_lab::Host;

use super::world::Site;

/// All that passes the links of a host, as somebody sees who listens there.
struct Tap {
    stop: Arc<AtomicBool>,
    heard: JoinHandle<Vec<u8>>,
}

impl Tap {
    fn on(host: &Host) -> Self {
        let open = || {
            let (kind, all) = (SockType::Raw, SockProtocol::EthAll);
            Ok(socket(AddressFamily::Packet, kind, SockFlag::SOCK_CLOEXEC, all).unwrap())
        };
        let socket: OwnedFd = host.inside(open).unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let listen = move || {
            let (mut all, mut frame) = (Vec::new(), vec![0; 1 << 17]);
            loop {
                match recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                    Ok(count) => all.extend_from_slice(&frame[..count]),
                    Err(_) if stopped.load(Ordering::Relaxed) => return all,
                    Err(_) => {}
                }
            }
        };
        Self { stop, heard: std::thread::spawn(listen) }
    }

    fn heard(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        self.heard.join().unwrap()
    }
}

/// Which parts of `text`, each this long, are in `heard`.
fn parts<'a>(heard: &[u8], text: &'a [u8], length: usize) -> Vec<&'a [u8]> {
    let wanted: BTreeSet<&[u8]> = text.windows(length).collect();
    let found: BTreeSet<&[u8]> = heard.windows(length).filter(|at| wanted.contains(at)).collect();
    wanted.into_iter().filter(|part| found.contains(part)).collect()
}

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
    let taps = [Tap::on(site.lab.login()), Tap::on(site.lab.host("n1"))];
    let _alices = Alices::start(&site);
    let (login, node) = (site.lab.login(), site.lab.host("n1"));
    let secret = login.sh("cat /home/alice/.pavo/etcd-secret").unwrap();
    let identity = login.sh("cat /tmp/pavo-1-*/identity.json").unwrap();
    let key = identity.split("\"key\":\"").nth(1).unwrap().split('"').next().unwrap();
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
    // The only place on the node where the key is.
    let held = node.sh("stat -c '%a %U' /run/pavo/1.0/host.json").unwrap();
    assert_eq!(held, "400 alice\n");
    assert!(node.sh("cat /run/pavo/1.0/host.json").unwrap().contains(key));
    for tap in taps {
        nothing_secret(&tap.heard(), &identity, &[secret.trim(), key], sealed.trim());
    }
    sealed_for_alice_does_not_make_bob_alice(&site, sealed.trim());
}

fn nothing_secret(heard: &[u8], identity: &str, secrets: &[&str], sealed: &str) {
    let part = |text: &str| parts(heard, text.as_bytes(), 20).len();
    // The tap hears what srun sends: the letter, and the bootstrap.
    assert_eq!(part(sealed), sealed.len() - 19, "the letter is heard");
    let bootstrap = "{\"version\":1,\"addresses\":[\"";
    assert_eq!(part(bootstrap), bootstrap.len() - 19, "the bootstrap is heard");
    for secret in secrets {
        assert!(part(secret) == 0, "{} parts of a secret of {}", part(secret), secret.len());
    }
    // Nor is the key sent as bytes.
    let decoded: serde_json::Value = serde_json::from_str(identity).unwrap();
    let key = Base64::decode_vec(decoded["key"].as_str().unwrap()).unwrap();
    assert_eq!(parts(heard, &key, 16).len(), 0);
}

fn sealed_for_alice_does_not_make_bob_alice(site: &Site, sealed: &str) {
    let sealed = format!("PAVO_SEALED={sealed}");
    let argv = ["env", &sealed, "srun", "--vm=default:1", "true"];
    for (user, reason) in [
        ("bob", "the sealed secret of the job is of the user"),
        // Nor is what one job sealed of use in another.
        ("alice", "the sealed secret of the job is of the job 1, not of"),
    ] {
        let refused = site.run(user, &argv);
        assert!(!refused.status.success(), "{refused:?}");
        assert!(refused.stderr.contains("pavo: host"), "{refused:?}");
        assert!(refused.stderr.contains(reason), "{refused:?}");
        let held =
            site.lab.host("n1").sh("grep -l '\"identity\":{' /run/pavo/*/host.json").unwrap();
        assert_eq!(held, "/run/pavo/1.0/host.json\n", "only the first job's");
    }
}
