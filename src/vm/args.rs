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

use super::devices::{self, Attachments};
use crate::error::{Error, Result};
use crate::model::vm::{Accel, Disk, Nic, VmSpec};

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
    /// One end of a connected pair: the channel of our own agent.
    pub own_agent: RawFd,
    /// The same for pcocc's agent.
    pub pcoccs_agent: RawFd,
    /// The overlay of `spec.disk`.
    pub disk: &'a Path,
    /// The volume of `spec.seed`.
    pub seed: &'a Path,
    /// What belongs to `spec.extras`.
    pub extras: &'a Attachments,
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
    // A guest that powers off can still be saved.
    args.flag("-S").flag("-no-shutdown").option("-rtc", "base=utc");
    args.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    if spec.restore.is_some() {
        args.option("-incoming", "defer");
    }
    cpu_and_memory(&mut args, spec, at.extras);
    devices::firmware(&mut args, at.extras)?;
    args.chardev("qmp", at.qmp, "").option("-mon", "chardev=qmp,mode=control");
    args.chardev("console", at.console, "");
    args.device(json!({ "driver": "isa-serial", "chardev": "console" }));
    devices::iothreads(&mut args, spec);
    devices::disk_controller(&mut args, spec);
    if let Some(disk) = &spec.disk {
        // One of a checkpoint names the image where it was then.
        let below = spec.restore.as_ref().map(|_| text(&disk.backing)).transpose()?;
        main_disk(&mut args, spec, disk, text(at.disk)?, below);
    }
    devices::drives(&mut args, spec, at.extras)?;
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
    args.chardev("own-agent", at.own_agent, "");
    args.device(json!({
        "driver": "virtserialport",
        "id": super::agent::DEVICE,
        "chardev": "own-agent",
        "name": pavo_agent::PORT,
    }));
    if spec.has_pcocc_port() {
        args.chardev("pcocc-agent", at.pcoccs_agent, "");
        args.device(json!({
            "driver": "virtserialport",
            "id": super::agent::pcocc::DEVICE,
            "chardev": "pcocc-agent",
            "name": super::agent::pcocc::PORT,
        }));
    }
    devices::mounts(&mut args, spec, at.extras)?;
    devices::tpm(&mut args, at.extras);
    devices::display(&mut args, spec, at.extras);
    if let Some(kernel) = &spec.kernel {
        args.option("-kernel", &kernel.path).option("-append", &kernel.append);
    }
    args.0.extend(spec.custom_args.iter().map(OsString::from));
    Ok(args.0)
}

fn cpu_and_memory(args: &mut Args, spec: &VmSpec, extras: &Attachments) {
    let (accel, cpu) = match spec.accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg", "max"),
    };
    // A guest that goes on has the version that it had.
    let kind = spec.restore.as_ref().map(|restore| &restore.machine.kind);
    let machine = escaped(kind.unwrap_or(&spec.machine_type));
    // A core file of QEMU is for debugging QEMU: without the guest's memory.
    let more = devices::machine_options(spec, extras);
    args.option("-machine", format!("type={machine},accel={accel},dump-guest-core=off{more}"));
    args.option("-cpu", spec.cpu_model.as_deref().unwrap_or(cpu));
    let cores = spec.cores;
    args.option("-smp", format!("cpus={cores},sockets=1,cores={cores},threads=1"));
    args.option("-m", format!("size={}M", spec.memory_mib));
    args.option("-overcommit", "mem-lock=off");
    devices::memory(args, spec, extras);
}

/// The overlay. A full host file system pauses the guest (QEMU's default for
/// `werror`), which loses nothing.
fn main_disk(args: &mut Args, spec: &VmSpec, disk: &Disk, overlay: &str, below: Option<&str>) {
    let cache = devices::cache(disk.cache);
    let mut layer = json!({
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
    });
    if let Some(below) = below {
        layer["backing"] = json!({
            "driver": disk.backing_format.as_str(),
            "read-only": true,
            "file": { "driver": "file", "filename": below, "read-only": true },
        });
    }
    args.json("-blockdev", layer);
    let mut device = devices::disk_device(spec, 0, disk.cache);
    device["id"] = "disk-dev".into();
    device["drive"] = "disk".into();
    // A kernel that is given has the first place itself.
    device["bootindex"] = u32::from(spec.kernel.is_some()).into();
    args.device(device);
}

