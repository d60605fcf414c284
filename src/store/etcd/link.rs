//! The connection to one member of etcd at a time, and the way to another.
//!
//! Each endpoint has a client of its own. All are raced, the first that logs in and
//! reads wins and is kept, until it does not answer: then all are raced again. A read
//! proves more than a connection does: the member has a leader, and knows us.

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, Error as EtcdError, Identity, TlsOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{sleep, timeout};

use super::commit::{Fence, random};
use super::explain::{self, Verdict};
use super::{Access, Certificate, Login, keys};
use crate::error::{Context, Error, Result};

/// How long a TCP and TLS connection may take.
const CONNECT: Duration = Duration::from_secs(3);

/// How long a request may take.
const REQUEST: Duration = Duration::from_secs(5);

/// How long a member may take to prove that it has a leader.
const PROBE: Duration = Duration::from_secs(2);

/// How often an idle connection is tried, and how long it may take to answer.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3));

/// How long failures are hidden. Another member is tried once in any case.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_millis(400);

/// How often in a row a log-in is renewed.
const MAX_LOG_INS: u32 = 5;

/// Why a single attempt failed.
pub enum Failure {
    /// No answer, or one that may be another next time.
    Lost {
        /// Whether etcd may have done what was asked.
        perhaps_done: bool,
        endpoint: String,
        reason: String,
    },
    Refused(Error),
}

pub struct Link {
    endpoints: Vec<String>,
    login: Login,
    options: ConnectOptions,
    current: Mutex<Option<Member>>,
    /// Held by the one that looks for a member, for all who need one.
    race: tokio::sync::Mutex<()>,
    pub fence: Fence,
}

/// The member in use.
#[derive(Clone)]
pub struct Member {
    pub client: Client,
    pub endpoint: String,
    /// Tells it from a later connection to the same endpoint.
    id: u64,
}

impl Link {
    /// Reads the files; connects to nobody yet.
    pub fn open(access: &Access) -> Result<Self> {
        check_endpoints(access)?;
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some(tls) = tls(access)? {
            options = options.with_tls(tls);
        }
        if let Login::Password { user, password } = &access.login {
            options =
                options.with_user(user.as_str(), password.expose()).with_auto_token_refresh(true);
        }
        Ok(Self {
            endpoints: access.endpoints.clone(),
            login: access.login.clone(),
            options,
            current: Mutex::new(None),
            race: tokio::sync::Mutex::new(()),
            fence: Fence::new(&access.login),
        })
    }

    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    pub fn has_password(&self) -> bool {
        matches!(self.login, Login::Password { .. })
    }

    /// The error of what etcd does not permit.
    pub fn denied(&self) -> Error {
        explain::denied(&self.login)
    }

    pub fn judge(&self, error: EtcdError) -> Verdict {
        explain::judge(error, &self.login)
    }

    /// Asks until there is an answer: for what may be done twice.
    pub async fn call<T, F>(&self, request: impl Fn(Client) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let mut patience = Patience::new();
        loop {
            match self.attempt(&request).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => patience.wait(failure).await?,
            }
        }
    }

    /// Asks once, logging in again if need be. After a failure the next attempt is made
    /// with the member that then answers first.
    pub async fn attempt<T, F>(&self, request: impl Fn(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, EtcdError>>,
    {
        let mut log_ins = 0;
        loop {
            let member = self.member().await?;
            let outcome = timeout(REQUEST, request(member.client.clone())).await;
            let verdict = match outcome {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => explain::judge(error, &self.login),
                Err(_elapsed) => Verdict::Again { perhaps_done: true, reason: silent(REQUEST) },
            };
            match verdict {
                Verdict::LogIn if log_ins < MAX_LOG_INS => {
                    log_ins += 1;
                    self.log_in(&member).await?;
                }
                Verdict::LogIn => {
                    self.leave(&member);
                    let reason = "it forgets every log-in".into();
                    return Err(member.lost(false, reason));
                }
                Verdict::Again { perhaps_done, reason } => {
                    self.leave(&member);
                    return Err(member.lost(perhaps_done, reason));
                }
                Verdict::Final(error) => return Err(Failure::Refused(error)),
            }
        }
    }

    /// Takes a new token.
    pub async fn log_in(&self, member: &Member) -> Result<(), Failure> {
        let reason = match timeout(REQUEST, member.client.refresh_token()).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => match explain::judge(error, &self.login) {
                Verdict::Final(error) => return Err(Failure::Refused(error)),
                Verdict::Again { reason, .. } => reason,
                Verdict::LogIn => "it forgets every log-in".into(),
            },
            Err(_elapsed) => silent(REQUEST),
        };
        self.leave(member);
        Err(member.lost(false, reason))
    }

    /// The member in use, or the winner of a race.
    pub async fn member(&self) -> Result<Member, Failure> {
        if let Some(member) = self.current() {
            return Ok(member);
        }
        let _racing = self.race.lock().await;
        if let Some(member) = self.current() {
            return Ok(member);
        }
        let member = self.race().await?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(member.clone());
        Ok(member)
    }

    pub fn current(&self) -> Option<Member> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives a member up that does not answer, unless somebody has already.
    pub fn leave(&self, member: &Member) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|current| current.id == member.id) {
            *current = None;
        }
    }

    async fn race(&self) -> Result<Member, Failure> {
        let mut racers: FuturesUnordered<_> =
            self.endpoints.iter().map(|endpoint| self.reach(endpoint)).collect();
        let mut reasons = Vec::new();
        while let Some(outcome) = racers.next().await {
            match outcome {
                Ok(member) => return Ok(member),
                Err(Failure::Refused(error)) => return Err(Failure::Refused(error)),
                Err(Failure::Lost { endpoint, reason, .. }) => reasons.push((endpoint, reason)),
            }
        }
        let (endpoints, reasons): (Vec<_>, Vec<_>) = reasons.into_iter().unzip();
        let (endpoint, reason) = (endpoints.join("\n"), reasons.join("\n"));
        Err(Failure::Lost { perhaps_done: false, endpoint, reason })
    }

    async fn reach(&self, endpoint: &str) -> Result<Member, Failure> {
        let lost =
            |reason| Failure::Lost { perhaps_done: false, endpoint: endpoint.into(), reason };
        let judged = |error| match explain::judge(error, &self.login) {
            Verdict::Final(error) => Failure::Refused(error),
            Verdict::Again { reason, .. } => lost(reason),
            Verdict::LogIn => lost("it forgets every log-in".into()),
        };
        let connect = Client::connect([endpoint], Some(self.options.clone()));
        let client = match timeout(REQUEST, connect).await {
            Ok(connected) => connected.map_err(judged)?,
            Err(_elapsed) => return Err(lost(silent(REQUEST))),
        };
        match timeout(PROBE, client.kv_client().get(keys::schema(), None)).await {
            // Who may not read this may read something else: it is the request that counts.
            Ok(Err(error)) if !explain::says(&error, "permission denied") => {
                return Err(judged(error));
            }
            Ok(_) => {}
            Err(_elapsed) => return Err(lost(silent(PROBE))),
        }
        Ok(Member { client, endpoint: endpoint.into(), id: random() })
    }
}

