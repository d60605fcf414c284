//! A copy of a guest's memory, for `crash`, `gdb` and others that read ELF or kdump.
//!
//! QEMU writes it (`dump-guest-memory`) into a pipe, and this process into the file. QEMU
//! cannot be told to stop, and the guest stands still until it has; but once nobody reads the
//! pipe it gives up, and the guest goes on at once, whoever died and whatever is full.
//!
//! The file has no name until it is whole, so that none is left half done.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl};
use nix::unistd::{linkat, pipe2};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::qmp;
use super::save::{FIRST_LOOK, LOOKS, Progress};
use crate::error::{Context, Error, Kind, Result};

mod kdump;

use kdump::Flat;

/// What QEMU calls the descriptor.
const FD: &str = "dump";
/// What is read from QEMU at once, and what the pipe is to hold.
const CHUNK: usize = 1 << 20;
/// Zeros of this length, and at such places, need not be there.
const BLOCK: usize = 64 << 10;
/// How long QEMU may take to notice that nobody reads any more.
const GIVE_UP: Duration = Duration::from_secs(10);

/// What is to be written where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// The new file, absolute, as the VM's host sees it; nothing is there yet.
    pub file: PathBuf,
    pub format: Format,
}

/// How memory is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// As it is.
    Elf,
    /// Compressed, page by page.
    KdumpZlib,
}

impl Format {
    /// QEMU's name of it. Kdump comes as it is written to a pipe: [`kdump`] puts it in order.
    fn name(self) -> &'static str {
        match self {
            Self::Elf => "elf",
            Self::KdumpZlib => "kdump-zlib",
        }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dumped {
    pub bytes: u64,
}

/// Writes a guest's memory, telling how far it is; when nobody listens, nobody wants it any
/// more. The guest stands still meanwhile.
///
/// # Errors
/// When there is such a file, it cannot be made, or has no room.
pub async fn dump(qmp: &qmp::Client, wish: &Wish, tell: mpsc::Sender<Progress>) -> Result<Dumped> {
    let path = &wish.file;
    let doing = || format!("writing `{}`", path.display());
    let unnamed = Unnamed::make(path).while_doing(doing)?;
    offered(qmp, wish.format).await?;
    let (from, to) = pipe()?;
    let sink = Sink::new(unnamed.file()?, wish.format);
    qmp.send_descriptor(FD, to).await.while_doing(|| "handing QEMU a pipe".into())?;
    let begin = json!({
        "paging": false,
        "protocol": format!("fd:{FD}"),
        "detach": true,
        "format": wish.format.name(),
    });
    if let Err(error) = call(qmp, "dump-guest-memory", begin).await {
        // It takes the descriptor only if it begins; the first error says more.
        let _ = call(qmp, "closefd", json!({ "fdname": FD })).await;
        return Err(error);
    }
    if let Err(error) = receive(qmp, &tell, from, sink).await {
        // Nobody reads any more: another one can begin once QEMU has seen that.
        let _ = timeout(GIVE_UP, given_up(qmp)).await;
        return Err(error).while_doing(doing);
    }
    let bytes = unnamed.bytes()?;
    unnamed.name(path).while_doing(doing)?;
    Ok(Dumped { bytes })
}

/// A pipe from QEMU.
fn pipe() -> Result<(pipe::Receiver, OwnedFd)> {
    let make = || -> io::Result<_> {
        let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
        // A smaller one only takes longer.
        let _ = fcntl(&to, FcntlArg::F_SETPIPE_SZ(CHUNK as i32));
        Ok((pipe::Receiver::from_owned_fd(from)?, to))
    };
    make().while_doing(|| "making a pipe".into())
}

async fn call(qmp: &qmp::Client, command: &str, arguments: Value) -> Result<Value> {
    qmp.call(command, arguments).await.while_doing(|| format!("telling QEMU `{command}`"))
}

/// Refuses a format that this QEMU does not write.
async fn offered(qmp: &qmp::Client, format: Format) -> Result<()> {
    let can = call(qmp, "query-dump-guest-memory-capability", json!({})).await?;
    let mut known = can["formats"].as_array().into_iter().flatten();
    if known.any(|known| *known == format.name()) {
        return Ok(());
    }
    let text = format!("this VM's QEMU does not write the format `{}`", format.name());
    Err(Error::usage(text).help("leave `--compress` away"))
}

/// A dump of QEMU's, as it says.
#[derive(Deserialize)]
struct Dump {
    status: String,
    completed: u64,
    total: u64,
}

async fn look(qmp: &qmp::Client) -> Result<Dump> {
    let dump = call(qmp, "query-dump", json!({})).await?;
    serde_json::from_value(dump).while_doing(|| "reading QEMU's answer".into())
}

/// Until all is written.
async fn receive(
    qmp: &qmp::Client,
    tell: &mpsc::Sender<Progress>,
    from: pipe::Receiver,
    sink: Sink,
) -> Result<()> {
    let pump = pump(from, sink);
    tokio::pin!(pump);
    let mut pause = FIRST_LOOK;
    loop {
        tokio::select! {
            () = tell.closed() => return Err(Error::usage("nobody waits for the dump any more")),
            written = &mut pump => {
                written?;
                return match &*look(qmp).await?.status {
                    "completed" => Ok(()),
                    _ => Err(Error::system("QEMU has not written it all")),
                };
            }
            () = sleep(pause) => {
                let dump = look(qmp).await?;
                // Nobody there is seen at once, above.
                let _ = tell.send(Progress { done: dump.completed, total: dump.total.max(1) }).await;
                pause = (pause * 2).min(LOOKS);
            }
        }
    }
}

/// Writes what comes, until there is no more.
async fn pump(mut from: pipe::Receiver, mut sink: Sink) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = from.read(&mut chunk).await.while_doing(|| "reading from QEMU".into())?;
        let write = move || {
            let done = if count == 0 { sink.finish() } else { sink.write(&chunk[..count]) };
            (done, chunk, sink)
        };
        let written = tokio::task::spawn_blocking(write).await;
        let done;
        (done, chunk, sink) = written.while_doing(|| "writing the file".into())?;
        done.while_doing(|| "writing the file".into())
            .map_err(|error| error.help("see that there is room: `df`"))?;
        if count == 0 {
            return Ok(());
        }
    }
}

