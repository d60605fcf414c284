//! The store of a site: prepared once by its administrator, and for each person at
//! their first job.
//!
//! | etcd user | logs in by | role | may |
//! |---|---|---|---|
//! | `root` | certificate with that name, or the password in a 0600 file | `root` | all |
//! | `pavo-node` | certificate with that name | `pavo-node` | write `pool/ counter/ host/`, read `meta/`, delete in `job/` and `drive/` |
//! | | | `root`, with [`Persons::MadeByNodes`] | all |
//! | `pavo-user-NAME` | the person's secret | `pavo-user-NAME` | write `job/NAME/ drive/NAME/`, read `host/NAME/ drive/ meta/` |
//!
//! | `pavo-daemon` | certificate with that name, or the password beside its state | `pavo-daemon` | write what the inventory is (`node/ op/ lock/ …`), read `meta/` |
//!
//! Each writes its own `fence/`, too.
//!
//! # Who makes the users of persons
//!
//! etcd has one right to manage users, the role `root`, which is all rights. So there is
//! a choice, and [`prepare`] can be run again with the other one:
//!
//! - [`Persons::MadeByNodes`]: the nodes have that role as well. The first host of a
//!   person's first job makes the user. Root on any node may then do everything in etcd,
//!   with the node's certificate; `root`'s own log-in is on no node.
//! - [`Persons::MadeByAdministrator`]: the nodes have their own role only, and cannot
//!   read what a person's jobs hold. Whoever has `root`'s log-in calls [`ensure_person`]
//!   for each person.
//!
//! # Safe to run again
//!
//! Every step makes only what is missing. Log-ins are asked for last, when all who will
//! need one exist and `root`'s password is kept: who is interrupted starts again.

use crate::error::{Context, Error, Result};
use crate::store::etcd::{Access, DAEMON, Etcd, Grant, Login, NODE, Right, person};
use crate::store::secret::Secret;
use crate::store::{adopt, check_schema, keys};

/// Who makes etcd's users for persons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persons {
    MadeByNodes,
    MadeByAdministrator,
}

/// What was done, a sentence each; nothing when all was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub done: Vec<String>,
}

impl Report {
    fn say(&mut self, was_done: bool, what: impl Into<String>) {
        if was_done {
            self.done.push(what.into());
        }
    }
}

/// Prepares the etcd of a site as `root`, whose log-in `access` is: a certificate with
/// that name; or the password that it has or shall have. With [`Login::None`] a password
/// is made, and handed to `keep` before it counts.
///
/// # Errors
/// When etcd has authentication, and `access` is not `root`'s log-in. When the
/// certificate turns out not to be: then etcd is left without authentication.
pub async fn prepare(
    access: &Access,
    persons: Persons,
    keep: impl FnOnce(&Secret) -> Result<()>,
) -> Result<Report> {
    let mut report = Report { done: Vec::new() };
    let open = Access { login: certificate_only(&access.login), ..access.clone() };
    let store = match Etcd::connect(&open).await {
        // With a log-in that counts already, or nobody's.
        Err(_) => Etcd::connect(access).await.map_err(needs_root)?,
        Ok(store) => store,
    };
    if store.has_authentication().await? {
        let store = Etcd::connect(access).await.map_err(needs_root)?;
        fill(&store, persons, &mut report).await.map_err(needs_root)?;
        return Ok(report);
    }
    let password = match &access.login {
        Login::Password { password, .. } => password.clone(),
        Login::Certificate { .. } | Login::None => Secret::random()?,
    };
    if let Login::None = access.login {
        keep(&password).while_doing(|| "keeping the password of etcd's `root`".into())?;
    }
    fill(&store, persons, &mut report).await?;
    let is_new = store.ensure_user("root", Some(&password), &["root"]).await?;
    // One of an earlier, interrupted attempt may have another.
    store.set_password("root", &password).await?;
    report.say(is_new, "made the user `root`");
    store.enable_authentication().await?;
    report.say(true, "enabled authentication");
    if let Login::Certificate { .. } = access.login {
        prove_certificate(access, &password).await?;
    }
    Ok(report)
}

/// The same log-in as far as etcd without authentication takes it.
fn certificate_only(login: &Login) -> Login {
    match login {
        Login::Certificate { .. } => login.clone(),
        Login::Password { .. } | Login::None => Login::None,
    }
}

fn needs_root(error: Error) -> Error {
    Err::<(), _>(error)
        .while_doing(|| "logging in to etcd as `root`, which has authentication already".into())
        .map_err(|error| error.help("name root's certificate, or the file with its password"))
        .expect_err("it was one")
}

