//! An action on many nodes.
//!
//! ```text
//!  waiting ──(a place is free, its window is open)──> under way ──> done, or failed
//!     └──(too many failed, or somebody said stop)──> not started
//! ```
//!
//! So many are under way at once. Who takes longer than [`SLOW`] gives its place to the next one
//! and goes on beside it, so that no number of dead controllers keeps the living ones waiting:
//! up to [`BESIDE`] times as many are under way then. One at a time (`at_once: 1`) is just that.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{Stream, StreamExt};
use tokio::time::{Instant, sleep_until};

use super::action::{self, Action, Done, Patience};
use super::{Bmc, Hub, open};
use crate::error::{Error, Kind, Result};
use crate::host::limits::raise_open_files;

/// How long a node has a place of its own: about what a conversation takes with a controller that
/// is well. A thousand have all begun in less than half a second then, also the dead among them.
pub const SLOW: Duration = Duration::from_millis(150);
pub const BESIDE: usize = 4;

/// What is done, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    pub action: Action,
    pub at_once: usize,
    pub patience: Patience,
    pub window: Option<Window>,
    /// So many may fail; after one more, no other is started.
    pub fail_limit: Option<FailLimit>,
    /// So many have failed already, before this.
    pub failed_before: usize,
    /// Nothing is changed; what would be is said.
    pub dry_run: bool,
    /// Asked of each node when its turn comes.
    pub guard: Option<Arc<dyn Guard>>,
}

/// Who knows which nodes must be left alone. Hours may lie between the first and the last.
pub trait Guard: fmt::Debug + Send + Sync {
    fn check<'a>(&'a self, node: &'a str) -> Checked<'a>;
}

/// Why a node must be left alone, later.
pub type Checked<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

impl Plan {
    /// The usual one.
    pub fn new(action: Action) -> Self {
        Self {
            action,
            at_once: 256,
            patience: Patience::default(),
            window: None,
            fail_limit: None,
            failed_before: 0,
            dry_run: false,
            guard: None,
        }
    }
}

impl Plan {
    /// How long those that are under way have after an interrupt.
    fn farewell(&self) -> Duration {
        let half_done = self.action == Action::Cycle && !self.dry_run;
        let settle = if half_done { self.patience.settle } else { Duration::ZERO };
        settle + self.patience.answer
    }

    /// What is said of one that did not end in that time.
    fn interrupted(&self) -> Error {
        Error::new(
            Kind::Interrupted,
            match self.action {
                Action::Cycle => "interrupted: it may be off",
                action if action.only_looks() => "interrupted",
                _ => "interrupted: whether it was done is not known",
            },
        )
    }
}

/// Only so many start in each interval, for what their power comes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub size: usize,
    pub interval: Duration,
}

/// How many nodes may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailLimit {
    Nodes(usize),
    Percent(u8),
}

impl FailLimit {
    fn of(self, nodes: usize) -> usize {
        match self {
            Self::Nodes(count) => count,
            Self::Percent(share) => nodes * usize::from(share) / 100,
        }
    }
}

/// As it is read.
impl fmt::Display for FailLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nodes(count) => count.fmt(f),
            Self::Percent(share) => write!(f, "{share}%"),
        }
    }
}

/// `10`, or `5%`.
impl FromStr for FailLimit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = match text.strip_suffix('%') {
            Some(share) => share.parse().ok().filter(|share| *share <= 100).map(Self::Percent),
            None => text.parse().ok().map(Self::Nodes),
        };
        found.ok_or_else(|| {
            Error::usage(format!("`{}` is no limit of failures", text.escape_debug()))
                .help("a number of nodes, `10`, or a share of them, `5%`")
        })
    }
}

/// What became of a node.
#[derive(Debug)]
pub enum Outcome {
    Done(Done),
    Failed(Error),
    NotStarted,
}

/// Why not all nodes were started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    TooManyFailed,
    Interrupted,
}

/// What became of all of them.
#[derive(Debug)]
pub struct Report {
    /// In the order of the nodes.
    pub outcomes: Vec<Outcome>,
    pub stop: Option<Stop>,
    pub took: Duration,
}

impl Report {
    /// How many did what was wanted.
    pub fn successes(&self) -> usize {
        self.outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Done(_))).count()
    }
}

/// Who may start, and when.
struct Gate {
    at_once: usize,
    most: usize,
    window: Option<Window>,
    /// When those that hold a place lose it, in this order.
    places: VecDeque<(Instant, usize)>,
    /// By node, whether it holds one.
    holds: Vec<bool>,
    held: usize,
    under_way: usize,
    /// When the window began, and how many started in it.
    begun: Option<(Instant, usize)>,
}

impl Gate {
    fn new(plan: &Plan, nodes: usize) -> Self {
        let at_once = plan.at_once.max(1);
        Self {
            at_once,
            most: if at_once == 1 { 1 } else { at_once.saturating_mul(BESIDE) },
            window: plan.window,
            places: VecDeque::new(),
            holds: vec![false; nodes],
            held: 0,
            under_way: 0,
            begun: None,
        }
    }

