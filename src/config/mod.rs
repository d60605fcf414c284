//! Configuration: YAML files to typed values, pcocc's files as they are.
//!
//! | file | what | type |
//! |---|---|---|
//! | `batch.yaml` | the scheduler | [`Batch`] |
//! | `networks.yaml` | networks | [`Network`] |
//! | `resources.yaml` | sets of networks a VM gets | [`ResourceSet`] |
//! | `templates.yaml`, `templates.d/*.yaml` | kinds of VM | [`Template`] |
//! | `repos.yaml` | image repositories | [`Repo`] |

pub mod types;

pub use types::*;
