//! The disk around the root file system: a GUID partition table (UEFI specification,
//! chapter 5), GRUB for PC BIOS in a partition of its own, GRUB for UEFI in a FAT one.
//!
//! ```text
//! sector 0      MBR: GRUB's first sector, one entry that covers the disk
//!        1      GPT header and entries
//!     2048      14: GRUB
//!     4096      15: FAT with /EFI/BOOT/BOOTX64.EFI
//!    20480       1: root; last, so that it can grow
//!      end      the GPT again
//! ```

use std::fs::File;
use std::io::{Cursor, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use flate2::Crc;
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::image::grub::{Grub, Platform};

const SECTOR: u64 = 512;
/// Entries of a partition table, and the sectors that they take.
const ENTRIES: u64 = 128;
const TABLE: u64 = 32;

const GRUB_START: u64 = 2048;
const ESP_START: u64 = 4096;
const ROOT_START: u64 = 20_480;

/// Kinds of partitions, as they are written: the first three parts are little-endian.
const BIOS_BOOT: &str = "21686148-6449-6e6f-744e-656564454649";
const EFI_SYSTEM: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
const LINUX_ROOT: &str = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709";

/// Modules of both GRUBs.
const MODULES: &[&str] = &[
    "part_gpt",
    "ext2",
    "search_fs_uuid",
    "configfile",
    "normal",
    "test",
    "echo",
    "boot",
    "linux",
    "serial",
    "terminal",
];

/// What the image's parts are known by: the same for the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Of the root file system.
    pub(super) root: String,
    disk: String,
    partitions: [String; 3],
    /// Of the FAT volume.
    volume: u32,
}

impl Identity {
    pub(super) fn of(name: &str) -> Self {
        let digest = |what: &str| Sha256::digest(format!("pavo image {name}: {what}"));
        let uuid = |what: &str| {
            let mut bytes: [u8; 16] = digest(what)[..16].try_into().expect("it has 32");
            // Version 8, made as its maker likes; the variant of RFC 9562.
            bytes[6] = bytes[6] & 0x0f | 0x80;
            bytes[8] = bytes[8] & 0x3f | 0x80;
            let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
            let parts = [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]];
            parts.map(hex).join("-")
        };
        let volume = digest("volume");
        Self {
            root: uuid("root"),
            disk: uuid("disk"),
            partitions: ["partition 1", "partition 14", "partition 15"].map(uuid),
            volume: u32::from_be_bytes([volume[0], volume[1], volume[2], volume[3]]),
        }
    }
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) start: u64,
    pub(super) size: u64,
}

/// Where things are on a disk of a certain size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    sectors: u64,
}

/// An entry of the table: number, kind, identifier, first and last sector, name.
type Partition<'a> = (u64, &'a str, &'a str, u64, u64, &'a str);

impl Layout {
    pub(super) fn of(mib: u64) -> Self {
        Self { sectors: mib << 11 }
    }

    /// Of the root file system: the whole MiB before the second table.
    pub(super) fn root(self) -> Extent {
        let end = (self.sectors - TABLE - 1) >> 11 << 11;
        Extent { start: ROOT_START * SECTOR, size: (end - ROOT_START) * SECTOR }
    }

    /// Makes the disk, empty.
    pub(super) fn create(self, raw: &Path) -> Result<()> {
        let create = || File::create_new(raw)?.set_len(self.sectors * SECTOR);
        create().while_doing(|| format!("creating `{}`", raw.display()))
    }

    /// Writes all but the root file system. GRUB's packages lie unpacked in `loader`.
    pub(super) fn finish(
        self,
        raw: &Path,
        identity: &Identity,
        loader: &Path,
        scratch: &Path,
    ) -> Result<()> {
        let grub = Grub::new(loader, scratch);
        let script = format!(
            "search.fs_uuid {} root\nconfigfile ($root)/boot/grub/grub.cfg\n",
            identity.root
        );
        let pc: Vec<&str> = MODULES.iter().chain(&["biosdisk", "linux16"]).copied().collect();
        let core = grub.image(Platform::Pc, "/boot/grub", &script, &pc)?;
        let core = placed(core).ok_or_else(|| {
            Error::system("GRUB's image is not as expected").help("please report it")
        })?;
        let mut mbr = grub.boot_sector()?;
        self.cover(&mut mbr);
        let uefi = grub.image(Platform::Uefi, "/boot/grub", &script, MODULES)?;
        let doing = || format!("writing `{}`", raw.display());
        let esp = esp(&uefi, identity.volume).while_doing(doing)?;
        let write = || -> std::io::Result<()> {
            let file = File::options().write(true).open(raw)?;
            file.write_all_at(&core, GRUB_START * SECTOR)?;
            file.write_all_at(&esp, ESP_START * SECTOR)?;
            for (sector, bytes) in self.tables(identity) {
                file.write_all_at(&bytes, sector * SECTOR)?;
            }
            // Now it can be started.
            file.write_all_at(&mbr, 0)
        };
        write().while_doing(doing)
    }

