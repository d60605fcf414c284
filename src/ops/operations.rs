//! The daemon's long work: begun by one caller, watched by others, kept in a journal.
//!
//! ```text
//! op/<id>          the operation: written before it begins, and whenever results are
//! result/<id>/<n>  what came of the nodes, SHARD of them each, as it came
//!        <id>/begun/<n>  the nodes that were begun, before they were: see `begun`
//! ```
//!
//! An operation runs on a thread of its own; nobody who watches it, and no store that is slow,
//! keeps it waiting. A daemon that finds one that still runs, and is not its own, calls it
//! interrupted: what is in the journal was done, of the rest only its controllers know. Where
//! doing it twice would matter, the journal says of each node that it may have been.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::book::now;
use super::orders::Prepared;
use crate::error::{Context, Error, Result};
use crate::host::crash;
use crate::model::node::operation::{Operation, State};
use crate::model::node::request::Outcome;
use crate::model::nodeset::NodeSet;
use crate::model::nodeset::parse::parse;
use crate::model::order::{Order, Results};
use crate::store::{Change, Check, Commit, Store, get_json, keys, list_all};

use begun::{Begins, Begun};
use work::{Ended, on, run};

mod begun;
mod work;

/// How many results one entry of the store has.
const SHARD: usize = 500;

/// What is said of a node that was begun, and nobody knows more.
const UNKNOWN: &str = "the daemon ended meanwhile: whether it was done is not known";

/// How often results are written.
const EACH: Duration = Duration::from_millis(500);

/// How many operations may run at once.
const MOST: usize = 32;

/// How many are remembered.
const KEPT: usize = 100;

/// What runs, and what is known of what ran.
#[derive(Debug)]
pub struct Desk {
    store: Arc<dyn Store>,
    fence: Option<Check>,
    running: Mutex<BTreeMap<u64, Arc<Running>>>,
}

/// One that runs.
#[derive(Debug)]
struct Running {
    now: Mutex<Results>,
    /// Sent whenever there is something new.
    news: watch::Sender<()>,
    stop: watch::Sender<bool>,
}

impl Running {
    fn new(operation: Operation, results: Vec<Outcome>) -> Self {
        Self {
            now: Mutex::new(Results { operation, results }),
            news: watch::Sender::new(()),
            stop: watch::Sender::new(false),
        }
    }

    fn now(&self) -> MutexGuard<'_, Results> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, outcome: Outcome) {
        let mut now = self.now();
        match outcome.ok {
            true => now.operation.done += 1,
            false => now.operation.failed += 1,
        }
        now.results.push(outcome);
        self.news.send_replace(());
    }

    /// What is there behind the first ones.
    fn after(&self, known: usize) -> Results {
        let now = self.now();
        let results = now.results.get(known..).unwrap_or_default().to_vec();
        Results { operation: now.operation.clone(), results }
    }
}

impl Desk {
    /// The operations of a store, to which we write while `fence` holds. Those that died with
    /// who did them are marked.
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub async fn over(store: Arc<dyn Store>, fence: Option<Check>) -> Result<Self> {
        let desk = Self { store, fence, running: Mutex::default() };
        for operation in desk.stored().await? {
            if operation.order.is_some() && operation.state == State::Running {
                desk.bury(operation).await?;
            }
        }
        Ok(desk)
    }

    /// Says of an operation that its daemon is gone, and of each node that was begun, and of
    /// which nothing else is known, just that.
    async fn bury(&self, mut operation: Operation) -> Result<()> {
        let (mut results, begun) = self.journal(operation.id).await?;
        let written = results.len();
        let told: HashSet<&String> = results.iter().map(|it| &it.name).collect();
        let unknown: Vec<String> = begun.into_iter().filter(|it| !told.contains(it)).collect();
        operation.state = State::Interrupted;
        operation.ended = Some(now());
        operation.reason = Some(match unknown.len() {
            0 => "the daemon ended in the middle of it".into(),
            1 => "the daemon ended in the middle of it, and of one node it is not known whether it was done".into(),
            many => format!("the daemon ended in the middle of it, and of {many} nodes it is not known whether it was done"),
        });
        results.extend(unknown.into_iter().map(|name| Outcome::failed(name, UNKNOWN)));
        // Results may have been written, and their number not.
        operation.done = results.iter().filter(|it| it.ok).count();
        operation.failed = results.len() - operation.done;
        crash::point("op.buried")?;
        let running = Running::new(operation.clone(), results);
        self.flush(&running, written, Some(&operation)).await.map(drop)
    }

    /// What the store has of an operation: what came of nodes, and which were begun.
    async fn journal(&self, id: u64) -> Result<(Vec<Outcome>, Vec<String>)> {
        let (mut results, mut begun) = (Vec::new(), Vec::new());
        let begins = keys::op_begun(id);
        for entry in list_all(&*self.store, &keys::op_results(id)).await?.0 {
            match entry.key.starts_with(&begins) {
                true => begun.extend(entry.json::<Vec<String>>()?),
                false => results.extend(entry.json::<Vec<Outcome>>()?),
            }
        }
        Ok((results, begun))
    }

