//! Which processes run in which VM, and on which of its CPUs. Pure.

use crate::error::{Error, Result};

/// What is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Processes in all.
    pub processes: Option<u32>,
    /// VMs to use: the first ones.
    pub vms: Option<u32>,
    /// CPUs of each process.
    pub cores: Option<u32>,
}

/// A VM that may be used, and the CPUs of its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub rank: u32,
    pub cores: u32,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: u32,
    /// Which of the VM's processes it is.
    pub local: u32,
    /// The CPUs it stays on. None: all.
    pub cpus: Vec<u16>,
}

impl Wish {
    /// Whether the VMs' CPUs have to be known.
    pub fn needs_cores(self) -> bool {
        self.processes.is_some() || self.cores.is_some()
    }

    /// What can be said before anything is known of the VMs.
    ///
    /// # Errors
    /// When the numbers contradict each other.
    pub fn check(self, vms: usize) -> Result<()> {
        let zero = [self.processes, self.vms, self.cores].contains(&Some(0));
        if zero {
            return Err(Error::usage("`-n`, `-N` and `-c` count from 1"));
        }
        if let Some(wanted) = self.vms.filter(|wanted| *wanted as usize > vms) {
            return Err(Error::usage(format!("`-N {wanted}`: there are {vms} VMs to use")));
        }
        if let (Some(processes), Some(vms)) = (self.processes, self.vms) {
            if processes < vms {
                return Err(Error::usage(format!(
                    "{processes} processes (`-n`) cannot be on {vms} VMs (`-N`)"
                ))
                .help("give at least one process to each VM"));
            }
        }
        Ok(())
    }
}

/// Places the processes, those of a VM in a row, VMs in the order given.
///
/// ```text
/// nothing       one in each VM, with all its CPUs
/// -N 2          the same in the first two
/// -n 6          as many in each VM as it has CPUs, one CPU each, VM after VM
/// -n 6 -c 2     the same with two CPUs each
/// -n 6 -N 3     as even as their CPUs allow
/// -n (VMs)      one in each VM, with all its CPUs
/// ```
///
/// # Errors
/// When there is no room for all of them.
pub fn place(wish: Wish, vms: &[Room]) -> Result<Vec<Place>> {
    wish.check(vms.len())?;
    let used = &vms[..wish.vms.map_or(vms.len(), |vms| vms as usize)];
    let processes = match wish.processes {
        Some(processes) => processes,
        None => used.len() as u32,
    };
    let cores = wish.cores.unwrap_or(1);
    let counts = if processes as usize == used.len() && wish.cores.is_none() {
        vec![1; used.len()]
    } else {
        let room: Vec<u32> = used.iter().map(|vm| vm.cores / cores).collect();
        let even = wish.vms.is_some() || wish.processes.is_none();
        share(processes, &room, even).ok_or_else(|| full(wish, processes, cores, used))?
    };
    let mut places = Vec::new();
    for (vm, count) in used.iter().zip(counts) {
        for local in 0..count {
            let alone = count == 1 && wish.cores.is_none();
            let cpus = if alone { 0..0 } else { local * cores..(local + 1) * cores };
            places.push(Place { rank: vm.rank, local, cpus: cpus.map(|cpu| cpu as u16).collect() });
        }
    }
    Ok(places)
}

/// How many go to each; `None` where they do not fit. If `even`, each has one, and they are
/// as many as can be in each; otherwise one VM is filled after the other.
fn share(processes: u32, room: &[u32], even: bool) -> Option<Vec<u32>> {
    let mut counts = vec![0; room.len()];
    if even && room.contains(&0) {
        return None;
    }
    let mut left = processes;
    while left > 0 {
        let before = left;
        for (count, room) in counts.iter_mut().zip(room) {
            let free = room - *count;
            let more = left.min(if even { free.min(1) } else { free });
            *count += more;
            left -= more;
        }
        if left == before {
            return None;
        }
    }
    Some(counts)
}

fn cpus(count: u32) -> String {
    if count == 1 { "1 CPU".into() } else { format!("{count} CPUs") }
}

