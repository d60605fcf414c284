//! Gives up, for good, everything that answering packets does not need.
//!
//! | given up | by |
//! |---|---|
//! | user and groups, where started by the real root | `setgroups`, `setresgid`, `setresuid` |
//! | every capability, in the cluster's user namespace too | `capset` |
//! | new rights from set-uid programs | `no_new_privs` |
//! | being traced or dumped | `dumpable`, `RLIMIT_CORE` |
//! | processes and threads; descriptors beyond need | `RLIMIT_NPROC`, `RLIMIT_NOFILE` |
//! | every system call but those of the event loop | seccomp, which kills |
//!
//! What is left: the descriptors that are open, IPv4 stream sockets from the cluster's
//! namespace (a published port connects to its guest), memory that is not executable.

use std::collections::BTreeMap;

use nix::libc;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::error::{Context, Error, Result};

/// Confines the whole process: becomes `drop_to` (uid, gid) if given, keeps room for
/// `descriptors` open files.
///
/// # Errors
///
/// Any step the kernel refuses: a half confined responder must not serve.
pub fn confine(drop_to: Option<(u32, u32)>, descriptors: u64) -> Result<()> {
    if let Some((uid, gid)) = drop_to {
        become_user(Uid::from_raw(uid), Gid::from_raw(gid))
            .while_doing(|| format!("becoming uid {uid}, gid {gid}"))?;
    }
    drop_capabilities().while_doing(|| "giving up capabilities".into())?;
    limit(descriptors).while_doing(|| "limiting resources".into())?;
    prctl::set_dumpable(false).while_doing(|| "refusing to be traced".into())?;
    let program = filter()?;
    // Sets no_new_privs, too. All threads: a runtime with helpers would leave a hole.
    seccompiler::apply_filter_all_threads(&program)
        .while_doing(|| "installing the system call filter".into())
}

fn become_user(uid: Uid, gid: Gid) -> nix::Result<()> {
    // The kernel forgets it when the user changes.
    let tied_to_parent = prctl::get_pdeathsig()?;
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    prctl::set_pdeathsig(tied_to_parent)
}

/// Empties the permitted, effective and inheritable sets; the ambient set follows.
fn drop_capabilities() -> nix::Result<()> {
    /// `struct __user_cap_header_struct` of `linux/capability.h`, version 3.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let none = [[0_u32; 3]; 2];
    #[expect(unsafe_code)]
    // SAFETY: capset reads a header and, for version 3, two sets of three words; both
    // outlive the call, and nothing is written.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    nix::errno::Errno::result(result).map(drop)
}

fn limit(descriptors: u64) -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let descriptors = descriptors.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NPROC, 0, 0)
}

/// What the event loop, the allocator and the sockets call; nothing else.
const ALLOWED: &[i64] = &[
    // Sockets and the life line.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_close,
    // The event loop.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_futex,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    // Ids of forwarded queries, keys of hash tables.
    libc::SYS_getrandom,
    // The allocator; see `conditional` for what makes memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // The end: returning from `main`, a signal, a panic that aborts.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_getpid,
    libc::SYS_gettid,
];

/// Calls that are allowed with these arguments only.
fn conditional() -> Result<Vec<(i64, Vec<SeccompRule>)>, seccompiler::BackendError> {
    let equals = |index, mask: i32, value: i32| {
        let compare = SeccompCmpOp::MaskedEq(mask as u64);
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, compare, value as u64)
    };
    // Memory that is never executable.
    let no_exec = vec![SeccompRule::new(vec![equals(2, libc::PROT_EXEC, 0)?])?];
    // IPv4 streams, with whichever flags.
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let inet = equals(0, -1, libc::AF_INET)?;
    let stream = equals(1, !flags, libc::SOCK_STREAM)?;
    // A panic ends this process by a signal, and no other.
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let to_itself = vec![SeccompRule::new(vec![equals(0, -1, own)?])?];
    // The standard library's debug check that what it closes is open.
    let is_open = vec![SeccompRule::new(vec![equals(1, -1, libc::F_GETFD)?])?];
    Ok(vec![
        (libc::SYS_fcntl, is_open),
        (libc::SYS_mmap, no_exec.clone()),
        (libc::SYS_mprotect, no_exec),
        (libc::SYS_tgkill, to_itself),
        (libc::SYS_socket, vec![SeccompRule::new(vec![inet, stream])?]),
    ])
}

