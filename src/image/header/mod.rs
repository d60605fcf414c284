//! Reads the headers of disk images that others made, before any tool opens them.
//!
//! A disk image is a program for the tool that opens it: it may name other files
//! (CVE-2022-47951, CVE-2024-32498, CVE-2024-4467) or claim absurd sizes. So nothing
//! is opened by `qemu-img` or QEMU whose header was not read here first, and what
//! they open they are told the format of. Whatever names another file, is encrypted,
//! uses what we do not know, or is not sane is refused with the reason.
//!
//! Only a bounded part of a file is read, whatever its header says. The formats are
//! those of QEMU's `docs/interop/qcow2.txt` and `qed_spec.txt`, VMware's *Virtual Disk
//! Format 5.0*, Microsoft's *Virtual Hard Disk Image Format Specification* and, for
//! VDI, `block/vdi.c` of QEMU, which is its specification.

mod qcow2;
mod qed;
mod vdi;
mod vmdk;
mod vpc;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;

use crate::error::{Context, Error, Result};

/// Larger disks do not exist; larger numbers only wear tools out.
pub const MAX_SIZE: u64 = 64 << 40;

/// The formats that can be imported, under QEMU's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Qcow2,
    Qed,
    Raw,
    Vdi,
    Vmdk,
    /// Virtual PC, `.vhd`
    Vpc,
}

impl Format {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Qed => "qed",
            Self::Raw => "raw",
            Self::Vdi => "vdi",
            Self::Vmdk => "vmdk",
            Self::Vpc => "vpc",
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "qcow2" => Ok(Self::Qcow2),
            "qed" => Ok(Self::Qed),
            "raw" | "img" => Ok(Self::Raw),
            "vdi" => Ok(Self::Vdi),
            "vmdk" => Ok(Self::Vmdk),
            "vpc" | "vhd" => Ok(Self::Vpc),
            _ => Err(Error::usage(format!("`{}` is not an image format", text.escape_debug()))
                .help("the formats are qcow2, qed, raw, vdi, vmdk and vpc")),
        }
    }
}

/// What an image says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub format: Format,
    /// The size of the disk in bytes.
    pub virtual_size: u64,
    /// The file below this one; only layers of a repository may have one.
    pub backing: Option<Backing>,
}

/// The file that holds what a layer does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// As it is written in the header.
    pub file: String,
    /// Its format, if the header says so.
    pub format: Option<String>,
}

/// Reads the header of an image that stands alone.
///
/// # Errors
///
/// [`Kind::Usage`](crate::error::Kind::Usage) with the reason when the image is
/// refused.
pub fn inspect(path: &Path) -> Result<Header> {
    let header = inspect_layer(path)?;
    if let Some(backing) = &header.backing {
        return Err(refused(format!(
            "it needs another file below it, `{}`",
            backing.file.escape_debug()
        )))
        .while_doing(|| format!("checking the image `{}`", path.display()));
    }
    Ok(header)
}

/// As [`inspect`], for a layer: a qcow2 that may have a file below it, which the
/// caller must check.
pub fn inspect_layer(path: &Path) -> Result<Header> {
    let read = || -> Result<Header> {
        // Neither wait for the other end of a pipe, nor follow what is not a file.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(path)
            .while_doing(|| "opening it".into())?;
        let data = file.metadata().while_doing(|| "looking at it".into())?;
        if !data.is_file() {
            return Err(refused("it is not a regular file"));
        }
        parse(&Image { file: &file, len: data.len() })
    };
    read().while_doing(|| format!("checking the image `{}`", path.display()))
}

/// Recognises the format by its mark and checks the header.
fn parse(image: &Image<'_, impl ReadAt>) -> Result<Header> {
    let head = image.read(0, 512)?;
    let header = match &head[..4] {
        b"QFI\xfb" => qcow2::parse(image)?,
        b"QED\0" => qed::parse(image)?,
        b"KDMV" => vmdk::parse(image)?,
        b"COWD" => return Err(refused("it is a VMDK of ESX, which is not supported")),
        b"LUKS" => return Err(refused("it is encrypted")),
        _ if head.starts_with(b"# Disk Desc") => {
            return Err(refused("it is a VMDK text descriptor: its data is in other files"));
        }
        _ if head.starts_with(b"vhdxfile") => return Err(refused("VHDX is not supported")),
        _ if head.starts_with(b"Withou") => return Err(refused("Parallels is not supported")),
        _ if vdi::is_mark(&head) => vdi::parse(image)?,
        _ => match vpc::find_footer(image, &head)? {
            Some(footer) => vpc::parse(image, &footer)?,
            None if image.len == 0 => return Err(refused("it is empty")),
            None => Header { format: Format::Raw, virtual_size: image.len, backing: None },
        },
    };
    if header.virtual_size > MAX_SIZE {
        return Err(refused(format!("a disk of {} bytes is absurd", header.virtual_size)));
    }
    if header.virtual_size == 0 {
        return Err(refused("the disk has no size"));
    }
    Ok(header)
}

fn refused(why: impl Into<String>) -> Error {
    Error::usage(why)
}

/// Refuses unless `sane`.
fn ensure(sane: bool, why: &str) -> Result<()> {
    if sane { Ok(()) } else { Err(refused(why)) }
}

/// What headers are read from.
trait ReadAt {
    /// Fills `bytes` from `offset` on, as far as there is something.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let mut filled = 0;
        while filled < bytes.len() {
            match FileExt::read_at(self, &mut bytes[filled..], offset + filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }
}

struct Image<'a, R> {
    file: &'a R,
    len: u64,
}

impl<R: ReadAt> Image<'_, R> {
    /// Exactly `count` bytes; what lies behind the end of the file is zero, so that
    /// a short file fails by what it lacks.
    fn read(&self, offset: u64, count: usize) -> Result<Vec<u8>> {
        debug_assert!(count <= 1 << 20, "reads are bounded");
        let mut bytes = vec![0; count];
        if offset < self.len {
            self.file.read_at(&mut bytes, offset).while_doing(|| "reading its header".into())?;
        }
        Ok(bytes)
    }

    /// Whether `count` entries of `size` bytes at `offset` lie in the file.
    fn holds(&self, offset: u64, count: u64, size: u64) -> bool {
        count
            .checked_mul(size)
            .and_then(|bytes| offset.checked_add(bytes))
            .is_some_and(|end| end <= self.len)
    }
}

macro_rules! numbers {
    ($($name:ident $type:ty, $from:ident;)*) => {$(
        /// The number at `at`, which the caller has read.
        fn $name(bytes: &[u8], at: usize) -> $type {
            const SIZE: usize = size_of::<$type>();
            <$type>::$from(bytes[at..at + SIZE].try_into().expect("that many bytes"))
        }
    )*};
}

numbers! {
    be32 u32, from_be_bytes;
    be64 u64, from_be_bytes;
    le16 u16, from_le_bytes;
    le32 u32, from_le_bytes;
    le64 u64, from_le_bytes;
}

#[cfg(test)]
mod tests;