/// Makes what the site needs, but for `root` itself.
async fn fill(store: &Etcd, persons: Persons, report: &mut Report) -> Result<()> {
    let marked = check_schema(store).await?;
    adopt(store).await?;
    report.say(!marked, "marked the store");
    report.say(store.ensure_role("root", &[]).await?, "made the role `root`");
    let made = store.ensure_role(NODE, &node_grants()).await?;
    report.say(made, format!("made the role `{NODE}`"));
    let made = store.ensure_user(NODE, None, &[NODE]).await?;
    report.say(made, format!("made the user `{NODE}`, for certificates with this name"));
    match persons {
        Persons::MadeByNodes => {
            let made = store.ensure_user(NODE, None, &["root"]).await?;
            report.say(made, "let nodes make the users of persons");
        }
        Persons::MadeByAdministrator => {
            let taken = store.revoke_role(NODE, "root").await?;
            report.say(taken, "no longer let nodes make the users of persons");
        }
    }
    Ok(())
}

fn node_grants() -> [Grant; 7] {
    [
        Grant::new(Right::ReadWrite, keys::pools()),
        Grant::new(Right::ReadWrite, keys::counters()),
        Grant::new(Right::ReadWrite, keys::all_hosts()),
        // To delete what a launcher that was killed leaves behind, without reading it.
        Grant::new(Right::Write, keys::all_jobs()),
        Grant::new(Right::Write, keys::all_drives()),
        Grant::new(Right::Read, keys::meta()),
        Grant::new(Right::ReadWrite, keys::fences(NODE)),
    ]
}

fn daemon_grants() -> Vec<Grant> {
    let all = keys::inventories().into_iter().map(|place| Grant::new(Right::ReadWrite, place));
    let more =
        [Grant::new(Right::Read, keys::meta()), Grant::new(Right::ReadWrite, keys::fences(DAEMON))];
    all.chain(more).collect()
}

fn person_grants(name: &str) -> [Grant; 6] {
    [
        // Which tells that a drive is in use, and not where it is.
        Grant::new(Right::Read, keys::all_drives()),
        Grant::new(Right::Read, keys::hosts(name)),
        Grant::new(Right::ReadWrite, keys::jobs(name)),
        Grant::new(Right::ReadWrite, keys::drives(name)),
        Grant::new(Right::Read, keys::meta()),
        Grant::new(Right::ReadWrite, keys::fences(&person(name))),
    ]
}

/// Makes sure that the certificate is `root`'s, or lets everybody in again: the
/// password of this moment is kept nowhere.
async fn prove_certificate(access: &Access, password: &Secret) -> Result<()> {
    let proof = async {
        let store = Etcd::connect(access).await?;
        store.ensure_role("root", &[]).await
    };
    let Err(error) = proof.await else { return Ok(()) };
    let login = Login::Password { user: "root".into(), password: password.clone() };
    let certificate = match &access.login {
        Login::Certificate { cert, key } => {
            Some(crate::store::etcd::Certificate { cert: cert.clone(), key: key.clone() })
        }
        _ => access.certificate.clone(),
    };
    let root = Etcd::connect(&Access { login, certificate, ..access.clone() }).await?;
    root.disable_authentication().await?;
    Err(error).while_doing(|| "logging in to etcd as `root` with the certificate".into()).map_err(
        |error| {
            error.help(
                "its common name has to be `root`, and etcd has to run with --client-cert-auth; \
                 etcd's authentication is off again",
            )
        },
    )
}

/// Lets the person log in with this secret, and read and write what is theirs. Says
/// whether anything had to be made. `store` is logged in as one who may manage users.
///
/// Rights first, the user last: whoever can log in has them.
pub async fn ensure_person(store: &Etcd, name: &str, secret: &Secret) -> Result<bool> {
    ensure_user(store, &person(name), &person_grants(name), Some(secret))
        .await
        .while_doing(|| format!("letting `{name}` use the store"))
}

/// Lets the daemon log in, with this secret or with a certificate. Says whether anything had to
/// be made. `store` is logged in as one who may manage users.
pub async fn ensure_daemon(store: &Etcd, secret: Option<&Secret>) -> Result<bool> {
    ensure_user(store, DAEMON, &daemon_grants(), secret)
        .await
        .while_doing(|| "letting the daemon use the store".into())
}

async fn ensure_user(
    store: &Etcd,
    user: &str,
    grants: &[Grant],
    secret: Option<&Secret>,
) -> Result<bool> {
    let mut changed = store.ensure_role(user, grants).await?;
    changed |= store.ensure_user(user, secret, &[user]).await?;
    if let Some(secret) = secret {
        if !store.accepts(user, secret).await? {
            store.set_password(user, secret).await?;
            changed = true;
        }
    }
    Ok(changed)
}

/// Takes the person's user and role away; their keys stay. Says whether they were there.
pub async fn remove_person(store: &Etcd, name: &str) -> Result<bool> {
    store.remove_user(&person(name)).await
}
