//! What a VM needs before there is a QEMU: its image near, its files.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;

use super::super::checkpoint::{self, Restored};
use super::super::devices::Node;
use super::super::machine::{Event, Order, State};
use super::super::near::{self, Near};
use super::super::{overlay, seed};
use super::Driver;
use crate::error::{Context, Result};
use crate::model::checkpoint::Restore;
use crate::model::job::VmState;
use crate::model::vm::VmSpec;

impl Driver {
    /// What takes long: somebody may want an end meanwhile.
    pub(super) async fn prepare(
        &mut self,
        orders: &mut mpsc::Receiver<Order>,
    ) -> Result<Option<Near>> {
        let near = self.near(orders).await?;
        if self.spec.restore.is_some() && self.state != State::Over {
            let what = match self.spec.restore.as_deref() {
                Some(Restore { former: Some(_), .. }) => "its snapshot is checked",
                _ => "its checkpoint is checked",
            };
            self.report(VmState::Preparing, what.into(), None).await;
            let spec = self.spec.clone();
            self.restored = self.unless_over(orders, restore_files(&spec)).await?.flatten();
        }
        Ok(near)
    }

    /// Has the image copied to this host, if it is to be.
    async fn near(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<Option<Near>> {
        if !near::is_far(&self.spec) {
            return Ok(None);
        }
        self.report(VmState::Preparing, "its image comes to this host".into(), None).await;
        let spec = self.spec.clone();
        let near = self.unless_over(orders, near::bring(&spec)).await?.flatten();
        if let (Some(near), Some(disk)) = (&near, &mut self.spec.disk) {
            disk.backing.clone_from(&near.top);
        }
        Ok(near)
    }

    /// Works until an order ends it all.
    async fn unless_over<T>(
        &mut self,
        orders: &mut mpsc::Receiver<Order>,
        work: impl Future<Output = Result<T>>,
    ) -> Result<Option<T>> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done.map(Some),
                Some(order) = orders.recv() => {
                    self.happened(Event::Asked(order)).await;
                    if self.state == State::Over {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

/// The VM's directory, with what the checkpoint has of it.
async fn restore_files(spec: &VmSpec) -> Result<Option<Restored>> {
    let Some(restore) = &spec.restore else { return Ok(None) };
    make_dir(&spec.dir)?;
    let Files { disk, seed } = Files::of(spec);
    let doing = || format!("restoring {} from `{}`", spec.name(), restore.dir.display());
    checkpoint::bring(spec, restore, &disk, &seed).await.map(Some).while_doing(doing)
}

/// Refuses to give a guest that goes on other processors, or another shape of memory.
pub(super) fn check_shape(spec: &VmSpec, nodes: &[Node]) -> Result<()> {
    match &spec.restore {
        Some(restore) => checkpoint::check_shape(restore, spec.cores, nodes),
        None => Ok(()),
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    let made = DirBuilder::new().mode(0o700).create(dir);
    made.while_doing(|| format!("creating the VM's directory `{}`", dir.display()))
}

/// The files that QEMU opens.
pub(super) struct Files {
    pub disk: PathBuf,
    pub seed: PathBuf,
}

impl Files {
    fn of(spec: &VmSpec) -> Self {
        Self { disk: spec.dir.join("disk.qcow2"), seed: spec.dir.join("seed.img") }
    }

    /// Makes them, unless a checkpoint has had them.
    pub(super) fn make(spec: &VmSpec) -> Result<Self> {
        let files = Self::of(spec);
        let former = match spec.restore.as_deref() {
            Some(Restore { former: None, .. }) => return Ok(files),
            Some(Restore { former, .. }) => former.as_ref(),
            None => None,
        };
        if former.is_none() {
            make_dir(&spec.dir)?;
            if let Some(disk) = &spec.disk {
                let size = disk.virtual_size;
                overlay::create(&files.disk, &disk.backing, disk.backing_format, size)?;
            }
        }
        if let Some(seed) = &spec.seed {
            let least = former.map_or(0, |former| former.seed_bytes);
            let agent = spec.extras.inject_agent;
            seed::write_at_least(least, &files.seed, seed, &spec.nics, agent)?;
        }
        Ok(files)
    }
}
