//! Clusters of several hosts whose guests have IPv6.

use pavo_lab::Options;

use super::world::Site;

/// Its networks, with it.
fn with_ipv6(site: &Site) {
    let networks = std::fs::read_to_string(site.lab.etc_pavo().join("networks.yaml")).unwrap();
    let (off, on) = ("    #int-network6: auto", "    int-network6: auto");
    assert!(networks.contains(off), "{networks}");
    site.write("networks.yaml", &networks.replace(off, on));
}

#[test]
fn guests_of_two_hosts_reach_each_other_by_ipv6() {
    let site = Site::up(2);
    with_ipv6(&site);
    let before = site.snapshot();
    // An address can be used once its guest has looked, for a second, whether another has it.
    // Then the first packet arrives.
    let script = "set -e
        for vm in vm0 vm1; do
            tries=10
            until pavo ssh $vm ip -6 -o addr show eth0 scope global >said 2>&1 &&
                grep -q inet6 said && ! grep -q tentative said; do
                tries=$((tries - 1))
                if [ $tries = 0 ]; then cat said >&2; exit 1; fi
                sleep 1
            done
        done
        for pair in 'vm0 vm1' 'vm1 vm0'; do set -- $pair
            pavo ssh $1 ping -6 -c1 -W9 $2 >said 2>&1 || { cat said >&2; exit 1; }
            grep '1 packets received' said
            pavo ssh $1 nslookup -type=aaaa $2.pavo.internal 10.200.255.254
        done
        pavo ssh vm1 ping -6 -c1 -W9 gateway.pavo.internal >said 2>&1 || { cat said >&2; exit 1; }
        pavo status -o json";
    let argv = ["pavo", "alloc", "-c1", "-N2", "--wait", "ssh", "-E", script, "tiny:2"];
    let output = site.run("alice", &argv);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout.matches("1 packets received").count(), 2, "{}", output.stdout);
    // One network on both hosts: known to the status, and to both hosts' names.
    let of = |vm: &str| {
        let line = output.stdout.lines().find(|line| {
            line.trim().starts_with("\"fd") && line.trim().trim_matches(['"', ',']).ends_with(vm)
        });
        line.unwrap_or_else(|| panic!("{vm}: {}", output.stdout))
            .trim()
            .trim_matches(['"', ','])
            .to_owned()
    };
    let (a, b) = (of("::1"), of("::2"));
    assert_eq!(a.strip_suffix("::1"), b.strip_suffix("::2"));
    for address in [a, b] {
        let named = output
            .stdout
            .lines()
            .any(|line| line.contains(&address) && line.starts_with("Address"));
        assert!(named, "{address}: {}", output.stdout);
    }
    site.nothing_left(&before);
}

#[test]
fn where_open_vswitch_carries_clusters_ipv6_is_refused() {
    let site = Site::with(Options { hosts: 2, ovs: true, ..Options::default() });
    with_ipv6(&site);
    let before = site.snapshot();
    let output = site.run("alice", &["pavo", "alloc", "-c1", "-N2", "-E", "true", "tiny:2"]);
    assert!(!output.status.success(), "{output:?}");
    for expected in ["Open vSwitch does not carry IPv6 yet", "network `nat`", "switch: linux"] {
        assert!(output.stderr.contains(expected), "{expected} in {}", output.stderr);
    }
    site.nothing_left(&before);
}
