//! Waiting for VMs, with the reason shown and an end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::banner;
use super::book::now;
use super::launch::Cluster;
use super::reach::reach_vm;
use crate::error::{Error, Kind, Result};
use crate::model::job::{JobRecord, VmRecord, VmState, VmStatus};
use crate::model::vmset::fold;
use crate::store::Store;

/// What a VM must have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// QMP says `running`.
    Running,
    /// An ssh banner was read.
    Ssh,
    /// The guest's agent answered.
    Agent,
    /// It has ended.
    Stopped,
}

impl Goal {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Ssh => "ssh",
            Self::Agent => "agent",
            Self::Stopped => "stopped",
        }
    }

    /// What a VM has shown that was asked for it; `None` where nobody has to ask.
    pub fn shown(self) -> Option<VmState> {
        match self {
            Self::Ssh => Some(VmState::Ssh),
            Self::Agent => Some(VmState::Agent),
            Self::Running | Self::Stopped => None,
        }
    }

    /// Whether a VM in this state has shown it.
    pub fn reached(self, state: VmState) -> bool {
        match self {
            Self::Running => state.is_up(),
            Self::Ssh => state == VmState::Ssh,
            Self::Agent => state == VmState::Agent,
            Self::Stopped => state.is_down(),
        }
    }
}

/// Asks the VMs of a cluster for their ssh banners, or for their agents, until each has
/// answered.
#[derive(Debug)]
pub struct Probes {
    job: Arc<JobRecord>,
    store: Option<Arc<dyn Store>>,
    asked: Vec<bool>,
    answered: Vec<bool>,
    /// Whose ssh server is asked beside, to explain why no agent answers; and since when it
    /// answers.
    explained: Vec<bool>,
    ssh: Vec<Option<Instant>>,
    tries: FuturesUnordered<BoxFuture<'static, Answer>>,
}

#[derive(Debug)]
enum Answer {
    /// Of what was asked for.
    Goal(u32),
    /// Of the ssh server beside.
    Ssh(u32),
}

impl Probes {
    pub fn new(job: &JobRecord, store: Option<Arc<dyn Store>>) -> Self {
        let none = vec![false; job.vms.len()];
        Self {
            job: Arc::new(job.clone()),
            store,
            asked: none.clone(),
            answered: none.clone(),
            ssh: vec![None; none.len()],
            explained: none,
            tries: FuturesUnordered::new(),
        }
    }

    /// Begins to ask a VM that runs for what shows that it has got to the goal. Asking again
    /// changes nothing.
    ///
    /// # Errors
    /// When its ssh port is not published, so that there is nothing to ask.
    pub fn ask(&mut self, vm: &VmRecord, goal: Goal) -> Result<()> {
        let at = vm.rank as usize;
        if !self.asked[at] {
            self.asked[at] = true;
            self.tries.push(match goal {
                Goal::Agent => {
                    let answer = agent_answer(vm.clone(), self.job.clone(), self.store.clone());
                    answer.map(Answer::Goal).boxed()
                }
                _ => {
                    let (rank, address) = (vm.rank, published_ssh(vm)?);
                    banner::answers(address).map(move |()| Answer::Goal(rank)).boxed()
                }
            });
        }
        Ok(())
    }

    /// Where an agent is asked for, looks beside whether the VM's ssh server answers.
    pub fn explain(&mut self, vm: &VmRecord, goal: Goal) {
        let (rank, at) = (vm.rank, vm.rank as usize);
        if goal != Goal::Agent || self.explained[at] {
            return;
        }
        if let Ok(address) = published_ssh(vm) {
            self.explained[at] = true;
            let answer = banner::answers(address).map(move |()| Answer::Ssh(rank));
            self.tries.push(answer.boxed());
        }
    }

    /// Those of whom no agent has answered, and the ssh server for so long.
    pub fn without_agent(&self, missing: &[u32], so_long: Duration) -> Vec<u32> {
        let lacks =
            |rank: &u32| self.ssh[*rank as usize].is_some_and(|since| since.elapsed() >= so_long);
        missing.iter().copied().filter(lacks).collect()
    }

    pub fn answered(&self, rank: u32) -> bool {
        self.answered[rank as usize]
    }

    /// The next VM that answers; pending while none is asked. Safe to drop.
    pub async fn next(&mut self) -> u32 {
        loop {
            match self.tries.next().await {
                Some(Answer::Goal(rank)) => {
                    self.answered[rank as usize] = true;
                    return rank;
                }
                Some(Answer::Ssh(rank)) => self.ssh[rank as usize] = Some(Instant::now()),
                None => std::future::pending().await,
            }
        }
    }
}

