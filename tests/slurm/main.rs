//! Clusters as jobs of a real Slurm, on hosts in namespaces, with real QEMU.

#[path = "../shared/tiny.rs"]
mod tiny;
mod world;

mod alloc;
mod batch;
mod ckpt;
mod doctor;
mod drives;
mod ends;
mod forward;
mod ipv6;
mod luck;
mod node;
mod power;
mod rescue;
mod secrets;
mod snapshot;
mod sweep;
mod terminal;
mod together;
mod tutorial;
