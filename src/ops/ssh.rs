//! ssh with nothing to set up: a key pair and host keys that live as long as the
//! cluster, and the client's configuration for them.
//!
//! Everything lies in the job's directory (0700), the private key 0600. Host keys
//! are known before the first connection, so they *are* checked.

use std::fmt::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, LineEnding, PrivateKey};

use super::restart::Known;
use crate::error::{Context, Error, Result};
use crate::host::file::write_atomically;
use crate::model::job::VmRecord;
use crate::model::vm::HostKey;

/// Makes a fresh ed25519 key.
///
/// # Errors
/// When the system has no randomness to give.
pub fn generate(comment: &str) -> Result<HostKey> {
    let mut key = PrivateKey::random(&mut OsRng, Algorithm::Ed25519)
        .while_doing(|| "making an ssh key".into())?;
    key.set_comment(comment);
    whole(&key)
}

fn whole(key: &PrivateKey) -> Result<HostKey> {
    let pair =
        key.key_data().ed25519().ok_or_else(|| Error::bug("a fresh ed25519 key is not one"))?;
    let private = key.to_openssh(LineEnding::LF).while_doing(|| "writing an ssh key".into())?;
    let public =
        key.public_key().to_openssh().while_doing(|| "writing an ssh public key".into())?;
    Ok(HostKey {
        seed: hex(pair.private.as_ref()),
        public: hex(pair.public.as_ref()),
        openssh_private: private.to_string(),
        openssh_public: public,
    })
}

/// The key that may log in to a job's VMs, and the VMs' host keys by rank: new ones, unless
/// the guests know theirs already.
pub fn keys(job: u32, vms: &[VmRecord], known: Option<&Known>) -> Result<(HostKey, Vec<HostKey>)> {
    if let Some(known) = known {
        return Ok((known.key.clone(), known.host_keys.clone()));
    }
    let key = generate(&format!("pavo job {job}"))?;
    let host_keys = vms.iter().map(|vm| generate(&format!("vm{}", vm.rank)));
    Ok((key, host_keys.collect::<Result<_>>()?))
}

