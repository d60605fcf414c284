//! The demo image: a Debian kernel, busybox and an ssh server on a disk that boots
//! in seconds, made by an ordinary user.
//!
//! No root, no sub-uids, no loop device and no bootstrap: packages are downloaded
//! and unpacked, never installed; initramfs ([`cpio`]) and disk ([`disk`]) are written
//! by us, GRUB's image by its own tool.
//!
//! ```text
//! MBR │ GRUB │ kernel │ initramfs: busybox, dropbear, the agent, modules, guest/*
//! ```
//!
//! The guest runs from memory, as root, with no password anywhere. What makes it a
//! particular machine comes from the volume labelled `CIDATA`, in plain files that
//! need no YAML reader:
//!
//! | file | meaning |
//! |---|---|
//! | `pavo/hostname` | host name |
//! | `pavo/domain` | domain, may be missing |
//! | `pavo/authorized_keys` | who may log in as root |
//! | `pavo/dropbear_ed25519_host_key` | host key, in dropbear's own binary form |
//! | `pavo/user-script` | run by `sh` at the end of the boot, may be missing |
//!
//! # Changing it
//!
//! The guest's behaviour is `guest/init`, a shell script. What costs boot time
//! without KVM: bytes read by the BIOS, bytes decompressed, programs started (tens
//! of ms each). Boot it before and after: `cargo test --test image_tiny`.

mod cpio;
mod disk;
mod initramfs;
mod kmod;

use std::path::Path;

use super::{grub, packages};
use crate::error::{Context, Result};

/// Depends on the newest kernel for virtual machines: small, with virtio.
const KERNEL: &str = "linux-image-cloud-amd64";

/// What the image is made of, and why; GRUB's packages beside them.
const PACKAGES: &[&str] = &[
    // The static build starts four times faster than the dynamic one under emulation.
    "busybox-static",
    "libc6",
    // The ssh server, what scp asks for on the other side, and their libraries.
    "dropbear-bin",
    "openssh-sftp-server",
    "libtomcrypt1",
    "libtommath1",
    "libgmp10",
    "libcrypt1",
    "zlib1g",
];

/// What [`build`] needs to know.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    /// Where downloaded packages are kept for the next build; made if missing.
    pub cache: &'a Path,
    /// The qcow2 file to write; must not exist.
    pub output: &'a Path,
    /// Told what is being done, in a few words.
    pub progress: &'a dyn Fn(&str),
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("cache", &self.cache)
            .field("output", &self.output)
            .finish_non_exhaustive()
    }
}

/// Builds the image. Everything but the downloaded packages and the result is gone
/// afterwards, whatever happens.
///
/// # Errors
///
/// When packages are not known to apt, or a tool is missing or fails.
pub fn build(options: Options<'_>) -> Result<()> {
    let work = || -> Result<()> {
        (options.progress)("Fetching Debian packages");
        let names = PACKAGES.iter().chain(grub::PACKAGES).map(|name| (*name).to_owned());
        let names: Vec<_> = [packages::kernel(KERNEL)?].into_iter().chain(names).collect();
        let debs = packages::fetch(options.cache, &names)?;
        let scratch = tempfile::tempdir_in(options.cache)
            .while_doing(|| format!("creating a folder in `{}`", options.cache.display()))?;
        (options.progress)("Unpacking");
        let root = scratch.path().join("root");
        packages::unpack(&debs, &root)?;
        (options.progress)("Building the disk");
        let kernel = initramfs::Kernel::find(&root)?;
        let initramfs = initramfs::build(&root, &kernel)?;
        disk::build(&root, &kernel.image()?, &initramfs, scratch.path(), options.output)
    };
    work().while_doing(|| "building the image `tiny`".into())
}
