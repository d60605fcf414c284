//! The one function that runs other programs.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::limits::restore_open_files;
use super::netns;
use crate::error::{Context, Error, Result};

/// Where system programs lie. An ordinary user's own search path often lacks
/// `sbin`, and a privileged caller must not use the user's.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The most of a program's complaint that goes into an error, in bytes.
const MAX_COMPLAINT: usize = 2000;

/// A program to run to its end.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    pub program: &'a str,
    pub args: &'a [&'a str],
    /// What it reads from standard input.
    pub input: &'a [u8],
    /// The file of the network namespace it runs in; the caller's if there is none.
    pub namespace: Option<&'a Path>,
    /// How long it may take before it is killed.
    pub limit: Duration,
}

/// Runs the program and returns its standard output. It gets an environment of
/// ours: a plain search path and the `C` locale.
///
/// # Errors
/// When it cannot be started, does not end in time, or fails: the error names the
/// command and quotes its standard error.
pub async fn run(command: &Command<'_>) -> Result<Vec<u8>> {
    attempt(command).await.while_doing(|| {
        let words: Vec<_> =
            std::iter::once(&command.program).chain(command.args).copied().collect();
        format!("running `{}`", words.join(" "))
    })
}

async fn attempt(command: &Command<'_>) -> Result<Vec<u8>> {
    let mut child = spawn(command)?;
    let mut stdin = child.stdin.take();
    let feed = async {
        if let Some(pipe) = &mut stdin {
            // A program that does not read its input says why when it ends.
            let _ = pipe.write_all(command.input).await;
        }
        stdin = None;
    };
    let end = async { tokio::join!(feed, child.wait_with_output()).1 };
    // Leaving by the limit drops the child, and that kills it.
    let output = tokio::time::timeout(command.limit, end)
        .await
        .map_err(|_| Error::system(format!("no end after {} s", command.limit.as_secs_f32())))?
        .while_doing(|| "waiting for its end".into())?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    // What moves a terminal's cursor is not for ours.
    let complaint: String = complaint.trim().chars().take(MAX_COMPLAINT).map(shown).collect();
    let status = output.status.to_string();
    Err(Error::system(if complaint.is_empty() { status } else { format!("{status}: {complaint}") }))
}

/// A letter as one that a terminal shows and does not obey. Lines stay lines.
fn shown(letter: char) -> char {
    match letter {
        '\n' | '\t' => letter,
        _ if letter.is_control() => '·',
        _ => letter,
    }
}

fn spawn(command: &Command<'_>) -> Result<tokio::process::Child> {
    let start = || {
        let mut child = tokio::process::Command::new(command.program);
        child.args(command.args).env_clear().env("PATH", PATH).env("LC_ALL", "C");
        child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        restore_open_files(child.as_std_mut());
        child.kill_on_drop(true).spawn()
    };
    // A child is born in the namespace of the thread that starts it.
    let child = match command.namespace {
        Some(namespace) => netns::with_netns(namespace, start)?,
        None => start(),
    };
    child.map_err(|error| {
        let missing = error.kind() == std::io::ErrorKind::NotFound;
        let failure = Error::system("it cannot be started").because(error);
        if missing { failure.help(format!("install `{}`", command.program)) } else { failure }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, input: &[u8], limit: Duration) -> Result<Vec<u8>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let command =
            Command { program: "sh", args: &["-c", script], input, namespace: None, limit };
        runtime.block_on(run(&command))
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn input_larger_than_a_pipe_goes_through() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(sh("cat", &input, LONG).unwrap(), input);
    }

    #[test]
    fn a_failure_names_the_command_and_quotes_its_complaint() {
        let report = sh("echo no such luck >&2; exit 3", &[b'x'; 1 << 20], LONG).unwrap_err();
        assert_eq!(
            report.report(),
            "error: running `sh -c echo no such luck >&2; exit 3`\
             \n  because: exit status: 3: no such luck"
        );
    }

    #[test]
    fn a_complaint_does_not_move_the_cursor() {
        let report = sh("printf 'a\\033[2Jb\\nc' >&2; exit 1", b"", LONG).unwrap_err().report();
        assert!(report.ends_with(": a·[2Jb\n    c"), "{report:?}");
    }

    #[test]
    fn a_program_that_hangs_is_given_up_and_killed() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("echo $$ > {}; exec sleep 600", pid.display());
        let error = sh(&script, b"", Duration::from_secs(1)).unwrap_err();
        assert!(error.report().contains("no end after 1 s"), "{error:?}");
        let pid: u32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        // Killed, which takes effect in its own time.
        let given_up = std::time::Instant::now() + Duration::from_secs(20);
        while crate::host::process::identify(pid).is_some() {
            assert!(std::time::Instant::now() < given_up, "{pid} lives on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_users_environment_does_not_reach_it() {
        assert_eq!(sh("echo $HOME-$LC_ALL", b"", LONG).unwrap(), b"-C\n");
    }
}
