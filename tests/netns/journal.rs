//! Set up and removed: twice, failing at each step, after a crash at each step.

use std::collections::BTreeSet;

use pavo::config::{Ethernet, Layer};
use pavo::host::file::write_atomically;
use pavo::host::journal::Plan;
use pavo::host::netns;
use pavo::host::process::ProcessId;
use pavo::host::step::{Outcome, Step, sysctl};
use pavo::model::owner::Owner;
use pavo::network::{Request, plan};

use super::lab::{Lab, across, eventually, in_netns, request, sh};

/// Two L3 networks, one of them on default addresses twice, and an L2 network, with guests
/// on two other hosts.
fn all_kinds(job: u32) -> Request {
    let l2 = Ethernet { layer: Layer::L2, mtu: 9000, ..Ethernet::default() };
    let networks = [("net", Ethernet::default()), ("raw", l2), ("twin", Ethernet::default())];
    across(request(job, 2, &networks), 0, &[2, 1, 2])
}

fn steps() -> usize {
    plan(&all_kinds(3)).unwrap().plan.steps.len()
}

/// A process that is certainly over: it has our id, and started before us.
fn dead() -> ProcessId {
    let us = pavo::host::process::current();
    ProcessId { start_time: us.start_time - 1, ..us }
}

#[test]
fn a_job_can_be_set_up_twice_and_removed_twice() {
    in_netns(|lab| {
        let before = lab.traces();
        let plan = plan(&all_kinds(3)).unwrap().plan;
        lab.apply(&plan).unwrap();
        let after = lab.traces();
        lab.apply(&plan).unwrap();
        assert_eq!(lab.traces(), after, "a second set-up changes nothing");
        let links = |kind: &str| after.iter().filter(|t| t.starts_with(kind)).count();
        assert_eq!(links("link p"), 3 + 6 + 2 * 2 + 3, "bridges, taps, veths, tunnels: {after:?}");

        lab.undo(plan.owner).unwrap();
        assert_eq!(lab.traces(), before);
        lab.undo(plan.owner).unwrap();
    });
}

#[test]
fn each_step_knows_whether_it_found_something_to_do() {
    in_netns(|lab| {
        let plan = plan(&all_kinds(3)).unwrap().plan;
        for step in &plan.steps {
            lab.run(step.apply(&lab.host)).unwrap();
            let again = lab.run(step.apply(&lab.host)).unwrap();
            // A table is replaced whole, always.
            let replaced = matches!(step, Step::NftTables { .. });
            assert_eq!(again == Outcome::Changed, replaced, "{step}");
        }
        for step in plan.steps.iter().rev() {
            lab.run(step.undo(&lab.host)).unwrap();
            let again = lab.run(step.undo(&lab.host)).unwrap();
            assert_eq!(again, Outcome::AlreadySo, "{step}");
        }
    });
}

#[test]
fn each_step_can_be_undone_alone() {
    in_netns(|lab| {
        let before = lab.traces();
        let plan = plan(&all_kinds(3)).unwrap().plan;
        for step in &plan.steps {
            lab.run(step.apply(&lab.host)).unwrap();
        }
        // Not in reverse: so that most are not gone with one that was undone before.
        // What others end with comes last.
        let holds_others =
            |step: &&Step| matches!(step, Step::Namespace { .. } | Step::Taps { .. });
        let (last, first): (Vec<_>, Vec<_>) = plan.steps.iter().partition(holds_others);
        for step in first.into_iter().chain(last.into_iter().rev()) {
            let outcome = lab.run(step.undo(&lab.host)).unwrap();
            let changes = matches!(
                step,
                Step::NftTables { .. }
                    | Step::Bridge { .. }
                    | Step::Veth { .. }
                    | Step::Vxlan { .. }
            );
            if changes {
                assert_eq!(outcome, Outcome::Changed, "{step}");
            }
        }
        assert_eq!(lab.traces(), before);
    });
}