fn full(wish: Wish, processes: u32, cores: u32, used: &[Room]) -> Error {
    let all: u32 = used.iter().map(|vm| vm.cores).sum();
    let each = if cores == 1 { "a CPU each".into() } else { format!("{} each", cpus(cores)) };
    let vms = match used.len() {
        1 => "VM has".to_owned(),
        count => format!("{count} VMs have"),
    };
    let all = cpus(all);
    let what = match processes {
        1 => format!("1 process with {each} does"),
        _ => format!("{processes} processes with {each} do"),
    };
    let error = Error::usage(format!("{what} not fit: the {vms} {all}"));
    match used.iter().find(|vm| vm.cores < cores) {
        Some(vm) if wish.cores.is_some() => {
            error.help(format!("vm{} has {}: give a smaller `-c`", vm.rank, cpus(vm.cores)))
        }
        _ => error.help("start fewer, with fewer CPUs, or a larger cluster"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where they go, as `rank:cpus`.
    fn placed(numbers: (u32, u32, u32), cores: &[u32]) -> String {
        let given = |number: u32| Some(number).filter(|number| *number > 0);
        let (processes, vms, each) = numbers;
        let wish = Wish { processes: given(processes), vms: given(vms), cores: given(each) };
        let vms: Vec<Room> =
            (10..).zip(cores).map(|(rank, cores)| Room { rank, cores: *cores }).collect();
        match place(wish, &vms) {
            Ok(places) => places
                .iter()
                .map(|place| {
                    let cpus: Vec<_> = place.cpus.iter().map(ToString::to_string).collect();
                    format!("{}:{}", place.rank, cpus.join("+"))
                })
                .collect::<Vec<_>>()
                .join(" "),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn without_numbers_there_is_one_in_each_vm_with_all_its_cpus() {
        assert_eq!(placed((0, 0, 0), &[1, 4, 2]), "10: 11: 12:");
        assert_eq!(placed((0, 2, 0), &[1, 4, 2]), "10: 11:");
        assert_eq!(placed((3, 0, 0), &[1, 4, 2]), "10: 11: 12:");
        assert_eq!(placed((2, 2, 0), &[4, 4, 2]), "10: 11:");
    }

    #[test]
    fn processes_fill_vm_after_vm_and_never_share_a_cpu() {
        assert_eq!(placed((1, 0, 0), &[2, 2]), "10:");
        assert_eq!(placed((4, 0, 0), &[2, 1, 4]), "10:0 10:1 11: 12:");
        assert_eq!(placed((3, 0, 2), &[4, 1, 2]), "10:0+1 10:2+3 12:0+1");
        assert_eq!(placed((2, 0, 1), &[4, 4]), "10:0 10:1");
        assert_eq!(placed((0, 0, 2), &[4, 2]), "10:0+1 11:0+1");
    }

    #[test]
    fn over_a_number_of_vms_they_are_spread() {
        assert_eq!(placed((4, 2, 0), &[4, 4, 4]), "10:0 10:1 11:0 11:1");
        assert_eq!(placed((5, 2, 0), &[4, 4]), "10:0 10:1 10:2 11:0 11:1");
        assert_eq!(placed((5, 3, 0), &[4, 1, 4]), "10:0 10:1 11: 12:0 12:1");
        assert_eq!(placed((2, 2, 2), &[4, 4]), "10:0+1 11:0+1");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (numbers, cores, why) in [
            ((4, 0, 0), &[2, 1][..], "4 processes with a CPU each do not fit"),
            ((2, 0, 3), &[4, 4][..], ""),
            ((3, 0, 3), &[4, 4], "3 processes with 3 CPUs each do not fit"),
            ((0, 0, 2), &[4, 1], "2 processes with 2 CPUs each do not fit"),
            ((1, 2, 0), &[4, 4], "1 processes (`-n`) cannot be on 2 VMs (`-N`)"),
            ((0, 3, 0), &[4, 4], "`-N 3`: there are 2 VMs to use"),
        ] {
            let said = placed(numbers, cores);
            assert!(said.contains(why), "{said}");
            assert_eq!(why.is_empty(), said.starts_with("10:"), "{said}");
        }
    }
}
