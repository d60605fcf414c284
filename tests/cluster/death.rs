//! Whatever is killed, whenever: nothing is left, and who survives says what happened.

use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::world::{World, world};

/// After a process was first seen: in the middle of a start, and when all is up.
const MOMENTS: [u64; 5] = [0, 20, 60, 150, 400];

/// Starts a cluster, kills its process with `part` in its arguments so long after it was
/// seen, and returns what the launcher made of it.
fn killed(world: &World, part: &str, after: Duration) -> super::world::Output {
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
