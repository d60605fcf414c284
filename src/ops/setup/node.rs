//! What belongs to a host of the site and to no cluster.

use std::path::Path;

use super::holding::{Claim, SCRATCH_DIR, make_dir};
use super::release::sweep;
use super::site_config;
use crate::error::Result;
use crate::host::netns;
use crate::ops::cleanup::NETNS_DIR;

/// `pavo internal setup init`: makes the folders that set-ups use, checks that the
/// site's configuration can be read, and removes what no living step owns. Safe to run
/// again.
pub async fn init() -> Result<()> {
    site_config()?;
    drop(Claim::wait()?);
    make_dir(Path::new(SCRATCH_DIR), 0o711)?;
    netns::prepare(Path::new(NETNS_DIR))?;
    sweep().await.map(drop)
}
