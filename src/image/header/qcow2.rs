//! qcow2, versions 2 and 3 (QEMU, `docs/interop/qcow2.txt`).

use super::{Backing, Format, Header, Image, MAX_SIZE, ReadAt, be32, be64, ensure, refused};
use crate::error::Result;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;
const EXTENSION_EXTERNAL_DATA: u32 = 0x4441_5441;

/// QEMU's own limits: tables larger than these it refuses too.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_NAME: u32 = 1023;

pub(super) fn parse(image: &Image<'_, impl ReadAt>) -> Result<Header> {
    let head = image.read(0, 112)?;
    let version = be32(&head, 4);
    ensure((2..=3).contains(&version), &format!("its qcow2 version is {version}"))?;
    let cluster_bits = be32(&head, 20);
    ensure((9..=21).contains(&cluster_bits), "its cluster size is out of range")?;
    let cluster = 1_u64 << cluster_bits;
    ensure(be32(&head, 32) == 0, "it is encrypted")?;
    let extended_l2 = if version == 3 { features(&head, cluster)? } else { false };
    tables(image, &head, cluster, extended_l2)?;
    let start = if version == 3 { be32(&head, 100) as usize } else { 72 };
    // Extensions and the name of the backing file lie in the first cluster.
    let first = image.read(0, cluster.min(64 << 10) as usize)?;
    let backing = backing_file(&head, &first)?;
    let names = be64(&head, 8);
    let end = if names == 0 { first.len() } else { (names as usize).min(first.len()) };
    let format = extensions(first.get(start..end).unwrap_or_default())?;
    Ok(Header {
        format: Format::Qcow2,
        virtual_size: be64(&head, 24),
        backing: backing.map(|file| Backing { file, format }),
    })
}

/// What only version 3 has; returns whether level 2 entries are extended.
fn features(head: &[u8], cluster: u64) -> Result<bool> {
    let incompatible = be64(head, 72);
    ensure(incompatible & EXTERNAL_DATA == 0, "its data is in another file")?;
    ensure(incompatible & CORRUPT == 0, "it is marked as corrupt")?;
    let known = DIRTY | COMPRESSION_TYPE | EXTENDED_L2;
    ensure(incompatible & !known == 0, "it uses features that are not known")?;
    ensure(be32(head, 96) <= 6, "its reference counts have an impossible width")?;
    let length = u64::from(be32(head, 100));
    let sane = length >= 104 && length % 8 == 0 && length <= cluster;
    ensure(sane, "its header has an impossible length")?;
    let compression = if length > 104 { head[104] } else { 0 };
    ensure(compression <= 1, "its compression is not known")?;
    let flagged = incompatible & COMPRESSION_TYPE != 0;
    ensure(flagged == (compression != 0), "its compression contradicts its features")?;
    Ok(incompatible & EXTENDED_L2 != 0)
}

/// Tables must be as large as the disk needs, and lie in the file.
fn tables(
    image: &Image<'_, impl ReadAt>,
    head: &[u8],
    cluster: u64,
    extended_l2: bool,
) -> Result<()> {
    let size = be64(head, 24);
    ensure(size <= MAX_SIZE, "its virtual size is absurd")?;
    let l2_entries = cluster / if extended_l2 { 16 } else { 8 };
    let (l1_entries, l1) = (u64::from(be32(head, 36)), be64(head, 40));
    ensure(l1_entries * 8 <= MAX_L1_BYTES, "its level 1 table is too large")?;
    ensure(l1_entries >= size.div_ceil(cluster * l2_entries), "its level 1 table is too small")?;
    ensure(l1 % cluster == 0 && image.holds(l1, l1_entries, 8), "its level 1 table is not in it")?;
    let (refcounts, clusters) = (be64(head, 48), u64::from(be32(head, 56)));
    ensure(
        clusters > 0 && clusters * cluster <= MAX_REFCOUNT_TABLE_BYTES,
        "its table of reference counts has an absurd size",
    )?;
    ensure(
        refcounts % cluster == 0 && refcounts > 0 && image.holds(refcounts, clusters, cluster),
        "its table of reference counts is not in it",
    )?;
    let (snapshots, table) = (be32(head, 60), be64(head, 64));
    ensure(snapshots <= MAX_SNAPSHOTS, "it has too many snapshots")?;
    // A snapshot's entry has at least 40 bytes.
    let sane = snapshots == 0 || (table % cluster == 0 && image.holds(table, snapshots.into(), 40));
    ensure(sane, "its table of snapshots is not in it")
}

/// The name of the file below, which lies in the first cluster.
fn backing_file(head: &[u8], first: &[u8]) -> Result<Option<String>> {
    let (offset, length) = (be64(head, 8), be32(head, 16));
    if offset == 0 {
        return Ok(None);
    }
    ensure((1..=MAX_NAME).contains(&length), "its backing file has an impossible name")?;
    let name = usize::try_from(offset)
        .ok()
        .and_then(|offset| first.get(offset..offset.checked_add(length as usize)?))
        .ok_or_else(|| refused("the name of its backing file is not in its header"))?;
    let name = std::str::from_utf8(name);
    let name = name.map_err(|_| refused("the name of its backing file is not text"))?;
    Ok(Some(name.to_owned()))
}

/// Goes through the header extensions; returns the format of the file below.
fn extensions(mut rest: &[u8]) -> Result<Option<String>> {
    let mut format = None;
    while rest.len() >= 8 {
        let (kind, length) = (be32(rest, 0), be32(rest, 4) as usize);
        match kind {
            EXTENSION_END => break,
            EXTENSION_ENCRYPTION => return Err(refused("it is encrypted")),
            EXTENSION_EXTERNAL_DATA => return Err(refused("its data is in another file")),
            _ => {}
        }
        let padded = length.next_multiple_of(8);
        let value = rest.get(8..8 + length);
        let value = value.ok_or_else(|| refused("a header extension leaves the header"))?;
        if kind == EXTENSION_BACKING_FORMAT {
            format = Some(String::from_utf8_lossy(value).into_owned());
        }
        rest = rest.get(8 + padded..).unwrap_or_default();
    }
    Ok(format)
}
