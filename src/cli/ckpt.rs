//! `pavo ckpt`

use std::cell::RefCell;
use std::path::PathBuf;

use clap::Args;

use super::App;
use super::copying::Copying;
use super::job::JobSelector;
use super::signals::Signals;
use crate::error::{Context, Error, Kind, Result};
use crate::model::vmset::fold;
use crate::ops::checkpoint::{Order, Phase, take};

/// Write a whole cluster down, to go on later
///
/// All its VMs stand still; then the memory of each guest and what it has written to its disk
/// go to files in DIR, compressed, of all VMs at the same time. Afterwards the cluster ends;
/// with `--keep-running` it goes on. `pavo alloc -r DIR` starts it again where it was, on any
/// hosts like those it ran on. If something fails or is interrupted, the cluster goes on as if
/// nothing had been, and DIR is no checkpoint. Where VMs do not go on, or do not end, although
/// they should, they are named, with the exit code 1 if there is a checkpoint.
///
/// DIR is made, or is empty; the hosts of the VMs must see it. Whatever is secret in the guests
/// is in it, and the keys that log in to them: only you may read it. The images below the disks
/// are not in it. A VM with persistent drives, or with a folder of its host mounted, cannot be
/// written down.
#[derive(Debug, Args)]
pub struct Ckpt {
    #[command(flatten)]
    job: JobSelector,

    /// Let the cluster go on afterwards
    #[arg(short = 'k', long)]
    keep_running: bool,

    /// The new folder
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Ckpt {
    pub fn run(self, app: &App) -> Result<u8> {
        let dir = std::path::absolute(&self.dir);
        let dir = dir.while_doing(|| "finding the current folder".into())?;
        let (keep_running, home) = (self.keep_running, &*app.env.home);
        let order = Order { dir: &dir, keep_running, script: None, home };
        let written = RefCell::new(String::new());
        let troubles = app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let mut signals = Signals::new()?;
            let ended = async {
                let why = signals.next().await;
                Error::new(Kind::Interrupted, why)
            };
            let (id, vms) = (job.owner.job, job.vms.iter().map(|vm| vm.rank).collect::<Vec<_>>());
            let copying = RefCell::new(Copying::new(&app.out, format!("Writing {}", fold(&vms))));
            let told = |phase: Phase| match phase {
                Phase::Pausing => copying.borrow_mut().waits(format!("Pausing {}", fold(&vms))),
                Phase::Writing(progress) => copying.borrow_mut().at(progress),
                Phase::Written(bytes) => {
                    let (mib, dir) = (bytes.div_ceil(1 << 20), dir.display());
                    let text = format!("Checkpoint of job {id} written to {dir} ({mib} MiB)");
                    if self.keep_running {
                        written.replace(text);
                    } else {
                        // Afterwards nobody may be left to say it.
                        app.out.status(&(text + "; it ends"));
                    }
                }
            };
            let taken = take(known.store(), &job, order, &told, ended);
            taken.await.while_doing(|| format!("taking a checkpoint of job {id}"))
        })?;
        if self.keep_running {
            let end = if troubles.is_empty() { "; it goes on" } else { "" };
            app.out.status(&(written.take() + end));
        }
        for trouble in &troubles {
            app.out.error(&trouble.report());
        }
        Ok(if troubles.is_empty() { 0 } else { Kind::Partial.exit_code() })
    }
}
