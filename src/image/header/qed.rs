//! QED (QEMU, `docs/interop/qed_spec.txt`).

use super::{Format, Header, Image, ReadAt, ensure, le32, le64};
use crate::error::Result;

const BACKING_FILE: u64 = 1;
const NEED_CHECK: u64 = 1 << 1;

pub(super) fn parse(image: &Image<'_, impl ReadAt>) -> Result<Header> {
    let head = image.read(0, 64)?;
    let (cluster, table) = (le32(&head, 4), le32(&head, 8));
    let features = le64(&head, 16);
    ensure(features & BACKING_FILE == 0, "it needs another file below it")?;
    ensure(features & !NEED_CHECK == 0, "it uses features that are not known")?;
    let sane = cluster.is_power_of_two() && (1 << 12..=1 << 26).contains(&cluster);
    ensure(sane, "its cluster size is out of range")?;
    ensure(table.is_power_of_two() && table <= 16, "its table size is out of range")?;
    let (cluster, table) = (u64::from(cluster), u64::from(table));
    let l1 = le64(&head, 40);
    ensure(l1 % cluster == 0 && image.holds(l1, table, cluster), "its level 1 table is not in it")?;
    let virtual_size = le64(&head, 48);
    let entries = table * cluster / 8;
    let most = u128::from(entries) * u128::from(entries) * u128::from(cluster);
    ensure(u128::from(virtual_size) <= most, "its virtual size is absurd")?;
    Ok(Header { format: Format::Qed, virtual_size, backing: None })
}
