//! Redfish with controllers that are not who they should be, or not well.

use std::time::Duration;

use pavo::node::power::action::Action;
use pavo::node::power::redfish::{Settings, Trust};
use pavo::node::power::{Bmc, Control};
use pavo_fakes::{Bmcs, Manner, PASSWORD, Redfish, Tls, USER};

use crate::{done, fails, impatient, plan};

pub fn at(redfish: &Redfish, index: u32, trust: Trust) -> Settings {
    let address = Bmcs::address(index).to_string();
    let usual = Settings::new(address, USER, PASSWORD.to_owned().into());
    Settings { port: redfish.port(), trust, ..usual }
}

fn bmc(settings: Settings) -> Bmc {
    Bmc { node: "n".into(), control: Control::Redfish(settings) }
}

#[test]
fn only_who_is_believed_gets_the_password() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let (one, other) = (bmcs.redfish(Tls::Own).unwrap(), bmcs.redfish(Tls::Own).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let [own, others] = [("own", &one), ("others", &other)].map(|(name, of)| {
        let file = dir.path().join(name);
        std::fs::write(&file, of.pem()).unwrap();
        Trust::Ca(file)
    });
    let hash = |of: &Redfish| {
        use sha2::Digest;
        let hash = sha2::Sha256::digest(of.certificate());
        let hash: Vec<String> = hash.iter().map(|byte| format!("{byte:02X}")).collect();
        Trust::Certificate(hash.join(":").parse().unwrap())
    };
    for trust in [own, hash(&one), Trust::Anybody] {
        done(&bmc(at(&one, 0, trust)), Action::Status);
    }
    let asked = bmcs.with(0, |bmc| bmc.packets);
    for trust in [others, hash(&other), Trust::System] {
        let why = fails(&bmc(at(&one, 0, trust)), &plan(Action::Status));
        assert!(why.contains("agreeing on TLS") && why.contains("help: say whom"), "{why}");
    }
    // A file without certificates is none to trust; a machine without any says so as well.
    let empty = Trust::Ca(dir.path().join("none"));
    std::fs::write(dir.path().join("none"), "").unwrap();
    let why = fails(&bmc(at(&one, 0, empty)), &plan(Action::Status));
    assert!(why.contains("no certificate of an authority"), "{why}");
    assert_eq!(bmcs.with(0, |bmc| bmc.packets), asked, "the password went to another");
}

#[test]
fn what_makes_no_sense_is_an_error_in_time() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let redfish = bmcs.redfish(Tls::None).unwrap();
    for (manner, words) in [
        (Manner::Truncated, "breaks off"),
        (Manner::Noise, "too long"),
        (Manner::WrongSession, "the controller has no systems"),
        (Manner::Busy, "it is busy (status 503): later"),
        (Manner::Dead, "no answer within 1.5 s"),
    ] {
        bmcs.with(0, |bmc| bmc.manner = manner);
        let node = bmc(at(&redfish, 0, Trust::Plain));
        let why = fails(&node, &impatient(Action::On));
        assert!(why.contains(words), "{manner:?}: {why}");
    }
    assert!(bmcs.with(0, |bmc| bmc.changes.is_empty()));
}

#[test]
fn what_is_not_answered_is_done_once() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let redfish = bmcs.redfish(Tls::None).unwrap();
    let node = bmc(at(&redfish, 0, Trust::Plain));
    bmcs.with(0, |bmc| (bmc.on, bmc.manner) = (true, Manner::Unconfirmed));
    let mut many = plan(Action::Reset);
    many.patience.tries = 4;
    let why = fails(&node, &many);
    assert!(why.contains("whether it was done is not known"), "{why}");
    assert_eq!(bmcs.with(0, |bmc| std::mem::take(&mut bmc.changes)), [3]);
    // What comes of the button is seen all the same.
    many.action = Action::Soft;
    let went = crate::text(&crate::one(&node, &many));
    assert!(went.starts_with("off (after "), "{went}");
    assert_eq!(bmcs.with(0, |bmc| std::mem::take(&mut bmc.changes)), [5]);
    // A second press would switch it off again.
    bmcs.with(0, |bmc| bmc.resets = vec!["PushPowerButton"]);
    many.action = Action::On;
    fails(&node, &many);
    assert_eq!(bmcs.with(0, |bmc| std::mem::take(&mut bmc.changes)), [1]);
    // Done a second time this does no more.
    bmcs.with(0, |bmc| {
        bmc.resets = vec!["ForceOff"];
        bmc.on = true;
    });
    many.action = Action::Off;
    assert_eq!(crate::text(&crate::one(&node, &many)), "off");
}

