//! Starting a command: as whom, where, with what.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;
use nix::pty::{Winsize, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{Gid, Pid, Uid, fchown, pipe2, setgid, setgroups, setsid, setuid};
use pavo_agent::{Exec, Failure, Size};

use super::account::Account;
use super::port::do_not_wait;

/// Where programs are looked for, unless the caller says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command that runs, and our ends of its streams.
#[derive(Debug)]
pub struct Spawned {
    pub child: Child,
    pub input: Option<File>,
    pub output: File,
    /// Absent on a terminal.
    pub errors: Option<File>,
    pub user: String,
}

/// Starts it, in a session of its own.
pub fn spawn(exec: &Exec) -> Result<Spawned, Failure> {
    let account = account(exec)?;
    let mut program = Program::of(exec)?;
    environment(&mut program.command, exec, &account);
    let mut streams =
        Streams::make(exec, &account).map_err(|error| failed("its streams", &error))?;
    let ends = streams.theirs.take().expect("they were just made");
    program.command.stdin(ends.0).stdout(ends.1).stderr(ends.2);
    let script = program.script.as_ref().map(AsRawFd::as_raw_fd);
    enter(&mut program.command, exec, &account, script)?;
    let child = program.command.spawn().map_err(|error| program.why(&error, exec))?;
    let Streams { input, output, errors, .. } = streams;
    Ok(Spawned { child, input, output, errors, user: account.name })
}

fn failed(what: &str, error: &io::Error) -> Failure {
    Failure { why: format!("{what}: {error}"), code: 126 }
}

fn account(exec: &Exec) -> Result<Account, Failure> {
    let Some(name) = &exec.user else { return Ok(Account::own()) };
    let name = String::from_utf8_lossy(name);
    let account = Account::find(&name)
        .ok_or_else(|| Failure { why: format!("the guest has no user `{name}`"), code: 126 })?;
    if account.uid != nix::unistd::geteuid().as_raw() && !nix::unistd::geteuid().is_root() {
        return Err(Failure {
            why: format!("the agent is not root: it cannot be `{name}`"),
            code: 126,
        });
    }
    Ok(account)
}

/// What is executed.
struct Program {
    command: Command,
    name: String,
    /// A script is a file that only this process and the command have.
    script: Option<OwnedFd>,
}

impl Program {
    fn of(exec: &Exec) -> Result<Self, Failure> {
        let words: Vec<&OsStr> = exec.argv.iter().map(|word| OsStr::from_bytes(word)).collect();
        let (first, rest) = match (&*words, &exec.script) {
            ([first, rest @ ..], _) => (*first, rest),
            ([], Some(_)) => (OsStr::new("script"), &[][..]),
            ([], None) => return Err(Failure { why: "no command was given".into(), code: 127 }),
        };
        let name = first.to_string_lossy().into_owned();
        let Some(script) = &exec.script else {
            let mut command = Command::new(first);
            command.args(rest);
            return Ok(Self { command, name, script: None });
        };
        let file = script_file(script).map_err(|error| failed("the script", &error))?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut command = if script.starts_with(b"#!") {
            Command::new(path)
        } else {
            let mut command = Command::new("/bin/sh");
            command.arg(path);
            command
        };
        command.args(rest);
        Ok(Self { command, name, script: Some(file) })
    }

    fn why(&self, error: &io::Error, exec: &Exec) -> Failure {
        let name = &self.name;
        let code = if error.kind() == ErrorKind::NotFound { 127 } else { 126 };
        let why = match (error.kind(), &exec.cwd) {
            (_, Some(cwd)) if !std::path::Path::new(OsStr::from_bytes(cwd)).is_dir() => {
                let cwd = String::from_utf8_lossy(cwd);
                return Failure { why: format!("there is no folder `{cwd}`"), code: 126 };
            }
            (ErrorKind::NotFound, _) if self.script.is_some() => {
                "the script's interpreter is not there".into()
            }
            (ErrorKind::NotFound, _) => format!("there is no program `{name}`"),
            _ => format!("`{name}` cannot be run: {error}"),
        };
        Failure { why, code }
    }
}

/// The script as a file without a name, which the interpreter opens by its descriptor.
fn script_file(script: &[u8]) -> io::Result<OwnedFd> {
    let file = memfd_create(c"script", MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(file);
    file.write_all(script)?;
    // Anybody may be who runs it; nobody else can reach it.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(file.into())
}

/// What the user has from logging in, and what the caller adds.
fn environment(command: &mut Command, exec: &Exec, account: &Account) {
    command.env_clear().env("PATH", PATH).env("HOME", &account.home);
    command.env("USER", &account.name).env("LOGNAME", &account.name).env("SHELL", &account.shell);
    if exec.terminal.is_some() {
        command.env("TERM", "xterm");
    }
    for (name, value) in exec.env.iter().filter_map(|word| parted(word)) {
        command.env(name, value);
    }
    for (list, before) in [(&exec.prefixes, true), (&exec.suffixes, false)] {
        for (name, value) in list.iter().filter_map(|word| parted(word)) {
            let now = command.get_envs().find(|(known, _)| *known == name);
            let now = now.and_then(|(_, value)| value).unwrap_or_default().to_owned();
            let (first, last) = if before { (value, now) } else { (now, value) };
            let colon = if first.is_empty() || last.is_empty() { "" } else { ":" };
            let all = [first.as_bytes(), colon.as_bytes(), last.as_bytes()].concat();
            command.env(name, OsString::from_vec(all));
        }
    }
}

/// `NAME=VALUE`
fn parted(word: &[u8]) -> Option<(OsString, OsString)> {
    let at = word.iter().position(|byte| *byte == b'=').filter(|at| *at > 0)?;
    let part = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    Some((part(&word[..at]), part(&word[at + 1..])))
}

/// Both ends of a command's streams.
struct Streams {
    input: Option<File>,
    output: File,
    errors: Option<File>,
    theirs: Option<(Stdio, Stdio, Stdio)>,
}

impl Streams {
    fn make(exec: &Exec, account: &Account) -> io::Result<Self> {
        if let Some(size) = exec.terminal {
            return Self::terminal(size, account);
        }
        let (input, stdin) = if exec.input {
            let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
            do_not_wait(&ours)?;
            (Some(File::from(ours)), theirs.into())
        } else {
            (None, Stdio::null())
        };
        let (output, stdout) = pipe2(OFlag::O_CLOEXEC)?;
        let (errors, stderr) = pipe2(OFlag::O_CLOEXEC)?;
        do_not_wait(&output)?;
        do_not_wait(&errors)?;
        Ok(Self {
            input,
            output: output.into(),
            errors: Some(errors.into()),
            theirs: Some((stdin, stdout.into(), stderr.into())),
        })
    }

    fn terminal(size: Size, account: &Account) -> io::Result<Self> {
        // At no time without the flag: other commands begin meanwhile.
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = posix_openpt(flags | OFlag::O_NONBLOCK)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags((OFlag::O_NOCTTY | OFlag::O_CLOEXEC).bits())
            .open(ptsname_r(&master)?)?;
        let master = File::from(master.as_fd().try_clone_to_owned()?);
        resize(&master, size);
        if nix::unistd::geteuid().is_root() {
            fchown(&slave, Some(Uid::from_raw(account.uid)), None)?;
        }
        let again = || slave.try_clone().map(Stdio::from);
        let theirs = (again()?, again()?, again()?);
        let input = Some(master.try_clone()?);
        Ok(Self { input, output: master, errors: None, theirs: Some(theirs) })
    }
}

fn winsize(size: Size) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, Winsize);
nix::ioctl_write_int_bad!(take_terminal, libc::TIOCSCTTY);

/// Tells a terminal its new size, and those on it.
pub fn resize(terminal: &File, size: Size) {
    #[expect(unsafe_code)]
    // SAFETY: the descriptor is open, and the kernel copies a structure that outlives the call.
    let done = unsafe { set_size(terminal.as_raw_fd(), &winsize(size)) };
    // A command that has closed its terminal has no use for it.
    let _ = done;
}

/// Whoever started us may have had signals ignored, as a shell has for what is beside it; and
/// we have blocked that of a child's end, by which shells wait for theirs.
fn ignore_nothing() {
    // Nothing that a command does not know of; it cannot fail.
    let _ = SigSet::empty().thread_set_mask();
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for number in 1..32 {
        if let Ok(signal) = Signal::try_from(number) {
            #[expect(unsafe_code)]
            // SAFETY: the default action runs no code of ours.
            let _ = unsafe { sigaction(signal, &default) };
        }
    }
}

/// The script stays open for its interpreter, and for no other command.
fn keep_open(script: RawFd) -> io::Result<()> {
    #[expect(unsafe_code)]
    // SAFETY: it is open: who makes the fork holds it meanwhile.
    let script = unsafe { BorrowedFd::borrow_raw(script) };
    fcntl(script, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

/// What the child does before it becomes the program.
fn enter(
    command: &mut Command,
    exec: &Exec,
    account: &Account,
    script: Option<RawFd>,
) -> Result<(), Failure> {
    let on_terminal = exec.terminal.is_some();
    let change = (account.uid != nix::unistd::geteuid().as_raw()).then(|| {
        let groups: Vec<Gid> = account.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        (Uid::from_raw(account.uid), Gid::from_raw(account.gid), groups)
    });
    let mut cpus = CpuSet::new();
    for cpu in &exec.cpus {
        let out = |_| Failure { why: format!("there is no CPU {cpu}"), code: 126 };
        cpus.set((*cpu).into()).map_err(out)?;
    }
    let pinned = !exec.cpus.is_empty();
    let path = |bytes: &[u8]| CString::new(bytes).unwrap_or_default();
    // A home that is not there is no reason not to run.
    let home = path(account.home.as_bytes());
    let cwd = exec.cwd.as_deref().map(path);
    let prepare = move || {
        ignore_nothing();
        setsid()?;
        if on_terminal {
            #[expect(unsafe_code)]
            // SAFETY: standard input is the terminal, by what comes before `exec`.
            unsafe { take_terminal(0, 0) }?;
        }
        script.map_or(Ok(()), keep_open)?;
        if pinned {
            sched_setaffinity(Pid::from_raw(0), &cpus)?;
        }
        if let Some((uid, gid, groups)) = &change {
            setgroups(groups)?;
            setgid(*gid)?;
            setuid(*uid)?;
        }
        match &cwd {
            Some(cwd) => nix::unistd::chdir(cwd.as_c_str())?,
            None => {
                let _ = nix::unistd::chdir(home.as_c_str()).or_else(|_| nix::unistd::chdir(c"/"));
            }
        }
        Ok(())
    };
    #[expect(unsafe_code)]
    // SAFETY: system calls only; what they need was made before the fork.
    unsafe {
        command.pre_exec(prepare)
    };
    Ok(())
}
