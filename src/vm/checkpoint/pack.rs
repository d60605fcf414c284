//! Files of a checkpoint: packed by `zstd`, in a process of its own beside QEMU and us.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use sha2::{Digest, Sha256};
use tempfile::TempPath;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use crate::error::{Context, Error, Result};
use crate::host::spawn;
use crate::model::checkpoint::Stored;

/// What is read at once, and what a pipe is to hold.
const CHUNK: usize = 1 << 20;
/// Of zeros as long as this, and at such places, nothing is written.
const BLOCK: usize = 64 << 10;

/// A pipe; both ends are closed to children.
pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (from, to) = pipe2(OFlag::O_CLOEXEC).while_doing(|| "making a pipe".into())?;
    // A smaller one only takes longer.
    let _ = fcntl(&to, FcntlArg::F_SETPIPE_SZ(CHUNK as i32));
    Ok((from, to))
}

fn zstd(options: &[&str], input: Stdio, output: Stdio) -> Result<Child> {
    let mut command = std::process::Command::new("zstd");
    command.arg("-q").args(options).stdin(input).stdout(output).stderr(Stdio::piped());
    // A Ctrl-C at the launcher's terminal is for the launcher.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    spawn::die_with_parent(&mut command);
    let mut command = Command::from(command);
    command.kill_on_drop(true).spawn().map_err(|error| {
        Error::system("`zstd` does not start")
            .because(error)
            .help("install it on the hosts of VMs (Debian: zstd)")
    })
}

/// Waits for a `zstd` that has said all it had to say.
pub(super) async fn done(child: Child) -> Result<()> {
    let doing = || "running `zstd`".to_owned();
    let output = child.wait_with_output().await.while_doing(doing)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let said = if said.is_empty() { output.status.to_string() } else { said };
    Err(Error::system(said)).while_doing(doing)
}

/// The files that were made: removed with it, unless they are kept.
#[derive(Debug)]
pub(super) struct Made(Mutex<Option<Vec<TempPath>>>);

impl Default for Made {
    fn default() -> Self {
        Self(Mutex::new(Some(Vec::new())))
    }
}

impl Made {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<TempPath>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one. What comes too late is removed at once.
    fn make(&self, path: &Path) -> io::Result<File> {
        let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
        let made = TempPath::try_from_path(path)?;
        match &mut *self.lock() {
            Some(all) => all.push(made),
            None => return Err(io::Error::other("it is not wanted any more")),
        }
        Ok(file)
    }

    /// They stay.
    pub(super) fn keep(&self) {
        for file in self.lock().iter_mut().flat_map(|all| all.drain(..)) {
            // It does nothing but not remove it.
            let _ = file.keep();
        }
    }

    /// There are none any more, and will not be.
    pub(super) fn remove(&self) {
        let all = self.lock().take();
        drop(all);
    }
}

/// Packs all that comes from `input` into a new file, which is on disk on return.
///
/// # Errors
/// When the file exists, or has no room.
pub(super) async fn pack(
    input: impl Into<Stdio>,
    dir: &Path,
    name: String,
    made: &Arc<Made>,
) -> Result<Stored> {
    let path = dir.join(&name);
    let doing = || format!("writing `{}`", path.display());
    // A file server that does not answer keeps a thread waiting, and not the VM's process.
    let make = {
        let (made, path) = (made.clone(), path.clone());
        move || made.make(&path)
    };
    let file = tokio::task::spawn_blocking(make).await.while_doing(doing)?.while_doing(doing)?;
    // The fastest level: what is written is to be less than the disk's time, not the least.
    let mut child = zstd(&["-1", "-T1", "-c"], input.into(), Stdio::piped())?;
    let mut output = child.stdout.take().ok_or_else(|| Error::bug("zstd has no output"))?;
    let mut sink = Sink { file: Some(file), hash: Sha256::new(), bytes: 0 };
    let mut chunk = vec![0; CHUNK];
    loop {
        let mut filled = 0;
        while filled < chunk.len() {
            let count = output.read(&mut chunk[filled..]).await;
            match count.while_doing(|| "reading from `zstd`".into())? {
                0 => break,
                count => filled += count,
            }
        }
        let write = move || {
            let written = sink.take(&chunk[..filled]);
            (written, chunk, sink)
        };
        let written;
        (written, chunk, sink) =
            tokio::task::spawn_blocking(write).await.while_doing(|| "writing".into())?;
        written.while_doing(doing).map_err(|error| error.help("see that there is room: `df`"))?;
        if filled < CHUNK {
            break;
        }
    }
    done(child).await?;
    let sync = move || sink.file.as_ref().map_or(Ok(()), File::sync_all).map(|()| sink);
    let synced = tokio::task::spawn_blocking(sync).await;
    let mut sink = synced.while_doing(|| "writing".into())?.while_doing(doing)?;
    let hash = std::mem::take(&mut sink.hash).finalize();
    Ok(Stored { name, bytes: sink.bytes, sha256: hex(&hash) })
}

