//! One VM's part of a checkpoint: its guest stands still, and what it is goes to files.
//!
//! The command takes part in it over the control connection, one step after the other, so that
//! all VMs stand still before the first byte of any is written:
//!
//! ```text
//! → {"step":"pause"}   ← {"return":null}       the guest stands still
//! → {"step":"write"}   ← progress … a SavedVm  memory and disk, at the same time
//! → {"step":"keep"}    ← {"return":null}       the files are no longer ours to remove
//! → {"step":"resume"}  or  {"step":"quit"}     ← {"return":null}
//! ```
//!
//! Each step is answered, also one that the next one interrupts. While the command waits for
//! other VMs it says `{"step":"wait"}` now and then, which has no answer. Where the connection
//! ends before the last step, or nothing is said for long, whoever died or was stopped, the
//! guest goes on here, by itself; and what was written is removed, unless it was to be kept. Should this process die,
//! so does QEMU.

use std::convert::Infallible;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::devices::Node;
use super::qmp;
use super::save::{FIRST_LOOK, LOOKS, Progress};
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::{SavedVm, Stored};
use crate::model::job::{VmState, VmStatus};
use crate::model::vm::{MountKind, Seed, VmSpec};

mod awake;
mod machine;
mod pack;
mod restore;

use pack::Made;
pub use restore::{Restored, bring, check_shape, load};

/// What QEMU calls the descriptor.
const FD: &str = "checkpoint";
/// More than any disk takes: QEMU would spare a network that is not there.
const FAST: u64 = 1 << 40;
/// How long QEMU may take to stop writing when nobody reads any more.
const GIVE_UP: Duration = Duration::from_secs(30);
/// How long it is waited for that what was written is gone again.
const REMOVE: Duration = Duration::from_secs(5);
/// How often a guest is told to go on that does not, and how long after.
const TRIES: (u32, Duration) = (50, Duration::from_millis(200));

/// What a guest that has stood still is told the time after.
const LATE: Duration = Duration::from_secs(1);

/// What the command says next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    Pause,
    Write,
    /// The others are not as far yet.
    Wait,
    Keep,
    Resume,
    Quit,
}

/// A VM that may be written down.
#[derive(Clone, Debug)]
pub struct Subject {
    pub spec: Arc<VmSpec>,
    /// The guest's NUMA nodes.
    nodes: Arc<Vec<Node>>,
    /// Whether its guest stands still for a checkpoint: nobody else lets it go on.
    held: Arc<AtomicBool>,
    /// Of whoever takes one: there is one at a time.
    claimed: Arc<Mutex<()>>,
}

/// The right to take a checkpoint of a VM.
pub type Claim = OwnedMutexGuard<()>;

impl Subject {
    pub fn new(spec: &VmSpec, nodes: &[Node]) -> Self {
        let nodes = Arc::new(nodes.to_vec());
        Self { spec: Arc::new(spec.clone()), nodes, held: Arc::default(), claimed: Arc::default() }
    }

    /// # Errors
    /// As long as a checkpoint is being taken.
    pub fn check_free(&self) -> Result<()> {
        if !self.held.load(Ordering::Relaxed) {
            return Ok(());
        }
        let name = self.spec.name();
        Err(Error::system(format!("a checkpoint of {name} is being taken"))
            .help("wait until it is there, or interrupt `pavo ckpt`"))
    }

    /// # Errors
    /// When another one takes a checkpoint. Two that waited for each other would for ever.
    pub fn claim(&self) -> Result<Claim> {
        Arc::clone(&self.claimed).try_lock_owned().map_err(|_| {
            Error::system("another checkpoint of it is being taken")
                .help("wait until that is there")
        })
    }