/// The public halves of keys.
pub fn public(keys: &[HostKey]) -> Vec<String> {
    keys.iter().map(|key| key.openssh_public.clone()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A path as ssh_config(5) takes it between quotes: `%` begins a token there.
fn literal(path: &Path) -> String {
    path.display().to_string().replace('%', "%%")
}

/// The end of the configuration that `pavo ssh` uses: a name that is no VM's must not be
/// looked for on the site's network.
const NO_OTHER_HOST: &str = "Host *\n    ProxyCommand sh -c 'echo \"error: the cluster has no VM of \
    this name\" >&2; echo \"  help: see its VMs: pavo status\" >&2; exit 4'\n";

/// Where the ssh files of a job lie.
#[derive(Clone, Debug)]
pub struct SshFiles {
    dir: PathBuf,
}

impl SshFiles {
    pub fn of_job(dir: &Path) -> Self {
        Self { dir: dir.join("ssh") }
    }

    /// What `ssh -F` and `scp -F` take.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config")
    }

    fn key(&self) -> PathBuf {
        self.dir.join("id_ed25519")
    }

    fn known_hosts(&self) -> PathBuf {
        self.dir.join("known_hosts")
    }

    /// Writes key, known hosts and configuration. `known` are the guests' public keys, by
    /// rank.
    pub fn write(&self, key: &HostKey, vms: &[VmRecord], known: &[String]) -> Result<()> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .while_doing(|| format!("creating `{}`", self.dir.display()))?;
        write_atomically(&self.key(), key.openssh_private.as_bytes(), 0o600)?;
        let known: String =
            vms.iter().zip(known).map(|(vm, key)| format!("vm{} {key}\n", vm.rank)).collect();
        write_atomically(&self.known_hosts(), known.as_bytes(), 0o600)?;
        let config = self.client_config(vms) + NO_OTHER_HOST;
        write_atomically(&self.config(), config.as_bytes(), 0o600)
    }

    /// The key that logs in.
    ///
    /// # Errors
    /// When it is not there.
    pub fn read_key(&self) -> Result<HostKey> {
        let path = self.key();
        let doing = || format!("reading `{}`", path.display());
        let text = std::fs::read_to_string(&path).while_doing(doing)?;
        // What is quoted of it may be secret.
        let key = PrivateKey::from_openssh(&text).map_err(|_| Error::system("it is no ssh key"));
        whole(&key.while_doing(doing)?)
    }

    /// A `Host` block for each VM whose ssh port is published.
    pub fn client_config(&self, vms: &[VmRecord]) -> String {
        let mut text = String::new();
        for vm in vms {
            let Some(port) = vm.ports.iter().find(|port| port.vm_port == 22) else { continue };
            let _ = write!(
                text,
                "Host vm{rank}\n\
                 \x20   HostName {address}\n\
                 \x20   Port {host_port}\n\
                 \x20   User {user}\n\
                 \x20   HostKeyAlias vm{rank}\n\
                 \x20   IdentityFile \"{key}\"\n\
                 \x20   IdentitiesOnly yes\n\
                 \x20   UserKnownHostsFile \"{known}\"\n\
                 \x20   GlobalKnownHostsFile /dev/null\n\
                 \x20   StrictHostKeyChecking yes\n\
                 \x20   PreferredAuthentications publickey\n\
                 \x20   ProxyCommand none\n\
                 \x20   LogLevel ERROR\n",
                rank = vm.rank,
                address = port.host_address,
                host_port = port.host_port,
                user = vm.ssh_user,
                key = literal(&self.key()),
                known = literal(&self.known_hosts()),
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_complete_and_new_each_time() {
        let (a, b) = (generate("pavo").unwrap(), generate("pavo").unwrap());
        assert_ne!(a.seed, b.seed);
        assert_eq!((a.seed.len(), a.public.len()), (64, 64));
        assert!(a.openssh_public.starts_with("ssh-ed25519 AAAA"));
        let read = PrivateKey::from_openssh(&a.openssh_private).unwrap();
        assert_eq!(whole(&read).unwrap(), a);
        assert_eq!(read.public_key().to_openssh().unwrap(), a.openssh_public);
        assert!(!format!("{a:?}").contains(&a.seed), "a key is never printed");
    }

    #[test]
    fn ssh_reads_the_paths_that_are_meant() {
        let port = crate::model::job::PublishedPort {
            vm_port: 22,
            host_address: std::net::Ipv4Addr::LOCALHOST,
            host_port: 60_222,
        };
        let vm = VmRecord {
            rank: 0,
            template: "tiny".into(),
            image: None,
            cores: 1,
            memory_mib: 512,
            host: "here".into(),
            addresses: Vec::new(),
            ports: vec![port],
            ssh_user: "root".into(),
            drives: Vec::new(),
            control: None,
        };
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let odd = dir.path().join("100%h a");
        std::fs::create_dir(&odd).unwrap();
        let files = SshFiles::of_job(&odd);
        let key = generate("pavo").unwrap();
        let known = [key.openssh_public.clone()];
        files.write(&key, &[vm], &known).unwrap();
        let mut ssh = std::process::Command::new("ssh");
        let output = ssh.arg("-G").arg("-F").arg(files.config()).arg("vm0").output().unwrap();
        let read = String::from_utf8(output.stdout).unwrap();
        for line in ["hostname 127.0.0.1", "port 60222", "stricthostkeychecking true"] {
            assert!(read.lines().any(|said| said == line), "{line}: {read}");
        }
        // ssh shows some paths before it reads `%%` as `%`, and some after.
        let known = odd.join("ssh/known_hosts").display().to_string();
        assert!(read.replace("%%", "%").contains(&known), "{read}");
        let mut ssh = std::process::Command::new("ssh");
        let output = ssh.arg("-F").arg(files.config()).arg("vm7.invalid").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("error: the cluster has no VM of this name\n"), "{said}");
    }
}
