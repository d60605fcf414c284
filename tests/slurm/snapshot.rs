//! VMs on several hosts that begin from the memory of one.

use super::world::Site;

#[test]
fn many_begin_on_several_hosts_from_one() {
    let site = Site::up(2);
    let before = site.snapshot();
    let script = "set -e
        pavo run sh -c \"echo warm > /dev/shm/m\"
        pavo snapshot vm0 warm";
    let first = format!("pavo alloc -c1 -N1 --wait agent -E '{script}' tiny");
    let output = site.run("alice", &["sh", "-c", &first]);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.contains("; it goes on\n"), "{output:?}");
    assert_eq!(
        site.sh("alice", "ls warm | wc -l; stat -c %a warm warm/*"),
        "3\n700\n600\n600\n600\n"
    );

    // There is less room in the packets between hosts than it had.
    site.sh("alice", "printf 'warm:\\n  snapshot: %s/warm\\n' $HOME > ~/.pavo/templates.yaml");
    let script = "set -e
        pavo run --label hostname | sort
        pavo run --label cat /sys/class/net/eth0/mtu /dev/shm/m | sort
        pavo run --label sh -c \"cat /sys/class/net/eth0/address /proc/sys/kernel/hostname\" | sort -u | wc -l
        for i in 0 1 2 3; do
            pavo run ping -c1 -W9 vm$i > /dev/null
            pavo run ping -c1 -W9 -s 1400 vm$i > /dev/null
            pavo ssh vm$i hostname
        done";
    let again = format!("pavo alloc -N2 --wait agent -E '{script}' warm:4");
    let output = site.run("alice", &["sh", "-c", &again]);
    assert!(output.status.success(), "{output:?}");
    let names = "vm0: vm0\nvm1: vm1\nvm2: vm2\nvm3: vm3\n";
    assert!(output.stdout.starts_with(names), "{output:?}");
    assert!(output.stdout.ends_with("8\nvm0\nvm1\nvm2\nvm3\n"), "{output:?}");
    assert_eq!(output.stdout.matches(": 1450\n").count(), 4, "{output:?}");
    assert_eq!(output.stdout.matches(": warm\n").count(), 4, "{output:?}");

    // What is not the site's to know is refused before there is a job, and so are strangers'.
    let output = site.run("alice", &["sh", "-c", "pavo batch -c2 warm:2"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stderr.contains("cores: `1` there, `2` now"), "{output:?}");
    let theirs = site.sh("alice", "chmod 755 ~ warm; chmod 644 warm/*; cd warm; pwd");
    let theirs = theirs.trim();
    let template = format!("warm:\\n  snapshot: {theirs}\\n");
    site.sh("bob", &format!("mkdir -p ~/.pavo; printf '{template}' > ~/.pavo/templates.yaml"));
    let output = site.run("bob", &["pavo", "alloc", "-E", "true", "warm"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stderr.contains("belongs to `alice`"), "{output:?}");
    site.nothing_left(&before);
}
