//! `save`: what a VM has written becomes a revision of its image, or a new image.
//!
//! The command makes room in the repository, the VM's process copies the disk there, and
//! the command makes it an image: so nothing has to pass through the command, and whatever
//! dies on the way, repository and VM are whole.

use crate::error::{Context, Error, Result};
use crate::image::library::{Library, Resolved};
use crate::model::job::JobRecord;
use crate::store::Store;
use crate::vm::save::{Progress, Saved, Wish};

use super::reach::reach;

/// What is to be saved, and how.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    pub rank: u32,
    /// The name of a new image.
    pub dest: Option<&'a str>,
    /// All of the disk, not only what the VM has written.
    pub full: bool,
    /// Whether the guest must bring its file systems to rest.
    pub safe: bool,
}

/// Saves a running VM's disk.
///
/// # Errors
/// When it has none, nothing may be written where it should go, or the copy fails.
pub async fn save(
    store: Option<&dyn Store>,
    job: &JobRecord,
    library: &Library,
    order: Order<'_>,
    told: &mut impl FnMut(Progress),
) -> Result<(Resolved, Saved)> {
    let rank = order.rank;
    let doing = || format!("saving the disk of vm{rank}");
    let vm = job.vms.iter().find(|vm| vm.rank == rank);
    let vm = vm.ok_or_else(|| Error::not_found(format!("the cluster has no vm{rank}")))?;
    let base = vm.image.as_deref().ok_or_else(|| Error::usage("VM has no drive to save"))?;
    let saving = library.begin_save(base, order.dest, order.full).while_doing(doing)?;
    let wish = Wish { file: saving.file()?, below: saving.below(), safe: order.safe };
    let copy = async { reach(store, job, rank).await?.connect().await?.save(wish, told).await };
    let saved = copy.await.while_doing(doing)?;
    Ok((saving.finish(&job.user).while_doing(doing)?, saved))
}
