//! A copy of a guest's memory, for `crash`, `gdb` and others that read ELF or kdump.
//!
//! QEMU writes it (`dump-guest-memory`), into a descriptor that it is handed: it need not be
//! allowed to open the file. The file has no name until it is whole, so that none is left
//! half done, whoever dies; one that is given up costs its room until QEMU is done with it,
//! since QEMU cannot be told to stop.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag};
use nix::unistd::linkat;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use super::qmp;
use super::save::{FIRST_LOOK, LOOKS, Progress};
use crate::error::{Context, Error, Kind, Result};

/// What QEMU calls the descriptor.
const FD: &str = "dump";

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
    /// QEMU's names, the best first. Before 8.2 it can only write the flattened form, as if
    /// to a pipe; `crash` reads both.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Elf => &["elf"],
            Self::KdumpZlib => &["kdump-raw-zlib", "kdump-zlib"],
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
    let format = offered(qmp, wish.format).await?;
    qmp.send_descriptor(FD, unnamed.file()?).await.while_doing(|| "handing QEMU a file".into())?;
    let begin = json!({
        "paging": false,
        "protocol": format!("fd:{FD}"),
        "detach": true,
        "format": format,
    });
    if let Err(error) = call(qmp, "dump-guest-memory", begin).await {
        // It takes the descriptor only if it begins; the first error says more.
        let _ = call(qmp, "closefd", json!({ "fdname": FD })).await;
        return Err(error);
    }
    follow(qmp, &tell, &unnamed).await.while_doing(doing)?;
    let bytes = unnamed.bytes()?;
    unnamed.name(path).while_doing(doing)?;
    Ok(Dumped { bytes })
}

async fn call(qmp: &qmp::Client, command: &str, arguments: Value) -> Result<Value> {
    qmp.call(command, arguments).await.while_doing(|| format!("telling QEMU `{command}`"))
}

/// The name of a format that this QEMU writes.
async fn offered(qmp: &qmp::Client, format: Format) -> Result<&'static str> {
    let can = call(qmp, "query-dump-guest-memory-capability", json!({})).await?;
    let known: Vec<&Value> = can["formats"].as_array().into_iter().flatten().collect();
    let offered = format.names().iter().find(|name| known.iter().any(|known| *known == **name));
    offered.copied().ok_or_else(|| {
        let text = format!("this VM's QEMU does not write the format `{}`", format.names()[0]);
        Error::usage(text).help("leave `--compress` away")
    })
}

/// Until QEMU is done.
async fn follow(qmp: &qmp::Client, tell: &mpsc::Sender<Progress>, unnamed: &Unnamed) -> Result<()> {
    #[derive(Deserialize)]
    struct Dump {
        status: String,
        completed: u64,
        total: u64,
    }
    let mut pause = FIRST_LOOK;
    loop {
        let dump = call(qmp, "query-dump", json!({})).await?;
        let dump: Dump =
            serde_json::from_value(dump).while_doing(|| "reading QEMU's answer".into())?;
        match &*dump.status {
            "completed" => return Ok(()),
            "active" => {}
            _ => return Err(unnamed.why_not()),
        }
        let progress = Progress { done: dump.completed, total: dump.total.max(1) };
        if tell.send(progress).await.is_err() {
            return Err(Error::usage("nobody waits for the dump any more"));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOKS);
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
                .while_doing(|| "making the file".into()),
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

    /// QEMU does not say why it could not write. What writing says now is as good as certain.
    fn why_not(&self) -> Error {
        let failed =
            Error::system("QEMU could not write it all").help("see that there is room: `df`");
        let again = self.file().and_then(|file| {
            let end = file.metadata().map_or(0, |about| about.len());
            file.write_all_at(&[0; 64 << 10], end).while_doing(|| "writing more".into())
        });
        match again {
            Ok(()) => failed,
            Err(error) => failed.because(error),
        }
    }

    fn name(self, path: &Path) -> Result<()> {
        let named = match self {
            Self::Nameless(file) => {
                let from = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                let here = nix::fcntl::AT_FDCWD;
                linkat(here, &from, here, path, AtFlags::AT_SYMLINK_FOLLOW)
                    .map_err(std::io::Error::from)
            }
            Self::Temporary(temporary) => {
                temporary.persist_noclobber(path).map(drop).map_err(|error| error.error)
            }
        };
        named.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => exists(),
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
