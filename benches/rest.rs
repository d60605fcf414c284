//! What a cluster costs while nothing happens: each of pavo's processes, at rest.
//!
//! `cargo bench --bench rest` needs what `alloc` needs. Memory is the proportional set
//! (what is shared counts in part); wake-ups are the context switches of all threads. QEMU
//! and pasta are shown for comparison. What must hold (README): a VM's process has at most
//! 12 MiB and never wakes up.

#![expect(clippy::print_stdout, reason = "a bench prints")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

#[expect(dead_code, reason = "another bench uses more of it")]
mod lab;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use lab::Lab;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// For what is still said right after the guests are up.
const SETTLE: Duration = Duration::from_secs(3);
const REST: Duration = Duration::from_secs(5);
const MAX_KIB: u64 = 12 << 10;

fn main() {
    let Some(lab) = Lab::new() else { return };
    let script = "echo up; exec sleep 600";
    let words = ["alloc", "--mem", "128", "--wait", "ssh", "-E", script, "tiny:2"];
    let mut command = lab.pavo(&words);
    let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(launcher.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n", "the cluster runs");
    sleep(SETTLE);

    let processes = tree(launcher.id());
    let before: Vec<Option<u64>> = processes.iter().map(|(pid, _)| switches(*pid)).collect();
    sleep(REST);
    println!("{:<24} {:>12} {:>10}", "at rest for 5 s", "PSS", "wake-ups");
    for ((pid, name), before) in processes.iter().zip(before) {
        let (pss, after) = (pss(*pid), switches(*pid));
        let woken = after.zip(before).map(|(after, before)| after - before);
        let met = match (name.as_str(), pss, woken) {
            ("pavo internal run", Some(pss), Some(woken)) => {
                if pss <= MAX_KIB && woken == 0 {
                    "   ≤ 12 MiB, 0: ok"
                } else {
                    "   ≤ 12 MiB, 0: MISSED"
                }
            }
            _ => "",
        };
        let shown = |value: Option<u64>| value.map_or("unreadable".into(), |v| v.to_string());
        println!("{name:<24} {:>8} KiB {:>10}{met}", shown(pss), shown(woken));
    }
    kill(Pid::from_raw(i32::try_from(launcher.id()).unwrap()), Signal::SIGTERM).unwrap();
    launcher.wait().unwrap();
}

/// A process and all below it, with what they are called.
fn tree(pid: u32) -> Vec<(u32, String)> {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&words).into_owned();
    let words: Vec<&str> = words.split('\0').collect();
    let program = words[0].rsplit('/').next().unwrap_or_default();
    let name = match words.get(1) {
        Some(&"internal") => format!("{program} internal {}", words[2]),
        Some(&"alloc") => format!("{program} alloc"),
        _ => program.to_owned(),
    };
    let mut found = vec![(pid, name)];
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    for task in tasks.filter_map(Result::ok) {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|word| word.parse().ok()) {
            found.extend(tree(child));
        }
    }
    found
}

/// How often its threads were taken off a processor.
fn switches(pid: u32) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let of = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let fields = ["voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"];
        Some(fields.iter().filter_map(|name| number(&status, name)).sum::<u64>())
    };
    Some(tasks.filter_map(Result::ok).filter_map(of).sum())
}

fn pss(pid: u32) -> Option<u64> {
    number(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, "Pss:")
}

fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}
