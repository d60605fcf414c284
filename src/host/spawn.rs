//! How child processes are tied to us: they die with their parent, and inherit
//! exactly the descriptors that are named.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{getpid, getppid};

/// Makes the child receive SIGKILL when the thread that spawns it ends, whatever
/// ends it. Spawn from the main thread: the kernel looks at threads.
///
/// Parent and child must be in the same PID namespace.
pub fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let tie = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the line above.
        if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    #[expect(unsafe_code)]
    // SAFETY: runs between fork and exec; prctl and getppid are async-signal-safe
    // and nothing is allocated or locked.
    unsafe {
        command.pre_exec(tie)
    };
}

/// Lets the child go on when it is asked to stand still (SIGTSTP): by who suspends all
/// processes of a job, or a terminal.
pub fn ignore_suspension(command: &mut Command) {
    #[expect(unsafe_code)]
    // SAFETY: runs between fork and exec; signal is async-signal-safe and SIG_IGN no handler.
    unsafe {
        command.pre_exec(|| Ok(signal(Signal::SIGTSTP, SigHandler::SigIgn).map(drop)?))
    };
}

/// Lets the child inherit these descriptors under the numbers they have here.
/// They stay open in this process as long as `command` lives.
pub fn inherit(command: &mut Command, descriptors: Vec<OwnedFd>) -> Vec<RawFd> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let open = move || {
        for descriptor in &descriptors {
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    };
    #[expect(unsafe_code)]
    // SAFETY: runs between fork and exec; fcntl is async-signal-safe and nothing
    // is allocated or locked.
    unsafe {
        command.pre_exec(open)
    };
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn an_inherited_descriptor_is_readable_under_its_number() {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        // Not `sh`: dash knows descriptors of one digit only.
        let mut command = Command::new("bash");
        let fds = inherit(&mut command, vec![theirs.into()]);
        command.args(["-c", &format!("echo hello >&{}", fds[0])]);
        assert!(command.status().unwrap().success());
        drop(command);
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
    }

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut command = Command::new("sleep");
            command.arg("600");
            die_with_parent(&mut command);
            inherit(&mut command, vec![theirs.into()]);
            drop(command.spawn().unwrap());
        })
        .join()
        .unwrap();
        // Our end reads end-of-file only once `sleep`, which holds the other, is gone.
        ours.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        ours.write_all(b"x").ok();
        assert_eq!(ours.read(&mut [0; 1]).unwrap_or(0), 0);
    }
}
