//! Waiting for VMs, with the reason shown and an end.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::book::now;
use super::launch::Cluster;
use crate::error::{Error, Kind, Result};
use crate::model::job::{JobRecord, VmRecord, VmState, VmStatus};
use crate::model::vmset::fold;

/// What a VM must have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// QMP says `running`.
    Running,
    /// An ssh banner was read.
    Ssh,
    /// It has ended.
    Stopped,
}

impl Goal {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Ssh => "ssh",
            Self::Stopped => "stopped",
        }
    }

    /// Whether a VM in this state has shown it.
    pub fn reached(self, state: VmState) -> bool {
        match self {
            Self::Running => state.is_up(),
            Self::Ssh => state == VmState::Ssh,
            Self::Stopped => state.is_over(),
        }
    }
}

/// How often a silent ssh port is tried again, and how long one try may take. A try is
/// one packet to a guest that is still booting.
const SSH_RETRY: Duration = Duration::from_millis(50);
const SSH_PATIENCE: Duration = Duration::from_millis(1500);
/// Tries under way at once. OpenSSH turns away everybody, the user too, from ten
/// connections that have not logged in (`MaxStartups`).
const SSH_TRIES: usize = 4;

/// Asks the VMs of a cluster for their ssh banners, until each has answered.
#[derive(Debug)]
pub struct Probes {
    asked: Vec<bool>,
    answered: Vec<bool>,
    tries: FuturesUnordered<BoxFuture<'static, u32>>,
}

impl Probes {
    pub fn new(job: &JobRecord) -> Self {
        let none = vec![false; job.vms.len()];
        Self { asked: none.clone(), answered: none, tries: FuturesUnordered::new() }
    }

    /// Begins to ask a VM that runs. Asking again changes nothing.
    ///
    /// # Errors
    /// When its ssh port is not published, so that there is nothing to ask.
    pub fn ask(&mut self, vm: &VmRecord) -> Result<()> {
        let at = vm.rank as usize;
        if !self.asked[at] {
            self.asked[at] = true;
            self.tries.push(ssh_banner(vm.rank, published_ssh(vm)?).boxed());
        }
        Ok(())
    }

    pub fn answered(&self, rank: u32) -> bool {
        self.answered[rank as usize]
    }

    /// The next VM that answers; pending while none is asked. Safe to drop.
    pub async fn next(&mut self) -> u32 {
        match self.tries.next().await {
            Some(rank) => {
                self.answered[rank as usize] = true;
                rank
            }
            None => std::future::pending().await,
        }
    }
}

/// Who is told what is waited for.
#[derive(Clone, Copy)]
pub struct Progress<'a> {
    pub say: &'a dyn Fn(&str),
    /// How often to say the same again with another time, in seconds.
    pub every: u64,
}

impl std::fmt::Debug for Progress<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "progress every {} s", self.every)
    }
}

/// Waits until every VM has reached `goal`, telling `progress` who is waited for.
///
/// # Errors
/// A VM that failed or ended instead; the deadline, naming who had not got there.
pub async fn wait_until(
    cluster: &mut Cluster,
    goal: Goal,
    limit: Option<Duration>,
    progress: Progress<'_>,
) -> Result<()> {
    // Later than the clock can tell is never.
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    let start = Instant::now();
    let mut probes = Probes::new(&cluster.book.record);
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut shown = String::new();
    loop {
        fail_if_any_failed(cluster, goal)?;
        let missing = missing(&cluster.book.states, goal);
        if missing.is_empty() {
            return Ok(());
        }
        show(&mut shown, &cluster.book.states, &missing, goal, start, progress);
        if goal == Goal::Ssh {
            let runs = |rank: &&u32| cluster.book.states[**rank as usize].state == VmState::Running;
            for rank in missing.iter().filter(runs) {
                probes.ask(&cluster.book.record.vms[*rank as usize])?;
            }
        }
        tokio::select! {
            report = cluster.next_report() => drop(report?),
            rank = probes.next() => {
                let status = VmStatus { state: VmState::Ssh, since: now(), detail: String::new() };
                cluster.set_state(rank, status).await?;
            }
            _ = ticks.tick() => {}
            () = sleep_until(deadline) => {
                return Err(too_late(&missing, goal, limit.unwrap_or_default()));
            }
        }
    }
}

