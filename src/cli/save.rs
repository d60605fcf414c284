//! `pavo save`

use clap::Args;

use super::App;
use super::copying::Copying;
use super::job::{JobSelector, one_vm};
use crate::error::Result;
use crate::model::vmset::VmSet;
use crate::ops::save::{Order, save};
use crate::vm::save::Progress;

/// Save the disk of a running VM
///
/// It becomes the next revision of the image that the VM was started from, or a new image.
/// The VM runs on; it may also have halted or powered off. If an agent (qemu-guest-agent) runs in the guest, its file systems are
/// at rest for the moment that is saved; otherwise it is as if the power had failed then.
#[derive(Debug, Args)]
pub struct Save {
    #[command(flatten)]
    job: JobSelector,

    /// A new image, `[REPO:]NAME`, instead of a revision of the VM's
    #[arg(short = 'd', long, value_name = "IMAGE")]
    dest: Option<String>,

    /// All of the disk, as an image that needs no other, not only what the VM has written
    #[arg(long)]
    full: bool,

    /// Fail unless the guest brings its file systems to rest
    #[arg(short = 's', long)]
    safe: bool,

    /// Which drive: 0 is the VM's disk; 1 is the first of its persistent ones, which goes
    /// whole to `-d`, or else becomes a revision of the image that its `backup` names
    #[arg(short = 'i', long, value_name = "N", default_value_t = 0)]
    drive_index: u32,

    /// The VM
    #[arg(value_name = "VM", default_value = "vm0")]
    vm: VmSet,
}

impl Save {
    pub fn run(self, app: &App) -> Result<u8> {
        let library = app.library(&super::config::load(app)?);
        let outcome = app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let rank = one_vm(&self.vm, &job)?;
            let (dest, drive) = (self.dest.as_deref(), self.drive_index);
            let order = Order { rank, drive, dest, full: self.full, safe: self.safe };
            let mut copying = Copying::new(&app.out, format!("Saving vm{rank}"));
            let mut told = |progress: Progress| match progress.total {
                0 => copying.waits(format!("Waiting for another save of vm{rank}")),
                _ => copying.at(progress),
            };
            save(known.store(), &job, &library, order, &mut told).await.map(|done| (rank, done))
        });
        app.warn_of(&library);
        let (rank, (image, saved)) = outcome?;
        if let Some(trouble) = saved.trouble {
            app.out.warn(&format!("the guest's file systems were not at rest: {trouble}"));
        }
        let (name, revision) = image.uri.rsplit_once('@').unwrap_or((&image.uri, ""));
        let revision = if revision.is_empty() { "" } else { &format!(" revision {revision}") };
        let drive = match self.drive_index {
            0 => "disk".to_owned(),
            index => format!("drive {index}"),
        };
        app.out.status(&format!("vm{rank} {drive} successfully saved to {name}{revision}"));
        Ok(0)
    }
}
