//! The store of a site: etcd v3 (3.4 and later), with several members behind it.
//!
//! [`link`] keeps the connection: it picks a member, moves to another, logs in again.
//! [`commit`] makes changes exactly once although answers get lost, [`watch`] follows a
//! prefix over reconnections, [`admin`] manages users and roles, [`explain`] turns
//! etcd's errors into ours.
//!
//! # What may be repeated
//!
//! An answer that is lost says nothing about the request. Reads are repeated on another
//! member. A commit that is sure to change something carries a *fence*: a key that this
//! handle writes with it, with a mark of its own, and whose last revision it checks. So
//! no attempt is done after a later one, whenever it arrives, and the fence's history
//! tells whether a lost one was done. What has no fence (deletions of what may not
//! exist, commits of the very largest size) is repeated too; if a check then fails, the
//! error says that the outcome is unknown.
//!
//! # Time
//!
//! Leases count in whole seconds from 2 on. etcd removes a lease up to a second late,
//! and a new leader lets every lease begin anew: an entry may outlive its lease, never
//! the other way round.
//!
//! # What the site's administrator does
//!
//! `pavo internal setup store` prepares an empty etcd (`ops::site_store`). History
//! grows until it is compacted: run etcd with `--auto-compaction-mode=periodic
//! --auto-compaction-retention=1h`, and with `--bcrypt-cost=4`, because all passwords
//! are random and each log-in costs 60–150 ms otherwise. With `--client-cert-auth`
//! *every* client shows a certificate: see [`Access::certificate`].

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, KeyValue, LeaseGrantOptions};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::secret::Secret;
use super::{
    Change, Check, Commit, Entry, LeaseId, MAX_PAGE, Page, Revision, Store, Watch, keys, validate,
    validate_prefix,
};
use crate::error::{Context, Result};
use commit::Fence;
use link::Link;

mod admin;
mod commit;
mod explain;
mod link;
mod watch;

pub use admin::{Grant, Right};

/// The largest answer that is taken; a page that is larger is read in parts. Reading
/// back all that one commit checks stays below.
const MAX_ANSWER: usize = 256 << 20;

/// The largest page.
const MAX_PAGE_BYTES: usize = 32 << 20;

/// The longest life of a lease that etcd grants, in seconds.
const MAX_TTL: i64 = 9_000_000_000;

/// The etcd user, and the role, of the nodes: the common name of their certificate.
pub const NODE: &str = "pavo-node";

/// The etcd user, and the role, of the daemon that keeps the machines below.
pub const DAEMON: &str = "pavo-daemon";

/// How to reach etcd.
#[derive(Clone, Debug)]
pub struct Access {
    /// `https://host:port` each; `http://` only where nothing secret is sent, or on
    /// this machine.
    pub endpoints: Vec<String>,
    /// PEM file of the authority that signed the members' certificates.
    pub ca: Option<PathBuf>,
    /// What to show to members that accept no client without a certificate
    /// (`--client-cert-auth`), when the log-in is by password. Its name need not be a
    /// user of etcd: one for all of the site will do, readable by everybody.
    pub certificate: Option<Certificate>,
    pub login: Login,
}

/// A certificate and its key: PEM files.
#[derive(Clone, Debug)]
pub struct Certificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Who we are for etcd.
#[derive(Clone, Debug)]
pub enum Login {
    /// The common name of the certificate is the user.
    Certificate {
        cert: PathBuf,
        key: PathBuf,
    },
    Password {
        user: String,
        password: Secret,
    },
    /// Nobody: for an etcd without authentication.
    None,
}

impl Login {
    /// The log-in of a person, as [`person`] names it.
    pub fn person(name: &str, secret: &Secret) -> Self {
        Self::Password { user: person(name), password: secret.clone() }
    }
}

/// The etcd user, and the role, of a person. The prefix keeps a person who is called
/// `root` or `node` from being etcd's `root` or our nodes.
pub fn person(name: &str) -> String {
    format!("pavo-user-{name}")
}

/// A handle of a site's store. Clones share its connection. It belongs to the runtime
/// that made it.
#[derive(Clone)]
pub struct Etcd(Arc<Link>);

impl Etcd {
    /// Connects to the member that answers first, and logs in.
    ///
    /// # Errors
    /// When no member answers: names each with its reason. When etcd refuses the log-in.
    pub async fn connect(access: &Access) -> Result<Self> {
        let link = Link::open(access)?;
        Fence::read(&link).await.while_doing(|| "connecting to etcd".into())?;
        Ok(Self(Arc::new(link)))
    }

    /// The endpoint of the member in use; `None` while none answers.
    pub fn member(&self) -> Option<String> {
        self.0.current().map(|member| member.endpoint)
    }
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Etcd").field(&self.0.endpoints()).finish()
    }
}