struct Sink {
    /// Absent only at its end.
    file: Option<File>,
    hash: Sha256,
    bytes: u64,
}

impl Drop for Sink {
    /// Closing a file of a file server may have to wait for it.
    fn drop(&mut self) {
        let file = self.file.take();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(file))),
            Err(_) => drop(file),
        }
    }
}

impl Sink {
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.as_mut().map_or(Ok(()), |file| file.write_all(bytes))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads a file to its end and compares it with what was written. What is read of the file that
/// is returned is the same, whatever has its name by then.
///
/// # Errors
/// When it is something else, or `wanted` says that nobody waits any more.
pub(super) fn verify(dir: &Path, stored: &Stored, wanted: &dyn Fn() -> bool) -> Result<File> {
    let path = dir.join(&stored.name);
    let doing = || format!("checking `{}`", path.display());
    let mut file = File::open(&path).while_doing(doing)?;
    let (mut hash, mut bytes, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK]);
    loop {
        let count = file.read(&mut chunk).while_doing(doing)?;
        if count == 0 {
            break;
        }
        if !wanted() {
            return Err(Error::usage("nobody waits for it any more")).while_doing(doing);
        }
        hash.update(&chunk[..count]);
        bytes += count as u64;
    }
    if (bytes, hex(&hash.finalize())) == (stored.bytes, stored.sha256.clone()) {
        file.rewind().while_doing(doing)?;
        return Ok(file);
    }
    let error = Error::config("it is damaged, and not what was written");
    Err(error.help("use another one, or the file from a backup")).while_doing(doing)
}

/// A process that unpacks a file into `output`.
///
/// # Errors
/// When there is no `zstd`.
pub(super) fn unpack_to(file: File, output: impl Into<Stdio>) -> Result<Child> {
    zstd(&["-d", "-c"], file.into(), output.into())
}