    /// Makes of GRUB's first sector that of a disk with a GPT: where the rest of GRUB is, and
    /// one entry over all, so that nobody takes the disk for empty.
    fn cover(self, mbr: &mut [u8]) {
        const KERNEL_SECTOR: usize = 0x5c;
        mbr[KERNEL_SECTOR..KERNEL_SECTOR + 8].copy_from_slice(&GRUB_START.to_le_bytes());
        mbr[440..510].fill(0);
        let size = u32::try_from(self.sectors - 1).unwrap_or(u32::MAX);
        mbr[446..454].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
        mbr[454..458].copy_from_slice(&1_u32.to_le_bytes());
        mbr[458..462].copy_from_slice(&size.to_le_bytes());
        mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    }

    /// Both partition tables: first sectors and bytes.
    fn tables(self, identity: &Identity) -> [(u64, Vec<u8>); 4] {
        let root = self.root();
        let end = (root.start + root.size) / SECTOR - 1;
        let [one, fourteen, fifteen] = &identity.partitions;
        let partitions: [Partition; 3] = [
            (1, LINUX_ROOT, one, ROOT_START, end, "root"),
            (14, BIOS_BOOT, fourteen, GRUB_START, ESP_START - 1, "grub"),
            (15, EFI_SYSTEM, fifteen, ESP_START, ROOT_START - 1, "esp"),
        ];
        let entries = entries(&partitions);
        let last = self.sectors - 1;
        let header = |here, other, table| self.header(&identity.disk, &entries, here, other, table);
        [
            (1, header(1, last, 2)),
            (2, entries.clone()),
            (last - TABLE, entries.clone()),
            (last, header(last, 1, last - TABLE)),
        ]
    }

    fn header(self, disk: &str, entries: &[u8], here: u64, other: u64, table: u64) -> Vec<u8> {
        let mut header = b"EFI PART\0\0\x01\0".to_vec();
        header.extend(92_u32.to_le_bytes());
        // Checksum (of this with zeros in its place), reserved.
        header.extend([0; 8]);
        for sector in [here, other, 2 + TABLE, self.sectors - TABLE - 2] {
            header.extend(sector.to_le_bytes());
        }
        header.extend(guid(disk));
        header.extend(table.to_le_bytes());
        header.extend((ENTRIES as u32).to_le_bytes());
        header.extend(128_u32.to_le_bytes());
        header.extend(crc(entries).to_le_bytes());
        let sum = crc(&header);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header.resize(SECTOR as usize, 0);
        header
    }
}

/// The table's entries.
fn entries(partitions: &[Partition]) -> Vec<u8> {
    let mut table = vec![0; (TABLE * SECTOR) as usize];
    for (number, kind, uuid, first, last, name) in partitions {
        let entry = &mut table[(*number as usize - 1) * 128..][..128];
        entry[..16].copy_from_slice(&guid(kind));
        entry[16..32].copy_from_slice(&guid(uuid));
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        for (place, letter) in entry[56..].chunks_mut(2).zip(name.encode_utf16()) {
            place.copy_from_slice(&letter.to_le_bytes());
        }
    }
    table
}

