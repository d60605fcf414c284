//! The part of QEMU's command line that most VMs do without: further disks, folders of the
//! host, UEFI, a TPM, threads for disks, memory that is shared or of huge pages, NUMA.
//!
//! As pure as [`args`](super::args), which it belongs to.

use std::os::fd::RawFd;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::args::{Args, escaped, text};
use crate::error::Result;
use crate::model::vm::{DiskCache, DiskModel, MountKind, RemoteDisplay, VmSpec};

/// What the VM's process found or made on this host for [`Extras`](crate::model::vm::Extras).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachments {
    /// UEFI: its code, and the VM's own copy of its variables.
    pub uefi: Option<(PathBuf, PathBuf)>,
    /// One end of a connected pair: the TPM's emulator.
    pub tpm: Option<RawFd>,
    /// The VM's directory, in which the screen is shown.
    pub display: Option<RawFd>,
    /// Where a daemon listens, for each mount that has one.
    pub shares: Vec<Option<PathBuf>>,
    /// Whether a drive is a device of the host, for each.
    pub devices: Vec<bool>,
    /// The guest's NUMA nodes, if there is more than one.
    pub nodes: Vec<Node>,
}

/// A NUMA node of the guest: CPUs in a row, and memory of one node of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    pub host_node: u32,
    /// The first CPU and the last one.
    pub cpus: (u32, u32),
    pub memory_mib: u64,
}

/// Whether the guest's memory has to be an object of its own.
fn own_memory(spec: &VmSpec) -> bool {
    spec.extras.huge_pages || shared_memory(spec)
}

/// Whether a daemon has to see the guest's memory.
fn shared_memory(spec: &VmSpec) -> bool {
    spec.extras.mounts.iter().any(|mount| mount.kind == MountKind::VirtioFs)
}

/// What the extras add to `-machine`.
pub(super) fn machine_options(spec: &VmSpec, extras: &Attachments) -> String {
    let mut options = String::new();
    if own_memory(spec) && extras.nodes.is_empty() {
        options += ",memory-backend=memory";
    }
    if extras.uefi.is_some() {
        options += ",pflash0=uefi-code,pflash1=uefi-vars";
    }
    options
}

/// The guest's memory, where it is not just QEMU's own.
pub(super) fn memory(args: &mut Args, spec: &VmSpec, extras: &Attachments) {
    let object = |id: &str, mib: u64| {
        if !own_memory(spec) {
            return json!({ "qom-type": "memory-backend-ram", "id": id, "size": mib << 20 });
        }
        let mut memory = json!({
            "qom-type": "memory-backend-memfd",
            "id": id,
            "size": mib << 20,
            "share": shared_memory(spec),
        });
        if spec.extras.huge_pages {
            memory["hugetlb"] = true.into();
            // Were there too few, the guest would die when it needs them.
            memory["prealloc"] = true.into();
        }
        memory
    };
    for (index, node) in extras.nodes.iter().enumerate() {
        let id = format!("memory{index}");
        let mut memory = object(&id, node.memory_mib);
        memory["host-nodes"] = json!([node.host_node]);
        memory["policy"] = "bind".into();
        args.json("-object", memory);
        let (first, last) = node.cpus;
        args.option("-numa", format!("node,nodeid={index},cpus={first}-{last},memdev={id}"));
    }
    if own_memory(spec) && extras.nodes.is_empty() {
        args.json("-object", object("memory", spec.memory_mib));
    }
}

pub(super) fn firmware(args: &mut Args, extras: &Attachments) -> Result<()> {
    let Some((code, variables)) = &extras.uefi else { return Ok(()) };
    for (name, path, readonly) in [("uefi-code", code, true), ("uefi-vars", variables, false)] {
        let file = json!({ "driver": "file", "filename": text(path)? });
        args.json(
            "-blockdev",
            json!({ "driver": "raw", "node-name": name, "read-only": readonly, "file": file }),
        );
    }
    Ok(())
}

pub(super) fn iothreads(args: &mut Args, spec: &VmSpec) {
    for index in 0..spec.extras.iothreads {
        args.json("-object", json!({ "qom-type": "iothread", "id": format!("io{index}") }));
    }
}

/// What disks are plugged into, where that is not PCI itself.
pub(super) fn disk_controller(args: &mut Args, spec: &VmSpec) {
    if model(spec) != DiskModel::VirtioScsi {
        return;
    }
    let mut controller = json!({ "driver": "virtio-scsi-pci", "id": "scsi" });
    if spec.extras.iothreads > 0 {
        controller["iothread"] = "io0".into();
    }
    args.device(controller);
}