async fn given_up(qmp: &qmp::Client) {
    while look(qmp).await.is_ok_and(|dump| dump.status == "active") {
        sleep(FIRST_LOOK).await;
    }
}

/// Where what QEMU says goes.
#[derive(Debug)]
struct Sink {
    sparse: Sparse,
    /// The place of what comes next; of kdump it says so itself.
    at: u64,
    flat: Option<Flat>,
}

impl Sink {
    fn new(file: File, format: Format) -> Self {
        let flat = (format == Format::KdumpZlib).then(Flat::default);
        Self { sparse: Sparse { file, end: 0 }, at: 0, flat }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Self { sparse, at, flat } = self;
        match flat {
            Some(flat) => flat.read(bytes, |at, part| sparse.write(at, part)),
            None => {
                sparse.write(*at, bytes)?;
                *at += bytes.len() as u64;
                Ok(())
            }
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.flat.as_ref().is_some_and(|flat| !flat.is_whole()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.sparse.file.set_len(self.sparse.end)
    }
}

/// A new file, without its zeros.
#[derive(Debug)]
struct Sparse {
    file: File,
    end: u64,
}

impl Sparse {
    fn write(&mut self, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
        self.end = self.end.max(at + bytes.len() as u64);
        while !bytes.is_empty() {
            let to_edge = BLOCK - (at % BLOCK as u64) as usize;
            let (block, rest) = bytes.split_at(to_edge.min(bytes.len()));
            if block.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(block, at)?;
            }
            (at, bytes) = (at + block.len() as u64, rest);
        }
        Ok(())
    }
}

/// A file that vanishes unless it gets its name.
#[derive(Debug)]
enum Unnamed {
    Nameless(File),
    /// Where the file system has no such files (NFS): one with a name that nobody asked for.
    Temporary(NamedTempFile),
}

impl Unnamed {
    /// A file where `path` is to be, which only its user may read.
    fn make(path: &Path) -> Result<Self> {
        if !path.is_absolute() {
            return Err(Error::usage("the path is not absolute"));
        }
        if path.symlink_metadata().is_ok() {
            return Err(exists());
        }
        let dir = path.parent().unwrap_or(path);
        let flags = OFlag::O_TMPFILE.bits();
        let nameless = File::options().write(true).mode(0o600).custom_flags(flags).open(dir);
        match nameless {
            Ok(file) => Ok(Self::Nameless(file)),
            // What is wrong with the folder this says, too.
            Err(_) => tempfile::Builder::new()
                .prefix(".pavo-dump-")
                .tempfile_in(dir)
                .map(Self::Temporary)
                // The name that it would have had is nobody's business.
                .map_err(|error| {
                    let beneath = error.get_ref().and_then(|it| it.source());
                    let beneath = beneath.and_then(|it| it.downcast_ref::<io::Error>());
                    match beneath.and_then(io::Error::raw_os_error) {
                        Some(number) => io::Error::from_raw_os_error(number),
                        None => error,
                    }
                })
                .while_doing(|| format!("making a file in `{}`", dir.display())),
        }
    }