/// Unpacks a file, known by this name, into a new one, without the zeros.
///
/// # Errors
/// When it cannot be read, the other exists, or has no room.
pub(super) async fn unpack(packed: File, path: &Path, target: &Path) -> Result<()> {
    let doing = || format!("writing `{}`", target.display());
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(target);
    let mut child = unpack_to(packed, Stdio::piped())?;
    let output = child.stdout.take().ok_or_else(|| Error::bug("zstd has no output"))?;
    let output = output.into_owned_fd().while_doing(|| "reading from `zstd`".into())?;
    let write = move || {
        let mut from = File::from(output);
        // Tokio has left it so.
        let flags = OFlag::from_bits_retain(fcntl(&from, FcntlArg::F_GETFL)?);
        fcntl(&from, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        let file =
            file.as_mut().map_err(|error| io::Error::new(error.kind(), error.to_string()))?;
        copy_sparse(&mut from, file)
    };
    let written = tokio::task::spawn_blocking(write).await.while_doing(|| "writing".into())?;
    // Its own word first: a file that ends early is no fault of the disk's.
    let unpacked = done(child).await.while_doing(|| format!("reading `{}`", path.display()));
    written.while_doing(doing)?;
    unpacked
}

fn copy_sparse(from: &mut impl Read, to: &File) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let (mut at, mut block) = (0, vec![0; BLOCK]);
    loop {
        let mut filled = 0;
        while filled < BLOCK {
            match from.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if block[..filled].iter().any(|byte| *byte != 0) {
            to.write_all_at(&block[..filled], at)?;
        }
        at += filled as u64;
        if filled < BLOCK {
            return to.set_len(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_packed_comes_out_as_it_was_and_a_changed_byte_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, copy) = (dir.path().join("plain"), dir.path().join("copy"));
        let mut bytes = vec![0; 3 * BLOCK + 77];
        (bytes[5], bytes[3 * BLOCK + 70]) = (1, 2);
        std::fs::write(&plain, &bytes).unwrap();
        let input = || File::open(&plain).unwrap();
        let (made, name) = (Arc::new(Made::default()), "vm0.disk.zst");
        let stored = pack(input(), dir.path(), name.into(), &made).await.unwrap();
        let path = dir.path().join(name);
        assert_eq!(path.metadata().unwrap().len(), stored.bytes);
        let verified = || verify(dir.path(), &stored, &|| true).unwrap();
        assert!(verify(dir.path(), &stored, &|| false).is_err());
        let file = verified();
        // What was compared is what is read, whatever has its name meanwhile.
        let aside = dir.path().join("aside");
        std::fs::rename(&path, &aside).unwrap();
        std::fs::write(&path, "another").unwrap();
        unpack(file, &path, &copy).await.unwrap();
        std::fs::rename(&aside, &path).unwrap();
        assert!(std::fs::read(&copy).unwrap() == bytes);
        assert!(unpack(verified(), &path, &copy).await.is_err(), "it is there already");

        // Another's file of the same name is left alone.
        assert!(pack(input(), dir.path(), name.into(), &made).await.is_err());
        verify(dir.path(), &stored, &|| true).unwrap();
        let mut packed = std::fs::read(&path).unwrap();
        let last = packed.len() - 1;
        packed[last] ^= 1;
        std::fs::write(&path, packed).unwrap();
        let error = verify(dir.path(), &stored, &|| true).unwrap_err().report();
        assert!(error.contains("it is damaged"), "{error}");
        let other = dir.path().join("other");
        let damaged = File::open(&path).unwrap();
        let error = unpack(damaged, &path, &other).await.unwrap_err().report();
        assert!(error.contains("because: running `zstd`"), "{error}");
        made.remove();
        assert!(!path.exists(), "it was not to be kept");
        // One that is opened late, as a slow file server lets it be.
        let error = pack(input(), dir.path(), name.into(), &made).await.unwrap_err().report();
        assert!(error.contains("it is not wanted any more") && !path.exists(), "{error}");
        let made = Arc::new(Made::default());
        pack(input(), dir.path(), name.into(), &made).await.unwrap();
        made.keep();
        made.remove();
        assert!(path.exists(), "it was to be kept");
    }

    #[test]
    fn a_file_server_that_does_not_answer_keeps_nobody_else_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let made = Arc::new(Made::default());
        let (name, plain) = ("vm0.disk.zst", dir.path().join("plain"));
        std::fs::write(&plain, "x").unwrap();
        // Whoever opens the file waits, as one does for a server.
        let held = made.clone();
        let lock = held.lock();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let packing = pack(File::open(&plain).unwrap(), dir.path(), name.into(), &made);
            let moment = std::time::Duration::from_millis(100);
            assert!(tokio::time::timeout(moment, packing).await.is_err());
        });
        drop(lock);
        made.remove();
        // Its threads have ended.
        drop(runtime);
        assert!(!dir.path().join(name).exists());
    }
}
