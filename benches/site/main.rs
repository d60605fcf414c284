//! A site's figures, on a lab: hosts in namespaces with a real Slurm, a real etcd with TLS
//! and log-ins, pavo and its plugin in their release builds.
//!
//! ```text
//! cargo bench --bench site                  all
//! cargo bench --bench site -- setup ids     some of: start setup plain ids scale
//! ```
//!
//! Every figure stands beside its peer or floor from the same run, and what the site's
//! page of the README promises. Needs root, and some minutes.

#[path = "../../tests/shared/tiny.rs"]
mod tiny;
#[path = "../../tests/slurm/world.rs"]
#[allow(dead_code, reason = "tests ask for more of a site")]
mod world;

mod ids;
mod null;
mod plain;
mod scale;
mod setup;
mod start;

use world::Site;

fn main() {
    null::be_it();
    if !nix::unistd::geteuid().is_root() {
        say("SKIPPED: this bench needs root");
        std::process::exit(i32::from(std::env::var_os("CI").is_some()));
    }
    let benches: [(&str, fn()); 5] = [
        ("setup", setup::bench),
        ("start", start::bench),
        ("plain", plain::bench),
        ("ids", ids::bench),
        ("scale", scale::bench),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).filter(|w| !w.starts_with('-')).collect();
    for (name, bench) in benches {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            bench();
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One figure, its peer's, their ratio, and what is promised.
fn row(what: &str, ours: f64, theirs: f64, promise: &str) {
    let ratio = ours / theirs;
    say(&format!("  {what:44} {ours:9.2}  {theirs:9.2}  {ratio:5.2}   {promise}"));
}

/// Runs a script on a host as root.
fn sh(site: &Site, host: &str, script: &str) -> String {
    site.lab.host(host).sh(script).unwrap()
}

#[expect(clippy::print_stdout, reason = "it is what a bench is for")]
fn say(text: &str) {
    println!("{text}");
}
