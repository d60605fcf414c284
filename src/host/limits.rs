//! How many files this process may have open.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The soft limit before it was raised.
static FORMER: OnceLock<u64> = OnceLock::new();

/// Raises the soft limit to the hard one. Programs of others, which may take a descriptor of
/// more than 1023 badly, are to be started with [`restore_open_files`].
pub fn raise_open_files() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() {
        // Raised twice, the first one counts.
        let _ = FORMER.set(soft);
    }
}

/// Lets the child have the limit as it was.
pub fn restore_open_files(command: &mut Command) {
    let Some(soft) = FORMER.get().copied() else { return };
    let restore = move || {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard), hard)?)
    };
    #[expect(unsafe_code)]
    // SAFETY: runs between fork and exec; getrlimit and setrlimit are system calls, and
    // nothing is allocated or locked.
    unsafe {
        command.pre_exec(restore)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_for_us_and_not_for_others() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let low = soft.min(512);
        setrlimit(Resource::RLIMIT_NOFILE, low, hard).unwrap();
        raise_open_files();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -Sn"]);
        restore_open_files(&mut command);
        let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert_eq!(said.trim(), low.to_string());
    }
}