#[test]
fn tables_go_also_where_somebody_has_deleted_one_or_all() {
    in_netns(|lab| {
        let before = lab.traces();
        let plan = plan(&all_kinds(3)).unwrap().plan;
        let outside = |step: &&Step| matches!(step, Step::NftTables { namespace: None, tables } if tables.len() > 2);
        let step = plan.steps.iter().find(outside).unwrap();
        let Step::NftTables { tables, .. } = step else { unreachable!() };
        for gone in 0..=tables.len() {
            lab.run(step.apply(&lab.host)).unwrap();
            for table in &tables[..gone] {
                let family = table.family.as_str();
                sh(None, &format!("nft delete table {family} {}", table.name));
            }
            let outcome = lab.run(step.undo(&lab.host)).unwrap();
            assert_eq!(outcome == Outcome::AlreadySo, gone == tables.len(), "{gone} were gone");
            assert_eq!(lab.traces(), before);
        }
    });
}

/// The step, made such that the kernel refuses it.
fn broken(step: &Step) -> Step {
    let mut step = step.clone();
    let too_long = || "a-name-too-long-for-linux".to_owned();
    match &mut step {
        Step::Namespace { name } => *name = "x".repeat(300),
        Step::Folder { path, .. } | Step::SharedFolder { path } => *path = "/absent/folder".into(),
        Step::Sysctl { key, .. } => *key = "net/ipv4/no_such_setting".into(),
        Step::NftTables { tables, .. } => tables[0].objects.push(serde_json::json!({ "rule": {} })),
        Step::Bridge { name, .. } | Step::Veth { name, .. } => *name = too_long(),
        Step::Address { link, .. }
        | Step::LinkUp { link, .. }
        | Step::Neighbours { link, .. }
        | Step::Forwarding { link, .. }
        | Step::NoOffloads { link, .. } => *link = "absent".into(),
        Step::OvsBridges { .. } | Step::OvsFlows { .. } => unreachable!("see tests/ovs"),
        Step::Route { gateway, .. } => *gateway = [203, 0, 113, 1].into(),
        Step::Taps { names, .. } => names.push(too_long()),
        Step::Vxlan { key, .. } => *key = 1 << 24,
    }
    step
}

#[test]
fn whichever_step_fails_nothing_is_left_behind() {
    in_netns(|lab| {
        let before = lab.traces();
        let whole = plan(&all_kinds(3)).unwrap().plan;
        for failing in 0..whole.steps.len() {
            let mut plan = whole.clone();
            plan.steps[failing] = broken(&plan.steps[failing]);
            let error = lab.apply(&plan).unwrap_err();
            // Not merely "it failed": it failed where we made it fail.
            assert_eq!(error.to_string(), format!("creating {}", plan.steps[failing]));
            assert_eq!(lab.traces(), before, "after {}", error.report());
        }
    });
}

#[test]
fn a_crash_at_any_point_is_swept_by_the_next_job() {
    in_netns(|lab| {
        let before = lab.traces();
        for done in 0..=steps() {
            let plan = Plan { keeper: dead(), ..plan(&all_kinds(3)).unwrap().plan };
            let path = lab.dir.join("journal").join(format!("{}.json", plan.owner));
            write_atomically(&path, &serde_json::to_vec(&plan).unwrap(), 0o600).unwrap();
            for step in &plan.steps[..done] {
                lab.run(step.apply(&lab.host)).unwrap();
            }
            assert_eq!(lab.sweep(), [plan.owner]);
            assert_eq!(lab.traces(), before, "after {done} steps");
        }
    });
}

#[test]
fn a_crash_while_taps_are_made_leaves_none_without_an_owner() {
    in_netns(|lab| {
        let before = lab.traces();
        let tap = pavo::host::tap::Tap::create("ptl3-0", 0, false).unwrap().unwrap();
        assert_ne!(lab.traces(), before);
        // What a killed process does: its descriptors are closed.
        drop(tap);
        eventually(|| (lab.traces() == before).then_some(()));
    });
}

#[test]
fn a_sweep_leaves_the_living_and_the_foreign_alone() {
    in_netns(|lab| {
        // Names that ours are a part of, or that are a part of ours.
        sh(
            None,
            "ip link add pbl3-00 type bridge; ip link add pbl33-0 type bridge
             ip link add ptl3-9 type bridge; nft add table bridge pavo_l33
             nft add table inet pavo_l; nft add table ip6 pavo_l3",
        );
        std::fs::write(lab.dir.join("journal/notes.json"), "not a plan of ours").unwrap();
        let foreign = lab.traces();
        let living = plan(&all_kinds(4)).unwrap().plan;
        lab.apply(&living).unwrap();
        let before = lab.traces();
        let gone = Plan { keeper: dead(), ..plan(&all_kinds(3)).unwrap().plan };
        lab.apply(&gone).unwrap();

        assert_eq!(lab.sweep(), [Owner::local(3)]);
        assert_eq!(lab.traces(), before);
        assert_eq!(
            lab.run(async { lab.journal.owners() }).unwrap(),
            BTreeSet::from([living.owner])
        );
        assert_eq!(lab.sweep(), []);
        lab.undo(living.owner).unwrap();
        assert_eq!(lab.traces(), foreign);
    });
}

