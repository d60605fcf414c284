//! `pavo snapshot`

use std::cell::RefCell;
use std::path::PathBuf;

use clap::Args;

use super::App;
use super::copying::Copying;
use super::job::JobSelector;
use super::signals::Signals;
use crate::error::{Context, Error, Kind, Result};
use crate::model::vmset::VmSet;
use crate::ops::checkpoint::Phase;
use crate::ops::snapshot::take;

/// Write a running VM down, to begin any number of others from it
///
/// The VM stands still; the memory of its guest and what it has written to its disk go to files
/// in DIR, compressed; then it goes on. A template with `snapshot: DIR` makes VMs that begin
/// there, many at once, instead of booting. Each is told by the agent in its guest who it is:
/// it has its own name, addresses, keys of the ssh server, random numbers and machine id before
/// it is reported to run, and lets in who may log in to its cluster. All else is as it was:
/// what runs in the guest runs on in each.
///
/// DIR is made, or is empty; the host of the VM, and those of the VMs that begin from it, must
/// see it. It belongs to the very revision of the image, the cores, the memory and the machine
/// of VM. Whatever is secret in the guest is in it, and in all that begin from it: only you may
/// read it. Nobody can use what another person has written, except root.
#[derive(Debug, Args)]
pub struct Snapshot {
    #[command(flatten)]
    job: JobSelector,

    /// The VM, such as `vm0`
    #[arg(value_name = "VM")]
    vm: VmSet,

    /// The new folder
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Snapshot {
    pub fn run(self, app: &App) -> Result<u8> {
        let dir = std::path::absolute(&self.dir);
        let dir = dir.while_doing(|| "finding the current folder".into())?;
        let troubles = app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let rank = super::job::one_vm(&self.vm, &job)?;
            let vm = &job.vms[rank as usize];
            let mut signals = Signals::new()?;
            let ended = async {
                let why = signals.next().await;
                Error::new(Kind::Interrupted, why)
            };
            let name = format!("vm{}", vm.rank);
            let copying = RefCell::new(Copying::new(&app.out, format!("Writing {name}")));
            let told = |phase: Phase| match phase {
                Phase::Pausing => copying.borrow_mut().waits(format!("Pausing {name}")),
                Phase::Writing(progress) => copying.borrow_mut().at(progress),
                Phase::Written(_) => {}
            };
            let taken = take(known.store(), &job, vm, &dir, &told, ended).await;
            let (bytes, troubles) = taken.while_doing(|| format!("taking a snapshot of {name}"))?;
            drop(copying);
            let mib = bytes.div_ceil(1 << 20);
            let dir = dir.display();
            let end = if troubles.is_empty() { "; it goes on" } else { "" };
            app.out.status(&format!("Snapshot of {name} written to {dir} ({mib} MiB){end}"));
            Ok::<_, Error>(troubles)
        })?;
        for trouble in &troubles {
            app.out.error(&trouble.report());
        }
        Ok(if troubles.is_empty() { 0 } else { Kind::Partial.exit_code() })
    }
}
