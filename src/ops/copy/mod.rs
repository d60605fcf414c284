//! Files to and from the guests of a cluster: one connection each, many at the same time.
//!
//! The two ends are [`pavo_agent::copy`]: one is a thread here, which reads or writes files,
//! the other a process of the agent in the guest. What they say goes over a stream like a
//! command's, with the same credit: a guest that writes slowly keeps only its own copy waiting.

mod session;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pavo_agent::copy::{Place, Seen, Stop, name_of, receive, send};
use pavo_agent::{Copy, Opening};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::reach::Pass;
use crate::error::{Context, Error, Result};
use crate::host::limits::raise_open_files;
use crate::model::job::JobRecord;
use crate::store::Store;
use crate::vm::control::Connection;
use crate::vm::save::Progress;
use session::{Lost, Session};

/// How many guests are copied to or from at once.
const AT_ONCE: usize = 16;
/// A copy of which nothing came for so long no longer keeps others from beginning.
const TURN: Duration = Duration::from_secs(60);
/// As many messages on what was not copied are kept of each guest.
const TROUBLES: usize = 20;

/// Which way files go.
#[derive(Clone, Debug)]
pub enum Way {
    /// From here into the guest.
    In { sources: Vec<PathBuf>, to: Vec<u8>, into: bool },
    /// From the guest to here.
    Out { sources: Vec<Vec<u8>>, to: PathBuf, into: bool },
}

impl Way {
    /// What is to come of a guest, if that is one thing.
    fn only_source(&self) -> Option<Vec<u8>> {
        match self {
            Self::Out { sources, .. } if sources.len() == 1 => Some(homely(&sources[0])),
            _ => None,
        }
    }
}

/// What is to be copied to or from one guest.
#[derive(Clone, Debug)]
pub struct Order {
    pub rank: u32,
    pub way: Way,
    /// Who reads or writes them there; else root.
    pub user: Option<Vec<u8>>,
}

/// How far one copy is, for whoever looks on.
#[derive(Debug, Default)]
struct Far {
    total: AtomicU64,
    done: AtomicU64,
    troubles: Mutex<Vec<String>>,
    /// More than those.
    more: AtomicU64,
    /// When it was last seen to move, as long as it goes on.
    moved: Mutex<Option<Instant>>,
}