/// An identifier as it is written to disk.
fn guid(text: &str) -> [u8; 16] {
    let digits = text.replace('-', "");
    let mut bytes = u128::from_str_radix(&digits, 16).expect("it is one of ours").to_be_bytes();
    for range in [0..4, 4..6, 6..8] {
        bytes[range].reverse();
    }
    bytes
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// GRUB's image, told where it lies: its first sector reads the others by a list at its
/// own end, of one entry (first sector, how many, segment in memory).
fn placed(mut image: Vec<u8>) -> Option<Vec<u8>> {
    const LIST: usize = 512 - 12;
    let sectors = (image.len() as u64).div_ceil(SECTOR);
    let listed = image.get(LIST + 8..LIST + 10)?;
    let listed = u64::from(u16::from_le_bytes([listed[0], listed[1]]));
    if listed + 1 != sectors || sectors > ESP_START - GRUB_START {
        return None;
    }
    image[LIST..LIST + 8].copy_from_slice(&(GRUB_START + 1).to_le_bytes());
    Some(image)
}

/// The FAT volume that UEFI looks into.
fn esp(grub: &[u8], id: u32) -> std::io::Result<Vec<u8>> {
    let sectors = ROOT_START - ESP_START;
    let mut volume = vec![0; (sectors * SECTOR) as usize];
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat16)
        .bytes_per_cluster(1024)
        .total_sectors(sectors as u32)
        .volume_id(id)
        .volume_label(*b"ESP        ");
    fatfs::format_volume(Cursor::new(&mut volume[..]), options)?;
    let system = FileSystem::new(Cursor::new(&mut volume[..]), FsOptions::new())?;
    let folder = system.root_dir().create_dir("EFI")?.create_dir("BOOT")?;
    folder.create_file("BOOTX64.EFI")?.write_all(grub)?;
    drop(folder);
    system.unmount()?;
    Ok(volume)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_table_is_one_that_others_read() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        let layout = Layout::of(1024);
        layout.create(&raw).unwrap();
        let identity = Identity::of("debian");
        let file = File::options().write(true).open(&raw).unwrap();
        let mut mbr = vec![7; 512];
        layout.cover(&mut mbr);
        file.write_all_at(&mbr, 0).unwrap();
        for (sector, bytes) in layout.tables(&identity) {
            file.write_all_at(&bytes, sector * SECTOR).unwrap();
        }
        // util-linux's reader, which the tests need anyway; it checks both sums.
        for (number, start, sectors, kind, uuid) in [
            (1, ROOT_START, layout.root().size / SECTOR, LINUX_ROOT, &identity.partitions[0]),
            (14, GRUB_START, 2048, BIOS_BOOT, &identity.partitions[1]),
            (15, ESP_START, 16_384, EFI_SYSTEM, &identity.partitions[2]),
        ] {
            let mut command = Command::new("partx");
            let columns = "START,SECTORS,TYPE,UUID";
            command.args(["-gbo", columns, "-n", &number.to_string()]).arg(&raw);
            let said = command.env("PATH", "/usr/sbin:/usr/bin").output().unwrap();
            let text = String::from_utf8(said.stdout).unwrap();
            let words: Vec<&str> = text.split_whitespace().collect();
            assert_eq!(words, [&start.to_string(), &sectors.to_string(), kind, uuid]);
        }
    }

    #[test]
    fn the_same_name_gives_the_same_identity_and_another_another() {
        assert_eq!(Identity::of("a"), Identity::of("a"));
        assert_ne!(Identity::of("a").root, Identity::of("b").root);
        let uuid = Identity::of("a").root;
        assert_eq!(uuid.len(), 36);
        assert_eq!(&uuid[14..15], "8");
    }

    #[test]
    fn the_volume_for_uefi_holds_grub_and_is_always_the_same() {
        let volume = || esp(b"GRUB", 7).unwrap();
        let mut bytes = volume();
        assert_eq!(bytes, volume());
        let system = FileSystem::new(Cursor::new(&mut bytes[..]), FsOptions::new()).unwrap();
        assert_eq!(system.fat_type(), FatType::Fat16);
        let mut file = system.root_dir().open_file("EFI/BOOT/BOOTX64.EFI").unwrap();
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut text).unwrap();
        assert_eq!(text, b"GRUB");
    }

    #[test]
    fn grub_is_told_where_it_lies_only_if_it_is_what_is_expected() {
        let mut image = vec![0; 512 * 4];
        assert_eq!(placed(image.clone()), None);
        image[508] = 3;
        let placed = placed(image).unwrap();
        assert_eq!(placed[500..510], [1, 8, 0, 0, 0, 0, 0, 0, 3, 0]);
    }
}
