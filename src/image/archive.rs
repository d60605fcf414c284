//! Disk images that come compressed, as gzip, xz or zstd writes them.
//!
//! What is in them is as foreign as any image: it is unpacked into a folder of ours and
//! checked there. Zeros take no room, so that the raw image of a large empty disk is small.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flate2::bufread::MultiGzDecoder;

use super::convert;
use super::header::MAX_SIZE;
use crate::error::{Context, Error, Result};
use crate::host::spawn;

/// A block is written unless it is all zeros.
const BLOCK: usize = 64 << 10;

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Archive {
    Gzip,
    Xz,
    Zstd,
}

/// Each with its suffix, its mark, and its program with the Debian package of that.
const ALL: [(Archive, &str, &[u8], [&str; 2]); 3] = [
    (Archive::Gzip, "gz", b"\x1f\x8b", ["gzip", "gzip"]),
    (Archive::Xz, "xz", b"\xfd7zXZ\0", ["xz", "xz-utils"]),
    (Archive::Zstd, "zst", b"\x28\xb5\x2f\xfd", ["zstd", "zstd"]),
];

impl Archive {
    /// What a file is by its suffix, or, unless its format `is_said`, by its mark.
    ///
    /// # Errors
    ///
    /// When its suffix claims what its mark denies.
    pub(super) fn of(path: &Path, is_said: bool) -> Result<Option<Self>> {
        let suffix = path.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
        let by_suffix = ALL.iter().find(|known| known.1.eq_ignore_ascii_case(suffix));
        // What cannot be read, and what is no file, is refused by who opens it next.
        let Ok(file) = open(path) else { return Ok(None) };
        let mut head = [0; 6];
        let length = file.read_at(&mut head, 0).unwrap_or_default();
        let by_mark = ALL.iter().find(|known| head[..length].starts_with(known.2));
        match (by_suffix, by_mark) {
            (Some(said), Some(found)) if said.0 == found.0 => Ok(Some(found.0)),
            (Some((_, suffix, ..)), _) => Err(Error::usage(format!(
                "`{}` is not what its name says: it has no {suffix} header",
                path.display()
            ))
            .help("give it a name without that suffix")),
            (None, Some(found)) if !is_said => Ok(Some(found.0)),
            _ => Ok(None),
        }
    }

    /// What the file in it would be called.
    pub(super) fn content(self, path: &Path) -> PathBuf {
        let suffix = path.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
        let is_suffix = ALL.iter().any(|known| known.1.eq_ignore_ascii_case(suffix));
        if is_suffix { path.with_extension("") } else { path.to_owned() }
    }

    /// Writes what is in it to `target`, which must not exist.
    pub(super) fn unpack(self, path: &Path, target: &Path) -> Result<()> {
        let unpack = || -> Result<()> {
            let file = open(path).while_doing(|| "opening it".into())?;
            let mut disk = File::create_new(target).while_doing(|| "creating a file".into())?;
            match self {
                Self::Gzip => {
                    let mut content = MultiGzDecoder::new(BufReader::with_capacity(BLOCK, file));
                    write_sparse(&mut content, &mut disk).while_doing(|| "reading it".into())
                }
                Self::Xz | Self::Zstd => self.run(file, &mut disk),
            }?;
            refuse_tar(target)
        };
        unpack().while_doing(|| format!("unpacking `{}`", path.display()))
    }

    /// Has the archive's own program unpack it.
    fn run(self, file: File, disk: &mut File) -> Result<()> {
        let [program, package] = ALL.iter().find(|known| known.0 == self).expect("all are known").3;
        // To a file: a pipe that nobody reads meanwhile would be full at some time.
        let mut said = tempfile::tempfile().while_doing(|| "creating a file".into())?;
        let stderr = said.try_clone().while_doing(|| "opening a file".into())?;
        let mut command = Command::new(program);
        command.args(["-d", "-c", "-q"]).env("LC_ALL", "C");
        command.stdin(file).stdout(Stdio::piped()).stderr(stderr);
        spawn::die_with_parent(&mut command);
        convert::limit(&mut command);
        let mut child =
            command.spawn().while_doing(|| format!("starting `{program}`")).map_err(|error| {
                error.help(format!("install it: the Debian package is `{package}`"))
            })?;
        let mut content = child.stdout.take().expect("it is piped");
        let written = write_sparse(&mut content, disk);
        // If we have stopped, it must not wait for us.
        drop(content);
        let status = child.wait().while_doing(|| format!("waiting for `{program}`"))?;
        written.while_doing(|| "writing what is in it".into())?;
        if status.success() {
            return Ok(());
        }
        let mut text = String::new();
        let _ = said.rewind().and_then(|()| said.take(4096).read_to_string(&mut text));
        Err(Error::system(format!("{program}: {}: {}", status, text.trim())))
    }
}

