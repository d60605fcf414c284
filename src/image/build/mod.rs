//! An image from a recipe: a Debian system on a disk that boots with BIOS and with UEFI.
//!
//! No loop device, and no root where the user has subordinate ids:
//!
//! ```text
//! sources    where the packages come from
//! steps      the recipe -> scripts for the shell of the new system
//! namespace  who may be root there; runs inside.sh:
//!              mmdebstrap makes a tree in memory, mke2fs writes it to the disk
//! disk       partition table, GRUB for both kinds of firmware, and the qcow2
//!
//! MBR + GPT │ GRUB for BIOS │ FAT: GRUB for UEFI │ ext4: the system
//! ```
//!
//! Both GRUBs only look for the root file system, by its identifier, and read
//! `boot/grub/grub.cfg` there, which names the kernel by the links `/vmlinuz` and
//! `/initrd.img`: a new kernel is started without anything of ours being run.
//!
//! Identifiers come from the image's name. With `SOURCE_DATE_EPOCH` no file is newer.

mod disk;
mod namespace;
mod sources;
mod steps;

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{grub, packages, tool};
use crate::config::Recipe;
use crate::error::{Context, Result};
use disk::Identity;

/// What [`build`] needs to know.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    pub recipe: &'a Recipe,
    /// Of the image: it is known by it.
    pub name: &'a str,
    /// Where downloaded packages are kept for the next build; made if missing.
    pub cache: &'a Path,
    /// A folder for what is not finished.
    pub scratch: &'a Path,
    /// The qcow2 file to write; must not exist.
    pub output: &'a Path,
    /// Told what is being done, in a few words.
    pub progress: &'a dyn Fn(&str),
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("recipe", &self.recipe)
            .field("name", &self.name)
            .field("output", &self.output)
            .finish_non_exhaustive()
    }
}

/// Builds the image.
///
/// # Errors
///
/// When a tool is missing, who asks may not be root of a namespace, packages are not to be
/// had, or something of the recipe fails in the new system.
pub fn build(options: Options<'_>) -> Result<()> {
    let work = || -> Result<()> {
        let who = namespace::check()?;
        let recipe = options.recipe;
        let (suite, lines) = sources::of(recipe)?;
        let identity = Identity::of(options.name);
        let dir = options.scratch.join("build");
        prepare(&dir, recipe, &identity, &lines)?;

        (options.progress)("Fetching the boot loader");
        let names: Vec<String> =
            grub::PACKAGES.iter().chain([&grub::UEFI_PACKAGE]).map(|&name| name.into()).collect();
        let debs = packages::fetch(options.cache, &names)?;
        let loader = dir.join("grub");
        packages::unpack(&debs, &loader)?;

        let raw = dir.join("disk.raw");
        let layout = disk::Layout::of(recipe.size_mib);
        layout.create(&raw)?;
        let cache = options.cache.join(&suite);
        let job = namespace::Job {
            dir: &dir,
            cache: &cache,
            suite: &suite,
            memory_mib: recipe.size_mib,
            root: layout.root(),
            root_uuid: &identity.root,
        };
        namespace::run(who, &job, options.progress)?;

        (options.progress)("Making the disk bootable");
        layout.finish(&raw, &identity, &loader, &dir)?;
        (options.progress)("Compressing");
        compress(&raw, options.output)
    };
    work().while_doing(|| "building the image".into())
}

/// Writes what `inside.sh` reads.
fn prepare(dir: &Path, recipe: &Recipe, identity: &Identity, sources: &str) -> Result<()> {
    let list = |words: &mut dyn Iterator<Item = &str>| {
        words.map(|word| format!("{word}\n")).collect::<String>()
    };
    let packages = list(&mut steps::packages(recipe));
    let write = || -> std::io::Result<()> {
        fs::create_dir(dir)?;
        fs::write(dir.join("inside.sh"), include_str!("inside.sh"))?;
        fs::write(dir.join("mke2fs.conf"), include_str!("mke2fs.conf"))?;
        fs::write(dir.join("dpkg"), include_str!("dpkg"))?;
        fs::write(dir.join("sources"), sources)?;
        fs::write(dir.join("packages"), packages)?;
        fs::create_dir(dir.join("steps"))
    };
    write().while_doing(|| format!("writing to `{}`", dir.display()))?;
    for (name, script) in steps::scripts(recipe, &identity.root)? {
        let path = dir.join("steps").join(name);
        fs::write(&path, script).while_doing(|| format!("writing `{}`", path.display()))?;
    }
    Ok(())
}

/// zstd: a third of the size, and read faster than most disks.
fn compress(raw: &Path, output: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"]);
    // In any order: several threads compress.
    command.args(["-W", "-m", "4", "--"]).args([raw, output]);
    tool::run(&mut command).map(drop)
}
