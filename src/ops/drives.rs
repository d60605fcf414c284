//! Who uses a persistent drive: one job at a time, whoever's it is.
//!
//! A job says in the store which drives it is about to use, and then looks whether another
//! has said so before: of two that begin at the same moment at least one sees the other, and
//! the one that the store heard first has the drive. What is said hangs on a lease, so that
//! it ends with the job's launcher, and drives are named by a digest: everybody reads that a
//! drive is in use, nobody where it is.
//!
//! A job that the scheduler starts again is told from its earlier start by the lease: what
//! that start has is waited for, as its guests may still write, and nobody but that start or
//! the end of its lease gives it back.
//!
//! A store on one machine is one person's. There the launcher locks the file as well, which
//! holds between persons; at a site QEMU's own locks do, where the file system has any.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::error::{Context, Error, Result};
use crate::model::owner::Owner;
use crate::store::{
    Change, Check, Commit, Entry, LeaseId, MAX_OPERATIONS, Revision, Store, keys, list_all,
};

mod names;

use names::{is_shared, names};

/// How long a drive stays taken by a launcher that has died, or lost the store.
const TTL: Duration = Duration::from_secs(90);
/// How long an earlier start of the job is waited for. One that has died has lost its drives
/// by then.
const EARLIER: Duration = Duration::from_secs(120);
/// How often the store is asked whether it has.
const AGAIN: Duration = Duration::from_secs(2);
/// A drive that a VM is about to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub path: PathBuf,
    /// `vm0`
    pub vm: String,
    /// Where the VM runs.
    pub host: String,
    /// Whether no other VM may have it, of this cluster neither.
    pub alone: bool,
}

/// One that the job has, and what else it is called.
#[derive(Debug)]
struct Held {
    drive: Wanted,
    names: BTreeSet<String>,
}

/// What is stored of it. Everybody reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    vm: String,
    host: String,
}

