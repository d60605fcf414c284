//! Operations that join the modules below: one file each.
//!
//! How a cluster on one machine hangs together:
//!
//! ```text
//! pavo alloc ── launcher ── the user's shell           (the user's own namespaces)
//!     │            └─ pasta ··········┐ the way out
//!     │ socket                        │
//!  internal cell (waits) ─ internal cell-init ─┬─ internal responder   (DHCP, DNS, ports)
//!                          pid 1 of the cell   ├─ internal run vm0 ── QEMU
//!                                              └─ internal run vm1 ── QEMU
//! ```
//!
//! Launcher and cell watch each other through the socket between them: whichever
//! is killed, the other ends everything and removes the job's files. The kernel
//! ends all processes of the cell with its first one.

pub mod accel;
pub mod agent;
pub mod banner;
pub mod beside;
pub mod book;
pub mod callers;
pub mod cell;
pub mod changes;
pub mod checkpoint;
pub mod children;
pub mod cleanup;
pub mod complaints;
pub mod copy;
pub mod dial;
pub mod doctor;
pub mod drives;
pub mod elsewhere;
pub mod extras;
pub mod forward;
pub mod gather;
pub mod here;
pub mod image_cache;
pub mod inventory;
pub mod jobs;
pub mod keeper;
pub mod launch;
pub mod nodesets;
pub mod operations;
pub mod orders;
pub mod pasta;
pub mod power;
pub mod program;
pub mod publish;
pub mod queue;
pub mod reach;
pub mod rehearsal;
pub mod remote;
pub mod resolve;
pub mod restart;
pub mod run;
pub mod save;
pub mod series;
pub mod setup;
pub mod site;
pub mod site_store;
pub mod snapshot;
pub mod srun;
pub mod ssh;
pub mod step;
pub mod supervisor;
pub mod task;
mod trusted;
pub mod usage;
pub mod watch;
