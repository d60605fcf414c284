//! Whatever moment a process of pavo dies, hangs or fails at: the user reads why, nothing
//! stays, and the next job on that host starts.
//!
//! Each case arms one moment (see `pavo::host::crash`) on one host of four and starts a
//! cluster. A few of them are run always, all with `PAVO_FULL=1` (`make test-full`); their
//! table is `target/sweep.txt`.
//!
//! - `PAVO_CASES="ovs:+=kill linux:apply."` runs the cases whose names have all parts of one
//!   of these words.
//! - `PAVO_LABS=5`: so many labs at a time instead of one more than cores (they wait much).
//! - `PAVO_PATIENCE=2`: so many times as long limits, for a machine that has other work.

mod case;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pavo::host::crash;
use pavo_lab::{Host, Options, Output};

use super::world::{Before, Site};
use case::{Action, Case, Switch, Whose, read};

/// What is always run: each kind of end, and what once left something.
const SAMPLE: &[&str] = &[
    "linux:launch.stored=kill",
    "linux:write.state=kill",
    "linux:fabric.keys=kill",
    "linux:write.journal=kill",
    "linux:setup.introduced=fail",
    "linux:apply.taps=fail",
    "linux:task.hello=kill",
    "linux:task.spec=stop",
    "linux:release.buried=kill",
    "linux:leave.freed=kill",
    "ovs:ovs.made=kill",
    "ovs:ovs.settings=fail",
];

/// Seconds after which the plugin ends a set-up or a removal, and a launcher its wait.
const LIMIT: u32 = 9;
const TIMEOUT: u32 = 15;
/// How long leaving may take by itself, and then with the sweep's help.
const BY_ITSELF: Duration = Duration::from_secs(4);
const WITH_HELP: Duration = Duration::from_secs(10);

fn patience() -> u32 {
    std::env::var("PAVO_PATIENCE").map_or(1, |factor| factor.parse().unwrap())
}

/// The reset vector is 16 bytes before the end: `cli; hlt; jmp` back to `hlt`.
fn firmware() -> Vec<u8> {
    let mut rom = vec![0xf4; 64 << 10];
    let reset = rom.len() - 16;
    rom[reset..reset + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    rom
}

/// A site whose guests `halt:N` do nothing, in which a job has run: the first one makes
/// Slurm's and pavo's own folders.
fn site(hosts: u8, switch: Switch) -> Site {
    let ovs = switch == Switch::Ovs;
    let site = Site::with(Options { hosts, ovs, ..Options::default() });
    let conf = site.lab.etc().join("slurm/plugstack.conf");
    let limit = LIMIT * patience();
    fs::write(conf, format!("required /usr/lib/pavo/spank_pavo.so limit={limit}\n")).unwrap();
    let rom = site.lab.home("alice").parent().unwrap().join("images/halt.rom");
    fs::write(&rom, firmware()).unwrap();
    fs::set_permissions(&rom, fs::Permissions::from_mode(0o644)).unwrap();
    let arguments = "custom-args: ['-bios', '/home/images/halt.rom']";
    let template = format!("halt:\n  image: tiny\n  resource-set: default\n  {arguments}\n");
    site.write("templates.yaml", &template);
    let batch = fs::read_to_string(site.lab.etc_pavo().join("batch.yaml")).unwrap();
    let switch = format!("{switch:?}").to_lowercase();
    site.write("batch.yaml", &format!("{batch}  switch: {switch}\n"));
    site.lab.login().sh("mkdir -p -m 755 /run/pavo").unwrap();
    let first = alloc(&site);
    assert!(first.status.success(), "{first:?}");
    site
}

/// Starts a cluster on all hosts.
fn alloc(site: &Site) -> Output {
    alloc_with(site, "true")
}

fn alloc_with(site: &Site, script: &str) -> Output {
    let count = site.lab.computes().count();
    let timeout = format!("--timeout={}", TIMEOUT * patience());
    let (nodes, cluster) = (format!("-N{count}"), format!("halt:{count}"));
    site.run("alice", &["pavo", "alloc", "-c1", &nodes, &timeout, "-E", script, &cluster])
}

/// The processes that hang on this host.
fn hanging(host: &Host) -> Vec<i32> {
    let hangs = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains(") T ")
    };
    host.processes().unwrap().iter().map(|process| process.pid).filter(hangs).collect()
}

/// Lets processes go on, as a person would.
fn resume(host: &Host) {
    for pid in hanging(host) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
    }
}

