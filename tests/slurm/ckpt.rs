//! Clusters that are written down on some hosts and go on on others.

use super::world::Site;

#[test]
fn a_cluster_goes_on_on_another_host() {
    let site = Site::up(2);
    let before = site.snapshot();
    let script = "set -e
        pavo run sh -c 'echo of-$(hostname) > /dev/shm/m'
        pavo run --label cat /dev/shm/m /proc/sys/kernel/random/boot_id | sort > before
        pavo ckpt saved; sleep 60";
    let first = format!("pavo alloc -c1 -N2 --wait agent -E '{}' tiny:2", quoted(script));
    let output = site.run("alice", &["sh", "-c", &first]);
    assert!(output.stderr.contains("; it ends\n"), "{output:?}");
    assert!(output.stderr.contains("The cluster has shut down\n"), "{output:?}");
    assert_eq!(site.sh("alice", "stat -c %a saved saved/manifest.json"), "700\n600\n");
    assert_eq!(site.sh("alice", "ls saved | wc -l"), "7\n");

    // Both of them on one host, which was vm1's.
    let script = "set -e
        pavo run --label cat /dev/shm/m /proc/sys/kernel/random/boot_id | sort > after
        pavo ssh vm0 ping -c1 -W5 vm1 | grep -q \"1 packets received\"
        pavo ssh vm1 cat /dev/shm/m";
    let again = format!(
        "pavo alloc -r saved -N1 -w {}n2 --wait agent -E '{script}' tiny:2",
        site.lab.prefix()
    );
    let output = site.run("alice", &["sh", "-c", &again]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout, "of-vm1\n", "{output:?}");
    site.sh("alice", "cmp before after");

    // As a job that nobody waits for, with what the checkpoint knows.
    let job = site.batch("alice", "-r saved tiny:2");
    site.sh("alice", &format!("pavo wait -j {job} --for agent"));
    let said = site.sh("alice", &format!("pavo run -j {job} -w vm0 cat /dev/shm/m"));
    assert_eq!(said, "of-vm0\n");
    site.sh("alice", &format!("pavo cancel {job}"));

    // What is not the site's to know is refused before there is a job.
    let output = site.run("alice", &["sh", "-c", "pavo batch -r saved -c2 tiny:2"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stderr.contains("cores: `1` in the checkpoint, `2` now"), "{output:?}");
    let output = site.run("bob", &["pavo", "alloc", "-r", "/nowhere"]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    // With nothing but the checkpoint.
    let argv = ["pavo", "alloc", "-r", "saved", "-E", "pavo ps -o ndjson"];
    let output = site.run("alice", &argv);
    assert!(output.stdout.contains("\"definition\":\"tiny:2\""), "{output:?}");
    site.nothing_left(&before);
}

fn quoted(script: &str) -> String {
    script.replace('\'', r"'\''")
}
