//! A disk that lies on an image becomes the image's next revision, or a new image.
//!
//! Whoever writes the disk does so into a folder of the destination that nobody looks at;
//! only once it is whole, and its header says what it should, it appears, at once. Should
//! anything die before, the folder is left until the next one is made.

use std::path::{Path, PathBuf};

use super::folder;
use super::header::{self, Format};
use super::library::{Library, MAX_LAYERS, Resolved, name_in_repo, resolve_in};
use super::repository::{Addition, Layer, Repository};
use super::scratch::Scratch;
use super::uri::Uri;
use crate::error::{Context, Error, Kind, Result};

/// A place for a disk, which is being written.
#[derive(Debug)]
pub struct Saving<'a> {
    place: Place<'a>,
    scratch: Scratch,
}

#[derive(Debug)]
enum Place<'a> {
    Repo {
        repo: &'a Repository,
        name: String,
        below: Vec<Layer>,
        replace: bool,
    },
    /// The older form, and the name of the revision below.
    Folder {
        home: PathBuf,
        below: Option<String>,
    },
}

impl Library {
    /// Makes room for what a VM has written on `base`, or for all of its disk (`full`):
    /// as the next revision of `base`, or as the image `dest`, which must be new.
    ///
    /// # Errors
    /// When `base` is gone, `dest` is not, or nothing may be written there.
    pub fn begin_save(&self, base: &str, dest: Option<&str>, full: bool) -> Result<Saving<'_>> {
        match (base.parse()?, dest) {
            (Uri::Folder(path), None) => in_folder(&path, full),
            (Uri::Folder(_), Some(dest)) if !full => Err(Error::usage(format!(
                "`{base}` is in no repository: `{dest}` cannot lie on it"
            ))
            .help("save all of the disk: `--full`")),
            (Uri::InRepo(base), dest) => {
                let (from, revision) = self.find(&base)?;
                let (repo, name) = match dest {
                    Some(dest) => self.new_image(dest)?,
                    None => (from, base.image),
                };
                let scratch = repo.scratch_folder()?;
                let blobs = if full { Vec::new() } else { revision.data_blobs };
                if blobs.len() >= MAX_LAYERS {
                    let error = format!(
                        "`{base}` has {MAX_LAYERS} layers: no more can lie on it",
                        base = revision.name
                    );
                    return Err(
                        Error::usage(error).help(format!("`pavo image squash {}`", revision.name))
                    );
                }
                let layers = blobs.iter().map(|hash| repo.bring(from, hash, &scratch));
                let below = layers.collect::<Result<_>>()?;
                let place = Place::Repo { repo, name, below, replace: dest.is_none() };
                Ok(Saving { place, scratch })
            }
            (Uri::Folder(_), Some(dest)) => {
                let (repo, name) = self.new_image(dest)?;
                let place = Place::Repo { repo, name, below: Vec::new(), replace: false };
                Ok(Saving { place, scratch: repo.scratch_folder()? })
            }
        }
    }

    /// Makes room for all of a disk that lies on nothing: as the image `dest`, which must be
    /// new, or (`replace`) as its next revision.
    ///
    /// # Errors
    /// When it is not new, or nothing may be written there.
    pub fn begin_copy(&self, dest: &str, replace: bool) -> Result<Saving<'_>> {
        let (repo, name) = match replace {
            true => (self.destination(dest)?, name_in_repo(dest)?.image),
            false => self.new_image(dest)?,
        };
        let place = Place::Repo { repo, name, below: Vec::new(), replace };
        Ok(Saving { place, scratch: repo.scratch_folder()? })
    }

    /// Where a new image goes, and its name.
    pub(super) fn new_image(&self, dest: &str) -> Result<(&Repository, String)> {
        let (repo, name) = (self.destination(dest)?, name_in_repo(dest)?.image);
        match repo.revisions(&name)?.is_empty() {
            true => Ok((repo, name)),
            false => Err(repo.exists(&name)),
        }
    }
}

fn in_folder(path: &Path, full: bool) -> Result<Saving<'static>> {
    let name = path.file_name().and_then(|name| name.to_str());
    let (home, name) = path.parent().zip(name).ok_or_else(|| Error::usage("it is no image"))?;
    let scratch = Scratch::make(&home.join(".tmp"))?;
    let below = (!full).then(|| name.to_owned());
    Ok(Saving { place: Place::Folder { home: home.to_owned(), below }, scratch })
}

impl Saving<'_> {
    /// Where the disk is to be written, absolute.
    pub fn file(&self) -> Result<PathBuf> {
        let file = self.scratch.path().join("disk");
        std::path::absolute(&file).while_doing(|| format!("naming `{}`", file.display()))
    }

    /// What its header must say that it lies on; nothing, where it is to hold all.
    pub fn below(&self) -> Option<PathBuf> {
        match &self.place {
            Place::Repo { below, .. } => {
                below.last().map(|layer| Repository::relative(&layer.hash).into())
            }
            Place::Folder { below, .. } => below.as_ref().map(PathBuf::from),
        }
    }

    /// Makes what was written there an image.
    ///
    /// # Errors
    /// When the disk is not what it should be, or an image of this name has come meanwhile.
    pub fn finish(self, owner: &str) -> Result<Resolved> {
        self.publish(owner).map_err(|error| match error.kind() {
            Kind::NotFound => error.help("save all of the disk: `--full`"),
            _ => error,
        })
    }

    /// As [`finish`](Self::finish), for others than running VMs.
    pub(super) fn publish(self, owner: &str) -> Result<Resolved> {
        let disk = self.file()?;
        let header = header::inspect_layer(&disk)?;
        let found = header.backing.map(|backing| PathBuf::from(backing.file));
        if header.format != Format::Qcow2 || found != self.below() {
            return Err(Error::system("the VM has written something else than its disk"));
        }
        match &self.place {
            Place::Repo { repo, name, below, replace } => {
                let (replace, disk) = (*replace, disk.as_path());
                let revision = repo.add_on(Addition { name, disk, owner, replace, below })?;
                resolve_in(repo, &revision)
            }
            Place::Folder { home, .. } => folder::add(home, &disk),
        }
    }
}

#[cfg(test)]
mod tests;
