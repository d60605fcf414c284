//! One virtual machine: what it needs on disk, QEMU's arguments and its control.

pub mod args;
pub mod kvm;
pub mod machine;
pub mod overlay;
pub mod qmp;
pub mod seed;
