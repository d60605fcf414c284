//! This program, to be started again.
//!
//! An upgrade may replace the file while we run; its path is then another program's, or
//! nobody's. What is to do one thing together with us is therefore started from what we run
//! ourselves; only what others start later, perhaps on other hosts, goes by path.

use std::ffi::CString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What this process runs, also when it has no name any more. Followed by the child, it is
/// what the child is a copy of.
const SELF: &str = "/proc/self/exe";

/// A command that starts the very program that runs here.
pub fn again() -> Command {
    let mut command = Command::new(SELF);
    command.arg0(env!("CARGO_PKG_NAME"));
    command
}

/// Lets lists of processes show one that was started [`again`] by its name, and not as `exe`.
pub fn show_name() {
    let name = CString::new(env!("CARGO_PKG_NAME")).expect("a name without NUL");
    // Nothing depends on it.
    let _ = nix::sys::prctl::set_name(&name);
}

/// Where this program is, for who starts it later; if it has been replaced, the new one.
///
/// # Errors
/// When there is none any more.
pub fn path() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    match path.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
        Some(new) if !path.exists() && Path::new(new).exists() => Ok(new.into()),
        _ => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Set in the copy of this test that is deleted under its own feet.
    const COPY: &str = "PAVO_TEST_COPY";

    #[test]
    fn a_program_that_was_replaced_starts_itself_again() {
        let test = "ops::program::tests::a_program_that_was_replaced_starts_itself_again";
        let arguments = ["--exact", test, "--nocapture"];
        match std::env::var(COPY).as_deref() {
            Ok("first") => {
                let here = std::env::current_exe().unwrap();
                fs::remove_file(&here).unwrap();
                assert!(!path().unwrap().exists(), "there is none");
                let second = again().args(arguments).env(COPY, "second").output().unwrap();
                fs::write(&here, "another").unwrap();
                assert_eq!(path().unwrap(), here);
                let said = String::from_utf8_lossy(&second.stdout).into_owned();
                assert!(said.contains("again as pavo"), "{second:?}");
                println!("done");
            }
            Ok(_) => println!("again as {}", std::env::args().next().unwrap()),
            Err(_) => {
                let temp = tempfile::tempdir().unwrap();
                let copy = temp.path().join("copy");
                fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
                let first = Command::new(&copy).args(arguments).env(COPY, "first").output();
                let said = String::from_utf8_lossy(&first.unwrap().stdout).into_owned();
                assert!(said.contains("done"), "{said}");
            }
        }
    }
}
