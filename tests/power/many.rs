//! Many nodes at once.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::{once, pending};
use pavo::node::power::action::Action;
use pavo::node::power::fanout::{Checked, FailLimit, Guard, Outcome, Plan, Stop, Window, run};
use pavo::node::power::ipmi::Settings;
use pavo::node::power::{Bmc, Control, Hub};
use pavo_fakes::{Bmcs, Manner};

use crate::{all, block_on, impatient, plan, settings, text};

fn cluster(bmcs: &Bmcs, count: u32) -> Vec<Bmc> {
    let of =
        |index| Bmc { node: format!("n{index}"), control: Control::Ipmi(settings(bmcs, index)) };
    (0..count).map(of).collect()
}

#[test]
fn thousands_are_each_told_for_itself() {
    // As many as a test has time for; the bench has ten thousand.
    const COUNT: u32 = 2000;
    let bmcs = Bmcs::start(COUNT, Duration::ZERO, 0).unwrap();
    for index in (0..COUNT).step_by(3) {
        bmcs.with(index, |bmc| bmc.on = true);
    }
    let report = all(&cluster(&bmcs, COUNT), &plan(Action::Status));
    assert_eq!((report.successes(), report.stop), (COUNT as usize, None));
    for (index, outcome) in report.outcomes.iter().enumerate() {
        assert_eq!(text(outcome), if index % 3 == 0 { "on" } else { "off" }, "{index}");
    }
}

#[test]
fn the_dead_keep_nobody_waiting() {
    let bmcs = Bmcs::start(400, Duration::ZERO, 0).unwrap();
    // More of them than places.
    for index in 0..100 {
        bmcs.with(index, |bmc| bmc.manner = Manner::Dead);
    }
    let mut plan = plan(Action::Status);
    (plan.at_once, plan.patience.answer) = (64, Duration::from_secs(15));
    let nodes = cluster(&bmcs, 400);
    let (begun, mut living) = (Instant::now(), Vec::new());
    let stop = async {
        // Long before the dead are given up.
        tokio::time::sleep(Duration::from_secs(10)).await;
    };
    block_on(run(&nodes, &plan, &Hub::default(), once(stop), &mut |bmc, outcome| {
        if matches!(outcome, Outcome::Done(_)) {
            living.push((bmc.node.clone(), begun.elapsed()));
        }
    }));
    assert_eq!(living.len(), 300);
    let last = living.iter().map(|(_, at)| *at).max().unwrap();
    assert!(last < Duration::from_secs(10), "{last:?}");
}

#[test]
fn all_end_in_time_times_tries() {
    let bmcs = Bmcs::start(3, Duration::ZERO, 0).unwrap();
    bmcs.with(1, |bmc| bmc.manner = Manner::Dead);
    let mut plan = impatient(Action::Status);
    plan.patience.tries = 2;
    let report = all(&cluster(&bmcs, 3), &plan);
    assert_eq!(report.successes(), 2);
    let why = text(&report.outcomes[1]);
    assert!(why.contains("given up after 2 tries\n  because: no answer of 127.16.0.2:"), "{why}");
    assert!(report.took >= Duration::from_secs(3), "{:?}", report.took);
    assert!(report.took < Duration::from_secs(20), "{:?}", report.took);
}

#[test]
fn after_too_many_failures_no_other_is_started() {
    let bmcs = Bmcs::start(100, Duration::ZERO, 0).unwrap();
    let mut nodes = cluster(&bmcs, 100);
    for bmc in &mut nodes {
        let Control::Ipmi(it) = &mut bmc.control else { unreachable!() };
        *it = Settings { password: "wrong".to_owned().into(), ..it.clone() };
    }
    for (limit, most) in [("3", 4), ("10%", 11), ("0", 1)] {
        let limit: FailLimit = limit.parse().unwrap();
        let plan = Plan { at_once: 1, fail_limit: Some(limit), ..plan(Action::On) };
        let report = all(&nodes, &plan);
        assert_eq!(report.stop, Some(Stop::TooManyFailed));
        let started = |it: &&Outcome| !matches!(it, Outcome::NotStarted);
        assert_eq!(report.outcomes.iter().filter(started).count(), most);
    }
    let plan = Plan { fail_limit: Some(FailLimit::Percent(100)), ..plan(Action::On) };
    let report = all(&nodes, &plan);
    assert_eq!((report.successes(), report.stop), (0, None));
    for wrong in ["", "-1", "101%", "x", "5 %"] {
        assert!(wrong.parse::<FailLimit>().is_err(), "{wrong}");
    }
}

#[test]
fn only_so_many_start_in_each_window() {
    let bmcs = Bmcs::start(25, Duration::ZERO, 0).unwrap();
    let interval = Duration::from_millis(1000);
    let window = Some(Window { size: 10, interval });
    let mut on = Vec::new();
    let plan = Plan { window, ..plan(Action::On) };
    let nodes = cluster(&bmcs, 25);
    let begun = Instant::now();
    let tell = &mut |_: &Bmc, _: &Outcome| {
        on.push((0..25).filter(|index| bmcs.with(*index, |bmc| bmc.on)).count());
    };
    let report = block_on(run(&nodes, &plan, &Hub::default(), pending(), tell));
    assert_eq!(report.successes(), 25);
    assert!(begun.elapsed() >= 2 * interval, "{:?}", begun.elapsed());
    // When the tenth was done no eleventh was on, unless the machine slept between the two.
    assert!(on[..9].iter().all(|count| *count <= 20), "{on:?}");
}

