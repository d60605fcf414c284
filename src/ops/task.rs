//! `pavo internal task`: one VM of a cluster, as a task of a Slurm step.
//!
//! Root has set the host up and left `host.json`, with what makes this process a member of
//! its cluster; the launcher sends what to run. What is decided here is only what nobody else can know: how much memory the host's Slurm grants,
//! whether KVM works, where there is room for the disk.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::accel;
use super::setup::guard;
use super::setup::holding::run_dir;
use super::setup::host_report::{HostReport, LocalVm};
use crate::batch::slurm::{Environment, Task};
use crate::error::{Error, Result};
use crate::host::{cgroup, crash};
use crate::model::vm::{Accel, VmSpec};
use crate::vm::channel::{Identity, Listener};
use crate::vm::link::{self, Hello};
use crate::vm::process::{self, Launcher};

/// How long srun may take to hand the bootstrap over.
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(60);
/// How long the launcher may take to answer.
const LAUNCHER_LIMIT: Duration = Duration::from_secs(30);
/// What a VM gets where Slurm limits no memory.
const DEFAULT_MIB_PER_CORE: u64 = 512;
/// What QEMU and this process need beside the guest's memory: QEMU's own heap, stacks and
/// firmware, and a part of the guest's size for its tables and caches.
const OVERHEAD_MIB: u64 = 96;
const OVERHEAD_SHARE: u64 = 32;
/// With less than this no guest boots.
const LEAST_MIB: u64 = 64;

/// Runs the VM of this task to its end. `input` is the step's standard input. One that is `led`
/// does not end by the scheduler's signals, but when the launcher says so or is gone.
pub async fn main(input: OwnedFd, environment: &Environment, led: bool) -> Result<()> {
    crash::point("task.begin")?;
    let task = environment.task()?;
    let (bootstrap, life_line) = link::read_bootstrap(input, BOOTSTRAP_LIMIT).await?;
    crash::point("task.bootstrap")?;
    let host = HostReport::read(task.job, task.step)?;
    let local = host.vms.iter().find(|vm| vm.rank == task.rank).cloned();
    let local = local.ok_or_else(|| {
        Error::bug(format!("host `{}` was not set up for vm{}", host.node, task.rank))
    })?;
    crash::point("task.host")?;
    let accel = accel::choose(&host.scratch, &|_| {}).await;
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let identity = identity(&host, bootstrap.identity)?;
    let control = Listener::bind(any, &identity)?;
    let address = (host.address, control.address()?.port()).into();
    let hello = hello(&task, &host, local, address, accel)?;
    crash::point("task.hello")?;
    let (spec, sender, receiver) =
        link::join(&bootstrap.addresses, &identity, hello, LAUNCHER_LIMIT).await?;
    crash::point("task.spec")?;
    let dir = host.scratch.join(format!("vm{}", task.rank));
    let spec = VmSpec { dir, dial: Some(run_dir(task.job, task.step)), ..spec };
    let unanswered = guard::unanswered(task.job, task.step, host.node);
    let launcher = Launcher { link: (sender, receiver), life: life_line, leads: led };
    process::task(spec, launcher, Some(control), unanswered).await?;
    crash::point("task.end")
}

/// What makes us a member of the cluster. Root's word goes before what came over the network.
fn identity(host: &HostReport, sent: Option<Identity>) -> Result<Identity> {
    host.identity.clone().or(sent).ok_or_else(|| {
        Error::system("the cluster's key has not come with the set-up of this host").help(
            "an administrator installs spank_pavo.so and pavo of the same release on all hosts",
        )
    })
}

fn hello(
    task: &Task,
    host: &HostReport,
    local: LocalVm,
    control: SocketAddr,
    accel: Accel,
) -> Result<Hello> {
    Ok(Hello {
        version: link::VERSION,
        rank: task.rank,
        node: task.node_id,
        host: host.node.clone(),
        cores: task.cores,
        memory_mib: memory(cgroup::memory_limit(), task)?,
        nics: local.nics,
        ports: local.ports,
        control: Some(control),
        accel,
    })
}

/// The guest's memory in MiB: this task's share of what the step may use on this host,
/// less what QEMU needs for itself.
fn memory(limit: Option<u64>, task: &Task) -> Result<u64> {
    let granted = limit.map(|limit| (limit >> 20) / u64::from(task.local_tasks.max(1)));
    // Where nothing is enforced, what was asked for still is the share.
    let Some(share) = granted.into_iter().chain(task.memory_mib).min() else {
        return Ok(DEFAULT_MIB_PER_CORE * u64::from(task.cores));
    };
    let guest = share.saturating_sub(OVERHEAD_MIB);
    let guest = guest - guest / OVERHEAD_SHARE;
    if guest < LEAST_MIB {
        return Err(Error::system(format!(
            "Slurm grants {share} MiB to each VM on this host, and QEMU needs about \
             {OVERHEAD_MIB} MiB beside the guest's memory"
        ))
        .help("ask for more: `--mem-per-cpu=512M`"));
    }
    // QEMU takes whole pages; whole 2 MiB are huge pages, too.
    Ok(guest & !1)
}

/// What Slurm has to grant a VM whose guest gets so much: the way back of [`memory`].
pub fn share(guest_mib: u64) -> u64 {
    guest_mib + guest_mib.div_ceil(OVERHEAD_SHARE - 1) + OVERHEAD_MIB + 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_gets_its_share_less_what_qemu_needs() {
        let task = Task {
            job: 1,
            step: 0,
            rank: 0,
            node_id: 0,
            node: "n1".into(),
            cores: 2,
            local_tasks: 2,
            memory_mib: None,
        };
        assert_eq!(memory(None, &task).unwrap(), 1024);
        assert_eq!(memory(Some(2 << 30), &task).unwrap(), 898);
        let asked = Task { memory_mib: Some(512), ..task.clone() };
        assert_eq!(memory(Some(64 << 30), &asked).unwrap(), 402);
        for guest in (64..4096).step_by(2) {
            assert!(memory(Some(2 * (share(guest) << 20)), &task).unwrap() >= guest, "{guest}");
        }
        let report = memory(Some(200 << 20), &task).unwrap_err().report();
        assert!(report.contains("grants 100 MiB to each VM"), "{report}");
    }

    #[test]
    fn the_clusters_key_is_roots_word_first() {
        let mut host = HostReport {
            version: HostReport::VERSION,
            node: "n1".into(),
            address: [127, 0, 0, 1].into(),
            scratch: "/nowhere".into(),
            vms: Vec::new(),
            identity: None,
        };
        let (sealed, sent) = (Identity::generate("1").unwrap(), Identity::generate("2").unwrap());
        assert!(identity(&host, Some(sent.clone())).unwrap() == sent);
        let report = identity(&host, None).unwrap_err().report();
        assert!(report.contains("has not come with the set-up"), "{report}");
        host.identity = Some(sealed.clone());
        assert!(identity(&host, Some(sent)).unwrap() == sealed);
        assert!(identity(&host, None).unwrap() == sealed);
    }
}
