//! IPMI with controllers that are odd, broken or hostile.

use std::time::Duration;

use pavo::node::power::Power;
use pavo::node::power::action::{Action, Done};
use pavo::node::power::ipmi::{Privilege, Settings, Suite, SuiteChoice};
use pavo_fakes::{Bmcs, Manner, Suites};

use crate::{done, fails, impatient, ipmi, plan, settings};

fn with(manner: Manner) -> Bmcs {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    bmcs.with(0, |bmc| bmc.manner = manner);
    bmcs
}

/// Why a status fails.
fn why(manner: Manner) -> String {
    let bmcs = with(manner);
    fails(&ipmi(settings(&bmcs, 0)), &impatient(Action::Status))
}

#[test]
fn who_says_everything_twice_or_much_nonsense_is_understood() {
    for manner in [Manner::Twice, Manner::Noise] {
        let bmcs = with(manner);
        let bmc = ipmi(settings(&bmcs, 0));
        done(&bmc, Action::On);
        assert_eq!(done(&bmc, Action::Status), Done::Power(Power::On), "{manner:?}");
        assert_eq!(bmcs.with(0, |bmc| bmc.changes.clone()), [1], "{manner:?}");
    }
}

#[test]
fn what_is_lost_is_said_again() {
    let bmcs = with(Manner::Deaf(2));
    let bmc = ipmi(settings(&bmcs, 0));
    done(&bmc, Action::On);
    assert!(bmcs.with(0, |bmc| bmc.on && bmc.changes == [1]));
}

#[test]
fn what_is_not_answered_is_done_once() {
    let bmcs = with(Manner::Unconfirmed);
    bmcs.with(0, |bmc| bmc.on = true);
    let bmc = ipmi(settings(&bmcs, 0));
    let mut many = impatient(Action::Reset);
    many.patience.tries = 3;
    let why = fails(&bmc, &many);
    assert!(why.contains("whether it was done is not known"), "{why}");
    assert_eq!(bmcs.with(0, |bmc| std::mem::take(&mut bmc.changes)), [3]);
    // Off is off, however often it is said.
    many.action = Action::Off;
    fails(&bmc, &many);
    assert!(bmcs.with(0, |bmc| bmc.changes.len() > 3 && !bmc.on));
}

#[test]
fn who_answers_wrongly_is_as_good_as_dead() {
    for manner in [Manner::ForgedAnswers, Manner::WrongSession, Manner::Truncated, Manner::Mute] {
        let why = why(manner);
        assert!(why.contains("no answer of 127.16.0.1:") && why.contains("within 1.5 s"), "{why}");
    }
    let why = why(Manner::ForgedAnswers);
    assert!(why.contains("made no sense"), "{why}");
}

#[test]
fn who_does_not_know_the_password_learns_nothing_and_is_asked_once() {
    for (manner, words) in [
        (Manner::ForgedLogin, "whoever answers does not know it"),
        (Manner::ForgedKeys, "the controller's own key is another"),
    ] {
        let bmcs = with(manner);
        let mut plan = plan(Action::On);
        plan.patience.tries = 5;
        let why = fails(&ipmi(settings(&bmcs, 0)), &plan);
        assert!(why.contains(words) && !why.contains("tries"), "{why}");
        // Opening and RAKP 1; RAKP 3 has our proof, for who has shown his.
        let packets = if manner == Manner::ForgedLogin { 2 } else { 3 };
        assert_eq!(bmcs.with(0, |bmc| (bmc.packets, bmc.on)), (packets, false));
    }
}

#[test]
fn who_has_no_time_is_asked_again_and_then_left() {
    for (manner, words) in
        [(Manner::Busy, "the controller is busy"), (Manner::Full, "no room for another session")]
    {
        let bmcs = with(manner);
        let mut plan = plan(Action::Status);
        plan.patience.tries = 3;
        let why = fails(&ipmi(settings(&bmcs, 0)), &plan);
        assert!(why.contains(words) && why.contains("given up after 3 tries"), "{why}");
    }
}

#[test]
fn an_older_controller_is_asked_for_its_suite_unless_another_is_wanted() {
    let bmcs = with(Manner::Honest);
    bmcs.with(0, |bmc| bmc.suites = Suites::Three);
    done(&ipmi(settings(&bmcs, 0)), Action::Status);
    let suite = SuiteChoice::Only(Suite::Seventeen);
    let newer = ipmi(Settings { suite, ..settings(&bmcs, 0) });
    let why = fails(&newer, &plan(Action::Status));
    assert!(why.contains("it has no such cipher suite"), "{why}");
}

#[test]
fn a_controller_may_have_a_key_of_its_own() {
    let bmcs = with(Manner::Honest);
    bmcs.with(0, |bmc| bmc.key = Some("its own".into()));
    let why = fails(&ipmi(settings(&bmcs, 0)), &plan(Action::Status));
    assert!(why.contains("own key is another"), "{why}");
    let key = Some("its own".to_owned().into());
    done(&ipmi(Settings { key, ..settings(&bmcs, 0) }), Action::On);
    assert!(bmcs.with(0, |bmc| bmc.on));
}

#[test]
fn a_session_has_no_more_privilege_than_was_asked_for() {
    let bmcs = with(Manner::Honest);
    let user = ipmi(Settings { privilege: Privilege::User, ..settings(&bmcs, 0) });
    done(&user, Action::Status);
    let why = fails(&user, &plan(Action::On));
    assert!(why.contains("does not have this privilege"), "{why}");
    assert!(bmcs.with(0, |bmc| bmc.changes.is_empty()));
}

#[test]
fn no_session_stays_open_whatever_comes_between() {
    let bmcs = with(Manner::Honest);
    let bmc = ipmi(settings(&bmcs, 0));
    done(&bmc, Action::On);
    done(&bmc, Action::Status);
    // The command is heard and not answered: it is given up in the middle of the session.
    bmcs.with(0, |bmc| bmc.manner = Manner::Mute);
    fails(&bmc, &impatient(Action::Status));
    let given_up = std::time::Instant::now() + Duration::from_secs(20);
    while bmcs.with(0, |bmc| bmc.sessions) > 0 {
        assert!(std::time::Instant::now() < given_up, "a session is left");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_ipmi_cannot_say_is_refused_before_it_is_sent() {
    let bmcs = with(Manner::Honest);
    let long = "x".repeat(21);
    for (settings, words) in [
        (Settings { user: long.clone(), ..settings(&bmcs, 0) }, "user's name has 21 bytes"),
        (Settings { password: long.clone().into(), ..settings(&bmcs, 0) }, "password has 21 bytes"),
        (Settings { address: "no.such.invalid".into(), ..settings(&bmcs, 0) }, "no.such.invalid"),
    ] {
        let why = fails(&ipmi(settings), &plan(Action::Status));
        assert!(why.contains(words) && !why.contains(&long), "{why}");
    }
    assert_eq!(bmcs.with(0, |bmc| bmc.packets), 0);
}