fn filter() -> Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into().map_err(|_| {
        Error::system("system calls cannot be filtered on this architecture")
            .help("use a machine with x86_64 or aarch64")
    })?;
    let rules = || -> Result<BpfProgram, seccompiler::BackendError> {
        let always = ALLOWED.iter().map(|number| (*number, Vec::new()));
        let rules: BTreeMap<i64, Vec<SeccompRule>> = always.chain(conditional()?).collect();
        let otherwise = SeccompAction::KillProcess;
        SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)?.try_into()
    };
    rules().while_doing(|| "compiling the system call filter".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    /// What a confined process tries; set in the copy of this test that does.
    const ATTEMPT: &str = "PAVO_TEST_ATTEMPT";
    const SURVIVED: i32 = 42;

    fn attempt(what: &str) {
        match what {
            "open" => drop(std::fs::File::open("/etc/hostname")),
            "exec" => drop(nix::unistd::execv(c"/bin/true", &[c"true"])),
            "fork" => fork(),
            "thread" => drop(std::thread::Builder::new().spawn(|| ())),
            "unix" => drop(std::os::unix::net::UnixStream::connect("/run/nothing")),
            "datagram" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            "namespace" => drop(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)),
            "signal" => drop(nix::sys::signal::kill(nix::unistd::getppid(), None)),
            "tgkill" => tgkill(nix::unistd::getppid()),
            "abort" => std::process::abort(),
            "limit" => drop(setrlimit(Resource::RLIMIT_NPROC, 0, 0)),
            "connect" => drop(std::net::TcpStream::connect("127.0.0.1:1")),
            "memory" => assert_eq!(vec![1_u8; 8 << 20].len(), 8 << 20),
            other => panic!("no attempt `{other}`"),
        }
    }

    fn tgkill(process: nix::unistd::Pid) {
        #[expect(unsafe_code)]
        // SAFETY: three integers; signal 0 does nothing.
        unsafe {
            libc::syscall(libc::SYS_tgkill, process.as_raw(), process.as_raw(), 0);
        }
    }

    fn fork() {
        #[expect(unsafe_code)]
        // SAFETY: a child, if there were one, would at once end.
        if let Ok(nix::unistd::ForkResult::Child) = unsafe { nix::unistd::fork() } {
            std::process::abort();
        }
    }

    /// Runs this test again in a process of its own, which confines itself and tries `what`.
    fn confined(what: &str) -> ExitStatus {
        let test = "network::responder::confine::tests::nothing_is_possible_but_to_serve";
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).env(ATTEMPT, what);
        command.output().unwrap().status
    }

    #[test]
    fn nothing_is_possible_but_to_serve() {
        if let Ok(what) = std::env::var(ATTEMPT) {
            confine(None, 64).unwrap();
            attempt(&what);
            std::process::exit(SURVIVED);
        }
        for what in ["connect", "memory"] {
            assert_eq!(confined(what).code(), Some(SURVIVED), "{what} is needed");
        }
        let killed = Some(libc::SIGSYS);
        assert_eq!(confined("abort").signal(), Some(libc::SIGABRT));
        let forbidden = [
            "open",
            "exec",
            "fork",
            "thread",
            "unix",
            "datagram",
            "namespace",
            "signal",
            "tgkill",
            "limit",
        ];
        for what in forbidden {
            let status = confined(what);
            assert_eq!(status.signal(), killed, "{what}: {status}");
        }
    }
}
