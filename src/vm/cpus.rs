//! Which CPUs of this host a VM runs on: those that were allotted to its process, in the
//! order of the machine's topology, and the guest's own NUMA nodes where they span several.

use std::fs;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::devices::Node;
use crate::error::{Context, Error, Result};
use crate::model::vm::{Bind, VmSpec};

const SYSFS: &str = "/sys/devices/system";

/// A CPU of the host. The order is that in which guests' CPUs are laid on them: neighbours
/// share as much as they can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cpu {
    node: u32,
    package: u32,
    core: u32,
    id: u32,
}

/// Where a VM runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// How many CPUs the guest has.
    pub cores: u32,
    /// Where QEMU runs what is not the guest; anywhere, if empty.
    pub emulator: Vec<u32>,
    /// The host's CPU for each of the guest's, if they are bound.
    pub guest: Vec<u32>,
    /// If there is more than one.
    pub nodes: Vec<Node>,
}

impl Layout {
    /// For this VM, by what its process may use here.
    ///
    /// # Errors
    /// When its template asks for what cannot be.
    pub fn of(spec: &VmSpec) -> Result<Self> {
        let cpus = spec.extras.cpus;
        let online = numbers(&read("cpu/online")).unwrap_or_default();
        if cpus.full_node {
            // Slurm may have bound the task to fewer; where a cgroup did, they stay away.
            let _ = sched_setaffinity(Pid::from_raw(0), &set(&online));
        }
        let allowed =
            sched_getaffinity(Pid::from_raw(0)).while_doing(|| "asking for CPUs".into())?;
        let usable = online.into_iter().filter(|cpu| allowed.is_set(*cpu as usize) == Ok(true));
        let mut usable: Vec<Cpu> = usable.map(describe).collect();
        usable.sort_unstable();
        lay_out(spec, &usable)
    }

    /// Lets what this thread starts from now on run on the emulator's CPUs; returns where it
    /// was allowed before.
    pub fn enter(&self) -> Option<CpuSet> {
        let before = sched_getaffinity(Pid::from_raw(0)).ok()?;
        if !self.emulator.is_empty() {
            sched_setaffinity(Pid::from_raw(0), &set(&self.emulator)).ok()?;
        }
        Some(before)
    }

    /// Binds the guest's CPUs, whose threads these are, in their order.
    pub fn bind(&self, threads: &[i32]) -> Result<()> {
        for (thread, cpu) in threads.iter().zip(&self.guest) {
            sched_setaffinity(Pid::from_raw(*thread), &set(&[*cpu]))
                .while_doing(|| format!("binding a CPU of the guest to CPU {cpu}"))?;
        }
        Ok(())
    }
}

/// Lets this thread run where it did.
pub fn leave(before: Option<CpuSet>) {
    if let Some(before) = before {
        // It was allowed a moment ago.
        let _ = sched_setaffinity(Pid::from_raw(0), &before);
    }
}

fn lay_out(spec: &VmSpec, usable: &[Cpu]) -> Result<Layout> {
    let cpus = spec.extras.cpus;
    let (cores, emulator) = (spec.cores as usize, cpus.emulator as usize);
    let allotted = if cpus.full_node { usable.len() } else { cores + emulator };
    let cores = allotted.saturating_sub(emulator);
    if cores == 0 {
        let setting = spec.setting("emulator-cores");
        return Err(Error::config(format!("{setting} leaves no core of {allotted} to the guest"))
            .help("ask for more cores with `-c`, or for fewer there"));
    }
    let own = match cpus.bind {
        Bind::No => None,
        Bind::Allotted => Some(usable).filter(|usable| usable.len() == allotted),
        Bind::From(first) => {
            let own = usable.get(first as usize..).and_then(|rest| rest.get(..allotted));
            let setting = spec.setting("bind-vcpus");
            let error = || {
                let name = spec.name();
                Error::config(format!(
                    "{setting}: {name} needs the CPUs {first} to {}, and {} may be used here",
                    first as usize + allotted - 1,
                    usable.len()
                ))
                .help("ask for fewer with `-c`, or set `bind-vcpus: no`")
            };
            Some(own.ok_or_else(error)?)
        }
    };
    let mut layout =
        Layout { cores: u32::try_from(cores).unwrap_or(u32::MAX), ..Layout::default() };
    let Some(own) = own else { return Ok(layout) };
    // The last ones: interrupts and what else a host does prefer the first.
    let (guest, rest) = own.split_at(cores);
    let rest = if rest.is_empty() { guest } else { rest };
    layout.emulator = rest.iter().map(|cpu| cpu.id).collect();
    layout.guest = guest.iter().map(|cpu| cpu.id).collect();
    layout.nodes = nodes(guest, spec.memory_mib);
    Ok(layout)
}

