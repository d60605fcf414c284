//! Images made of others: copied, resized, squashed, exported.
//!
//! A blob is never changed, so each of these adds one revision or one file, which appears
//! once it is whole.

use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;

use super::convert;
use super::header::{self, Format, MAX_SIZE};
use super::library::{Library, Resolved, resolve_in};
use super::repository::{Kind, Layer};
use super::unfinished::Unfinished;
use super::uri::Uri;
use crate::error::{Context, Error, Result};
use crate::host::qcow2;
use crate::model::vm::DiskFormat;

/// How large a disk is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// `20G`
    To(u64),
    /// `+5G`
    By(u64),
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::usage(format!("`{}` is not a size", text.escape_debug()))
                .help("write `20G`, or `+5G` for so much more; the units are K, M, G and T")
        };
        let (by, rest) = match text.strip_prefix('+') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        let (number, unit) = rest.split_at(digits);
        let shift = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(wrong()),
        };
        let bytes = number.parse().ok().and_then(|number: u64| number.checked_mul(1 << shift));
        let bytes = bytes.ok_or_else(wrong)?;
        Ok(if by { Self::By(bytes) } else { Self::To(bytes) })
    }
}

impl Size {
    /// The new size of a disk of `now` bytes.
    fn after(self, now: u64) -> Result<u64> {
        let wanted = match self {
            Self::To(bytes) => bytes,
            Self::By(bytes) => now.saturating_add(bytes),
        };
        if wanted > MAX_SIZE {
            return Err(Error::usage(format!("a disk of {wanted} bytes is absurd")));
        }
        let wanted = wanted.next_multiple_of(512);
        if wanted > now {
            return Ok(wanted);
        }
        let error = match wanted == now {
            true => format!("the disk has {now} bytes already"),
            false => format!("the disk has {now} bytes, and can only grow"),
        };
        Err(Error::usage(error).help("name a larger size, or `+5G` for so much more"))
    }
}

impl Library {
    /// Makes a new image of a revision of another, or of an image of the older form; returns
    /// its name. The blobs are shared, or copied into the other repository.
    pub fn copy(&self, source: &str, dest: &str, owner: &str) -> Result<String> {
        let copy = || match source.parse()? {
            Uri::Folder(_) => {
                let from = self.resolve(source)?;
                let flatten = |target: &Path, _: &Path| {
                    convert::flatten(&from.path, from.virtual_size, Format::Qcow2, target)
                };
                self.create(dest, owner, false, flatten).map(|made| made.uri)
            }
            Uri::InRepo(name) => {
                let (from, revision) = self.find(&name)?;
                if revision.kind == Kind::Vm {
                    // What could not be started is not worth having twice.
                    resolve_in(from, &revision)?;
                }
                let (repo, name) = self.new_image(dest)?;
                self.warn_of_shadows(repo, &name)?;
                let scratch = repo.scratch_folder()?;
                let mut seen = BTreeSet::new();
                let mut bring = |hash: &String| match seen.insert(hash.clone()) {
                    true => repo.bring(from, hash, &scratch),
                    false => Ok(Layer { hash: hash.clone(), copy: None }),
                };
                let blobs = revision.data_blobs.iter().map(&mut bring);
                let blobs = blobs.collect::<Result<Vec<Layer>>>()?;
                let made = repo.add_same(&name, &revision, &blobs, owner)?;
                Ok(format!("{}:{}@{}", repo.name, made.name, made.revision))
            }
        };
        copy().while_doing(|| format!("copying the image `{}`", source.escape_debug()))
    }

    /// Adds a revision whose disk is larger.
    ///
    /// # Errors
    ///
    /// When it would be smaller, or as large as it is.
    pub fn resize(&self, image: &str, size: Size, owner: &str) -> Result<Resolved> {
        let resize = || {
            let base = self.resolve(image)?;
            let size = size.after(base.virtual_size)?;
            let saving = self.begin_save(&base.uri, None, false)?;
            let below = saving.below().ok_or_else(|| Error::bug("it lies on nothing"))?;
            qcow2::layer(&saving.file()?, Some((&below, DiskFormat::Qcow2)), size)?;
            saving.publish(owner)
        };
        resize().while_doing(|| format!("resizing the image `{}`", image.escape_debug()))
    }

    /// Adds a revision with the same disk that needs no other; nothing, if this one is such.
    pub fn squash(&self, image: &str, owner: &str) -> Result<Option<Resolved>> {
        let squash = || {
            let base = self.resolve(image)?;
            if header::inspect_layer(&base.path)?.backing.is_none() {
                return Ok(None);
            }
            let saving = self.begin_save(&base.uri, None, true)?;
            convert::flatten(&base.path, base.virtual_size, Format::Qcow2, &saving.file()?)?;
            saving.publish(owner).map(Some)
        };
        squash().while_doing(|| format!("squashing the image `{}`", image.escape_debug()))
    }

    /// Writes a revision's disk to a file of this format: as it was said, or as the file's
    /// suffix says, or raw. It appears once it is whole.
    ///
    /// # Errors
    ///
    /// When there is such a file, unless `force`, or there is something else.
    pub fn export(
        &self,
        image: &str,
        file: &Path,
        format: Option<Format>,
        force: bool,
    ) -> Result<Format> {
        let suffix = || file.extension()?.to_str()?.to_ascii_lowercase().parse().ok();
        let format = format.or_else(suffix).unwrap_or(Format::Raw);
        let export = || -> Result<Format> {
            let image = self.resolve(image)?;
            let folder = vacant(file, force)?;
            let unfinished = Unfinished::beside(file, folder)?;
            convert::flatten(&image.path, image.virtual_size, format, &unfinished.path())?;
            unfinished.appear(force, || exists(file))?;
            Ok(format)
        };
        export().while_doing(|| format!("exporting `{}`", image.escape_debug()))
    }
}

/// The folder in which a file may be put under this name.
fn vacant(file: &Path, force: bool) -> Result<&Path> {
    let folder = match file.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) if file.file_name().is_some() => folder,
        _ => return Err(Error::usage(format!("`{}` cannot be a file", file.display()))),
    };
    match std::fs::symlink_metadata(file) {
        Err(_) => Ok(folder),
        Ok(data) if data.is_dir() => Err(Error::usage(format!("`{}` is a folder", file.display()))
            .help("name the file that is to be written")),
        Ok(data) if !data.is_file() => {
            Err(Error::usage(format!("`{}` is not a regular file", file.display()))
                .help("name a file that does not exist yet"))
        }
        Ok(_) if force => Ok(folder),
        Ok(_) => Err(exists(file)),
    }
}

fn exists(file: &Path) -> Error {
    Error::usage(format!("`{}` exists", file.display())).help("`--force` replaces it")
}

#[cfg(test)]
mod tests;