/// All disks of a VM are of one model.
fn model(spec: &VmSpec) -> DiskModel {
    spec.disk.as_ref().map_or(DiskModel::Virtio, |disk| disk.model)
}

/// QEMU's words for a cache: `direct` and `no-flush`.
pub(super) fn cache(cache: DiskCache) -> Value {
    let direct = matches!(cache, DiskCache::None | DiskCache::Directsync);
    json!({ "direct": direct, "no-flush": cache == DiskCache::Unsafe })
}

/// The guest's side of its disk of this number, 0 for the main one.
pub(super) fn disk_device(spec: &VmSpec, index: u32, cache: DiskCache) -> Value {
    let driver = match model(spec) {
        DiskModel::Virtio => "virtio-blk-pci",
        DiskModel::VirtioScsi => "scsi-hd",
        DiskModel::Ide => "ide-hd",
    };
    let written_through = matches!(cache, DiskCache::Writethrough | DiskCache::Directsync);
    let mut device = json!({
        "driver": driver,
        "write-cache": if written_through { "off" } else { "on" },
    });
    let iothreads = spec.extras.iothreads;
    if model(spec) == DiskModel::Virtio && iothreads > 0 {
        device["iothread"] = format!("io{}", index % iothreads).into();
    }
    device
}

/// Disks that outlive the VM. The guest finds them by their order, or as `drive1`, `drive2`
/// below `/dev/disk/by-id/`.
pub(super) fn drives(args: &mut Args, spec: &VmSpec, extras: &Attachments) -> Result<()> {
    let devices = extras.devices.iter().copied().chain(std::iter::repeat(false));
    for ((index, drive), device) in (1..).zip(&spec.extras.drives).zip(devices) {
        let id = format!("drive{index}");
        let cache = cache(drive.cache);
        let mut file = json!({
            "driver": if device { "host_device" } else { "file" },
            "filename": text(&drive.path)?,
            "discard": "unmap",
            "cache": cache,
        });
        if drive.shared {
            file["locking"] = "off".into();
        }
        args.json(
            "-blockdev",
            json!({
                "driver": drive.format().as_str(),
                "node-name": id,
                "discard": "unmap",
                "cache": cache,
                "file": file,
            }),
        );
        let mut device = disk_device(spec, index, drive.cache);
        device["id"] = format!("{id}-dev").into();
        device["drive"] = id.clone().into();
        device["serial"] = id.into();
        if drive.shared {
            device["share-rw"] = true.into();
        }
        args.device(device);
    }
    Ok(())
}

/// Folders of the host. Files that the guest makes are the user's: it cannot give them away.
pub(super) fn mounts(args: &mut Args, spec: &VmSpec, extras: &Attachments) -> Result<()> {
    for (index, mount) in spec.extras.mounts.iter().enumerate() {
        let id = format!("fs{index}");
        match extras.shares.get(index).and_then(Option::as_deref) {
            Some(socket) => {
                let socket = escaped(text(socket)?);
                args.option("-chardev", format!("socket,id={id},path={socket}"));
                args.device(json!({
                    "driver": "vhost-user-fs-pci",
                    "chardev": id,
                    "tag": mount.tag,
                }));
            }
            None => {
                let path = escaped(text(&mount.path)?);
                let readonly = if mount.readonly { ",readonly=on" } else { "" };
                // One export may hold several file systems, whose files share numbers.
                let rest = format!("security_model=none,multidevs=remap{readonly}");
                args.option("-fsdev", format!("local,id={id},path={path},{rest}"));
                args.device(json!({
                    "driver": "virtio-9p-pci",
                    "fsdev": id,
                    "mount_tag": mount.tag,
                }));
            }
        }
    }
    Ok(())
}

pub(super) fn tpm(args: &mut Args, extras: &Attachments) {
    let Some(descriptor) = extras.tpm else { return };
    args.chardev("tpm", descriptor, "");
    args.option("-tpmdev", "emulator,id=tpm,chardev=tpm");
    args.device(json!({ "driver": "tpm-crb", "tpmdev": "tpm" }));
}

