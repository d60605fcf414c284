//! `pavo reset`

use clap::Args;

use super::App;
use super::job::JobSelector;
use crate::error::{Context, Result};
use crate::model::vmset::{VmSet, fold};
use crate::ops::reach::reach;

/// Reset VMs of a running cluster
///
/// The VMs restart from their current disks, as if their reset button had been pressed;
/// the guests are not told.
#[derive(Debug, Args)]
pub struct Reset {
    #[command(flatten)]
    job: JobSelector,

    /// VMs to reset, such as `vm0`, `vm[0-3]` or `all`
    #[arg(value_name = "VMS", default_value = "vm0")]
    vms: VmSet,
}

impl Reset {
    pub fn run(self, app: &App) -> Result<u8> {
        app.block_on(async {
            let (known, job) = self.job.find(app).await?;
            let count = u32::try_from(job.vms.len()).unwrap_or(u32::MAX);
            let ranks = self.vms.select(count)?;
            for rank in &ranks {
                let reset = async {
                    reach(known.store(), &job, *rank).await?.connect().await?.reset().await
                };
                reset.await.while_doing(|| format!("resetting vm{rank}"))?;
            }
            app.out.status(&format!("Reset {}.", fold(&ranks)));
            Ok(0)
        })
    }
}