/// The guest's NUMA nodes: memory by the share of its CPUs that they have.
fn nodes(guest: &[Cpu], memory_mib: u64) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    let mut left = memory_mib;
    let total = guest.len() as u64;
    let mut first = 0;
    for group in guest.chunk_by(|a, b| a.node == b.node) {
        let count = group.len() as u32;
        // Whole huge pages.
        let memory_mib = (memory_mib * u64::from(count) / total) & !1;
        left -= memory_mib;
        let cpus = (first, first + count - 1);
        nodes.push(Node { host_node: group[0].node, cpus, memory_mib });
        first += count;
    }
    if let Some(last) = nodes.last_mut() {
        last.memory_mib += left;
    }
    if nodes.len() > 1 { nodes } else { Vec::new() }
}

fn describe(id: u32) -> Cpu {
    let topology = |file: &str| read(&format!("cpu/cpu{id}/topology/{file}")).trim().parse().ok();
    let node = fs::read_dir(format!("{SYSFS}/cpu/cpu{id}"))
        .into_iter()
        .flatten()
        .find_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("node")?.parse().ok());
    Cpu {
        node: node.unwrap_or(0),
        package: topology("physical_package_id").unwrap_or(0),
        core: topology("core_id").unwrap_or(id),
        id,
    }
}

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(SYSFS).join(file)).unwrap_or_default()
}

/// `0-3,8` as numbers.
fn numbers(list: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
    }
    Some(numbers)
}

fn set(cpus: &[u32]) -> CpuSet {
    let mut set = CpuSet::new();
    for cpu in cpus {
        // Beyond what the kernel's interface names: such a CPU is left out.
        let _ = set.set(*cpu as usize);
    }
    set
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    /// Two packages with a node each, and two threads on each of two cores; numbered as
    /// firmware does, the second threads last.
    fn host() -> Vec<Cpu> {
        let cpu = |id: u32| Cpu { node: id / 2 % 2, package: id / 2 % 2, core: id % 2, id };
        let mut cpus: Vec<Cpu> = (0..8).map(cpu).collect();
        cpus.sort_unstable();
        cpus
    }

    fn vm(cores: u32, emulator: u32, bind: Bind) -> VmSpec {
        let mut spec = testing::spec(tempfile::tempdir().unwrap().path());
        (spec.cores, spec.memory_mib) = (cores, 1000);
        (spec.extras.cpus.emulator, spec.extras.cpus.bind) = (emulator, bind);
        spec
    }

    #[test]
    fn neighbours_share_what_they_can_and_the_emulator_has_its_own() {
        let layout = lay_out(&vm(6, 2, Bind::Allotted), &host()).unwrap();
        assert_eq!(layout.guest, [0, 4, 1, 5, 2, 6]);
        assert_eq!(layout.emulator, [3, 7]);
        let node = |host_node, cpus, memory_mib| Node { host_node, cpus, memory_mib };
        assert_eq!(layout.nodes, [node(0, (0, 3), 666), node(1, (4, 5), 334)]);
    }

    #[test]
    fn cpus_that_are_not_the_vms_alone_bind_nothing() {
        let layout = lay_out(&vm(2, 0, Bind::Allotted), &host()).unwrap();
        assert_eq!(layout, Layout { cores: 2, ..Layout::default() });
        let layout = lay_out(&vm(8, 0, Bind::No), &host()).unwrap();
        assert_eq!(layout, Layout { cores: 8, ..Layout::default() });
    }

    #[test]
    fn who_asks_for_it_is_bound_from_a_given_cpu_on() {
        let layout = lay_out(&vm(2, 0, Bind::From(4)), &host()).unwrap();
        assert_eq!((&*layout.guest, &*layout.emulator), (&[2, 6][..], &[2, 6][..]));
        assert_eq!(layout.nodes, []);
        let error = lay_out(&vm(2, 0, Bind::From(7)), &host()).unwrap_err();
        assert!(error.to_string().contains("needs the CPUs 7 to 8, and 8"), "{error}");
    }

    #[test]
    fn a_full_node_is_all_there_is() {
        let mut spec = vm(1, 1, Bind::Allotted);
        spec.extras.cpus.full_node = true;
        let layout = lay_out(&spec, &host()).unwrap();
        assert_eq!((layout.cores, layout.guest.len(), &*layout.emulator), (7, 7, &[7][..]));
    }

    #[test]
    fn the_guest_keeps_a_core() {
        let mut spec = vm(0, 2, Bind::Allotted);
        spec.extras.places.insert("emulator-cores".into(), "t.yaml:4".into());
        let report = lay_out(&spec, &host()).unwrap_err().report();
        assert!(report.contains("`emulator-cores` of template `tiny` (t.yaml:4) leaves no core"));
    }

    #[test]
    fn lists_of_cpus_are_read_as_the_kernel_writes_them() {
        assert_eq!(numbers("0-2,5,7-8\n").unwrap(), [0, 1, 2, 5, 7, 8]);
        assert_eq!(numbers("\n"), None);
    }
}
