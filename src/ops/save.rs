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

use super::reach::Pass;

/// What is to be saved, and how.
#[derive(Clone, Debug)]
pub struct Order {
    pub rank: u32,
    /// 0 for the VM's disk, 1 for its first persistent drive.
    pub drive: u32,
    /// The name of a new image.
    pub dest: Option<String>,
    /// All of the disk, not only what the VM has written.
    pub full: bool,
    /// Whether the guest must bring its file systems to rest.
    pub safe: bool,
}

/// A place for a disk, which nothing was written to yet.
#[derive(Debug)]
pub struct Place<'a> {
    pub rank: u32,
    order: Order,
    saving: Saving<'a>,
}

/// Makes room for the disks that are to be saved. Nothing is left of it that is dropped.
///
/// # Errors
/// When one has none, or nothing may be written where it should go.
pub fn prepare<'a>(
    job: &JobRecord,
    library: &'a Library,
    orders: &[Order],
) -> Result<Vec<Place<'a>>> {
    let mut places = Vec::new();
    for order in orders {
        let rank = order.rank;
        let vm = job.vms.iter().find(|vm| vm.rank == rank);
        let vm = vm.ok_or_else(|| Error::not_found(format!("the cluster has no vm{rank}")))?;
        let saving = place(vm, library, order).while_doing(|| order.doing())?;
        places.push(Place { rank, order: order.clone(), saving });
    }
    Ok(places)
}

/// The name of the image that one of several VMs is saved to.
pub fn name_of_one(dest: &str, rank: u32) -> String {
    format!("{dest}-vm{rank}")
}

/// Refuses several disks that would be revisions of the same image: the last would hide the
/// others.
///
/// # Errors
/// When there are such.
pub fn check_apart(job: &JobRecord, ranks: &[u32], drive: u32) -> Result<()> {
    let target = |rank: u32| {
        let vm = job.vms.iter().find(|vm| vm.rank == rank)?;
        match drive.checked_sub(1) {
            None => vm.image.as_deref().map(|image| image.split('@').next().unwrap_or(image)),
            Some(index) => vm.drives.get(index as usize)?.backup.as_deref(),
        }
    };
    for (index, rank) in ranks.iter().enumerate() {
        let Some(image) = target(*rank) else { continue };
        if let Some(first) = ranks[..index].iter().find(|first| target(**first) == Some(image)) {
            let text = format!(
                "vm{first} and vm{rank} would both become a revision of `{image}`, and the later \
                 hide the earlier"
            );
            return Err(Error::usage(text)
                .help("give a name: with `-d NAME` each becomes an image, NAME-vm0, NAME-vm1, …"));
        }
    }
    Ok(())
}

impl Order {
    fn doing(&self) -> String {
        let rank = self.rank;
        match self.drive {
            0 => format!("saving the disk of vm{rank}"),
            drive => format!("saving drive {drive} of vm{rank}"),
        }
    }
}

impl Place<'_> {
    /// Saves a running VM's disk there.
    ///
    /// # Errors
    /// When the copy fails.
    pub async fn save(
        self,
        store: Option<&dyn Store>,
        job: &JobRecord,
        pass: &Pass,
        told: &mut impl FnMut(Progress),
    ) -> Result<(Resolved, Saved)> {
        let Self { rank, order, saving } = self;
        let saved = async {
            let (file, below) = (saving.file()?, saving.below());
            let wish = Wish { drive: order.drive, file, below, safe: order.safe };
            pass.reach(store, job, rank).await?.connect().await?.save(wish, told).await
        };
        let saved = saved.await.while_doing(|| order.doing())?;
        Ok((saving.finish(&job.user).while_doing(|| order.doing())?, saved))
    }
}

/// Makes room where the drive is to go. A persistent one lies on nothing, and goes whole.
fn place<'a>(vm: &VmRecord, library: &'a Library, order: &Order) -> Result<Saving<'a>> {
    let Some(index) = order.drive.checked_sub(1) else {
        let base = vm.image.as_deref();
        let base = base.ok_or_else(|| Error::usage("VM has no drive to save"))?;
        return library.begin_save(base, order.dest.as_deref(), order.full);
    };
    let drive = vm.drives.get(index as usize).ok_or_else(|| {
        let text = format!("Provided drive index ({}) is invalid", order.drive);
        Error::usage(text).help(match vm.drives.len() {
            0 => "drive 0 is the VM's disk, and it has no other".into(),
            count => format!("drive 0 is the VM's disk, 1 to {count} are its persistent ones"),
        })
    })?;
    match (&order.dest, &drive.backup) {
        (Some(dest), _) => library.begin_copy(dest, false),
        (None, Some(backup)) => library.begin_copy(backup, true),
        (None, None) => {
            let text = "No default target image to save VM drive. Please specify one with --dest";
            Err(Error::usage(text).help("or set `backup:` of the drive in its template"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(images: &[&str]) -> JobRecord {
        let vms: Vec<_> = (0..)
            .zip(images)
            .map(|(rank, image)| {
                serde_json::json!({
                    "rank": rank, "template": "x", "image": image, "cores": 1, "memory_mib": 64,
                    "host": "n1", "addresses": [], "ports": [], "ssh_user": "root",
                    "drives": [{ "backup": format!("user:kept-{}", rank / 2) }],
                })
            })
            .collect();
        let record = serde_json::json!({
            "version": 1, "owner": crate::model::owner::Owner::local(3), "name": "x",
            "user": "alice", "definition": "x", "started": 1, "time_limit": null,
            "launcher": { "pid": 1, "start_time": 1 }, "dir": "/x", "host": "n1", "vms": vms,
        });
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn no_disk_hides_another() {
        let job = job(&["user:a@0", "user:b@3", "user:a@1"]);
        check_apart(&job, &[0, 1], 0).unwrap();
        let error = check_apart(&job, &[0, 1, 2], 0).unwrap_err().report();
        assert!(error.contains("vm0 and vm2 would both become a revision of `user:a`"), "{error}");
        check_apart(&job, &[0, 1], 1).unwrap_err();
        check_apart(&job, &[0, 2], 1).unwrap();
    }
}