    /// Lets one in, if that is possible now; otherwise says when it may be, where time alone
    /// makes it so.
    fn enter(&mut self, node: usize, now: Instant) -> Result<(), Option<Instant>> {
        while let Some((until, held)) = self.places.front().copied() {
            if self.holds[held] && until > now {
                break;
            }
            self.places.pop_front();
            self.leave_place(held);
        }
        if self.under_way >= self.most {
            return Err(None);
        }
        if self.held >= self.at_once {
            return Err(self.places.front().map(|(until, _)| *until));
        }
        if let Some(window) = self.window {
            match &mut self.begun {
                Some((begun, count)) if now < *begun + window.interval => {
                    if *count >= window.size.max(1) {
                        return Err(Some(*begun + window.interval));
                    }
                    *count += 1;
                }
                begun => *begun = Some((now, 1)),
            }
        }
        self.places.push_back((now + SLOW, node));
        self.holds[node] = true;
        self.held += 1;
        self.under_way += 1;
        Ok(())
    }

    fn leave_place(&mut self, node: usize) {
        if std::mem::take(&mut self.holds[node]) {
            self.held -= 1;
        }
    }

    fn leave(&mut self, node: usize) {
        self.leave_place(node);
        self.under_way -= 1;
    }
}

/// Does it to all nodes, until it is done or `stop` says something. Each result is told to `tell`
/// as it comes; the report has them in order. After a word of `stop` those that are under way
/// have the time of one answer to end, and who is switched off and on again the time that it
/// takes; after a second word they are left as they are.
pub async fn run(
    bmcs: &[Bmc],
    plan: &Plan,
    hub: &Hub,
    stop: impl Stream<Item = ()>,
    tell: &mut dyn FnMut(&Bmc, &Outcome),
) -> Report {
    // Each that is under way may have a connection.
    raise_open_files();
    let begun = Instant::now();
    let mut outcomes: Vec<Outcome> = bmcs.iter().map(|_| Outcome::NotStarted).collect();
    let mut started = vec![false; bmcs.len()];
    let allowed = plan.fail_limit.map(|limit| limit.of(bmcs.len() + plan.failed_before));
    let too_many = |failed: usize| allowed.is_some_and(|allowed| failed > allowed);
    let mut gate = Gate::new(plan, bmcs.len());
    let mut under_way = FuturesUnordered::new();
    let mut waiting = (0..bmcs.len()).peekable();
    let (mut failed, mut why, mut end) = (plan.failed_before, None, None);
    if too_many(failed) && waiting.peek().is_some() {
        why = Some(Stop::TooManyFailed);
    }
    let mut stop = std::pin::pin!(stop.fuse());
    loop {
        let mut retry = None;
        while let Some(node) = waiting.peek().copied().filter(|_| why.is_none()) {
            match gate.enter(node, Instant::now()) {
                Ok(()) => {
                    waiting.next();
                    started[node] = true;
                    under_way.push(one(node, &bmcs[node], plan, hub));
                }
                Err(when) => {
                    retry = when;
                    break;
                }
            }
        }
        if under_way.is_empty() && retry.is_none() {
            break;
        }
        tokio::select! {
            Some((node, result)) = under_way.next(), if !under_way.is_empty() => {
                gate.leave(node);
                let outcome = result.map_or_else(Outcome::Failed, Outcome::Done);
                failed += usize::from(matches!(outcome, Outcome::Failed(_)));
                tell(&bmcs[node], &outcome);
                outcomes[node] = outcome;
                started[node] = false;
                if too_many(failed) && waiting.peek().is_some() {
                    why = why.or(Some(Stop::TooManyFailed));
                }
            }
            () = at(retry), if retry.is_some() => {}
            Some(()) = stop.next() => {
                why = Some(Stop::Interrupted);
                let farewell = if end.is_none() { plan.farewell() } else { Duration::ZERO };
                end = Some(Instant::now() + farewell);
            }
            () = at(end), if end.is_some() => break,
        }
    }
    drop(under_way);
    for (node, _) in started.iter().enumerate().filter(|(_, under_way)| **under_way) {
        outcomes[node] = Outcome::Failed(plan.interrupted());
        tell(&bmcs[node], &outcomes[node]);
    }
    Report { outcomes, stop: why, took: begun.elapsed() }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

async fn one(node: usize, bmc: &Bmc, plan: &Plan, hub: &Hub) -> (usize, Result<Done>) {
    if let Some(guard) = &plan.guard {
        if let Err(error) = guard.check(&bmc.node).await {
            return (node, Err(error));
        }
    }
    let driver = open(&bmc.control, hub, plan.patience.answer);
    let result = if plan.dry_run {
        action::rehearse(&*driver, plan.action, &plan.patience).await
    } else {
        action::perform(&*driver, plan.action, &plan.patience).await
    };
    (node, result)
}