    async fn stored(&self) -> Result<Vec<Operation>> {
        let entries = list_all(&*self.store, &keys::ops()).await?.0;
        entries.iter().map(|entry| entry.json()).collect()
    }

    async fn write(&self, changes: Vec<Change>) -> Result<()> {
        let checks: Vec<Check> = self.fence.iter().cloned().collect();
        match self.store.commit(&checks, &changes).await? {
            Commit::Done(_) => Ok(()),
            Commit::Conflict(_) => Err(Error::system("another daemon has taken over")),
        }
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Running>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn one(&self, id: u64) -> Option<Arc<Running>> {
        self.running().get(&id).cloned()
    }

    /// Records an operation, and begins it.
    ///
    /// # Errors
    /// When too many run, or it cannot be recorded: then nothing is done.
    pub async fn begin(
        self: &Arc<Self>,
        id: u64,
        user: &str,
        mut work: Prepared,
    ) -> Result<Operation> {
        if self.running().len() >= MOST {
            return Err(Error::system(format!("{MOST} operations run already"))
                .help("wait for one, or stop one: `pavo op list`, `pavo op abort ID`"));
        }
        let operation = work.operation(id, user);
        crash::point("op.begin")?;
        self.record(&operation).await.while_doing(|| "recording the operation".into())?;
        crash::point("op.recorded")?;
        let running = Arc::new(Running::new(operation.clone(), Vec::new()));
        let begins = Begun::guard(&mut work.plan);
        self.running().insert(id, running.clone());
        for outcome in &work.refused {
            running.add(outcome.clone());
        }
        let worker = running.clone();
        let thread = std::thread::Builder::new().name(format!("op {id}"));
        let ended = on(thread, move || run(&worker, &work));
        tokio::spawn(self.clone().keep(running, begins, ended));
        Ok(operation)
    }

    /// Records an operation before it begins; forgets the oldest.
    async fn record(&self, operation: &Operation) -> Result<()> {
        let mut old = self.stored().await?;
        old.retain(|old| old.order.is_some() && old.state != State::Running);
        let excess = (old.len() + 1).saturating_sub(KEPT).min(16);
        let mut changes = vec![Change::put_json(keys::op(operation.id), operation)?];
        for old in old.iter().take(excess) {
            changes.push(Change::delete(keys::op(old.id)));
            changes.push(Change::DeletePrefix { prefix: keys::op_results(old.id) });
        }
        self.write(changes).await
    }

    /// Writes the journal until the operation ends; then its end.
    async fn keep(
        self: Arc<Self>,
        running: Arc<Running>,
        mut begins: Begins,
        mut ended: oneshot::Receiver<Ended>,
    ) {
        let (mut written, mut said, mut begun) = (0, false, 0);
        let mut due = Instant::now() + EACH;
        let end = loop {
            tokio::select! {
                end = &mut ended => break end,
                Some(first) = begins.recv() => {
                    self.write_begun(&running, begun, first, &mut begins).await;
                    begun += 1;
                    continue;
                }
                () = sleep_until(due) => due = Instant::now() + EACH,
            }
            // What cannot be written now is written later, or by nobody: the store is away.
            match self.flush(&running, written, None).await {
                Ok(now) => written = now,
                Err(error) if !said => {
                    said = true;
                    tracing::warn!("the journal of an operation falls behind: {}", error.report());
                }
                Err(_) => {}
            }
        };
        // Nobody is told that it is over before the journal says so.
        let mut operation = running.now().operation.clone();
        operation.ended = Some(super::book::now());
        (operation.state, operation.reason) = match end {
            Ok(Ok(Some(why))) => {
                operation.stopped_by = Some(why);
                (State::Aborted, Some(why.as_str().into()))
            }
            Ok(Ok(None)) if operation.failed == 0 => (State::Done, None),
            Ok(Ok(None)) => (State::Failed, None),
            Ok(Err(why)) => (State::Interrupted, Some(why)),
            Err(_) => (State::Interrupted, Some("a bug of ours ended it".into())),
        };
        for wait in [0, 1, 5, 20] {
            sleep(Duration::from_secs(wait)).await;
            match self.flush(&running, written, Some(&operation)).await {
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!("an operation's end is not recorded: {}", error.report())
                }
            }
        }
        let id = operation.id;
        running.now().operation = operation;
        running.news.send_replace(());
        self.running().remove(&id);
    }

    /// Writes which nodes are to be touched now, and then lets them be.
    async fn write_begun(
        &self,
        running: &Running,
        shard: usize,
        first: Begun,
        begins: &mut Begins,
    ) {
        let mut some = vec![first];
        while some.len() < SHARD {
            let Ok(next) = begins.try_recv() else { break };
            some.push(next);
        }
        let id = running.now().operation.id;
        let names: Vec<&str> = some.iter().map(|it| it.node.as_str()).collect();
        let write = async {
            self.write(vec![Change::put_json(keys::op_begun_some(id, shard), &names)?]).await?;
            crash::point("op.begun")
        };
        let outcome = write.await;
        some.into_iter().for_each(|it| it.tell(&outcome));
    }

