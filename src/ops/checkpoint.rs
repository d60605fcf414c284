//! `ckpt`: a whole cluster, written down in one folder at one moment.
//!
//! The VMs' processes write, each its own VM; the command takes them through it together (see
//! [`vm::checkpoint`](crate::vm::checkpoint)) and writes the manifest last. Whatever fails or
//! dies on the way, the guests go on, and a folder without a manifest is no checkpoint.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::elsewhere;
use super::reach::Pass;
use crate::error::{Context, Error, Kind, Result};
use crate::host::file::write_atomically;
use crate::host::limits::raise_open_files;
use crate::image::folder;
use crate::model::checkpoint::{
    Layer, MANIFEST, MAX_MANIFEST, Manifest, SNAPSHOT, SavedVm, Stored, UNFINISHED,
};
use crate::model::job::{JobRecord, VmRecord};
use crate::model::vm::HostKey;
use crate::model::vmset::fold;
use crate::store::Store;
use crate::vm::checkpoint::Step;
use crate::vm::control::Participant;
use crate::vm::save::Progress;

/// How many are asked at once whether they can take part.
const AT_ONCE: usize = 64;
/// How long a file that another host has written may take until it is seen here.
const SEEN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(200));

/// What is to be written where.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// Absolute; it is not there, or empty.
    pub dir: &'a Path,
    /// Whether the cluster goes on afterwards, or ends.
    pub keep_running: bool,
    /// A file that is there once the job's script has begun, if it is in a guest; what the
    /// script is called there, and `.begun`.
    pub script: Option<&'a Path>,
    /// The user's home.
    pub home: &'a Path,
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub enum Phase {
    /// The VMs are asked, and stand still one by one.
    Pausing,
    Writing(Progress),
    /// It is there, of so many bytes. The cluster is still as it was; with its end its shell
    /// ends, and who runs in it.
    Written(u64),
}

/// Takes a checkpoint of a running cluster, until `ended` says that nobody wants it.
///
/// # Errors
/// When a VM cannot be written down, or there is no room. The cluster goes on then, or the error
/// names what does not, and nothing is left of the checkpoint. What goes wrong once it is there
/// is returned.
pub async fn take(
    store: Option<&dyn Store>,
    job: &JobRecord,
    order: Order<'_>,
    told: &dyn Fn(Phase),
    ended: impl Future<Output = Error>,
) -> Result<Vec<Error>> {
    raise_open_files();
    let key = elsewhere::ssh_files(store, job, order.home).await?.read_key()?;
    let folder = Folder::make(order.dir)?;
    let mut parts = Vec::new();
    let taken = tokio::select! {
        taken = write(store, job, (&folder, order.script), key, &mut parts, told) => taken,
        error = ended => Err(error),
    };
    let bytes = match taken {
        Ok(bytes) => bytes,
        Err(error) => {
            return Err(failed(error, &finish(&mut parts, Step::Resume).await, "cluster"));
        }
    };
    folder.keep();
    told(Phase::Written(bytes));
    let last = if order.keep_running { Step::Resume } else { Step::Quit };
    let troubles = finish(&mut parts, last).await;
    Ok(troubles.into_iter().map(|(_, error)| error).collect())
}

/// There is no checkpoint, and perhaps some VMs were not let go on.
pub(super) fn failed(error: Error, troubles: &[(u32, Error)], what: &str) -> Error {
    let Some((_, first)) = troubles.first() else {
        return match error.kind() {
            Kind::Interrupted => error.help(format!("nothing was written; the {what} goes on")),
            _ => error,
        };
    };
    let vms = fold(&troubles.iter().map(|(rank, _)| *rank).collect::<Vec<_>>());
    // One line: the chain below is that of why there is no checkpoint.
    let why = first.report().lines().filter(|line| !line.starts_with("  help: ")).fold(
        String::new(),
        |text, line| match line.trim_start().strip_prefix("because: ") {
            Some(why) => format!("{text}: {why}"),
            None => line.trim_start_matches("error: ").into(),
        },
    );
    Error::new(error.kind(), format!("{vms} may stand still ({why})"))
        .because(error)
        .help(format!("see `pavo status`; let it go on: `pavo resume {vms}`"))
}

/// A VM that takes part.
pub(super) struct Part<'a> {
    pub vm: &'a VmRecord,
    pub process: Participant,
}

/// From the first question to the manifest.
async fn write<'a>(
    store: Option<&dyn Store>,
    job: &'a JobRecord,
    (folder, script): (&Folder, Option<&Path>),
    key: HostKey,
    parts: &mut Vec<Part<'a>>,
    told: &dyn Fn(Phase),
) -> Result<u64> {
    let images = images(&job.vms)?;
    let (taken, vms) = write_vms(store, job, &job.vms, folder, parts, told).await?;
    let bytes = vms.iter().flat_map(files).map(|stored| stored.bytes).sum();
    let manifest = Manifest {
        version: Manifest::VERSION,
        pavo: env!("CARGO_PKG_VERSION").into(),
        taken,
        name: job.name.clone(),
        definition: job.definition.clone(),
        key,
        script: script.filter(|path| path.exists()).and_then(name_of),
        vms,
        images,
    };
    let text = text(MANIFEST, &manifest)?;
    keep(parts).await?;
    write_atomically(&folder.path.join(MANIFEST), &text, 0o600)?;
    Ok(bytes)
}

