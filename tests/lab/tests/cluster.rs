//! What works on a lab that nothing has befallen.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use pavo_lab::{Etcd, Lab, Options, can_run};

/// One for all tests here: they do not disturb each other.
static LAB: LazyLock<Lab> = LazyLock::new(|| {
    Lab::up(Options { etcd: Etcd::Three, ovs: true, ..Options::default() }).unwrap()
});

#[test]
fn a_user_runs_a_job_on_all_hosts() {
    if !can_run() {
        return;
    }
    let said = LAB.login().run(Some("alice"), &["srun", "-N3", "sh", "-c", "hostname; id -un"]);
    let mut lines: Vec<_> = said.unwrap().ok().unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    let prefix = LAB.prefix();
    let mut expected = ["n1", "n2", "n3"].map(|node| format!("{prefix}{node}")).to_vec();
    expected.extend(["alice"; 3].map(str::to_owned));
    assert_eq!(lines, expected);
}

#[test]
fn both_users_exist_on_all_hosts_and_keep_their_homes_to_themselves() {
    if !can_run() {
        return;
    }
    std::fs::write(LAB.home("bob").join("seen"), "from outside").unwrap();
    for host in LAB.computes() {
        let said = host.run(Some("bob"), &["sh", "-c", "pwd; cat seen; id -u"]).unwrap();
        assert_eq!(said.ok().unwrap(), "/home/bob\nfrom outside2002\n");
        let refused = host.run(Some("alice"), &["cat", "/home/bob/seen"]).unwrap();
        assert!(refused.stderr.contains("Permission denied"), "{refused:?}");
    }
    assert!(LAB.login().run(Some("carol"), &["true"]).is_err());
}

#[test]
fn scancel_ends_a_job_and_its_daemons_and_nothing_is_left() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { hosts: 2, ..Options::default() }).unwrap();
    let before = ["n1", "n2"].map(|host| lab.leaks(host).unwrap());
    let script = "setsid -f sleep 1000; sleep 1000";
    let argv = ["srun", "-N2", "-J", "long", "sh", "-c", script];
    let mut srun = lab.login().command(Some("alice"), &argv).unwrap().spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let sleeping = |host: &str| {
        let processes = lab.host(host).processes().unwrap();
        processes.iter().filter(|process| process.name == "sleep").count()
    };
    while ["n1", "n2"].map(sleeping) != [2, 2] {
        assert!(Instant::now() < deadline, "the job did not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    let diff = before[0].diff(&lab.leaks("n1").unwrap());
    assert!(diff.contains("+ process sleep (2 times)\n"), "{diff}");
    assert!(diff.contains("+ cgroup /sys/fs/cgroup/freezer/slurm_"), "{diff}");

    lab.login().run(Some("alice"), &["scancel", "-n", "long"]).unwrap().ok().unwrap();
    assert!(!srun.wait().unwrap().success());
    for (host, before) in ["n1", "n2"].iter().zip(&before) {
        lab.settled(host, before, Duration::from_secs(60)).unwrap();
    }
    lab.wait_idle().unwrap();
}

#[test]
fn a_job_that_takes_too_much_memory_is_ended() {
    if !can_run() {
        return;
    }
    let fill = "x=$(head -c 400000000 /dev/zero | tr '\\0' x); echo ${#x}";
    let argv = ["srun", "-n1", "--mem=100", "bash", "-c", fill];
    let ended = LAB.login().run(Some("alice"), &argv).unwrap();
    assert!(!ended.status.success());
    assert!(ended.stderr.to_lowercase().contains("out of memory"), "{ended:?}");
}

#[test]
fn a_job_of_the_low_partition_makes_room() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options { hosts: 1, ..Options::default() }).unwrap();
    let login = lab.login();
    let low = ["sbatch", "-p", "low", "--exclusive", "-N1", "--wrap", "sleep 1000"];
    login.run(Some("bob"), &low).unwrap().ok().unwrap();
    lab.wait_state("n1", &["alloc"]).unwrap();
    let said = login.run(Some("alice"), &["srun", "--exclusive", "-N1", "hostname"]).unwrap();
    assert_eq!(said.ok().unwrap().trim(), lab.host("n1").name());
    let queue = login.run(None, &["squeue", "-h", "-o", "%u %T"]).unwrap().ok().unwrap();
    assert_eq!(queue.trim(), "bob PENDING", "requeued, not cancelled");
}