    /// Takes part in a checkpoint, for as long as `turn` is no other's.
    ///
    /// # Errors
    /// When this VM cannot be written down, with the reason.
    pub async fn begin(
        &self,
        dir: &Path,
        qmp: qmp::Client,
        status: watch::Receiver<VmStatus>,
        turn: (Claim, OwnedMutexGuard<u64>),
    ) -> Result<Held> {
        self.check_extras()?;
        // A file server that does not answer keeps only us waiting.
        let there = dir.to_owned();
        let there = tokio::task::spawn_blocking(move || there.is_dir()).await;
        if !there.unwrap_or_default() {
            let text = format!("its host does not see the folder `{}`", dir.display());
            return Err(Error::usage(text).help("name one that the hosts of all VMs share"));
        }
        match status.borrow().state {
            state if state.is_up() || state == VmState::Paused => {}
            VmState::Off => {
                return Err(Error::usage("its guest is off: nothing of it could go on")
                    .help("start it (`pavo reset VM`), or save its disk (`pavo save VM`)"));
            }
            state => {
                return Err(
                    Error::usage(format!("it is {state}")).help("wait until it runs: `pavo wait`")
                );
            }
        }
        blocked(&qmp).await?;
        other_media(&self.spec, &qmp).await?;
        let dir = dir.to_owned();
        let (subject, files, turn) = (self.clone(), Arc::default(), Some(turn));
        Ok(Held {
            subject,
            dir,
            qmp,
            status,
            stopped: None,
            paused: false,
            wrote: false,
            files,
            turn,
        })
    }

    /// What is outside of the VM, and would not be what the guest remembers.
    fn check_extras(&self) -> Result<()> {
        let spec = &self.spec;
        if !spec.extras.drives.is_empty() {
            let error = format!(
                "{}: their data stays where it is and changes, and what a guest remembers of it \
                 does not",
                spec.setting("persistent-drives")
            );
            return Err(Error::usage(error).help(
                "save its disk instead (`pavo save`), or use a template without such drives",
            ));
        }
        let fs = spec.extras.mounts.iter().find(|mount| mount.kind == MountKind::VirtioFs);
        if let Some(mount) = fs {
            let (setting, tag) = (spec.setting("mount-points"), mount.tag.escape_debug());
            return Err(Error::usage(format!(
                "{setting}: QEMU cannot write down `{tag}`, a virtio-fs"
            ))
            .help("use `type: virtio-9p` for it, not mounted while the checkpoint is taken"));
        }
        Ok(())
    }
}

/// Refuses disks that are written to and not in the VM's folder: `custom-args` may have any.
async fn other_media(spec: &VmSpec, qmp: &qmp::Client) -> Result<()> {
    let answer = qmp.call("query-block", json!({})).await;
    let answer = answer.while_doing(|| "asking QEMU for its disks".into())?;
    let Some(file) = other_medium(&answer, &spec.dir) else { return Ok(()) };
    let error = format!(
        "{}: what is written to `{}` stays where it is and changes, and what a guest remembers of \
         it does not",
        spec.setting("custom-args"),
        file.escape_debug()
    );
    Err(Error::usage(error).help("attach it read-only, or use a template without it"))
}

fn other_medium<'a>(blocks: &'a Value, dir: &Path) -> Option<&'a str> {
    let media = blocks.as_array().into_iter().flatten().map(|block| &block["inserted"]);
    let written = media.filter(|medium| medium["ro"] == false);
    let dir = dir.to_string_lossy().into_owned() + "/";
    written
        .map(|medium| medium["file"].as_str().unwrap_or("a disk without a name"))
        // A name that QEMU has made of options may hold the path somewhere.
        .find(|file| !file.contains(&dir))
}

/// Refuses what QEMU knows that it cannot write down: a 9p that is mounted in the guest.
async fn blocked(qmp: &qmp::Client) -> Result<()> {
    let answer = qmp.call("query-migrate", json!({})).await;
    let answer = answer.while_doing(|| "asking QEMU whether it could be written".into())?;
    let reasons = answer["blocked-reasons"].as_array().into_iter().flatten();
    let reasons: Vec<&str> = reasons.filter_map(Value::as_str).collect();
    if reasons.is_empty() {
        return Ok(());
    }
    let error = Error::usage("QEMU cannot write its guest down now").because(reasons.join("; "));
    Err(match reasons.iter().any(|reason| reason.contains("is mounted")) {
        true => error.help("unmount it in the guest meanwhile: `pavo run -w VM umount FOLDER`"),
        false => error,
    })
}

