//! Bad luck: hosts, daemons and the store that die, hang or are full, and users who try.

use std::fs::File;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pavo::host::crash;
use pavo_lab::{Etcd, Host, Options, Output};

use super::world::Site;

/// How long anything that is waited for may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// A command of a user's that goes on while the test does something else.
struct Going<'a> {
    site: &'a Site,
    user: &'static str,
    name: &'static str,
    child: Child,
}

impl<'a> Going<'a> {
    /// Starts a cluster, which stays until [`end`](Self::end).
    fn cluster(site: &'a Site, user: &'static str, name: &'static str, words: &[&str]) -> Self {
        let script = format!("touch {name}.up; until test -e {name}.end; do sleep 0.1; done");
        let argv = [&["pavo", "alloc", "-c1", "-E", &script], words].concat();
        let going = Self::start(site, user, name, &argv);
        let file = site.lab.home(user).join(format!("{name}.up"));
        until("the cluster is not up", || file.exists() || going.is_over());
        assert!(file.exists(), "{}", going.said());
        going
    }

    fn start(site: &'a Site, user: &'static str, name: &'static str, argv: &[&str]) -> Self {
        let mut command = site.lab.login().command(Some(user), argv).unwrap();
        let file = File::create(site.lab.dir().join(name)).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        Self { site, user, name, child: command.spawn().unwrap() }
    }

    /// What it has said so far.
    fn said(&self) -> String {
        std::fs::read_to_string(self.site.lab.dir().join(self.name)).unwrap()
    }

    fn is_over(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        stat.is_ok_and(|stat| stat.contains(") Z "))
    }

    /// Ends the cluster; its exit code and all it said.
    fn end(self) -> (bool, String) {
        let file = self.site.lab.home(self.user).join(format!("{}.end", self.name));
        File::create(file).unwrap();
        self.wait()
    }

