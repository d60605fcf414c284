//! The local manager: this machine is the only node, nothing is queued.
//!
//! Ids come from a counter in the user's store, so that an id is not soon used
//! again. There is no daemon: a job is its launcher process.

use std::fs;

use super::Request;
use crate::error::{Context, Error, Result};
use crate::model::owner::Owner;
use crate::store::{Store, pool};

/// What every VM gets when nothing is asked for.
const DEFAULT_CORES: u32 = 1;
const DEFAULT_MEMORY_PER_CORE_MIB: u64 = 512;
/// QEMU's q35 takes no more without further devices.
const MAX_CORES: u32 = 255;

/// What each VM of the job is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocation {
    pub cores: u32,
    pub memory_mib: u64,
}

/// What the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub cores: u32,
    pub memory_mib: u64,
}

impl Capacity {
    /// Reads it from the kernel.
    pub fn read() -> Result<Self> {
        let cores = std::thread::available_parallelism()
            .while_doing(|| "counting the processors".into())?;
        let text =
            fs::read_to_string("/proc/meminfo").while_doing(|| "reading `/proc/meminfo`".into())?;
        let total_kib = text
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"))
            .and_then(|number| number.trim().parse::<u64>().ok())
            .ok_or_else(|| Error::system("`/proc/meminfo` does not tell the memory"))?;
        Ok(Self {
            cores: u32::try_from(cores.get()).unwrap_or(u32::MAX),
            memory_mib: total_kib >> 10,
        })
    }
}

/// Decides what each of `vms` VMs gets, or why that cannot be.
pub fn allocate(request: &Request, vms: u32, capacity: Capacity) -> Result<Allocation> {
    let cores = request.cores.unwrap_or(DEFAULT_CORES);
    if cores == 0 || cores > MAX_CORES {
        return Err(Error::usage(format!("a VM cannot have {cores} cores"))
            .help(format!("ask for 1 to {MAX_CORES} with `-c`")));
    }
    let memory_mib = request.memory_mib.unwrap_or(DEFAULT_MEMORY_PER_CORE_MIB * u64::from(cores));
    let total = memory_mib.saturating_mul(vms.into());
    if total > capacity.memory_mib {
        return Err(Error::system(format!(
            "{vms} VMs of {memory_mib} MiB need {total} MiB, and this machine has {} MiB",
            capacity.memory_mib
        ))
        .help("ask for fewer VMs, or for less memory with `--mem`"));
    }
    Ok(Allocation { cores, memory_mib })
}

/// The next job of this user on this machine.
pub async fn next_job(store: &dyn Store, user: &str) -> Result<Owner> {
    pool::next_job(store, user).await
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Capacity = Capacity { cores: 2, memory_mib: 4096 };

    #[test]
    fn without_wishes_a_vm_gets_one_core_and_half_a_gigabyte() {
        let given = allocate(&Request::default(), 2, SMALL).unwrap();
        assert_eq!(given, Allocation { cores: 1, memory_mib: 512 });
    }

    #[test]
    fn more_memory_than_the_machine_has_is_refused_with_the_sum() {
        let error = allocate(&Request::default(), 100, SMALL).unwrap_err();
        assert!(error.to_string().contains("need 51200 MiB"), "{error}");
    }

    #[test]
    fn no_cores_and_absurdly_many_are_refused() {
        for cores in [0, 1_000_000_000] {
            let request = Request { cores: Some(cores), ..Request::default() };
            assert!(allocate(&request, 1, SMALL).is_err());
        }
    }
}