/// The screen, with keyboard and pointer, and where it is shown: at a socket in a directory
/// that is named by a descriptor, since its path may be too long for one.
pub(super) fn display(args: &mut Args, spec: &VmSpec, extras: &Attachments) {
    let (Some(protocol), Some(dir)) = (spec.extras.display, extras.display) else { return };
    let socket = format!("/proc/self/fd/{dir}/{}", super::display::SOCKET);
    match protocol {
        RemoteDisplay::Vnc => args.option("-vnc", format!("unix:{socket},password=on")),
        RemoteDisplay::Spice => args.option("-spice", format!("unix=on,addr={socket}")),
    };
    args.device(json!({ "driver": "VGA" }));
    args.device(json!({ "driver": "qemu-xhci", "id": "usb" }));
    args.device(json!({ "driver": "usb-kbd", "bus": "usb.0" }));
    // Its pointer is where the viewer's is.
    args.device(json!({ "driver": "usb-tablet", "bus": "usb.0" }));
}

#[cfg(test)]
mod tests {
    use super::super::args::tests::{accepted, golden};
    use super::super::testing;
    use super::*;
    use crate::model::vm::{Drive, Mount};

    fn mount(tag: &str, readonly: bool, kind: MountKind) -> Mount {
        Mount { tag: tag.into(), path: "/data/a,b".into(), readonly, kind }
    }

    fn drive(path: &str, cache: DiskCache, shared: bool) -> Drive {
        Drive { path: path.into(), format: None, cache, shared }
    }

    fn plain() -> VmSpec {
        testing::spec(tempfile::tempdir().unwrap().path())
    }

    /// All that needs no daemon.
    fn extras() -> (VmSpec, Attachments) {
        let mut spec = plain();
        spec.cores = 4;
        spec.extras.iothreads = 2;
        spec.extras.mounts =
            vec![mount("home", false, MountKind::Virtio9p), mount("ro", true, MountKind::Virtio9p)];
        spec.extras.drives = vec![
            drive("/work/log.raw", DiskCache::Writeback, false),
            drive("/work/all.qcow2", DiskCache::Directsync, true),
            drive("/dev/vg/lv", DiskCache::None, false),
        ];
        let uefi = Some(("/usr/share/CODE.fd".into(), "/job/vm0/uefi-vars.fd".into()));
        (spec, Attachments { uefi, devices: vec![false, false, true], ..Attachments::default() })
    }

    /// Memory of every kind.
    fn memory() -> (VmSpec, Attachments) {
        let mut spec = plain();
        (spec.cores, spec.memory_mib, spec.extras.huge_pages) = (4, 100, true);
        spec.extras.mounts = vec![mount("home", false, MountKind::VirtioFs)];
        let node = |host_node, cpus, memory_mib| Node { host_node, cpus, memory_mib };
        let nodes = vec![node(0, (0, 2), 74), node(1, (3, 3), 26)];
        let shares = vec![Some("/job/vm0/fs0.sock".into())];
        (spec, Attachments { nodes, shares, tpm: Some(13), ..Attachments::default() })
    }

    #[test]
    fn whole_command_lines_are_as_the_golden_files_show() {
        let (spec, attachments) = extras();
        golden("extras", &spec, &attachments);
        let (spec, attachments) = memory();
        golden("memory", &spec, &attachments);
        let (mut spec, _) = extras();
        (spec.extras.mounts, spec.extras.huge_pages) = (Vec::new(), true);
        spec.disk.as_mut().unwrap().model = DiskModel::VirtioScsi;
        golden("scsi-extras", &spec, &Attachments::default());
        for (name, protocol) in [("vnc", RemoteDisplay::Vnc), ("spice", RemoteDisplay::Spice)] {
            let mut spec = plain();
            spec.extras.display = Some(protocol);
            golden(name, &spec, &Attachments { display: Some(14), ..Attachments::default() });
        }
    }

    #[test]
    fn qemu_accepts_what_needs_no_other_program() {
        let dir = tempfile::tempdir().unwrap();
        let (mut spec, mut attachments) = extras();
        (attachments.uefi, attachments.devices) = (None, Vec::new());
        spec.extras.drives.truncate(1);
        spec.extras.drives[0].path = dir.path().join("a drive");
        std::fs::File::create(&spec.extras.drives[0].path).unwrap().set_len(1 << 20).unwrap();
        spec.extras.mounts.iter_mut().for_each(|mount| mount.path = dir.path().into());
        accepted(&spec, &attachments);
        // Two nodes of the guest on one of the host, which every machine has.
        let (_, mut attachments) = memory();
        let mut spec = plain();
        (spec.cores, spec.memory_mib) = (4, 100);
        (attachments.shares, attachments.tpm) = (Vec::new(), None);
        attachments.nodes.iter_mut().for_each(|node| node.host_node = 0);
        accepted(&spec, &attachments);
    }
}