    fn file(&self) -> Result<File> {
        let file = match self {
            Self::Nameless(file) => file,
            Self::Temporary(temporary) => temporary.as_file(),
        };
        file.try_clone().while_doing(|| "copying a descriptor".into())
    }

    fn bytes(&self) -> Result<u64> {
        let about = self.file()?.metadata().while_doing(|| "looking at the file".into())?;
        // Pages of zeros need not be there.
        Ok(about.len().min(about.blocks() * 512))
    }

    fn name(self, path: &Path) -> Result<()> {
        let named = match self {
            Self::Nameless(file) => {
                let from = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                let here = nix::fcntl::AT_FDCWD;
                linkat(here, &from, here, path, AtFlags::AT_SYMLINK_FOLLOW).map_err(io::Error::from)
            }
            Self::Temporary(temporary) => {
                temporary.persist_noclobber(path).map(drop).map_err(|error| error.error)
            }
        };
        named.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => exists(),
            _ => Error::new(Kind::System, "giving it its name").because(error),
        })
    }
}

fn exists() -> Error {
    Error::usage("something is there already").help("remove it, or name another file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_take_no_room_and_all_else_is_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let mut all = vec![0; 5 * BLOCK + 77];
        (all[0], all[3 * BLOCK + 5]) = (1, 2);
        let mut sink = Sink::new(File::create(&path).unwrap(), Format::Elf);
        all.chunks(1000).for_each(|part| sink.write(part).unwrap());
        sink.finish().unwrap();
        assert!(std::fs::read(&path).unwrap() == all);
        assert!(path.metadata().unwrap().blocks() * 512 < 3 * BLOCK as u64);
        let mut cut = Sink::new(File::create(&path).unwrap(), Format::KdumpZlib);
        cut.finish().unwrap_err();
    }

    #[test]
    fn a_file_is_there_once_it_is_whole_and_replaces_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let count = || std::fs::read_dir(dir.path()).unwrap().count();
        drop(Unnamed::make(&path).unwrap());
        assert_eq!(count(), 0);
        let temporary = || {
            let made = tempfile::Builder::new().tempfile_in(dir.path());
            Unnamed::Temporary(made.unwrap())
        };
        drop(temporary());
        assert_eq!(count(), 0);

        let (first, second, third) =
            (Unnamed::make(&path).unwrap(), Unnamed::make(&path).unwrap(), temporary());
        first.file().unwrap().write_all_at(b"first", 0).unwrap();
        first.name(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        for late in [second.name(&path), third.name(&path), Unnamed::make(&path).map(drop)] {
            assert_eq!(late.unwrap_err().to_string(), "something is there already");
        }
        assert_eq!((std::fs::read(&path).unwrap(), count()), (b"first".to_vec(), 1));
        let error = Unnamed::make(&dir.path().join("absent/memory")).unwrap_err();
        assert!(error.report().contains("No such file"), "{}", error.report());
    }
}
