//! The image `tiny`, built once for all tests that boot it.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// A repository with the image `tiny`, built once for all tests by this very program.
pub fn shared_images() -> PathBuf {
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // The image's own test builds, too, and uses the same packages.
    let lock = File::create(shared.join("tiny.lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    let pavo = Path::new(env!("CARGO_BIN_EXE_pavo"));
    pavo_lab::build_tiny(pavo, &shared.join("cluster"), &shared.join("packages")).unwrap()
}
