//! What a VM's extras need of this host: looked at with the user's own rights, found, made
//! and started before QEMU is.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::fcntl::OFlag;
use nix::unistd::{AccessFlags, access};

use super::devices::Attachments;
use crate::error::{Context, Error, Result};
use crate::host::spawn;
use crate::model::vm::{DiskFormat, Drive, Firmware, Mount, MountKind, VmSpec};

/// UEFI for VMs, as distributions install it: the code, and variables that nobody has set.
const UEFI: [(&str, &str); 5] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
];
/// Its name, and where distributions have it that do not mean it to be found.
const VIRTIOFSD: [&str; 3] = ["virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"];
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// What helpers say, in the VM's directory.
const LOG: &str = "helpers.log";
const QCOW2: [u8; 4] = *b"QFI\xfb";

/// What was made and started. Its processes end with it.
#[derive(Debug, Default)]
pub struct Attached {
    pub args: Attachments,
    /// QEMU's end of the connection to the TPM.
    pub tpm: Option<OwnedFd>,
    /// The directory in which QEMU shows the screen.
    pub display: Option<OwnedFd>,
    helpers: Vec<Child>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        for helper in &mut self.helpers {
            // Most end with QEMU, by themselves.
            let _ = helper.kill();
            let _ = helper.wait();
        }
    }
}

impl Attached {
    /// Everything for this VM, whose directory exists.
    ///
    /// # Errors
    /// When this host lacks something, or the user may not use it: with the setting.
    pub fn make(spec: &VmSpec) -> Result<Self> {
        let mut attached = Self::default();
        if let Some(kernel) = &spec.kernel {
            check_kernel(&kernel.path).map_err(|error| wrong(spec, "kernel", error))?;
        }
        for drive in &spec.extras.drives {
            let device =
                check_drive(drive).map_err(|error| wrong(spec, "persistent-drives", error))?;
            attached.args.devices.push(device);
        }
        for mount in &spec.extras.mounts {
            check_mount(mount).map_err(|error| wrong(spec, "mount-points", error))?;
            let share = match mount.kind {
                MountKind::Virtio9p => None,
                MountKind::VirtioFs => Some(attached.share(spec, mount)?),
            };
            attached.args.shares.push(share);
        }
        if spec.extras.firmware == Firmware::Uefi {
            attached.args.uefi = Some(uefi(spec)?);
        }
        if spec.extras.huge_pages {
            check_huge_pages(spec.memory_mib).map_err(|error| wrong(spec, "huge-pages", error))?;
        }
        if spec.extras.tpm {
            attached.start_tpm(spec)?;
        }
        if spec.extras.display.is_some() {
            let flags = (OFlag::O_PATH | OFlag::O_DIRECTORY).bits();
            let dir = OpenOptions::new().read(true).custom_flags(flags).open(&spec.dir);
            attached.display = Some(dir.while_doing(|| "opening the VM's folder".into())?.into());
        }
        Ok(attached)
    }

    /// What a helper said that has ended, which none does as long as QEMU needs it.
    pub fn last_words(&mut self, dir: &Path) -> Option<String> {
        let ended = |helper: &mut Child| matches!(helper.try_wait(), Ok(Some(_)));
        if !self.helpers.iter_mut().any(ended) {
            return None;
        }
        let mut said = String::new();
        // Without its words there is still what QEMU says.
        let _ = File::open(dir.join(LOG)).and_then(|log| log.take(2048).read_to_string(&mut said));
        Some(said.trim().to_owned()).filter(|said| !said.is_empty())
    }

    /// Starts the daemon that shows a folder to the guest; returns where it listens.
    fn share(&mut self, spec: &VmSpec, mount: &Mount) -> Result<PathBuf> {
        let socket = spec.dir.join(format!("fs{}.sock", self.args.shares.len()));
        // We listen, and it takes over: QEMU need not wait for it.
        let listener = UnixListener::bind(&socket).while_doing(|| "making a socket".into())?;
        let listener = OwnedFd::from(listener);
        let started = self.start(spec, &VIRTIOFSD, &listener, |command, number| {
            command.arg(format!("--fd={number}")).arg("--shared-dir").arg(&mount.path);
            // It has the user's rights and no others, in whatever namespace.
            command.arg("--sandbox=none");
        });
        let help = "install it (Debian 13: virtiofsd), or use `type: virtio-9p`";
        started.map_err(|error| wrong(spec, "mount-points", error.help(help)))?;
        Ok(socket)
    }

    fn start_tpm(&mut self, spec: &VmSpec) -> Result<()> {
        let state = spec.dir.join("tpm");
        fs::create_dir(&state).while_doing(|| "making the TPM's folder".into())?;
        let (theirs, qemus) = UnixStream::pair().while_doing(|| "making a socket".into())?;
        let started = self.start(spec, &["swtpm"], &theirs.into(), |command, number| {
            command.args(["socket", "--tpm2", "--tpmstate"]);
            command.arg(format!("dir={}", state.display()));
            command.args(["--ctrl", &format!("type=unixio,clientfd={number}")]);
        });
        let help = "install it (Debian: swtpm), or take the setting out";
        started.map_err(|error| wrong(spec, "tpm", error.help(help)))?;
        self.tpm = Some(qemus.into());
        Ok(())
    }

