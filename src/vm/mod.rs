//! One virtual machine: what it needs on disk, QEMU's arguments and its control.

pub mod args;
pub mod kvm;
pub mod overlay;
pub mod seed;