/// VMs that had shown more than that they run, and are asked again once they do: after a pause,
/// or a reset.
#[derive(Debug)]
pub struct Again {
    probes: Probes,
    /// What each had shown.
    shown: Vec<Option<Goal>>,
}

impl Again {
    pub fn new(job: &JobRecord) -> Self {
        Self { probes: Probes::new(job, None), shown: vec![None; job.vms.len()] }
    }

    /// Looks how they are now.
    pub fn look(&mut self, vms: &[VmRecord], states: &[VmStatus]) {
        for ((vm, status), shown) in vms.iter().zip(states).zip(&mut self.shown) {
            match (status.state, *shown) {
                (VmState::Agent, _) => *shown = Some(Goal::Agent),
                (VmState::Ssh, _) => *shown = Some(Goal::Ssh),
                // It could be asked before.
                (VmState::Running, Some(goal)) => drop(self.probes.ask(vm, goal)),
                _ => {}
            }
        }
    }

    /// The next that shows it again, and what. Safe to drop.
    pub async fn next(&mut self) -> (u32, VmState) {
        let rank = self.probes.next().await;
        let at = rank as usize;
        (self.probes.asked[at], self.probes.answered[at]) = (false, false);
        (rank, self.shown[at].and_then(Goal::shown).unwrap_or(VmState::Running))
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
    let mut probes = Probes::new(&cluster.book.record, None);
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut shown = Shown::default();
    loop {
        fail_if_any_failed(cluster, goal)?;
        let missing = missing(&cluster.book.states, goal);
        if missing.is_empty() {
            return Ok(());
        }
        let lacking = probes.without_agent(&missing, LATE);
        show(&mut shown, &cluster.book.states, (&missing, &lacking), goal, start, progress);
        if goal.shown().is_some() {
            let runs = |rank: &&u32| cluster.book.states[**rank as usize].state == VmState::Running;
            for rank in missing.iter().filter(runs) {
                let vm = &cluster.book.record.vms[*rank as usize];
                probes.ask(vm, goal)?;
                probes.explain(vm, goal);
            }
        }
        tokio::select! {
            report = cluster.next_report() => drop(report?),
            rank = probes.next() => {
                let state = goal.shown().unwrap_or(VmState::Running);
                let status = VmStatus { state, since: now(), detail: String::new() };
                cluster.set_state(rank, status).await?;
            }
            _ = ticks.tick() => {}
            () = sleep_until(deadline) => {
                let (book, limit) = (&cluster.book, limit.unwrap_or_default());
                return Err(too_late(&book.record.vms, &book.states, goal, limit, &lacking));
            }
        }
    }
}

/// Groups of VMs that are named in a message.
const NAMED: usize = 6;

/// The error of a wait that came to its end: who has not got there, where it runs, and how
/// far it is; and in which VMs ssh is answered, and no agent.
pub fn too_late(
    vms: &[VmRecord],
    states: &[VmStatus],
    goal: Goal,
    limit: Duration,
    lacking: &[u32],
) -> Error {
    let missing = missing(states, goal);
    let mut groups: Vec<(&str, VmState, Vec<u32>)> = Vec::new();
    for rank in &missing {
        let (host, state) = (vms[*rank as usize].host.as_str(), states[*rank as usize].state);
        match groups.iter_mut().find(|(h, s, _)| (*h, *s) == (host, state)) {
            Some((_, _, ranks)) => ranks.push(*rank),
            None => groups.push((host, state, vec![*rank])),
        }
    }
    let who = |host: &str, ranks: &[u32]| match host {
        "" => fold(ranks),
        host => format!("{} on {host}", fold(ranks)),
    };
    let (goal, seconds) = (goal.as_str(), limit.as_secs());
    let what = match &*groups {
        [(host, state, ranks)] => {
            let it_is = if ranks.len() == 1 { "it is" } else { "they are" };
            let (who, state) = (who(host, ranks), state.as_str());
            format!("{who} did not reach `{goal}` within {seconds} s, {it_is} `{state}`")
        }
        groups => {
            let one = |(host, state, ranks): &(&str, VmState, Vec<u32>)| {
                let is = if ranks.len() == 1 { "is" } else { "are" };
                format!("{} {is} `{}`", who(host, ranks), state.as_str())
            };
            let mut said: Vec<String> = groups.iter().take(NAMED).map(one).collect();
            if groups.len() > NAMED {
                said.push(format!("and {} more", groups.len() - NAMED));
            }
            let (who, said) = (fold(&missing), said.join(", "));
            format!("{who} did not reach `{goal}` within {seconds} s: {said}")
        }
    };
    // Before its guest runs, a VM has nothing to show but its process.
    let up = groups.iter().any(|(_, state, _)| *state >= VmState::Running);
    let help = match up {
        true if goal == Goal::Agent.as_str() => {
            "see what the guest says: `pavo console -l VM`; an image without an agent needs \
             `agent: inject` in its template; or wait longer: `--timeout`"
        }
        true => "see what the guest says: `pavo console -l VM`; or wait longer: `--timeout`",
        false => {
            "see what its process waits for: `ps -fu $USER` there; or wait longer: `--timeout`"
        }
    };
    let late = Error::system(what).help(help);
    if lacking.is_empty() { late } else { late.because(only_ssh(lacking)) }
}

fn only_ssh(lacking: &[u32]) -> String {
    format!("ssh is answered in {}, and no agent", fold(lacking))
}

/// What is said behind the line of a wait.
pub fn hint(lacking: &[u32]) -> String {
    if lacking.is_empty() { String::new() } else { format!(": {}: {NO_AGENT}", only_ssh(lacking)) }
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
    match (0_u32..).zip(&cluster.book.states).find(|(_, status)| status.state.is_down()) {
        Some((rank, status)) => Err(Error::system(format!(
            "vm{rank} ended before it reached `{}`: {}",
            goal.as_str(),
            if status.detail.is_empty() { "the guest shut down" } else { &status.detail }
        ))),
        None => Ok(()),
    }
}

/// How often a line that changes with each VM is shown, at most: a thousand VMs are not a
/// thousand lines.
const SHOW: Duration = Duration::from_millis(200);

/// After how long it is said that an image may have no agent.
pub const HINT: Duration = Duration::from_secs(45);
/// How long after its ssh server a guest's agent may answer before that is said.
pub const LATE: Duration = Duration::from_secs(15);
/// The same before who has set no end gives up: some agents are installed by the guest itself.
pub const HOPELESS: Duration = Duration::from_secs(300);
/// What to do about it.
pub const NO_AGENT: &str = "an image without an agent needs `agent: inject` in its template";

/// What was shown last.
#[derive(Default)]
struct Shown {
    line: String,
    /// The line without who is waited for.
    what: String,
    at: Option<Instant>,
}

fn show(
    shown: &mut Shown,
    states: &[VmStatus],
    (missing, lacking): (&[u32], &[u32]),
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
        (_, Goal::Agent) => "to boot and its agent to answer",
        (_, Goal::Stopped) => "to end",
        (_, Goal::Running) => "to run",
    };
    // Each second a terminal's line is written over; a log gets a line now and then.
    let elapsed = start.elapsed().as_secs() / progress.every * progress.every;
    let mut what = format!("{doing}… ({elapsed} s)");
    if !lacking.is_empty() {
        what += &hint(lacking);
    } else if goal == Goal::Agent && elapsed >= HINT.as_secs() && first.state.is_up() {
        what += ": ";
        what += NO_AGENT;
    }
    if what == shown.what && shown.at.is_some_and(|at| at.elapsed() < SHOW) {
        return;
    }
    let line = format!("Waiting for {} {what}", fold(missing));
    if line != shown.line {
        (progress.say)(&line);
        *shown = Shown { line, what, at: Some(Instant::now()) };
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

/// How long one question waits for the agent, and after how long it is asked again where
/// nobody could be asked.
const AGENT_PATIENCE: Duration = Duration::from_secs(20);
const AGENT_RETRY: Duration = Duration::from_millis(500);

/// Returns the VM's rank once its guest's agent has answered.
async fn agent_answer(vm: VmRecord, job: Arc<JobRecord>, store: Option<Arc<dyn Store>>) -> u32 {
    loop {
        let asked = Instant::now();
        let answer = async {
            let way = reach_vm(store.as_deref(), &job, &vm).await?;
            way.connect().await?.agent_hello(AGENT_PATIENCE).await
        };
        if answer.await.is_ok() {
            return vm.rank;
        }
        tokio::time::sleep_until(asked + AGENT_RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::model::job::{ProcessId, PublishedPort};
    use crate::model::owner::Owner;

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

    fn on(hosts: &[&str]) -> Vec<VmRecord> {
        let vm = |(rank, host): (u32, &&str)| VmRecord {
            rank,
            template: "tiny".into(),
            image: None,
            cores: 1,
            memory_mib: 64,
            host: (*host).into(),
            addresses: Vec::new(),
            ports: Vec::new(),
            ssh_user: "root".into(),
            drives: Vec::new(),
            control: None,
        };
        (0..).zip(hosts).map(vm).collect()
    }

    #[test]
    fn who_waits_long_for_an_agent_is_told_what_may_be_missing() {
        let said = |goal, elapsed: Duration, lacking: &[u32]| {
            let lines = std::cell::RefCell::new(Vec::new());
            let say = |line: &str| lines.borrow_mut().push(line.to_owned());
            let progress = Progress { say: &say, every: 1 };
            let all = states(&[VmState::Running]);
            let start = Instant::now() - elapsed;
            show(&mut Shown::default(), &all, (&[0], lacking), goal, start, progress);
            lines.into_inner().concat()
        };
        assert!(said(Goal::Agent, HINT, &[]).contains("`agent: inject`"));
        assert!(!said(Goal::Agent, HINT / 2, &[]).contains("inject"));
        assert!(!said(Goal::Ssh, HINT * 2, &[]).contains("inject"));
        let line = said(Goal::Agent, LATE, &[0]);
        assert!(line.contains("ssh is answered in vm0, and no agent: an image"), "{line}");
    }

    #[tokio::test]
    async fn who_answers_ssh_and_has_no_agent_is_found() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let mut vms = on(&["n1", "n1"]);
        vms[1].ports.push(PublishedPort {
            vm_port: 22,
            host_address: std::net::Ipv4Addr::LOCALHOST,
            host_port: address.port(),
        });
        let job = JobRecord {
            version: JobRecord::VERSION,
            owner: Owner::local(1),
            name: "x".into(),
            user: "x".into(),
            definition: "tiny:2".into(),
            started: 0,
            time_limit: None,
            launcher: ProcessId { pid: 1, start_time: 1 },
            dir: "/nonexistent".into(),
            host: "n1".into(),
            vms: vms.clone(),
        };
        let mut probes = Probes::new(&job, None);
        vms.iter().for_each(|vm| probes.explain(vm, Goal::Agent));
        assert_eq!(probes.without_agent(&[0, 1], Duration::ZERO), [0_u32; 0]);
        let greet = async {
            let (mut stream, _) = server.accept().await.unwrap();
            stream.write_all(b"SSH-2.0-x\r\n").await.unwrap();
            stream.shutdown().await.unwrap();
        };
        let found = async {
            while probes.without_agent(&[0, 1], Duration::ZERO).is_empty() {
                let _ = tokio::time::timeout(Duration::from_millis(10), probes.next()).await;
            }
        };
        tokio::join!(greet, found);
        assert_eq!(probes.without_agent(&[0, 1], Duration::ZERO), [1]);
        assert_eq!(probes.without_agent(&[0, 1], HOPELESS), [0_u32; 0]);
        let states = states(&[VmState::Agent, VmState::Running]);
        let late = too_late(&vms, &states, Goal::Agent, HOPELESS, &[1]).report();
        assert!(late.contains("because: ssh is answered in vm1, and no agent"), "{late}");
    }

    #[test]
    fn who_is_too_late_is_named_with_its_host_and_state() {
        let vms = on(&["n1", "n1", "n2", "n2", "n3"]);
        let late = |of: &[VmState], goal| {
            too_late(&vms, &states(of), goal, Duration::from_secs(40), &[]).report()
        };
        let [starting, running, ssh] = [VmState::Starting, VmState::Running, VmState::Ssh];
        let report = late(&[running, running, starting, running, running], Goal::Running);
        let expected = "vm2 on n2 did not reach `running` within 40 s, it is `starting`\n";
        assert!(report.contains(expected), "{report}");
        assert!(report.contains("`ps -fu $USER` there"), "{report}");
        let report = late(&[running; 5], Goal::Agent);
        assert!(report.contains("`agent: inject`"), "{report}");
        let report = late(&[running, running, ssh, ssh, ssh], Goal::Ssh);
        let expected = "vm[0-1] on n1 did not reach `ssh` within 40 s, they are `running`\n";
        assert!(report.contains(expected), "{report}");
        assert!(report.contains("pavo console"), "{report}");
        let report = late(&[ssh, starting, starting, starting, running], Goal::Ssh);
        let expected = "vm[1-4] did not reach `ssh` within 40 s: vm1 on n1 is `starting`, \
                        vm[2-3] on n2 are `starting`, vm4 on n3 is `running`\n";
        assert!(report.contains(expected), "{report}");
    }
}
