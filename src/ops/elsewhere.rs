//! ssh to the VMs of a job from hosts that do not see the job's directory.
//!
//! What the launcher has stored is written into the user's home, once, for all hosts that
//! see that home:
//!
//! ```text
//! ~/.pavo/jobs/<job>-<started>/ssh/   key, known hosts, configuration    0700, 0600
//! ```
//!
//! The key opens the guests of that job and nothing else. Each command that looks at jobs
//! removes the folders of those that have ended.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::cleanup::remove_dir;
use super::reach::{is_ours, secrets};
use super::ssh::SshFiles;
use crate::error::{Context, Result};
use crate::model::job::JobRecord;
use crate::store::Store;

/// The ssh files of a running job, wherever its launcher is.
///
/// # Errors
/// When the job's directory is on another host and the store does not have them.
pub async fn ssh_files(
    store: Option<&dyn Store>,
    job: &JobRecord,
    home: &Path,
) -> Result<SshFiles> {
    let files = SshFiles::of_job(&job.dir);
    if is_ours(&job.dir) && files.config().exists() {
        return Ok(files);
    }
    let secrets = secrets(store, job).await?;
    let dir = folder(home).join(name(job));
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.while_doing(|| format!("creating `{}`", dir.display()))?;
    let files = SshFiles::of_job(&dir);
    files.write(&secrets.key, &job.vms, &secrets.known)?;
    Ok(files)
}

/// Removes the folders of all jobs but these. Trouble is not the caller's: the next command
/// tries again.
pub fn tidy(home: &Path, alive: &[JobRecord]) {
    let alive: BTreeSet<String> = alive.iter().map(name).collect();
    let folder = folder(home);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(error) => return tracing::info!("listing `{}`: {error}", folder.display()),
    };
    let stale = entries.flatten().filter(|entry| {
        entry.file_name().to_str().is_some_and(|name| is_name(name) && !alive.contains(name))
    });
    for entry in stale {
        if let Err(error) = remove_dir(&entry.path()) {
            tracing::info!("{}", error.report());
        }
    }
}

fn folder(home: &Path) -> PathBuf {
    home.join(".pavo/jobs")
}

/// Of a job that comes again (requeued, or another one with the same number), too.
fn name(job: &JobRecord) -> String {
    format!("{}-{}", job.owner.job, job.started)
}

/// Whether a folder can be one of ours.
fn is_name(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    name.split_once('-').is_some_and(|(job, started)| number(job) && number(started))
}
