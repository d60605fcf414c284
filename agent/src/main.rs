//! The agent: a program in the guest that runs commands for who started the VM.
//!
//! ```text
//! pavo-agent                 serves the port org.pavo.agent.0, as soon as it is there
//! pavo-agent --port PATH     serves this device or socket
//! pavo-agent --stdio         serves what its standard input is: a socket, a terminal
//! ```
//!
//! It starts itself with `--send` and `--receive` for copies, as who is to read or write the
//! files: one that waits for a file server keeps no command waiting; and with `--freeze` and
//! `--thaw` for file systems that are to be at rest.
//!
//! With `--assume` it makes its guest, which goes on from the memory of another, the one that its
//! standard input says.
//!
//! One loop that sleeps while there is nothing to do, and a thread for each command that is
//! about to begin, which may have to wait for a file server. What is read of a
//! command waits for nobody: it is read only when there is credit for it, and room.

mod account;
mod assume;
mod command;
mod copying;
mod freeze;
mod past;
mod port;
mod serve;
mod spawn;
mod starts;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Before a port that was closed is opened again.
const AGAIN: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let own =
        copying::copy(&words).or_else(|| assume::assume(&words)).or_else(|| freeze::freeze(&words));
    if let Some(code) = own {
        return code;
    }
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    let words: Vec<&str> = words.iter().map(|word| &**word).collect();
    let served = match *words {
        [] => serve_for_ever(),
        ["--port", path] => port::open(path.as_ref()).and_then(|port| serve::serve(&port)),
        ["--stdio"] => port::stdio().and_then(|port| serve::serve(&port)),
        ["--version"] => say(&format!("pavo-agent {}", env!("CARGO_PKG_VERSION"))),
        _ => {
            say("usage: pavo-agent [--port PATH | --stdio | --version]").ok();
            return ExitCode::from(2);
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "pavo-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) -> std::io::Result<()> {
    writeln!(std::io::stdout(), "{text}")
}

/// Serves the port of this guest, also when QEMU's side was away.
fn serve_for_ever() -> std::io::Result<()> {
    loop {
        let port = port::wait()?;
        serve::serve(&port)?;
        drop(port);
        std::thread::sleep(AGAIN);
    }
}
