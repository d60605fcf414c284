//! Being loaded: what it costs those who want no VM, and which Slurm takes it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::world::{World, until};

#[test]
fn a_step_without_vms_costs_no_exec_and_no_file_but_the_plugin_itself() {
    let world = World::new(1);
    let conf = world.lab.etc().join("slurm/plugstack.conf");
    let with = fs::read_to_string(&conf).unwrap();
    // Once before, for what only the first step of a node opens.
    traced(&world);
    let plugged = traced(&world);
    fs::write(&conf, "").unwrap();
    let bare = traced(&world);
    fs::write(&conf, with).unwrap();

    assert_eq!(plugged.execs, bare.execs);
    assert!(plugged.opens.contains("/usr/lib/pavo/spank_pavo.so"), "{:?}", plugged.opens);
    let more: Vec<&String> = plugged.opens.difference(&bare.opens).collect();
    let own = |path: &str| path.ends_with("/spank_pavo.so") || path.contains("/libgcc_s.so");
    assert!(more.iter().all(|path| own(path)), "{more:?}");
}

struct Traced {
    execs: Vec<String>,
    /// Whether or not they are there.
    opens: BTreeSet<String>,
}

/// One `srun true`, with every exec and open of srun, and of slurmd and its children.
fn traced(world: &World) -> Traced {
    let host = world.lab.host("n1");
    let slurmd = host.processes().unwrap().into_iter().find(|p| p.name == "slurmd").unwrap();
    let calls = "trace=execve,execveat,open,openat,openat2,stat,newfstatat,access,faccessat2";
    let pid = slurmd.inner.to_string();
    let words = ["strace", "-f", "-o", "/run/trace", "-e", calls, "-p", &pid];
    let mut strace = host.command(None, &words).unwrap();
    let mut strace = strace.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let status = format!("/proc/{}/status", slurmd.pid);
    until("slurmd is traced", || {
        let status = fs::read_to_string(&status).unwrap();
        !status.lines().any(|line| line == "TracerPid:\t0")
    });
    world.done(&format!("strace -f -o trace -e {calls} srun -n1 true"));
    world.quiet("n1");
    let stracer = host.processes().unwrap().into_iter().find(|p| p.name == "strace").unwrap();
    world.lab.host("n1").sh(&format!("kill -INT {}", stracer.inner)).unwrap();
    strace.wait().unwrap();
    let mut text = fs::read_to_string(host.root().unwrap().join("run/trace")).unwrap();
    text += &fs::read_to_string(world.lab.home("alice").join("trace")).unwrap();
    assert!(text.contains("slurmstepd"), "slurmstepd was traced");
    let mut traced = Traced { execs: Vec::new(), opens: BTreeSet::new() };
    for line in text.lines() {
        let Some(path) = line.split('"').nth(1) else { continue };
        // Numbers are of processes, jobs and ports.
        let plain = path.chars().filter(|c| !c.is_ascii_digit()).collect();
        match line.contains("execve") {
            true => traced.execs.push(plain),
            false => _ = traced.opens.insert(plain),
        }
    }
    traced.execs.sort();
    traced
}

#[test]
fn a_slurm_of_another_release_refuses_it_by_name() {
    let world = World::new(1);
    for (version, said) in [("0x170b05", "23.11.5"), ("0", "0.00.0")] {
        let dir = tempfile::tempdir().unwrap();
        let plugin = build(dir.path(), version);
        let other = world.lab.etc().join("pavo/other.so");
        fs::copy(plugin, other).unwrap();
        let conf = world.lab.etc().join("slurm/plugstack.conf");
        fs::write(conf, "required /etc/pavo/other.so\n").unwrap();
        let output = world.alice("srun -n1 true");
        assert!(!output.status.success());
        assert!(output.stderr.contains(&format!("version ({said})")), "{}", output.stderr);
    }
}

/// The plugin as for another Slurm, without cargo.
fn build(dir: &Path, version: &str) -> std::path::PathBuf {
    fs::write(dir.join("slurm_version"), version).unwrap();
    let plugin = dir.join("other.so");
    let rustc = std::env::var_os("RUSTC").unwrap_or("rustc".into());
    let mut command = Command::new(rustc);
    command.args(["--crate-type=cdylib", "--crate-name=other", "--edition=2024", "-o"]);
    command.arg(&plugin).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs"));
    assert!(command.env("OUT_DIR", dir).status().unwrap().success());
    plugin
}
