//! Microsoft's VHD, fixed and dynamic (*Virtual Hard Disk Image Format
//! Specification*). QEMU calls it `vpc`.

use super::{Format, Header, Image, ReadAt, be32, be64, ensure, refused};
use crate::error::Result;

const MARK: &[u8] = b"conectix";
const FOOTER: usize = 512;

/// The footer: at the end, and in dynamic disks a copy of it at the start.
pub(super) fn find_footer(image: &Image<'_, impl ReadAt>, head: &[u8]) -> Result<Option<Vec<u8>>> {
    if head.starts_with(MARK) {
        return Ok(Some(head[..FOOTER].to_vec()));
    }
    let footer = image.read(image.len.saturating_sub(FOOTER as u64), FOOTER)?;
    Ok(footer.starts_with(MARK).then_some(footer))
}

pub(super) fn parse(image: &Image<'_, impl ReadAt>, footer: &[u8]) -> Result<Header> {
    ensure(be32(footer, 12) >> 16 == 1, "its VHD version is not known")?;
    let virtual_size = be64(footer, 48);
    match be32(footer, 60) {
        2 => {
            let sane = virtual_size.checked_add(FOOTER as u64).is_some_and(|end| end <= image.len);
            ensure(sane, "its data is not in it")?;
        }
        3 => dynamic(image, be64(footer, 16), virtual_size)?,
        4 => return Err(refused("it is a difference to another file")),
        _ => return Err(refused("its VHD type is not known")),
    }
    Ok(Header { format: Format::Vpc, virtual_size, backing: None })
}

/// The second header of a disk that grows.
fn dynamic(image: &Image<'_, impl ReadAt>, offset: u64, virtual_size: u64) -> Result<()> {
    let head = image.read(offset, 1024)?;
    ensure(head.starts_with(b"cxsparse"), "it lacks its second header")?;
    let (table, entries, block) = (be64(&head, 16), be32(&head, 28), be32(&head, 32));
    let sane = block.is_power_of_two() && (1 << 12..=1 << 28).contains(&block);
    ensure(sane, "its block size is out of range")?;
    let (entries, block) = (u64::from(entries), u64::from(block));
    ensure(entries * block >= virtual_size, "its virtual size is absurd")?;
    ensure(image.holds(table, entries, 4), "its block table is not in it")
}
