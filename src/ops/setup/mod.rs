//! Root's part of a cluster on one host of a site, as Slurm's plugin asks for it.
//!
//! ```text
//! slurmstepd (root) ── plugin ── internal setup create ── plan → journal → apply
//!     │                              └─ internal setup guard ── internal responder (service user)
//!     │ the step's tasks             │
//!     └─ plugin ── internal setup delete
//! ```
//!
//! Root's code reads what root owns ([`SITE_DIR`]), the ask, and the site's store; it
//! follows no path of the user's. The guard outlives `create`: it holds the responders,
//! and if the step's process on this host dies without a word it removes everything. What
//! even its death leaves is removed by the next [`sweep`].
//!
//! `setup init` makes what belongs to the host and to no cluster, `setup cleanup` takes
//! everything back.

pub mod ask;
mod create;
mod fabric;
mod grave;
pub mod guard;
pub mod holding;
pub mod host_report;
pub mod lost;
mod node;
mod preview;
mod release;
mod status;
pub mod wreck;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::config::{self, Config, Sources};
use crate::error::{Error, Result};

pub use create::{create, create_preview, underlay};
pub use fabric::HostRecord;
pub use node::{BRIDGES_CALL_IPTABLES, cleanup, cleanup_preview, init, init_preview};
pub use preview::{Preview, delete_preview, sweep_preview};
pub use release::{Patience, delete, sweep};
pub use status::{ClusterHere, NodeStatus, Switch, status};

/// The site's configuration.
pub const SITE_DIR: &str = "/etc/pavo";

/// What root needs of the site's configuration.
///
/// # Errors
/// Also when somebody else than root could have written it.
pub fn site_config() -> Result<Config> {
    let system = Path::new(SITE_DIR);
    for file in ["", "batch.yaml", "networks.yaml", "resources.yaml"] {
        only_roots(&system.join(file))?;
    }
    config::load_site(&Sources {
        system: system.into(),
        user: None,
        home: "/".into(),
        user_name: "root".into(),
        env: BTreeMap::new(),
    })
}

/// Refuses a file or folder that others than root may write to. One that does not exist
/// nobody has written.
fn only_roots(path: &Path) -> Result<()> {
    let Ok(about) = std::fs::metadata(path) else { return Ok(()) };
    if about.uid() == 0 && about.mode() & 0o022 == 0 {
        return Ok(());
    }
    let path = path.display();
    Err(Error::config(format!("others than root may write to `{path}`, and root relies on it"))
        .help(format!("chown root:root {path}; chmod go-w {path}")))
}
