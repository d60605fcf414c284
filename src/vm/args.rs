//! QEMU's command line, from a resolved VM and nothing else.
//!
//! Pure: the same VM gives the same arguments, held by `tests/golden/args-*.txt`.
//! JSON is used wherever QEMU 7.2 takes it (`-blockdev`, `-device`, `-netdev`,
//! `-object`), so that no text of the user's can become an option; where it does
//! not, commas are doubled, which is QEMU's own escape.
//!
//! The VM's process talks to QEMU over sockets that QEMU inherits. The control
//! connection and the console are connected pairs: nothing to poll for, no byte
//! lost, and no path by which anybody else could reach them.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::model::vm::{Accel, Disk, DiskCache, DiskModel, Nic, VmSpec};

/// What the VM's process made for QEMU to use. Descriptors are those that QEMU
/// inherits, under these numbers.
#[derive(Clone, Copy, Debug)]
pub struct Wiring<'a> {
    /// One end of a connected pair: QMP.
    pub qmp: RawFd,
    /// One end of a connected pair: the first serial port.
    pub console: RawFd,
    /// A listening socket: the guest agent's channel.
    pub agent: RawFd,
    /// The overlay of `spec.disk`.
    pub disk: &'a Path,
    /// The volume of `spec.seed`.
    pub seed: &'a Path,
}

/// QEMU's arguments, without the program itself. Guest CPUs do not start: the
/// driver says `cont` once QMP answers, unless the VM is to stay paused.
///
/// # Errors
/// A path that JSON cannot hold (not UTF-8).
pub fn qemu(spec: &VmSpec, at: &Wiring<'_>) -> Result<Vec<OsString>> {
    let mut args = Args::default();
    args.option("-name", format!("guest=pavo-{}-{}", spec.owner, spec.name()));
    args.flag("-nodefaults").flag("-no-user-config");
    args.option("-display", "none");
    args.flag("-S").option("-rtc", "base=utc");
    args.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    cpu_and_memory(&mut args, spec);
    args.chardev("qmp", at.qmp, "").option("-mon", "chardev=qmp,mode=control");
    args.chardev("console", at.console, "");
    args.device(json!({ "driver": "isa-serial", "chardev": "console" }));
    if let Some(disk) = &spec.disk {
        main_disk(&mut args, disk, text(at.disk)?);
    }
    if spec.seed.is_some() {
        let file = json!({ "driver": "file", "filename": text(at.seed)? });
        args.json(
            "-blockdev",
            json!({ "driver": "raw", "node-name": "seed", "read-only": true, "file": file }),
        );
        args.device(json!({ "driver": "virtio-blk-pci", "id": "seed-dev", "drive": "seed" }));
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        interface(&mut args, index, nic);
    }
    args.json("-object", json!({ "qom-type": "rng-builtin", "id": "rng" }));
    args.device(json!({ "driver": "virtio-rng-pci", "rng": "rng" }));
    args.chardev("agent", at.agent, ",server=on,wait=off");
    args.device(json!({ "driver": "virtio-serial-pci", "id": "ports" }));
    args.device(json!({
        "driver": "virtserialport",
        "chardev": "agent",
        "name": "org.qemu.guest_agent.0",
    }));
    if let Some(kernel) = &spec.kernel {
        args.option("-kernel", &kernel.path).option("-append", &kernel.append);
    }
    args.0.extend(spec.custom_args.iter().map(OsString::from));
    Ok(args.0)
}

fn cpu_and_memory(args: &mut Args, spec: &VmSpec) {
    let (accel, cpu) = match spec.accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg", "max"),
    };
    let machine = escaped(&spec.machine_type);
    // A core file of QEMU is for debugging QEMU: without the guest's memory.
    args.option("-machine", format!("type={machine},accel={accel},dump-guest-core=off"));
    args.option("-cpu", spec.cpu_model.as_deref().unwrap_or(cpu));
    let cores = spec.cores;
    args.option("-smp", format!("cpus={cores},sockets=1,cores={cores},threads=1"));
    args.option("-m", format!("size={}M", spec.memory_mib));
    args.option("-overcommit", "mem-lock=off");
}

/// The overlay. A full host file system pauses the guest (QEMU's default for
/// `werror`), which loses nothing.
fn main_disk(args: &mut Args, disk: &Disk, overlay: &str) {
    let (direct, no_flush, write_cache) = match disk.cache {
        DiskCache::Writeback => (false, false, true),
        DiskCache::None => (true, false, true),
        DiskCache::Unsafe => (false, true, true),
        DiskCache::Writethrough => (false, false, false),
        DiskCache::Directsync => (true, false, false),
    };
    let cache = json!({ "direct": direct, "no-flush": no_flush });
    args.json(
        "-blockdev",
        json!({
            "driver": "qcow2",
            "node-name": "disk",
            "discard": "unmap",
            "cache": cache,
            "file": {
                "driver": "file",
                "filename": overlay,
                "discard": "unmap",
                "cache": cache,
            },
        }),
    );
    let driver = match disk.model {
        DiskModel::Virtio => "virtio-blk-pci",
        DiskModel::VirtioScsi => "scsi-hd",
        DiskModel::Ide => "ide-hd",
    };
    if disk.model == DiskModel::VirtioScsi {
        args.device(json!({ "driver": "virtio-scsi-pci", "id": "scsi" }));
    }
    args.device(json!({
        "driver": driver,
        "id": "disk-dev",
        "drive": "disk",
        "bootindex": 0,
        "write-cache": if write_cache { "on" } else { "off" },
    }));
}

/// An interface on its TAP device. The firmware has no business on the network:
/// no boot ROM.
fn interface(args: &mut Args, index: usize, nic: &Nic) {
    let id = format!("net{index}");
    args.json(
        "-netdev",
        json!({
            "type": "tap",
            "id": id,
            "ifname": nic.tap,
            "script": "no",
            "downscript": "no",
        }),
    );
    let mut device = json!({
        "driver": nic.model,
        "id": format!("{id}-dev"),
        "netdev": id,
        "mac": nic.mac.to_string(),
        "romfile": "",
    });
    if nic.model.starts_with("virtio-net") {
        // Guests that ask nobody (layer 2) learn the MTU too.
        device["host_mtu"] = nic.mtu.into();
    }
    args.device(device);
}

/// Arguments, as they grow.
#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.as_ref().into());
        self
    }

    fn json(&mut self, name: &str, value: Value) -> &mut Self {
        self.option(name, value.to_string())
    }

    fn device(&mut self, value: Value) -> &mut Self {
        self.json("-device", value)
    }

    /// A character device on an inherited socket.
    fn chardev(&mut self, id: &str, descriptor: RawFd, more: &str) -> &mut Self {
        self.option("-chardev", format!("socket,id={id},fd={descriptor}{more}"))
    }
}

/// Text inside one of QEMU's comma-separated options.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::usage(format!("`{}` is not UTF-8", path.display()))
            .help("set PAVO_TMPDIR to a folder with a plain name")
    })
}
