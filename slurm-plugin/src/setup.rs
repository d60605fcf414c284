//! Runs `pavo internal setup create|delete` and brings back what it says.
//!
//! The child gets the ask on its standard input, already complete and ended when it
//! starts, so that nothing here waits for it to read; an empty environment; no other
//! descriptor; a session and control groups of its own; and so much time.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::cgroup::Groups;
use crate::sys;

/// How much of what pavo says is kept.
const MAX_REPORT: usize = 4096;
/// How long a killed child may take to go.
const LAST_BREATH: Duration = Duration::from_secs(5);

/// How long what a removal has killed may keep its control groups busy.
const LAST_MOMENT: Duration = Duration::from_millis(500);

/// How a run ended.
#[derive(Debug)]
pub enum Ended {
    Done,
    /// pavo said no, by exit status, and has left nothing behind.
    Refused(String),
    /// It was killed, or ran out of time: something may be left.
    Broken(String),
}

/// One run.
#[derive(Debug)]
pub struct Run<'a> {
    pub program: &'a str,
    pub action: &'a str,
    pub ask: &'a str,
    pub limit: Duration,
    /// The name of the control groups.
    pub group: &'a str,
}

impl Run<'_> {
    pub fn run(&self) -> Ended {
        let end = Instant::now() + self.limit;
        let groups = Groups::make(self.group);
        let ended = self.start_and_wait(&groups, end);
        groups.remove(if self.action == "delete" { LAST_MOMENT } else { Duration::ZERO });
        ended
    }

    fn start_and_wait(&self, groups: &Groups, end: Instant) -> Ended {
        let mut child = match self.start(groups) {
            Ok(child) => child,
            Err(error) => {
                return Ended::Refused(format!("cannot start `{}`: {error}", self.program));
            }
        };
        let mut said = Vec::new();
        let status = wait(&mut child, &mut said, end);
        if matches!(status, Ok(None)) {
            sys::kill_group(child.id());
            let _ = wait(&mut child, &mut Vec::new(), Instant::now() + LAST_BREATH);
        }
        self.judge(status, &said)
    }

    fn start(&self, groups: &Groups) -> io::Result<Child> {
        let (ask, mut end) = sys::pipe()?;
        end.write_all(self.ask.as_bytes())?;
        drop(end);
        let members: Vec<i32> = groups.members.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new(self.program);
        command.args(["internal", "setup", self.action]).env_clear().current_dir("/");
        command.stdin(ask).stdout(Stdio::piped()).stderr(Stdio::null());
        let detach = move || sys::detach(&members);
        #[expect(unsafe_code)]
        // SAFETY: `detach` only makes async-signal-safe calls and allocates nothing.
        unsafe {
            command.pre_exec(detach)
        };
        command.spawn()
    }

    fn judge(&self, status: io::Result<Option<ExitStatus>>, said: &[u8]) -> Ended {
        let report = || match readable(said) {
            text if text.is_empty() => None,
            text => Some(text),
        };
        let named = format!("`{} internal setup {}`", self.program, self.action);
        match status {
            Ok(Some(status)) if status.success() => Ended::Done,
            Ok(Some(status)) => {
                let silent = || match status.code() {
                    Some(_) => format!("{named} failed without a word ({status})"),
                    None => format!(
                        "{named} was killed ({status})\n  help: is the host's memory short? an \
                         administrator looks with `dmesg` there"
                    ),
                };
                let text = report().unwrap_or_else(silent);
                if status.code().is_some() { Ended::Refused(text) } else { Ended::Broken(text) }
            }
            Ok(None) => {
                let text = format!("{named} took more than {} s", self.limit.as_secs());
                Ended::Broken(report().map_or(text.clone(), |said| format!("{text}\n{said}")))
            }
            Err(error) => Ended::Broken(format!("{named} is lost: {error}")),
        }
    }
}

/// Reads and waits until the child has ended, or `end`.
fn wait(child: &mut Child, said: &mut Vec<u8>, end: Instant) -> io::Result<Option<ExitStatus>> {
    let mut out = child.stdout.take();
    loop {
        match &mut out {
            Some(pipe) if sys::readable(pipe.as_fd(), 20) => {
                if !read_some(pipe, said) {
                    out = None;
                }
            }
            Some(_) => {}
            None => sleep(Duration::from_millis(1)),
        }
        if let Some(status) = child.try_wait()? {
            // Something may still hold the pipe: take what is there, do not wait.
            let mut more = |pipe: &mut ChildStdout| {
                said.len() < MAX_REPORT && sys::readable(pipe.as_fd(), 0) && read_some(pipe, said)
            };
            while out.as_mut().is_some_and(&mut more) {}
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
    }
}

/// Whether there may be more.
fn read_some(pipe: &mut ChildStdout, said: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 1024];
    let count = pipe.read(&mut buffer).unwrap_or(0);
    let room = MAX_REPORT - said.len();
    said.extend_from_slice(&buffer[..count.min(room)]);
    count > 0
}

/// The text without what a terminal might obey.
fn readable(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let clean = |c: char| if c.is_control() && c != '\n' { ' ' } else { c };
    text.trim_end().chars().map(clean).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_report_cannot_move_the_cursor() {
        assert_eq!(readable(b"no\x1b[2Jway\r\nbecause\n\n"), "no [2Jway \nbecause");
        assert_eq!(readable(b"\xffx"), "\u{fffd}x");
        assert_eq!(readable(b"\n"), "");
    }

    /// Runs a script in pavo's place, which knows its folder as `$dir`.
    fn run(script: &str, limit: Duration) -> (Ended, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pavo");
        std::fs::write(&path, format!("#!/bin/sh\ndir={}\n{script}\n", dir.path().display()))
            .unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let program = path.to_str().unwrap();
        let ask = "version=1\njob=7\n";
        let ended = Run { program, action: "create", ask, limit, group: "pavo.unit-test" }.run();
        (ended, dir)
    }

    // In one test: a script cannot start while another thread's fork still has it open.
    #[test]
    fn each_end_is_told_apart() {
        let long = Duration::from_secs(20);
        let (ended, dir) = run("echo \"$*\" >$dir/said; cat >>$dir/said; echo ignored", long);
        assert!(matches!(ended, Ended::Done), "{ended:?}");
        let said = std::fs::read_to_string(dir.path().join("said")).unwrap();
        assert_eq!(said, "internal setup create\nversion=1\njob=7\n");

        let (ended, _) = run("echo why; echo help; exit 5", long);
        assert!(matches!(&ended, Ended::Refused(why) if why == "why\nhelp"), "{ended:?}");
        let (ended, _) = run("exit 3", long);
        assert!(
            matches!(&ended, Ended::Refused(why) if why.contains("exit status: 3")),
            "{ended:?}"
        );
        let (ended, _) = run("echo why; kill -9 $$", long);
        assert!(matches!(&ended, Ended::Broken(why) if why == "why"), "{ended:?}");

        let start = Instant::now();
        let (ended, _) = run("echo waiting; sleep 20 | cat", Duration::from_millis(1500));
        let took = start.elapsed();
        assert!(matches!(&ended, Ended::Broken(why) if why.ends_with("1 s\nwaiting")), "{ended:?}");
        assert!(took < Duration::from_secs(8), "{took:?}");

        let run = Run { program: "/nowhere", action: "create", ask: "", limit: long, group: "x" };
        let ended = run.run();
        assert!(matches!(&ended, Ended::Refused(why) if why.contains("`/nowhere`")), "{ended:?}");
    }
}
