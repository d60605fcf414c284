//! Hostile headers, built here: each is refused for what is wrong with it.

use proptest::prelude::*;

use super::*;
use disks::{VMDK_TEXT, patch, qcow2, qed, vdi, vhd, vmdk};

#[path = "../../../tests/shared/disks.rs"]
mod disks;

impl ReadAt for Vec<u8> {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let rest = self.get(offset as usize..).unwrap_or_default();
        let count = rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

fn check(bytes: &Vec<u8>) -> Result<Header> {
    parse(&Image { file: bytes, len: bytes.len() as u64 })
}

#[test]
fn sane_images_are_accepted_with_their_size() {
    for (image, format, size) in [
        (qcow2(), Format::Qcow2, 1 << 30),
        (patch(qcow2(), &[(7, &[2])]), Format::Qcow2, 1 << 30),
        (qed(), Format::Qed, 1 << 30),
        (vdi(), Format::Vdi, 8 << 20),
        (vmdk(VMDK_TEXT), Format::Vmdk, 10 << 20),
        (vhd(2), Format::Vpc, 1 << 20),
        (vhd(3), Format::Vpc, 1 << 20),
        (b"anything".to_vec(), Format::Raw, 8),
    ] {
        let header = check(&image).unwrap();
        assert_eq!((header.format, header.virtual_size, header.backing), (format, size, None));
    }
}

/// Each hostile header is refused, and for what is wrong with it.
#[test]
fn hostile_images_are_refused_with_the_reason() {
    let extension = |kind: u32, length: u32| {
        let mut bytes = kind.to_be_bytes().to_vec();
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes
    };
    let q = |patches: &[(usize, &[u8])]| patch(qcow2(), patches);
    let streamed = patch(vmdk(VMDK_TEXT), &[(56, &u64::MAX.to_le_bytes())]);
    for (image, why) in [
        (q(&[(7, &[1])]), "its qcow2 version is 1"),
        (q(&[(7, &[4])]), "its qcow2 version is 4"),
        (q(&[(79, &[4])]), "its data is in another file"),
        (q(&[(104, &extension(0x4441_5441, 8))]), "its data is in another file"),
        (q(&[(104, &extension(0x0537_be77, 16))]), "it is encrypted"),
        (q(&[(35, &[1])]), "it is encrypted"),
        (q(&[(35, &[2])]), "it is encrypted"),
        (q(&[(79, &[2])]), "it is marked as corrupt"),
        (q(&[(79, &[32])]), "it uses features that are not known"),
        (q(&[(72, &[128])]), "it uses features that are not known"),
        (q(&[(79, &[8])]), "its compression contradicts its features"),
        (q(&[(23, &[8])]), "its cluster size is out of range"),
        (q(&[(20, &[255; 4])]), "its cluster size is out of range"),
        (q(&[(24, &[255; 8])]), "its virtual size is absurd"),
        (q(&[(24, &((64_u64 << 40) + 1).to_be_bytes())]), "its virtual size is absurd"),
        (q(&[(24, &[0; 8])]), "the disk has no size"),
        (q(&[(36, &[255; 4])]), "its level 1 table is too large"),
        (q(&[(36, &[0, 0, 0, 1])]), "its level 1 table is too small"),
        (q(&[(40, &[255; 8])]), "its level 1 table is not in it"),
        (q(&[(40, &(9_u64 << 16).to_be_bytes())]), "its level 1 table is not in it"),
        (q(&[(56, &[255; 4])]), "its table of reference counts has an absurd size"),
        (q(&[(48, &(9_u64 << 16).to_be_bytes())]), "its table of reference counts is not in it"),
        (q(&[(96, &[255; 4])]), "its reference counts have an impossible width"),
        (q(&[(100, &[255; 4])]), "its header has an impossible length"),
        (q(&[(100, &[0, 0, 0, 8])]), "its header has an impossible length"),
        (q(&[(60, &[255; 4])]), "it has too many snapshots"),
        (q(&[(63, &[9]), (64, &[0x7f; 8])]), "its table of snapshots is not in it"),
        (q(&[(104, &extension(1, u32::MAX))]), "a header extension leaves the header"),
        (q(&[(8, &[255; 8]), (19, &[9])]), "the name of its backing file is not in its header"),
        (q(&[(14, &[2, 0]), (16, &[255; 4])]), "its backing file has an impossible name"),
        (patch(qed(), &[(16, &[1])]), "it needs another file below it"),
        (patch(qed(), &[(16, &[8])]), "it uses features that are not known"),
        (patch(qed(), &[(4, &[1, 0, 0, 0])]), "its cluster size is out of range"),
        (patch(qed(), &[(8, &[255])]), "its table size is out of range"),
        (patch(qed(), &[(40, &[0, 0, 255])]), "its level 1 table is not in it"),
        (patch(qed(), &[(48, &[255; 8])]), "its virtual size is absurd"),
        (patch(vdi(), &[(0x4c, &[4])]), "it is a difference to another file"),
        (patch(vdi(), &[(0x1a8, &[1])]), "it needs another file below it"),
        (patch(vdi(), &[(0x1c7, &[1])]), "it needs another file below it"),
        (patch(vdi(), &[(0x170, &[255; 8])]), "its virtual size is absurd"),
        (patch(vdi(), &[(0x180, &[255; 4])]), "it has too many blocks"),
        (patch(vdi(), &[(0x154, &[0, 0, 0, 255])]), "its block map is not in it"),
        (patch(vdi(), &[(0x178, &[1])]), "its block size is not 1 MiB"),
        (b"# Disk DescriptorFile\nRW 9 FLAT \"/etc/shadow\" 0\n".to_vec(), "text descriptor"),
        (patch(vmdk(VMDK_TEXT), &[(12, &[0; 8])]), "its data is in other files"),
        (vmdk("RW 20480 FLAT \"/etc/shadow\" 0\n"), "its data is in other files"),
        (vmdk("RW 20480 SPARSE \"/etc/shadow\"\n"), "its data is in other files"),
        (vmdk("RW 9 SPARSE \"a\"\nRW 9 SPARSE \"b\"\n"), "its data is in other files"),
        (vmdk("parentFileNameHint=\"/etc/shadow\"\n"), "it needs another file below it"),
        (patch(vmdk(VMDK_TEXT), &[(12, &[255; 8])]), "its grain directory is not in it"),
        (patch(vmdk(VMDK_TEXT), &[(20, &[3])]), "its grain size is out of range"),
        (patch(vmdk(VMDK_TEXT), &[(44, &[0, 0])]), "its grain tables have an impossible size"),
        (patch(vmdk(VMDK_TEXT), &[(77, &[9])]), "its compression is not known"),
        (patch(vmdk(VMDK_TEXT), &[(28, &[255; 8])]), "its descriptor is not in it"),
        (streamed, "it lacks its footer"),
        (vhd(4), "it is a difference to another file"),
        (vhd(9), "its VHD type is not known"),
        (patch(vhd(2), &[((1 << 20) + 48, &[255; 8])]), "its data is not in it"),
        (patch(vhd(3), &[(512, b"x")]), "it lacks its second header"),
        (patch(vhd(3), &[(540, &[255; 4])]), "its block table is not in it"),
        (patch(vhd(3), &[(544, &[255; 4])]), "its block size is out of range"),
        (patch(vhd(3), &[(48, &[0, 255])]), "its virtual size is absurd"),
        (b"COWD".to_vec(), "ESX"),
        (b"LUKS\xba\xbe".to_vec(), "it is encrypted"),
        (b"vhdxfile".to_vec(), "VHDX is not supported"),
        (b"WithoutFreeSpace".to_vec(), "Parallels is not supported"),
        (Vec::new(), "it is empty"),
    ] {
        let error = check(&image).expect_err(why);
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
}

#[test]
fn a_backing_file_is_for_layers_only() {
    let name = "../../etc/shadow";
    let mut image = patch(
        qcow2(),
        &[
            (8, &512_u64.to_be_bytes()),
            (16, &(name.len() as u32).to_be_bytes()),
            (104, &0xe279_2aca_u32.to_be_bytes()),
            (108, &5_u32.to_be_bytes()),
            (112, b"qcow2"),
            (512, name.as_bytes()),
        ],
    );
    let header = check(&image).unwrap();
    let backing = Backing { file: name.into(), format: Some("qcow2".into()) };
    assert_eq!(header.backing, Some(backing.clone()));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    std::fs::write(&path, &image).unwrap();
    assert_eq!(inspect_layer(&path).unwrap().backing, Some(backing));
    let error = inspect(&path).unwrap_err();
    assert!(error.report().contains("it needs another file below it"), "{error:?}");
    image[512] = 0xff;
    assert!(check(&image).unwrap_err().to_string().contains("is not text"));
}

#[test]
fn only_regular_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [fifo.as_path(), dir.path(), Path::new("/dev/zero")] {
        let error = inspect(path).unwrap_err();
        assert!(error.report().contains("it is not a regular file"), "{error:?}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(
        seed in 0_usize..7,
        noise in prop::collection::vec((0_usize..1536, any::<u8>()), 0..48),
        cut in 0_usize..2048,
    ) {
        let mut image = match seed {
            0 => qcow2(),
            1 => qed(),
            2 => vdi(),
            3 => vmdk(VMDK_TEXT),
            4 => vhd(2),
            5 => vhd(3),
            _ => vec![0; 2048],
        };
        for (at, value) in noise {
            image[at] = value;
        }
        drop(check(&image));
        image.truncate(cut);
        drop(check(&image));
    }
}
