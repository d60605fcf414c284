//! A checkpoint of 4 VMs of 256 MiB against `zstd` on the same bytes; and VMs that begin from a
//! snapshot against those that boot.
//!
//! `cargo bench --bench ckpt` needs what `alloc` needs, `zstd`, and 4 GiB of room. The four VMs
//! have not booted: 192 MiB of each hold what is half random, half text. Both sides write to
//! the same file system, four at once, at the same level of zstd, and end when it is on the
//! disk. What must hold (README): 1.2 of `zstd`'s time; a VM that begins from a snapshot answers in
//! 0.25 of the time of one that boots the same image.

#![expect(clippy::print_stdout, reason = "a bench prints")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

#[expect(dead_code, reason = "another bench uses more of it")]
mod lab;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lab::Lab;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ROUNDS: usize = 3;
const VMS: usize = 4;
const BALLAST: usize = 192 << 20;

fn main() {
    let Some(lab) = Lab::new() else { return };
    let work = lab.path().join("work");
    fs::create_dir_all(&work).unwrap();
    lab.give(&work);
    written(&lab, &work);
    begun(&lab, &work);
}

/// Four VMs, all at once.
fn written(lab: &Lab, work: &Path) {
    let ballast = work.join("ballast");
    fs::write(&ballast, bytes()).unwrap();
    lab.give(work);
    let loader = format!("loader,file={},addr=0x1000000,force-raw=on", ballast.display());
    let template = format!("laden:\n  image: tiny\n  custom-args: [-device, \"{loader}\"]\n");
    fs::write(lab.path().join("conf/templates.yaml"), template).unwrap();
    let launcher = start(lab, &["--mem", "256", &format!("laden:{VMS}")]);
    let [mut ours, mut theirs] = [const { Vec::new() }; 2];
    for round in 0..ROUNDS {
        let saved = work.join("saved");
        ours.push(timed(lab.pavo(&["ckpt", "-k", saved.to_str().unwrap()])));
        if round == 0 {
            let unpack = "for i in 0 1 2 3; do zstd -qd saved/vm$i.memory.zst -o raw$i; done";
            run(shell(lab, work, unpack));
        }
        // Read from memory, as QEMU's is.
        run(shell(lab, work, "cat raw0 raw1 raw2 raw3 > /dev/null"));
        let pack = "for i in 0 1 2 3; do \
            { zstd -q -1 -T1 -c < raw$i > packed$i && sync packed$i; } & done; wait";
        theirs.push(timed(shell(lab, work, pack)));
        run(shell(lab, work, "rm -r saved packed?"));
    }
    stop(launcher);
    let bytes: u64 =
        (0..VMS).map(|i| fs::metadata(work.join(format!("raw{i}"))).unwrap().len()).sum();
    println!("{VMS} VMs of 256 MiB, {} MiB of them written", bytes >> 20);
    line("checkpoint, zstd", median(ours), median(theirs), 1.2);
}

/// One VM, and several at once, until all agents answer.
fn begun(lab: &Lab, work: &Path) {
    let snapshot = work.join("snapshot");
    let snapshot = snapshot.to_str().unwrap();
    let template = format!("warm:\n  snapshot: {snapshot}\n");
    fs::write(lab.path().join("conf/templates.yaml"), "").unwrap();
    let launcher = start(lab, &["--mem", "256", "--wait", "agent", "tiny"]);
    run(lab.pavo(&["snapshot", "vm0", snapshot]));
    stop(launcher);
    fs::write(lab.path().join("conf/templates.yaml"), template).unwrap();
    for count in [1, VMS] {
        let [mut ours, mut theirs] = [const { Vec::new() }; 2];
        for _ in 0..ROUNDS {
            let (warm, cold) = (format!("warm:{count}"), format!("tiny:{count}"));
            ours.push(until_answers(lab, &[&warm]));
            theirs.push(until_answers(lab, &["--mem", "256", &cold]));
        }
        let what = format!("{count} from a snapshot, cold");
        line(&what, median(ours), median(theirs), 0.25);
    }
}

/// From the command to the answer of the last agent; not what comes after it.
fn until_answers(lab: &Lab, words: &[&str]) -> Duration {
    let begin = Instant::now();
    let launcher = start(lab, &[&["--wait", "agent"], words].concat());
    let took = begin.elapsed();
    stop(launcher);
    took
}

fn line(what: &str, ours: Duration, theirs: Duration, most: f64) {
    let (ours, theirs) = (ours.as_secs_f64(), theirs.as_secs_f64());
    let ratio = ours / theirs;
    let word = if ratio <= most { "ok" } else { "MISSED" };
    println!("{what:<24} {ours:9.2} s {theirs:9.2} s {ratio:6.2}   {most} at most: {word}");
}

/// Half of each page cannot be packed, half is like text.
fn bytes() -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = Vec::with_capacity(BALLAST);
    while bytes.len() < BALLAST {
        for _ in 0..256 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        for number in 0..128_u64 {
            bytes.extend(format!("page {:>10}", state % (number + 7)).as_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(4096), b' ');
    }
    bytes
}

/// A cluster that is up.
fn start(lab: &Lab, words: &[&str]) -> Child {
    let script = ["alloc", "-E", "echo up; exec sleep 3600"];
    let mut command = lab.pavo(&[&script[..], words].concat());
    let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(launcher.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n", "the cluster runs");
    launcher
}

fn stop(launcher: Child) {
    kill(Pid::from_raw(i32::try_from(launcher.id()).unwrap()), Signal::SIGTERM).unwrap();
    wait(launcher);
}

fn wait(mut launcher: Child) {
    launcher.wait().unwrap();
}

fn shell(lab: &Lab, work: &Path, script: &str) -> Command {
    let mut command = lab.ordinary(Path::new("sh"));
    command.current_dir(work).args(["-c", &format!("set -e; {script}")]);
    command
}

fn run(mut command: Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn timed(command: Command) -> Duration {
    let start = Instant::now();
    run(command);
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
