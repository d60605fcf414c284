//! Several daemons over one etcd, and what happens to who was the first.

use nix::sys::signal::Signal;

use crate::server::{Cluster, Setup};
use crate::world::{Daemon, World};

/// Another daemon of the same site, with a socket of its own and the same key.
pub fn second(world: &World, etcd: &Cluster) -> World {
    let other = World::with_etcd(&etcd.endpoints());
    std::fs::create_dir_all(other.path("state")).unwrap();
    std::fs::copy(world.path("state/inventory.key"), other.path("state/inventory.key")).unwrap();
    other
}

#[test]
fn of_two_daemons_one_writes_and_the_other_takes_over() {
    let etcd = Cluster::single();
    let world = World::with_etcd(&etcd.endpoints());
    let first = world.active();
    world.ok("node create n[1-300] control/bmc_password=hunter2");
    let other = second(&world, &etcd);
    let mut waiting = other.start();
    waiting.says("another daemon is active: waiting");
    let error = other.refused("node list", 5);
    assert!(error.contains("the daemon is beginning") || error.contains("active"), "{error}");
    let services = world.ok("service list");
    assert!(services.contains("active") && services.contains("waiting"), "{services}");
    // Told to end, it hands over at once.
    assert_eq!(first.stop(), 0);
    waiting.says(" active ");
    assert_eq!(other.ok("nodeset count all").trim(), "300");
    other.ok("node update n7 tags+=new");
    // Killed, it is missed when its lease is over.
    let mut third = world.start();
    waiting.kill();
    third.says(" active ");
    assert_eq!(world.ok("nodeset expand tags=new").trim(), "n7");
}

#[test]
fn who_was_stopped_longer_than_its_lease_changes_nothing_any_more() {
    let etcd = Cluster::single();
    let world = World::with_etcd(&etcd.endpoints());
    let mut stale: Daemon = world.active();
    world.ok("node create n1");
    let other = second(&world, &etcd);
    let mut next = other.start();
    next.says("waiting");
    stale.signal(Signal::SIGSTOP);
    next.says(" active ");
    other.ok("node create n2");
    // A request that was on its way when it was stopped is done by a stale writer.
    let socket = world.path("socket");
    let late = std::thread::spawn(move || {
        let json = "application/json";
        crate::world::ask(&socket, "POST", "/v1/nodes", Some((json, r#"{"names": "n3"}"#)))
    });
    std::thread::sleep(std::time::Duration::from_millis(200));
    stale.signal(Signal::SIGCONT);
    let (status, _, body) = late.join().unwrap();
    assert_eq!(status, 503, "{body}");
    assert_eq!(other.ok("node list").lines().count(), 2);
    stale.says("waiting");
    drop(next);
    stale.says(" active ");
    assert_eq!(world.ok("node list").lines().count(), 2);
}

#[test]
fn a_second_daemon_on_a_host_says_that_there_is_one() {
    let world = World::new();
    let _first = world.active();
    let error = world.refused("daemon", 5);
    assert!(error.contains("another daemon listens at"), "{error}");
}

#[test]
fn a_daemon_with_another_key_does_not_take_over() {
    let etcd = Cluster::single();
    let world = World::with_etcd(&etcd.endpoints());
    let first = world.active();
    let other = World::with_etcd(&etcd.endpoints());
    let mut stranger = other.start();
    first.stop();
    stranger.says("sealed with another key");
    let error = other.refused("node list", 3);
    assert!(error.contains("inventory.key"), "{error}");
}

#[test]
fn an_import_survives_the_loss_of_etcds_leader() {
    let mut etcd = Cluster::start(Setup { members: 3, ..Setup::default() });
    let world = World::with_etcd(&etcd.endpoints());
    let _daemon = world.active();
    let text: String = (1..=3000).map(|n| format!("node{n},x86_64\n")).collect();
    std::fs::write(world.path("all.csv"), format!("name,arch\n{text}")).unwrap();
    let mut import = world.command("node import all.csv").spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(60));
    // Whoever leads is among those that are killed one after the other.
    for member in 0..3 {
        etcd.members[member].kill();
        std::thread::sleep(std::time::Duration::from_millis(1500));
        etcd.run(member);
        std::thread::sleep(std::time::Duration::from_millis(1500));
    }
    let code = import.wait().unwrap().code();
    // It went through, or says so, and the same command finishes it.
    if code != Some(0) {
        world.ok("node import all.csv");
    }
    assert_eq!(world.ok("nodeset count all").trim(), "3000");
}

#[test]
fn without_etcd_the_daemon_says_so_and_comes_back() {
    let mut etcd = Cluster::single();
    let world = World::with_etcd(&etcd.endpoints());
    let mut daemon = world.active();
    world.ok("node create n[1-3]");
    etcd.members[0].kill();
    // What is in memory is read for as long as the lead is certain.
    assert_eq!(world.ok("node list").lines().count(), 3);
    daemon.says("WARN error: keeping a lease");
    let error = world.refused("node list", 5);
    assert!(error.contains("etcd") || error.contains("store"), "{error}");
    etcd.run(0);
    daemon.says(" active ");
    assert_eq!(world.ok("node list").lines().count(), 3);
}
