//! The configured repositories together: what a name means, and what may be done.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::archive::Archive;
use super::convert;
use super::download::{self, Hash, Progress};
use super::header::{self, Format};
use super::repository::{Freed, Kind, Repository, Revision};
use super::uri::{Name, Uri};
use crate::config::Repo;
use crate::error::{Context, Error, Result};
use crate::model::vm::DiskFormat;

/// The repositories, in order of priority. Making one touches nothing.
#[derive(Debug)]
pub struct Library {
    repos: Vec<Repository>,
    warnings: RefCell<Vec<String>>,
}

/// A disk to boot from, exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// `REPO:NAME@REVISION`, or the path of the older form.
    pub uri: String,
    /// The top layer, absolute.
    pub path: PathBuf,
    pub format: DiskFormat,
    /// Bytes.
    pub virtual_size: u64,
    /// All layers, the lowest first, each named by its hash; none of the older form.
    pub layers: Vec<PathBuf>,
}

/// What is imported.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// A path or a URL; a `FORMAT:` may stand before it.
    pub place: &'a str,
    pub format: Option<Format>,
    /// Of the file, as it lies there or comes from there.
    pub hash: Option<&'a Hash>,
    /// Of what is fetched.
    pub progress: Progress<'a>,
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Source").field(&self.place).finish_non_exhaustive()
    }
}

impl<'a> Source<'a> {
    pub fn of(place: &'a str) -> Self {
        Self { place, format: None, hash: None, progress: &|_, _| () }
    }
}

/// One line of a list of images.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageRow {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: Kind,
    /// The newest.
    pub revision: u32,
    pub repo: String,
    pub owner: String,
    /// Seconds since 1970.
    pub timestamp: f64,
}

/// All that is known of an image.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageDetails {
    pub name: String,
    pub repo: String,
    #[serde(rename = "type")]
    pub kind: Kind,
    pub owner: String,
    pub revisions: Vec<RevisionRow>,
}

/// One revision of an image.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RevisionRow {
    pub revision: u32,
    /// What its layers take on the disk, in bytes.
    pub size: u64,
    pub layers: usize,
    pub owner: String,
    /// Seconds since 1970.
    pub timestamp: f64,
}

/// Layers of one image; more is a loop or a mistake.
pub(super) const MAX_LAYERS: usize = 200;

impl Library {
    pub fn open(repos: &[Repo]) -> Self {
        let repos = repos.iter().map(|repo| Repository::new(&repo.name, &repo.path)).collect();
        Self { repos, warnings: RefCell::default() }
    }

    /// What the user may want to know, said since the last call.
    pub fn take_warnings(&self) -> Vec<String> {
        self.warnings.take()
    }

    /// Finds the disk behind `[REPO:]NAME[@REVISION]`, or behind the path (with a
    /// `/`) of a folder of the older form, and checks the headers of all its layers.
    pub fn resolve(&self, text: &str) -> Result<Resolved> {
        match text.parse()? {
            Uri::Folder(folder) => super::folder::resolve(&folder),
            Uri::InRepo(name) => {
                let (repo, revision) = self.find(&name)?;
                resolve_in(repo, &revision).while_doing(|| format!("opening the image `{text}`"))
            }
        }
    }

    /// The images whose name satisfies `matches`, of one repository or all.
    pub fn list(
        &self,
        repo: Option<&str>,
        matches: impl Fn(&str) -> bool,
    ) -> Result<Vec<ImageRow>> {
        let mut rows = Vec::new();
        for repo in self.selected(repo)? {
            for (name, newest) in repo.newest()?.into_iter().filter(|(name, _)| matches(name)) {
                // Deleted in the meantime, or not ours to read: said, not fatal.
                match repo.read(&name, newest) {
                    Ok(revision) => rows.push(row(repo, revision)),
                    Err(error) => self.warn(error.report()),
                }
            }
        }
        Ok(rows)
    }

    /// All that is known of an image; of one revision, if the name says so.
    pub fn show(&self, text: &str) -> Result<ImageDetails> {
        let name = name_in_repo(text)?;
        let (repo, newest) = self.find(&name)?;
        let mut revisions = Vec::new();
        for number in repo.revisions(&name.image)? {
            if name.revision.is_none_or(|wanted| wanted == number) {
                let revision = repo.read(&name.image, number)?;
                let blobs = revision.data_blobs.iter().map(|hash| repo.blob(hash));
                let size = blobs.filter_map(|blob| blob.metadata().ok()).map(|data| data.len());
                revisions.push(RevisionRow {
                    revision: number,
                    size: size.sum(),
                    layers: revision.data_blobs.len(),
                    owner: revision.owner,
                    timestamp: revision.timestamp,
                });
            }
        }
        Ok(ImageDetails {
            name: newest.name,
            repo: repo.name.clone(),
            kind: newest.kind,
            owner: newest.owner,
            revisions,
        })
    }

