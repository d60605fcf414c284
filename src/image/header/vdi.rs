//! VirtualBox's VDI (QEMU, `block/vdi.c`).

use super::{Format, Header, Image, ReadAt, ensure, le32, le64};
use crate::error::Result;

const BLOCK: u64 = 1 << 20;

pub(super) fn is_mark(head: &[u8]) -> bool {
    le32(head, 0x40) == 0xbeda_107f
}

pub(super) fn parse(image: &Image<'_, impl ReadAt>) -> Result<Header> {
    let head = image.read(0, 0x1c8)?;
    ensure(le32(&head, 0x44) == 0x0001_0001, "its VDI version is not known")?;
    let kind = le32(&head, 0x4c);
    ensure(matches!(kind, 1 | 2), "it is a difference to another file")?;
    let parents = &head[0x1a8..0x1c8];
    ensure(parents.iter().all(|byte| *byte == 0), "it needs another file below it")?;
    ensure(u64::from(le32(&head, 0x178)) == BLOCK, "its block size is not 1 MiB")?;
    let virtual_size = le64(&head, 0x170);
    let blocks = u64::from(le32(&head, 0x180));
    ensure(blocks * BLOCK >= virtual_size, "its virtual size is absurd")?;
    ensure(blocks * BLOCK < virtual_size.saturating_add(BLOCK), "it has too many blocks")?;
    let map = u64::from(le32(&head, 0x154));
    ensure(map % 512 == 0 && image.holds(map, blocks, 4), "its block map is not in it")?;
    Ok(Header { format: Format::Vdi, virtual_size, backing: None })
}
