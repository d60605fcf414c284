//! What is done with a cluster whose VMs are on two hosts, all at once.

use serde_json::Value;

use super::world::Site;

#[test]
fn vms_on_two_hosts_are_watched_and_saved_together() {
    let site = Site::up(2);
    let before = site.snapshot();
    without_a_cluster_it_is_srun(&site);
    let job = site.batch("alice", "-c1 -N2 -n2 tiny:2");
    site.sh("alice", &format!("pavo wait -j {job} --for agent"));
    rates_of_both_are_seen(&site);
    site.sh(
        "alice",
        "mkdir -p images ~/.pavo
         printf 'repos:\n  - {name: mine, path: %s/images}\n' \"$HOME\" >~/.pavo/repos.yaml
         pavo run sh -c 'letter=$(hostname | tr 012 ABC)
             head -c 65536 /dev/zero | tr \"\\0\" ${letter#vm} |
                 dd of=/dev/vda bs=64k seek=16 conv=notrunc,fsync 2>/dev/null'",
    );
    // One after the other they would be revisions of one image.
    let refused = site.run("alice", &["pavo", "save", "all"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(refused.stderr.contains("vm0 and vm1 would both become"), "{refused:?}");
    let said = site.sh("alice", "pavo save -d mine:both all 2>&1");
    for vm in ["vm0", "vm1"] {
        let expected = format!("{vm} disk successfully saved to mine:both-{vm} revision 0\n");
        assert!(said.contains(&expected), "{said}");
    }
    assert_eq!((pattern(&site, "both-vm0"), pattern(&site, "both-vm1")), (0x41, 0x42));
    // Nothing is copied where one of the names is taken.
    site.sh("alice", "pavo image delete mine:both-vm0");
    let refused = site.run("alice", &["pavo", "save", "-d", "mine:both", "all"]);
    assert!(refused.stderr.contains("both-vm1 already exists"), "{refused:?}");
    assert_eq!(site.sh("alice", "ls images/meta images/.tmp | grep -c both-vm0 || true"), "0\n");
    site.sh("alice", "pavo cancel");
    site.nothing_left(&before);
}

fn without_a_cluster_it_is_srun(site: &Site) {
    let run = |line: &str| site.run("alice", &["sh", "-c", line]);
    let said = run("pavo run -n 2 -N 2 -l -e A=b sh -c 'echo $(whoami) $A $SLURM_PROCID'");
    let mut lines: Vec<&str> = said.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["0: alice b 0", "1: alice b 1"], "{said:?}");
    assert!(said.stderr.contains("You have no running cluster: srun runs it"), "{said:?}");
    assert_eq!(run("pavo run sh -c 'exit 3'").status.code(), Some(3));
    let said = run("echo 'echo from $0 $1' >line; pavo run --script line word");
    assert_eq!(said.stdout, "from /home/alice/line word\n", "{said:?}");
    for (line, expected) in [
        ("pavo run --fold true", "`--fold` is for VMs"),
        ("pavo run -j 4711 true", "no running cluster with the job id 4711"),
    ] {
        let said = run(line);
        assert!(!said.status.success() && said.stderr.contains(expected), "{line}: {said:?}");
    }
}

fn rates_of_both_are_seen(site: &Site) {
    let work = "pavo run --detach sh -c 'while :; do
        dd if=/dev/zero of=/dev/vda bs=64k count=4 conv=notrunc,fsync
        ping -c 2 -i 0.2 vm0; ping -c 2 -i 0.2 vm1; done >/dev/null 2>&1'";
    site.sh("alice", work);
    for rate in ["cpu_percent", "disk_written_bytes", "received_bytes", "sent_bytes"] {
        let seen = |said: &str| {
            let vms: Value = serde_json::from_str(said).unwrap();
            (0..2).all(|rank| vms[rank]["rates"][rate].as_f64().is_some_and(|it| it > 0.0))
        };
        let mut looks = (0..30).map(|_| site.sh("alice", "pavo top --once -o json"));
        assert!(looks.any(|said| seen(&said)), "{rate}");
    }
}

/// The byte that all of a saved image's 17th 64 KiB are.
fn pattern(site: &Site, image: &str) -> u8 {
    let meta = site.sh("alice", &format!("cat images/meta/{image}@0"));
    let meta: Value = serde_json::from_str(&meta).unwrap();
    let top = meta["data_blobs"].as_array().unwrap().last().unwrap().as_str().unwrap();
    let read = |byte: u8| {
        let blob = format!("images/data/{}/{top}", &top[..2]);
        let line = format!("qemu-io -r -f qcow2 -c 'read -P {byte} 1M 64k' {blob} || true");
        !site.sh("alice", &line).contains("Pattern verification failed")
    };
    (0x41..0x44).find(|byte| read(*byte)).expect("one of them")
}
