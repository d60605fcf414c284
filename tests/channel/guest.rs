//! The guest: a boot sector that echoes what it is sent, and the VM that it is for.

use std::path::Path;

use pavo::model::owner::Owner;
use pavo::model::vm::{Accel, Disk, DiskCache, DiskFormat, DiskModel, VmSpec};

/// Says `ready`, then echoes; to `F` it answers 128 Ki times `x` and a `!`, at `Q` it says
/// `bye` and powers itself off.
///
/// ```text
///       start: ax = ds = ss = 0; sp = 0x7000; si = ready; say(si)
///       echo:  wait for bit 0 of port 0x3fd; al = port 0x3f8
///              if al = 'Q': say(bye); off: port 0x604 = 0x2000; again
///              if al = 'F': 2 × 65536 × put('x'); al = '!'
///              put(al); goto echo
///       put:   wait for bit 5 of port 0x3fd; port 0x3f8 = al
/// ```
const ECHO: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x70, 0xfc, 0xbe, 0x66, 0x7c, 0xac, 0x84, 0xc0,
    0x74, 0x05, 0xe8, 0x42, 0x00, 0xeb, 0xf6, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xba,
    0xf8, 0x03, 0xec, 0x3c, 0x51, 0x74, 0x1a, 0x3c, 0x46, 0x75, 0x11, 0xbb, 0x02, 0x00, 0x31, 0xc9,
    0xb0, 0x78, 0xe8, 0x22, 0x00, 0xe2, 0xf9, 0x4b, 0x75, 0xf6, 0xb0, 0x21, 0xe8, 0x18, 0x00, 0xeb,
    0xd6, 0xbe, 0x6e, 0x7c, 0xac, 0x84, 0xc0, 0x74, 0x05, 0xe8, 0x0b, 0x00, 0xeb, 0xf6, 0xba, 0x04,
    0x06, 0xb8, 0x00, 0x20, 0xef, 0xeb, 0xf7, 0x50, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb,
    0x58, 0xba, 0xf8, 0x03, 0xee, 0xc3, b'r', b'e', b'a', b'd', b'y', b'\r', b'\n', 0x00, b'b',
    b'y', b'e', b'\r', b'\n', 0x00,
];
/// What it answers to `F`, in `x`.
pub const FLOOD: usize = 2 << 16;

/// A VM of it, whose directory is `outer/node/vm0`.
pub fn spec(outer: &Path) -> VmSpec {
    let base = outer.join("base");
    let mut sector = ECHO.to_vec();
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    std::fs::write(&base, sector).unwrap();
    VmSpec {
        owner: Owner::local(7),
        rank: 0,
        template: "echo".into(),
        dir: outer.join("node").join("vm0"),
        cores: 1,
        memory_mib: 64,
        accel: Accel::Tcg,
        qemu_bin: "qemu-system-x86_64".into(),
        machine_type: "q35".into(),
        cpu_model: None,
        disk: Some(Disk {
            backing: base,
            backing_format: DiskFormat::Raw,
            virtual_size: 1 << 20,
            model: DiskModel::Virtio,
            cache: DiskCache::Unsafe,
        }),
        nics: Vec::new(),
        seed: None,
        kernel: None,
        custom_args: Vec::new(),
        dial: None,
        paused: false,
        extras: Default::default(),
    }
}