#[test]
fn a_link_of_somebody_else_is_neither_taken_nor_deleted() {
    let names = ["pbl3-0", "ptl3-0", "pgl3-0", "pvl3-0", "pxl3-0"];
    in_netns(move |lab| {
        for name in names {
            sh(None, &format!("ip link add {name} type bridge"));
            let before = lab.traces();
            let plan = plan(&all_kinds(3)).unwrap().plan;
            let report = lab.apply(&plan).unwrap_err().report();
            assert!(
                report.contains(&format!("`{name}` exists and is not of this job")),
                "{report}"
            );
            assert_eq!(lab.traces(), before);
            sh(None, &format!("ip link del {name}"));
        }
    });
}

#[test]
fn a_changed_plan_takes_the_place_of_the_old() {
    in_netns(|lab| {
        let before = lab.traces();
        let large = plan(&request(3, 4, &[("net", Ethernet::default())])).unwrap().plan;
        let small = plan(&request(3, 1, &[("net", Ethernet::default())])).unwrap().plan;
        lab.apply(&large).unwrap();
        lab.apply(&small).unwrap();
        assert!(!lab.traces().contains("link ptl3-3"));
        lab.undo(small.owner).unwrap();
        assert_eq!(lab.traces(), before);
    });
}

#[test]
fn set_ups_on_one_host_wait_for_each_other() {
    in_netns(|lab| {
        let plans: Vec<Plan> = (1..4)
            .map(|job| plan(&request(job, 2, &[("net", Ethernet::default())])).unwrap().plan)
            .collect();
        let before = lab.traces();
        let all = plans.iter().map(|plan| lab.journal.apply(plan, &lab.host));
        lab.run(futures_util::future::try_join_all(all)).unwrap();
        assert_eq!(lab.run(async { lab.journal.owners() }).unwrap().len(), 3);
        let all = plans.iter().map(|plan| lab.journal.undo(plan.owner, &lab.host));
        lab.run(futures_util::future::try_join_all(all)).unwrap();
        assert_eq!(lab.traces(), before);
    });
}

#[test]
fn many_taps_are_removed_by_their_group() {
    in_netns(|lab: &Lab| {
        let before = lab.traces();
        let plan = plan(&request(3, 64, &[("net", Ethernet::default())])).unwrap().plan;
        lab.apply(&plan).unwrap();
        let details = sh(None, "ip -d -o link show group 0x60000003 type tun");
        assert_eq!(details.lines().count(), 64);
        let all = details.lines().all(|line| {
            line.contains("mtu 1500")
                && line.contains("master pbl3-0")
                && line.contains("persist on")
                && line.contains("alias pavo: job l3, network net")
        });
        assert!(all, "{details}");
        // The last step alone is the removal of all links.
        let last = plan.steps.last().unwrap();
        assert!(matches!(last, Step::Taps { names, .. } if names.len() == 64));
        lab.run(last.undo(&lab.host)).unwrap();
        assert_eq!(sh(None, "ip -o link show group 0x60000003"), "");
        lab.undo(plan.owner).unwrap();
        assert_eq!(lab.traces(), before);
    });
}

/// What belongs to the host: a setting that is put back, folders, a bridge.
fn of_the_host(lab: &Lab, before: &str) -> Plan {
    let path = lab.dir.join("names");
    let key = "net/ipv4/ip_forward".into();
    let bridge = |name: &str| Step::Bridge {
        name: name.into(),
        mtu: 1500,
        group: Owner::NODE.link_group(),
        alias: "pavo: this host".into(),
        mac: None,
    };
    let steps = vec![
        Step::Folder { path: path.clone(), mode: 0o711 },
        Step::SharedFolder { path },
        Step::Sysctl { namespace: None, key, value: "1".into(), before: Some(before.into()) },
        bridge("nat_xbr"),
    ];
    Plan { owner: Owner::NODE, keeper: pavo::host::process::current(), steps }
}

