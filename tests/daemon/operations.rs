//! Power by the daemon: its operations go on, are told of, and are done again.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pavo_fakes::{Bmcs, Manner, PASSWORD, USER};

use crate::leading::second;
use crate::server::Cluster;
use crate::world::{Daemon, PATIENCE, World};

/// A world whose nodes have controllers of the simulator.
pub struct Machines {
    pub world: World,
    pub bmcs: Bmcs,
}

impl Machines {
    fn new(count: u32, delay: Duration) -> (Self, Daemon) {
        Self::within(World::new(), count, delay)
    }

    fn within(world: World, count: u32, delay: Duration) -> (Self, Daemon) {
        let daemon = world.active();
        (Self::known(world, count, delay), daemon)
    }

    /// Those that an active daemon gets to know.
    pub fn known(world: World, count: u32, delay: Duration) -> Self {
        let bmcs = Bmcs::start(count, delay, 0).unwrap();
        let address = Bmcs::address(0).to_string();
        let base = address.rsplit_once('.').unwrap().0.to_owned();
        let mut command = world.command("node create");
        command.arg(format!("n[1-{count}]")).args([
            "mgt=ipmi".to_owned(),
            format!("control/bmc_address={base}.{{n}}"),
            format!("control/bmc_port={}", bmcs.port()),
            format!("control/bmc_username={USER}"),
            format!("control/bmc_password={PASSWORD}"),
        ]);
        assert!(command.status().unwrap().success());
        Self { world, bmcs }
    }

    pub fn are_on(&self, count: u32) -> u32 {
        (0..count).map(|index| u32::from(self.bmcs.with(index, |bmc| bmc.on))).sum()
    }
}

#[test]
fn power_is_the_daemons_work_and_its_caller_hears_of_each_node() {
    let (it, _daemon) = Machines::new(4, Duration::ZERO);
    let text = it.world.ok("power all on");
    assert!(text.contains("n1: on\n") && text.contains("Success: 4  Total: 4"), "{text}");
    assert_eq!(it.are_on(4), 4);
    assert!(it.world.ok("bootdev n[1-2] net").contains("n2: net"));
    let run = it.world.run("power n[3-5] off");
    assert_eq!(run.code, 1);
    assert!(run.stdout.contains("n5: Could not be found."), "{}", run.stdout);
    let list = it.world.ok("op list");
    for line in ["done", "failed", "power on n[1-4]", "bootdev net n[1-2]", "power off n[3-5]"] {
        assert!(list.contains(line), "{line}: {list}");
    }
    assert!(it.world.ok("op show 1").contains("n4: on"));
    assert!(it.world.refused("op watch 77", 4).contains("no operation 77"));
    assert!(it.world.refused("op retry 1", 2).contains("went well with all"));
}

#[test]
fn an_operation_is_left_watched_again_and_stopped() {
    let (it, _daemon) = Machines::new(40, Duration::from_millis(100));
    let id = it.world.ok("power all on --fanout 1 --no-wait");
    let id = id.trim();
    let mut watch = it.world.command(&format!("op watch {id}")).spawn().unwrap();
    it.world.ok(&format!("op abort {id}"));
    assert_eq!(watch.wait().unwrap().code(), Some(130));
    let text = it.world.ok(&format!("op show {id}"));
    assert!(text.contains("aborted") && text.contains("not started"), "{text}");
    let on = it.are_on(40);
    assert!(on < 40, "it was stopped");
    let text = it.world.ok(&format!("op retry {id}"));
    assert!(text.contains("Success: "), "{text}");
    assert_eq!(it.are_on(40), 40);
}

#[test]
fn a_daemon_that_dies_leaves_a_journal_and_the_next_does_the_rest() {
    let (it, daemon) = Machines::new(30, Duration::from_millis(50));
    let id = it.world.ok("power all on --fanout 1 --no-wait");
    let id = id.trim();
    let end = Instant::now() + PATIENCE;
    // Some results are in the journal.
    while it.are_on(30) < 8 {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(700));
    daemon.kill();
    let on = it.are_on(30);
    let mut next = it.world.start();
    next.says(" active ");
    let text = it.world.ok(&format!("op show {id}"));
    assert!(text.contains("interrupted") && text.contains("n1: on"), "{text}");
    let error = it.world.refused(&format!("op abort {id}"), 2);
    assert!(error.contains("does not run"), "{error}");
    let before = it.bmcs.with(0, |bmc| bmc.changes.len());
    it.world.ok(&format!("op retry {id}"));
    assert_eq!(it.are_on(30), 30);
    assert!(on < 30, "it died in the middle");
    assert_eq!(it.bmcs.with(0, |bmc| bmc.changes.len()), before, "what was done is not done again");
}

#[test]
fn a_daemon_that_is_told_to_end_lets_those_under_way_end() {
    let (it, daemon) = Machines::new(20, Duration::from_millis(100));
    let id = it.world.ok("power all on --fanout 2 --no-wait");
    assert_eq!(daemon.stop(), 0);
    let _next = it.world.active();
    let text = it.world.ok(&format!("op show {}", id.trim()));
    assert!(text.contains("aborted"), "{text}");
    let told = text.lines().filter(|line| line.ends_with(": on")).count();
    assert_eq!(told, it.are_on(20) as usize, "{text}");
}

#[test]
fn limits_hold_in_the_daemon_too() {
    let (it, _daemon) = Machines::new(3, Duration::ZERO);
    it.bmcs.with(0, |bmc| bmc.manner = Manner::Dead);
    let run = it.world.run("power all on --timeout 1 --retries 0 -f 1 --fail-limit 0");
    assert_eq!(run.code, 6, "{}{}", run.stdout, run.stderr);
    assert!(run.stdout.contains("n3: not started"), "{}", run.stdout);
    assert!(it.world.ok("power n2 on --dry-run").contains("would switch on"));
    assert_eq!(it.are_on(3), 0);
}

#[test]
fn who_lost_the_lead_switches_no_other_machine() {
    let etcd = Cluster::single();
    let world = World::with_etcd(&etcd.endpoints());
    let (it, mut stale) = Machines::within(world, 200, Duration::from_millis(30));
    let id = it.world.ok("power all on --fanout 1 --no-wait");
    let other = second(&it.world, &etcd);
    let mut next = other.start();
    next.says("waiting");
    stale.signal(Signal::SIGSTOP);
    next.says(" active ");
    stale.signal(Signal::SIGCONT);
    stale.says("waiting");
    let text = other.ok(&format!("op show {}", id.trim()));
    assert!(text.contains("interrupted"), "{text}");
    // The one that was under way may end.
    let mut on = it.are_on(200);
    loop {
        std::thread::sleep(Duration::from_secs(2));
        let now = it.are_on(200);
        if now == on {
            break;
        }
        on = now;
    }
    assert!(on < 200, "it went on to the end");
}
