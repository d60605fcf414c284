//! Root's part on one host: what `setup create` and `setup delete` take, and the programs
//! that they run.
//!
//! Four VMs with an L3 and an L2 network, certificate log-in at an etcd with TLS, and one
//! more host in the job, which has said who it is already. The clock runs from before the
//! program is started to its end, as for slurmstepd. Beside it: what the machine takes for
//! the same links and tables by `ip -batch`, `nft` and, where it is the switch, `ovs-vsctl`,
//! without any flow, check, journal or store.
//!
//! CPU time is that of the processes, also of guard and responder, as far as they have come
//! when the set-up is done. What the kernel does later, on its own, is nobody's.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::Duration;

use pavo::model::owner::{Manager, Owner};
use pavo::network::SwitchKind;
use pavo::ops::setup::HostRecord;
use pavo::store::keys;
use pavo_lab::Options;

use super::world::Site;
use super::{median, row, say, sh};

const ROUNDS: usize = 15;

/// Reads what bash's `times` has written: its children's CPU time in milliseconds.
const SPENT: &str = r#"spent() {
  { read -r _; read -r user system; } </run/times.$1
  local all=0 t
  for t in $user $system; do
    t=${t%s}; local minutes=${t%m*} seconds=${t#*m}
    all=$((all + minutes * 60000 + 10#${seconds/./}))
  done
  echo $all
}"#;
/// Of nobody else in the lab.
const FIRST_JOB: u32 = 4_000;

/// What one run said of itself, in milliseconds.
struct Times {
    create: f64,
    delete: f64,
    /// CPU time, of all programs that were run and of what goes on running.
    create_cpu: f64,
    delete_cpu: f64,
}

/// What carries the guests' frames, and what is promised of it.
struct Kind {
    switch: &'static str,
    kind: SwitchKind,
    title: &'static str,
    create: &'static str,
    floor: fn(&Site) -> Times,
}

const LINUX: Kind = Kind {
    switch: "linux",
    kind: SwitchKind::Linux,
    title: "the Linux switch",
    create: "80 ms at most",
    floor: floor_linux,
};

const OVS: Kind = Kind {
    switch: "ovs",
    kind: SwitchKind::Ovs,
    title: "Open vSwitch",
    create: "150 ms at most",
    floor: floor_ovs,
};

pub fn bench() {
    on(&LINUX, &Site::up(2));
    on(&OVS, &Site::with(Options { hosts: 2, ovs: true, ..Options::default() }));
}

fn on(kind: &Kind, site: &Site) {
    let batch = std::fs::read_to_string(site.lab.etc_pavo().join("batch.yaml")).unwrap();
    site.write("batch.yaml", &format!("{batch}  switch: {}\n", kind.switch));
    let before = site.snapshot();
    let (mut runs, mut floors) = (Vec::new(), Vec::new());
    // In turns: what else the machine does falls on both.
    for n in 0..ROUNDS as u32 {
        runs.push(run(kind, site, FIRST_JOB + n, ""));
        floors.push((kind.floor)(site));
    }
    let middle = |times: &[Times], of: fn(&Times) -> f64| {
        median(&mut times.iter().map(of).collect::<Vec<_>>())
    };
    let least =
        |times: &[Times], of: fn(&Times) -> f64| times.iter().map(of).fold(f64::MAX, f64::min);
    say(&format!("root's set-up of a host, median of {ROUNDS}          pavo      floor  ratio"));
    let compare = |what: &str, of: fn(&Times) -> f64, promise: &str| {
        row(what, middle(&runs, of), middle(&floors, of), promise);
    };
    compare(&format!("create, {} (ms)", kind.title), |t| t.create, kind.create);
    compare(&format!("delete, {} (ms)", kind.title), |t| t.delete, "80 ms at most");
    compare("  CPU time of create", |t| t.create_cpu, "");
    compare("  CPU time of delete", |t| t.delete_cpu, "");
    row("  the fastest create", least(&runs, |t| t.create), least(&floors, |t| t.create), "");
    row("  the fastest delete", least(&runs, |t| t.delete), least(&floors, |t| t.delete), "");
    // Detached: it goes on with what the set-up leaves running.
    let words = "strace -D -f -q -e trace=execve -e status=successful -o /run/execs ";
    run(kind, site, FIRST_JOB + 98, words);
    for (what, number) in [("create", 0), ("delete", 1)] {
        let (own, others): (Vec<String>, Vec<String>) =
            execs(site, number).into_iter().partition(|program| {
                // Whatever is at its path by now, it starts itself.
                program.ends_with("/pavo") || program == "/proc/self/exe"
            });
        let names = others.join(" ");
        say(&format!("  programs that {what} runs: {} ({names})  3 at most", others.len()));
        say(&format!("    and pavo itself, as guard and responder: {}", own.len()));
    }
    site.nothing_left(&before);
}

/// One set-up and its removal; `before` are words before the program's name.
fn run(kind: &Kind, site: &Site, job: u32, before: &str) -> Times {
    let host = site.lab.host("n1");
    let [one, two] = ["n1", "n2"].map(|name| site.lab.host(name).name().to_owned());
    // The other host's word.
    let record = HostRecord {
        node: two.clone(),
        address: site.lab.address("n2"),
        switch: kind.kind,
        ranks: vec![4, 5, 6, 7],
        step: 0,
        restart: 0,
        failure: None,
    };
    let record = serde_json::to_string(&record).unwrap();
    let owner = Owner { manager: Manager::Slurm, job };
    let key = keys::host_record("alice", owner, 0, 1);
    site.lab.etcdctl(&["put", &key, &record]).unwrap();
    let ask = format!(
        "version=1\njob={job}\nstep=0\nuid=2001\ngid=2001\nnode={one}\nnode_id=0\nnodes=2\n\
         node_list={one},{two}\ntasks=8\nlocal_tasks=0,1,2,3\nvm=two-networks:8\n"
    );
    let [create, delete] = [".0 ", ".1 "].map(|end| match before {
        "" => String::new(),
        before => before.trim_end().to_owned() + end,
    });
    // The clock is bash's own: no program is run to read it. What goes on running is asked
    // for its time.
    let script = format!(
        "echo '{ask}'keeper=$$ >/run/ask
         a=$EPOCHREALTIME; {create}pavo internal setup create </run/ask >&2 || exit 1
         b=$EPOCHREALTIME; times >/run/times.0; pavo=$(command -v pavo); rest=0
         for p in /proc/[0-9]*; do
           [[ $p/exe -ef $pavo ]] || continue
           for t in $p/task/*/schedstat; do read -r ns _ <$t; rest=$((rest+ns)); done
         done
         echo up; read -r _; times >/run/times.1
         c=$EPOCHREALTIME; {delete}pavo internal setup delete </run/ask >&2 || exit 1
         d=$EPOCHREALTIME; times >/run/times.2; {SPENT}
         echo $a $b $c $d $rest $(spent 0) $(spent 1) $(spent 2)"
    );
    let mut child = host.command(None, &["bash", "-c", &script]).unwrap();
    let child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    // This host is the last, which has the most to take back.
    site.lab.etcdctl(&["del", &key]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    drop(child.stdin.take());
    line.clear();
    stdout.read_to_string(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let at: Vec<f64> = line.split_whitespace().map(|time| time.parse().unwrap()).collect();
    Times {
        create: (at[1] - at[0]) * 1e3,
        delete: (at[3] - at[2]) * 1e3,
        create_cpu: at[4] / 1e6 + at[5],
        delete_cpu: at[7] - at[6],
    }
}

/// The programs that a traced run started, without itself.
fn execs(site: &Site, number: u32) -> Vec<String> {
    let trace = sh(site, "n1", &format!("cat /run/execs.{number}"));
    let program = |line: &str| Some(line.split("execve(\"").nth(1)?.split('"').next()?.to_owned());
    trace.lines().filter_map(program).skip(1).collect()
}

/// The milliseconds of a script, and its CPU time.
fn timed(site: &Site, script: &str) -> (f64, f64) {
    let words = format!(
        "a=$EPOCHREALTIME; {script} >&2; b=$EPOCHREALTIME; times >/run/times.0
         {SPENT}
         echo $a $b $(spent 0)"
    );
    let output = site.lab.host("n1").run(None, &["bash", "-c", &words]).unwrap().ok().unwrap();
    let at: Vec<f64> = output.split_whitespace().map(|time| time.parse().unwrap()).collect();
    ((at[1] - at[0]) * 1e3, at[2])
}

/// What both scripts take; in between, what is not on the clock.
fn floor(site: &Site, create: &str, between: impl FnOnce(), delete: &str) -> Times {
    let (create, create_cpu) = timed(site, create);
    between();
    let (delete, delete_cpu) = timed(site, delete);
    Times { create, delete, create_cpu, delete_cpu }
}

/// Puts a file on the host.
fn put(site: &Site, name: &str, text: &str) {
    sh(site, "n1", &format!("cat >/run/{name} <<'END'\n{text}END"));
}

/// Links that are the same whatever the switch is: TAP devices, the ways to the gateway and out.
fn links(master: impl Fn(&str) -> String) -> String {
    let mut batch = String::from("netns add floor\n");
    for bridge in ["fb0", "fb1"] {
        for tap in 0..4 {
            let port = master(bridge);
            batch +=
                &format!("tuntap add {bridge}t{tap} mode tap\nlink set {bridge}t{tap} {port} up\n");
        }
    }
    let port = master("fb0");
    batch += &format!(
        "link add fg type veth peer name guests netns floor\nlink set fg {port} up\n\
         link add fv type veth peer name uplink netns floor\nlink set fv up\n\
         addr add 192.0.2.1/31 dev fv\n"
    );
    batch
}

/// `ip` puts links into groups one at a time: not on the clock.
fn group(site: &Site, more: &str) {
    let script = format!(
        "for l in fg fv {more}; do ip link set $l group 77; done
         for b in fb0 fb1; do for t in 0 1 2 3; do ip link set ${{b}}t$t group 77; done; done"
    );
    sh(site, "n1", &script);
}

const TABLES: &str = "nft add table inet floor; ip netns exec floor nft add table inet floor";
const GONE: &str = "ip link delete group 77; ip netns del floor; nft delete table inet floor";

/// The same objects, by hand.
fn floor_linux(site: &Site) -> Times {
    let address = site.lab.address("n1");
    let mut batch = String::new();
    for (bridge, key) in [("fb0", 77), ("fb1", 78)] {
        batch += &format!(
            "link add {bridge} type bridge\nlink add x{bridge} type vxlan id {key} local {address} \
             dstport 4789 nolearning\nlink set x{bridge} master {bridge} up\nlink set {bridge} up\n"
        );
    }
    put(site, "batch", &(batch + &links(|bridge| format!("master {bridge}"))));
    let create = format!("ip -batch /run/batch; {TABLES}");
    floor(site, &create, || group(site, "fb0 fb1 xfb0 xfb1"), GONE)
}

/// One bridge carries both networks.
fn floor_ovs(site: &Site) -> Times {
    put(site, "batch", &links(|_| String::new()));
    let mut transaction = String::from(
        "ovs-vsctl add-br fb -- set bridge fb datapath_type=netdev fail_mode=secure -- add-port fb fg",
    );
    for (network, key) in [("fb0", 77), ("fb1", 78)] {
        transaction += &format!(
            " -- add-port fb x{network} -- set interface x{network} type=vxlan \
             options:remote_ip=flow options:key={key}"
        );
        for tap in 0..4 {
            transaction += &format!(" -- add-port fb {network}t{tap}");
        }
    }
    let create = format!("ip -batch /run/batch; {transaction}; {TABLES}");
    floor(site, &create, || group(site, ""), &format!("ovs-vsctl del-br fb; {GONE}"))
}
