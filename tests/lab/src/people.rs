//! A lab that somebody has open in a terminal, seen from another one.
//!
//! Labs of tests are not found here, and nothing here ends them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, Result};
use crate::{Lab, folder, host, keeper};

/// In the lab's folder; says which process owns it.
const FILE: &str = "people";

/// A lab of another process.
#[derive(Debug)]
pub struct Open {
    dir: PathBuf,
    owner: i32,
}

/// Lets others find the lab of this process. Its owner ends it when SIGTERM comes.
pub fn offer(lab: &Lab) -> Result<()> {
    Ok(fs::write(lab.dir().join(FILE), std::process::id().to_string())?)
}

/// The labs that are open.
pub fn open() -> Vec<Open> {
    let owner = |dir: &Path| fs::read_to_string(dir.join(FILE)).ok()?.trim().parse().ok();
    let labs = folder::living().into_iter();
    labs.filter_map(|dir| owner(&dir).map(|owner| Open { dir, owner })).collect()
}

impl Open {
    /// What all names of the lab begin with.
    pub fn prefix(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// As [`Host::command`](crate::Host::command).
    pub fn command(&self, host: &str, user: Option<&str>, argv: &[&str]) -> Result<Command> {
        let records = self.dir.join("keepers");
        let names = [host.to_owned(), format!("{}{host}", self.prefix())];
        let record = names.iter().find_map(|name| fs::read_to_string(records.join(name)).ok());
        let pid = record.as_ref().and_then(|text| text.split(' ').next()?.parse().ok());
        let pid = pid.ok_or_else(|| Error::new(format!("no host {host} is up")))?;
        keeper::command(pid, host::user(user)?, argv)
    }

    /// Ends it and waits until it is gone.
    pub fn end(self) -> Result<()> {
        kill(Pid::from_raw(self.owner), Signal::SIGTERM)?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.dir.exists() {
            if Instant::now() > deadline {
                let owner = self.owner;
                return Err(Error::new(format!("process {owner} does not end its lab")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}
