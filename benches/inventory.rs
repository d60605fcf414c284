//! The inventory at scale: whole commands, asking a daemon over a real etcd with its default
//! limits, beside what the older system's authors published for 10,000 nodes.
//!
//! ```text
//! cargo bench --bench inventory [-- COUNT …]      10000 and 100000 nodes otherwise
//! ```

#![allow(clippy::print_stdout, reason = "figures are what this is for")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[path = "../tests/etcd/server.rs"]
#[allow(dead_code, reason = "shared with tests/etcd")]
mod server;

/// How often each is done; the median counts.
const ROUNDS: usize = 3;

struct Site {
    dir: tempfile::TempDir,
    daemon: Child,
    _etcd: server::Cluster,
}

impl Site {
    fn new() -> Self {
        let etcd = server::Cluster::single();
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("conf");
        fs::create_dir(&conf).unwrap();
        let at = dir.path().display();
        fs::write(conf.join("daemon.yaml"), format!("socket: {at}/socket\nstate: {at}/state\n"))
            .unwrap();
        let member = etcd.endpoints()[0].trim_start_matches("http://").to_owned();
        let batch = format!(
            "type: local\nsettings:\n  etcd-servers: [\"{member}\"]\n  etcd-client-port: 1\n  \
             etcd-protocol: http\n  etcd-auth-type: none\n"
        );
        fs::write(conf.join("batch.yaml"), batch).unwrap();
        let mut command = pavo(dir.path(), &["daemon"]);
        let daemon = command.stderr(Stdio::null()).spawn().unwrap();
        let site = Self { dir, daemon, _etcd: etcd };
        let end = Instant::now() + Duration::from_secs(30);
        while !pavo(site.dir.path(), &["op", "list"]).output().unwrap().status.success() {
            assert!(Instant::now() < end, "the daemon does not begin");
        }
        site
    }

    /// How long a command takes, from its start to its end.
    fn time(&self, words: &[&str]) -> Duration {
        let begun = Instant::now();
        let output = pavo(self.dir.path(), words).output().unwrap();
        let took = begun.elapsed();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        took
    }

    /// The daemon's resident memory now and at its most, in MiB.
    fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon.id())).unwrap();
        let of = |key: &str| {
            let line = status.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
        };
        (of("VmRSS"), of("VmHWM"))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn pavo(dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
    command.args(words).current_dir(dir).env_clear().env("HOME", dir);
    command.env("PAVO_SYSTEM_CONF_DIR", dir.join("conf")).env("PAVO_STATE_DIR", dir.join("own"));
    command.stdin(Stdio::null());
    command
}

/// A file of nodes as the older system's own scale test makes them.
fn nodes(count: usize) -> String {
    let node = |n: usize| {
        let (a, b, c) = (n >> 16 & 255, n >> 8 & 255, n & 255);
        format!(
            r#"{{"name": "node{n}", "mgt": "ipmi", "arch": "ppc64le", "netboot": "petitboot", "nics_info": {{"nics": [{{"mac": "42:87:0a:{a:02x}:{b:02x}:{c:02x}", "ip": "10.{a}.{b}.{c}", "name": "eth0", "primary": true}}]}}, "control_info": {{"bmc_address": "11.{a}.{b}.{c}", "bmc_username": "admin", "bmc_password": "password"}}, "groups": ["rack{}"]}}"#,
            n / 100
        )
    };
    let all: Vec<String> = (1..=count).map(node).collect();
    format!("{{\"nodes\": [\n{}\n]}}\n", all.join(",\n"))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() {
    let counts: Vec<usize> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let counts = if counts.is_empty() { vec![10_000, 100_000] } else { counts };
    for count in counts {
        let site = Site::new();
        let file = site.dir.path().join("nodes.json");
        fs::write(&file, nodes(count)).unwrap();
        let file = file.to_str().unwrap();
        let last = format!("node{}", count - 9);
        let mut times: [Vec<Duration>; 6] = Default::default();
        let mut most = (0, 0);
        for _ in 0..ROUNDS {
            times[0].push(site.time(&["node", "import", file]));
            times[1].push(site.time(&["node", "show", &last]));
            times[2].push(site.time(&["node", "list", "@rack7"]));
            let words = ["node", "update", "all", "control/bmc_username=Admin", "arch=x86_64"];
            times[3].push(site.time(&words));
            times[4].push(site.time(&["node", "export", "all", "-o", "out.json"]));
            most = site.memory();
            times[5].push(site.time(&["node", "delete", "all"]));
        }
        let scale = count as f64 / 10_000.0;
        println!(
            "{count} nodes, whole commands, median of {ROUNDS}; published: xcat3, 10,000 nodes, scaled"
        );
        let whats = [
            ("import", Some(11.4)),
            ("show one", None),
            ("list a group of 100", None),
            ("update two settings of all", Some(8.3)),
            ("export", Some(4.2)),
            ("delete all", Some(3.3)),
        ];
        for ((what, published), times) in whats.into_iter().zip(times) {
            let took = median(times).as_secs_f64();
            let beside = published.map_or(String::new(), |published: f64| {
                let published = published * scale;
                format!("   {published:>7.1} s published: {:.3} x", took / published)
            });
            println!("{what:<28}{:>9.1} ms{beside}", took * 1000.0);
        }
        println!("the daemon's memory: {} MiB, {} at its most\n", most.0, most.1);
    }
}