impl Held {
    fn is(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

/// Whose they are.
#[derive(Clone, Debug)]
struct Holder {
    store: Arc<dyn Store>,
    user: String,
    owner: Owner,
}

/// How asking for drives has gone.
#[derive(Debug)]
#[must_use]
pub enum Asked {
    Taken,
    /// An earlier start of the job has one of them.
    Held(Error),
}

/// Why drives are not ours.
enum Refusal {
    Earlier(Entry),
    Other(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// The drives of a job, as long as it holds this.
#[derive(Debug)]
pub struct Claims {
    holder: Holder,
    lease: LeaseId,
    held: Vec<Held>,
    keeper: JoinHandle<()>,
    lost: mpsc::Receiver<()>,
    files: Vec<Flock<File>>,
}

impl Claims {
    /// None yet.
    pub async fn new(store: Arc<dyn Store>, user: &str, owner: Owner) -> Result<Self> {
        Self::with(store, user, owner, TTL).await
    }

    async fn with(store: Arc<dyn Store>, user: &str, owner: Owner, ttl: Duration) -> Result<Self> {
        let doing = || "asking the store for a lease on persistent drives".to_owned();
        let lease = store.lease(ttl).await.while_doing(doing)?;
        let (tell, lost) = mpsc::channel(1);
        let keeper = tokio::spawn(keep(store.clone(), lease, ttl, tell));
        let holder = Holder { store, user: user.into(), owner };
        Ok(Self { holder, lease, held: Vec::new(), keeper, lost, files: Vec::new() })
    }

    /// Takes these drives for the job; those it has are no hindrance.
    ///
    /// # Errors
    /// When another job has one of them: then none of these is taken.
    pub async fn take(&mut self, wanted: &[Wanted], this_host: &str) -> Result<Asked> {
        let is_new = |drive: &&Wanted| !self.held.iter().any(|held| held.drive == **drive);
        let held = |drive: &Wanted| {
            let names = names(&drive.path, &drive.host, this_host);
            Held { drive: drive.clone(), names }
        };
        let new: Vec<Held> = wanted.iter().filter(is_new).map(held).collect();
        self.check_own(&new)?;
        // In the order in which they are wanted: of several in use the first is named.
        let (mut claims, mut claimed) = (Vec::new(), BTreeSet::new());
        for Held { drive, names } in &new {
            let claim = Claim { vm: drive.vm.clone(), host: drive.host.clone() };
            let unheld = names.iter().filter(|name| !self.held.iter().any(|it| it.is(name)));
            let unheld = unheld.filter(|name| claimed.insert(*name));
            claims.extend(unheld.map(|name| (name.clone(), claim.clone())));
        }
        let Err((name, refusal)) = self.holder.claim(&claims, self.lease).await else {
            self.held.extend(new);
            return Ok(Asked::Taken);
        };
        let path = new.iter().find(|it| it.is(&name)).map(|it| it.drive.path.display().to_string());
        let path = path.unwrap_or_default();
        match refusal {
            Refusal::Earlier(entry) => Ok(Asked::Held(held_by_earlier(&path, &entry))),
            Refusal::Other(error) => {
                Err(error).while_doing(|| format!("taking the persistent drive `{path}`"))
            }
        }
    }

    /// Refuses drives of which VMs of the job itself would write to one.
    fn check_own(&self, new: &[Held]) -> Result<()> {
        for (at, one) in new.iter().enumerate() {
            let both = |other: &&Held| {
                (one.drive.alone || other.drive.alone) && !one.names.is_disjoint(&other.names)
            };
            if let Some(other) = self.held.iter().chain(&new[..at]).find(both) {
                let [path, known] = [one, other].map(|it| it.drive.path.display());
                return Err(Error::config(format!(
                    "{} would write to `{path}`, the same file as `{known}` of {}",
                    one.drive.vm, other.drive.vm
                ))
                .help("give each its own, with `%{vm_rank}` in the path, or set `mmp: cluster`"));
            }
        }
        Ok(())
    }

    /// Locks the files, too, against other persons of this machine.
    pub fn lock(&mut self, wanted: &[Wanted]) -> Result<()> {
        let mut locked = BTreeSet::new();
        for path in wanted.iter().map(|it| &it.path).filter(|path| !is_shared(path)) {
            let doing = || format!("taking the persistent drive `{}`", path.display());
            let file = File::options().read(true).write(true).open(path).while_doing(doing)?;
            let about = file.metadata().while_doing(doing)?;
            if !locked.insert((about.dev(), about.ino())) {
                continue;
            }
            let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock);
            let locked = locked.map_err(|_| {
                Error::system("it is in use by somebody else's cluster on this machine")
                    .help("wait for its end, or use another file; `mmp: no` does not look")
            });
            self.files.push(locked.while_doing(doing)?);
        }
        Ok(())
    }

    /// Waits until the drives may be another's. Safe to drop.
    pub async fn lost(&mut self) -> Error {
        if self.lost.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
        Error::system("the locks of the cluster's persistent drives have run out")
            .because("the store was away, or this process stood still, for too long")
            .help("start the cluster anew: another one may have the drives by now")
    }

    /// Gives them back.
    pub async fn release(self) {
        self.keeper.abort();
        if let Err(error) = self.holder.store.revoke(self.lease).await {
            // They end with the lease.
            tracing::info!("{}", error.report());
        }
    }
}

/// The drives of a step, which are taken when its person is known to the site's store, and
/// the tasks that wait for that.
#[derive(Debug)]
pub struct Gate<T> {
    claims: Option<Claims>,
    waiting: VecDeque<T>,
    /// Since when an earlier start of the job has been waited for, and until when nobody asks.
    held: Option<(Instant, Instant)>,
    patience: Duration,
}

impl<T> Default for Gate<T> {
    fn default() -> Self {
        Self { claims: None, waiting: VecDeque::new(), held: None, patience: EARLIER }
    }
}

impl<T> Gate<T> {
    /// Keeps a task back until its drives are taken; gives back one that has none.
    pub fn keep(&mut self, task: T, must_claim: bool) -> Option<T> {
        if !must_claim {
            return Some(task);
        }
        self.waiting.push_back(task);
        None
    }

    /// The store is there: drives can be taken.
    pub async fn open(&mut self, store: Arc<dyn Store>, user: &str, owner: Owner) -> Result<()> {
        self.claims = Some(Claims::new(store, user, owner).await?);
        Ok(())
    }

    /// The first task that has waited, and need not any more. It stays the first until
    /// [`admitted`](Self::admitted): who lets it in may be interrupted.
    pub fn admit(&self) -> Option<T>
    where
        T: Clone,
    {
        let rests = self.held.is_some_and(|(_, until)| Instant::now() < until);
        self.claims.as_ref().filter(|_| !rests).and_then(|_| self.waiting.front().cloned())
    }

    /// All tasks that wait.
    pub fn waiting(&self) -> impl Iterator<Item = &T> {
        self.waiting.iter()
    }

    /// Lets none of them in any more.
    pub fn dismiss(&mut self) {
        self.waiting.clear();
    }

    /// It has been let in.
    pub fn admitted(&mut self) {
        self.waiting.pop_front();
    }

    /// When it is time to ask again for drives that an earlier start of the job has.
    pub fn again(&self) -> Option<Instant> {
        self.held.map(|(_, until)| until)
    }

    /// Takes drives, where there is a store to take them in; or says who has them still.
    /// Then nobody is let in until it is [time](Self::again) to ask again.
    ///
    /// # Errors
    /// When another job has one of them, or an earlier start of this one for too long.
    pub async fn take(&mut self, wanted: &[Wanted], this_host: &str) -> Result<Option<Error>> {
        let Some(claims) = &mut self.claims else { return Ok(None) };
        let Asked::Held(why) = claims.take(wanted, this_host).await? else {
            self.held = None;
            return Ok(None);
        };
        let since = self.held.map_or_else(Instant::now, |(since, _)| since);
        if since.elapsed() >= self.patience {
            let waited = self.patience.as_secs();
            return Err(Error::system(format!("{why}, and has not ended within {waited} s")).help(
                "its launcher lives: is the host where it ran cut off from the others? end it \
                 there, then start the job anew",
            ));
        }
        self.held = Some((since, Instant::now() + AGAIN));
        Ok(Some(why))
    }

    /// As [`Claims::lost`]; pending while there is none.
    pub async fn lost(&mut self) -> Error {
        match &mut self.claims {
            Some(claims) => claims.lost().await,
            None => std::future::pending().await,
        }
    }

    pub async fn release(self) {
        if let Some(claims) = self.claims {
            claims.release().await;
        }
    }
}

impl Holder {
    /// Says that these drives are used, and looks whether anybody said so before. On failure
    /// the drive that is another's.
    async fn claim(
        &self,
        claims: &[(String, Claim)],
        lease: LeaseId,
    ) -> std::result::Result<(), (String, Refusal)> {
        let Some((first, _)) = claims.first() else { return Ok(()) };
        let mut said = Vec::new();
        let mut outcome = Ok(());
        for some in claims.chunks(MAX_OPERATIONS) {
            outcome = self.say(some, lease, &mut said).await;
            if outcome.is_err() {
                break;
            }
        }
        let outcome = outcome.map_err(|refusal| match refusal {
            Refusal::Earlier(entry) => {
                let drive = keys::parse_drive_claim(&entry.key).map(|(_, _, drive)| drive);
                (drive.unwrap_or_default(), Refusal::Earlier(entry))
            }
            other => (first.clone(), other),
        });
        let outcome = match outcome {
            Ok(()) => self.look(claims, lease).await.map_err(|(drive, e)| (drive, e.into())),
            refused => refused,
        };
        if outcome.is_err() {
            for some in said.chunks(MAX_OPERATIONS) {
                let ours = some.iter().map(|(key, at)| Check::Revision(key.clone(), *at));
                let deletes = some.iter().map(|(key, _)| Change::delete(key.clone()));
                let (ours, deletes) = (Vec::from_iter(ours), Vec::from_iter(deletes));
                // They end with the lease, too.
                let _ = self.store.commit(&ours, &deletes).await.map(drop);
            }
        }
        outcome
    }

    /// Says that these drives are used, and adds to `said` the keys and their revisions.
    async fn say(
        &self,
        claims: &[(String, Claim)],
        lease: LeaseId,
        said: &mut Vec<(String, Revision)>,
    ) -> std::result::Result<(), Refusal> {
        let key = |drive: &str| keys::drive_claim(&self.user, self.owner, drive);
        let mut new = Vec::new();
        for (drive, claim) in claims {
            new.push((key(drive), Change::put_json(key(drive), claim)?.with_lease(lease)));
        }
        while !new.is_empty() {
            let checks = new.iter().map(|(key, _)| Check::Absent(key.clone()));
            let puts = new.iter().map(|(_, put)| put.clone());
            let (checks, puts) = (Vec::from_iter(checks), Vec::from_iter(puts));
            match self.store.commit(&checks, &puts).await? {
                Commit::Done(at) => {
                    said.extend(new.drain(..).map(|(key, _)| (key, at)));
                }
                Commit::Conflict(found) => {
                    // Whoever was interrupted had said it already.
                    let (ours, others): (Vec<_>, Vec<_>) =
                        found.into_iter().partition(|entry| entry.lease == Some(lease));
                    if let Some(entry) = others.into_iter().next() {
                        return Err(Refusal::Earlier(entry));
                    }
                    new.retain(|(key, _)| !ours.iter().any(|entry| entry.key == *key));
                    said.extend(ours.into_iter().map(|entry| (entry.key, entry.revision)));
                }
            }
        }
        Ok(())
    }

    async fn look(
        &self,
        claims: &[(String, Claim)],
        lease: LeaseId,
    ) -> std::result::Result<(), (String, Error)> {
        let any = |error| (claims[0].0.clone(), error);
        let (all, _) = list_all(&*self.store, &keys::all_drives()).await.map_err(any)?;
        let of = |entry: &Entry| keys::parse_drive_claim(&entry.key);
        let is_ours = |entry: &Entry| entry.lease == Some(lease);
        for (drive, _) in claims {
            let same = || {
                let same = all.iter().filter_map(|entry| Some((of(entry)?, entry)));
                same.filter(|((_, _, other), _)| other == drive)
            };
            let ours = same().find(|(_, entry)| is_ours(entry));
            let Some((_, ours)) = ours else {
                return Err((drive.clone(), Error::system("the lease has run out meanwhile")));
            };
            let theirs = same().filter(|(_, entry)| !is_ours(entry));
            if let Some(((user, owner, _), entry)) = theirs
                .min_by_key(|(_, entry)| entry.created)
                .filter(|it| it.1.created < ours.created)
            {
                return Err((drive.clone(), in_use(&user, owner, entry)));
            }
        }
        Ok(())
    }
}

/// Which VM uses it, and where.
fn place(entry: &Entry) -> String {
    let place = entry.json::<Claim>().map(|claim| format!(" ({} on {})", claim.vm, claim.host));
    place.unwrap_or_default()
}

fn in_use(user: &str, owner: Owner, entry: &Entry) -> Error {
    let (job, place, ttl) = (owner.job, place(entry), TTL.as_secs());
    Error::system(format!("it is in use by job {job} of {user}{place}")).help(format!(
        "wait for its end, and {ttl} s more if it was killed; or use another file; `mmp: no` \
         does not look"
    ))
}

fn held_by_earlier(path: &str, entry: &Entry) -> Error {
    let place = place(entry);
    Error::system(format!(
        "the persistent drive `{path}` is in use by an earlier start of this job{place}"
    ))
}

/// Keeps the lease alive; says so when it has run out, or is about to: guests must have
/// written all they have before another job may take the drives.
async fn keep(store: Arc<dyn Store>, lease: LeaseId, ttl: Duration, lost: mpsc::Sender<()>) {
    let patience = ttl * 2 / 3;
    let mut last = Instant::now();
    loop {
        sleep(ttl / 9).await;
        let asked = Instant::now();
        let left = patience.saturating_sub(last.elapsed());
        match timeout(left, store.keep_alive(lease)).await {
            // It lasts from some moment after the question.
            Ok(Ok(true)) => last = asked,
            Ok(Err(error)) if last.elapsed() < patience => tracing::info!("{}", error.report()),
            Ok(Ok(false) | Err(_)) | Err(_) => break,
        }
    }
    // At the end of the cluster nobody listens any more.
    let _ = lost.send(()).await;
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::store::embedded;

    const HOST: &str = "n1";

    fn wanted(path: &Path) -> [Wanted; 1] {
        [Wanted { path: path.into(), vm: "vm0".into(), host: HOST.into(), alone: true }]
    }

    async fn claims(store: &Arc<dyn Store>, user: &str, job: u32) -> Claims {
        Claims::new(store.clone(), user, Owner::local(job)).await.unwrap()
    }

    async fn take(claims: &mut Claims, path: &Path) -> Result<()> {
        match claims.take(&wanted(path), HOST).await? {
            Asked::Taken => Ok(()),
            Asked::Held(why) => panic!("{why:?}"),
        }
    }

    async fn setting() -> (tempfile::TempDir, Arc<dyn Store>, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let store = embedded::open(&dir.path().join("store")).await.unwrap();
        let drive = dir.path().join("drive");
        File::create(&drive).unwrap();
        (dir, Arc::new(store), drive)
    }

    #[tokio::test]
    async fn a_drive_is_one_jobs_until_it_is_given_back() {
        let (dir, store, drive) = setting().await;
        let mut first = claims(&store, "ada", 1).await;
        take(&mut first, &drive).await.unwrap();
        take(&mut first, &drive).await.unwrap();
        // By another name, too.
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&drive, &link).unwrap();
        let mut second = claims(&store, "bob", 1).await;
        let report = take(&mut second, &link).await.unwrap_err().report();
        assert!(report.contains("`\n") || report.contains("link`"), "{report}");
        assert!(report.contains("in use by job 1 of ada (vm0 on n1)"), "{report}");
        // Who was refused is no hindrance.
        let (entries, _) = list_all(&*store, &keys::all_drives()).await.unwrap();
        assert!(!entries.is_empty());
        assert!(entries.iter().all(|it| it.key.contains("/ada/l1/")), "{entries:?}");
        assert!(!entries.iter().any(|it| it.key.contains("/l1/drive")), "{entries:?}");
        first.release().await;
        take(&mut second, &link).await.unwrap();
    }

    #[tokio::test]
    async fn two_names_of_a_file_are_one_drive_within_a_cluster_too() {
        let (dir, store, drive) = setting().await;
        let second = dir.path().join("second");
        std::fs::hard_link(&drive, &second).unwrap();
        let both = |alone: bool| {
            let of = |(vm, path): (&str, &PathBuf)| Wanted {
                path: path.clone(),
                vm: vm.into(),
                host: HOST.into(),
                alone,
            };
            [("vm0", &drive), ("vm1", &second)].map(of)
        };
        let mut claims = claims(&store, "ada", 1).await;
        let report = claims.take(&both(true), HOST).await.unwrap_err().report();
        assert!(report.contains("vm1 would write to `"), "{report}");
        assert!(report.contains("/second`, the same file as `"), "{report}");
        assert!(report.contains("/drive` of vm0\n"), "{report}");
        // One after the other, as tasks of a step come.
        let [first, next] = both(true);
        assert!(matches!(claims.take(&[first], HOST).await.unwrap(), Asked::Taken));
        claims.take(&[next], HOST).await.unwrap_err();

        // Guests that know how to share it may.
        let (_other_dir, store, _) = setting().await;
        let mut sharing = super::tests::claims(&store, "ada", 1).await;
        assert!(matches!(sharing.take(&both(false), HOST).await.unwrap(), Asked::Taken));
        sharing.lock(&both(false)).unwrap();
        // By any of its names it is another's.
        let mut other = super::tests::claims(&store, "bob", 2).await;
        take(&mut other, &second).await.unwrap_err();
    }

    #[tokio::test]
    async fn who_waits_for_a_drive_stays_the_first_until_it_is_let_in() {
        let (_temp, store, _) = setting().await;
        let mut gate = Gate::default();
        assert_eq!(gate.keep("none", false), Some("none"));
        assert_eq!((gate.keep("a", true), gate.keep("b", true)), (None, None));
        assert_eq!(gate.admit(), None, "there is no store yet");
        gate.open(store, "alice", Owner::local(1)).await.unwrap();
        assert_eq!(gate.admit(), Some("a"));
        // Whoever let it in was interrupted.
        assert_eq!(gate.admit(), Some("a"));
        gate.admitted();
        assert_eq!(gate.admit(), Some("b"));
    }

    #[tokio::test]
    async fn a_job_that_comes_again_waits_for_what_its_earlier_start_has() {
        let (_temp, store, drive) = setting().await;
        let (owner, ttl) = (Owner::local(1), Duration::from_secs(3));
        let mut earlier = Claims::with(store.clone(), "ada", owner, ttl).await.unwrap();
        take(&mut earlier, &drive).await.unwrap();
        // Its launcher has died, and nobody knows of its guests.
        earlier.keeper.abort();
        super::super::cleanup::forget(&*store, "ada", owner).await.unwrap();

        let mut gate = Gate::default();
        assert_eq!(gate.keep("vm0", true), None);
        gate.open(store.clone(), "ada", owner).await.unwrap();
        let mut asked = 0;
        loop {
            assert_eq!(gate.admit(), Some("vm0"));
            let Some(why) = gate.take(&wanted(&drive), HOST).await.unwrap() else { break };
            let report = why.report();
            assert!(report.contains("/drive` is in use by an earlier start of"), "{report}");
            assert!(report.contains("this job (vm0 on n1)"), "{report}");
            assert_eq!(gate.admit(), None);
            tokio::time::sleep_until(gate.again().unwrap()).await;
            asked += 1;
        }
        assert!(asked > 0);
        // Now it is this start's, and asking again changes nothing.
        assert!(gate.take(&wanted(&drive), HOST).await.unwrap().is_none());
        let (entries, _) = list_all(&*store, &keys::all_drives()).await.unwrap();
        let lease = gate.claims.unwrap().lease;
        assert!(entries.iter().all(|entry| entry.lease == Some(lease)), "{entries:?}");
    }

    #[tokio::test]
    async fn an_earlier_start_that_lives_is_not_waited_for_without_end() {
        let (_temp, store, drive) = setting().await;
        let mut earlier = claims(&store, "ada", 1).await;
        take(&mut earlier, &drive).await.unwrap();
        let mut gate = Gate::<()> { patience: Duration::ZERO, ..Gate::default() };
        gate.open(store.clone(), "ada", Owner::local(1)).await.unwrap();
        let report = gate.take(&wanted(&drive), HOST).await.unwrap_err().report();
        assert!(report.contains("earlier start of this job (vm0 on n1), and has"), "{report}");
        assert!(report.contains("its launcher lives"), "{report}");
    }

    #[tokio::test]
    async fn what_was_said_before_an_interruption_is_ours() {
        let (_temp, store, drive) = setting().await;
        let mut claims = claims(&store, "ada", 1).await;
        take(&mut claims, &drive).await.unwrap();
        claims.held.clear();
        take(&mut claims, &drive).await.unwrap();
    }

    #[tokio::test]
    async fn of_many_at_once_one_has_it() {
        let (_dir, store, drive) = setting().await;
        let tasks = (0..20).map(|job| {
            let (store, drive) = (store.clone(), drive.clone());
            tokio::spawn(async move {
                let mut claims = claims(&store, "ada", job).await;
                take(&mut claims, &drive).await.map(|()| claims)
            })
        });
        let outcomes = futures_util::future::join_all(tasks).await;
        assert_eq!(outcomes.iter().filter(|it| it.as_ref().unwrap().is_ok()).count(), 1);
    }

    #[tokio::test]
    async fn who_stands_still_for_too_long_is_told_and_others_go_on() {
        let (_dir, store, drive) = setting().await;
        let ttl = Duration::from_secs(1);
        let mut first = Claims::with(store.clone(), "ada", Owner::local(1), ttl).await.unwrap();
        take(&mut first, &drive).await.unwrap();
        sleep(ttl * 2).await;
        let mut second = claims(&store, "bob", 2).await;
        take(&mut second, &drive).await.unwrap_err();
        store.revoke(first.lease).await.unwrap();
        take(&mut second, &drive).await.unwrap();
        assert!(first.lost().await.to_string().contains("have run out"));
    }

    #[tokio::test]
    async fn between_stores_the_file_is_locked() {
        let (_dir, store, drive) = setting().await;
        let (_other_dir, other_store, _) = setting().await;
        let (mut first, mut second) =
            (claims(&store, "ada", 1).await, claims(&other_store, "bob", 1).await);
        first.lock(&wanted(&drive)).unwrap();
        let report = second.lock(&wanted(&drive)).unwrap_err().report();
        assert!(report.contains("somebody else's cluster"), "{report}");
        drop(first);
        second.lock(&wanted(&drive)).unwrap();
    }
}
