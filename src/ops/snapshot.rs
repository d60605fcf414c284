//! `snapshot`: one VM that runs, written down so that any number of others begin from it.
//!
//! It is written as for a checkpoint (see [`checkpoint`](super::checkpoint)), and goes on. Who
//! begins from it is bound to the same image, machine and QEMU: [`restart`](super::restart)
//! compares. Its guest's agent is asked first whether it can make its guest another.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::checkpoint::{Folder, Phase, failed, files, finish, images, keep, text, write_vms};
use super::reach::reach_vm;
use super::trusted;
use crate::error::{Context, Error, Result};
use crate::host::file::write_atomically;
use crate::model::checkpoint::{SNAPSHOT, SavedVm, Snapshot};
use crate::model::job::{JobRecord, VmRecord};
use crate::model::vm::HostKey;
use crate::store::Store;
use crate::vm::agent::lacks;
use crate::vm::checkpoint::Step;

/// How long the guest's agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// Takes a snapshot of a VM into a folder, which is not there or empty, until `ended` says that
/// nobody wants it. The VM goes on. Returns how many bytes it has, and what went wrong once it
/// was there.
///
/// # Errors
/// When the VM cannot be written down, or nothing could begin from it. Nothing is left then.
pub async fn take(
    store: Option<&dyn Store>,
    job: &JobRecord,
    vm: &VmRecord,
    dir: &Path,
    told: &dyn Fn(Phase),
    ended: impl Future<Output = Error>,
) -> Result<(u64, Vec<Error>)> {
    let mut parts = Vec::new();
    // One that was there, empty, may be open to others.
    if dir.exists() {
        trusted::check(dir, &[])?;
    }
    let folder = Folder::make(dir)?;
    let write = async {
        let images = images(std::slice::from_ref(vm))?;
        check_agent(store, job, vm).await.while_doing(|| doing(vm))?;
        let vms = std::slice::from_ref(vm);
        let (taken, saved) = write_vms(store, job, vms, &folder, &mut parts, told).await?;
        let saved = saved.into_iter().next().ok_or_else(|| Error::bug("a VM was not written"))?;
        let (vm, seed) = without_secrets(saved);
        let (version, pavo) = (Snapshot::VERSION, env!("CARGO_PKG_VERSION").into());
        let bytes = files(&vm).map(|stored| stored.bytes).sum();
        let text = text(SNAPSHOT, &Snapshot { version, pavo, taken, vm, images })?;
        keep(&mut parts).await?;
        if let Some(seed) = seed {
            let path = folder.path.join(seed);
            std::fs::remove_file(&path).while_doing(|| format!("removing `{}`", path.display()))?;
        }
        write_atomically(&folder.path.join(SNAPSHOT), &text, 0o600)?;
        Ok(bytes)
    };
    let written = tokio::select! {
        written = write => written,
        error = ended => Err(error),
    };
    match written {
        Ok(bytes) => {
            folder.keep();
            let troubles = finish(&mut parts, Step::Resume).await;
            Ok((bytes, troubles.into_iter().map(|(_, error)| error).collect()))
        }
        Err(error) => Err(failed(error, &finish(&mut parts, Step::Resume).await, "VM")),
    }
}

fn doing(vm: &VmRecord) -> String {
    format!("asking the agent of vm{} on `{}`", vm.rank, vm.host)
}

async fn check_agent(store: Option<&dyn Store>, job: &JobRecord, vm: &VmRecord) -> Result<()> {
    let mut client = reach_vm(store, job, vm).await?.connect().await?;
    let answer = client.agent_hello(PATIENCE).await?;
    if answer.features.iter().any(|feature| feature == pavo_agent::ASSUMES) {
        return Ok(());
    }
    Err(match &*answer.agent {
        crate::vm::agent::QEMUS => Error::usage("only QEMU's own agent answers in its guest")
            .help("use an image with pavo's agent, or `agent: inject` in the template"),
        _ => lacks(&answer.version),
    })
}

/// What no other VM is to have, as far as it is not in the guest's memory; and the seed's file.
fn without_secrets(mut vm: SavedVm) -> (SavedVm, Option<PathBuf>) {
    if let Some(seed) = &mut vm.spec.seed {
        let none = String::new;
        let (seed_, public, openssh_private, openssh_public) = (none(), none(), none(), none());
        seed.host_key = HostKey { seed: seed_, public, openssh_private, openssh_public };
    }
    let seed = vm.seed.take().map(|stored| stored.name.into());
    (vm, seed)
}
