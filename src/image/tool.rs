//! Runs one external program to its end; what it said on standard error becomes
//! the cause of the error.

use std::process::{Command, Stdio};

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
    let arguments: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    Err(Error::system(format!("{}: {said}", output.status)))
        .while_doing(|| format!("running `{program} {}`", arguments.join(" ")))
}
