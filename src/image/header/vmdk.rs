//! VMware's VMDK in one file: monolithic sparse and stream-optimised (*Virtual Disk
//! Format 5.0*).
//!
//! Other kinds are a text that names the files with the data; they are refused. The
//! text is there in these kinds too, and tools believe parts of it.

use super::{Format, Header, Image, ReadAt, ensure, le16, le32, le64, refused};
use crate::error::Result;

const SECTOR: u64 = 512;
/// In stream-optimised files the header's last word is at the end of the file.
const GRAIN_DIRECTORY_AT_END: u64 = u64::MAX;
/// QEMU reads this much of the text, whatever the header says.
const DESCRIPTOR: u64 = 20 * SECTOR;

pub(super) fn parse(image: &Image<'_, impl ReadAt>) -> Result<Header> {
    let head = image.read(0, 512)?;
    let capacity = fields(&head)?;
    if le64(&head, 56) == GRAIN_DIRECTORY_AT_END {
        let footer = image.read(image.len.saturating_sub(2 * SECTOR), 512)?;
        ensure(footer.starts_with(b"KDMV"), "it lacks its footer")?;
        ensure(fields(&footer)? == capacity, "its header and footer contradict each other")?;
        directory(image, &footer, capacity)?;
        descriptor(image, &footer)?;
    } else {
        directory(image, &head, capacity)?;
    }
    descriptor(image, &head)?;
    let virtual_size = capacity.checked_mul(SECTOR);
    let virtual_size = virtual_size.ok_or_else(|| refused("its virtual size is absurd"))?;
    Ok(Header { format: Format::Vmdk, virtual_size, backing: None })
}

/// Checks a header or footer; returns the capacity in sectors.
fn fields(head: &[u8]) -> Result<u64> {
    ensure((1..=3).contains(&le32(head, 4)), "its VMDK version is not known")?;
    let (capacity, grain) = (le64(head, 12), le64(head, 20));
    // With none, tools take the text for the header of the disk.
    ensure(capacity != 0, "its data is in other files")?;
    let sane = grain.is_power_of_two() && (8..=2048).contains(&grain);
    ensure(sane, "its grain size is out of range")?;
    ensure(le32(head, 44) == 512, "its grain tables have an impossible size")?;
    ensure(le16(head, 77) <= 1, "its compression is not known")?;
    Ok(capacity)
}

/// The grain directory must lie in the file.
fn directory(image: &Image<'_, impl ReadAt>, head: &[u8], capacity: u64) -> Result<()> {
    let (grain, directory) = (le64(head, 20), le64(head, 56));
    let entries = capacity.div_ceil(grain).div_ceil(512);
    let offset = directory.checked_mul(SECTOR);
    let sane = offset.is_some_and(|offset| image.holds(offset, entries, 4));
    ensure(sane, "its grain directory is not in it")
}

/// The text inside: one extent, in this very file, and nothing below it.
fn descriptor(image: &Image<'_, impl ReadAt>, head: &[u8]) -> Result<()> {
    let (offset, size) = (le64(head, 28), le64(head, 36));
    if offset == 0 {
        return Ok(());
    }
    let offset = offset.checked_mul(SECTOR).filter(|offset| *offset < image.len);
    let offset = offset.ok_or_else(|| refused("its descriptor is not in it"))?;
    ensure(size <= 128, "its descriptor is too large")?;
    let text = image.read(offset, (size * SECTOR).max(DESCRIPTOR) as usize)?;
    let text = String::from_utf8_lossy(&text).to_lowercase();
    ensure(!text.contains("parentfilenamehint"), "it needs another file below it")?;
    let extents = text.lines().filter(|line| {
        let first = line.split_whitespace().next();
        matches!(first, Some("rw" | "rdonly" | "noaccess"))
    });
    for (index, extent) in extents.enumerate() {
        let ours = index == 0 && extent.split_whitespace().nth(2) == Some("sparse");
        ensure(ours && !extent.contains('/'), "its data is in other files")?;
    }
    Ok(())
}
