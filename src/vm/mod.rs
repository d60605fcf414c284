//! One virtual machine: what it needs on disk, QEMU's arguments, its control.
//!
//! ```text
//! process   one stream to the launcher: spec and wishes in, reports out
//!   link channel             the same where the launcher is on another host
//!   driver    the loop: events in, actions out
//!     machine   what to do on which event; pure
//!     overlay seed args devices   what QEMU is given
//!     attach cpus near         what of this host it may use
//!     qmp stderr               what QEMU says
//!     console display control agent   what people reach it by
//! kvm       whether KVM is to be trusted
//! ```

pub mod agent;
pub mod args;
pub mod attach;
pub mod channel;
pub mod checkpoint;
mod clone;
pub mod console;
pub mod control;
pub mod cpus;
pub mod devices;
pub mod display;
pub mod driver;
pub mod dump;
pub mod guest_agent;
pub mod guest_ports;
pub mod kvm;
pub mod link;
pub mod machine;
mod near;
pub mod process;
pub mod qmp;
pub mod save;
pub mod seed;
pub mod stderr;
#[cfg(test)]
pub(crate) mod testing;
pub mod usage;

pub use crate::host::qcow2 as overlay;