    fn wait(mut self) -> (bool, String) {
        until("it does not end", || self.is_over());
        (self.child.wait().unwrap().success(), self.said())
    }
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A refusal that a user can read: it failed, and said this.
#[track_caller]
fn refused(output: &Output, expected: &[&str]) {
    assert!(!output.status.success(), "{output:?}");
    for expected in expected {
        assert!(output.stderr.contains(expected), "`{expected}` in {}", output.stderr);
    }
}

const TRUE: [&str; 6] = ["pavo", "alloc", "-c1", "-E", "true", "tiny:1"];

#[test]
fn daemons_of_slurm_die_and_hang() {
    let site = Site::up(2);
    let before = site.snapshot();
    let cluster = Going::cluster(&site, "alice", "daemons", &["-N2", "tiny:2"]);

    // VMs are the step's, not slurmd's.
    let slurmd = site.lab.host("n2").service("slurmd").unwrap();
    slurmd.kill().unwrap();
    slurmd.start().unwrap();
    site.lab.wait_state("n2", &["mixed", "alloc"]).unwrap();
    let states = site.run("alice", &["pavo", "status", "-o", "ndjson"]).stdout;
    assert_eq!(states.matches("\"state\":\"running\"").count(), 2, "{states}");

    let controller = site.lab.login().service("slurmctld").unwrap();
    controller.pause().unwrap();
    let start = Instant::now();
    let ps = site.run("alice", &["pavo", "ps"]);
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
    refused(&ps, &["asking Slurm with `squeue`", "is slurmctld running?"]);
    let waiting = Going::start(&site, "bob", "waiting", &TRUE);
    std::thread::sleep(Duration::from_secs(3));
    assert!(!waiting.is_over(), "{}", waiting.said());
    controller.resume().unwrap();
    let (well, said) = waiting.wait();
    assert!(well, "{said}");

    let (well, said) = cluster.end();
    assert!(well, "{said}");
    site.nothing_left(&before);
}

#[test]
fn a_host_is_lost_and_comes_back() {
    let site = Site::with(Options {
        hosts: 2,
        slurm: vec!["SlurmdTimeout=8".into(), "TCPTimeout=2".into()],
        ..Options::default()
    });
    assert!(site.run("alice", &["pavo", "alloc", "-N2", "-E", "true", "tiny:2"]).status.success());
    let before = site.snapshot();
    let cluster = Going::cluster(&site, "alice", "lost", &["-N2", "tiny:2"]);
    let lost = site.lab.host("n2");
    lost.kill().unwrap();
    site.lab.wait_state("n2", &["down"]).unwrap();
    let mut states = String::new();
    until("vm1 has not failed", || {
        states = site.run("alice", &["pavo", "status", "-o", "ndjson"]).stdout;
        states.contains("failed") || cluster.is_over()
    });
    assert!(!cluster.is_over(), "{}", cluster.said());
    let states: Vec<&str> = states.lines().collect();
    assert!(states[0].contains("\"state\":\"running\""), "{states:?}");
    assert!(states[1].contains("\"state\":\"failed\"") && states[1].contains(lost.name()));
    let (well, said) = cluster.end();
    assert!(well, "{said}");

    lost.restart().unwrap();
    // As pavo-node.service does at boot.
    lost.sh("pavo internal setup init").unwrap();
    site.lab.wait_idle().unwrap();
    let next = site.run("alice", &["pavo", "alloc", "-N2", "-E", "true", "tiny:2"]);
    assert!(next.status.success(), "{next:?}");
    site.nothing_left(&before);
}

#[test]
fn the_store_loses_its_leader_then_all_members() {
    let site = Site::with(Options { hosts: 2, etcd: Etcd::Three, ..Options::default() });
    let before = site.snapshot();
    let (n1, file) = (site.lab.host("n1"), crash::CRASH_AT);
    let cluster = Going::cluster(&site, "alice", "store", &["-N2", "tiny:2"]);

    // Held in the middle of its set-up while the leader dies.
    n1.sh(&format!("(umask 077; echo 'setup.introduced stop' >{file})")).unwrap();
    let argv = ["pavo", "alloc", "-c1", "-N2", "-E", "true", "tiny:2"];
    let starting = Going::start(&site, "bob", "starting", &argv);
    until("it does not come to the store", || n1.sh(&format!("test -e {file}")).is_err());
    let leader = leader(&site);
    site.lab.host(&leader).service("etcd").unwrap().kill().unwrap();
    n1.sh("kill -CONT $(pgrep -f 'setup create')").unwrap();
    let (well, said) = starting.wait();
    assert!(well, "{said}");

    for host in site.lab.stores() {
        let _ = host.service("etcd").unwrap().kill();
    }
    refused(&site.run("bob", &argv), &["etcd"]);
    let (well, said) = cluster.end();
    assert!(well, "{said}");
    for host in site.lab.stores() {
        host.service("etcd").unwrap().start().unwrap();
    }
    site.lab.wait_store().unwrap();
    for host in site.lab.computes() {
        host.sh("pavo internal setup sweep").unwrap();
    }
    // What is alice's in the store goes with her next command, once Slurm says her job is over:
    // the hosts' ends waited for the store, so it may be completing still.
    site.lab.wait_idle().unwrap();
    refused(&site.run("alice", &["pavo", "status"]), &["you have no running cluster"]);
    site.nothing_left(&before);
}

/// The host of the store's leader.
fn leader(site: &Site) -> String {
    let status = site.lab.etcdctl(&["endpoint", "status"]).unwrap();
    let of = status.lines().find(|line| line.split(", ").nth(4) == Some("true")).unwrap();
    let member = |host: &&pavo_lab::Host| of.contains(&format!("{}:", host.address()));
    site.lab.stores().find(member).unwrap().name().to_owned()
}

#[test]
fn the_store_is_full() {
    let site = Site::with(Options {
        hosts: 1,
        etcd_args: vec!["--quota-backend-bytes=1000000".into()],
        ..Options::default()
    });
    let before = site.snapshot();
    let cluster = Going::cluster(&site, "alice", "running", &["tiny:1"]);
    let block = "x".repeat(60_000);
    let mut full = false;
    for number in 0..40 {
        let put = site.lab.etcdctl(&["put", &format!("/fill/{number}"), &block]);
        full |= put.is_err();
    }
    assert!(full);
    refused(&site.run("bob", &TRUE), &["etcd", "space"]);
    // What runs goes on, and what goes can still be taken back.
    let status = site.run("alice", &["pavo", "status", "-o", "ndjson"]);
    assert!(status.stdout.contains("\"state\":\"running\""), "{status:?}");
    let (well, said) = cluster.end();
    assert!(well, "{said}");
    site.nothing_left(&before);
}

#[test]
fn open_vswitch_dies_under_a_cluster() {
    let site = Site::with(Options { hosts: 2, ovs: true, ..Options::default() });
    let batch = std::fs::read_to_string(site.lab.etc_pavo().join("batch.yaml")).unwrap();
    site.write("batch.yaml", &(batch + "  switch: ovs\n"));
    let before = site.snapshot();
    let cluster = Going::cluster(&site, "alice", "switch", &["-N2", "tiny:2"]);
    let n2 = site.lab.host("n2");
    let daemons = ["ovsdb-server", "ovs-vswitchd"].map(|name| n2.service(name).unwrap());
    for daemon in &daemons {
        daemon.kill().unwrap();
    }
    // VMs are the step's: they go on, without a network.
    let status = site.run("alice", &["pavo", "status", "-o", "ndjson"]);
    assert_eq!(status.stdout.matches("\"state\":\"running\"").count(), 2, "{status:?}");
    let host = format!("host {}", n2.name());
    refused(
        &site.run("bob", &["pavo", "alloc", "-c1", "-w", n2.name(), "-E", "true", "tiny:1"]),
        &[&host, "Open vSwitch"],
    );
    let (well, said) = cluster.end();
    assert!(well, "{said}");
    for daemon in &daemons {
        daemon.start().unwrap();
    }
    n2.sh("pavo internal setup sweep").unwrap();
    site.nothing_left(&before);
    let next = ["pavo", "alloc", "-c1", "-N2", "-E", "true", "tiny:2"];
    let next = site.run("alice", &next);
    assert!(next.status.success(), "{next:?}");
    site.nothing_left(&before);
}

#[test]
fn a_clock_is_off() {
    let site = Site::up(2);
    let before = site.snapshot();
    let n2 = site.lab.host("n2");
    let clock = |host: &Host| {
        let said = host.run(None, &["pavo", "doctor"]).unwrap().stdout;
        let at = said.find(" clock ").unwrap_or_else(|| panic!("{said}")) - 4;
        let rest = said[at..].to_owned();
        rest.split(" munge ").next().unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    };

    // Within what Slurm allows nothing changes.
    let argv = ["pavo", "alloc", "-c1", "-N2", "-E", "pavo status -o ndjson", "tiny:2"];
    for ahead in [100, -100] {
        n2.set_clock(ahead).unwrap();
        site.lab.wait_idle().unwrap();
        let output = site.run("alice", &argv);
        assert!(output.status.success(), "{output:?}");
        for line in output.stdout.lines() {
            let vm: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(vm["state"], "running", "{vm}");
            assert!(vm["elapsed"].as_u64().unwrap() < 60, "{vm}");
        }
        let said = clock(n2);
        assert!(said.starts_with("warn") && said.contains(" s from slurmctld's"), "{said}");
    }
    assert!(clock(site.lab.login()).starts_with("ok clock"));

    // Slurm's credentials of jobs have expired there; munge takes nothing from there.
    let name = format!("on node {}", n2.name());
    for (ahead, found) in [
        (200, " s from slurmctld's: Slurm refuses its jobs"),
        (3600, "if their clocks differ"),
        (-3600, "if their clocks differ"),
    ] {
        if ahead > 0 {
            // It has ended the job before.
            site.lab.wait_idle().unwrap();
        }
        n2.set_clock(ahead).unwrap();
        let said = clock(n2);
        assert!(said.starts_with("fail") && said.contains(found), "{said}");
        if ahead > 0 {
            let help = ["if its clock is off", "`pavo doctor` there", &name];
            let alone = ["pavo", "alloc", "-c1", "-w", n2.name(), "-E", "true", "tiny:1"];
            refused(&site.run("alice", &alone), &help);
        }
    }

    n2.set_clock(0).unwrap();
    // Slurm would ask it only now and then whether the job is gone.
    let name = n2.name();
    let told = format!(
        "scontrol update nodename={name} state=down reason=clock
         scontrol update nodename={name} state=resume"
    );
    site.lab.login().sh(&told).unwrap();
    site.lab.wait_idle().unwrap();
    let output = site.run("alice", &argv);
    assert!(output.status.success(), "{output:?}");
    site.nothing_left(&before);
}

#[test]
fn two_users_on_one_host() {
    let site = Site::up(1);
    let before = site.snapshot();
    let alices = Going::cluster(&site, "alice", "alices", &["--wait=ssh", "tiny:1"]);
    // Both have the same addresses; alice has no vm1.
    let script = "a=$(pavo status -o json | grep -o '10\\.200\\.[0-9.]*' | tail -n1); echo $a; \
                  pavo ssh vm0 ping -c1 -W5 $a";
    let argv = ["pavo", "alloc", "-c1", "--wait=ssh", "-E", script, "tiny:2"];
    let bobs = site.run("bob", &argv);
    assert!(bobs.status.success(), "{bobs:?}");
    let address = bobs.stdout.lines().next().unwrap();
    let bobs = Going::cluster(&site, "bob", "bobs", &["tiny:2"]);
    let ping = site.run("alice", &["pavo", "ssh", "vm0", "ping", "-c2", "-W2", address]);
    assert!(!ping.status.success(), "{ping:?}");
    assert!(ping.stdout.contains("100% packet loss"), "{ping:?}");
    assert!(bobs.end().0 && alices.end().0);

    // Room for one.
    let networks = site.lab.etc_pavo().join("networks.yaml");
    let text = std::fs::read_to_string(networks).unwrap();
    site.write("networks.yaml", &text.replace("10.201.0.0/16", "10.201.0.0/30"));
    let first = Going::cluster(&site, "alice", "first", &["tiny:1"]);
    refused(&site.run("bob", &TRUE), &["clusters are on this host already", "`ext-network`"]);
    assert!(first.end().0);
    let next = site.run("bob", &TRUE);
    assert!(next.status.success(), "{next:?}");

    // Ports for two.
    site.write("networks.yaml", &text.replace("max-host-port: 60999", "max-host-port: 60223"));
    let first = Going::cluster(&site, "alice", "ports", &["tiny:2"]);
    let none = "1 VMs need one each of 60222–60223, and 0 are free";
    refused(&site.run("bob", &TRUE), &["find a free host port", none, "`reverse-nat`"]);
    assert!(first.end().0);
    let next = site.run("bob", &TRUE);
    assert!(next.status.success(), "{next:?}");
    site.nothing_left(&before);
}

#[test]
fn a_user_cannot_make_root_do_anything_else() {
    let site = Site::up(1);
    assert!(site.run("alice", &["srun", "--vm=default:1", "true"]).status.success());
    let before = site.snapshot();
    let node = site.lab.host("n1");
    let roots = "find /etc /usr/bin/pavo /usr/lib/pavo -printf '%p %m %U %s %T@\\n' | sort";
    let files = node.sh(roots).unwrap();

    let huge = "a".repeat(100_000);
    let many = format!("--vm={}default:1", "default:1,".repeat(2000));
    for (argument, expected) in [
        ("--vm=../../x:1", "is not RESOURCESET:COUNT"),
        ("--vm=/etc/passwd:1", "is not RESOURCESET:COUNT"),
        ("--vm=default:2", "names 2 VMs, and the step has 1 tasks"),
        ("--vm=default:99999999999999999999", "--vm"),
        ("--vm=default:1\nuid=0\nkeeper=1", "--vm"),
        ("--vm=nosuch:1", "this host knows no resource set `nosuch`"),
        ("--vm=default:-1", "--vm"),
        ("--vm=default:0", "--vm"),
        ("--vm=:1", "--vm"),
        ("--vm=default", "--vm"),
        ("--vm=default:1,", "--vm"),
        ("--vm=", "--vm"),
        (&format!("--vm={huge}:1"), "--vm"),
        (&many, "--vm"),
    ] {
        let output = site.run("alice", &["srun", argument, "true"]);
        let short: String = argument.chars().take(40).collect();
        assert!(!output.status.success(), "{short}: {output:?}");
        let said: String = output.stderr.chars().take(2000).collect();
        assert!(said.contains("pavo: ") && said.contains(expected), "{short}: {said}");
    }
    for environment in [
        "PAVO_SEALED='%%%\n'",
        "SLURMD_NODENAME=../../etc SLURM_JOB_UID=0 SLURM_JOB_USER=root SLURM_LOCALID=7",
        "SLURM_STEP_NODELIST='n[1-99999999],../x' SLURM_RESTART_COUNT=99999999999",
        "SLURM_PAVO_STEP=overlap SLURM_PROCID=-1",
        "LD_PRELOAD=/home/alice/x.so PATH=/home/alice HOME=/root PAVO_CONFIG=/home/alice",
    ] {
        let line =
            format!("exec /usr/bin/env {environment} /usr/bin/srun --vm=default:1 /bin/true");
        let output = site.run("alice", &["bash", "-c", &line]);
        assert!(output.status.success(), "{environment}: {output:?}");
    }
    let sealed = "PAVO_SEALED=QUJDREVGR0g= srun --vm=default:1 true";
    refused(&site.run("alice", &["bash", "-c", sealed]), &["pavo: ", "secret"]);

    // What a step's own tasks try on the folders that are made for them.
    let script = "run=/run/pavo/$SLURM_JOB_ID.$SLURM_STEP_ID
        scratch=/var/lib/pavo/run/$SLURM_JOB_ID.$SLURM_STEP_ID
        cat $run/host.json >/dev/null || exit 1
        cat $run/state.json && exit 2
        rm -rf $run /run/pavo/journal && exit 3
        echo x >$run/host.json && exit 4
        mv $scratch /var/lib/pavo/run/other && exit 5
        chmod 600 $run/host.json && echo '{}' >$run/host.json
        ln -s /etc $scratch/etc; ln -s / $scratch/root; mkdir -p $scratch/a/b/c; chmod 0 $scratch/a
        mkfifo $scratch/fifo; true";
    let output = site.run("alice", &["srun", "--vm=default:1", "bash", "-c", script]);
    assert!(output.status.success(), "{output:?}");

    site.nothing_left(&before);
    assert_eq!(node.sh("ls -A /var/lib/pavo/run").unwrap(), "");
    assert_eq!(node.sh(roots).unwrap(), files);
}