/// Writes some VMs of one moment, which is returned. What they have written is not kept yet.
pub(super) async fn write_vms<'a>(
    store: Option<&dyn Store>,
    job: &'a JobRecord,
    vms: &'a [VmRecord],
    folder: &Folder,
    parts: &mut Vec<Part<'a>>,
    told: &dyn Fn(Phase),
) -> Result<(u64, Vec<SavedVm>)> {
    told(Phase::Pausing);
    let pass = &Pass::default();
    let dir = folder.path.as_path();
    let begin = |vm: &'a VmRecord| async move {
        let begun =
            async { pass.reach_vm(store, job, vm).await?.connect().await?.checkpoint(dir).await };
        let process = begun.await.while_doing(|| doing("preparing the checkpoint of", vm))?;
        Ok::<_, Error>(Part { vm, process })
    };
    let mut begun = stream::iter(vms.iter().map(begin)).buffered(AT_ONCE);
    while let Some(part) = begun.try_next().await? {
        parts.push(part);
    }
    all(parts, Step::Pause, "pausing").await?;
    let taken = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut saved = write_all(parts, told).await?;
    for (saved, vm) in saved.iter_mut().zip(vms) {
        saved.image.clone_from(&vm.image);
        for stored in files(saved) {
            seen(dir, stored).await.while_doing(|| doing("writing", vm))?;
        }
    }
    Ok((taken, saved))
}

fn name_of(begun: &Path) -> Option<String> {
    begun.file_stem()?.to_str().map(str::to_owned)
}

/// From now on what was written stays, as far as it is for the VMs.
pub(super) async fn keep(parts: &mut [Part<'_>]) -> Result<()> {
    all(parts, Step::Keep, "keeping the checkpoint of").await
}

/// # Errors
/// When it would be longer than what is read.
pub(super) fn text(file: &str, manifest: &impl Serialize) -> Result<Vec<u8>> {
    let text = serde_json::to_vec(manifest).expect("a manifest is always valid JSON");
    if text.len() as u64 <= MAX_MANIFEST {
        return Ok(text);
    }
    let (mib, most) = (text.len().div_ceil(1 << 20), MAX_MANIFEST >> 20);
    let error = format!("`{file}` would have {mib} MiB, and no more than {most} are read");
    Err(Error::usage(error).help("split the cluster, or give its templates less to say"))
}

/// The images that are told apart by more than their names, as they are now.
pub(super) fn images(vms: &[VmRecord]) -> Result<BTreeMap<String, Vec<Layer>>> {
    let mut images = BTreeMap::new();
    for image in vms.iter().filter_map(|vm| vm.image.as_ref()) {
        if image.starts_with('/') && !images.contains_key(image) {
            images.insert(image.clone(), folder::layers(Path::new(image))?);
        }
    }
    Ok(images)
}

fn doing(what: &str, vm: &VmRecord) -> String {
    format!("{what} vm{} on `{}`", vm.rank, vm.host)
}

pub(super) fn files(vm: &SavedVm) -> impl Iterator<Item = &Stored> {
    [Some(&vm.memory), vm.disk.as_ref(), vm.seed.as_ref()].into_iter().flatten()
}

/// Lets all do the same at the same time; the first that cannot is the error.
async fn all(parts: &mut [Part<'_>], step: Step, what: &str) -> Result<()> {
    let steps = parts.iter_mut().map(|Part { vm, process }| async move {
        process.step(step).await.while_doing(|| doing(what, vm))
    });
    join_all(steps).await.into_iter().collect()
}

async fn write_all(parts: &mut [Part<'_>], told: &dyn Fn(Phase)) -> Result<Vec<SavedVm>> {
    let far = RefCell::new(vec![Progress::default(); parts.len()]);
    let writes = parts.iter_mut().enumerate().map(|(index, Part { vm, process })| {
        let far = &far;
        let mut one = move |progress| {
            let mut far = far.borrow_mut();
            far[index] = progress;
            let (done, total) = (far.iter().map(|it| it.done), far.iter().map(|it| it.total));
            told(Phase::Writing(Progress { done: done.sum(), total: total.sum() }));
        };
        async move { process.write(&mut one).await.while_doing(|| doing("writing", vm)) }
    });
    // One that fails is the end of all: the others need not be waited for.
    futures_util::future::try_join_all(writes).await
}

/// Waits until a file is seen here as it was written there.
async fn seen(dir: &Path, stored: &Stored) -> Result<()> {
    let (path, end) = (dir.join(&stored.name), Instant::now() + SEEN.0);
    loop {
        match fs::metadata(&path) {
            Ok(about) if about.len() == stored.bytes => return Ok(()),
            _ if Instant::now() < end => sleep(SEEN.1).await,
            _ => {
                let path = path.display();
                return Err(Error::system(format!("`{path}` is written there, and not seen here"))
                    .help("name a folder that this host and those of all VMs share"));
            }
        }
    }
}

/// The last step of all VMs; what goes wrong.
pub(super) async fn finish(parts: &mut [Part<'_>], last: Step) -> Vec<(u32, Error)> {
    let what = if last == Step::Quit { "ending" } else { "resuming" };
    let steps = parts.iter_mut().map(|Part { vm, process }| async move {
        let done = process.step(last).await.while_doing(|| doing(what, vm));
        let help = match last {
            Step::Quit => "end what is left: `pavo cancel`".into(),
            _ => format!("see `pavo status`; let it go on: `pavo resume vm{}`", vm.rank),
        };
        done.err().map(|error| (vm.rank, error.help(help)))
    });
    join_all(steps).await.into_iter().flatten().collect()
}

/// Removes a checkpoint, or what there is of one: from the first moment on it is none.
///
/// # Errors
/// When not all of it can be removed. What is no part of it stays.
pub fn remove(path: &Path) -> Result<()> {
    let doing = || format!("removing the checkpoint `{}`", path.display());
    match fs::remove_file(path.join(MANIFEST)) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).while_doing(doing),
        _ => {}
    }
    remove_files(path);
    fs::remove_dir(path).while_doing(doing)
}

/// All but the manifest. Trouble with that shows when the folder is to be removed.
fn remove_files(path: &Path) {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_ours));
    for entry in ours {
        let _ = fs::remove_file(entry.path());
    }
    let _ = fs::remove_file(path.join(UNFINISHED));
}

