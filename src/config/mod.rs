//! Configuration: YAML files to typed values, pcocc's files as they are.
//!
//! | file | what | type |
//! |---|---|---|
//! | `batch.yaml` | the scheduler | [`Batch`] |
//! | `networks.yaml` | networks | [`Network`] |
//! | `resources.yaml` | sets of networks a VM gets | [`ResourceSet`] |
//! | `templates.yaml`, `templates.d/*.yaml` | kinds of VM | [`Template`] |
//! | `repos.yaml` | image repositories | [`Repo`] |

//!
//! [`load`] reads them all and reports every mistake at once, each with its place
//! and the nearest valid word. What lies in a folder that is absent has a default,
//! file by file, so that a machine without any configuration runs clusters.
//!
//! ```text
//! sources   the folders; a file's text        yaml    text -> tree with places
//! read      tree -> values, mistakes noted    batch networks resources templates repos: one file each
//! load      all files together -> Loaded      expand  %user and the like in paths
//! ```
//!
//! Paths in templates keep their variables: some (`%vm_rank`, `%clusterdir`) only
//! mean something in a cluster, so whoever uses such a path calls [`expand`] once.
//! Those of repositories are expanded already.

mod batch;
mod expand;
mod load;
mod networks;
mod problem;
mod read;
mod repos;
mod resources;
mod sources;
mod templates;
pub mod types;
mod yaml;

pub use expand::{Vars, expand};
pub use load::{Loaded, load};
pub use problem::{Problem, nearest};
pub use sources::Sources;
pub use types::*;
