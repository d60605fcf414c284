//! Slurm's hook into pavo: a SPANK plugin.
#![cfg_attr(test, allow(dead_code, reason = "Slurm's side is not there"))]

mod ask;
mod cgroup;
#[cfg(not(test))]
mod hooks;
mod option;
mod settings;
mod setup;
#[cfg(not(test))]
mod slurm;
#[cfg(not(test))]
mod state;
mod step;
mod sys;
#[cfg(test)]
mod version;

/// The release of Slurm that this is built for, as `slurm_version.h` writes it.
#[cfg(not(test))]
const SLURM_VERSION: u32 = include!(concat!(env!("OUT_DIR"), "/slurm_version"));
