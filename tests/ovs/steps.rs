//! Set up and removed: twice, after a crash at each step, with Open vSwitch gone.

use std::time::{Duration, Instant};

use pavo::host::file::write_atomically;
use pavo::host::journal::Plan;
use pavo::host::ovs::{self, Datapath};
use pavo::host::process::{self, ProcessId};
use pavo::host::step::{Outcome, Step};
use pavo::network::Switch;
use pavo::network::ovs::{choose, decide};

use super::lab::Lab;
use super::world::*;

/// One host, without a wire to others.
fn alone(lab: &Lab) -> (Node, Plan) {
    let node = Node::new(lab, 1);
    let plan = job(&node, &[("net", l3()), ("raw", l2())]).plan;
    (node, plan)
}

fn apply(node: &Node, step: &Step) -> Outcome {
    node.run(|| step.apply(&node.host)).unwrap()
}

fn undo(node: &Node, step: &Step) -> Outcome {
    node.run(|| step.undo(&node.host)).unwrap()
}

#[test]
fn each_step_can_be_done_and_undone_twice_and_leaves_nothing() {
    with_ovs(|lab| {
        let (node, plan) = alone(lab);
        let before = node.traces();
        for step in &plan.steps {
            apply(&node, step);
            // Tables are replaced whole, always.
            let replaced = matches!(step, Step::NftTables { .. } | Step::OvsFlows { .. });
            assert_eq!(apply(&node, step) == Outcome::Changed, replaced, "{step}");
        }
        let all = node.traces();
        assert!(all.len() > before.len() + 10, "{all:?}");
        for step in plan.steps.iter().rev() {
            undo(&node, step);
            assert_eq!(undo(&node, step), Outcome::AlreadySo, "{step}");
        }
        assert_eq!(node.traces(), before);
        // The whole, and with a job of somebody else's beside it.
        node.vsctl("add-br site -- set bridge site datapath_type=netdev");
        let before = node.traces();
        node.apply(&plan).unwrap();
        node.apply(&plan).unwrap();
        assert_eq!(node.run(|| ovs::owners(&node.host)).unwrap(), [owner()].into());
        node.undo().unwrap();
        node.undo().unwrap();
        assert_eq!(node.traces(), before);
        assert_eq!(node.run(|| ovs::owners(&node.host)).unwrap(), [].into());
    });
}

#[test]
fn a_crash_at_any_point_is_swept() {
    with_ovs(|lab| {
        let (node, mut plan) = alone(lab);
        let us = process::current();
        // A process that is certainly over: it has our id, and started before us.
        plan.keeper = ProcessId { start_time: us.start_time - 1, ..us };
        let before = node.traces();
        let path = lab.dir.join("n1/journal/42.json");
        for done in 0..=plan.steps.len() {
            write_atomically(&path, &serde_json::to_vec(&plan).unwrap(), 0o600).unwrap();
            for step in &plan.steps[..done] {
                apply(&node, step);
            }
            let swept = node.run(|| node.journal.sweep(&node.host)).unwrap();
            assert_eq!(swept, [owner()]);
            assert_eq!(node.traces(), before, "after {done} steps");
        }
    });
}

#[test]
fn whichever_step_fails_nothing_is_left_behind() {
    with_ovs(|lab| {
        let (node, whole) = alone(lab);
        let before = node.traces();
        for failing in 0..whole.steps.len() {
            let mut plan = whole.clone();
            match &mut plan.steps[failing] {
                Step::OvsBridges { bridges, .. } => bridges[0].links.push("absent".into()),
                Step::OvsFlows { tables } => tables[0].flows.push("actions=nonsense".into()),
                Step::Taps { names, .. } => names.push("a-name-too-long-for-linux".into()),
                Step::NoOffloads { link, .. } => *link = "absent".into(),
                _ => continue,
            }
            let error = node.apply(&plan).unwrap_err();
            // Not merely "it failed": it failed where we made it fail.
            assert_eq!(error.to_string(), format!("creating {}", plan.steps[failing]));
            assert_eq!(node.traces(), before, "after {}", error.report());
        }
    });
}

#[test]
fn what_an_administrator_removed_is_mended() {
    with_ovs(|lab| {
        let (node, plan) = alone(lab);
        node.apply(&plan).unwrap();
        let whole = node.traces();
        for harm in ["del-port pt42-1", "set interface px42-0 options:key=7", "del-br pb42"] {
            node.vsctl(harm);
            assert_ne!(node.traces(), whole, "{harm}");
            node.apply(&plan).unwrap();
            assert_eq!(node.traces(), whole, "{harm}");
        }
    });
}

