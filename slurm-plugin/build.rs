//! Finds the release of Slurm that the plugin is for. Slurm loads a plugin only if
//! that is its own.
//!
//! `PAVO_SLURM_VERSION` (`22.05.8`, or a number such as `0x160508`) goes before the
//! header of the Slurm installed here. With neither, the plugin builds, so that the
//! workspace does, but says version 0, which every Slurm refuses by name.

use std::{env, fs};

#[path = "src/version.rs"]
mod version;

const HEADERS: [&str; 3] = [
    "/usr/include/slurm/slurm_version.h",
    "/usr/local/include/slurm/slurm_version.h",
    "/opt/slurm/include/slurm/slurm_version.h",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/version.rs");
    println!("cargo::rerun-if-env-changed=PAVO_SLURM_VERSION");
    println!("cargo::rerun-if-env-changed=PAVO_PATH");
    for header in HEADERS {
        println!("cargo::rerun-if-changed={header}");
    }
    let version = match env::var("PAVO_SLURM_VERSION") {
        Ok(text) => version::parse(&text)
            .unwrap_or_else(|| panic!("PAVO_SLURM_VERSION is `{text}`; write it as `22.05.8`")),
        Err(_) => installed().unwrap_or_else(|| {
            println!(
                "cargo::warning=no slurm_version.h here: this libspank_pavo.so says version 0, and \
                 Slurm will refuse to load it; install libslurm-dev, or set PAVO_SLURM_VERSION=22.05.8"
            );
            0
        }),
    };
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(format!("{out}/slurm_version"), format!("{version:#x}"))
        .expect("OUT_DIR is writable");
    if let Ok(path) = env::var("PAVO_PATH") {
        assert!(path.starts_with('/'), "PAVO_PATH is `{path}`; it must be an absolute path");
    }
}

fn installed() -> Option<u32> {
    HEADERS.iter().find_map(|header| version::in_header(&fs::read_to_string(header).ok()?))
}