    /// Writes what is new behind the first results, and how it has ended; how many there are then.
    async fn flush(
        &self,
        running: &Running,
        written: usize,
        last: Option<&Operation>,
    ) -> Result<usize> {
        // The last shard may not have been full.
        let whole = written / SHARD;
        let Results { operation, results } = running.after(whole * SHARD);
        let all = whole * SHARD + results.len();
        if all == written && last.is_none() {
            return Ok(written);
        }
        if last.is_some() {
            crash::point("op.ended")?;
        }
        for (shard, some) in (whole..).zip(results.chunks(SHARD)) {
            let key = keys::op_result(operation.id, shard);
            // A commit is not to be larger than any store takes.
            self.write(vec![Change::put_json(key, some)?]).await?;
            crash::point("op.shard")?;
        }
        let now = last.unwrap_or(&operation);
        self.write(vec![Change::put_json(keys::op(now.id), now)?]).await?;
        crash::point(if last.is_some() { "op.closed" } else { "op.written" })?;
        Ok(all)
    }

    /// All that are remembered, the latest last.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn list(&self) -> Result<Vec<Operation>> {
        let mut all: BTreeMap<u64, Operation> =
            self.stored().await?.into_iter().map(|it| (it.id, it)).collect();
        for (id, running) in &*self.running() {
            all.insert(*id, running.now().operation.clone());
        }
        Ok(all.into_values().collect())
    }

    /// An operation.
    ///
    /// # Errors
    /// When there is none of this number, or the store cannot be read.
    pub async fn show(&self, id: u64) -> Result<Operation> {
        if let Some(running) = self.one(id) {
            return Ok(running.now().operation.clone());
        }
        let found = get_json(&*self.store, &keys::op(id)).await?;
        found.map(|(operation, _)| operation).ok_or_else(|| {
            Error::not_found(format!("there is no operation {id}"))
                .help("see which there are: `pavo op list`")
        })
    }

    /// Its results behind the first ones; those of one that runs when there are some, or after
    /// that time.
    ///
    /// # Errors
    /// When there is none of this number, or the store cannot be read.
    pub async fn results(&self, id: u64, after: usize, wait: Duration) -> Result<Results> {
        let until = Instant::now() + wait;
        if let Some(running) = self.one(id) {
            let mut news = running.news.subscribe();
            loop {
                news.borrow_and_update();
                let found = running.after(after);
                let is_late = Instant::now() >= until;
                if is_late || !found.results.is_empty() || found.operation.state != State::Running {
                    return Ok(found);
                }
                // Late is what the next turn finds.
                let _ = timeout_at(until, news.changed()).await;
            }
        }
        let operation = self.show(id).await?;
        let mut results = self.journal(id).await?.0;
        Ok(Results { operation, results: results.split_off(after.min(results.len())) })
    }

    /// Starts no other node of it.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn abort(&self, id: u64) -> Result<Operation> {
        if let Some(running) = self.one(id) {
            running.stop.send_replace(true);
            return Ok(running.now().operation.clone());
        }
        let state = self.show(id).await?.state.as_str();
        Err(Error::usage(format!("operation {id} does not run: it is {state}")))
    }

    /// What it takes to do an order again, with the nodes that it did not go well with.
    ///
    /// # Errors
    /// When it runs, was no order, or went well with all.
    pub async fn left(&self, id: u64) -> Result<(Order, NodeSet)> {
        let Results { operation, results } = self.results(id, 0, Duration::ZERO).await?;
        if operation.state == State::Running {
            return Err(Error::usage(format!("operation {id} runs still")));
        }
        let mut order = operation.order.ok_or_else(|| {
            Error::usage(format!("operation {id} is a change of the inventory"))
                .help("the same command does the rest of it")
        })?;
        let well = results.iter().filter(|outcome| outcome.ok).map(|outcome| &outcome.name);
        let left = parse(&order.names)?.eval(&mut |_| Ok(NodeSet::default()))?;
        let left = left.without(&well.collect());
        if left.is_empty() {
            return Err(Error::usage(format!("operation {id} went well with all nodes")));
        }
        order.names = left.to_string();
        Ok((order, left))
    }

    /// Starts no other node of any.
    pub fn stop(&self) {
        for running in self.running().values() {
            running.stop.send_replace(true);
        }
    }

    /// Lets all that run come to an end, and waits for that.
    pub async fn close(&self) {
        let all: Vec<Arc<Running>> = self.running().values().cloned().collect();
        self.stop();
        for running in all {
            let mut news = running.news.subscribe();
            while running.now().operation.state == State::Running {
                if news.changed().await.is_err() {
                    break;
                }
            }
        }
        while !self.running().is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    }
}