/// What a virtio guest leaves to the switch, and the switch to it.
const OFFLOADS: [&str; 10] = [
    "csum",
    "gso",
    "guest_csum",
    "guest_ecn",
    "guest_tso4",
    "guest_tso6",
    "guest_ufo",
    "host_tso4",
    "host_tso6",
    "host_ufo",
];

/// An interface on its TAP device. The firmware has no business on the network:
/// no boot ROM.
fn interface(args: &mut Args, index: usize, nic: &Nic) {
    let id = format!("net{index}");
    let mut netdev = json!({
        "type": "tap",
        "id": id,
        "ifname": nic.tap,
        "script": "no",
        "downscript": "no",
    });
    if !nic.offloads {
        // Without a header on frames nobody can be told what is still to be done to them.
        netdev["vnet_hdr"] = false.into();
    }
    if nic.queues > 1 {
        netdev["queues"] = nic.queues.into();
    }
    args.json("-netdev", netdev);
    let mut device = json!({
        "driver": nic.model,
        "id": format!("{id}-dev"),
        "netdev": id,
        "mac": nic.mac.to_string(),
        "romfile": "",
    });
    if nic.queues > 1 {
        device["mq"] = true.into();
        // One interrupt for each direction of each, one for changes, one for control.
        device["vectors"] = (2 * nic.queues + 2).into();
    }
    if nic.model.starts_with("virtio-net") {
        // Guests that ask nobody (layer 2) learn the MTU too.
        device["host_mtu"] = nic.mtu.into();
        for feature in OFFLOADS.iter().filter(|_| !nic.offloads) {
            device[*feature] = false.into();
        }
    }
    args.device(device);
}

/// Arguments, as they grow.
#[derive(Default)]
pub(super) struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    pub(super) fn option(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.as_ref().into());
        self
    }

    pub(super) fn json(&mut self, name: &str, value: Value) -> &mut Self {
        self.option(name, value.to_string())
    }

    pub(super) fn device(&mut self, value: Value) -> &mut Self {
        self.json("-device", value)
    }

    /// A character device on an inherited socket.
    pub(super) fn chardev(&mut self, id: &str, descriptor: RawFd, more: &str) -> &mut Self {
        self.option("-chardev", format!("socket,id={id},fd={descriptor}{more}"))
    }
}

/// Text inside one of QEMU's comma-separated options.
pub(super) fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

