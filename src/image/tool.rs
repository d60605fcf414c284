//! Runs one external program to its end; what it said on standard error becomes
//! the cause of the error.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitStatus, Stdio};

use crate::error::{Context, Error, Result};
use crate::host::spawn;

/// Runs `command` and returns its standard output. It dies with this thread, has
/// no standard input and speaks the language of the programmers (`LC_ALL=C`).
pub(super) fn run(command: &mut Command) -> Result<Vec<u8>> {
    spawn::die_with_parent(command);
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .while_doing(|| format!("starting `{program}`"))
        .map_err(|error| error.help(format!("install the Debian package of `{program}`")))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().rev().take(6).collect::<Vec<_>>();
    let said = said.into_iter().rev().collect::<Vec<_>>().join("\n");
    Err(failure(command, output.status, &said))
}

/// What a line begins with that is for the user to see.
const STEP: &str = "pavo-step: ";

/// Runs a long `command` as [`run`] does, and tells `progress` of its steps: lines on its
/// standard output or error that begin with [`STEP`]. Its last others become the cause of
/// the error.
pub(super) fn follow(command: &mut Command, progress: &dyn Fn(&str)) -> Result<()> {
    spawn::die_with_parent(command);
    let program = command.get_program().to_string_lossy().into_owned();
    let doing = || format!("starting `{program}`");
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).while_doing(doing)?;
    let other = write.try_clone().while_doing(doing)?;
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(write).stderr(other);
    let mut child = command.spawn().while_doing(doing)?;
    // Our copies of the pipe's end: the child's must be the last.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut said = VecDeque::new();
    let mut output = BufReader::new(File::from(read));
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line).while_doing(doing)? > 0 {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if let Some(step) = text.strip_prefix(STEP) {
            progress(step);
        } else if !text.is_empty() {
            said.push_back(text);
            if said.len() > KEPT {
                said.pop_front();
            }
        }
    }
    let status = child.wait().while_doing(|| format!("waiting for `{program}`"))?;
    if status.success() {
        return Ok(());
    }
    Err(failure(command, status, &said.make_contiguous().join("\n")))
}

/// How many lines of a program that failed are shown.
const KEPT: usize = 12;

fn failure(command: &Command, status: ExitStatus, said: &str) -> Error {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    Error::system(format!("running `{}`", words.join(" ")))
        .because(Error::system(format!("{status}: {said}")))
}
