//! Empty qcow2 files: the disk a VM writes to, on top of an image, the copy that is taken of
//! such a disk, and the layer that makes an image larger.
//!
//! Written here rather than by `qemu-img create`, which takes 10 ms of CPU for
//! it. The layout is the format's minimum (QEMU, docs/interop/qcow2.txt): header,
//! refcount table, one refcount block, an L1 table of zeros. Zero means "ask the
//! image below", so nothing else is needed.
//!
//! ```text
//! cluster 0   header, backing format, backing path
//! cluster 1   refcount table: one entry, the block in cluster 2
//! cluster 2   refcount block: a 1 for each cluster of the file
//! cluster 3…  L1 table: one entry per 512 MiB of disk
//! ```

use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::model::vm::DiskFormat;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// What one L1 entry covers: a cluster of 8-byte entries, each for a cluster.
const L1_REACH: u64 = CLUSTER / 8 * CLUSTER;
/// QEMU's own limit (32 MiB) on the L1 table, in entries: 2 PiB of disk.
const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
/// The longest backing path the format allows, in bytes.
const MAX_BACKING: usize = 1023;
/// The length of a version 3 header without optional fields.
const HEADER: u32 = 104;
/// The features of disks that QEMU has written to: not closed well, and other clusters.
const PLAIN: u64 = 1 | 1 << 3 | 1 << 4;
/// Names the format of the backing file, so that QEMU never guesses it.
const BACKING_FORMAT_EXTENSION: u32 = 0xe279_2aca;

/// Creates `path`, 0600, as an empty layer of `virtual_size` bytes over
/// `backing`, which is not looked at.
///
/// # Errors
/// When `path` exists or cannot be written, when `backing` is relative or longer
/// than qcow2 can name, or when the size is not one a disk can have.
pub fn create(
    path: &Path,
    backing: &Path,
    backing_format: DiskFormat,
    virtual_size: u64,
) -> Result<()> {
    // QEMU takes a relative name for one beside the overlay, and text with a colon
    // before the first slash for a protocol.
    if !backing.is_absolute() {
        return Err(Error::bug(format!("`{}` is not an absolute path", backing.display())));
    }
    layer(path, Some((backing, backing_format)), virtual_size)
}

/// Creates `path`, 0600, as an empty disk of `virtual_size` bytes that stands alone, or lies
/// on a file, which is not looked at. A relative name is one beside `path`.
///
/// # Errors
/// As [`create`].
pub fn layer(path: &Path, below: Option<(&Path, DiskFormat)>, virtual_size: u64) -> Result<()> {
    let header = header(below, virtual_size)?;
    let l1_clusters = (l1_entries(virtual_size) * 8).div_ceil(CLUSTER);
    let clusters = 3 + l1_clusters;
    let refcounts = [0_u8, 1].repeat(usize::try_from(clusters).expect("a few hundred"));
    let write = || {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        // What is not written is a hole, and reads as zeros.
        file.set_len(clusters * CLUSTER)?;
        file.write_all_at(&header, 0)?;
        file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
        file.write_all_at(&refcounts, 2 * CLUSTER)
    };
    write().while_doing(|| format!("creating the disk `{}`", path.display()))
}

/// Whether a disk that comes from elsewhere, and is to lie on a file of our choice, holds its
/// data itself: QEMU follows a header to whatever file it names.
///
/// # Errors
/// With what makes it another kind of file.
pub fn check_plain(path: &Path) -> Result<()> {
    let doing = || format!("looking at the disk `{}`", path.display());
    let mut head = [0; HEADER as usize];
    let file = std::fs::File::open(path).while_doing(doing)?;
    file.read_exact_at(&mut head, 0).while_doing(doing)?;
    let number =
        |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let incompatible = u64::from(number(72)) << 32 | u64::from(number(76));
    let why = if head[..4] != *b"QFI\xfb" {
        "it is no qcow2"
    } else if number(4) != 3 {
        "it has another version of the format than ours"
    } else if number(32) != 0 {
        "it is encrypted"
    } else if incompatible & !PLAIN != 0 {
        "its data is in another file, or it uses features that ours do not"
    } else {
        return Ok(());
    };
    Err(Error::config(why)).while_doing(doing)
}

fn l1_entries(virtual_size: u64) -> u64 {
    virtual_size.div_ceil(L1_REACH)
}

