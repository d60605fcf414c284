//! A disk that a PC BIOS boots: MBR, GRUB, one ext2 partition, as qcow2.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::image::tool;

/// The first partition starts at 1 MiB, as everywhere; GRUB lies in the gap.
const PARTITION: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// GRUB's whole configuration, part of its image: no menu, no timeout, no console.
const GRUB: &str = "\
linux (hd0,msdos1)/vmlinuz console=ttyS0 quiet no_timer_check mitigations=off net.ifnames=0
initrd (hd0,msdos1)/initrd
boot
";

/// Writes the disk to `output`, using `scratch` for everything else.
pub(super) fn build(
    root: &Path,
    kernel: &Path,
    initramfs: &[u8],
    scratch: &Path,
    output: &Path,
) -> Result<()> {
    let tree = scratch.join("tree");
    let copy = || -> std::io::Result<u64> {
        fs::create_dir(&tree)?;
        fs::write(tree.join("initrd"), initramfs)?;
        let size = fs::copy(kernel, tree.join("vmlinuz"))?;
        Ok(size + initramfs.len() as u64)
    };
    let content = copy().while_doing(|| format!("filling `{}`", tree.display()))?;
    // An eighth more, and 2 MiB, for what the file system needs itself.
    let partition = (content + content / 8 + (2 << 20)).next_multiple_of(1 << 20);
    let grub = grub(root, scratch)?;

    let raw = scratch.join("disk.raw");
    let write = || -> std::io::Result<()> {
        let file = File::create_new(&raw)?;
        file.set_len(PARTITION + partition)?;
        file.write_all_at(&grub, 0)?;
        file.write_all_at(&partition_table(partition / SECTOR), 446)
    };
    write().while_doing(|| format!("writing `{}`", raw.display()))?;
    tool::run(
        Command::new("mke2fs")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .args(["-q", "-F", "-t", "ext2", "-b", "4096", "-m", "0", "-L", "tiny", "-d"])
            .arg(&tree)
            .args(["-E", &format!("offset={PARTITION},root_owner=0:0")])
            .arg(&raw)
            .arg(format!("{}k", partition / 1024)),
    )?;
    tool::run(
        Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2", "--"])
            .args([&raw, output]),
    )?;
    Ok(())
}

/// The disk's first sectors: GRUB's boot sector and, from the second sector on
/// (where the boot sector looks for it), its image with [`GRUB`] inside.
fn grub(root: &Path, scratch: &Path) -> Result<Vec<u8>> {
    let modules = root.join("usr/lib/grub/i386-pc");
    let script = scratch.join("grub.cfg");
    let image = scratch.join("grub.img");
    fs::write(&script, GRUB).while_doing(|| format!("writing `{}`", script.display()))?;
    let libraries = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
    // After the system's own folders: only for what this machine lacks.
    let libraries = libraries.map(|folder| root.join(folder).display().to_string()).join(":");
    tool::run(
        Command::new(root.join("usr/bin/grub-mkimage"))
            .env(
                "LD_LIBRARY_PATH",
                format!("/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu:{libraries}"),
            )
            .args(["-O", "i386-pc", "-p", "(hd0,msdos1)/", "-d"])
            .arg(&modules)
            .arg("-c")
            .arg(&script)
            .arg("-o")
            .arg(&image)
            .args(["biosdisk", "part_msdos", "ext2", "linux", "boot"]),
    )?;
    let read = |path: &Path| fs::read(path).while_doing(|| format!("reading `{}`", path.display()));
    let mut sectors = read(&modules.join("boot.img"))?;
    let core = read(&image)?;
    if sectors.len() != SECTOR as usize || SECTOR + core.len() as u64 > PARTITION {
        return Err(Error::system("GRUB's image does not fit before the first partition"));
    }
    sectors.extend_from_slice(&core);
    Ok(sectors)
}

/// The table at byte 446 of the MBR: one active Linux partition of `sectors`, and
/// the signature. Addresses in cylinders are "beyond all": nobody reads them.
fn partition_table(sectors: u64) -> [u8; 66] {
    const LINUX: u8 = 0x83;
    const BEYOND: [u8; 3] = [0xfe, 0xff, 0xff];
    let mut table = [0; 66];
    table[0] = 0x80;
    table[1..4].copy_from_slice(&BEYOND);
    table[4] = LINUX;
    table[5..8].copy_from_slice(&BEYOND);
    table[8..12].copy_from_slice(&((PARTITION / SECTOR) as u32).to_le_bytes());
    table[12..16].copy_from_slice(&(sectors as u32).to_le_bytes());
    table[64..].copy_from_slice(&[0x55, 0xaa]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_partition_table_names_one_active_linux_partition() {
        let table = partition_table(0x1_2345);
        assert_eq!(table[..5], [0x80, 0xfe, 0xff, 0xff, 0x83]);
        assert_eq!(table[8..16], [0, 8, 0, 0, 0x45, 0x23, 1, 0]);
        assert_eq!(table[16..64], [0; 48], "the other three entries are empty");
        assert_eq!(table[64..], [0x55, 0xaa]);
    }
}
