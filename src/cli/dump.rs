//! `pavo dump`

use std::path::PathBuf;

use clap::Args;

use super::App;
use super::copying::Copying;
use super::job::{JobSelector, one_vm};
use crate::error::{Context, Result};
use crate::model::vmset::VmSet;
use crate::ops::reach::reach;
use crate::vm::dump::{Format, Wish};
use crate::vm::save::Progress;

/// Write the memory of a VM to a file
///
/// An ELF core file, which `gdb` and `crash` read (with the kernel's debug symbols); all of it
/// is in it, so it is as large as the guest's memory, less what is zero. The VM stands still
/// meanwhile, and then goes on. Whatever is secret in the guest is in the file: only you may read it.
///
/// The file is written on the VM's host, and FILE, made absolute here, is a path there: in a
/// folder that all hosts share it is the same; on one machine it always is. It appears once it
/// is whole. Nothing is left of one that fails or is interrupted, and the VM goes on at once.
#[derive(Debug, Args)]
pub struct Dump {
    #[command(flatten)]
    job: JobSelector,

    /// Compress each page (kdump-zlib), for `crash`
    #[arg(short = 'z', long)]
    compress: bool,

    /// The VM
    #[arg(value_name = "VM")]
    vm: VmSet,

    /// The new file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Dump {
    pub fn run(self, app: &App) -> Result<u8> {
        let file = std::path::absolute(&self.file);
        let file = file.while_doing(|| "finding the current folder".into())?;
        let format = if self.compress { Format::KdumpZlib } else { Format::Elf };
        let wish = Wish { file: file.clone(), format };
        let (rank, dumped) = app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let rank = one_vm(&self.vm, &job)?;
            let mut copying = Copying::new(&app.out, format!("Writing the memory of vm{rank}"));
            let mut told = |at: Progress| copying.at(at);
            let connect = async { reach(known.store(), &job, rank).await?.connect().await };
            let doing = || format!("dumping the memory of vm{rank}");
            // From there on its process says what it does.
            let dumped = connect.await.while_doing(doing)?.dump(wish, &mut told).await?;
            Ok((rank, dumped))
        })?;
        let mib = dumped.bytes.div_ceil(1 << 20);
        let file = file.display();
        app.out.status(&format!("vm{rank} memory written to {file} ({mib} MiB on disk)"));
        Ok(0)
    }
}
