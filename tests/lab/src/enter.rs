//! A command enters a host between fork and exec.
//!
//! A process namespace is entered by children only. So the process that the caller
//! started forks once more after it has entered: the child becomes the command, and
//! the parent stands in for it where the caller sees it. It passes signals on, ends as
//! the command ends, and takes the command with it when it is killed.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, chdir, fork, setgid, setgroups, setuid};

use crate::error::{Error, Result};

type Namespaces = Vec<(File, CloneFlags)>;

/// Makes `command` run in `spaces` as user `id`, in `home`.
#[expect(unsafe_code)]
pub(crate) fn on_start(
    command: &mut Command,
    spaces: Namespaces,
    id: Option<u32>,
    home: &str,
) -> Result<()> {
    let home = CString::new(home).map_err(|_| Error::new("a NUL in a path"))?;
    // SAFETY: between fork and exec `enter` makes system calls only: it allocates
    // nothing and takes no lock.
    unsafe {
        command.pre_exec(move || enter(&spaces, id, &home));
    }
    Ok(())
}

#[expect(unsafe_code)]
fn enter(spaces: &Namespaces, id: Option<u32>, home: &CString) -> io::Result<()> {
    for (file, kind) in spaces {
        setns(file, *kind)?;
    }
    // Blocked before the fork: no signal to the stand-in is lost.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    // SAFETY: this process has one thread.
    if let ForkResult::Parent { child } = unsafe { fork() }? {
        stand_in(child);
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    if let Some(id) = id {
        setgroups(&[Gid::from_raw(id)])?;
        setgid(Gid::from_raw(id))?;
        setuid(Uid::from_raw(id))?;
    }
    // After the change of user, which clears it.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if chdir(home.as_c_str()).is_err() {
        chdir(c"/")?;
    }
    Ok(())
}

/// Is the command, for whoever started it.
#[expect(unsafe_code)]
fn stand_in(child: Pid) -> ! {
    // SAFETY: nothing here uses a descriptor; those of the command are its own copies.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    loop {
        // SAFETY: an all-zero siginfo is valid; the two sets and it outlive the call.
        let (signal, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            (libc::sigwaitinfo(SigSet::all().as_ref(), &mut info), info)
        };
        if signal == libc::SIGCHLD {
            end_like(child);
        } else if signal > 0 && info.si_code <= 0 {
            // Sent by a process. What a terminal sends reaches the command by itself.
            // SAFETY: a system call without pointers.
            unsafe { libc::kill(child.as_raw(), signal) };
        }
    }
}

/// Ends as the child has ended, if it has.
#[expect(unsafe_code)]
fn end_like(child: Pid) {
    match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
        // SAFETY: as above.
        Ok(WaitStatus::Exited(_, code)) => unsafe { libc::_exit(code) },
        Ok(WaitStatus::Signaled(_, signal, _)) => {
            let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
            let _ = kill(Pid::this(), signal);
            // SAFETY: as above.
            unsafe { libc::_exit(128 + signal as i32) }
        }
        _ => {}
    }
}
