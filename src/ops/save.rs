//! `save`: what a VM has written becomes a revision of its image, or a new image.
//!
//! The command makes room in the repository, the VM's process copies the disk there, and
//! the command makes it an image: so nothing has to pass through the command, and whatever
//! dies on the way, repository and VM are whole.

use crate::error::{Context, Error, Result};
use crate::image::library::{Library, Resolved};
use crate::image::save::Saving;
use crate::model::job::{JobRecord, VmRecord};
use crate::store::Store;
use crate::vm::save::{Progress, Saved, Wish};

use super::reach::reach;

/// What is to be saved, and how.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    pub rank: u32,
    /// 0 for the VM's disk, 1 for its first persistent drive.
    pub drive: u32,
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
    let doing = || match order.drive {
        0 => format!("saving the disk of vm{rank}"),
        drive => format!("saving drive {drive} of vm{rank}"),
    };
    let vm = job.vms.iter().find(|vm| vm.rank == rank);
    let vm = vm.ok_or_else(|| Error::not_found(format!("the cluster has no vm{rank}")))?;
    let saving = place(vm, library, order).while_doing(doing)?;
    let (file, below) = (saving.file()?, saving.below());
    let wish = Wish { drive: order.drive, file, below, safe: order.safe };
    let copy = async { reach(store, job, rank).await?.connect().await?.save(wish, told).await };
    let saved = copy.await.while_doing(doing)?;
    Ok((saving.finish(&job.user).while_doing(doing)?, saved))
}

/// Makes room where the drive is to go. A persistent one lies on nothing, and goes whole.
fn place<'a>(vm: &VmRecord, library: &'a Library, order: Order<'_>) -> Result<Saving<'a>> {
    let Some(index) = order.drive.checked_sub(1) else {
        let base = vm.image.as_deref();
        let base = base.ok_or_else(|| Error::usage("VM has no drive to save"))?;
        return library.begin_save(base, order.dest, order.full);
    };
    let drive = vm.drives.get(index as usize).ok_or_else(|| {
        let text = format!("Provided drive index ({}) is invalid", order.drive);
        Error::usage(text).help(match vm.drives.len() {
            0 => "drive 0 is the VM's disk, and it has no other".into(),
            count => format!("drive 0 is the VM's disk, 1 to {count} are its persistent ones"),
        })
    })?;
    match (order.dest, &drive.backup) {
        (Some(dest), _) => library.begin_copy(dest, false),
        (None, Some(backup)) => library.begin_copy(backup, true),
        (None, None) => {
            let text = "No default target image to save VM drive. Please specify one with --dest";
            Err(Error::usage(text).help("or set `backup:` of the drive in its template"))
        }
    }
}
