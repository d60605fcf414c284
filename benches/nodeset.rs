//! `pavo nodeset` on sets of 100,000 names, beside ClusterShell's `nodeset`.
//!
//! `cargo bench --bench nodeset` needs no privilege. Wall-clock time of the whole command,
//! from files and to a pipe that is read; shown are the medians. What must hold (README):
//! 50 ms for each of ours.

#![expect(clippy::print_stdout, reason = "a bench prints")]

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 11;
/// The other takes seconds.
const THEIR_ROUNDS: usize = 3;
const NAMES: u64 = 100_000;
const MAX: Duration = Duration::from_millis(50);

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let file = |what: &str, names: Vec<String>| {
        let path = dir.path().join(what);
        std::fs::write(&path, names.join("\n") + "\n").unwrap();
        path
    };
    let row = |n: u64| format!("node{n}");
    let in_order = file("in-order", (1..=NAMES).map(row).collect());
    let mixed = file("mixed", mixed().into_iter().map(row).collect());
    let racks = (0..NAMES).map(|n| format!("r{}u{}", n / 50, n % 50)).collect();
    let racks = file("racks", racks);
    let with_suffix = file("suffix", (1..=NAMES).map(|n| format!("node{n:06}-bmc")).collect());
    println!("{:<34} {:>9} {:>13}", "100,000 names, median", "pavo", "ClusterShell");
    fold("fold node[1-100000], in order", &in_order);
    fold("fold node[1-100000], mixed", &mixed);
    fold("fold r[0-1999]u[0-49]", &racks);
    fold("fold node[000001-100000]-bmc", &with_suffix);
    expand("expand node[1-100000]", "node[1-100000]");
    expand("expand r[0-1999]u[0-49]", "r[0-1999]u[0-49]");
}

/// All numbers once, in no order.
fn mixed() -> Vec<u64> {
    let mut numbers: Vec<u64> = (1..=NAMES).collect();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for index in (1..numbers.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        numbers.swap(index, (random % (index as u64 + 1)) as usize);
    }
    numbers
}

fn fold(what: &str, input: &Path) {
    let run = |program: &str, words: &[&str], rounds| {
        let timed = || {
            let mut command = Command::new(program);
            command.args(words).stdin(File::open(input).unwrap());
            timed(&mut command)
        };
        median((0..rounds).map(|_| timed()).collect())
    };
    let ours = run(env!("CARGO_BIN_EXE_pavo"), &["nodeset", "fold", "--fold-all"], ROUNDS);
    show(what, ours, &|| run("nodeset", &["-f"], THEIR_ROUNDS));
}

fn expand(what: &str, set: &str) {
    let run = |program: &str, words: &[&str], rounds| {
        let timed = || timed(Command::new(program).args(words).arg(set).stdin(Stdio::null()));
        median((0..rounds).map(|_| timed()).collect())
    };
    let ours = run(env!("CARGO_BIN_EXE_pavo"), &["nodeset", "expand"], ROUNDS);
    show(what, ours, &|| run("nodeset", &["-e"], THEIR_ROUNDS));
}

fn show(what: &str, ours: Duration, theirs: &dyn Fn() -> Duration) {
    let there = Command::new("nodeset").arg("--version").output().is_ok();
    let theirs = match there {
        true => format!("{:.0} ms", theirs().as_secs_f64() * 1e3),
        false => "not here".into(),
    };
    let met = if ours <= MAX { "ok" } else { "MISSED" };
    println!("{what:<34} {:>6.1} ms {theirs:>13}   ≤ 50 ms: {met}", ours.as_secs_f64() * 1e3);
}

fn timed(command: &mut Command) -> Duration {
    let start = Instant::now();
    let output = command.output().unwrap();
    let took = start.elapsed();
    assert!(output.status.success() && !output.stdout.is_empty(), "{command:?} succeeds");
    took
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
