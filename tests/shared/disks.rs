//! The smallest sane disk images of each format, whose headers tests then spoil.

/// Writes `numbers` at their offsets.
pub fn patch(mut bytes: Vec<u8>, patches: &[(usize, &[u8])]) -> Vec<u8> {
    for (at, value) in patches {
        bytes[*at..*at + value.len()].copy_from_slice(value);
    }
    bytes
}

/// A sane qcow2 of 1 GiB: header, refcount table, L1 table of two entries.
pub fn qcow2() -> Vec<u8> {
    patch(
        vec![0; 4 << 16],
        &[
            (0, b"QFI\xfb\0\0\0\x03"),
            (20, &16_u32.to_be_bytes()),
            (24, &(1_u64 << 30).to_be_bytes()),
            (36, &2_u32.to_be_bytes()),
            (40, &(3_u64 << 16).to_be_bytes()),
            (48, &(1_u64 << 16).to_be_bytes()),
            (56, &1_u32.to_be_bytes()),
            (96, &4_u32.to_be_bytes()),
            (100, &104_u32.to_be_bytes()),
        ],
    )
}

pub fn qed() -> Vec<u8> {
    patch(
        vec![0; 6 << 16],
        &[
            (0, b"QED\0"),
            (4, &65_536_u32.to_le_bytes()),
            (8, &4_u32.to_le_bytes()),
            (40, &(1_u64 << 16).to_le_bytes()),
            (48, &(1_u64 << 30).to_le_bytes()),
        ],
    )
}

pub fn vdi() -> Vec<u8> {
    patch(
        vec![0; 2 << 20],
        &[
            (0x40, &0xbeda_107f_u32.to_le_bytes()),
            (0x44, &0x0001_0001_u32.to_le_bytes()),
            (0x4c, &1_u32.to_le_bytes()),
            (0x154, &512_u32.to_le_bytes()),
            (0x170, &(8_u64 << 20).to_le_bytes()),
            (0x178, &(1_u32 << 20).to_le_bytes()),
            (0x180, &8_u32.to_le_bytes()),
        ],
    )
}

pub fn vmdk(text: &str) -> Vec<u8> {
    patch(
        vec![0; 1 << 20],
        &[
            (0, b"KDMV\x01\0\0\0"),
            (12, &20_480_u64.to_le_bytes()),
            (20, &128_u64.to_le_bytes()),
            (28, &1_u64.to_le_bytes()),
            (36, &20_u64.to_le_bytes()),
            (44, &512_u32.to_le_bytes()),
            (56, &26_u64.to_le_bytes()),
            (512, text.as_bytes()),
        ],
    )
}

pub const VMDK_TEXT: &str =
    "# Disk DescriptorFile\nparentCID=ffffffff\nRW 20480 SPARSE \"a.vmdk\"\n";

pub fn vhd(kind: u32) -> Vec<u8> {
    let footer = patch(
        vec![0; 512],
        &[
            (0, b"conectix"),
            (12, &0x0001_0000_u32.to_be_bytes()),
            (16, &512_u64.to_be_bytes()),
            (48, &(1_u64 << 20).to_be_bytes()),
            (60, &kind.to_be_bytes()),
        ],
    );
    let mut image = vec![0; 1 << 20];
    if kind != 2 {
        image[..512].copy_from_slice(&footer);
        image = patch(
            image,
            &[
                (512, b"cxsparse"),
                (528, &1536_u64.to_be_bytes()),
                (540, &1_u32.to_be_bytes()),
                (544, &(2_u32 << 20).to_be_bytes()),
            ],
        );
    }
    image.extend_from_slice(&footer);
    image
}
