//! Power and boot device against controllers: simulated ones by the thousand, and real programs
//! where they are installed.

mod commands;
mod contract;
mod ipmi;
mod many;
mod redfish;
mod virsh;

use std::time::Duration;

use futures_util::stream::pending;
use pavo::node::power::action::{Action, Done, Patience};
use pavo::node::power::fanout::{Outcome, Plan, Report, run};
use pavo::node::power::ipmi::Settings;
use pavo::node::power::{Bmc, Control, Hub};
use pavo_fakes::{Bmcs, PASSWORD, USER};

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

/// A plan whose times suit a busy machine.
pub fn plan(action: Action) -> Plan {
    let patience = Patience {
        answer: Duration::from_secs(30),
        tries: 1,
        settle: Duration::from_secs(60),
        look: Duration::from_millis(20),
    };
    Plan { patience, ..Plan::new(action) }
}

/// The same for those that will not answer.
pub fn impatient(action: Action) -> Plan {
    let mut plan = plan(action);
    plan.patience.answer = Duration::from_millis(1500);
    plan
}

pub fn all(bmcs: &[Bmc], plan: &Plan) -> Report {
    block_on(async { run(bmcs, plan, &Hub::default(), pending(), &mut |_, _| {}).await })
}

/// What comes of it, as text: the result, or the report of the error.
pub fn text(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Done(done) => done.to_string(),
        Outcome::Failed(error) => error.report(),
        Outcome::NotStarted => "not started".into(),
    }
}

pub fn one(bmc: &Bmc, plan: &Plan) -> Outcome {
    all(std::slice::from_ref(bmc), plan).outcomes.remove(0)
}

pub fn done(bmc: &Bmc, action: Action) -> Done {
    match one(bmc, &plan(action)) {
        Outcome::Done(done) => done,
        other => panic!("{action:?}: {}", text(&other)),
    }
}

/// Why it fails.
pub fn fails(bmc: &Bmc, plan: &Plan) -> String {
    match one(bmc, plan) {
        Outcome::Failed(error) => error.report(),
        other => panic!("{:?}: {}", plan.action, text(&other)),
    }
}

/// Where one of the simulator is.
pub fn settings(bmcs: &Bmcs, index: u32) -> Settings {
    let address = Bmcs::address(index).to_string();
    Settings { port: bmcs.port(), ..Settings::new(address, USER, PASSWORD.to_owned().into()) }
}

pub fn ipmi(settings: Settings) -> Bmc {
    Bmc { node: "n".into(), control: Control::Ipmi(settings) }
}
