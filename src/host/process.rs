//! Processes, told apart for good by id and start time.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::signal::Signal;

pub use crate::model::job::ProcessId;

/// The calling process, by the id that `/proc` knows it by.
pub fn current() -> ProcessId {
    let stat = fs::read_to_string("/proc/self/stat").expect("/proc is mounted");
    let pid = stat.split(' ').next().and_then(|pid| pid.parse().ok());
    let identity = pid.zip(parse(&stat));
    let (pid, start_time) = identity.expect("proc(5) says what is in `stat`");
    ProcessId { pid, start_time }
}

/// The process that has this id now; `None` if there is none, or only a zombie.
pub fn identify(pid: u32) -> Option<ProcessId> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse(&stat).map(|start_time| ProcessId { pid, start_time })
}

/// Whether this very process still runs. A zombie does not: it holds nothing any
/// more but its exit status.
pub fn alive(process: &ProcessId) -> bool {
    identify(process.pid).as_ref() == Some(process)
}

/// Waits for the end of this very process, without polling.
///
/// # Errors
/// When the kernel cannot tell of it (it is older than 5.3).
pub async fn ended(process: &ProcessId) -> io::Result<()> {
    let Some(descriptor) = running(process)? else { return Ok(()) };
    #[expect(unsafe_code)]
    // SAFETY: an `OwnedFd` always gives the same descriptor, and keeps it open.
    let descriptor = unsafe { tokio::io::unix::AsyncFd::register(descriptor) };
    drop(descriptor?.readable().await?);
    Ok(())
}

/// Sends a signal to this very process, and to none that has its id after it. One that has
/// ended needs none.
///
/// # Errors
/// When the kernel refuses (or is older than 5.3).
pub fn signal(process: &ProcessId, signal: Signal) -> io::Result<()> {
    let Some(descriptor) = running(process)? else { return Ok(()) };
    let (fd, none) = (descriptor.as_raw_fd(), std::ptr::null::<nix::libc::siginfo_t>());
    #[expect(unsafe_code)]
    // SAFETY: the descriptor is open during the call, and without a siginfo_t the call reads
    // no memory of ours.
    let sent =
        unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_send_signal, fd, signal as i32, none, 0) };
    match nix::errno::Errno::result(sent) {
        Ok(_) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The [`descriptor`] of a process; `None` if it has ended.
fn running(process: &ProcessId) -> io::Result<Option<OwnedFd>> {
    match descriptor(process) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(None),
        descriptor => descriptor.map(Some),
    }
}

/// A descriptor that is readable once this very process has ended (pidfd_open(2)).
///
/// # Errors
/// When it has ended already, or the kernel is older than 5.3.
fn descriptor(process: &ProcessId) -> io::Result<OwnedFd> {
    let pid = nix::libc::pid_t::try_from(process.pid).map_err(io::Error::other)?;
    #[expect(unsafe_code)]
    // SAFETY: the call takes two integers and touches no memory of ours; what it returns,
    // unless negative, is a descriptor that nobody else knows.
    let owned = unsafe {
        let fd = nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0);
        let fd = nix::errno::Errno::result(fd)?;
        OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?)
    };
    // The id may have passed to another process just before.
    if alive(process) { Ok(owned) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// The start time (field 22 of proc(5)'s `stat`) of a process that is not over.
fn parse(stat: &str) -> Option<u64> {
    // The second field is the program's name in parentheses and may hold anything,
    // parentheses and spaces too: count from its end. The third is the state.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_program_cannot_hide_behind_its_name() {
        let tail = "1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(parse(&format!("7 (a) Z b) S {tail}")), Some(4711));
        assert_eq!(parse(&format!("7 (a) S b) Z {tail}")), None);
        assert_eq!(parse("7 (a"), None);
    }

    #[test]
    fn a_zombie_and_a_reused_id_count_as_dead() {
        assert!(alive(&current()));
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let process = identify(child.id()).unwrap();
        assert!(alive(&process));
        let later = ProcessId { start_time: process.start_time + 1, ..process };
        assert!(!alive(&later), "another process may get the id");

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let early = std::time::Duration::from_millis(50);
        let waits = async { tokio::time::timeout(early, ended(&process)).await.is_err() };
        assert!(runtime.block_on(waits), "it lives");

        // Not meant for it, though it has the id.
        signal(&later, Signal::SIGKILL).unwrap();
        assert!(alive(&process));

        signal(&process, Signal::SIGKILL).unwrap();
        runtime.block_on(ended(&process)).unwrap();
        // Waits for the end, but leaves the zombie.
        let id = nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(child.id() as i32));
        let flags = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
        nix::sys::wait::waitid(id, flags).unwrap();
        assert!(!alive(&process), "a zombie");
        signal(&process, Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        assert!(!alive(&process));
    }
}
