//! Whatever is killed, whenever: nothing is left, and who survives says what happened.

use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::running::Output;
use super::world::{World, world};

/// After a process was first seen: in the middle of a start, and when all is up.
const MOMENTS: [u64; 5] = [0, 20, 60, 150, 400];

/// Starts a cluster, kills its process with `part` in its arguments so long after it was
/// seen, and returns what the launcher made of it.
fn killed(world: &World, part: &str, after: Duration) -> Output {
    let alloc = world.alloc(&["tiny:1", "--mem", "128", "-E", "exec sleep 600"]);
    let victim = world.process(part).unwrap_or_else(|| panic!("no {part}: {}", alloc.stderr()));
    sleep(after);
    victim.kill();
    let output = alloc.finish();
    world.nothing_is_left();
    output
}

/// Kills it at each moment; the launcher must report one system error.
fn launcher_reports(part: &'static str) {
    world(move |world| {
        for moment in MOMENTS {
            let output = killed(world, part, Duration::from_millis(moment));
            let at = format!("{part} at {moment} ms: {output}");
            assert_eq!(output.code, Some(5), "{at}");
            assert_eq!(output.stderr.matches("\nerror:").count(), 1, "{at}");
            assert!(output.stderr.contains("help: "), "{at}");
        }
    });
}

#[test]
fn a_killed_launcher_leaves_nothing() {
    world(|world| {
        for moment in MOMENTS {
            let alloc = world.alloc(&["tiny:1", "--mem", "128", "-E", "exec sleep 600"]);
            sleep(Duration::from_millis(moment));
            alloc.signal(Signal::SIGKILL);
            assert_eq!(alloc.finish().signal, Some(9));
            world.nothing_is_left();
        }
    });
}

#[test]
fn a_launcher_killed_while_it_ends_the_cluster_leaves_nothing() {
    world(|world| {
        for moment in [0, 10, 30, 60] {
            let alloc = world.alloc(&["tiny:2", "--mem", "128", "-E", "true"]);
            alloc.wait_for("Terminating the cluster...");
            sleep(Duration::from_millis(moment));
            alloc.signal(Signal::SIGKILL);
            // It may have come to its end before that.
            let output = alloc.finish();
            assert!(output.signal == Some(9) || output.code == Some(0), "{moment} ms: {output}");
            world.nothing_is_left();
        }
    });
}

#[test]
fn a_killed_outer_cell_is_reported_and_leaves_nothing() {
    launcher_reports("internal cell --rootless");
}

#[test]
fn a_killed_first_process_is_reported_and_leaves_nothing() {
    launcher_reports("internal cell-init");
}

#[test]
fn a_killed_responder_is_reported_and_leaves_nothing() {
    launcher_reports("internal responder");
}

#[test]
fn a_killed_pasta_is_reported_and_leaves_nothing() {
    launcher_reports("pasta --config-net");
}

#[test]
fn a_killed_vm_process_is_reported_and_leaves_nothing() {
    launcher_reports("internal run");
}

#[test]
fn a_killed_qemu_is_reported_and_leaves_nothing() {
    launcher_reports("qemu-system");
}

#[test]
fn what_a_killed_launcher_and_its_cell_left_is_removed_by_the_next_command() {
    world(|world| {
        let alloc = world.alloc(&["tiny:1", "--mem", "128", "-E", "exec sleep 600"]);
        alloc.wait_for("vm0 runs\n");
        let cell = world.process("internal cell-init").unwrap();
        alloc.signal(Signal::SIGSTOP);
        cell.kill();
        alloc.signal(Signal::SIGKILL);
        assert_eq!(alloc.finish().signal, Some(9));
        assert!(world.job_dir().exists(), "nobody was left to remove it");
        assert_eq!(world.ok(&["ps", "-o", "ndjson"]), "");
    });
}

/// Sends a signal at each moment of a start, as a terminal does.
fn ends_by(signal: Signal, why: &'static str) {
    world(move |world| {
        for moment in [0, 20, 40, 80, 120, 160, 200, 300] {
            let alloc = world.alloc(&["tiny:1", "--mem", "128", "--wait", "stopped"]);
            sleep(Duration::from_millis(moment));
            alloc.signal_group(signal);
            let output = alloc.finish();
            let at = format!("{signal} at {moment} ms: {output}");
            if output.stderr.contains("Granted") {
                assert_eq!(output.code, Some(130), "{at}");
                assert!(output.stderr.ends_with(&format!("error: {why}\n")), "{at}");
            } else {
                // There was no job yet, and nothing to say.
                assert!(output.signal == Some(signal as i32) || output.code == Some(130), "{at}");
            }
            world.nothing_is_left();
        }
    });
}

#[test]
fn an_interrupt_ends_a_start_at_any_point() {
    ends_by(Signal::SIGINT, "interrupted");
}

#[test]
fn a_cancellation_ends_a_start_at_any_point() {
    ends_by(Signal::SIGTERM, "cancelled");
}

#[test]
fn a_hang_up_ends_a_start_at_any_point() {
    ends_by(Signal::SIGHUP, "the terminal was closed");
}

#[test]
fn an_interrupt_is_the_scripts_business_once_it_runs() {
    world(|world| {
        let script = "trap 'echo got it; exit 9' INT; echo ready; sleep 600 & wait";
        let alloc = world.alloc(&["tiny:1", "--mem", "128", "-E", script]);
        alloc.wait_for("ready\n");
        alloc.signal_group(Signal::SIGINT);
        let output = alloc.finish();
        assert_eq!((output.code, &*output.stdout), (Some(9), "ready\ngot it\n"), "{output}");
        world.process("sleep 600").unwrap().kill();
    });
}

#[test]
fn a_script_and_its_children_end_with_the_cluster() {
    world(|world| {
        let alloc = world.idle(&["tiny:1"]);
        world.process("sleep 600").expect("a child of the script");
        alloc.signal(Signal::SIGTERM);
        assert_eq!(alloc.finish().code, Some(130));
    });
}