fn open(path: &Path) -> io::Result<File> {
    // Neither wait for the other end of a pipe, nor follow what is not a file.
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// Copies all of `content`, and leaves holes where it is zero.
fn write_sparse(content: &mut impl Read, disk: &mut File) -> io::Result<()> {
    let mut block = Vec::with_capacity(BLOCK);
    let mut length = 0;
    loop {
        block.clear();
        let count = content.by_ref().take(BLOCK as u64).read_to_end(&mut block)? as u64;
        length += count;
        if count == 0 {
            return disk.set_len(length);
        }
        if length > MAX_SIZE {
            return Err(io::Error::other("it is absurdly large"));
        }
        match block.iter().all(|byte| *byte == 0) {
            true => drop(disk.seek(SeekFrom::Start(length))?),
            false => disk.write_all(&block)?,
        }
    }
}

/// Several files in one are not a disk, though every file could be a raw one.
fn refuse_tar(path: &Path) -> Result<()> {
    let mut mark = [0; 5];
    let read = File::open(path).and_then(|file| file.read_at(&mut mark, 257));
    match read.while_doing(|| "looking at what is in it".into())? {
        5 if &mark == b"ustar" => Err(Error::usage("a tar archive is in it, not a disk")
            .help("unpack it (`tar -xf`), and import the disk that is in it")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    fn packed(dir: &Path, program: &str, content: &[u8], name: &str) -> PathBuf {
        let (plain, path) = (dir.join("plain"), dir.join(name));
        fs::write(&plain, content).unwrap();
        let mut command = Command::new(program);
        command.args(["-c", "-q"]).arg(plain).stdout(File::create(&path).unwrap());
        assert!(command.status().unwrap().success());
        path
    }

    #[test]
    fn what_was_packed_comes_out_with_holes_for_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = vec![0; 4 << 20];
        disk[1_000_000..1_000_100].fill(7);
        disk.extend(b"end");
        for (archive, suffix, _, [program, _]) in ALL {
            let name = format!("disk.qcow2.{suffix}");
            let path = packed(dir.path(), program, &disk, &name);
            assert_eq!(Archive::of(&path, true).unwrap(), Some(archive));
            assert!(archive.content(&path).ends_with("disk.qcow2"));
            let target = dir.path().join(format!("unpacked-{suffix}"));
            archive.unpack(&path, &target).unwrap();
            assert!(fs::read(&target).unwrap() == disk, "{suffix}");
            assert!(fs::metadata(&target).unwrap().blocks() * 512 < 1 << 20, "{suffix}");

            let bare = dir.path().join("no-suffix");
            fs::copy(&path, &bare).unwrap();
            assert_eq!(Archive::of(&bare, false).unwrap(), Some(archive));
            assert_eq!(Archive::of(&bare, true).unwrap(), None, "it is what they say");

            let whole = fs::read(&path).unwrap();
            fs::write(&path, &whole[..whole.len() - 9]).unwrap();
            let error = archive.unpack(&path, &dir.path().join(suffix)).unwrap_err();
            assert!(error.report().contains(&name), "{error:?}");
        }
    }

    #[test]
    fn what_is_no_archive_of_a_disk_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw.xz");
        fs::write(&path, b"not packed").unwrap();
        let error = Archive::of(&path, false).unwrap_err();
        assert!(error.to_string().ends_with("it has no xz header"), "{error}");
        assert_eq!(Archive::of(Path::new("/dev/zero"), false).unwrap(), None);

        let mut tar = vec![0; 10_240];
        tar[257..262].copy_from_slice(b"ustar");
        let path = packed(dir.path(), "gzip", &tar, "disk.tar.gz");
        let error = Archive::Gzip.unpack(&path, &dir.path().join("out")).unwrap_err();
        assert!(error.report().contains("a tar archive is in it"), "{error:?}");
    }
}
