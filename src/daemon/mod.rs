//! `pavo daemon`: the one that writes the inventory of the machines below, and answers for it.
//!
//! ```text
//!  callers ──(socket: their user; TLS: a token)──> serve ──> api ──> active ──> the store
//!                                                             │        └ the inventory, in memory
//!  leader: one daemon is active, the others wait              └ operations, with their journal
//! ```
//!
//! - [`serve`]: connections, and who is at their other end ([`caller`]);
//! - [`api`]: HTTP and JSON, as `openapi.yaml` describes it;
//! - [`leader`]: the lock of the one that writes;
//! - [`follow`]: what others write meanwhile;
//! - [`metrics`]: what is counted.
//!
//! Reads are answered from memory. Changes go through [`Book`], one after the
//! other, each commit fenced by the lock. Whoever asked may go away: what was begun is done.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, RwLock, watch};

use crate::config;
use crate::error::{Context, Error, Result};
use crate::host::crash;
use crate::model::api::Service;
use crate::model::node::inventory::Inventory;
use crate::ops::inventory::{Book, Ids};
use crate::ops::operations::Desk;
use crate::store::secret::vault::Vault;
use crate::store::{Change, Check, Commit, Store, get_json, keys};

mod api;
pub mod caller;
mod follow;
mod leader;
mod metrics;
mod serve;

use metrics::Metrics;
use serve::Listeners;

/// How long the store is left alone after it could not be reached.
const REST: Duration = Duration::from_secs(2);

/// How long who asks is kept waiting while the daemon begins.
const BEGIN: Duration = Duration::from_secs(10);

/// Where the store is; opening it may fail for now.
pub type Open =
    Box<dyn Fn() -> futures_util::future::BoxFuture<'static, Result<Arc<dyn Store>>> + Send>;

/// What the active daemon has.
#[derive(Debug)]
struct Active {
    book: Mutex<Book>,
    /// The book's inventory after its latest change: who reads waits for nobody.
    seen: std::sync::RwLock<Arc<Inventory>>,
    vault: Vault,
    ids: Ids,
    desk: Arc<Desk>,
}

impl Active {
    fn inventory(&self) -> Arc<Inventory> {
        self.seen.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shows what the book has now.
    fn publish(&self, book: &Book) {
        let now = Arc::new(book.inventory.to_read());
        *self.seen.write().unwrap_or_else(PoisonError::into_inner) = now;
    }
}

/// What answers have at hand.
#[derive(Debug)]
struct Shared {
    me: Service,
    metrics: Arc<Metrics>,
    /// Whether Slurm is asked what runs on nodes.
    jobs: bool,
    /// None until it could be reached.
    store: RwLock<Option<Arc<dyn Store>>>,
    state: watch::Sender<State>,
}

/// Whether there is an inventory to answer from.
#[derive(Clone, Debug)]
enum State {
    /// Soon, or it will be known why not.
    Begins,
    Active(Arc<Active>),
    Rests(Arc<Error>),
}

impl Shared {
    /// What it takes to answer about records.
    async fn active(&self) -> Result<Arc<Active>> {
        let mut state = self.state.subscribe();
        let known = state.wait_for(|state| !matches!(state, State::Begins));
        let known = tokio::time::timeout(BEGIN, known).await;
        match known.ok().and_then(Result::ok).as_deref() {
            Some(State::Active(active)) => Ok(active.clone()),
            Some(State::Rests(why)) => Err(why.to_wire().into()),
            Some(State::Begins) | None => {
                Err(Error::system("the daemon is beginning").help("try again in a moment"))
            }
        }
    }

    fn rest(&self, why: Error) {
        self.metrics.lead(false);
        let status = why.report().replace('\n', " ");
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&status)]);
        self.state.send_replace(State::Rests(Arc::new(why)));
    }

    fn waits_for(&self, holder: &Service) {
        tracing::info!(host = holder.host, pid = holder.pid, "another daemon is active: waiting");
        let what = format!("the daemon on `{}` is active, and this one waits", holder.host);
        self.rest(Error::system(what).help("ask that one: `PAVO_DAEMON=https://…`"));
    }
}