/// A case that was run.
struct Row {
    case: Case,
    seconds: u64,
    /// Whether it took the sweep to remove all.
    swept: bool,
    read: String,
    wrong: Vec<String>,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Case { switch, point, action, host } = &self.case;
        let (switch, action) = (format!("{switch:?}"), format!("{action:?}"));
        let swept = if self.swept { "sweep" } else { "" };
        let verdict = if self.wrong.is_empty() { "ok" } else { "WRONG" };
        write!(
            f,
            "{switch:5} {point:22} {action:4} {host} {:3} s {swept:5} {verdict:5} ",
            self.seconds
        )?;
        write!(f, "{}", self.read)?;
        self.wrong.iter().try_for_each(|wrong| write!(f, "\n    WRONG: {}", wrong.trim_end()))
    }
}

fn run(site: &Site, before: &Before, case: Case) -> Row {
    let mut row = Row { case, seconds: 0, swept: false, read: String::new(), wrong: Vec::new() };
    case.arm(site);
    let start = Instant::now();
    let output = std::thread::scope(|scope| {
        let running = scope.spawn(|| alloc(site));
        // Nobody looks after a launcher but its user.
        while case.whose() == Whose::Launcher && !running.is_finished() {
            std::thread::sleep(Duration::from_millis(500));
            resume(site.lab.login());
        }
        running.join().unwrap()
    });
    row.wrong = case.judge(site, &output);
    row.read = read(site, &output);
    // The end of a cluster goes on for a while after its user has been told.
    let wait = if case.at_the_end() { WITH_HELP * patience() } else { Duration::ZERO };
    until(wait, || case.has_come(site));
    if !case.disarm(site) {
        row.wrong.push("the moment did not come".into());
    }
    if case.action == Action::Stop {
        let limit = Duration::from_secs(u64::from(LIMIT * patience() + 3));
        until(limit, || case.places(site).into_iter().all(|host| hanging(host).is_empty()));
    }
    if let Err(left) = site.as_before(before, BY_ITSELF * patience()) {
        row.swept = true;
        row.wrong.extend(sweep(site));
        if let Err(still) = site.as_before(before, WITH_HELP * patience()) {
            row.wrong.push(format!("left: {still} (before the sweep: {left})"));
        }
    }
    let (node, wait) =
        (site.lab.host(case.host).name(), format!("--immediate={}", 20 * patience()));
    let next = site.run("alice", &["srun", &wait, "-w", node, "--vm=default:1", "true"]);
    if !next.status.success() {
        row.wrong.push(format!("the next job: {next:?}"));
    }
    row.seconds = start.elapsed().as_secs();
    row
}

/// What happens every minute on each host; and what is the user's goes with their next
/// command.
fn sweep(site: &Site) -> Vec<String> {
    let swept = site.lab.computes().map(|host| host.sh("pavo internal setup sweep"));
    let wrong = swept.filter_map(|swept| Some(format!("the sweep: {}", swept.err()?))).collect();
    let aged = "find /tmp -maxdepth 1 -name 'pavo-*-*' -exec touch -d '5 minutes ago' {} +";
    site.lab.login().sh(aged).unwrap();
    site.run("alice", &["pavo", "ps"]);
    site.run("alice", &["pavo", "status"]);
    wrong
}

fn until(limit: Duration, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !is_so() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Runs cases of one switch from the queue until it is empty.
fn work(switch: Switch, queue: &Mutex<Vec<Case>>, rows: &Mutex<Vec<Row>>) {
    let mut lab = None;
    loop {
        let Some(case) = queue.lock().unwrap().pop() else { return };
        let (site, before) = lab.get_or_insert_with(|| {
            let site = site(4, switch);
            let before = site.snapshot();
            (site, before)
        });
        let row = catch_unwind(AssertUnwindSafe(|| run(site, before, case)));
        let row = row.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.unwrap_or_else(|| "a panic".into());
            Row { case, seconds: 0, swept: false, read: String::new(), wrong: vec![text] }
        });
        if !row.wrong.is_empty() {
            // The next case is not to blame.
            lab = None;
        }
        // Not captured: a full sweep takes long, and is looked at.
        std::io::stderr().write_all(format!("{row}\n").as_bytes()).unwrap();
        rows.lock().unwrap().push(row);
    }
}