impl Far {
    fn moves(&self, now: Option<Instant>) {
        *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    /// How long nothing has moved of a copy that goes on.
    fn still(&self) -> Option<Duration> {
        let moved = *self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        moved.map(|moved| moved.elapsed())
    }

    /// Waits until nothing has moved for so long.
    async fn stands_still(&self, limit: Duration) {
        while let Some(left) = limit.checked_sub(self.still().unwrap_or_default()) {
            sleep(left.max(Duration::from_millis(1))).await;
        }
    }

    fn see(&self, seen: Seen) {
        match seen {
            Seen::Total(bytes) => self.total.store(bytes, Ordering::Relaxed),
            Seen::Bytes(bytes) => {
                self.moves(Some(Instant::now()));
                // A guest may tell of holes without end.
                let add = |done: u64| Some(done.saturating_add(bytes));
                let _ = self.done.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
            }
            Seen::Trouble(why) => {
                let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
                if troubles.len() < TROUBLES {
                    troubles.push(why);
                } else {
                    self.more.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// How one copy has ended.
#[derive(Debug)]
pub struct Ended {
    pub rank: u32,
    pub outcome: Result<()>,
    /// What was not copied, and why.
    pub troubles: Vec<String>,
}

/// Copies that go on; they end with it.
#[derive(Debug)]
pub struct Copies {
    far: Vec<(u32, Arc<Far>)>,
    ended: mpsc::Receiver<Ended>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Copies {
    /// Begins all of them.
    pub fn start(store: Option<Arc<dyn Store>>, job: &JobRecord, orders: Vec<Order>) -> Self {
        raise_open_files();
        let (tell, ended) = mpsc::channel(16);
        let (job, turns) = (Arc::new(job.clone()), Arc::new(Semaphore::new(AT_ONCE)));
        let ((stop, _), pass) = (watch::channel(false), Arc::new(Pass::default()));
        let (mut all, mut tasks) = (Vec::new(), JoinSet::new());
        for order in orders {
            let far = Arc::new(Far::default());
            all.push((order.rank, far.clone()));
            let (store, job, turns) = (store.clone(), job.clone(), turns.clone());
            let (tell, rank, stop) = (tell.clone(), order.rank, stop.subscribe());
            let (pass, only) = (pass.clone(), order.way.only_source());
            tasks.spawn(async move {
                let turn = turns.acquire().await.expect("it is never closed");
                far.moves(Some(Instant::now()));
                let connect = async {
                    let stream = pass.reach(store.as_deref(), &job, rank).await?;
                    stream.connect().await?.exec().await
                };
                let stream = tokio::select! {
                    stream = connect => stream,
                    () = stopped(stop.clone()) => Err(Error::system("the copy was ended")),
                };
                let outcome = match stream {
                    Ok(stream) => in_turn(copy(stream, order, far.clone(), stop), &far, turn).await,
                    Err(error) => Err(error),
                };
                far.moves(None);
                let troubles = std::mem::take(
                    &mut *far.troubles.lock().unwrap_or_else(PoisonError::into_inner),
                );
                let troubles = told(troubles, far.more.load(Ordering::Relaxed));
                let ended = nothing_came(Ended { rank, outcome, troubles }, only.as_deref());
                // Who asked may have left.
                let _ = tell.send(ended).await;
            });
        }
        Self { far: all, ended, stop, tasks }
    }

    /// The next that ends; `None` after the last.
    pub async fn next(&mut self) -> Option<Ended> {
        self.ended.recv().await
    }

    /// How far all of them are together.
    pub fn progress(&self) -> Progress {
        let sum = |number: fn(&Far) -> u64| {
            self.far.iter().map(|(_, far)| number(far)).fold(0, u64::saturating_add)
        };
        let done = sum(|far| far.done.load(Ordering::Relaxed));
        // What is said before may be less than what there is; and a guest says what it likes.
        let total = sum(|far| far.total.load(Ordering::Relaxed)).max(done);
        Progress { done, total }
    }

    /// Of which VMs nothing has come, or is taken, for so long; and since when at least.
    pub fn still(&self, limit: Duration) -> Option<(Vec<u32>, Duration)> {
        let still = self.far.iter().filter_map(|(rank, far)| Some((*rank, far.still()?)));
        let still: Vec<_> = still.filter(|(_, still)| *still >= limit).collect();
        let least = still.iter().map(|(_, still)| *still).min()?;
        Some((still.into_iter().map(|(rank, _)| rank).collect(), least))
    }

    /// Ends all of them, and waits until what they were writing is left in order.
    pub async fn interrupt(mut self) {
        self.stop.send_replace(true);
        drop(self.ended);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Lets others begin when a copy stands still: of guests that hang there may be many.
async fn in_turn<T>(copy: impl Future<Output = T>, far: &Far, turn: SemaphorePermit<'_>) -> T {
    tokio::pin!(copy);
    tokio::select! {
        outcome = &mut copy => return outcome,
        () = far.stands_still(TURN) => drop(turn),
    }
    copy.await
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // Where nobody can stop us any more, nobody waits either.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// A copy of the only source has failed where all that is said is that there is none.
fn nothing_came(mut ended: Ended, only: Option<&[u8]>) -> Ended {
    let Some(only) = only else { return ended };
    let only = String::from_utf8_lossy(only);
    let missing = format!("`{only}`: No such file or directory");
    if ended.outcome.is_ok() && ended.troubles == [missing] {
        let why = std::io::Error::from_raw_os_error(nix::libc::ENOENT);
        ended.outcome = Err(Error::not_found(format!("reading `{only}`")).because(why));
        ended.troubles.clear();
    }
    ended
}

fn told(mut troubles: Vec<String>, more: u64) -> Vec<String> {
    if more > 0 {
        troubles.push(format!("and {more} more"));
    }
    troubles
}

/// A path in a guest as people write it: what is relative begins at the user's home, and so
/// does what is behind `~/`.
fn homely(path: &[u8]) -> Vec<u8> {
    let rest = match path.strip_prefix(b"~") {
        Some(rest) if rest.first().is_none_or(|byte| *byte == b'/') => rest,
        _ => return if path.is_empty() { b".".into() } else { path.into() },
    };
    let start = rest.iter().position(|byte| *byte != b'/').unwrap_or(rest.len());
    if start == rest.len() { b".".into() } else { rest[start..].into() }
}

/// One copy, over a stream to the agent.
async fn copy(
    stream: Box<dyn Connection>,
    order: Order,
    far: Arc<Far>,
    stop: watch::Receiver<bool>,
) -> Result<()> {
    let Order { way, user, .. } = order;
    let (mut session, to, from) = Session::new(stream);
    let opening = match &way {
        Way::In { to, into, .. } => {
            Copy { comes: true, paths: vec![homely(to)], into: *into, user }
        }
        Way::Out { sources, .. } => {
            let paths = sources.iter().map(|path| homely(path)).collect();
            Copy { comes: false, paths, into: false, user }
        }
    };
    session.open(&Opening::Copy(opening.clone())).await?;
    let run = move || {
        let seen = &mut |seen| far.see(seen);
        match way {
            Way::In { sources, .. } => send(from, to, &sources, seen),
            Way::Out { to: path, into, .. } => {
                let name = |path: &Vec<u8>| name_of(Path::new(OsStr::from_bytes(path))).to_vec();
                let names = Some(opening.paths.iter().map(name).collect());
                receive(from, to, &Place { path, into, names }, seen)
            }
        }
    };
    let (tell, mut told) = oneshot::channel();
    // Not one of the runtime's: it may have to wait for a file server, and we end without it.
    let thread = std::thread::Builder::new().spawn(move || tell.send(run()));
    thread.while_doing(|| "starting a thread".into())?;
    let lost = tokio::select! {
        ours = &mut told => return outcome(ours.unwrap_or(Err(Stop::Gone)), Ok(())),
        lost = session.carry() => lost,
        () = stopped(stop) => Ok(()),
    };
    // Our end sees that nothing more comes.
    drop(session);
    outcome(told.await.unwrap_or(Err(Stop::Gone)), lost)
}

/// How a copy ended, by what both ends know.
fn outcome(ours: Result<(), Stop>, lost: Result<(), Lost>) -> Result<()> {
    match (ours, lost) {
        (Ok(()), _) => Ok(()),
        (Err(Stop::Told(why) | Stop::Own(why)), _) => Err(Error::system(why)),
        (Err(Stop::Wrong(why)), _) => {
            Err(Error::system(format!("the guest's agent has sent {why}")).help(
                "what was copied so far is whole; start the agent again, or all of the guest: \
                 `pavo reset VM`",
            ))
        }
        (Err(Stop::Gone), Err(lost)) => Err(lost.into()),
        (Err(Stop::Gone), Ok(())) => Err(Error::system("the copy was ended")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_begin_at_the_users_home() {
        for (written, meant) in [
            ("", "."),
            ("~", "."),
            ("~/", "."),
            ("~//x", "x"),
            ("~/x y", "x y"),
            ("~x", "~x"),
            ("x/~", "x/~"),
            ("/", "/"),
            ("~/ x", " x"),
        ] {
            assert_eq!(homely(written.as_bytes()), meant.as_bytes(), "{written}");
        }
    }

    #[tokio::test]
    async fn a_copy_that_stands_still_is_told_from_one_that_moves_or_has_ended() {
        let far = Far::default();
        assert_eq!(far.still(), None);
        let moment = Duration::from_millis(50);
        far.moves(Some(Instant::now()));
        far.stands_still(moment).await;
        assert!(far.still().unwrap() >= moment);
        far.see(Seen::Bytes(0));
        let turns = Semaphore::new(1);
        let turn = turns.acquire().await.unwrap();
        assert_eq!(in_turn(async { 7 }, &far, turn).await, 7);
        let [moves, hangs] = [Duration::ZERO, moment].map(|since| {
            let far = Far::default();
            far.moves(Instant::now().checked_sub(since));
            Arc::new(far)
        });
        let (stop, _) = watch::channel(false);
        let far = vec![(0, moves), (3, hangs), (4, Arc::default())];
        let copies = Copies { far, ended: mpsc::channel(1).1, stop, tasks: JoinSet::new() };
        assert_eq!(copies.still(moment).unwrap().0, [3]);
        assert_eq!(copies.still(Duration::from_secs(60)), None);
    }

    #[test]
    fn bytes_that_no_file_has_are_not_counted_from_the_beginning_again() {
        let far = Far::default();
        (0..3).for_each(|_| far.see(Seen::Bytes(1 << 63)));
        assert_eq!(far.done.into_inner(), u64::MAX);
    }

    #[test]
    fn what_is_said_of_a_copy_is_bounded() {
        let far = Far::default();
        (0..1000).for_each(|number| far.see(Seen::Trouble(number.to_string())));
        let troubles = told(far.troubles.into_inner().unwrap(), far.more.into_inner());
        assert_eq!(troubles.len(), TROUBLES + 1);
        assert_eq!(troubles[TROUBLES], "and 980 more");
    }
}
