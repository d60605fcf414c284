//! A lab with the plugin and the stand-in for pavo.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pavo_lab::{Host, Lab, Options, Output};

const STAND_IN: &str = "#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
ask=$(cat)
mkdir -p /run/stand-in
printf 'action=%s\\n%s\\n\\n' \"$3\" \"$ask\" >>/run/stand-in/asks
if [ \"$1 $2\" = 'internal setup' ] && [ -e \"/etc/pavo/$3\" ]; then . \"/etc/pavo/$3\"; fi
exit 0
";

/// One thing that pavo was asked: its keys, and `action`.
pub type Asked = BTreeMap<String, String>;

pub struct World {
    pub lab: Lab,
    _stand_in: tempfile::TempDir,
}

impl World {
    pub fn new(hosts: u8) -> Self {
        Self::with(hosts, &plugin(), &[])
    }

    pub fn with(hosts: u8, plugin: &Path, slurm: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pavo = dir.path().join("pavo");
        fs::write(&pavo, STAND_IN).unwrap();
        fs::set_permissions(&pavo, fs::Permissions::from_mode(0o755)).unwrap();
        let options = Options {
            hosts,
            plugin: Some(plugin.to_owned()),
            pavo: Some(pavo),
            slurm: slurm.iter().map(|&line| line.to_owned()).collect(),
            ..Options::default()
        };
        Self { lab: Lab::up(options).unwrap(), _stand_in: dir }
    }

    /// The shell lines with which pavo answers `create` or `delete` on all hosts.
    pub fn answer(&self, action: &str, lines: &str) {
        fs::write(self.lab.etc_pavo().join(action), lines).unwrap();
    }

    /// The plugin's words in plugstack.conf.
    pub fn plugstack(&self, words: &str) {
        let line = format!("required /usr/lib/pavo/spank_pavo.so {words}\n");
        fs::write(self.lab.etc().join("slurm/plugstack.conf"), line).unwrap();
    }

    /// Runs a shell line of alice's on the login host.
    pub fn alice(&self, line: &str) -> Output {
        self.lab.login().run(Some("alice"), &["bash", "-c", line]).unwrap()
    }

    /// The same, and it must succeed.
    #[track_caller]
    pub fn done(&self, line: &str) -> String {
        let output = self.alice(line);
        assert!(output.status.success(), "{line}: {}\n{}", output.stdout, output.stderr);
        output.stdout
    }

    /// What pavo was asked on a host so far.
    pub fn asked(&self, host: &str) -> Vec<Asked> {
        let path = self.lab.host(host).root().unwrap().join("run/stand-in/asks");
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = |line: &str| line.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        text.split_terminator("\n\n").map(|ask| ask.lines().filter_map(line).collect()).collect()
    }

    /// `create 7.0`, `delete 7.0`: what pavo was asked on a host, once the host is quiet.
    pub fn steps(&self, host: &str) -> Vec<String> {
        self.quiet(host);
        let asked = self.asked(host);
        asked.iter().map(|ask| format!("{} {}", ask["action"], ask["step"])).collect()
    }

    /// Forgets what was asked.
    pub fn forget(&self, host: &str) {
        self.quiet(host);
        let _ = fs::remove_file(self.lab.host(host).root().unwrap().join("run/stand-in/asks"));
    }

    /// Waits until no step is on the host.
    #[track_caller]
    pub fn quiet(&self, host: &str) {
        let host = self.lab.host(host);
        let stepd = |host: &Host| {
            host.processes().unwrap().iter().any(|process| process.name.starts_with("slurmstepd"))
        };
        until("the host is quiet", || !stepd(host));
    }
}

#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The plugin of this build.
pub fn plugin() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.with_file_name("libspank_pavo.so");
    assert!(path.exists(), "{} is not built", path.display());
    path
}

/// The lines that begin with `pavo: `.
pub fn told(output: &Output) -> Vec<&str> {
    output.stderr.lines().filter(|line| line.starts_with("pavo: ")).collect()
}
