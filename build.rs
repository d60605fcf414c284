//! Builds the guests' agent, which is a part of this program: a static one, that runs in any
//! guest. Whoever has pavo has it, of the same version, wherever pavo lies.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// The most that it may have, in bytes.
const LIMIT: u64 = 3 << 20;

fn main() {
    for path in ["build.rs", "Cargo.toml", "Cargo.lock", "agent/Cargo.toml", "agent/src"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let set = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let (out, target) = (set("OUT_DIR"), set("TARGET"));
    // A folder of its own: this one is locked while we run.
    let folder = Path::new(&out).join("agent");
    let mut cargo = Command::new(set("CARGO"));
    cargo.current_dir(set("CARGO_MANIFEST_DIR"));
    cargo.args(["build", "--quiet", "--locked", "--package=pavo-agent", "--bin=pavo-agent"]);
    cargo.args(["--profile=agent", "--target", &target, "--target-dir"]).arg(&folder);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    // What is checked or measured is this program, not the one that is carried.
    for name in ["RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the guests' agent does not build: is libc.a (libc6-dev) there?");
    let built = folder.join(target).join("agent/pavo-agent");
    let size = fs::copy(&built, Path::new(&out).join("pavo-agent")).expect("it was built");
    assert!(size <= LIMIT, "the guests' agent has {size} bytes");
}