impl Store for Etcd {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
        let get = async move {
            let request = |client: etcd_client::Client| async move {
                client.kv_client().get(key, None).await
            };
            let answer = self.0.call(request).await.while_doing(|| format!("reading `{key}`"))?;
            Ok(answer.kvs().first().map(entry))
        };
        get.boxed()
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page>> {
        let list = async move {
            validate_prefix(prefix)?;
            let start = format!("{}\0", after.unwrap_or(prefix).max(prefix));
            self.page(&start, &end(prefix), limit.clamp(1, MAX_PAGE))
                .await
                .while_doing(|| format!("listing `{prefix}`"))
        };
        list.boxed()
    }

    fn commit<'a>(
        &'a self,
        checks: &'a [Check],
        changes: &'a [Change],
    ) -> BoxFuture<'a, Result<Commit>> {
        let commit = async move {
            validate(checks, changes)?;
            commit::commit(&self.0, checks, changes)
                .await
                .while_doing(|| "changing the store".into())
        };
        commit.boxed()
    }

    fn watch<'a>(&'a self, prefix: &'a str, after: Revision) -> BoxFuture<'a, Result<Watch>> {
        let watch = async move {
            validate_prefix(prefix)?;
            watch::start(self.0.clone(), prefix, after)
                .await
                .while_doing(|| format!("watching `{prefix}`"))
        };
        watch.boxed()
    }

    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<LeaseId>> {
        let lease = async move {
            let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
            let seconds = i64::try_from(seconds).map_or(MAX_TTL, |s| s.clamp(1, MAX_TTL));
            // The id is ours, so that a second attempt does not make a second lease.
            let id = i64::try_from(commit::random() >> 1).map_or(1, |id| id.max(1));
            let request = |client: etcd_client::Client| async move {
                let options = LeaseGrantOptions::new().with_id(id);
                match client.lease_client().grant(seconds, Some(options)).await {
                    Err(error) if explain::says(&error, "lease already exists") => Ok(()),
                    outcome => outcome.map(drop),
                }
            };
            self.0.call(request).await.while_doing(|| "taking a lease".into())?;
            Ok(LeaseId(id))
        };
        lease.boxed()
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<bool>> {
        let keep = async move {
            let request = |client: etcd_client::Client| async move {
                match client.lease_client().keep_alive(lease.0).await {
                    Err(error) if explain::is_lease_over(&error) => Ok(false),
                    outcome => outcome.map(|_| true),
                }
            };
            self.0.call(request).await.while_doing(|| "keeping a lease".into())
        };
        keep.boxed()
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<()>> {
        let revoke = async move {
            let request = |client: etcd_client::Client| async move {
                match client.lease_client().revoke(lease.0).await {
                    Err(error) if explain::is_lease_over(&error) => Ok(()),
                    outcome => outcome.map(drop),
                }
            };
            self.0.call(request).await.while_doing(|| "ending a lease".into())
        };
        revoke.boxed()
    }
}

impl Etcd {
    async fn page(&self, start: &str, end: &str, mut limit: usize) -> Result<Page> {
        loop {
            let request = |client: etcd_client::Client| async move {
                let options =
                    GetOptions::new().with_range(end).with_limit(limit.try_into().unwrap_or(1));
                let kv = client.kv_client().max_decoding_message_size(MAX_PAGE_BYTES);
                let mut kv = kv;
                match kv.get(start, Some(options)).await {
                    Err(error) if limit > 1 && explain::is_too_large(&error) => Ok(None),
                    outcome => outcome.map(Some),
                }
            };
            let Some(answer) = self.0.call(request).await? else {
                limit = (limit / 8).max(1);
                continue;
            };
            return Ok(Page {
                entries: answer.kvs().iter().map(entry).collect(),
                revision: unsigned(answer.header().map_or(0, |header| header.revision())),
                more: answer.more(),
            });
        }
    }
}

/// The first text behind all that is below the prefix: `0` follows `/` in ASCII.
fn end(prefix: &str) -> String {
    format!("{}0", prefix.strip_suffix('/').unwrap_or(prefix))
}

fn entry(kv: &KeyValue) -> Entry {
    Entry {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: kv.value().to_vec(),
        revision: unsigned(kv.mod_revision()),
        created: unsigned(kv.create_revision()),
        lease: (kv.lease() != 0).then(|| LeaseId(kv.lease())),
    }
}

fn signed(revision: Revision) -> i64 {
    revision.try_into().unwrap_or(i64::MAX)
}

fn unsigned(revision: i64) -> Revision {
    revision.try_into().unwrap_or(0)
}