    /// Starts a helper, wherever it is, that inherits a socket; what it says goes to a log.
    fn start(
        &mut self,
        spec: &VmSpec,
        places: &[&str],
        socket: &OwnedFd,
        with: impl Fn(&mut Command, RawFd),
    ) -> Result<()> {
        let doing = || format!("starting `{}`", places[0]);
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(spec.dir.join(LOG));
        let log = log.while_doing(doing)?;
        for place in places {
            let mut command = Command::new(place);
            let socket = socket.try_clone().while_doing(doing)?;
            let number = spawn::inherit(&mut command, vec![socket])[0];
            with(&mut command, number);
            command.stdin(Stdio::null());
            command.stdout(log.try_clone().while_doing(doing)?);
            command.stderr(log.try_clone().while_doing(doing)?);
            spawn::die_with_parent(&mut command);
            match command.spawn() {
                Ok(helper) => {
                    self.helpers.push(helper);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error).while_doing(doing),
            }
        }
        Err(Error::system(format!("`{}` is not installed on this host", places[0])))
    }
}

/// An error of a setting, and in what.
fn wrong(spec: &VmSpec, key: &str, error: Error) -> Error {
    let doing = || format!("carrying out {}", spec.setting(key));
    Err::<(), _>(error).while_doing(doing).expect_err("it was one")
}

/// The folder must be one that the user may use; QEMU opens it again, as the user too.
pub fn check_mount(mount: &Mount) -> Result<()> {
    let path = &mount.path;
    let doing = || format!("sharing the folder `{}`", path.display());
    let usable = || {
        if !fs::metadata(path)?.is_dir() {
            return Err(std::io::Error::other("it is no folder"));
        }
        access(path, AccessFlags::R_OK | AccessFlags::X_OK).map_err(Into::into)
    };
    let help = "name a folder that you can read";
    usable().map_err(|error| Error::config(error.to_string()).help(help)).while_doing(doing)
}

/// The kernel must be a file that the user may read.
pub fn check_kernel(path: &Path) -> Result<()> {
    let doing = || format!("opening the kernel `{}`", path.display());
    let usable = || {
        if !fs::metadata(path)?.is_file() {
            return Err(std::io::Error::other("it is no file"));
        }
        File::open(path).map(drop)
    };
    let help = "name a kernel that you can read; those in /boot are root's on some systems";
    usable().map_err(|error| Error::config(error.to_string()).help(help)).while_doing(doing)
}

/// Whether the drive, which the user must be able to write, is a device of the host.
pub fn check_drive(drive: &Drive) -> Result<bool> {
    let path = &drive.path;
    let doing = || format!("opening the drive `{}`", path.display());
    // Looked at first: opening a FIFO would wait.
    let metadata = fs::metadata(path).while_doing(doing).map_err(|error| {
        let format = drive.format().as_str();
        error.help(format!("make it: `qemu-img create -f {format} '{}' 10G`", path.display()))
    })?;
    let device = metadata.file_type().is_block_device();
    if !device && !metadata.is_file() {
        return Err(Error::config("it is neither a file nor a disk")).while_doing(doing);
    }
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.while_doing(doing).map_err(|error| error.help("it must be yours to write"))?;
    check_format(&file, drive).while_doing(doing)?;
    Ok(device)
}

/// A raw disk that begins as qcow2 is either a mistake, or a guest wants QEMU to believe it:
/// with a file of the host behind it.
fn check_format(file: &File, drive: &Drive) -> Result<()> {
    let mut magic = [0; 4];
    let found = file.take(4).read_exact(&mut magic).is_ok() && magic == QCOW2;
    match (drive.format(), found) {
        (DiskFormat::Raw, true) if drive.format.is_none() => {
            Err(Error::config("it is raw by its name, and has begun as qcow2")
                .help("say which: `format: qcow2`, or `raw` if the guest wrote that"))
        }
        (DiskFormat::Qcow2, false) => Err(Error::config("it is qcow2 by its name, and is none")
            .help("say `format: raw`, or make it with `qemu-img create -f qcow2`")),
        _ => Ok(()),
    }
}

/// Finds UEFI, and makes the VM its own variables.
fn uefi(spec: &VmSpec) -> Result<(PathBuf, PathBuf)> {
    let found = UEFI
        .iter()
        .find(|(code, variables)| Path::new(code).is_file() && Path::new(variables).is_file());
    let (code, variables) = found.ok_or_else(|| {
        let error = Error::system("UEFI for VMs is not installed on this host")
            .help("install it (Debian: ovmf, Fedora: edk2-ovmf), or set `firmware: bios`");
        wrong(spec, "firmware", error)
    })?;
    let own = spec.dir.join("uefi-vars.fd");
    let doing = || format!("copying `{variables}`");
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&own)
        .while_doing(doing)?;
    let mut fresh = File::open(variables).while_doing(doing)?;
    std::io::copy(&mut fresh, &mut file).while_doing(doing)?;
    Ok((code.into(), own))
}

fn check_huge_pages(memory_mib: u64) -> Result<()> {
    let number = |file: &str| -> u64 {
        let text = fs::read_to_string(Path::new(HUGE_PAGES).join(file)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let free = number("free_hugepages") + number("nr_overcommit_hugepages");
    let needed = memory_mib.div_ceil(2);
    if needed <= free {
        return Ok(());
    }
    Err(Error::system(format!(
        "the guest needs {needed} huge pages of 2 MiB, and {free} are free on this host"
    ))
    .help(format!("an administrator reserves them: `sysctl vm.nr_hugepages={needed}` or more")))
}