#[test]
fn what_is_somebody_elses_is_refused_and_left_alone() {
    with_ovs(|lab| {
        let (node, plan) = alone(lab);
        for foreign in [
            "add-br pb42 -- set bridge pb42 datapath_type=netdev",
            "add-br site -- set bridge site datapath_type=netdev -- add-port site px42-0 \
             -- set interface px42-0 type=vxlan options:remote_ip=flow options:key=9",
        ] {
            node.vsctl(foreign);
            let before = node.traces();
            let error = node.apply(&plan).unwrap_err().report();
            assert!(error.contains("(pb42)") || error.contains("(px42-0)"), "{error}");
            assert!(error.contains("constraint violation"), "{error}");
            assert_eq!(node.traces(), before);
            node.vsctl("--if-exists del-br pb42 -- --if-exists del-br site");
        }
    });
}

#[test]
fn a_reboot_forgets_the_journal_and_what_it_knew_is_swept() {
    with_ovs(|lab| {
        let (node, plan) = alone(lab);
        let before = node.vsctl("show");
        node.apply(&plan).unwrap();
        let known = node.journal.owners().unwrap();
        assert_eq!(node.run(|| ovs::sweep(&node.host, &known)).unwrap(), []);
        std::fs::remove_file(lab.dir.join("n1/journal/42.json")).unwrap();
        let known = node.journal.owners().unwrap();
        assert_eq!(node.run(|| ovs::sweep(&node.host, &known)).unwrap(), [owner()]);
        assert_eq!(node.vsctl("show"), before);
    });
}

/// How long this takes.
fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (work(), start.elapsed())
}

#[test]
fn without_open_vswitch_the_reason_is_said_soon_and_clean_up_waits_for_it() {
    with_ovs(|lab| {
        let (mut node, plan) = alone(lab);
        let before = node.traces();
        node.apply(&plan).unwrap();
        node.kill(true);
        let (error, took) = timed(|| node.undo().unwrap_err());
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(error.report().contains("systemctl status openvswitch-switch"), "{error:?}");
        let (choice, why) = node.run(|| decide(&node.host, Some("br-phy")));
        assert_eq!(choice, Switch::Linux);
        assert!(why.contains("Open vSwitch does not answer at"), "{why}");

        node.start_ovs();
        node.undo().unwrap();
        assert_eq!(node.traces(), before);

        node.kill(true);
        let (error, took) = timed(|| node.apply(&plan).unwrap_err());
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(error.report().contains("systemctl status openvswitch-switch"), "{error:?}");
    });
}

#[test]
fn with_a_database_alone_nobody_waits_for_ever() {
    with_ovs(|lab| {
        let (mut node, plan) = alone(lab);
        let before = node.traces();
        node.kill(false);
        let (choice, took) = timed(|| node.run(|| decide(&node.host, None)).0);
        assert_eq!(choice, Switch::Linux);
        assert!(took < Duration::from_secs(5), "{took:?}");
        let (error, took) = timed(|| node.apply(&plan).unwrap_err());
        // Once for the set-up, once for its undoing.
        assert!(took < 2 * ovs::LIMIT + Duration::from_secs(5), "{took:?}");
        let report = error.report();
        assert!(report.contains("did not follow within"), "{report}");
        assert!(report.contains("systemctl status openvswitch-switch"), "{report}");
        node.start_vswitchd();
        assert_eq!(node.traces(), before);
    });
}

#[test]
fn the_choice_has_a_reason() {
    with_ovs(|lab| {
        let (node, _) = alone(lab);
        node.vsctl("add-br br-phy -- set bridge br-phy datapath_type=netdev");
        let facts = node.run(|| ovs::probe(&node.host));
        let (choice, why) = choose(&facts, Some("br-phy"));
        let (other, why_not) = choose(&facts, Some("eth0"));
        let (alone, _) = choose(&facts, None);
        if facts.unwrap().kernel {
            let system = Switch::Ovs(Datapath::System);
            assert_eq!((choice, other, alone), (system, system, system));
        } else {
            let netdev = Switch::Ovs(Datapath::Netdev);
            assert_eq!((choice, other, alone), (netdev, Switch::Linux, netdev));
            assert!(why.contains("has the underlay `br-phy`"), "{why}");
            assert!(why_not.contains("`eth0` is no bridge"), "{why_not}");
        }
    });
}