/// The folder, which is gone again unless it is kept.
pub(super) struct Folder {
    pub path: PathBuf,
    /// Its mode, if it was there, empty.
    was_there: Option<u32>,
    kept: bool,
}

impl Folder {
    pub fn make(path: &Path) -> Result<Self> {
        let doing = || format!("creating `{}`", path.display());
        let was_there = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => None,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                check_empty(path).while_doing(doing)?;
                Some(make_ours(path).while_doing(doing)?)
            }
            Err(error) => return Err(error).while_doing(doing),
        };
        let folder = Self { path: path.into(), was_there, kept: false };
        // Of two at once one is the first.
        let marker = path.join(UNFINISHED);
        let marked = File::options().write(true).create_new(true).mode(0o600).open(&marker);
        if let Err(error) = marked {
            // Then it is the other's.
            std::mem::forget(folder);
            if error.kind() == ErrorKind::AlreadyExists {
                check_empty(path).while_doing(doing)?;
            }
            return Err(error).while_doing(doing);
        }
        Ok(folder)
    }

    /// It is whole now.
    pub fn keep(mut self) {
        self.kept = true;
        // With a manifest it means nothing.
        let _ = fs::remove_file(self.path.join(UNFINISHED));
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Trouble with that says less than what went wrong. First what makes it one: it may be
        // there although it could not be synced.
        let _ = fs::remove_file(self.path.join(MANIFEST));
        let _ = fs::remove_file(self.path.join(SNAPSHOT));
        remove_files(&self.path);
        let _ = match self.was_there {
            None => fs::remove_dir(&self.path),
            Some(mode) => fs::set_permissions(&self.path, Permissions::from_mode(mode)),
        };
    }
}

/// Closes a folder to others, who could change what is written there; returns its mode.
fn make_ours(path: &Path) -> Result<u32> {
    let about = fs::metadata(path).while_doing(|| "looking at it".into())?;
    let us = nix::unistd::geteuid().as_raw();
    if about.uid() != us {
        return Err(Error::usage("it belongs to another user")
            .help("name a folder that is not there yet, or one of your own"));
    }
    let closed = fs::set_permissions(path, Permissions::from_mode(0o700));
    closed.while_doing(|| "closing it to others".into())?;
    Ok(about.mode() & 0o7777)
}

/// Whether a VM's process has made it: one that was killed could not remove it.
fn is_ours(name: &str) -> bool {
    name.starts_with("vm") && name.ends_with(".zst")
}

/// # Errors
/// When something is in it, with what it is.
fn check_empty(path: &Path) -> Result<()> {
    let mut entries = fs::read_dir(path).while_doing(|| "looking into it".into())?;
    if entries.next().is_none() {
        return Ok(());
    }
    let other = "name another folder, or remove this one";
    if path.join(MANIFEST).exists() {
        return Err(Error::usage("it is a checkpoint already").help(other));
    }
    if path.join(SNAPSHOT).exists() {
        return Err(Error::usage("it is a snapshot already").help(other));
    }
    if path.join(UNFINISHED).exists() {
        return Err(
            Error::usage("a checkpoint is being taken there, or one was interrupted").help(other)
        );
    }
    Err(Error::usage("something is in it").help(other))
}

#[cfg(test)]
mod tests;