/// The error of a wait that came to its end.
pub fn too_late(missing: &[u32], goal: Goal, limit: Duration) -> Error {
    let (who, seconds) = (fold(missing), limit.as_secs());
    Error::system(format!("{who} did not reach `{}` within {seconds} s", goal.as_str()))
        .help("see what the guest says: `pavo console -l VM`; or wait longer: `--timeout`")
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The ranks that have not reached `goal`.
pub fn missing(states: &[VmStatus], goal: Goal) -> Vec<u32> {
    (0..).zip(states).filter(|(_, vm)| !goal.reached(vm.state)).map(|(rank, _)| rank).collect()
}

fn fail_if_any_failed(cluster: &mut Cluster, goal: Goal) -> Result<()> {
    if goal == Goal::Stopped {
        return Ok(());
    }
    if let Some((_, error)) = cluster.take_failure() {
        return Err(error);
    }
    match (0_u32..).zip(&cluster.book.states).find(|(_, status)| status.state.is_over()) {
        Some((rank, status)) => Err(Error::system(format!(
            "vm{rank} ended before it reached `{}`: {}",
            goal.as_str(),
            if status.detail.is_empty() { "the guest shut down" } else { &status.detail }
        ))),
        None => Ok(()),
    }
}

fn show(
    shown: &mut String,
    states: &[VmStatus],
    missing: &[u32],
    goal: Goal,
    start: Instant,
    progress: Progress<'_>,
) {
    let first = &states[missing[0] as usize];
    let doing = match (first.state, goal) {
        (VmState::Waiting, _) => "to be started",
        (VmState::Preparing, _) => "to have its disk",
        (VmState::Starting, _) => "for QEMU",
        (_, Goal::Ssh) => "to boot and answer ssh",
        (_, Goal::Stopped) => "to end",
        (_, Goal::Running) => "to run",
    };
    // Each second a terminal's line is written over; a log gets a line now and then.
    let elapsed = start.elapsed().as_secs() / progress.every * progress.every;
    let line = format!("Waiting for {} {doing}… ({elapsed} s)", fold(missing));
    if line != *shown {
        (progress.say)(&line);
        *shown = line;
    }
}

fn published_ssh(vm: &VmRecord) -> Result<SocketAddr> {
    let port = vm.ports.iter().find(|port| port.vm_port == 22).ok_or_else(|| {
        let rank = vm.rank;
        Error::new(Kind::Config, format!("Error: port 22 is not reverse NATed for vm{rank}"))
            .help("publish it: `reverse-nat: {vm-port: 22, …}` in networks.yaml")
    })?;
    Ok((port.host_address, port.host_port).into())
}

/// Returns `rank` once the server at `address` has sent `SSH-`. The first bytes of the
/// guest's network are lost while it boots, so tries overlap: a fresh one every
/// [`SSH_RETRY`] until one is answered.
async fn ssh_banner(rank: u32, address: SocketAddr) -> u32 {
    let mut tries = FuturesUnordered::new();
    loop {
        if tries.len() < SSH_TRIES {
            tries.push(timeout(SSH_PATIENCE, one_banner(address)));
        }
        let pause = sleep(SSH_RETRY);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                Some(answer) = tries.next(), if !tries.is_empty() => {
                    if matches!(answer, Ok(true)) {
                        return rank;
                    }
                }
                () = &mut pause => break,
            }
        }
    }
}

async fn one_banner(address: SocketAddr) -> bool {
    let mut start = [0; 4];
    match TcpStream::connect(address).await {
        Ok(mut stream) => stream.read_exact(&mut start).await.is_ok() && &start == b"SSH-",
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(all: &[VmState]) -> Vec<VmStatus> {
        let status = |state: &VmState| VmStatus { state: *state, since: 0, detail: String::new() };
        all.iter().map(status).collect()
    }

    #[test]
    fn ssh_proves_running_but_running_does_not_prove_ssh() {
        let all = states(&[VmState::Running, VmState::Ssh, VmState::Starting, VmState::Stopped]);
        assert_eq!(missing(&all, Goal::Running), [2, 3]);
        assert_eq!(missing(&all, Goal::Ssh), [0, 2, 3]);
        assert_eq!(missing(&all, Goal::Stopped), [0, 1, 2]);
    }
}
