//! Whatever moment a process of pavo dies, hangs or fails at: the user reads why, nothing
//! stays, and the next job on that host starts.
//!
//! Each case arms one moment (see `pavo::host::crash`) on one host of the job and starts a
//! cluster. A few of them are run always, all with `PAVO_FULL=1` (`make test-full`).

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pavo::host::crash;
use pavo_lab::{Host, Output};

use super::world::{Before, Site};

/// What the plugin gives a set-up or a removal: who hangs is killed then.
const LIMIT: &str = "limit=9";
/// How long leaving may take by itself, and then with the sweep's help.
const BY_ITSELF: Duration = Duration::from_secs(10);

/// What is always run: each kind of end, and what once left something.
const SAMPLE: &[(&str, Action)] = &[
    ("launch.stored", Action::Kill),
    ("write.state", Action::Kill),
    ("fabric.keys", Action::Kill),
    ("write.journal", Action::Kill),
    ("setup.introduced", Action::Fail),
    ("apply.taps", Action::Fail),
    ("task.hello", Action::Kill),
    ("release.buried", Action::Kill),
    ("leave.freed", Action::Kill),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Fail,
}

/// Whose moment it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Launcher,
    Task,
    Root,
}

struct Case {
    point: &'static str,
    action: Action,
    host: &'static str,
}

impl Case {
    fn whose(&self) -> Whose {
        match self.point.split_once('.').map(|(group, _)| group) {
            Some("launch") => Whose::Launcher,
            Some("task") => Whose::Task,
            _ => Whose::Root,
        }
    }

    /// Whether it comes only when a cluster ends.
    fn at_the_end(&self) -> bool {
        let ends = ["delete.", "release.", "leave.", "undo.", "undone.", "journal.und"];
        let late = ["launch.end", "launch.stopped", "launch.removed", "task.end", "guard.end"];
        ends.iter().any(|end| self.point.starts_with(end)) || late.contains(&self.point)
    }

    fn arm(&self, site: &Site) {
        let owner = if self.whose() == Whose::Root { "root" } else { "alice" };
        let action = format!("{:?}", self.action).to_lowercase();
        let (file, point) = (crash::CRASH_AT, self.point);
        // One that only comes after another failure.
        let before = if point == "setup.failed" { "setup.planned fail\\n" } else { "" };
        let script = format!(
            "mkdir -p /run/pavo; printf '{before}{point} {action}\\n' >{file}.new; \
             chmod 600 {file}.new; chown {owner} {file}.new; mv {file}.new {file}"
        );
        for host in self.places(site) {
            host.sh(&script).unwrap();
        }
    }

    fn has_come(&self, site: &Site) -> bool {
        let file = crash::CRASH_AT.trim_start_matches('/');
        let come = |host: &&Host| {
            let text = fs::read_to_string(host.root().unwrap().join(file)).unwrap_or_default();
            text.is_empty()
        };
        self.places(site).iter().any(come)
    }

    /// Whether the moment has come. Afterwards it cannot any more.
    fn disarm(&self, site: &Site) -> bool {
        let file = crash::CRASH_AT;
        let script = format!("test -s {file} && echo armed; rm -f {file}");
        let come = |host: &&Host| host.sh(&script).unwrap().is_empty();
        // All are disarmed.
        self.places(site).iter().filter(|host| come(host)).count() > 0
    }

    fn places<'a>(&self, site: &'a Site) -> Vec<&'a Host> {
        match self.whose() {
            Whose::Launcher => vec![site.lab.login()],
            // The last one that leaves does it, whichever that is.
            _ if self.point == "leave.freed" => site.lab.computes().collect(),
            _ => vec![site.lab.host(self.host)],
        }
    }
}

/// What is wrong with a case, or what is worth knowing of it.
#[derive(Default)]
struct Findings {
    wrong: Vec<String>,
    notes: Vec<String>,
}

fn site(hosts: u8) -> Site {
    let site = Site::up(hosts);
    let conf = site.lab.etc().join("slurm/plugstack.conf");
    fs::write(conf, format!("required /usr/lib/pavo/spank_pavo.so {LIMIT}\n")).unwrap();
    site.lab.login().sh("mkdir -p -m 755 /run/pavo").unwrap();
    site
}

/// Starts a cluster on two hosts, one of which is the case's.
fn alloc(site: &Site, nodes: &str) -> Output {
    let (count, cluster) = (nodes.split(',').count(), nodes.split(',').count());
    let names: Vec<_> =
        nodes.split(',').map(|node| format!("{}{node}", site.lab.prefix())).collect();
    let (nodes, count) = (format!("-w{}", names.join(",")), format!("-N{count}"));
    let cluster = format!("tiny:{cluster}");
    let argv = ["pavo", "alloc", "-c1", &count, &nodes, "--timeout=15", "-E", "true", &cluster];
    site.run("alice", &argv)
}

/// Lets processes go on that hang on this host, as a person would.
fn resume(host: &Host) {
    for process in host.processes().unwrap() {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
        if stat.contains(") T ") {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGCONT);
        }
    }
}