fn forwards() -> String {
    sysctl("net/ipv4/ip_forward").unwrap()
}

fn mounts() -> String {
    std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
}

#[test]
fn what_belongs_to_the_host_is_put_back_and_jobs_leave_it_alone() {
    in_netns(|lab| {
        let (before, mounted) = (lab.traces(), mounts());
        assert_eq!(forwards(), "0");
        let node = of_the_host(lab, "0");
        for step in &node.steps {
            assert_eq!(lab.run(step.apply(&lab.host)).unwrap(), Outcome::Changed, "{step}");
            assert_eq!(lab.run(step.apply(&lab.host)).unwrap(), Outcome::AlreadySo, "{step}");
        }
        for step in node.steps.iter().rev() {
            assert_eq!(lab.run(step.undo(&lab.host)).unwrap(), Outcome::Changed, "{step}");
            assert_eq!(lab.run(step.undo(&lab.host)).unwrap(), Outcome::AlreadySo, "{step}");
        }
        assert_eq!((lab.traces(), mounts(), forwards()), (before.clone(), mounted, "0".into()));

        lab.apply(&node).unwrap();
        let with_node = lab.traces();
        let job = plan(&all_kinds(3)).unwrap().plan;
        lab.apply(&job).unwrap();
        lab.undo(job.owner).unwrap();
        assert_eq!(lab.traces(), with_node);
        assert_eq!(forwards(), "1");
        lab.undo(Owner::NODE).unwrap();
        assert_eq!((lab.traces(), forwards()), (before, "0".into()));
    });
}

#[test]
fn a_mount_that_lies_hidden_is_none() {
    in_netns(|lab| {
        let (outer, dir) = (lab.dir.join("run"), lab.dir.join("run/netns"));
        std::fs::create_dir_all(&dir).unwrap();
        let is_mounted = || netns::is_mount_point(&dir).unwrap();
        assert!(!is_mounted());
        netns::share_folder(&dir).unwrap();
        assert!(is_mounted());
        sh(None, &format!("mount -t tmpfs none {0}; mkdir {0}/netns", outer.display()));
        assert!(!is_mounted());
        sh(None, &format!("umount {}", outer.display()));
        netns::unshare_folder(&dir).unwrap();
        assert!(!is_mounted());
    });
}

#[test]
fn what_others_changed_or_use_is_not_put_back() {
    in_netns(|lab| {
        let node = of_the_host(lab, "0");
        lab.apply(&node).unwrap();
        sh(None, "echo 0 > /proc/sys/net/ipv4/ip_forward");
        std::fs::write(lab.dir.join("names/somebodys"), "").unwrap();
        lab.undo(Owner::NODE).unwrap();
        assert_eq!(forwards(), "0");
        assert!(lab.dir.join("names/somebodys").exists());
        // A setting that was on before is left on.
        lab.apply(&of_the_host(lab, "1")).unwrap();
        lab.undo(Owner::NODE).unwrap();
        assert_eq!(forwards(), "1");
    });
}

#[test]
fn a_new_plan_of_the_host_leaves_what_both_have_as_it_is() {
    in_netns(|lab| {
        let before = lab.traces();
        let old = of_the_host(lab, "0");
        lab.run(lab.journal.update(&old, &lab.host)).unwrap();
        // It would be lost if the bridge were made again.
        sh(None, "ip addr add 198.51.100.1/24 dev nat_xbr");
        let mut new = old.clone();
        let Step::Bridge { name, .. } = new.steps.last_mut().unwrap() else { panic!() };
        *name = "other_xbr".into();
        new.steps.insert(3, old.steps[3].clone());
        lab.run(lab.journal.update(&new, &lab.host)).unwrap();
        assert!(sh(None, "ip -4 addr show nat_xbr").contains("198.51.100.1"));
        assert!(lab.traces().contains("link other_xbr"));
        let mut without = new.clone();
        without.steps.remove(3);
        lab.run(lab.journal.update(&without, &lab.host)).unwrap();
        assert!(!lab.traces().contains("link nat_xbr"));
        assert_eq!(forwards(), "1");
        lab.undo(Owner::NODE).unwrap();
        assert_eq!((lab.traces(), forwards()), (before, "0".into()));
    });
}
