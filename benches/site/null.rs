//! The null hypervisor: speaks QMP as far as a VM's process asks, and runs no guest.
//!
//! It is this bench's own program under another name, which a template's `qemu-bin` gives.
//! When the guest that it has not got would run, it notes a line of times in
//! [`LOG`]: seconds since the epoch, by whole hundredths what the kernel tells of others.
//!
//! Alone, as a program of a step without pavo, it says when it runs and stays until it is ended.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// The name under which it is what it is.
pub const NAME: &str = "null-hypervisor";

/// Of all hosts of a lab; a line is written at once.
pub const LOG: &str = "/home/alice/null.log";

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 7}, "package": ""}, "capabilities": []}}"#;

/// What the log says of one VM.
pub struct Times {
    /// slurmstepd was started on the host: root's set-up begins.
    pub step: f64,
    /// The VM's process was started: root's set-up has ended.
    pub task: f64,
    /// The hypervisor was: the VM's process has had its spec, and made disk and seed.
    pub hypervisor: f64,
    /// The guest was to run.
    pub running: f64,
}

impl Times {
    pub fn read(log: &str) -> Vec<Self> {
        let line = |line: &str| {
            let at: Vec<f64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
            Self { step: at[0], task: at[1], hypervisor: at[2], running: at[3] }
        };
        log.lines().map(line).collect()
    }
}

/// Is the null hypervisor, where it was called so.
pub fn be_it() {
    let mut words = std::env::args_os();
    let called = words.next().unwrap_or_default();
    if Path::new(&called).file_name() != Some(OsStr::new(NAME)) {
        return;
    }
    let start = now();
    let mut qmp = words.filter_map(|word| {
        let word = word.to_str()?.strip_prefix("socket,id=qmp,fd=")?.to_owned();
        word.parse::<RawFd>().ok()
    });
    match qmp.next() {
        Some(fd) => serve(fd, start),
        None => stay(),
    }
    std::process::exit(0);
}

/// Until it is killed, as QEMU without a disk would.
fn stay() {
    super::say("up");
    std::thread::sleep(std::time::Duration::from_secs(600));
}

#[expect(unsafe_code)]
fn serve(fd: RawFd, start: f64) {
    // SAFETY: whoever started us made it for us, and nothing else here uses it.
    let mut writer = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut reader = BufReader::new(writer.try_clone().unwrap());
    let mut say = move |text: String| drop(writer.write_all((text + "\r\n").as_bytes()));
    say(GREETING.into());
    let mut line = String::new();
    while reader.read_line(&mut line).is_ok_and(|length| length > 0) {
        let asked: serde_json::Value = serde_json::from_str(&line).unwrap();
        line.clear();
        let answer = match asked["execute"].as_str().unwrap_or_default() {
            "query-status" => serde_json::json!({"status": "running", "running": true}),
            _ => serde_json::json!({}),
        };
        let event = |name: &str, data: &str| {
            format!(
                r#"{{"event": "{name}", "data": {data}, "timestamp": {{"seconds": 1, "microseconds": 0}}}}"#
            )
        };
        let ends = match asked["execute"].as_str().unwrap_or_default() {
            "cont" => {
                note(start);
                say(event("RESUME", "{}"));
                false
            }
            "stop" => {
                say(event("STOP", "{}"));
                false
            }
            "quit" => {
                say(event("SHUTDOWN", r#"{"guest": false, "reason": "host-qmp-quit"}"#));
                true
            }
            "system_powerdown" => {
                say(event("SHUTDOWN", r#"{"guest": true, "reason": "guest-shutdown"}"#));
                true
            }
            _ => false,
        };
        say(serde_json::json!({"return": answer, "id": asked["id"]}).to_string());
        if ends {
            return;
        }
    }
}

fn note(start: f64) {
    let (parent, task) = process(nix::unistd::getppid().as_raw());
    let (_, step) = process(parent);
    let line = format!("{step:.2} {task:.2} {start:.4} {:.4}\n", now());
    let log = OpenOptions::new().create(true).append(true).open(LOG);
    log.unwrap().write_all(line.as_bytes()).unwrap();
}

/// A process's parent and when it was started.
fn process(pid: i32) -> (i32, f64) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let rest: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: f64 = rest[19].parse().unwrap();
    let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap();
    let since_boot = boot.tv_sec() as f64 + boot.tv_nsec() as f64 / 1e9;
    (rest[1].parse().unwrap(), now() - since_boot + ticks / 100.0)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}
