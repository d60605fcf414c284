//! Slurm: the controller on the login host, a node daemon on each compute host.

use std::fs;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::host::{Host, Role};
use crate::service::Daemon;
use crate::site::Site;
use crate::{Options, each};

const CONF: &str = "\
ClusterName=lab
MpiDefault=none
ReturnToService=2
SlurmUser=slurm
SlurmdUser=root
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
KillWait=5
MessageTimeout=10
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=60
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PlugStackConfig=/etc/slurm/plugstack.conf
LaunchParameters=use_interactive_step
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
Licenses=net:4
";

/// The machine's cgroups are of version 1 or both; Slurm 22.05 wants one named.
const CGROUP: &str = "\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=yes
";

/// Writes the configuration that all hosts read.
pub(crate) fn configure(site: &Site, hosts: &[Host], options: &Options) -> Result<()> {
    let computes: Vec<&Host> = hosts.iter().filter(|host| host.role == Role::Compute).collect();
    let login = hosts.iter().find(|host| host.role == Role::Login);
    let login = login.ok_or_else(|| Error::new("a lab has a login host"))?;
    let nodes = computes.iter().map(|host| host.name()).collect::<Vec<_>>().join(",");
    let (cpus, mut conf) = (options.cpus, CONF.to_owned());
    conf += &format!("SlurmctldHost={}\n", login.name());
    for line in &options.slurm {
        conf += &format!("{line}\n");
    }
    conf += &format!(
        "NodeName={nodes} CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
         RealMemory=8000 State=UNKNOWN\n\
         PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=10 \
         PreemptMode=OFF\n\
         PartitionName=low Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=1 \
         PreemptMode=REQUEUE\n"
    );
    let plugin = match options.plugin {
        Some(_) => "required /usr/lib/pavo/spank_pavo.so\n",
        None => "",
    };
    let dir = site.etc().join("slurm");
    fs::write(dir.join("slurm.conf"), conf)?;
    fs::write(dir.join("cgroup.conf"), CGROUP)?;
    Ok(fs::write(dir.join("plugstack.conf"), plugin)?)
}

/// Starts everything and waits until all nodes are idle.
pub(crate) fn start(hosts: &[Host]) -> Result<()> {
    let of = |role| hosts.iter().filter(move |host| host.role == role).collect::<Vec<_>>();
    each(of(Role::Compute).into_iter().chain(of(Role::Login)).collect(), |host| {
        host.install(munged())
    })?;
    // Nodes that find no controller ask again a second later.
    let mut controller = Daemon::new("slurmctld", &["slurmctld", "-D"]);
    controller.ready = "scontrol ping 2>/dev/null | grep -q UP".into();
    each(of(Role::Login), |host| host.install(controller.clone()))?;
    let mut node = Daemon::new("slurmd", &["slurmd", "-D"]);
    node.before = "rm -f /run/slurmd.pid".into();
    node.ready = "test -s /run/slurmd.pid".into();
    each(of(Role::Compute), |host| host.install(node.clone()))
}

fn munged() -> Daemon {
    let argv = ["setpriv", "--reuid=munge", "--regid=munge", "--init-groups", "munged", "-F"];
    let mut daemon = Daemon::new("munged", &argv);
    // A socket that is there already may be of one that was killed.
    daemon.before = "rm -f /run/munge/munge.socket.2*".into();
    daemon.ready = "test -S /run/munge/munge.socket.2".into();
    daemon
}

/// Waits until Slurm says that each of `nodes` is in a state that begins like one of `states`.
pub(crate) fn wait_for(login: &Host, nodes: &[&str], states: &[&str]) -> Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let names = nodes.join(",");
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let ask = ["sinfo", "-h", "-p", "main", "-N", "-n", &names, "-o", "%N %T"];
        let answer = login.run(None, &ask)?;
        let lines = || answer.stdout.lines();
        let wanted = |now: &str| states.iter().any(|state| now.starts_with(state));
        // With an asterisk a node does not answer.
        let there = |line: &str| {
            let now = line.split(' ').nth(1).unwrap_or_default();
            wanted(now) && (now.starts_with("down") || !now.contains('*'))
        };
        if answer.status.success() && lines().count() == nodes.len() && lines().all(there) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let log = login.service("slurmctld")?.log();
            let tail: Vec<&str> = log.lines().rev().take(10).collect();
            let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
            return Err(Error::new(format!(
                "{names} are not {states:?}:\n{}{}\nslurmctld: {tail}",
                answer.stdout, answer.stderr
            )));
        }
        std::thread::sleep(Duration::from_millis(30));
    }
}