#[test]
fn an_interrupt_leaves_no_machine_off_that_was_to_be_on_again() {
    let bmcs = Bmcs::start(1, Duration::from_millis(300), 0).unwrap();
    bmcs.with(0, |bmc| bmc.on = true);
    let mut plan = plan(Action::Cycle);
    // Less than the whole takes.
    plan.patience.answer = Duration::from_secs(10);
    plan.patience.look = Duration::from_secs(11);
    let nodes = cluster(&bmcs, 1);
    let stop = async {
        while bmcs.with(0, |bmc| bmc.on) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // It has not been seen off: that takes until the next look.
        bmcs.with(0, |bmc| bmc.manner = Manner::Busy);
        tokio::time::sleep(Duration::from_secs(1)).await;
        bmcs.with(0, |bmc| bmc.manner = Manner::Honest);
    };
    let report = block_on(run(&nodes, &plan, &Hub::default(), once(stop), &mut |_, _| {}));
    assert_eq!(report.stop, Some(Stop::Interrupted));
    assert_eq!(report.successes(), 1, "{}", text(&report.outcomes[0]));
    assert!(bmcs.with(0, |bmc| bmc.on), "it is left off");
}

#[test]
fn a_second_interrupt_is_the_end_at_once() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    bmcs.with(0, |bmc| (bmc.on, bmc.shuts_down) = (true, None));
    // It would be waited for an hour.
    let mut plan = plan(Action::Soft);
    plan.patience.answer = Duration::from_secs(3600);
    plan.patience.settle = Duration::from_secs(3600);
    let nodes = cluster(&bmcs, 1);
    let pressed = async {
        while bmcs.with(0, |bmc| bmc.changes.is_empty()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let stop = once(pressed).chain(once(std::future::ready(())));
    let report = block_on(run(&nodes, &plan, &Hub::default(), stop, &mut |_, _| {}));
    assert_eq!(report.stop, Some(Stop::Interrupted));
    assert!(text(&report.outcomes[0]).contains("is not known"), "{}", text(&report.outcomes[0]));
}

#[test]
fn a_machine_that_is_left_off_is_said() {
    // Time for a change between the two.
    let bmcs = Bmcs::start(1, Duration::from_millis(200), 0).unwrap();
    bmcs.with(0, |bmc| bmc.on = true);
    let (plan, nodes) = (plan(Action::Cycle), cluster(&bmcs, 1));
    let report = std::thread::scope(|scope| {
        let all = scope.spawn(|| all(&nodes, &plan));
        while bmcs.with(0, |bmc| bmc.on) {
            std::thread::sleep(Duration::from_millis(1));
        }
        bmcs.with(0, |bmc| bmc.manner = Manner::NoChange);
        all.join().unwrap()
    });
    let why = text(&report.outcomes[0]);
    assert!(why.contains("it is off, and was not switched on again\n  because: "), "{why}");
}

#[derive(Debug)]
struct Only(&'static str);

impl Guard for Only {
    fn check<'a>(&'a self, node: &'a str) -> Checked<'a> {
        Box::pin(async move {
            match node == self.0 {
                true => Ok(()),
                false => Err(pavo::error::Error::system("hands off")),
            }
        })
    }
}

#[test]
fn who_is_guarded_is_not_even_asked() {
    let bmcs = Bmcs::start(2, Duration::ZERO, 0).unwrap();
    let guard: std::sync::Arc<dyn Guard> = std::sync::Arc::new(Only("n1"));
    let plan = Plan { guard: Some(guard), ..plan(Action::On) };
    let report = all(&cluster(&bmcs, 2), &plan);
    assert_eq!(text(&report.outcomes[0]), "error: hands off");
    assert_eq!(text(&report.outcomes[1]), "on");
    assert_eq!(bmcs.with(0, |bmc| bmc.packets), 0);
}

#[test]
fn who_failed_before_counts() {
    let bmcs = Bmcs::start(10, Duration::ZERO, 0).unwrap();
    let of = |limit: &str, failed_before| {
        let fail_limit = Some(limit.parse().unwrap());
        let plan = Plan { fail_limit, failed_before, ..plan(Action::Status) };
        let report = all(&cluster(&bmcs, 10), &plan);
        (report.successes(), report.stop)
    };
    assert_eq!(of("0", 1), (0, Some(Stop::TooManyFailed)));
    assert_eq!(of("1", 1), (10, None));
    // A share of all.
    assert_eq!(of("50%", 10), (10, None));
    assert_eq!(of("49%", 10), (0, Some(Stop::TooManyFailed)));
}

#[test]
fn an_interrupt_tells_done_failed_and_not_started_apart() {
    let bmcs = Bmcs::start(30, Duration::ZERO, 0).unwrap();
    for index in 10..20 {
        bmcs.with(index, |bmc| bmc.manner = Manner::Mute);
    }
    let mut plan = plan(Action::On);
    (plan.at_once, plan.patience.answer) = (2, Duration::from_secs(3));
    plan.patience.tries = 100;
    let nodes = cluster(&bmcs, 30);
    let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
    let (mut sender, mut told) = (Some(sender), 0);
    let tell = &mut |_: &Bmc, _: &Outcome| {
        told += 1;
        if told == 10 {
            drop(sender.take());
        }
    };
    let stop = async {
        let _ = receiver.await;
        // Until some of the mute have been started.
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    let report = block_on(run(&nodes, &plan, &Hub::default(), once(stop), tell));
    assert_eq!(report.stop, Some(Stop::Interrupted));
    assert_eq!(report.successes(), 10);
    let unknown = text(&report.outcomes[10]);
    assert!(unknown.contains("interrupted: whether it was done is not known"), "{unknown}");
    assert_eq!(text(&report.outcomes[29]), "not started");
    assert_eq!(bmcs.with(29, |bmc| bmc.packets), 0);
    let started = |it: &&Outcome| !matches!(it, Outcome::NotStarted);
    assert_eq!(report.outcomes.iter().filter(started).count(), told);
}
