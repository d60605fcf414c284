//! The image `tiny`, built once for all tests that boot it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

/// `repos.yaml` with the one repository at `path`.
pub fn repository(path: &Path) -> String {
    format!("repos:\n  - name: user\n    path: {}\n", path.display())
}

/// A repository with the image `tiny`, built once for all tests by this very program.
pub fn shared_images() -> PathBuf {
    let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // The image's own test builds, too, and uses the same packages.
    let lock = File::create(shared.join("tiny.lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno).unwrap();
    let (home, done) = (shared.join("cluster"), shared.join("cluster/done"));
    let images = home.join("images");
    let modified = |path: &Path| path.metadata().and_then(|data| data.modified());
    let pavo = Path::new(env!("CARGO_BIN_EXE_pavo"));
    if modified(&done).is_ok_and(|done| done > modified(pavo).unwrap()) {
        return images;
    }
    let _ = fs::remove_dir_all(&home);
    let site = home.join("site");
    fs::create_dir_all(&site).unwrap();
    fs::write(home.join("repos.yaml"), repository(&images)).unwrap();
    let mut build = Command::new(pavo);
    build.args(["image", "build", "tiny", "tiny", "--cache"]).arg(shared.join("packages"));
    build.env("HOME", &home).env("PAVO_USER_CONF_DIR", &home).env("PAVO_SYSTEM_CONF_DIR", &site);
    let built = build.output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    File::create(done).unwrap();
    images
}
