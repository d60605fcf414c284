//! A daemon that is killed at each of its moments, the one that follows, and what both leave:
//! nothing is lost, nothing is half done that the journal does not tell of, and the same command
//! does the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Mutex;
use std::time::Duration;

use pavo::host::crash;
use serde_json::Value;

use crate::operations::Machines;
use crate::world::{Daemon, World};

/// How many sites there are at once: most of the time they wait for a lease to end.
const AT_ONCE: usize = 8;

const MACHINES: u32 = 6;

/// More than three commits take.
const NODES: usize = 450;

#[test]
fn a_crash_at_any_moment_loses_nothing_and_the_same_command_does_the_rest() {
    let points = Mutex::new(crash::daemon_points().iter().copied());
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let next = points.lock().unwrap().next();
                    let Some(point) = next else { break };
                    if std::panic::catch_unwind(|| crash_at(point)).is_err() {
                        wrong.lock().unwrap().push(point);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{wrong:?}");
}

fn crash_at(point: &'static str) {
    match point.split('.').next() {
        Some("lead") => begins_again(point),
        Some("op") => orders(point),
        _ => {
            imports(point);
            if point != "inventory.buried" {
                changes(point);
            }
        }
    }
}

/// The next daemon, when it is active.
fn next(world: &World) -> Daemon {
    let mut daemon = world.start_armed();
    daemon.says(" active ");
    daemon
}

fn armed(world: &World) -> bool {
    world.path("crash/crash-at").exists()
}

/// All that the journal has.
fn journal(world: &World) -> Vec<Value> {
    serde_json::from_str(&world.ok("op list -o json")).unwrap()
}

/// A daemon that dies while it begins, at its first time.
fn begins_again(point: &str) {
    let world = World::new();
    world.arm(point);
    world.start_armed().dies();
    assert!(!armed(&world), "{point}");
    let daemon = next(&world);
    world.ok("node create n1 control/bmc_password=hunter2");
    assert_eq!(daemon.stop(), 0);
    let _daemon = next(&world);
    assert_eq!(world.ok("nodeset count all").trim(), "1");
}

/// How often each machine was switched off.
fn switched(it: &Machines) -> BTreeMap<String, usize> {
    let count =
        |index| it.bmcs.with(index, |bmc| bmc.changes.iter().filter(|it| **it == 0).count());
    (0..MACHINES).map(|index| (format!("n{}", index + 1), count(index))).collect()
}

/// An order that must not be done twice.
fn orders(point: &str) {
    let world = World::new();
    let daemon = next(&world);
    let it = Machines::known(world, MACHINES, Duration::from_millis(40));
    (0..MACHINES).for_each(|index| it.bmcs.with(index, |bmc| bmc.on = true));
    // Who dies while it puts an operation to rest has one that another left.
    let is_second = point == "op.buried";
    it.world.arm(if is_second { "op.switched" } else { point });
    let run = it.world.run("power all cycle --fanout 2");
    assert_ne!(run.code, 0, "{point}: {}{}", run.stdout, run.stderr);
    daemon.dies();
    assert!(!armed(&it.world), "{point}");
    if is_second {
        it.world.arm(point);
        it.world.start_armed().dies();
        assert!(!armed(&it.world), "{point}");
    }
    let _daemon = next(&it.world);
    let before = switched(&it);
    let ops = journal(&it.world);
    let mut unknown = BTreeSet::new();
    match ops.first() {
        None => {
            assert_eq!(point, "op.begin");
            assert!(before.values().all(|count| *count == 0), "{before:?}");
            it.world.ok("power all cycle");
        }
        Some(op) => {
            assert_eq!(ops.len(), 1, "{point}: {ops:?}");
            let expected = if point == "op.closed" { "done" } else { "interrupted" };
            assert_eq!(op["state"], expected, "{point}: {op}");
            let shown = it.world.ok(&format!("op show {} -o json", op["id"]));
            let shown: Value = serde_json::from_str(&shown).unwrap();
            let mut told = BTreeMap::new();
            for result in shown["results"].as_array().unwrap() {
                let name = result["name"].as_str().unwrap().to_owned();
                if result["text"].as_str().unwrap().contains("is not known") {
                    unknown.insert(name.clone());
                }
                assert!(
                    told.insert(name, result["ok"] == true).is_none(),
                    "{point}: twice: {shown}"
                );
            }
            // Of what was touched, the journal tells.
            for (name, count) in &before {
                assert!(*count == 0 || told.contains_key(name), "{point}: {name}: {shown}");
            }
            assert_eq!(op["done"], told.values().filter(|ok| **ok).count(), "{point}: {shown}");
            assert_eq!(op["failed"], told.values().filter(|ok| !**ok).count(), "{point}: {shown}");
            if expected == "interrupted" {
                it.world.ok(&format!("op retry {}", op["id"]));
            }
        }
    }
    assert_eq!(it.are_on(MACHINES), MACHINES, "{point}");
    for (name, count) in switched(&it) {
        let is_well = count == 1 || count == 2 && unknown.contains(&name);
        assert!(is_well, "{point}: {name} was switched {count} times; not known: {unknown:?}");
    }
    assert!(journal(&it.world).iter().all(|op| op["state"] != "running"), "{point}");
}

fn count(world: &World) -> usize {
    match world.run("nodeset count all") {
        run if run.code == 0 => run.stdout.trim().parse().unwrap(),
        // None are an empty set.
        _ => 0,
    }
}

/// What the journal says of a change that was interrupted.
fn told(world: &World, point: &str) -> usize {
    let ops = journal(world);
    let Some(op) = ops.last() else { return 0 };
    let done = op["done"].as_u64().unwrap() as usize;
    let state = if done == NODES { "done" } else { "interrupted" };
    assert_eq!(op["state"], state, "{point}: {op}");
    done
}

fn imports(point: &str) {
    let world = World::new();
    let lines: String = (1..=NODES).map(|n| format!("n{n},x86_64\n")).collect();
    fs::write(world.path("all.csv"), format!("name,arch\n{lines}")).unwrap();
    let daemon = next(&world);
    let is_second = point == "inventory.buried";
    world.arm(if is_second { "inventory.shard" } else { point });
    let run = world.run("node import all.csv");
    assert_ne!(run.code, 0, "{point}");
    daemon.dies();
    assert!(!armed(&world), "{point}");
    if is_second {
        world.arm(point);
        world.start_armed().dies();
        assert!(!armed(&world), "{point}");
    }
    let _daemon = next(&world);
    assert_eq!(told(&world, point), count(&world), "{point}");
    let text = world.ok("node import all.csv");
    assert!(text.contains(&format!("Success: {NODES}  Total: {NODES}")), "{point}");
    assert_eq!(count(&world), NODES);
    assert!(journal(&world).iter().all(|op| op["state"] != "running"), "{point}");
}

/// Updates, and then all is deleted but one.
fn changes(point: &str) {
    let world = World::new();
    let mut daemon = next(&world);
    world.ok(&format!("node create n[1-{NODES}] tags=old"));
    for (line, what) in [("node update all tags+=new", "tags=new"), ("node delete n[2-450]", "all")]
    {
        world.arm(point);
        assert_ne!(world.run(line).code, 0, "{point}: {line}");
        daemon.dies();
        assert!(!armed(&world), "{point}: {line}");
        daemon = next(&world);
        let run = world.run(&format!("nodeset count {what}"));
        let now = if run.code == 0 { run.stdout.trim().parse().unwrap() } else { 0 };
        let ops = journal(&world);
        let op = ops.last().unwrap();
        let is_update = what != "all";
        let changed: usize = if is_update { now } else { NODES - now };
        if op["what"].as_str().unwrap().contains(line.split(' ').nth(1).unwrap()) {
            assert_eq!(op["done"], changed, "{point}: {op}");
            assert_ne!(op["state"], "running", "{point}: {op}");
        } else {
            assert_eq!(changed, 0, "{point}: {op}");
        }
        // Those that are gone already are named.
        let code = world.run(line).code;
        assert_eq!(code, i32::from(!is_update && changed > 0), "{point}: {line}");
        if is_update {
            assert_eq!(world.ok("nodeset count tags=new").trim(), NODES.to_string());
            assert!(!world.ok("node show n1 -o json").contains("\"new\",\n        \"new\""));
        }
    }
    assert_eq!(world.ok("nodeset expand all").trim(), "n1");
}
