//! What VMs use.

use serde_json::Value;

use super::session::Terminal;
use super::world::{World, world};

fn once(world: &World, words: &[&str]) -> Value {
    serde_json::from_str(&world.ok(&[&["top", "--once", "-o", "json"], words].concat())).unwrap()
}

#[test]
fn counters_of_every_vm_become_rates() {
    world(|world| {
        let words = ["tiny:2", "--mem", "128", "--wait", "ssh", "-E", "sleep 600"];
        let alloc = world.alloc(&words);
        alloc.wait_for("vm[0-1] answer ssh\n");
        let vms = once(world, &[]);
        for rank in 0..2 {
            let vm = &vms[rank];
            assert_eq!((&vm["rank"], &vm["cores"]), (&rank.into(), &1.into()), "{vms}");
            assert_eq!((&vm["name"], &vm["memory_mib"]), (&"pavo".into(), &128.into()), "{vms}");
            let memory = vm["memory_bytes"].as_u64().unwrap();
            assert!(((32 << 20)..(2 << 30)).contains(&memory), "{vms}");
        }
        let work = "(while :; do dd if=/dev/zero of=/dev/vda bs=64k count=4 conv=fsync
            ping -c 2 -i 0.2 vm1; done) >/dev/null 2>&1 </dev/null &";
        world.ok(&["ssh", "vm0", work]);
        for rate in ["cpu_percent", "disk_written_bytes", "received_bytes", "sent_bytes"] {
            let is_seen = || once(world, &[])[0]["rates"][rate].as_f64().unwrap() > 0.0;
            world.until(rate, is_seen);
        }
        // One that stands still is not busy.
        world.ok(&["pause", "vm1"]);
        world.until("it stands still", || {
            let vms = once(world, &["-j", &alloc.id()]);
            vms[1]["state"] == "paused" && vms[1]["rates"]["cpu_percent"].as_f64().unwrap() < 20.0
        });
        the_table_is_live_and_the_terminal_as_before(world);
        refusals(world);
        world.ok(&["cancel"]);
        alloc.finish();
    });
}

fn the_table_is_live_and_the_terminal_as_before(world: &World) {
    for end in ["q", "\x03"] {
        let mut terminal = Terminal::new(world, &["top", "-n", "1"]);
        terminal.wait_for("\x1b[?1049h\x1b[?25l");
        for _ in 0..2 {
            let above = terminal.wait_for("paused");
            for expected in ["pavo: 2 VMs of 1 cluster", "MEMORY", "vm0  running"] {
                let above = above.replace("ssh    ", "running");
                assert!(above.contains(expected), "{expected}: {above}");
            }
        }
        terminal.type_in("m");
        terminal.wait_for("\x1b[H");
        terminal.type_in(end);
        terminal.wait_for("\x1b[?25h\x1b[?1049l");
        assert!(terminal.ends_cooked());
    }
}

fn refusals(world: &World) {
    let wrong = world.pavo(&["top"]);
    assert_eq!(wrong.code, Some(2), "{wrong}");
    assert!(wrong.stderr.contains("help: elsewhere: `--once`"), "{wrong}");
    let nobody = world.pavo(&["top", "--once", "-j", "999999"]);
    assert_eq!(nobody.code, Some(4), "{nobody}");
}
