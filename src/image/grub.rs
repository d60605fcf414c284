//! GRUB, from its Debian packages, unpacked and never installed: images of it that hold
//! their whole configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::tool;
use crate::error::{Context, Error, Result};

/// grub-mkimage, what it loads, and GRUB's modules for PC BIOS.
pub(super) const PACKAGES: &[&str] = &["grub-common", "libdevmapper1.02.1", "grub-pc-bin"];
/// GRUB's modules for UEFI.
pub(super) const UEFI_PACKAGE: &str = "grub-efi-amd64-bin";

/// What starts GRUB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Platform {
    Pc,
    Uefi,
}

impl Platform {
    fn name(self) -> &'static str {
        match self {
            Self::Pc => "i386-pc",
            Self::Uefi => "x86_64-efi",
        }
    }
}

/// Its packages, unpacked.
#[derive(Debug)]
pub(super) struct Grub<'a> {
    root: &'a Path,
    scratch: &'a Path,
}

impl<'a> Grub<'a> {
    /// The packages lie unpacked in `root`; what is made lies in `scratch` for a while.
    pub(super) fn new(root: &'a Path, scratch: &'a Path) -> Self {
        Self { root, scratch }
    }

    fn modules(&self, platform: Platform) -> PathBuf {
        self.root.join("usr/lib/grub").join(platform.name())
    }

    /// The first sector of a disk that a PC BIOS boots.
    pub(super) fn boot_sector(&self) -> Result<Vec<u8>> {
        let sector = read(&self.modules(Platform::Pc).join("boot.img"))?;
        match sector.len() {
            512 => Ok(sector),
            size => Err(Error::system(format!("GRUB's boot sector has {size} bytes"))),
        }
    }

    /// An image with these modules that runs `script` and looks for files in `prefix`.
    pub(super) fn image(
        &self,
        platform: Platform,
        prefix: &str,
        script: &str,
        modules: &[&str],
    ) -> Result<Vec<u8>> {
        let config = self.scratch.join("grub.cfg");
        let image = self.scratch.join("grub.img");
        fs::write(&config, script).while_doing(|| format!("writing `{}`", config.display()))?;
        let libraries = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
        // After the system's own folders: only for what this machine lacks.
        let libraries = libraries.map(|folder| self.root.join(folder).display().to_string());
        let libraries =
            format!("/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu:{}", libraries.join(":"));
        tool::run(
            Command::new(self.root.join("usr/bin/grub-mkimage"))
                .env("LD_LIBRARY_PATH", libraries)
                .args(["-O", platform.name(), "-p", prefix, "-d"])
                .arg(self.modules(platform))
                .arg("-c")
                .arg(&config)
                .arg("-o")
                .arg(&image)
                .args(modules),
        )?;
        read(&image)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).while_doing(|| format!("reading `{}`", path.display()))
}