/// Runs these cases, and returns what was wrong.
fn run_all(mut cases: Vec<Case>, labs: usize, table: Option<&Path>) -> String {
    let start = Instant::now();
    let order: Vec<String> = cases.iter().map(Case::name).collect();
    let rows = Mutex::new(Vec::new());
    cases.reverse();
    for switch in [Switch::Linux, Switch::Ovs] {
        let queue = cases.iter().filter(|case| case.switch == switch).copied().collect();
        let queue: Mutex<Vec<Case>> = Mutex::new(queue);
        let labs = labs.min(queue.lock().unwrap().len());
        std::thread::scope(|scope| {
            for _ in 0..labs {
                scope.spawn(|| work(switch, &queue, &rows));
            }
        });
    }
    let mut rows = rows.into_inner().unwrap();
    rows.sort_by_key(|row| order.iter().position(|name| *name == row.case.name()));
    assert_eq!(rows.len(), order.len(), "all cases were run");
    if let Some(path) = table {
        let mut text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        for action in [Action::Kill, Action::Fail, Action::Stop] {
            let count = |ok: bool| {
                let of_it = |row: &&Row| row.case.action == action && row.wrong.is_empty() == ok;
                rows.iter().filter(of_it).count()
            };
            text += &format!("{action:?}: {} ok, {} wrong\n", count(true), count(false));
        }
        text += &format!("{} s, {labs} labs\n", start.elapsed().as_secs());
        fs::write(path, &text).unwrap();
        std::io::stderr().write_all(text.as_bytes()).unwrap();
    }
    let wrong = rows.iter().filter(|row| !row.wrong.is_empty());
    wrong.map(|row| format!("{row}\n")).collect()
}

#[track_caller]
fn every_moment_comes(switch: Switch, known: Vec<&'static str>) {
    let site = site(2, switch);
    let seen = crash::CRASH_SEEN;
    let hosts: Vec<&Host> = site.lab.computes().chain([site.lab.login()]).collect();
    for host in &hosts {
        host.sh(&format!("mkdir -p /run/pavo; touch {seen}; chmod 666 {seen}")).unwrap();
    }
    // A cluster does not wait until the site's store has let it in: this one does.
    let stored =
        format!("timeout 60 sh -c 'until grep -qx launch.stored {seen}; do sleep 0.1; done'");
    let output = alloc_with(&site, &stored);
    assert!(output.status.success(), "{output:?}");
    let failing = Case { switch, point: "setup.planned", action: Action::Fail, host: "n1" };
    failing.arm(&site);
    assert!(!alloc(&site).status.success());
    // Hosts tidy up after their user has been told.
    let known: BTreeSet<String> = known.into_iter().map(str::to_owned).collect();
    let mut found = BTreeSet::new();
    until(WITH_HELP * patience(), || {
        let read = |host: &&Host| host.sh(&format!("cat {seen}")).unwrap();
        found = hosts.iter().map(read).collect::<String>().lines().map(str::to_owned).collect();
        found == known
    });
    let missing: Vec<_> = known.difference(&found).collect();
    let unknown: Vec<_> = found.difference(&known).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "missing {missing:?}, unknown {unknown:?}");
}

#[test]
fn every_moment_comes_when_a_cluster_is_started_and_ended() {
    every_moment_comes(Switch::Linux, crash::linux_points());
}

#[test]
fn every_moment_comes_on_open_vswitch() {
    every_moment_comes(Switch::Ovs, crash::ovs_points());
}

#[test]
fn a_crash_leaves_nothing() {
    let full = std::env::var_os("PAVO_FULL").is_some();
    let some = std::env::var("PAVO_CASES").unwrap_or_default();
    let mut cases = Case::all();
    let wrong = if full || !some.is_empty() {
        let words: Vec<Vec<&str>> =
            some.split_whitespace().map(|word| word.split('+').collect()).collect();
        let has = |name: &str, word: &[&str]| word.iter().all(|part| name.contains(part));
        cases.retain(|case| words.is_empty() || words.iter().any(|word| has(&case.name(), word)));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let labs = std::env::var("PAVO_LABS").map_or(cores + 1, |labs| labs.parse().unwrap());
        let target = Path::new(env!("CARGO_BIN_EXE_pavo")).ancestors().nth(2).unwrap();
        run_all(cases, labs, Some(&target.join("sweep.txt")))
    } else {
        cases.retain(|case| SAMPLE.contains(&&*case.name()));
        assert_eq!(cases.len(), SAMPLE.len());
        run_all(cases, 1, None)
    };
    assert!(wrong.is_empty(), "\n{wrong}");
}
