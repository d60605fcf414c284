//! KVM, if it really runs guests here; otherwise emulation, and one line that says why.
//!
//! The probe runs guest code, and where KVM is broken that takes until its deadline. Its
//! verdict holds until the machine boots again, so it is kept beside the store.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::host::file::write_atomically;
use crate::model::vm::Accel;
use crate::vm::kvm;

/// How long the probe may take before KVM counts as broken.
const LIMIT: Duration = Duration::from_secs(2);

/// What the probe found, and when.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    boot: String,
    /// `None`: guests run.
    why_not: Option<String>,
}

/// Chooses, and tells `say` when it has to be emulation. `dir` is the store's.
pub async fn choose(dir: &Path, say: &dyn Fn(&str)) -> Accel {
    match why_not(dir).await {
        None => Accel::Kvm,
        Some(why) => {
            say(&format!("VMs are emulated (slow): {}", why.trim()));
            Accel::Tcg
        }
    }
}

async fn why_not(dir: &Path) -> Option<String> {
    // Who may open it can change at any time: that is not kept.
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Some(format!("/dev/kvm does not open: {error}"));
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let file = dir.join("kvm.json");
    let kept = fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(Verdict { why_not, .. }) = kept.filter(|kept: &Verdict| kept.boot == boot) {
        return why_not;
    }
    let why_not = match std::env::current_exe() {
        Ok(exe) => kvm::probe(&exe, LIMIT).await.err(),
        Err(error) => Some(format!("this program is not found: {error}")),
    };
    let verdict = Verdict { boot, why_not };
    let text = serde_json::to_vec(&verdict).expect("a verdict is always valid JSON");
    // Not kept, it is found again.
    let _ = write_atomically(&file, &text, 0o600);
    verdict.why_not
}
