//! A site: a lab with pavo, its plugin and a configuration on every host.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pavo_lab::{Etcd, Lab, Options, Output, Snapshot};

use super::tiny::shared_images;

/// How long a command on the site may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long leaving may take after a command has ended.
const LEAK_PATIENCE: Duration = Duration::from_secs(60);

/// A site as it was.
pub struct Before {
    hosts: Vec<(String, Snapshot)>,
    keys: Vec<String>,
}

/// A site that is up.
pub struct Site {
    pub lab: Lab,
}

impl Site {
    pub fn up(hosts: u8) -> Self {
        Self::with(Options { hosts, ..Options::default() })
    }

    pub fn with(options: Options) -> Self {
        let options = Options {
            plugin: Some(plugin()),
            client_certs: true,
            pavo: Some(env!("CARGO_BIN_EXE_pavo").into()),
            etcd: match options.etcd {
                Etcd::None => Etcd::One,
                more => more,
            },
            ..options
        };
        let lab = Lab::up(options).unwrap();
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("etc");
        lab.configure(&examples, &shared_images()).unwrap();
        Self { lab }
    }

    /// Writes a file of the site's configuration.
    pub fn write(&self, name: &str, text: &str) {
        self.lab.write_config(name, text).unwrap();
    }

    /// What there is on all hosts, and in the store, that a job could leave.
    pub fn snapshot(&self) -> Before {
        for host in self.lab.computes() {
            host.sh("pavo internal setup init").unwrap();
        }
        let hosts = self.lab.hosts().iter().map(|host| host.name());
        let hosts = hosts.map(|name| (name.to_owned(), self.lab.leaks(name).unwrap())).collect();
        Before { hosts, keys: self.keys() }
    }

    /// The keys of jobs and ids in the store. Why hosts failed goes with its lease.
    fn keys(&self) -> Vec<String> {
        let list = |words: &[&str]| {
            let text = self.lab.etcdctl(&[&["get", "--prefix"], words].concat()).unwrap();
            let lines = text.lines().filter(|line| !line.is_empty()).map(str::to_owned);
            lines.collect::<Vec<String>>()
        };
        let keys = |prefix: &str| list(&["--keys-only", prefix]);
        let hosts = list(&["/pavo/v1/host/"]);
        let hosts = hosts.chunks(2).filter(|pair| !pair[1].contains("\"failure\":"));
        let hosts = hosts.map(|pair| pair[0].clone()).collect();
        [keys("/pavo/v1/job/"), hosts, keys("/pavo/v1/pool/")].concat()
    }

    /// Waits until everything is as it was.
    #[track_caller]
    pub fn nothing_left(&self, before: &Before) {
        self.as_before(before, LEAK_PATIENCE).unwrap_or_else(|left| panic!("{left}"));
    }

    /// Waits for that, and says what differs in the end.
    pub fn as_before(&self, before: &Before, patience: Duration) -> Result<(), String> {
        let start = Instant::now();
        let mut left = String::new();
        for (name, snapshot) in &before.hosts {
            let settled =
                self.lab.settled(name, snapshot, patience.saturating_sub(start.elapsed()));
            left.extend(settled.err().map(|left| left.to_string()));
        }
        loop {
            let keys = self.keys();
            if keys == before.keys {
                return if left.is_empty() { Ok(()) } else { Err(left) };
            }
            if start.elapsed() > patience {
                return Err(format!("{left}{:?} instead of {:?}", keys, before.keys));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Runs a command on the login host.
    pub fn run(&self, user: &str, argv: &[&str]) -> Output {
        self.on("login", user, argv)
    }

    /// Runs a command on a host.
    pub fn on(&self, host: &str, user: &str, argv: &[&str]) -> Output {
        self.lab.host(host).run_within(PATIENCE, Some(user), argv).unwrap()
    }

    /// Runs a shell script on the login host, which must succeed; what it prints.
    #[track_caller]
    pub fn sh(&self, user: &str, script: &str) -> String {
        let output = self.run(user, &["bash", "-c", script]);
        assert!(output.status.success(), "{script}: {output:?}");
        output.stdout
    }

    /// Asks with a shell script on the login host until the answer has `wanted` in it.
    #[track_caller]
    pub fn until(&self, user: &str, script: &str, wanted: &str) -> String {
        let start = Instant::now();
        loop {
            let output = self.run(user, &["bash", "-c", script]);
            if output.stdout.contains(wanted) {
                return output.stdout;
            }
            if start.elapsed() >= PATIENCE {
                let jobs = self.run(
                    user,
                    &["sh", "-c", "squeue -l; scontrol show jobs; cat job-* out* slurm-*"],
                );
                panic!("no `{wanted}` from {script}: {output:?}\n{}", jobs.stdout);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Submits a batch job, as the user types it after `pavo batch --parsable`; its number.
    #[track_caller]
    pub fn batch(&self, user: &str, words: &str) -> u32 {
        let said = self.sh(user, &format!("pavo batch --parsable -o job-%j {words}"));
        said.trim().parse().unwrap_or_else(|_| panic!("{said}"))
    }

    /// Waits until Slurm has ended a job.
    #[track_caller]
    pub fn ended(&self, job: u32) {
        let script = format!("squeue -h -j {job} -t all -o %T 2>&1");
        let start = Instant::now();
        loop {
            let said = self.sh("alice", &format!("{script} || true"));
            if !["PENDING", "RUNNING", "COMPLETING", "SUSPENDED"].contains(&said.trim()) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "job {job}: {said}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The plugin, built beside this test.
fn plugin() -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_pavo")).parent().unwrap();
    let plugin = target.join("libspank_pavo.so");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--locked", "--package", "spank-pavo"]);
    if target.ends_with("release") {
        // A bench.
        cargo.arg("--release");
    }
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(cargo.status().unwrap().success(), "building the plugin");
    assert!(plugin.exists(), "{}", plugin.display());
    plugin
}
