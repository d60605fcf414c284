//! What the plugin costs those who want no VM: files opened and programs run more by
//! `srun true`, and its time, with the plugin in plugstack.conf and without.

use std::collections::BTreeMap;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::world::Site;
use super::{median, row, say};

const ROUNDS: usize = 21;

pub fn bench() {
    let site = Site::up(1);
    let conf = site.lab.etc().join("slurm/plugstack.conf");
    let with = fs::read_to_string(&conf).unwrap();
    traced(&site);
    let plugged = traced(&site);
    fs::write(&conf, "").unwrap();
    let bare = traced(&site);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        fs::write(&conf, &with).unwrap();
        ours.push(step(&site));
        fs::write(&conf, "").unwrap();
        theirs.push(step(&site));
    }
    fs::write(&conf, &with).unwrap();
    say(&format!("a step without `--vm`, median of {ROUNDS}          plugin    without  ratio"));
    row("srun true (ms)", median(&mut ours), median(&mut theirs), "");
    row("programs run", plugged.execs as f64, bare.execs as f64, "the same");
    let more: Vec<&str> = plugged
        .opens
        .iter()
        .filter(|(path, count)| bare.opens.get(*path).copied().unwrap_or(0) < **count)
        .map(|(path, _)| path.as_str())
        .collect();
    say(&format!("  opened more: {}    nothing but the plugin", more.join(" ")));
}

fn step(site: &Site) -> f64 {
    let start = Instant::now();
    let output = site.run("alice", &["srun", "-n1", "true"]);
    assert!(output.status.success(), "{output:?}");
    start.elapsed().as_secs_f64() * 1e3
}

struct Traced {
    execs: usize,
    opens: BTreeMap<String, usize>,
}

/// One `srun true` with every exec and open of srun, and of slurmd and its children.
fn traced(site: &Site) -> Traced {
    let host = site.lab.host("n1");
    let slurmd = host.processes().unwrap().into_iter().find(|p| p.name == "slurmd").unwrap();
    let calls = "trace=execve,execveat,open,openat,openat2";
    let pid = slurmd.inner.to_string();
    let words = ["strace", "-f", "-q", "-o", "/run/trace", "-e", calls, "-p", &pid];
    let mut strace = host.command(None, &words).unwrap();
    let mut strace = strace.stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", slurmd.pid);
    while fs::read_to_string(&status).unwrap().lines().any(|line| line == "TracerPid:\t0") {
        std::thread::sleep(Duration::from_millis(5));
    }
    let srun = format!("strace -f -q -o trace -e {calls} srun -n1 true");
    let output = site.run("alice", &["sh", "-c", &srun]);
    assert!(output.status.success(), "{output:?}");
    // slurmstepd goes a little later than srun.
    std::thread::sleep(Duration::from_millis(700));
    let stracer = host.processes().unwrap().into_iter().find(|p| p.name == "strace").unwrap();
    host.sh(&format!("kill -INT {}", stracer.inner)).unwrap();
    strace.wait().unwrap();
    let mut text = fs::read_to_string(host.root().unwrap().join("run/trace")).unwrap();
    text += &fs::read_to_string(site.lab.home("alice").join("trace")).unwrap();
    let mut traced = Traced { execs: 0, opens: BTreeMap::new() };
    for line in text.lines().filter(|line| !line.contains(" = -1 ")) {
        let Some(path) = line.split('"').nth(1) else { continue };
        if line.contains("execve") {
            traced.execs += 1;
        } else {
            // Numbers are of processes, jobs and ports.
            let plain = path.chars().filter(|c| !c.is_ascii_digit()).collect();
            *traced.opens.entry(plain).or_default() += 1;
        }
    }
    traced
}
