//! A site: a lab with pavo, its plugin and a configuration on every host.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pavo_lab::{Etcd, Lab, Options, Output};

use super::tiny::{repository, shared_images};

/// How long a command on the site may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

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
        let site = Self { lab };
        site.configure();
        site
    }

    fn configure(&self) {
        let images = self.lab.home("alice").parent().unwrap().join("images");
        copy(&shared_images(), &images);
        self.write("repos.yaml", &repository(Path::new("/home/images")));
        for file in ["networks.yaml", "resources.yaml"] {
            let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("etc").join(file);
            self.write(file, &fs::read_to_string(example).unwrap());
        }
        let store = self.lab.store().unwrap();
        let servers: Vec<&str> = store
            .endpoints
            .iter()
            .map(|endpoint| endpoint.strip_prefix("https://").unwrap())
            .collect();
        self.write(
            "batch.yaml",
            &format!(
                "type: slurm\nsettings:\n  etcd-servers: [{}]\n  etcd-client-port: 2379\n  \
                 etcd-protocol: https\n  etcd-ca-cert: /etc/pavo/ca.pem\n  \
                 etcd-auth-type: password\n",
                servers.iter().map(|server| format!("\"{server}\"")).collect::<Vec<_>>().join(", ")
            ),
        );
        let argv = ["pavo", "internal", "setup", "store"];
        let prepared = self.lab.login().run(None, &argv).unwrap();
        assert!(prepared.status.success(), "{prepared:?}");
    }

    /// Writes a file of the site's configuration.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.lab.etc_pavo().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }

    /// Runs a command on the login host.
    pub fn run(&self, user: &str, argv: &[&str]) -> Output {
        self.lab.login().run_within(PATIENCE, Some(user), argv).unwrap()
    }
}

/// The plugin, built beside this test.
fn plugin() -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_pavo")).parent().unwrap();
    let plugin = target.join("libspank_pavo.so");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--locked", "--package", "spank-pavo"]);
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(cargo.status().unwrap().success(), "building the plugin");
    assert!(plugin.exists(), "{}", plugin.display());
    plugin
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-rT").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
    let readable = Command::new("chmod").args(["-R", "a+rX"]).arg(to).status().unwrap();
    assert!(readable.success());
}
