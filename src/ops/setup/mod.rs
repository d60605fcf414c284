//! Root's part of a cluster on one host of a site, as Slurm's plugin asks for it.
//!
//! ```text
//! slurmstepd (root) ── plugin ── internal setup create ── plan → journal → apply
//!     │                              └─ internal setup guard ── internal responder (nobody)
//!     │ the step's tasks             │
//!     └─ plugin ── internal setup delete
//! ```
//!
//! Root's code reads what root owns ([`SITE_DIR`]), the ask, and the site's store; it
//! follows no path of the user's. The guard outlives `create`: it holds the responders,
//! and if the step's process on this host dies without a word it removes everything. What
//! even its death leaves is removed by the next [`sweep`].

pub mod ask;
mod create;
mod fabric;
mod guard;
pub mod holding;
pub mod host_report;
mod node;
mod release;

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::{self, Config, Sources};
use crate::error::Result;

pub use create::create;
pub use guard::main as guard;
pub use node::init;
pub use release::{delete, sweep};

/// The site's configuration.
pub const SITE_DIR: &str = "/etc/pavo";

/// The site's configuration, without any user's.
pub fn site_config() -> Result<Config> {
    let sources = Sources {
        system: Path::new(SITE_DIR).into(),
        user: None,
        home: "/".into(),
        user_name: "root".into(),
        env: BTreeMap::new(),
    };
    config::load(&sources).into_config()
}
