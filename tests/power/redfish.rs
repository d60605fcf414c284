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
