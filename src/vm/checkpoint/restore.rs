//! A VM that goes on from a checkpoint: its files, and its guest's memory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tokio::process::Child;
use tokio::time::sleep;

use super::super::devices::Node;
use super::super::qmp;
use super::super::save::{FIRST_LOOK, LOOKS};
use super::{FD, machine, pack};
use crate::error::{Context, Error, Result};
use crate::host::qcow2;
use crate::model::checkpoint::{Machine, Restore, Stored};
use crate::model::vm::VmSpec;

/// Tells the reading threads that nobody waits.
struct Wanted(Arc<AtomicBool>);

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// What is read once QEMU answers.
#[derive(Debug)]
pub struct Restored {
    /// As it was compared with what was written.
    memory: File,
    path: PathBuf,
    then: Machine,
}

/// # Errors
/// When this host would make another machine of it.
pub fn check_shape(restore: &Restore, cores: u32, nodes: &[Node]) -> Result<()> {
    machine::check_shape(cores, nodes, &restore.machine)
}

/// Checks all files of a VM, and makes its disk and seed in its directory, which exists.
///
/// # Errors
/// When a file is damaged, there is no room, or the host is none for it.
pub async fn bring(spec: &VmSpec, restore: &Restore, disk: &Path, seed: &Path) -> Result<Restored> {
    machine::check_host(spec, &restore.machine)?;
    let wanted = Arc::new(AtomicBool::new(true));
    let _wanted = Wanted(wanted.clone());
    let check = |stored: &Stored| {
        let (dir, stored, wanted) = (restore.dir.clone(), stored.clone(), wanted.clone());
        tokio::task::spawn_blocking(move || {
            pack::verify(&dir, &stored, &|| wanted.load(Ordering::Relaxed))
        })
    };
    let done = async |check: tokio::task::JoinHandle<Result<File>>| {
        check.await.while_doing(|| "checking the checkpoint".into())?
    };
    let memory = check(&restore.memory);
    let others = [(&restore.disk, disk), (&restore.seed, seed)];
    let others = others.map(|(stored, target)| {
        stored.as_ref().map(|stored| (check(stored), restore.dir.join(&stored.name), target))
    });
    for (check, path, target) in others.into_iter().flatten() {
        pack::unpack(done(check).await?, &path, target).await?;
    }
    if restore.disk.is_some() {
        qcow2::check_plain(disk)?;
    }
    let (memory, path) = (done(memory).await?, restore.dir.join(&restore.memory.name));
    Ok(Restored { memory, path, then: restore.machine.clone() })
}

/// Gives a QEMU that waits for it the guest's memory.
///
/// # Errors
/// When QEMU does not take it.
pub async fn load(qmp: &qmp::Client, restored: Restored) -> Result<()> {
    machine::check_qemu(qmp, &restored.then).await?;
    let (from, to) = pack::pipe()?;
    let mut unpacking = pack::unpack_to(restored.memory, to)?;
    let handed = qmp.send_descriptor(FD, from).await;
    handed.while_doing(|| "handing QEMU a pipe".into())?;
    let incoming = json!({ "uri": format!("fd:{FD}") });
    let begun = qmp.call("migrate-incoming", incoming).await;
    begun.while_doing(|| "telling QEMU `migrate-incoming`".into())?;
    let loaded = follow(qmp, &mut unpacking).await;
    let unpacked = pack::done(unpacking).await;
    let path = restored.path.display();
    loaded.and(unpacked).while_doing(|| format!("reading the guest's memory from `{path}`"))
}

/// Until QEMU has read all. It is asked rarely while there is something to unpack, and often from
/// there on: little is left then.
async fn follow(qmp: &qmp::Client, unpacking: &mut Child) -> Result<()> {
    let (mut pause, mut unpacked) = (FIRST_LOOK, false);
    loop {
        let now = qmp.call("query-migrate", json!({})).await;
        // One that cannot read it ends, and says why.
        let now = now.while_doing(|| "asking QEMU how far it is".into())?;
        match now["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed") => return Err(Error::system("QEMU does not understand it")),
            _ => {}
        }
        tokio::select! {
            _ = unpacking.wait(), if !unpacked => (pause, unpacked) = (FIRST_LOOK, true),
            () = sleep(pause) => pause = (pause * 2).min(LOOKS),
        }
    }
}