    /// Imports a disk as a new image. The format is that of a `FORMAT:` before the
    /// path, else the one given, else that of the file's suffix, else what its header says.
    pub fn import(&self, source: Source<'_>, dest: &str, owner: &str) -> Result<Resolved> {
        let (place, claimed) = claim(source.place, source.format);
        let make = |target: &Path, scratch: &Path| {
            let path = if download::is_url(place) {
                download::fetch(place, source.hash, scratch, source.progress)?
            } else {
                source.hash.map_or(Ok(()), |hash| hash.check(Path::new(place)))?;
                PathBuf::from(place)
            };
            if let Some(archive) = Archive::of(&path, claimed.is_some())? {
                let disk = scratch.join("unpacked");
                archive.unpack(&path, &disk)?;
                let format = self.format_of(&archive.content(&path), &disk, claimed)?;
                return convert::to_qcow2(&disk, format, target).map(drop);
            }
            let format = self.format_of(&path, &path, claimed)?;
            header::inspect(&path)?;
            let (_open, steady) = steady(&path, scratch)?;
            convert::to_qcow2(&steady, format, target).map(drop)
        };
        self.create(dest, owner, false, make)
            .while_doing(|| format!("importing `{}`", source.place.escape_debug()))
    }

    /// Makes a new image (with `replace`, one more revision) of the qcow2 that `make`
    /// writes at the path it is given; nothing is left if it fails.
    pub fn create(
        &self,
        dest: &str,
        owner: &str,
        replace: bool,
        make: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<Resolved> {
        let repo = self.destination(dest)?;
        let name = name_in_repo(dest)?.image;
        if !replace && !repo.revisions(&name)?.is_empty() {
            return Err(repo.exists(&name));
        }
        self.warn_of_shadows(repo, &name)?;
        let scratch = repo.scratch_folder()?;
        let target = scratch.path().join("disk.qcow2");
        make(&target, scratch.path())?;
        let revision = repo.add(&name, &target, owner, replace)?;
        resolve_in(repo, &revision)
    }

    /// Says which other repositories have an image of this name.
    pub(super) fn warn_of_shadows(&self, repo: &Repository, name: &str) -> Result<()> {
        for other in self.repos.iter().filter(|other| other.name != repo.name) {
            if !other.revisions(name)?.is_empty() {
                self.warn(format!("Image {name} shadows or is shadowed by repo {}", other.name));
            }
        }
        Ok(())
    }

    /// Deletes an image, or one revision of it.
    pub fn delete(&self, text: &str) -> Result<Freed> {
        let name = name_in_repo(text)?;
        let (repo, _) = self.find(&name)?;
        repo.delete(&name.image, name.revision)
            .while_doing(|| format!("deleting the image `{name}`"))
    }

    /// Where a new image goes: the named repository, else the first.
    pub(super) fn destination(&self, dest: &str) -> Result<&Repository> {
        let name = name_in_repo(dest)?;
        if name.revision.is_some() {
            return Err(Error::usage(format!("`{name}` names a revision"))
                .help("new images are named without: `NAME`"));
        }
        let repo = self.selected(name.repo.as_deref())?.first().copied();
        repo.ok_or_else(|| Error::config("no image repository is configured"))
    }

    /// The first repository that has the image, with the revision meant.
    pub(super) fn find(&self, name: &Name) -> Result<(&Repository, Revision)> {
        for repo in self.selected(name.repo.as_deref())? {
            let revisions = repo.revisions(&name.image)?;
            let number = match name.revision {
                Some(wanted) => revisions.contains(&wanted).then_some(wanted),
                None => revisions.last().copied(),
            };
            if let Some(number) = number {
                return Ok((repo, repo.read(&name.image, number)?));
            }
        }
        let error = Error::not_found(format!("Object {name} not found in configured repositories"));
        Err(match self.nearest(&name.image) {
            Some(near) => error.help(format!("did you mean `{near}`?")),
            None => error.help("`pavo image list` shows what there is"),
        })
    }

    /// The name most like `wanted`.
    fn nearest(&self, wanted: &str) -> Option<String> {
        let names = self.repos.iter().filter_map(|repo| repo.newest().ok()).flatten();
        names
            .map(|(name, _)| (strsim::damerau_levenshtein(&name, wanted), name))
            .filter(|(distance, _)| *distance <= 2)
            .min()
            .map(|(_, name)| name)
    }

    /// One repository, or all.
    pub(super) fn selected(&self, name: Option<&str>) -> Result<Vec<&Repository>> {
        let Some(name) = name else { return Ok(self.repos.iter().collect()) };
        let found: Vec<_> = self.repos.iter().filter(|repo| repo.name == name).collect();
        if found.is_empty() {
            let names: Vec<_> = self.repos.iter().map(|repo| repo.name.as_str()).collect();
            let error = Error::not_found(format!("no repository is named `{name}`"));
            return Err(error.help(format!("the repositories are: {}", names.join(", "))));
        }
        Ok(found)
    }

    /// The format of `file`: as it was said, or as the suffix of `named` says, or its header.
    fn format_of(&self, named: &Path, file: &Path, claimed: Option<Format>) -> Result<Format> {
        let suffix = named.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
        let suffix = suffix.to_ascii_lowercase();
        // Some distributions call their qcow2 so, others raw disks.
        let is_open = suffix == "img";
        if let Some(format) = claimed.or(suffix.parse().ok().filter(|_| !is_open)) {
            return Ok(format);
        }
        let found = header::inspect(file)?.format;
        if found == Format::Raw && !is_open {
            self.warn(format!("`{}` has no known header: assuming raw VM", named.display()));
        }
        Ok(found)
    }

    pub(super) fn warn(&self, text: String) {
        self.warnings.borrow_mut().push(text);
    }
}

/// The file that is meant, and its format, if that is said.
fn claim(source: &str, format: Option<Format>) -> (&str, Option<Format>) {
    // A path may hold a colon; what stands before it is a format only if it is one.
    let prefixed = source.split_once(':');
    let prefixed = prefixed.and_then(|(word, path)| Some((word.parse::<Format>().ok()?, path)));
    match prefixed {
        Some((format, path)) => (path, Some(format)),
        None => (source, format),
    }
}

/// A path that leads to one file, which only we can change: between our check of the
/// header and the moment a tool reads it again, nobody must put another one there. It
/// is good as long as the returned file is open.
fn steady(path: &Path, scratch: &Path) -> Result<(File, PathBuf)> {
    let open = || -> std::io::Result<(File, PathBuf)> {
        let mut file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
        let data = file.metadata()?;
        if data.uid() == nix::unistd::geteuid().as_raw() && data.mode() & 0o022 == 0 {
            // Not by its name, which may be in a folder of somebody else.
            let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            return Ok((file, path.into()));
        }
        let path = scratch.join("source");
        let mut copy = File::create_new(&path)?;
        std::io::copy(&mut file, &mut copy)?;
        Ok((copy, path))
    };
    open().while_doing(|| format!("opening `{}`", path.display()))
}

pub(super) fn name_in_repo(text: &str) -> Result<Name> {
    match text.parse()? {
        Uri::InRepo(name) => Ok(name),
        Uri::Folder(_) => Err(Error::usage(format!(
            "`{}` is a path, not an image of a repository",
            text.escape_debug()
        ))
        .help("name one, as `pavo image list` does; to take a file in: `pavo image import`")),
    }
}

fn row(repo: &Repository, revision: Revision) -> ImageRow {
    ImageRow {
        name: revision.name,
        kind: revision.kind,
        revision: revision.revision,
        repo: repo.name.clone(),
        owner: revision.owner,
        timestamp: revision.timestamp,
    }
}

/// Checks every layer of a revision: each a qcow2 whose only other file is the layer
/// below, in the same repository.
pub(super) fn resolve_in(repo: &Repository, revision: &Revision) -> Result<Resolved> {
    if revision.kind == Kind::Ctr {
        let text = format!("`{}` is a container image, not a disk", revision.name);
        return Err(Error::usage(text).help("`pavo image list` shows the type of each image"));
    }
    if revision.data_blobs.len() > MAX_LAYERS {
        return Err(Error::system("it has too many layers")
            .help("an image of one layer is made of an earlier revision: `pavo image squash`"));
    }
    let mut top = None;
    let mut below: Option<&String> = None;
    for hash in &revision.data_blobs {
        let path = repo.blob(hash);
        let header = header::inspect_layer(&path)?;
        if header.format != Format::Qcow2 {
            return Err(Error::system(format!("the layer `{}` is no qcow2", path.display())));
        }
        let file = header.backing.as_ref().map(|backing| backing.file.clone());
        let format = header.backing.as_ref().and_then(|backing| backing.format.as_deref());
        if file != below.map(|hash| Repository::relative(hash))
            || format.is_some_and(|format| format != "qcow2")
        {
            return Err(Error::system(format!(
                "the layer `{}` does not lie on the one it should",
                path.display()
            )));
        }
        top = Some((path, header.virtual_size));
        below = Some(hash);
    }
    let (path, virtual_size) = top.ok_or_else(|| Error::system("it has no layers"))?;
    let layers = revision.data_blobs.iter().map(|hash| std::path::absolute(repo.blob(hash)));
    Ok(Resolved {
        layers: layers.collect::<Result<_, _>>().while_doing(|| "naming its layers".into())?,
        uri: format!("{}:{}@{}", repo.name, revision.name, revision.revision),
        path: std::path::absolute(path).while_doing(|| "naming its disk".into())?,
        format: DiskFormat::Qcow2,
        virtual_size: virtual_size.next_multiple_of(512),
    })
}

#[cfg(test)]
mod tests;
