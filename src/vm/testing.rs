//! What the tests of this module share: a VM without an image.

use std::path::Path;

use crate::model::owner::Owner;
use crate::model::vm::{Accel, Disk, DiskCache, DiskFormat, DiskModel, HostKey, Seed, VmSpec};

/// A VM whose directory is `outer/vm0`, with a blank disk and a seed.
pub fn spec(outer: &Path) -> VmSpec {
    let base = outer.join("base");
    std::fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
    VmSpec {
        owner: Owner::local(3),
        rank: 0,
        template: "tiny".into(),
        dir: outer.join("vm0"),
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
        seed: Some(Seed {
            instance_id: "pavo-l3-0".into(),
            hostname: "vm0".into(),
            domain: None,
            user_data: None,
            authorized_keys: Vec::new(),
            host_key: HostKey {
                seed: "01".repeat(32),
                public: "02".repeat(32),
                openssh_private: String::new(),
                openssh_public: String::new(),
            },
        }),
        kernel: None,
        custom_args: Vec::new(),
        dial: None,
        paused: false,
        restore: None,
        extras: Default::default(),
    }
}

/// The process in whose command line `path` is named.
pub fn process_with(path: &Path) -> Option<nix::unistd::Pid> {
    let path = path.to_str().unwrap();
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        entry.unwrap().file_name().to_str().and_then(|name| name.parse::<i32>().ok())
    });
    let named = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(path)
    };
    pids.filter(named).map(nix::unistd::Pid::from_raw).next()
}