impl Member {
    pub fn lost(&self, perhaps_done: bool, reason: String) -> Failure {
        Failure::Lost { perhaps_done, endpoint: self.endpoint.clone(), reason }
    }
}

/// How long one goes on trying, and what went wrong so far.
pub struct Patience {
    since: Instant,
    attempts: u32,
    reasons: BTreeMap<String, String>,
}

impl Patience {
    pub fn new() -> Self {
        Self { since: Instant::now(), attempts: 0, reasons: BTreeMap::new() }
    }

    /// Waits before another attempt, at random, so that those who were thrown off one
    /// member do not meet at the next.
    ///
    /// # Errors
    /// When it is not worth another attempt.
    pub async fn wait(&mut self, failure: Failure) -> Result<()> {
        let (endpoint, reason) = match failure {
            Failure::Lost { endpoint, reason, .. } => (endpoint, reason),
            Failure::Refused(error) => return Err(error),
        };
        let each = endpoint.split('\n').zip(reason.split('\n'));
        self.reasons.extend(each.map(|(endpoint, reason)| (endpoint.into(), reason.into())));
        self.attempts += 1;
        if self.attempts > 1 && self.since.elapsed() > PATIENCE {
            return Err(self.give_up());
        }
        let longest = Duration::from_millis(20 << self.attempts.min(10)).min(MAX_PAUSE);
        let share = u32::try_from(random() % 1000).unwrap_or(0);
        sleep(longest / 4 + longest * share / 1000).await;
        Ok(())
    }

    fn give_up(&self) -> Error {
        let each = self.reasons.iter().map(|(endpoint, reason)| format!("`{endpoint}`: {reason}"));
        let first = self.reasons.keys().next().map_or("", String::as_str);
        Error::system(format!("etcd does not answer ({:.0?})", self.since.elapsed()))
            .because(each.collect::<Vec<_>>().join("\n"))
            .help(format!(
                "look at its members: `etcdctl --endpoints {first} endpoint status --cluster`"
            ))
    }
}

fn silent(limit: Duration) -> String {
    format!("no answer in {} s", limit.as_secs())
}

fn check_endpoints(access: &Access) -> Result<()> {
    if access.endpoints.is_empty() {
        return Err(Error::config("no endpoint of etcd is configured"));
    }
    for endpoint in &access.endpoints {
        let (plain, rest) = match endpoint.split_once("://") {
            Some(("https", rest)) => (false, rest),
            Some(("http", rest)) => (true, rest),
            _ => {
                return Err(Error::config(format!("`{endpoint}` is not an endpoint of etcd"))
                    .help("write it as `https://host:2379`"));
            }
        };
        let local = ["127.0.0.1:", "localhost:", "[::1]:"].iter().any(|l| rest.starts_with(l));
        if plain && !local && !matches!(access.login, Login::None) {
            return Err(Error::config(format!(
                "`{endpoint}` would carry the log-in over the network in clear"
            ))
            .help("let etcd use TLS, and write `https://`"));
        }
        if !plain && access.ca.is_none() {
            return Err(Error::config(format!("who signed the certificate of `{endpoint}`?"))
                .help("name the file with the authority's certificate"));
        }
    }
    Ok(())
}

fn tls(access: &Access) -> Result<Option<TlsOptions>> {
    let Some(ca) = &access.ca else { return Ok(None) };
    if access.endpoints.iter().all(|endpoint| endpoint.starts_with("http://")) {
        return Ok(None);
    }
    let mut tls = TlsOptions::new().ca_certificate(etcd_client::Certificate::from_pem(read(ca)?));
    let own = match &access.login {
        Login::Certificate { cert, key } => {
            Some(Certificate { cert: cert.clone(), key: key.clone() })
        }
        _ => access.certificate.clone(),
    };
    if let Some(own) = own {
        tls = tls.identity(Identity::from_pem(read(&own.cert)?, read(&own.key)?));
    }
    Ok(Some(tls))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).while_doing(|| format!("reading `{}`", path.display()))
}
