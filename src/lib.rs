//! The map of pavo: one line per module, the layers, and where to add things.
//!
//! ```text
//!  5  cli            one file per verb or noun; parses, calls, prints through `cli::out`
//!  4  daemon         the one that writes the inventory: connections, API, the lock of the one
//!                    that is active
//!  3  ops            operations that join the peers below: launch here or as a step of Slurm,
//!                    root's set-up of a host, the site's store, sweep, wait, save, run, copy
//!  2  batch          who runs the job: local, slurm
//!     network        cluster + configuration -> plan for one host; the guests' DHCP and DNS
//!     image          repositories, revisions, import, header checks, images from recipes
//!     vm             one VM: QEMU's arguments, QMP, state machine, console, seed, the guest's
//!                    agent, and the secure channel between the hosts of a cluster
//!     node           the machines below: lists of them, power and boot device by their BMCs
//!  1  config         YAML files to typed values, all mistakes at once
//!     store          what is known of jobs: conditional commits, watches, leases, pools
//!     host           the only layer that changes a machine: steps, journal, netlink, nft
//!  0  error, model   values and rules; no file, no clock, no environment
//! ```
//!
//! Beside this crate: `agent/` (the program that runs commands in guests, which `build.rs`
//! makes a part of this one, its protocol, and both ends of copies), `slurm-plugin/` (Slurm's hook, which runs
//! `pavo internal setup` as root), `tests/lab/` (a Slurm cluster in namespaces, for tests and for people),
//! `tests/fakes/` (ten thousand BMCs in one process, likewise) and `fuzz/`
//! (every reader of strangers' bytes as a function of bytes).
//!
//! A module uses layers below its own, never a peer: `tests/conventions.rs` holds the table.
//!
//! # Where do I add …
//!
//! - a subcommand: `src/cli/<verb>.rs` and one line in `cli::Command`;
//! - a kernel object: a `host::step::Step` variant, tested in `tests/netns/`;
//! - a network type: `src/network/<type>.rs` and its configuration;
//! - a stored key: a function in `store::keys`;
//! - a power driver: `src/node/power/<name>.rs`, one line in `node::power::open`, and a world in
//!   `tests/power/`;
//! - a path of the daemon's API: a route in `daemon::api`, and what it does in `openapi.yaml`;
//! - a reader of what strangers send: a target in `fuzz/src/`;
//! - a setting of nodes, networks, …: a line in `model::node::schema`, a field in `model::node`;
//! - a configuration option: a documented field in `config`, and the example in `etc/`.

pub mod batch;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod error;
pub mod host;
pub mod image;
pub mod model;
pub mod network;
pub mod node;
pub mod ops;
pub mod store;
pub mod vm;
