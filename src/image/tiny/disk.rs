//! A disk that a PC BIOS boots: MBR, GRUB, then kernel and initramfs as they are.
//!
//! There is no file system: GRUB is told the sectors. Under emulation a boot is
//! mostly the BIOS reading, and it reads a run of sectors fastest.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::image::grub::{Grub, Platform};
use crate::image::tool;

const SECTOR: u64 = 512;
/// The payload starts at 1 MiB, like a first partition; GRUB lies in the gap.
const PAYLOAD: u64 = (1 << 20) / SECTOR;

/// The kernel's command line. `quiet` and what follows is there for speed alone.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 net.ifnames=0 panic=-1 \
 quiet mitigations=off nokaslr no_timer_check cryptomgr.notests edd=off audit=0 \
     rcupdate.rcu_expedited=1 random.trust_cpu=on";

/// Writes the disk to `output`, using `scratch` for everything else.
pub(super) fn build(
    root: &Path,
    kernel: &[u8],
    initramfs: &[u8],
    scratch: &Path,
    output: &Path,
) -> Result<()> {
    let (kernel_sectors, initramfs_sectors) = (sectors(kernel), sectors(initramfs));
    let end = PAYLOAD + kernel_sectors + initramfs_sectors;
    let script = script(kernel_sectors, initramfs_sectors);
    let grub = grub(root, &script, scratch)?;

    let raw = scratch.join("disk.raw");
    let write = || -> std::io::Result<()> {
        let file = File::create_new(&raw)?;
        file.set_len((end * SECTOR).next_multiple_of(1 << 20))?;
        file.write_all_at(&grub, 0)?;
        file.write_all_at(&partition_table(end - PAYLOAD), 446)?;
        file.write_all_at(kernel, PAYLOAD * SECTOR)?;
        file.write_all_at(initramfs, (PAYLOAD + kernel_sectors) * SECTOR)
    };
    write().while_doing(|| format!("writing `{}`", raw.display()))?;
    tool::run(
        Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2", "--"])
            .args([&raw, output]),
    )?;
    Ok(())
}

/// How many sectors hold `content`.
fn sectors(content: &[u8]) -> u64 {
    (content.len() as u64).div_ceil(SECTOR)
}

/// GRUB's whole configuration, part of its image: no menu, no timeout, no console.
///
/// `linux16`, the old boot protocol, because for the newer one GRUB copies the 50
/// MiB that the kernel will unpack into, byte by byte: 2 s under emulation.
fn script(kernel: u64, initramfs: u64) -> String {
    let after = PAYLOAD + kernel;
    format!(
        "linux16 (hd0){PAYLOAD}+{kernel} {KERNEL_ARGUMENTS}\n\
         initrd16 (hd0){after}+{initramfs}\n\
         boot\n"
    )
}

/// The disk's first sectors: GRUB's boot sector and, from the second sector on
/// (where the boot sector looks for it), its image with `script` inside.
fn grub(root: &Path, script: &str, scratch: &Path) -> Result<Vec<u8>> {
    let grub = Grub::new(root, scratch);
    let core = grub.image(Platform::Pc, "(hd0)/", script, &["biosdisk", "linux16", "boot"])?;
    let mut sectors = grub.boot_sector()?;
    if SECTOR + core.len() as u64 > PAYLOAD * SECTOR {
        return Err(Error::system("GRUB's image does not fit before the kernel"));
    }
    sectors.extend_from_slice(&core);
    Ok(sectors)
}

/// The table at byte 446 of the MBR, and the signature: one active partition without
/// a file system, so that tools see that the space is taken. Addresses in cylinders
/// are "beyond all": nobody reads them.
fn partition_table(sectors: u64) -> [u8; 66] {
    const NO_FILE_SYSTEM: u8 = 0xda;
    const BEYOND: [u8; 3] = [0xfe, 0xff, 0xff];
    let mut table = [0; 66];
    table[0] = 0x80;
    table[1..4].copy_from_slice(&BEYOND);
    table[4] = NO_FILE_SYSTEM;
    table[5..8].copy_from_slice(&BEYOND);
    table[8..12].copy_from_slice(&(PAYLOAD as u32).to_le_bytes());
    table[12..16].copy_from_slice(&(sectors as u32).to_le_bytes());
    table[64..].copy_from_slice(&[0x55, 0xaa]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_partition_table_names_one_active_partition() {
        let table = partition_table(0x1_2345);
        assert_eq!(table[..5], [0x80, 0xfe, 0xff, 0xff, 0xda]);
        assert_eq!(table[8..16], [0, 8, 0, 0, 0x45, 0x23, 1, 0]);
        assert_eq!(table[16..64], [0; 48], "the other three entries are empty");
        assert_eq!(table[64..], [0x55, 0xaa]);
    }
}
