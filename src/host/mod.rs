//! The only layer that changes a machine.

pub mod spawn;