/// Runs until `stop` ends. `me` is how it calls itself, `jobs` says whether Slurm is asked what
/// runs on nodes.
///
/// # Errors
/// When it cannot listen.
pub async fn run(
    config: &config::Daemon,
    jobs: bool,
    open: Open,
    me: Service,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    std::fs::create_dir_all(&config.state)
        .while_doing(|| format!("making `{}`", config.state.display()))?;
    let listeners = Listeners::open(config).await?;
    let metrics = Arc::new(Metrics::new(me.begun));
    let state = watch::Sender::new(State::Begins);
    let shared =
        Arc::new(Shared { me, metrics: metrics.clone(), jobs, store: RwLock::new(None), state });
    let (end, ending) = watch::channel(false);
    if let Some(address) = listeners.address() {
        tracing::info!(%address, "listening for other hosts");
    }
    tracing::info!(socket = %config.socket.display(), "listening");
    let answering = tokio::spawn(listeners.serve(api::router(shared.clone()), metrics, ending));
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let watchdog = tokio::spawn(watchdog());
    tokio::select! {
        () = live(config, &open, &shared) => {}
        () = finish(&shared, stop) => {}
    }
    end.send_replace(true);
    // It does not fail.
    let _ = answering.await;
    watchdog.abort();
    Ok(())
}

/// Waits for the end, and then for the operations that run: no other node is started.
async fn finish(shared: &Shared, stop: impl Future<Output = ()>) {
    stop.await;
    tracing::info!("ending");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    if let Ok(active) = shared.active().await {
        active.desk.close().await;
    }
}

/// Makes sure that what is sealed can be opened by us: every daemon has the same key.
async fn own_vault(store: &dyn Store, vault: &Vault, fence: &Check) -> Result<()> {
    let key = keys::vault_mark();
    match get_json::<String>(store, &key).await? {
        Some((known, _)) if vault.mark()?.as_ref() == Some(&known) => Ok(()),
        Some(_) => Err(Error::config("the inventory's secrets are sealed with another key").help(
            "copy `inventory.key` from the state of the daemon that was active before (0600)",
        )),
        None => {
            let checks = [fence.clone(), Check::Absent(key.clone())];
            let mark = vault.make()?;
            crash::point("lead.vault")?;
            match store.commit(&checks, &[Change::put_json(key, &mark)?]).await? {
                Commit::Done(_) => Ok(()),
                Commit::Conflict(_) => Err(Error::system("another daemon has taken over")),
            }
        }
    }
}

/// Tells systemd that the runtime turns.
async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    loop {
        tokio::time::sleep(limit / 3).await;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

/// Lives, leads, loses the lead, begins anew: for ever.
async fn live(config: &config::Daemon, open: &Open, shared: &Arc<Shared>) {
    let mut said = String::new();
    loop {
        let Err(error) = term(config, open, shared).await else { continue };
        let report = error.report();
        if report != said {
            tracing::warn!("{report}");
            said = report;
        }
        shared.rest(error);
        tokio::time::sleep(REST).await;
    }
}

/// One life of the lease.
async fn term(config: &config::Daemon, open: &Open, shared: &Arc<Shared>) -> Result<()> {
    let store = open().await?;
    *shared.store.write().await = Some(store.clone());
    let lease = leader::enlist(&*store, &shared.me).await?;
    let lead = async {
        let mut waits = |holder: &Service| shared.waits_for(holder);
        let fence = leader::lead(&*store, &shared.me, lease, &mut waits).await?;
        crash::point("lead.taken")?;
        let vault = || Vault::open(&config.state);
        own_vault(&*store, &vault()?, &fence).await?;
        let since = follow::now(&*store).await?;
        let book = Book::over(store.clone(), vault()?, Some(fence.clone())).await?;
        let desk = Arc::new(Desk::over(store.clone(), Some(fence)).await?);
        let active = Service { active: true, ..shared.me.clone() };
        leader::record(&*store, &active, lease).await?;
        crash::point("lead.active")?;
        let nodes = book.inventory.nodes.len();
        let active = Arc::new(Active {
            seen: std::sync::RwLock::new(Arc::new(book.inventory.to_read())),
            vault: vault()?,
            ids: book.ids(),
            desk,
            book: Mutex::new(book),
        });
        shared.state.send_replace(State::Active(active.clone()));
        shared.metrics.lead(true);
        shared.metrics.nodes(nodes);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status("active")]);
        tracing::info!(nodes, "active");
        follow::others(&*store, &active, &shared.metrics, since).await;
        Ok(())
    };
    let ended = tokio::select! {
        outcome = lead => outcome,
        why = leader::keep(&*store, lease) => Err(why),
    };
    // Another daemon may lead already: no other machine is touched by this one.
    if let State::Active(active) = &*shared.state.borrow() {
        active.desk.stop();
    }
    // Gone with its lease otherwise.
    let _ = tokio::time::timeout(REST, store.revoke(lease)).await;
    ended
}
