//! Copies: a process of their own each, which is this program again.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use pavo_agent::copy::{self, Place};
use pavo_agent::{Copy, Exec, WINDOW};

/// This program, also when its file was replaced meanwhile.
pub const OURSELVES: &str = "/proc/self/exe";

const SEND: &str = "--send";
const RECEIVE: &str = "--receive";
const RECEIVE_INTO: &str = "--receive-into";

/// The command that does it.
pub fn command(copy: Copy) -> Exec {
    let word = match (copy.comes, copy.into) {
        (false, _) => SEND,
        (true, false) => RECEIVE,
        (true, true) => RECEIVE_INTO,
    };
    let words = [OURSELVES, word].map(|word| word.as_bytes().to_vec());
    let argv = words.into_iter().chain(copy.paths).collect();
    Exec { argv, user: copy.user, input: true, ..Exec::default() }
}

/// Copies, if that is what this process was started for.
pub fn copy(words: &[OsString]) -> Option<ExitCode> {
    let (word, paths) = words.split_first()?;
    let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    let into = word == RECEIVE_INTO;
    let comes = into || word == RECEIVE;
    if !comes && word != SEND {
        return None;
    }
    // Whoever leaves says so by closing our input: then there is time to clear up.
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    #[expect(unsafe_code)]
    // SAFETY: no code of ours runs when the signal comes.
    let _ = unsafe { sigaction(Signal::SIGHUP, &ignore) };
    let outcome = match (ends(), &*paths) {
        (Err(_), _) => return Some(ExitCode::FAILURE),
        (Ok((from, to)), [path]) if comes => {
            let place = Place { path: path.clone(), into, names: None };
            copy::receive(from, to, &place, &mut drop)
        }
        (Ok(_), _) if comes => return Some(ExitCode::from(2)),
        (Ok((from, to)), paths) => copy::send(from, to, paths, &mut drop),
    };
    // What there is to say was said.
    Some(ExitCode::from(u8::from(outcome.is_err())))
}

/// What the host sends, and what goes to it.
fn ends() -> io::Result<(File, File)> {
    let end = |fd: &dyn Fn() -> io::Result<File>| {
        let end = fd()?;
        // As much as may be under way. A guest may allow less.
        let _ = fcntl(&end, FcntlArg::F_SETPIPE_SZ(WINDOW as i32));
        Ok::<_, io::Error>(end)
    };
    let from = end(&|| Ok(io::stdin().as_fd().try_clone_to_owned()?.into()))?;
    let to = end(&|| Ok(io::stdout().as_fd().try_clone_to_owned()?.into()))?;
    Ok((from, to))
}
