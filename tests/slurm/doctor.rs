//! `pavo doctor` on hosts of a site: all is well, and each thing that is not is named.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use pavo_lab::Host;
use serde_json::Value;

use super::world::Site;

/// What each check says, and the exit code.
struct Visit {
    findings: BTreeMap<String, Value>,
    code: Option<i32>,
}

impl Visit {
    fn on(host: &Host, user: Option<&str>, words: &[&str]) -> Self {
        let argv = [&["pavo", "doctor", "-o", "json"], words].concat();
        let output = host.run(user, &argv).unwrap();
        let list: Vec<Value> = serde_json::from_str(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {output:?}"));
        let named = list.into_iter().map(|it| (it["check"].as_str().unwrap().to_owned(), it));
        Self { findings: named.collect(), code: output.status.code() }
    }

    fn those(&self, verdict: &str) -> Vec<&str> {
        let found = self.findings.iter().filter(|(_, finding)| finding["verdict"] == verdict);
        found.map(|(name, _)| name.as_str()).collect()
    }

    #[track_caller]
    fn well(&self, checks: &[&str]) {
        assert_eq!(self.those("fail"), [""; 0], "{:#?}", self.findings);
        assert_eq!(self.code, Some(0));
        for check in checks {
            assert_eq!(self.findings[*check]["verdict"], "ok", "{:#?}", self.findings[*check]);
        }
    }

    /// Fails in these only, with a way to mend each.
    #[track_caller]
    fn ill(&self, checks: &[&str]) {
        assert_eq!(self.those("fail"), checks, "{:#?}", self.findings);
        assert_eq!(self.code, Some(1));
        for check in checks {
            let finding = &self.findings[*check];
            assert!(!finding["help"].as_array().unwrap().is_empty(), "{finding:#}");
        }
    }

    #[track_caller]
    fn says(&self, check: &str, text: &str) {
        let finding = self.findings[check].to_string();
        assert!(finding.contains(text), "{text} in {finding}");
    }
}

const SLURM: [&str; 6] = ["slurm", "slurmctld", "plugin", "plugstack", "clock", "munge"];
const STORE: [&str; 4] = ["etcd", "etcd-login", "site-key", "permissions"];

/// The plugin, as if it were built for Slurm 23.02.
fn other_plugin(site: &Site) {
    let login = site.lab.login().root().unwrap();
    let mut bytes = fs::read(login.join("usr/lib/pavo/spank_pavo.so")).unwrap();
    let (here, other) = (0x16_05_u16.to_le_bytes(), 0x17_02_u16.to_le_bytes());
    for at in 1..bytes.len() - 4 {
        if bytes[at..at + 3] == [here[0], here[1], 0] {
            bytes[at..at + 2].copy_from_slice(&other);
        }
    }
    fs::write(site.lab.etc_pavo().join("spank_pavo.so"), bytes).unwrap();
}

#[test]
fn what_is_wrong_on_a_host_is_named_and_nothing_else() {
    let site = Site::up(1);
    let (login, n1) = (site.lab.login(), site.lab.host("n1"));
    let plugstack = site.lab.etc().join("slurm/plugstack.conf");
    let line = fs::read_to_string(&plugstack).unwrap();
    let write = |path: &Path, text: &str| fs::write(path, text).unwrap();

    n1.sh("echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null || true").unwrap();
    let before = site.lab.leaks("n1").unwrap();
    let visit = Visit::on(n1, None, &[]);
    visit.says("init", "has not run");
    assert_eq!(before.diff(&site.lab.leaks("n1").unwrap()), "", "a look changes nothing");
    n1.sh("pavo internal setup init").unwrap();

    Visit::on(login, Some("alice"), &[]).well(&[&SLURM[..], &STORE].concat());
    let visit = Visit::on(n1, None, &[]);
    visit.well(&[&SLURM[..], &STORE].concat());
    visit.well(&["init", "qemu", "tun", "network", "forward", "bridge-nf", "switch", "limits"]);
    visit.well(&["tunnels"]);
    let ports = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
    n1.sh(&format!("echo 80 >{ports}")).unwrap();
    let visit = Visit::on(n1, None, &[]);
    assert_eq!(visit.findings["tunnels"]["verdict"], "warn");
    visit.says("tunnels", "ports 80 and above: from 512 to 1023");
    visit.says("tunnels", "net.ipv4.ip_unprivileged_port_start=1024");
    n1.sh(&format!("echo 1024 >{ports}")).unwrap();
    visit.says("plugstack", "for Slurm 22.05");
    Visit::on(n1, Some("alice"), &["--as", "alone"]).well(&["network", "pasta", "qemu", "tun"]);
    let text = login.run(Some("alice"), &["pavo", "doctor"]).unwrap().stdout;
    assert!(text.contains("\nok   plugin       srun knows `--vm`\n"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");

    // The plugin's line is missing, or it is another Slurm's.
    write(&plugstack, "# nothing\n");
    let visit = Visit::on(login, Some("alice"), &[]);
    visit.ill(&["plugin", "plugstack"]);
    visit.says("plugstack", "required /usr/lib/pavo/spank_pavo.so");
    other_plugin(&site);
    write(&plugstack, "optional /etc/pavo/spank_pavo.so\n");
    let visit = Visit::on(login, Some("alice"), &[]);
    visit.ill(&["plugin", "plugstack"]);
    visit.says("plugstack", "for Slurm 23.02, and here is 22.05");
    write(&plugstack, &line);

    let networks = fs::read_to_string(site.lab.etc_pavo().join("networks.yaml")).unwrap();
    // Root's files are others' to change, the configuration is wrong, a firewall drops.
    site.write("networks.yaml", "nat: { type: ethernet, settings: { mtuu: 1 } }\n");
    n1.sh("chmod 0666 /etc/pavo/site.pub; nft add table ip filter
        nft 'add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }'")
        .unwrap();
    let visit = Visit::on(n1, None, &[]);
    visit.ill(&["config", "permissions", "site-key"]);
    visit.says("config", "mtuu");
    visit.says("permissions", "chmod go-w /etc/pavo/site.pub");
    visit.says("forward", "iptables -I FORWARD -i pv+ -j ACCEPT");
    n1.sh("chmod 0644 /etc/pavo/site.pub; nft delete table ip filter").unwrap();
    site.write("networks.yaml", &networks);

    // Nothing answers: each check has its own end.
    let store = site.lab.stores().next().unwrap().service("etcd").unwrap();
    store.stop().unwrap();
    Visit::on(login, Some("alice"), &[]).ill(&["etcd"]);
    let munge = n1.service("munged").unwrap();
    munge.stop().unwrap();
    let visit = Visit::on(n1, None, &[]);
    visit.says("munge", "systemctl start munge");
    for name in ["etcd", "etcd-login", "munge"] {
        assert!(visit.those("fail").contains(&name), "{:#?}", visit.findings);
    }
    for name in ["slurm", "plugin", "site-key", "network", "qemu"] {
        assert_eq!(visit.findings[name]["verdict"], "ok", "{:#?}", visit.findings[name]);
    }
    munge.start().unwrap();
    store.start().unwrap();
}