/// Tells now and then how far it is: who hears nothing thinks that we are gone.
async fn report(progress: &watch::Sender<Progress>, tell: &mpsc::Sender<Progress>) -> Infallible {
    loop {
        sleep(LOOKS).await;
        let now = *progress.borrow();
        // The connection is watched by who listens.
        let _ = tell.send(now).await;
    }
}

/// A VM in the middle of a checkpoint.
#[derive(Debug)]
pub struct Held {
    subject: Subject,
    dir: PathBuf,
    qmp: qmp::Client,
    status: watch::Receiver<VmStatus>,
    /// Whether its guest stands still because of us, and since when.
    stopped: Option<Instant>,
    /// Whether it did before.
    paused: bool,
    /// Whether QEMU has begun to write it: then it has let its disks go.
    wrote: bool,
    /// What we have made; removed unless it is kept.
    files: Arc<Made>,
    turn: Option<(Claim, OwnedMutexGuard<u64>)>,
}

impl Held {
    async fn call(&self, command: &str, arguments: Value) -> Result<Value> {
        let done = self.qmp.call(command, arguments).await;
        done.while_doing(|| format!("telling QEMU `{command}`"))
    }

    /// Lets the guest stand still; what it has written is in its disk's file then.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn pause(&mut self) -> Result<()> {
        self.subject.held.store(true, Ordering::Relaxed);
        self.paused = self.status.borrow().state == VmState::Paused;
        self.stopped = Some(Instant::now());
        self.call("stop", json!({})).await?;
        let moment = Duration::from_secs(5);
        let stands = timeout(moment, self.status.wait_for(|now| !now.state.is_up())).await;
        match stands {
            Ok(Ok(now)) if now.state == VmState::Paused => Ok(()),
            _ => Err(Error::system("its guest does not stand still")),
        }
    }

    /// Writes memory and disk, telling how far it is.
    ///
    /// # Errors
    /// When there is no room, or the guest was let go on meanwhile.
    pub async fn write(&mut self, tell: mpsc::Sender<Progress>) -> Result<SavedVm> {
        if self.stopped.is_none() {
            return Err(Error::bug("a guest is to be written that does not stand still"));
        }
        let spec = self.subject.spec.clone();
        self.status.borrow_and_update();
        self.wrote = true;
        let machine = machine::of(&self.qmp, &spec, &self.subject.nodes).await?;
        let name = |what: &str| format!("{}.{what}.zst", spec.name());
        let (dir, files) = (&self.dir, &self.files);
        let file = async |has: bool, file: &str, what: &str| {
            if !has {
                return Ok(None);
            }
            let path = spec.dir.join(file);
            let from = File::open(&path);
            let from = from.while_doing(|| format!("opening `{}`", path.display()))?;
            pack::pack(from, dir, name(what), files).await.map(Some)
        };
        let progress = watch::Sender::new(Progress::default());
        let all = async {
            tokio::try_join!(
                self.memory(name("memory"), &progress),
                file(spec.disk.is_some(), "disk.qcow2", "disk"),
                file(spec.seed.is_some(), "seed.img", "seed"),
            )
        };
        let (memory, disk, seed) = tokio::select! {
            written = all => written?,
            never = report(&progress, &tell) => match never {},
        };
        if self.status.has_changed().unwrap_or(true) {
            return Err(Error::system("its guest did not stand still while it was written"));
        }
        let seed_bytes = spec.dir.join("seed.img").metadata().map_or(0, |about| about.len());
        // What it was told at its first boot is in its seed, which is written down, too.
        let seed_spec = spec.seed.clone().map(|seed| Seed { user_data: None, ..seed });
        let spec = VmSpec { restore: None, seed: seed_spec, ..VmSpec::clone(&spec) };
        let (image, paused) = (None, self.paused);
        Ok(SavedVm { spec, image, paused, machine, memory, disk, seed, seed_bytes })
    }

    async fn memory(&self, name: String, progress: &watch::Sender<Progress>) -> Result<Stored> {
        let (from, to) = pack::pipe()?;
        let packed = pack::pack(from, &self.dir, name, &self.files);
        let handed = self.qmp.send_descriptor(FD, to).await;
        handed.while_doing(|| "handing QEMU a pipe".into())?;
        let fast = json!({ "max-bandwidth": FAST });
        let begun = async {
            self.call("migrate-set-parameters", fast).await?;
            self.call("migrate", json!({ "uri": format!("fd:{FD}") })).await
        };
        if let Err(error) = begun.await {
            // It takes the descriptor only if it begins; the first error says more.
            let _ = self.call("closefd", json!({ "fdname": FD })).await;
            return Err(error);
        }
        let followed = self.follow(progress);
        tokio::pin!(packed, followed);
        tokio::select! {
            stored = &mut packed => {
                // Where it has failed, that is why QEMU does.
                let stored = stored?;
                followed.await?;
                Ok(stored)
            }
            said = &mut followed => match said {
                Ok(()) => packed.await,
                // It may have failed because the file has.
                Err(error) => Err(packed.await.err().unwrap_or(error)),
            }
        }
    }

    /// Until QEMU has written all.
    async fn follow(&self, progress: &watch::Sender<Progress>) -> Result<()> {
        let mut pause = FIRST_LOOK;
        loop {
            let now = self.call("query-migrate", json!({})).await?;
            match now["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let error = Error::system("QEMU could not write its guest's memory");
                    return Err(match now["error-desc"].as_str() {
                        Some(why) => error.because(why),
                        None => error,
                    });
                }
                _ => {}
            }
            let ram = |what: &str| now["ram"][what].as_u64().unwrap_or(0);
            let total = ram("total");
            progress.send_replace(Progress { done: total.saturating_sub(ram("remaining")), total });
            sleep(pause).await;
            pause = (pause * 2).min(LOOKS);
        }
    }

    /// What was written stays, whatever happens.
    pub fn keep(&mut self) {
        self.files.keep();
    }

    /// Whether its guest has stood still for so long that it does not know the time.
    pub fn is_late(&self) -> bool {
        let late = |since: Instant| since.elapsed() >= LATE;
        !self.paused && self.stopped.is_some_and(late)
    }

    /// Ends our part: the guest goes on if it did before, and what is not to be kept is removed.
    ///
    /// # Errors
    /// When QEMU does not let it go on.
    pub async fn release(mut self) -> Result<()> {
        // Nothing of this needs the folder, whose file server may not answer any more.
        let gone_on = self.go_on().await;
        let (files, claim) = (self.files.clone(), self.turn.take().map(|(claim, _)| claim));
        let removed = tokio::task::spawn_blocking(move || {
            files.remove();
            // They are removed by name: until then nobody else writes there.
            drop(claim);
        });
        let _ = timeout(REMOVE, removed).await;
        gone_on
    }

    async fn go_on(&mut self) -> Result<()> {
        if self.stopped.take().is_none() {
            return Ok(());
        }
        // Nobody reads what QEMU still writes.
        let _ = timeout(GIVE_UP, self.give_up()).await;
        if self.paused {
            let woken = match self.wrote {
                true => awake::disks(&self.qmp, &self.subject.spec).await,
                false => Ok(()),
            };
            self.subject.held.store(false, Ordering::Relaxed);
            return woken;
        }
        let mut outcome = Ok(());
        for _ in 0..TRIES.0 {
            match self.qmp.execute(qapi::qmp::cont {}).await {
                Ok(_) => {
                    outcome = Ok(());
                    break;
                }
                // It does not go on, and never will.
                Err(failure @ qmp::Failure::Lost) => {
                    outcome = Err(failure);
                    break;
                }
                Err(failure) => outcome = Err(failure),
            }
            sleep(TRIES.1).await;
        }
        self.subject.held.store(false, Ordering::Relaxed);
        outcome.while_doing(|| "letting its guest go on".into())
    }

    async fn give_up(&self) {
        let busy = |status: &str| {
            ["setup", "active", "device", "cancelling", "pre-switchover"].contains(&status)
        };
        let mut told = false;
        while let Ok(now) = self.call("query-migrate", json!({})).await {
            if !now["status"].as_str().is_some_and(busy) {
                return;
            }
            if !told {
                told = self.call("migrate_cancel", json!({})).await.is_ok();
            }
            sleep(FIRST_LOOK).await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Only where the VM ends with us.
        self.subject.held.store(false, Ordering::Relaxed);
    }
}