pub(super) fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::usage(format!("`{}` is not UTF-8", path.display()))
            .help("give the folder a plain name; for a job's files: PAVO_TMPDIR")
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::testing;
    use super::*;
    use crate::model::address::Mac;
    use crate::model::vm::{DiskCache, DiskModel, Kernel};
    use std::process::Command;

    fn nic(index: u8) -> Nic {
        Nic {
            network: "net".into(),
            tap: format!("ptl3-{index}"),
            mac: Mac([0x52, 0x54, 0, 0, 0, index]),
            model: if index == 0 { "virtio-net".into() } else { "e1000".into() },
            queues: 1,
            mtu: 1450,
            ipv4: None,
            ipv6: None,
            offloads: true,
        }
    }

    /// The VMs of the golden files.
    fn vms() -> Vec<(&'static str, VmSpec)> {
        let plain = testing::spec(tempfile::tempdir().unwrap().path());
        let mut networked = plain.clone();
        networked.cores = 4;
        networked.nics = vec![nic(0), nic(1)];
        let mut whole = networked.clone();
        whole.nics.iter_mut().for_each(|nic| nic.offloads = false);
        let mut queues = networked.clone();
        queues.nics[0].queues = 4;
        let mut scsi = plain.clone();
        let disk = scsi.disk.as_mut().unwrap();
        (disk.model, disk.cache) = (DiskModel::VirtioScsi, DiskCache::Directsync);
        scsi.cpu_model = Some("qemu64,+ssse3".into());
        let mut ide = plain.clone();
        let disk = ide.disk.as_mut().unwrap();
        (disk.model, disk.cache) = (DiskModel::Ide, DiskCache::None);
        ide.machine_type = "pc".into();
        let mut kernel = plain.clone();
        (kernel.disk, kernel.seed) = (None, None);
        kernel.kernel =
            Some(Kernel { path: "/boot/vm,linux".into(), append: "console=ttyS0,9600 a=b".into() });
        kernel.custom_args = vec!["-device".into(), "virtio-balloon-pci".into()];
        let mut kvm = plain.clone();
        kvm.accel = Accel::Kvm;
        vec![
            ("plain", plain),
            ("networked", networked),
            ("no-offloads", whole),
            ("queues", queues),
            ("scsi", scsi),
            ("ide", ide),
            ("kernel", kernel),
            ("kvm", kvm),
        ]
    }

    fn wiring<'a>(disk: &'a Path, seed: &'a Path, extras: &'a Attachments) -> Wiring<'a> {
        Wiring {
            qmp: 10,
            console: 11,
            agent: 12,
            own_agent: 14,
            pcoccs_agent: 15,
            disk,
            seed,
            extras,
        }
    }

    /// Compares the whole command line with `tests/golden/args-NAME.txt`.
    pub fn golden(name: &str, spec: &VmSpec, extras: &Attachments) {
        let wiring = wiring(Path::new("/job/vm0/disk"), Path::new("/job/vm0/seed"), extras);
        let lines: String = qemu(spec, &wiring)
            .unwrap()
            .iter()
            .map(|arg| format!("{}\n", arg.to_str().unwrap()))
            .collect();
        let golden =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/args-{name}.txt"));
        if std::env::var_os("PAVO_BLESS").is_some() {
            std::fs::write(&golden, &lines).unwrap();
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        assert_eq!(lines, expected, "{}: PAVO_BLESS=1 rewrites it", golden.display());
    }

    #[test]
    fn whole_command_lines_are_as_the_golden_files_show() {
        for (name, spec) in vms() {
            golden(name, &spec, &Attachments::default());
        }
    }

    #[test]
    fn one_that_goes_on_waits_for_its_memory_on_the_machine_that_it_was() {
        use crate::model::checkpoint::{Machine, Restore, Stored};
        let (_, mut spec) = vms().swap_remove(0);
        let stored = Stored { name: "m".into(), bytes: 1, sha256: String::new() };
        let kind = "pc-q35-7.2".into();
        let (qemu, accel, processor, nodes) = ([7, 2, 0], Accel::Tcg, None, Vec::new());
        let (lacking, pcocc) = (Vec::new(), false);
        let machine = Machine { qemu, kind, accel, processor, lacking, cores: 1, nodes, pcocc };
        let (dir, paused) = ("/saved".into(), false);
        let (memory, disk, seed, former) = (stored, None, None, None);
        let restore = Restore { dir, paused, machine, memory, disk, seed, former };
        spec.restore = Some(Box::new(restore));
        let path = Path::new("/job/disk");
        let args = qemu_args(&spec, path);
        let after = |name: &str| {
            let pair = args.windows(2).find(|pair| pair[0] == name);
            pair.unwrap()[1].to_str().unwrap().to_owned()
        };
        assert_eq!(after("-incoming"), "defer");
        assert!(after("-machine").starts_with("type=pc-q35-7.2,"));
        let layer: Value = serde_json::from_str(&after("-blockdev")).unwrap();
        let image = &spec.disk.as_ref().unwrap().backing;
        // Wherever it was when the disk was written down.
        assert_eq!(layer["backing"]["file"]["filename"], image.to_str().unwrap());
        assert_eq!(layer["backing"]["driver"], "raw");
        // The ports are those that it had.
        let has_port = |args: &[OsString]| {
            args.iter().any(|arg| arg.to_str().unwrap().contains("\"pcocc_agent\""))
        };
        assert!(!has_port(&args));
        spec.restore.as_mut().unwrap().machine.pcocc = true;
        assert!(has_port(&qemu_args(&spec, path)));
    }

    fn qemu_args(spec: &VmSpec, path: &Path) -> Vec<OsString> {
        qemu(spec, &wiring(path, path, &Attachments::default())).unwrap()
    }

    #[test]
    fn no_name_or_path_becomes_an_option() {
        let (_, mut spec) = vms().swap_remove(1);
        spec.machine_type = "q35,accel=kvm".into();
        spec.nics[0].tap = "t,script=/bin/sh".into();
        spec.nics[0].model = "virtio-net\",\"driver\":\"x".into();
        let path = Path::new("/a\",b/x=y,z");
        let args = qemu(&spec, &wiring(path, path, &Attachments::default())).unwrap();
        let after = |name: &str| {
            let found = args.windows(2).filter(|pair| pair[0] == name);
            found.map(|pair| pair[1].to_str().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(after("-machine"), ["type=q35,,accel=kvm,accel=tcg,dump-guest-core=off"]);
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(json(after("-netdev")[0])["ifname"], "t,script=/bin/sh");
        assert_eq!(json(after("-blockdev")[0])["file"]["filename"], path.to_str().unwrap());
        let devices: Vec<Value> = after("-device").into_iter().map(json).collect();
        assert!(devices.iter().any(|device| device["driver"] == spec.nics[0].model.as_str()));
    }

    #[test]
    fn a_path_that_json_cannot_hold_is_refused() {
        use std::os::unix::ffi::OsStrExt;
        let (_, spec) = vms().swap_remove(0);
        let path = Path::new(OsStr::from_bytes(b"/job/\xff"));
        assert!(qemu(&spec, &wiring(path, path, &Attachments::default())).is_err());
    }

    /// Starts QEMU with these arguments, in a network namespace with the taps, up
    /// to the answer to its first command.
    pub fn accepted(spec: &VmSpec, extras: &Attachments) {
        use std::io::{BufRead, BufReader, Write};
        use std::os::unix::net::{UnixListener, UnixStream};
        let dir = tempfile::tempdir().unwrap();
        let (disk, seed) = (dir.path().join("a disk,x"), dir.path().join("seed"));
        if let Some(spec) = &spec.disk {
            let base = dir.path().join("base");
            std::fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
            let size = spec.virtual_size;
            super::super::overlay::create(&disk, &base, spec.backing_format, size).unwrap();
        }
        std::fs::File::create(&seed).unwrap().set_len(1 << 20).unwrap();
        let (ours, qmp) = UnixStream::pair().unwrap();
        let (_console, console) = UnixStream::pair().unwrap();
        let agent = UnixListener::bind(dir.path().join("agent")).unwrap();

        let tap = |nic: &Nic| {
            let kind = if nic.queues > 1 { " multi_queue" } else { "" };
            format!("ip tuntap add {} mode tap{kind} || exit 9; ", nic.tap)
        };
        let taps: Vec<_> = spec.nics.iter().map(tap).collect();
        let mut command = Command::new(if taps.is_empty() { "sh" } else { "unshare" });
        if !taps.is_empty() {
            command.args(["--user", "--map-root-user", "--net", "sh"]);
        }
        let script = taps.concat() + "exec \"$@\"";
        command.args(["-c", &script, "sh"]).arg(&spec.qemu_bin);
        let (_own_agent, own_agent) = UnixStream::pair().unwrap();
        let (_pcoccs_agent, pcoccs_agent) = UnixStream::pair().unwrap();
        let ends =
            vec![qmp.into(), console.into(), agent.into(), own_agent.into(), pcoccs_agent.into()];
        let [qmp, console, agent, own_agent, pcoccs_agent] =
            crate::host::spawn::inherit(&mut command, ends).try_into().unwrap();
        let wiring = Wiring {
            qmp,
            console,
            agent,
            own_agent,
            pcoccs_agent,
            disk: &disk,
            seed: &seed,
            extras,
        };
        command.args(qemu(spec, &wiring).unwrap());
        crate::host::spawn::die_with_parent(&mut command);
        let mut child = command.spawn().unwrap();
        drop(command);

        let mut lines = BufReader::new(&ours).lines();
        let greeting = lines.next().map(Result::unwrap).unwrap_or_default();
        assert!(greeting.contains("QMP"), "{spec:?}: {:?}", child.wait());
        (&ours).write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "{\"return\": {}}\r".trim_end());
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn qemu_accepts_every_golden_command_line_that_can_run_here() {
        let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        for (name, spec) in vms() {
            if name == "kernel" || name == "kvm" {
                continue;
            }
            if let (Err(error), false) = (&tun, spec.nics.is_empty()) {
                assert!(std::env::var_os("CI").is_none(), "/dev/net/tun: {error}");
                eprintln!("skipped: `{name}` needs /dev/net/tun: {error}");
                continue;
            }
            accepted(&spec, &Attachments::default());
        }
    }
}