#[test]
fn one_that_is_going_off_is_switched_on_once_it_is() {
    let bmcs = std::sync::Arc::new(Bmcs::start(1, Duration::ZERO, 0).unwrap());
    let redfish = bmcs.redfish(Tls::None).unwrap();
    let node = bmc(at(&redfish, 0, Trust::Plain));
    bmcs.with(0, |bmc| bmc.said_state = Some("PoweringOff"));
    let why = fails(&node, &impatient(Action::On));
    assert!(why.contains("it is going off"), "{why}");
    assert!(bmcs.with(0, |bmc| bmc.changes.is_empty()));
    let later = bmcs.clone();
    let thread = std::thread::spawn(move || {
        let asked = |bmc: &mut pavo_fakes::Bmc| bmc.packets;
        let before = later.with(0, asked);
        while later.with(0, asked) < before + 3 {
            std::thread::sleep(Duration::from_millis(10));
        }
        later.with(0, |bmc| bmc.said_state = None);
    });
    done(&node, Action::On);
    thread.join().unwrap();
    assert!(bmcs.with(0, |bmc| bmc.on && bmc.changes == [1]));
    // Neither is what has power and does not run on.
    bmcs.with(0, |bmc| (bmc.on, bmc.said_state) = (false, Some("Paused")));
    done(&node, Action::On);
    assert!(bmcs.with(0, |bmc| bmc.changes == [1, 1]));
}

#[test]
fn the_button_is_not_pressed_blindly() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let redfish = bmcs.redfish(Tls::None).unwrap();
    let node = bmc(at(&redfish, 0, Trust::Plain));
    bmcs.with(0, |bmc| {
        (bmc.on, bmc.said_state, bmc.resets) = (true, Some(""), vec!["PushPowerButton"]);
    });
    let why = fails(&node, &plan(Action::On));
    assert!(why.contains("the controller offers no On or ForceOn"), "{why}");
    assert!(bmcs.with(0, |bmc| bmc.on && bmc.changes.is_empty()));
}

#[test]
fn all_pages_of_systems_are_read() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let redfish = bmcs.redfish(Tls::None).unwrap();
    bmcs.with(0, |bmc| bmc.pages = 3);
    done(&bmc(at(&redfish, 0, Trust::Plain)), Action::Status);
    bmcs.with(0, |bmc| bmc.pages = 1_000_000);
    let why = fails(&bmc(at(&redfish, 0, Trust::Plain)), &plan(Action::Status));
    assert!(why.contains("more than 100 pages"), "{why}");
}

/// Takes connections, and ends each before it says anything; how many.
fn hangs_up() -> (u16, std::sync::Arc<std::sync::atomic::AtomicU32>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let counted = count.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream);
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    });
    (port, count)
}

#[test]
fn who_hangs_up_in_the_middle_of_tls_is_asked_again() {
    let (port, count) = hangs_up();
    let usual = Settings::new("127.0.0.1", USER, PASSWORD.to_owned().into());
    let node = bmc(Settings { port, trust: Trust::Anybody, ..usual });
    let mut many = plan(Action::Status);
    many.patience.tries = 3;
    let why = fails(&node, &many);
    assert!(why.contains("given up after 3 tries") && why.contains("agreeing on TLS"), "{why}");
    assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), 3);
}

#[test]
fn a_system_that_is_not_there_is_told_with_those_that_are() {
    let bmcs = Bmcs::start(1, Duration::ZERO, 0).unwrap();
    let redfish = bmcs.redfish(Tls::None).unwrap();
    let of = |id: &str| {
        let settings = at(&redfish, 0, Trust::Plain);
        bmc(Settings { system: Some(id.to_owned()), ..settings })
    };
    done(&of("1"), Action::Status);
    let why = fails(&of("2"), &plan(Action::Status));
    assert!(why.contains("there is no system `2`") && why.contains("one of 1"), "{why}");
}
