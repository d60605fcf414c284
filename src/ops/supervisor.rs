//! The parent of a launcher under salloc, which tells how its child has ended.
//!
//! ```text
//! pavo alloc = salloc ─ supervisor ─ launcher ─┬─ shell or script
//!                                              └─ srun
//! ```
//!
//! salloc of Slurm 22.05 says nothing and exits with 0 when a signal has ended its command:
//! the supervisor exits instead, with the code that a shell would use. It forks before there
//! is anything, then only waits: no runtime, no thread, half a megabyte of its own.
//!
//! Whoever dies first, nobody is left: the launcher is told to end when the supervisor is
//! gone, the supervisor when salloc is. Killed itself, it leaves the user with salloc's 0 and
//! with what the launcher still says; it is the smallest process of the job, and the last that
//! the kernel would choose when memory is short.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};

use crate::error::{Context, Error, Result};

/// Which of the two this process has become.
#[derive(Debug)]
pub enum Role {
    /// The child of this supervisor.
    Launcher(Pid),
    /// The launcher has ended. None when it has not, but our parent has.
    Supervisor(Option<ExitStatus>),
}

/// Splits this process in two. In the parent, returns when the child has ended.
///
/// # Errors
/// When there can be no other process.
pub fn split() -> Result<Role> {
    let doing = || "starting the launcher".to_owned();
    let (us, parent) = (getpid(), getppid());
    // Blocked before there is a child: nothing that happens to it can be missed.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).while_doing(doing)?;
    #[expect(unsafe_code)]
    // SAFETY: the default is no handler of ours.
    unsafe {
        // Where it was ignored, nobody would tell how a child ends.
        signal(Signal::SIGCHLD, SigHandler::SigDfl).while_doing(doing)?;
    }
    #[expect(unsafe_code)]
    // SAFETY: there is one thread, so the child is as whole as we are.
    match unsafe { fork() }.while_doing(doing)? {
        ForkResult::Child => {
            set_pdeathsig(Signal::SIGTERM).while_doing(doing)?;
            mask.thread_set_mask().while_doing(doing)?;
            match getppid() == us {
                true => Ok(Role::Launcher(us)),
                // It died before it was agreed what then.
                false => Err(Error::system("the parent of the launcher was killed")),
            }
        }
        ForkResult::Parent { child } => wait(child, parent).while_doing(doing),
    }
}

/// Waits for the end of `child`, or of our parent, and passes signals on.
fn wait(child: Pid, parent: Pid) -> nix::Result<Role> {
    set_pdeathsig(Signal::SIGTERM)?;
    let signals = SignalFd::new(&SigSet::all())?;
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(ended((code & 0xff) << 8)),
            Ok(WaitStatus::Signaled(_, signal, core)) => {
                return Ok(ended(signal as i32 | if core { 0x80 } else { 0 }));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        if getppid() != parent {
            return Ok(Role::Supervisor(None));
        }
        let received = match signals.read_signal() {
            Ok(received) => received,
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error),
        };
        let Some(received) = received else { continue };
        // A terminal's keys, and what salloc sends, reach all of our process group, the
        // launcher among them. What is left was meant for us alone.
        let by_process = received.ssi_code <= 0;
        let by_parent = i32::try_from(received.ssi_pid) == Ok(parent.as_raw());
        let signal = i32::try_from(received.ssi_signo).ok();
        let signal = signal.and_then(|number| Signal::try_from(number).ok());
        if let (Some(signal), true) = (signal, by_process && !by_parent) {
            if signal != Signal::SIGCHLD {
                // Not waited for yet, its number is no other's.
                let _ = kill(child, signal);
            }
        }
    }
}

fn ended(status: i32) -> Role {
    Role::Supervisor(Some(ExitStatus::from_raw(status)))
}