#[test]
fn the_store_keeps_what_it_is_given_and_speaks_tls_only() {
    if !can_run() {
        return;
    }
    LAB.etcdctl(&["put", "/a", "1"]).unwrap();
    assert_eq!(LAB.etcdctl(&["get", "--print-value-only", "/a"]).unwrap(), "1\n");
    let table = LAB.etcdctl(&["member", "list"]).unwrap();
    assert_eq!(table.lines().count(), 3, "{table}");
    let url = LAB.store().unwrap().endpoints[0].replace("https", "http");
    let plain = ["env", "ETCDCTL_API=3", "etcdctl", "--command-timeout=1s", "--endpoints", &url];
    let plain: Vec<&str> = plain.into_iter().chain(["get", "/a"]).collect();
    assert!(LAB.login().run(None, &plain).unwrap().ok().is_err());
}

#[test]
fn the_common_name_of_a_certificate_is_a_user_where_certificates_are_asked_for() {
    if !can_run() {
        return;
    }
    let lab = Lab::up(Options {
        hosts: 1,
        etcd: Etcd::One,
        slurmd: false,
        client_certs: true,
        ..Options::default()
    })
    .unwrap();
    for words in [
        "user add root:secret",
        "role add root",
        "user grant-role root root",
        "user add pavo-node --no-password",
        "user add alice:hers",
        "role add nodes",
        "role grant-permission nodes --prefix=true readwrite /pavo/",
        "user grant-role pavo-node nodes",
        "user grant-role alice nodes",
        "auth enable",
    ] {
        lab.etcdctl(&words.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let url = &lab.store().unwrap().endpoints[0];
    let ask = |host: &str, pair: &str, words: &str| {
        let script = format!(
            "ETCDCTL_API=3 etcdctl --command-timeout=2s --endpoints={url} \
             --cacert=/etc/pavo/ca.pem {pair} {words}"
        );
        lab.host(host).run(None, &["sh", "-c", &script]).unwrap()
    };
    let node = "--cert=/etc/pavo/node/node.pem --key=/etc/pavo/node/node-key.pem";
    let anyone = "--cert=/etc/pavo/user.pem --key=/etc/pavo/user-key.pem";
    ask("n1", node, "put /pavo/x 1").ok().unwrap();
    assert!(ask("n1", node, "put /other 1").stderr.contains("permission denied"));
    ask("login", anyone, "--user alice:hers get /pavo/x").ok().unwrap();
    assert!(!ask("login", anyone, "get /pavo/x").status.success());
    assert!(!ask("login", "", "--user alice:hers get /pavo/x").status.success());
}

#[test]
fn the_switches_carry_large_frames_and_tcp_between_hosts() {
    if !can_run() {
        return;
    }
    let n2 = LAB.host("n2").underlay().unwrap().to_string();
    let n1 = LAB.host("n1");
    // 1572 and two headers are 1600.
    n1.run(None, &["ping", "-c1", "-W5", "-Mdo", "-s1572", &n2]).unwrap().ok().unwrap();
    let address = (n2, 7777);
    let listener = LAB.host("n2").inside(|| Ok(std::net::TcpListener::bind(&address)?)).unwrap();
    let sent = vec![7; 3_000_000];
    let received = std::thread::scope(|scope| {
        let receive = scope.spawn(|| {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut listener.accept()?.0, &mut bytes).map(|_| bytes)
        });
        n1.inside(|| {
            let mut stream = std::net::TcpStream::connect(&address)?;
            Ok(std::io::Write::write_all(&mut stream, &sent)?)
        })
        .unwrap();
        receive.join().unwrap().unwrap()
    });
    assert!(received == sent);
}

#[test]
fn a_host_has_devices_for_vms_but_not_the_machines() {
    if !can_run() {
        return;
    }
    let host = LAB.host("n1");
    host.run(Some("alice"), &["sh", "-c", "exec 3<>/dev/net/tun"]).unwrap().ok().unwrap();
    let all = host.sh("ls /dev; stat -c %A /dev/net/tun").unwrap();
    assert!(!all.contains("kvm") && !all.contains("vda") && !all.contains("sda"), "{all}");
    assert!(all.ends_with("crw-rw-rw-\n"), "{all}");
}
