//! A large cluster of VMs without guests: what is left is the control plane.
//!
//! QEMU's place has the [null hypervisor](super::null). The floors are `srun` of as many
//! tasks on as many hosts that do nothing, and of the null hypervisor itself until the last
//! of them says that it runs. For each VM pavo has two processes, the floor one.
//!
//! `PAVO_BENCH_SCALE=8x4` instead of the list below: hosts and VMs on each.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use pavo_lab::Options;

use super::null::{LOG, NAME, Times};
use super::world::Site;
use super::{median, row, say};

const HOSTS: u8 = 64;
const VMS: u32 = 16;
const ROUNDS: usize = 3;
/// How long a round may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// What is written at times is written by then.
const SETTLED: Duration = Duration::from_millis(1500);

pub fn bench() {
    let asked = std::env::var("PAVO_BENCH_SCALE").ok();
    let asked = asked.as_deref().and_then(|asked| asked.split_once('x'));
    let (hosts, vms) = match asked {
        Some((hosts, vms)) => (hosts.parse().unwrap(), vms.parse().unwrap()),
        None => (HOSTS, VMS),
    };
    let site = Site::with(Options { hosts, cpus: 16, ..Options::default() });
    let images = site.lab.home("alice").parent().unwrap().join("images");
    let put = |name: &str, bytes: &[u8]| {
        fs::write(images.join(name), bytes).unwrap();
        fs::set_permissions(images.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    };
    put(NAME, &fs::read("/proc/self/exe").unwrap());
    put("peer", PEER.as_bytes());
    let template =
        format!("  image: tiny\n  resource-set: default\n  qemu-bin: /home/images/{NAME}\n");
    site.write("templates.yaml", &format!("nothing:\n{template}"));
    fs::write(site.lab.home("alice").join("now"), NOW).unwrap();
    // The person is new to the site, programs to the page cache.
    round(&site, 1, 1);
    let sizes = if hosts > 4 { vec![4, hosts] } else { vec![hosts] };
    for hosts in sizes {
        let rounds: Vec<Round> = (0..ROUNDS).map(|_| round(&site, hosts, vms)).collect();
        tell(hosts, vms, &rounds);
    }
}

/// Run when all VMs do: when that is, what the launcher has used, and until the bench has
/// looked.
const NOW: &str = r#"
now=$EPOCHREALTIME
pid=$PPID
while [ "$(</proc/$pid/comm)" != pavo ]; do
    read -r stat </proc/$pid/stat; set -- ${stat##*) }; pid=$2
done
read -r stat </proc/$pid/stat; set -- ${stat##*) }
echo $now ${12} ${13} >now.new
mv now.new now.out
until [ -e go ]; do sleep 0.05; done
"#;

/// Starts so many null hypervisors as one step and prints the time when the last runs.
const PEER: &str = r#"#!/bin/bash
exec 3< <(exec srun -Q -n "$1" /home/images/null-hypervisor 2>/dev/null </dev/null & echo $!; wait)
read -r pid <&3
for ((left = $1; left; left--)); do read -r _ <&3; done
echo $EPOCHREALTIME
kill -TERM "$pid"
cat <&3 >/dev/null
"#;

/// What one cluster took, and its floors.
struct Round {
    /// Seconds from the launcher's start to all running, as it believes.
    pavo: f64,
    /// Until each phase was over, for the first VM and for the last.
    phases: [(f64, f64); 4],
    /// The last steps, at the end: the launcher was told of the last VM's.
    hypervisors: f64,
    nothing: f64,
    /// Seconds of the CPU: launcher, etcd, slurmctld.
    cpu: [f64; 3],
    rpcs: BTreeMap<String, i64>,
    etcd: BTreeMap<String, i64>,
}

fn round(site: &Site, hosts: u8, vms: u32) -> Round {
    let home = site.lab.home("alice");
    for file in [LOG.strip_prefix("/home/alice/").unwrap(), "now.out", "go"] {
        let _ = fs::remove_file(home.join(file));
    }
    let all = u32::from(hosts) * vms;
    let script = format!(
        "a=$EPOCHREALTIME
         pavo internal launcher -E 'bash now' nothing:{all} >launcher.log 2>&1 || {{
             tail -n 20 launcher.log >&2
             exit 1
         }}
         # Until Slurm has had its word of the end of a step, the next one waits.
         sleep 2; b=$EPOCHREALTIME; c=$(/home/images/peer {all})
         sleep 2; d=$EPOCHREALTIME; srun -Q -n {all} true; e=$EPOCHREALTIME
         echo $a $b $c $d $e"
    );
    let (nodes, each) = (format!("-N{hosts}"), format!("--ntasks-per-node={vms}"));
    let words = ["salloc", "-Q", &nodes, &each, "-c1", "--mem-per-cpu=200M", "bash", "-c", &script];
    // What Slurm has to say of the end of the last one is not of this one.
    site.lab.wait_idle().unwrap();
    let login = site.lab.login();
    let daemons = || ["etcd", "slurmctld"].map(|name| cpu(site, name));
    let (rpcs, etcd, used) = (rpcs(site), transactions(site), daemons());
    let mut child = login.command(Some("alice"), &words).unwrap();
    let mut child = child.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while !home.join("now.out").exists() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none() && start.elapsed() < PATIENCE, "{ended:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(SETTLED);
    let now = fs::read_to_string(home.join("now.out")).unwrap();
    let now: Vec<f64> = now.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let log = Times::read(&fs::read_to_string(home.join("null.log")).unwrap());
    assert_eq!(log.len(), all as usize);
    let (used, [etcd_before, ctld_before]) = (daemons(), used);
    let (rpcs, etcd) = (more(&rpcs, self::rpcs(site)), more(&etcd, transactions(site)));
    fs::write(home.join("go"), "").unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success());
    let at: Vec<f64> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let phase = |of: fn(&Times) -> f64| {
        let all = || log.iter().map(|times| of(times) - at[0]);
        (all().fold(f64::MAX, f64::min), all().fold(f64::MIN, f64::max))
    };
    Round {
        pavo: now[0] - at[0],
        phases: [
            phase(|t| t.step),
            phase(|t| t.task),
            phase(|t| t.hypervisor),
            phase(|t| t.running),
        ],
        hypervisors: at[2] - at[1],
        nothing: at[4] - at[3],
        cpu: [(now[1] + now[2]) / 100.0, used[0] - etcd_before, used[1] - ctld_before],
        rpcs,
        etcd,
    }
}

fn tell(hosts: u8, vms: u32, rounds: &[Round]) {
    let of =
        |value: &dyn Fn(&Round) -> f64| median(&mut rounds.iter().map(value).collect::<Vec<_>>());
    let title = format!("{hosts} hosts with {vms} VMs each, median of {ROUNDS}");
    say(&format!("{title:44}       pavo       srun  ratio"));
    let (pavo, peer) = (of(&|r| r.pavo), of(&|r| r.hypervisors));
    row("start to all running (s)", pavo, peer, "srun of as many null hypervisors");
    row("  the same", pavo, of(&|r| r.nothing), "srun of as many `true`, to its end");
    let more = of(&|r| r.pavo - r.hypervisors);
    say(&format!("  more than srun of null hypervisors: {more:.2} s    2 s at most"));
    let names =
        ["slurmstepd was started", "root's set-up was done", "the hypervisor ran", "the guest ran"];
    for (number, name) in names.into_iter().enumerate() {
        let (first, last) = (of(&|r| r.phases[number].0), of(&|r| r.phases[number].1));
        say(&format!("  {name:26} after {first:6.2} s for the first, {last:6.2} s for the last"));
    }
    let [launcher, etcd, slurmctld] = [0, 1, 2].map(|number| of(&|r| r.cpu[number]));
    say(&format!("  CPU (s): launcher {launcher:.2}, etcd {etcd:.2}, slurmctld {slurmctld:.2}"));
    let last = rounds.last().unwrap();
    let list = |counts: &BTreeMap<String, i64>| {
        let all = counts.iter().map(|(name, count)| format!("{name} {count}"));
        all.collect::<Vec<_>>().join(", ")
    };
    say(&format!(
        "  slurmctld was asked: {}    the same whatever the number of hosts",
        list(&last.rpcs)
    ));
    say(&format!(
        "  etcd was asked: {}    {} transactions at most",
        list(&last.etcd),
        u32::from(hosts) + 4
    ));
}

/// Seconds of the CPU that a daemon has used.
fn cpu(site: &Site, name: &str) -> f64 {
    let host = site.lab.host(if name == "etcd" { "e1" } else { "login" });
    let pid = host.service(name).unwrap().pid().unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let rest: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    (rest[11].parse::<f64>().unwrap() + rest[12].parse::<f64>().unwrap()) / 100.0
}

/// How often slurmctld was asked for what, without those who only look.
fn rpcs(site: &Site) -> BTreeMap<String, i64> {
    let said = site.run("root", &["sdiag"]).stdout;
    let by_type = said.split("by message type").nth(1).unwrap().split("by user").next().unwrap();
    let count = |line: &str| {
        let mut words = line.split_whitespace();
        let name = words.next()?.to_owned();
        let count = line.split("count:").nth(1)?.split_whitespace().next()?.parse().ok()?;
        (name != "REQUEST_STATS_INFO").then_some((name, count))
    };
    by_type.lines().filter_map(count).collect()
}

/// How often etcd was asked for what; all that a client may ask for.
fn transactions(site: &Site) -> BTreeMap<String, i64> {
    let asked = site.lab.host("e1").inside(|| {
        let mut stream = TcpStream::connect("127.0.0.1:2381")?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    let asked = asked.unwrap();
    let wanted = |name: &str| {
        let name = name
            .split_once("grpc_method=\"")
            .map_or(name, |(_, rest)| rest.split('"').next().unwrap());
        name.replace("etcd_server_proposals_committed_total", "written")
    };
    let lines = asked.lines().filter(|line| {
        line.starts_with("grpc_server_started_total{")
            || line.starts_with("etcd_server_proposals_committed_total ")
    });
    let mut counts = BTreeMap::new();
    for line in lines {
        let (name, count) = line.rsplit_once(' ').unwrap();
        *counts.entry(wanted(name)).or_default() += count.parse::<f64>().unwrap() as i64;
    }
    counts
}

/// What has been added.
fn more(before: &BTreeMap<String, i64>, now: BTreeMap<String, i64>) -> BTreeMap<String, i64> {
    let added = now.into_iter().map(|(name, count)| {
        let more = count - before.get(&name).copied().unwrap_or_default();
        (name, more)
    });
    added.filter(|(_, count)| *count > 0).collect()
}
