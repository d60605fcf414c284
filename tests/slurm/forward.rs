//! Ports, memory, usage, files and agents of guests on other hosts.

use super::world::Site;

#[test]
fn a_guest_on_another_host_is_reached_by_its_user_alone() {
    let site = Site::up(2);
    let before = site.snapshot();
    // The example's first network; each VM is on a host of its own.
    let script = "cat >it <<'END'; exec bash it
        set -ex; exec 2>out-err; echo banner $(pavo nc vm1 22 </dev/null | head -c 7)
        pavo forward vm1 0:22 0:9 >ports &
        until [ -s ports ]; do sleep 0.1; done
        port=$(sed -n 's/^127.0.0.1:\\([0-9]*\\) -> vm1:22$/\\1/p' ports)
        exec 3<>/dev/tcp/127.0.0.1/$port; head -c 7 <&3; exec 3>&-; echo
        pavo wait --for agent; pavo run --label hostname </dev/null | sort >ran
        head -c 3000000 /dev/urandom >sent; pavo run -w vm1 cat <sent | cmp - sent
        pavo cp sent all:/tmp; pavo cp all:/tmp/sent back; cmp sent back/vm0/sent; cmp sent back/vm1/sent
        pavo top --once -o json >used; pavo dump -z vm1 /tmp/memory
        touch ready; until [ -e seen ]; do sleep 0.1; done; kill -INT $!; wait $!
END
";
    std::thread::scope(|scope| {
        let alloc = scope.spawn(|| {
            let argv =
                ["pavo", "alloc", "-c1", "-N2", "--wait", "ssh", "-E", script, "-J", "f", "tiny:2"];
            site.run("alice", &argv)
        });
        site.until("alice", "ls", "ready");
        let refused = site.run("bob", &["pavo", "nc", "-J", "f", "vm1", "22"]);
        assert_eq!(refused.status.code(), Some(4), "{refused:?}");
        for host in ["n1", "n2"] {
            // Connecting takes the right to write.
            let argv = ["test", "-w", "/run/pavo/1.0/dial-nat"];
            let may = |user: &str| site.on(host, user, &argv).status.success();
            assert!(may("alice"), "on {host}");
            assert!(!may("bob"), "on {host}");
        }
        assert_eq!(site.sh("alice", "cat ran"), "vm0: vm0\nvm1: vm1\n");
        let refused = site.run("bob", &["pavo", "run", "-J", "f", "true"]);
        assert_eq!(refused.status.code(), Some(4), "{refused:?}");
        let refused = site.run("bob", &["pavo", "cp", "-J", "f", "/etc/passwd", "vm1:/tmp"]);
        assert_eq!(refused.status.code(), Some(4), "{refused:?}");
        let used: Vec<serde_json::Value> =
            serde_json::from_str(&site.sh("alice", "cat used")).unwrap();
        let host = |rank: usize| used[rank]["host"].as_str().unwrap().to_owned();
        assert!(host(0).ends_with("n1") && host(1).ends_with("n2"), "{used:?}");
        assert!(used.iter().all(|vm| vm["rates"]["cpu_percent"].is_number()), "{used:?}");
        assert!(used.iter().all(|vm| vm["memory_bytes"].as_u64() > Some(32 << 20)), "{used:?}");
        // Where the VM is, and its user's.
        let held = site.lab.host("n2").sh("stat -c '%a %U' /tmp/memory; rm /tmp/memory").unwrap();
        assert_eq!(held.trim(), "600 alice");
        let port = site.sh("alice", "sed -n 's/^.*:\\([0-9]*\\) -> vm1:22$/\\1/p' ports");
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{}; head -c 7 <&3", port.trim());
        let stranger = site.run("bob", &["bash", "-c", &script]);
        assert_eq!(stranger.stdout, "", "{stranger:?}");
        site.sh("alice", "touch seen");
        let output = alloc.join().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(output.stdout, "banner SSH-2.0\nSSH-2.0\n", "{output:?}");
        let said = site.sh("alice", "cat out-err");
        assert!(said.contains("turned away a program of another user"), "{said}");
    });
    site.nothing_left(&before);
}

#[test]
fn a_screen_of_a_guest_on_another_host_is_seen() {
    let site = Site::up(2);
    let before = site.snapshot();
    let template = "seen:\\n  image: tiny\\n  remote-display: vnc\\n";
    site.sh("alice", &format!("mkdir -p ~/.pavo; printf '{template}' >~/.pavo/templates.yaml"));
    let script = "cat >it <<'END'; exec bash it
        set -e; pavo display --print vm1 >vv 2>err &
        until grep -q ^title= vv; do sleep 0.1; done
        exec 3<>/dev/tcp/127.0.0.1/$(sed -n s/^port=//p vv); head -c 12 <&3; exec 3>&-
        kill -INT $!; wait $!
END
";
    let argv = ["pavo", "alloc", "-c1", "-N2", "-E", script, "seen:2"];
    let output = site.run("alice", &argv);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout, "RFB 003.008\n", "{output:?}");
    site.nothing_left(&before);
}
