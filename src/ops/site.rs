//! How processes of a site reach its etcd: as a node, as a person, as its administrator.
//!
//! | who | logs in with |
//! |---|---|
//! | a node | `/etc/pavo/node/node.pem` and `node-key.pem` (0600), common name `pavo-node`; where they are missing, as pcocc, etcd's root and `/etc/pavo/etcd-password` (0600) |
//! | a person | `pavo-user-NAME` and the secret in `~/.pavo/etcd-secret`; with `/etc/pavo/user.pem` and `user-key.pem`, anybody's to read, where etcd has `--client-cert-auth` (as it must for certificates to be log-ins) |
//! | the daemon | `etcd.pem` and `etcd-key.pem` in its state, common name `pavo-daemon`, or `etcd-password` there |
//! | the administrator | `/etc/pavo/node/root.pem` and `root-key.pem` (0600), or `etcd-password` |

use std::path::Path;

use super::setup::SITE_DIR;
use crate::config;
use crate::error::{Context, Error, Result};
use crate::host::file::write_atomically;
use crate::store::etcd::{Access, Certificate, DAEMON, Login};
use crate::store::secret::Secret;

/// How the site's etcd is reached by who logs in so.
pub fn access(etcd: &config::Etcd, login: Login) -> Access {
    let endpoint = |server: &String| {
        let port = etcd.client_port;
        // A server may be named with a port of its own.
        match server.rsplit_once(':') {
            Some((_, digits)) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                format!("{}://{server}", etcd.protocol)
            }
            _ => format!("{}://{server}:{port}", etcd.protocol),
        }
    };
    // Where etcd lets in only who shows a certificate, people show one that is the site's.
    let site = Path::new(SITE_DIR);
    let (cert, key) = (site.join("user.pem"), site.join("user-key.pem"));
    let certificate = (cert.exists() && key.exists()).then_some(Certificate { cert, key });
    Access {
        endpoints: etcd.servers.iter().map(endpoint).collect(),
        ca: etcd.ca_cert.clone(),
        certificate,
        login,
    }
}

/// As one of the site's nodes. Root only.
pub fn as_node(etcd: &config::Etcd) -> Result<Access> {
    login(etcd, "node").map(|login| access(etcd, login))
}

/// As the administrator, who may have no log-in yet. Root only.
pub fn as_administrator_to_be(etcd: &config::Etcd) -> Access {
    access(etcd, login(etcd, "root").unwrap_or(Login::None))
}

/// As the daemon with this state: by `etcd.pem` and `etcd-key.pem` (0600) there, common name
/// `pavo-daemon`, or by that user's password in `etcd-password` (0600).
///
/// # Errors
/// When there is neither.
pub fn as_daemon(etcd: &config::Etcd, state: &Path) -> Result<Access> {
    if etcd.auth_type == "none" {
        return Ok(access(etcd, Login::None));
    }
    let (cert, key) = (state.join("etcd.pem"), state.join("etcd-key.pem"));
    if cert.exists() && key.exists() {
        return Ok(access(etcd, Login::Certificate { cert, key }));
    }
    let file = state.join("etcd-password");
    if file.exists() {
        let password = Secret::read(&file)?;
        return Ok(access(etcd, Login::Password { user: DAEMON.into(), password }));
    }
    Err(Error::system("the daemon has no way to log in to etcd").help(format!(
        "`pavo internal setup store` makes the user `{DAEMON}`: put a certificate with that name \
         into `{}` and its key (0600) beside it, or its password into `{}` (0600)",
        cert.display(),
        file.display()
    )))
}

/// The password of etcd's user for the daemon with this state; made at the first time.
///
/// # Errors
/// When it cannot be kept, or others may read it.
pub fn daemon_password(state: &Path) -> Result<Secret> {
    use std::os::unix::fs::MetadataExt;
    let file = state.join("etcd-password");
    let doing = || format!("making `{}`", file.display());
    if !file.try_exists().while_doing(doing)? {
        std::fs::create_dir_all(state).while_doing(doing)?;
        let line = format!("{}\n", Secret::random()?.expose());
        write_atomically(&file, line.as_bytes(), 0o600)?;
    }
    let secret = Secret::read(&file)?;
    // The daemon's, whose folder this is.
    let owner = std::fs::metadata(state).while_doing(doing)?;
    let (uid, gid) = (Some(owner.uid()), Some(owner.gid()));
    std::os::unix::fs::lchown(&file, uid, gid).while_doing(doing)?;
    Ok(secret)
}

/// As a person.
pub fn as_person(etcd: &config::Etcd, name: &str, secret: &Secret) -> Access {
    access(etcd, Login::person(name, secret))
}

/// Keeps the password of etcd's root where pcocc keeps it: in a file of root's.
pub fn keep_password(password: &Secret) -> Result<()> {
    let line = format!("{}\n", password.expose());
    write_atomically(&Path::new(SITE_DIR).join("etcd-password"), line.as_bytes(), 0o600)
}

fn login(etcd: &config::Etcd, who: &str) -> Result<Login> {
    if etcd.auth_type == "none" {
        return Ok(Login::None);
    }
    let site = Path::new(SITE_DIR);
    let own = site.join("node");
    let (cert, key) = (own.join(format!("{who}.pem")), own.join(format!("{who}-key.pem")));
    if cert.exists() && key.exists() {
        return Ok(Login::Certificate { cert, key });
    }
    let file = site.join("etcd-password");
    if file.exists() {
        let password = Secret::read(&file)?;
        return Ok(Login::Password { user: "root".into(), password });
    }
    Err(Error::system(format!("this host has no way to log in to etcd as `{who}`")).help(format!(
        "put a certificate into `{}` and its key (0600) beside it, or etcd's root password into \
         `{}` (0600)",
        cert.display(),
        file.display()
    )))
}
