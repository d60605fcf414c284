//! A hypervisor without guests: as much QMP as pavo speaks, and nothing else.
//!
//! It is this bench's own program, started as `qemu-bin`: what is left of a cluster's start
//! is Slurm, root's set-up, the tasks and what they tell each other.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#;

/// Whether this program was started as QEMU.
pub fn is_wanted() -> bool {
    std::env::args().any(|word| word == "-nodefaults")
}

/// Answers until it is told to end, or nobody is left to tell it.
pub fn main() {
    let qmp = std::env::args().find_map(|word| {
        word.strip_prefix("socket,id=qmp,fd=").and_then(|number| number.parse::<i32>().ok())
    });
    let qmp = qmp.expect("a descriptor for QMP");
    #[expect(unsafe_code)]
    // SAFETY: whoever starts us hands this descriptor over for us to own.
    let mut stream = unsafe { UnixStream::from_raw_fd(qmp) };
    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut say = |text: &str| writeln!(stream, "{text}\r").is_ok();
    say(GREETING);
    for line in lines.map_while(Result::ok) {
        let Ok(request) = serde_json::from_str::<serde_json::Value>(&line) else { return };
        if !say(&format!(r#"{{"return": {{}}, "id": {}}}"#, request["id"])) {
            return;
        }
        match request["execute"].as_str() {
            Some("cont") => _ = say(r#"{"event": "RESUME"}"#),
            Some("quit" | "system_powerdown") => return,
            _ => {}
        }
    }
}