/// The first cluster, as far as it is used.
fn header(below: Option<(&Path, DiskFormat)>, virtual_size: u64) -> Result<Vec<u8>> {
    let name = below.map_or(&[][..], |(path, _)| path.as_os_str().as_bytes());
    if name.len() > MAX_BACKING {
        return Err(Error::usage(format!("the image's path has {} bytes", name.len()))
            .help(format!("move it to a path of at most {MAX_BACKING} bytes")));
    }
    let entries = l1_entries(virtual_size);
    if virtual_size == 0 || virtual_size % 512 != 0 || entries > MAX_L1_ENTRIES {
        return Err(Error::usage(format!("a disk cannot have {virtual_size} bytes"))
            .help("give a positive multiple of 512, at most 2 PiB"));
    }
    let entries = u32::try_from(entries).expect("at most four million");

    let mut extensions = Vec::new();
    if let Some((_, format)) = below {
        let format = format.as_str().as_bytes();
        extensions.extend(BACKING_FORMAT_EXTENSION.to_be_bytes());
        extensions.extend((format.len() as u32).to_be_bytes());
        extensions.extend(format);
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    extensions.extend([0; 8]); // their end
    let name_offset = if below.is_some() { HEADER as usize + extensions.len() } else { 0 };

    let mut bytes = Vec::with_capacity(HEADER as usize + extensions.len() + name.len());
    bytes.extend(b"QFI\xfb");
    bytes.extend(3_u32.to_be_bytes()); // version
    bytes.extend((name_offset as u64).to_be_bytes());
    bytes.extend((name.len() as u32).to_be_bytes());
    bytes.extend(CLUSTER_BITS.to_be_bytes());
    bytes.extend(virtual_size.to_be_bytes());
    bytes.extend(0_u32.to_be_bytes()); // not encrypted
    bytes.extend(entries.to_be_bytes());
    bytes.extend((3 * CLUSTER).to_be_bytes()); // L1 table
    bytes.extend(CLUSTER.to_be_bytes()); // refcount table
    bytes.extend(1_u32.to_be_bytes()); // its clusters
    bytes.extend([0; 12]); // no snapshots
    bytes.extend([0; 24]); // no incompatible, compatible, autoclear features
    bytes.extend(4_u32.to_be_bytes()); // refcounts of 2^4 bits
    bytes.extend(HEADER.to_be_bytes());
    bytes.extend(extensions);
    bytes.extend(name);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    const GIB: u64 = 1 << 30;

    /// Runs `qemu-img`, if there is one.
    fn qemu_img(args: &[&str], path: &Path) -> Option<serde_json::Value> {
        let output = match Command::new("qemu-img").args(args).arg(path).output() {
            Ok(output) => output,
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "qemu-img: {error}");
                eprintln!("skipped: no qemu-img ({error}); install qemu-utils");
                return None;
            }
        };
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {text}");
        Some(serde_json::from_slice(&output.stdout).unwrap())
    }

    #[test]
    fn a_disk_that_leads_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        layer(&path, None, GIB).unwrap();
        check_plain(&path).unwrap();
        let error = |what: &str| {
            let error = check_plain(&path).unwrap_err().report();
            assert!(error.contains(what), "{error}");
        };
        let write = |bytes: &[u8], at: u64| {
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(bytes, at).unwrap();
        };
        // An external data file, encryption, another version, another format.
        for (byte, at, what) in [
            (1 << 2, 79, "its data is in another file"),
            (1 << 6, 72, "features that ours do not"),
            (1, 35, "it is encrypted"),
            (2, 7, "another version"),
            (b'R', 0, "it is no qcow2"),
        ] {
            let before = std::fs::read(&path).unwrap();
            write(&[byte], at);
            error(what);
            std::fs::write(&path, before).unwrap();
        }
        std::fs::write(&path, "short").unwrap();
        error("looking at the disk");
    }

    #[test]
    fn qemu_finds_nothing_wrong_with_an_overlay_of_any_size() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        std::fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
        for (index, size) in
            [512, 1 << 20, L1_REACH, L1_REACH + 512, 10 * GIB, 5 << 40].into_iter().enumerate()
        {
            let path = dir.path().join(format!("disk{index}"));
            create(&path, &base, DiskFormat::Raw, size).unwrap();
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            let Some(check) = qemu_img(&["check", "--output=json"], &path) else { return };
            assert_eq!(check["check-errors"], 0, "{check}");
            assert_eq!(check.get("leaks"), None, "{check}");
            let info = qemu_img(&["info", "--output=json"], &path).unwrap();
            assert_eq!(info["virtual-size"], size);
            let alone = dir.path().join(format!("alone{index}"));
            layer(&alone, None, size).unwrap();
            let found = qemu_img(&["info", "--output=json"], &alone).unwrap();
            assert_eq!(
                (&found["virtual-size"], found.get("backing-filename")),
                (&size.into(), None)
            );
            assert_eq!(qemu_img(&["check", "--output=json"], &alone).unwrap()["check-errors"], 0);
            assert_eq!(info["backing-filename"], base.to_str().unwrap());
            assert_eq!(info["backing-filename-format"], "raw");
        }
    }

    #[test]
    fn an_overlay_shows_what_lies_below() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("a base, with: odd characters");
        std::fs::write(&base, [7_u8; 4096]).unwrap();
        let disk = dir.path().join("disk");
        create(&disk, &base, DiskFormat::Raw, 8192).unwrap();
        let flat = dir.path().join("flat");
        if qemu_img(&["info", "--output=json"], &disk).is_none() {
            return;
        }
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "raw"]).arg(&disk).arg(&flat);
        assert!(convert.status().unwrap().success());
        let bytes = std::fs::read(flat).unwrap();
        assert_eq!(bytes[..4096], [7; 4096]);
        assert_eq!(bytes[4096..], [0; 4096]);
    }

    #[test]
    fn what_qcow2_cannot_hold_is_refused_before_a_file_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let long = format!("/{}", "x".repeat(MAX_BACKING));
        for (backing, size) in [
            (long.as_str(), GIB),
            ("relative", GIB),
            ("/base", 0),
            ("/base", 513),
            ("/base", (MAX_L1_ENTRIES + 1) * L1_REACH),
            ("/base", u64::MAX - 511),
        ] {
            create(&path, Path::new(backing), DiskFormat::Qcow2, size).unwrap_err();
            assert!(!path.exists(), "{backing} {size}");
        }
        create(&path, Path::new(&long[..MAX_BACKING]), DiskFormat::Qcow2, GIB).unwrap();
        create(&path, Path::new("/base"), DiskFormat::Qcow2, GIB).expect_err("it exists");
    }
}
