//! Power status of a thousand simulated BMCs that take 50 ms for each answer, one in a hundred
//! dead; and what a node costs the processor, beside `ipmitool` where it is installed.
//!
//! `cargo bench --bench power`
#![expect(clippy::print_stdout, reason = "a bench prints its table")]
#![expect(clippy::print_stderr, reason = "it says aloud that it cannot run")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::stream::pending;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use pavo::node::power::action::{Action, Patience};
use pavo::node::power::fanout::{Outcome, Plan, run};
use pavo::node::power::ipmi::{Settings, Suite, SuiteChoice};
use pavo::node::power::{Bmc, Control, Hub};
use pavo_fakes::{Bmcs, Manner, PASSWORD, USER};

const COUNT: u32 = 1000;
const DEAD: u32 = 100;
const DELAY: Duration = Duration::from_millis(50);
const LIMIT: Duration = Duration::from_secs(2);
const TRIES: u32 = 2;
/// How often `ipmitool` runs.
const RUNS: u32 = 40;

fn main() {
    let bmcs = Bmcs::start(10_000, DELAY, 0).expect("a simulator");
    for index in (0..10_000).step_by(DEAD as usize) {
        bmcs.with(index, |bmc| bmc.manner = Manner::Dead);
    }
    println!("{:<34} {:>10} {:>10} {:>12}", "power status", "living", "all", "CPU/node");
    let ours = [COUNT, 10_000].map(|count| {
        [Suite::Three, Suite::Seventeen].map(|suite| {
            let [living, all, cpu] = status(&bmcs, count, suite);
            let what = format!("{count} nodes, suite {}", suite.number());
            let per_node = cpu / count;
            println!("{what:<34} {living:>10.3?} {all:>10.3?} {per_node:>12.1?}");
            if count == COUNT {
                let most = LIMIT * TRIES + Duration::from_millis(500);
                for (who, took, most) in
                    [("the living", living, Duration::from_secs(1)), ("all", all, most)]
                {
                    let verdict = if took <= most { "ok" } else { "MISSED" };
                    println!("  {who}: ≤ {most:.1?}: {verdict}");
                }
            }
            per_node
        })
    });
    let ours = ours[0][0];
    match ipmitool(&bmcs) {
        Some(peer) => {
            let ratio = ours.as_secs_f64() / peer.as_secs_f64();
            println!("{:<34} {:>10} {:>10} {peer:>12.1?}", "ipmitool, suite 3", "", "");
            println!("ratio 1/{:.0} (1/50 at most)", 1.0 / ratio);
            assert!(ratio <= 1.0 / 50.0, "too much of the processor");
        }
        None => eprintln!("skipped: ipmitool is not installed"),
    }
}

/// When the last of the living had answered, when all were done, and our time on the processor.
fn status(bmcs: &Bmcs, count: u32, suite: Suite) -> [Duration; 3] {
    let of = |index| {
        let address = Bmcs::address(index).to_string();
        let usual = Settings::new(address, USER, PASSWORD.to_owned().into());
        let suite = SuiteChoice::Only(suite);
        let control = Control::Ipmi(Settings { port: bmcs.port(), suite, ..usual });
        Bmc { node: format!("n{index}"), control }
    };
    let nodes: Vec<Bmc> = (0..count).map(of).collect();
    let patience = Patience { answer: LIMIT, tries: TRIES, ..Patience::default() };
    let plan = Plan { patience, ..Plan::new(Action::Status) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut living, before, begun) =
        (Duration::ZERO, used(UsageWho::RUSAGE_THREAD), Instant::now());
    let report = runtime.block_on(run(&nodes, &plan, &Hub::default(), pending(), &mut |_, it| {
        if matches!(it, Outcome::Done(_)) {
            living = begun.elapsed();
        }
    }));
    assert_eq!(report.successes(), (count - count / DEAD) as usize, "the living answer");
    [living, report.took, used(UsageWho::RUSAGE_THREAD) - before]
}

/// Time on the processor.
fn used(whose: UsageWho) -> Duration {
    let usage = getrusage(whose).expect("our own usage");
    let micros = |time: TimeVal| Duration::from_micros(time.num_microseconds() as u64);
    micros(usage.user_time()) + micros(usage.system_time())
}

/// What a run of it costs.
fn ipmitool(bmcs: &Bmcs) -> Option<Duration> {
    let before = used(UsageWho::RUSAGE_CHILDREN);
    for index in 1..=RUNS {
        let status = Command::new("ipmitool")
            .args(["-I", "lanplus", "-C", "3", "-H", &Bmcs::address(index).to_string()])
            .args(["-p", &bmcs.port().to_string(), "-U", USER, "-P", PASSWORD])
            .args(["power", "status"])
            .stdout(Stdio::null())
            .status()
            .ok()?;
        assert!(status.success(), "ipmitool is answered");
    }
    Some((used(UsageWho::RUSAGE_CHILDREN) - before) / RUNS)
}