fn run(site: &Site, before: &Before, case: &Case) -> Findings {
    let mut findings = Findings::default();
    case.arm(site);
    let start = Instant::now();
    let output = std::thread::scope(|scope| {
        let running = scope.spawn(|| alloc(site, "n1,n2"));
        // Nobody looks after a launcher but its user.
        while case.whose() == Whose::Launcher && !running.is_finished() {
            std::thread::sleep(Duration::from_secs(2));
            resume(site.lab.login());
        }
        running.join().unwrap()
    });
    findings.notes.push(format!("{} s", start.elapsed().as_secs()));
    judge(site, case, &output, &mut findings);
    // The end of a cluster goes on for a while after its user has been told.
    let patience = Instant::now() + if case.at_the_end() { BY_ITSELF } else { Duration::ZERO };
    while !case.has_come(site) && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(100));
    }
    if !case.disarm(site) {
        findings.wrong.push("the moment did not come".into());
    }
    if let Err(left) = site.as_before(before, BY_ITSELF) {
        findings.notes.push("needs the sweep".into());
        // Every minute on each host; and what is the user's goes with their next command.
        for host in site.lab.computes() {
            if let Err(error) = host.sh("pavo internal setup sweep") {
                findings.wrong.push(format!("the sweep: {error}"));
            }
        }
        let aged = "find /tmp -maxdepth 1 -name 'pavo-*-*' -exec touch -d '5 minutes ago' {} +";
        site.lab.login().sh(aged).unwrap();
        site.run("alice", &["pavo", "ps"]);
        site.run("alice", &["pavo", "status"]);
        if let Err(still) = site.as_before(before, BY_ITSELF) {
            findings.wrong.push(format!("left: {still} (before the sweep: {left})"));
        }
    }
    let node = site.lab.host(case.host).name();
    let next = ["srun", "--immediate=20", "-w", node, "--vm=default:1", "true"];
    let next = site.run("alice", &next);
    if !next.status.success() {
        findings.wrong.push(format!("the next job: {next:?}"));
    }
    findings
}

/// What the user has seen.
fn judge(site: &Site, case: &Case, output: &Output, findings: &mut Findings) {
    let said: Vec<&str> =
        output.stderr.lines().filter(|line| !line.starts_with("salloc: ")).collect();
    let said = said.join(" | ");
    findings.notes.push(format!("{}: {said}", output.status));
    if case.at_the_end() || case.point == "guard.told" {
        return;
    }
    // salloc of Slurm 22.05 says 0 when a signal has ended its command.
    let unknown = case.whose() == Whose::Launcher && case.action == Action::Kill;
    let goes_on = case.whose() == Whose::Launcher && case.action == Action::Stop;
    if !unknown && goes_on != output.status.success() {
        findings.wrong.push("the exit code".into());
    }
    let host = site.lab.host(case.host).name();
    if case.whose() != Whose::Launcher && !output.stderr.contains(host) {
        findings.wrong.push("the host's name is missing".into());
    }
    let why = format!("made to fail at `{}`", case.point);
    // A task that has its VM reports through that; between the two only its log has it.
    let told = case.action == Action::Fail && case.point != "task.spec";
    if told && !output.stderr.contains(&why) {
        findings.wrong.push("the reason is missing".into());
    }
}

fn sweep(cases: &[Case]) {
    let site = site(2);
    // Slurm's and pavo's own folders are made by the first job.
    assert!(alloc(&site, "n1,n2").status.success());
    let mut before = site.snapshot();
    let mut bad = String::new();
    for case in cases {
        let Findings { wrong, notes } = run(&site, &before, case);
        let name = format!("{} {:?} on {}", case.point, case.action, case.host);
        // Not captured: a full sweep takes long, and is looked at.
        let verdict = if wrong.is_empty() { "ok" } else { "WRONG" };
        let line = format!("{name}: {verdict}: {} | {}\n", wrong.join("; "), notes.join("; "));
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        if !wrong.is_empty() {
            // The next case is not to blame.
            before = site.snapshot();
        }
        for wrong in &wrong {
            writeln!(bad, "{name}: {wrong}\n    {}", notes.join("; ")).unwrap();
        }
    }
    assert!(bad.is_empty(), "\n{bad}");
}

#[test]
fn every_moment_comes_when_a_cluster_is_started_and_ended() {
    let site = site(2);
    let seen = crash::CRASH_SEEN;
    let hosts: Vec<&Host> = site.lab.computes().chain([site.lab.login()]).collect();
    for host in &hosts {
        host.sh(&format!("mkdir -p /run/pavo; touch {seen}; chmod 666 {seen}")).unwrap();
    }
    assert!(alloc(&site, "n1,n2").status.success());
    let failing = Case { point: "setup.planned", action: Action::Fail, host: "n1" };
    failing.arm(&site);
    assert!(!alloc(&site, "n1,n2").status.success());
    let read = |host: &&Host| host.sh(&format!("cat {seen}")).unwrap();
    let found = hosts.iter().map(read).collect::<String>();
    let found: BTreeSet<&str> = found.lines().collect();
    let known: BTreeSet<&str> = crash::points().into_iter().collect();
    let missing: Vec<_> = known.difference(&found).collect();
    let unknown: Vec<_> = found.difference(&known).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "missing {missing:?}, unknown {unknown:?}");
}

#[test]
fn a_crash_leaves_nothing() {
    let all = std::env::var_os("PAVO_FULL").is_some();
    // To look into some of them: `PAVO_CASES="apply. setup.held=stop"`.
    let some = std::env::var("PAVO_CASES").unwrap_or_default();
    let mut cases = Vec::new();
    for point in crash::points() {
        for action in [Action::Kill, Action::Stop, Action::Fail] {
            let name = format!("{point}={action:?}").to_lowercase();
            let wanted = |wanted: &str| name.starts_with(wanted) || name.ends_with(wanted);
            let is_wanted = match some.is_empty() {
                true => all || SAMPLE.contains(&(point, action)),
                false => some.split_whitespace().any(wanted),
            };
            if is_wanted {
                cases.push(Case { point, action, host: "n1" });
            }
        }
    }
    sweep(&cases);
}
