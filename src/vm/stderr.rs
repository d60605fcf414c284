//! What QEMU says on its standard error: a bounded log, and the end of it.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::Error;

/// The most that `qemu.log` holds, in bytes: its beginning.
const LOG: usize = 256 << 10;
/// What is kept of the end for an error, in bytes.
const TAIL: usize = 4 << 10;

/// The end of what QEMU said.
#[derive(Debug, Default)]
pub struct Stderr {
    tail: Vec<u8>,
}

impl Stderr {
    /// Reads to the end. A log that cannot be written is given up.
    pub async fn keep(mut from: impl AsyncRead + Unpin, log: PathBuf) -> Self {
        let mut stderr = Self::default();
        let mut room = LOG;
        let mut file = None;
        let mut chunk = [0; 1024];
        while let Ok(count @ 1..) = from.read(&mut chunk).await {
            let text = &chunk[..count];
            stderr.tail.extend_from_slice(text);
            stderr.tail.drain(..stderr.tail.len().saturating_sub(TAIL));
            let logged = &text[..count.min(room)];
            room -= logged.len();
            let open = || OpenOptions::new().append(true).create(true).mode(0o600).open(&log);
            if file.is_none() {
                file = Some(open());
            }
            if let Some(Ok(file)) = &mut file {
                // The tail is kept all the same.
                let _ = file.write_all(logged);
            }
        }
        stderr
    }

    /// The error for a QEMU that ended so, with its own words and what to try.
    pub fn explain(&self, fault: &str) -> Error {
        let said = String::from_utf8_lossy(&self.tail);
        let said = said.trim();
        let mut error = Error::system(fault);
        if !said.is_empty() {
            error = error.because(said.to_owned());
        }
        match help(fault, said) {
            Some(help) => error.help(help),
            None => error,
        }
    }
}

const NO_SPICE: &str = "this QEMU has no SPICE: install it on the VM's host (Debian: \
    qemu-system-modules-spice), or set `remote-display: vnc`";

/// What mends the usual reasons.
fn help(fault: &str, said: &str) -> Option<&'static str> {
    let known = [
        ("/dev/net/tun", "let users open it: `chmod 666 /dev/net/tun` (udev rule for good)"),
        ("annot allocate memory", "ask for less memory: `--mem`"),
        ("Failed to get \"write\" lock", "another QEMU has this disk open"),
        ("No space left on device", "free some space, or set PAVO_TMPDIR to a larger folder"),
        ("no option group 'spice'", NO_SPICE),
        ("-spice: invalid option", NO_SPICE),
        ("invalid option", "check `custom-args` in the template"),
    ];
    let told = known.iter().find(|(word, _)| said.contains(word)).map(|(_, help)| *help);
    let killed = fault.ends_with("by signal 9");
    told.or(killed.then_some("somebody killed it, or the kernel did for want of memory: `dmesg`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_log_keeps_the_beginning_and_the_error_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("qemu.log");
        let text: String = (0..40_000).map(|line| format!("line {line:06}\n")).collect();
        let stderr = Stderr::keep(text.as_bytes(), log.clone()).await;
        assert_eq!(std::fs::read(log).unwrap(), text.as_bytes()[..LOG]);
        let report = stderr.explain("QEMU exited with status 1").report();
        assert!(report.ends_with("line 039999"), "{report}");
        assert!(report.len() < 2 * TAIL);
    }

    #[tokio::test]
    async fn the_usual_reasons_come_with_advice() {
        let said = "qemu: could not open /dev/net/tun: Permission denied\n";
        let dir = tempfile::tempdir().unwrap();
        let stderr = Stderr::keep(said.as_bytes(), dir.path().join("log")).await;
        let report = stderr.explain("QEMU exited during start with status 1").report();
        assert_eq!(
            report,
            "error: QEMU exited during start with status 1\
             \n  because: qemu: could not open /dev/net/tun: Permission denied\
             \n  help: let users open it: `chmod 666 /dev/net/tun` (udev rule for good)"
        );
        let silent = Stderr::default().explain("QEMU was killed by signal 9");
        assert!(silent.report().contains("dmesg"));
    }
}
