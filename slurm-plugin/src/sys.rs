//! The C library's functions, by hand. What the standard library has is not here.
#![expect(unsafe_code, reason = "calls C")]

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_short, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: c_short,
    revents: c_short,
}

unsafe extern "C" {
    fn setenv(name: *const c_char, value: *const c_char, overwrite: c_int) -> c_int;
    fn gethostname(name: *mut c_char, len: usize) -> c_int;
    fn pipe2(fds: *mut c_int, flags: c_int) -> c_int;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, milliseconds: c_int) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn setsid() -> c_int;
    fn umask(mask: u32) -> u32;
    fn signal(signal: c_int, handler: usize) -> usize;
    fn pthread_sigmask(how: c_int, set: *const [u64; 16], old: *mut [u64; 16]) -> c_int;
    fn write(fd: c_int, bytes: *const c_void, len: usize) -> isize;
    fn syscall(number: c_long, ...) -> c_long;
}

/// Sets a variable of this process, srun, which the step gets.
pub fn set_env(name: &CStr, value: &str) {
    let Ok(value) = CString::new(value) else { return };
    // SAFETY: srun itself sets its environment at this place, before it launches.
    unsafe { setenv(name.as_ptr(), value.as_ptr(), 1) };
}

pub fn host_name() -> Option<String> {
    let mut buffer = [0u8; 256];
    // SAFETY: at most that many bytes are written; the last stays NUL.
    let done = unsafe { gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) == 0 };
    let name = CStr::from_bytes_until_nul(&buffer).ok()?.to_str().ok()?;
    done.then(|| name.to_owned())
}

/// A pipe, whose writing end does not block. Neither end survives an exec.
pub fn pipe() -> io::Result<(File, File)> {
    const O_CLOEXEC: c_int = 0o2_000_000;
    const F_SETFL: c_int = 4;
    const F_SETPIPE_SZ: c_int = 1031;
    const O_NONBLOCK: c_int = 0o4000;
    let mut ends = [0; 2];
    // SAFETY: two descriptors are written.
    if unsafe { pipe2(ends.as_mut_ptr(), O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: they are new and nobody else's.
    let (read, write) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
    // SAFETY: both commands take an int. A pipe that stays small is seen when written.
    unsafe {
        fcntl(write.as_raw_fd(), F_SETPIPE_SZ, 64 * 1024 as c_int);
        if fcntl(write.as_raw_fd(), F_SETFL, O_NONBLOCK) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok((read, write))
}

/// Waits until something can be read, or its end seen.
pub fn readable(fd: BorrowedFd<'_>, milliseconds: c_int) -> bool {
    const POLLIN: c_short = 1;
    let mut fds = PollFd { fd: fd.as_raw_fd(), events: POLLIN, revents: 0 };
    // SAFETY: one entry.
    unsafe { poll(&raw mut fds, 1, milliseconds) > 0 }
}

/// Kills the process group that a child leads.
pub fn kill_group(leader: u32) {
    const SIGKILL: c_int = 9;
    if let Ok(pid @ 2..) = c_int::try_from(leader) {
        // SAFETY: numbers only; the child is not reaped yet, so that its group is its.
        unsafe { kill(-pid, SIGKILL) };
    }
}

/// What the child does between fork and exec: a session of its own, the groups of
/// `groups` instead of the step's, no signal ignored or blocked, nothing but 0, 1 and 2 open.
///
/// Only async-signal-safe calls, no allocation: slurmstepd has other threads.
pub fn detach(groups: &[c_int]) -> io::Result<()> {
    const SIGKILL: c_int = 9;
    const SIGSTOP: c_int = 19;
    const LAST_SIGNAL: c_int = 64;
    const SIG_SETMASK: c_int = 2;
    // SAFETY: numbers, a static byte and an empty `sigset_t` only.
    unsafe {
        if setsid() < 0 {
            return Err(io::Error::last_os_error());
        }
        umask(0o022);
        for number in (1..=LAST_SIGNAL).filter(|n| ![SIGKILL, SIGSTOP].contains(n)) {
            signal(number, 0);
        }
        pthread_sigmask(SIG_SETMASK, &[0; 16], std::ptr::null_mut());
        for &group in groups {
            write(group, c"0".as_ptr().cast(), 1);
        }
    }
    close_the_rest_at_exec();
    Ok(())
}

/// Marks, instead of closing: the standard library reports a failed exec over one
/// of them.
fn close_the_rest_at_exec() {
    const CLOSE_RANGE: c_long = 436;
    const CLOEXEC: c_long = 4;
    const F_SETFD: c_int = 2;
    const FD_CLOEXEC: c_int = 1;
    // SAFETY: numbers only.
    unsafe {
        if syscall(CLOSE_RANGE, 3 as c_long, c_long::from(u32::MAX), CLOEXEC) != 0 {
            // Before Linux 5.11.
            for fd in 3..65_536 {
                fcntl(fd, F_SETFD, FD_CLOEXEC);
            }
        }
    }
}
