//! Processes, found in `/proc` by whose they are.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process that runs, as `/proc` showed it.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: i32,
    pub session: i32,
    /// Its arguments, separated by spaces.
    pub command: String,
    /// Whether its arguments, environment or working directory name the folder asked for.
    pub names: bool,
}

impl Process {
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    pub fn signal(&self, signal: Signal) {
        // It may just have ended.
        let _ = kill(Pid::from_raw(self.pid), signal);
    }
}

/// Every process of this machine but us and zombies, which hold nothing any more.
pub fn all(dir: &Path) -> Vec<Process> {
    let entries = fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let own = std::process::id() as i32;
    pids.filter(|pid| *pid != own).filter_map(|pid| read(pid, dir)).collect()
}

fn read(pid: i32, dir: &Path) -> Option<Process> {
    let file = |name: &str| fs::read(format!("/proc/{pid}/{name}"));
    let stat = String::from_utf8_lossy(&file("stat").ok()?).into_owned();
    // proc(5): state, parent, group, session follow the name, which may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    if matches!(fields[0], "Z" | "X") {
        return None;
    }
    let command = file("cmdline").unwrap_or_default();
    // Another user's environment and directory cannot be read: then the session tells.
    let environment = file("environ").unwrap_or_default();
    let at = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
    let dir_bytes = dir.as_os_str().as_encoded_bytes();
    let holds = |text: &[u8]| text.windows(dir_bytes.len()).any(|part| part == dir_bytes);
    Some(Process {
        pid,
        session: fields[3].parse().ok()?,
        names: holds(&command) || holds(&environment) || at.starts_with(dir),
        command: String::from_utf8_lossy(&command).replace('\0', " "),
    })
}

/// Whether there is no such process any more, or only its zombie.
pub fn is_over(pid: i32) -> bool {
    read(pid, Path::new("/nowhere")).is_none()
}
