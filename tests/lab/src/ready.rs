//! A site that is ready for pavo's people: configuration, images and store.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::{Lab, host};

/// Where the hosts see the site's images.
pub const IMAGES: &str = "/home/images";

impl Lab {
    /// Writes a file of the site's configuration.
    pub fn write_config(&self, name: &str, text: &str) -> Result<()> {
        let path = self.etc_pavo().join(name);
        let doing = || format!("writing {}", path.display());
        fs::write(&path, text).while_doing(doing)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).while_doing(doing)
    }

    /// Makes the site ready: it is [configured](Self::configure), and each compute host has
    /// what clusters need.
    pub fn ready(&self, examples: &Path, images: &Path) -> Result<()> {
        self.configure(examples, images)?;
        let init = |host: &host::Host| host.sh("pavo internal setup init").map(drop);
        crate::each(self.computes().collect(), init)
    }

    /// Copies `images`, a repository, to where everybody reads it, makes the configuration of
    /// pavo's examples in `examples` and this lab's Slurm and store, and prepares the store.
    pub fn configure(&self, examples: &Path, images: &Path) -> Result<()> {
        copy(images, &self.site.home().join("images"))?;
        let repos = format!("repos:\n  - name: site\n    path: {IMAGES}\n");
        self.write_config("repos.yaml", &repos)?;
        for file in ["networks.yaml", "resources.yaml"] {
            let text = fs::read_to_string(examples.join(file));
            self.write_config(file, &text.while_doing(|| format!("reading etc/{file}"))?)?;
        }
        self.write_config("batch.yaml", &self.batch_config()?)?;
        self.name_underlay()?;
        self.login().run(None, &["pavo", "internal", "setup", "store"])?.ok().map(drop)
    }

    /// Where the hosts have a network for tunnels, `NAME-u` is a host there.
    fn name_underlay(&self) -> Result<()> {
        let line = |host: &host::Host| Some(format!("{} {}-u\n", host.underlay()?, host.name()));
        let lines: String = self.computes().filter_map(line).collect();
        if lines.is_empty() {
            return Ok(());
        }
        let (hosts, networks) = (self.etc().join("hosts"), self.etc_pavo().join("networks.yaml"));
        fs::write(&hosts, fs::read_to_string(&hosts)? + &lines)?;
        let text = fs::read_to_string(networks)?;
        let suffixed = text.replace("    #host-if-suffix: -ib\n", "    host-if-suffix: -u\n");
        if suffixed == text {
            return Err(Error::new("etc/networks.yaml has no line for `host-if-suffix`"));
        }
        self.write_config("networks.yaml", &suffixed)
    }

    fn batch_config(&self) -> Result<String> {
        let store = self.store().ok_or_else(|| Error::new("pavo needs a store: --etcd"))?;
        let servers = store.endpoints.iter().map(|endpoint| {
            format!("\"{}\"", endpoint.strip_prefix("https://").unwrap_or(endpoint))
        });
        let servers = servers.collect::<Vec<_>>().join(", ");
        Ok(format!(
            "type: slurm\nsettings:\n  etcd-servers: [{servers}]\n  etcd-client-port: 2379\n  \
             etcd-protocol: https\n  etcd-ca-cert: /etc/pavo/ca.pem\n  etcd-auth-type: password\n"
        ))
    }
}

/// A repository below `dir` with the demo image `tiny`, which this `pavo` builds unless it is
/// there and not older than the program. Packages it needs are kept in `cache`.
pub fn build_tiny(pavo: &Path, dir: &Path, cache: &Path) -> Result<PathBuf> {
    let (images, done) = (dir.join("images"), dir.join("done"));
    let modified = |path: &Path| path.metadata().and_then(|data| data.modified());
    let doing = || format!("building the image tiny in {}", dir.display());
    if modified(&done).is_ok_and(|done| modified(pavo).is_ok_and(|built| done > built)) {
        return Ok(images);
    }
    // It may not be there.
    let _ = fs::remove_dir_all(dir);
    let site = dir.join("site");
    fs::create_dir_all(&site).while_doing(doing)?;
    let repos = format!("repos:\n  - name: site\n    path: {}\n", images.display());
    fs::write(dir.join("repos.yaml"), repos).while_doing(doing)?;
    let mut build = Command::new(pavo);
    build.args(["image", "build", "tiny", "tiny", "--cache"]).arg(cache);
    build.env("HOME", dir).env("PAVO_USER_CONF_DIR", dir).env("PAVO_SYSTEM_CONF_DIR", &site);
    let built = build.output().while_doing(doing)?;
    if !built.status.success() {
        return Err(Error::new(String::from_utf8_lossy(&built.stderr))).while_doing(doing);
    }
    fs::write(done, "").while_doing(doing)?;
    Ok(images)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let doing = || format!("copying {} to {}", from.display(), to.display());
    for command in [
        Command::new("cp").arg("-rT").arg(from).arg(to),
        Command::new("chmod").args(["-R", "a+rX"]).arg(to),
    ] {
        if !command.status().while_doing(doing)?.success() {
            return Err(Error::new("it failed")).while_doing(doing);
        }
    }
    Ok(())
}
