//! Images as pcocc kept them before it had repositories: a folder with `image` and
//! `image-rev1`, `image-rev2`, …, each lying on an earlier one. A path of one of these files
//! means that revision; only its name says which it is, and nothing what it holds.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::header::{self, Format};
use super::library::Resolved;
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::Layer;
use crate::model::vm::DiskFormat;

/// Finds the newest revision, or the one whose file this is, and checks that all below it are
/// in the same folder.
pub(super) fn resolve(folder: &Path) -> Result<Resolved> {
    if let Some((home, name)) = one(folder) {
        let open = open(&home, &name);
        return open.while_doing(|| format!("opening the image `{}`", folder.display()));
    }
    let missing = || {
        let shown = folder.display().to_string();
        Error::not_found(format!("Object {} not found in configured repositories", shown))
            .help("a path must be a folder that holds `image`")
    };
    let home = fs::canonicalize(folder).map_err(|error| missing().because(error))?;
    let entries = fs::read_dir(&home).map_err(|error| missing().because(error))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let newest = names.filter_map(|name| Some((revision(&name)?, name))).max();
    let (_, newest) = newest.ok_or_else(missing)?;
    let open = open(&home, &newest);
    open.while_doing(|| format!("opening the image `{}`", folder.display()))
}

/// The folder and the name of a path that is a revision's own.
fn one(path: &Path) -> Option<(PathBuf, String)> {
    let name = path.file_name()?.to_str()?;
    revision(name)?;
    // A link would lead to a file whose name says nothing.
    let plain = fs::symlink_metadata(path).ok()?.is_file();
    let home = fs::canonicalize(path.parent()?).ok()?;
    plain.then(|| (home, name.to_owned()))
}

/// The files of a revision, the highest first: what tells whether they are still the same.
///
/// # Errors
/// When it is not there, or no revision.
pub fn layers(path: &Path) -> Result<Vec<Layer>> {
    let doing = || format!("looking at the image `{}`", path.display());
    let missing = || Error::not_found("there is no such file of an image");
    let (home, name) = one(path).ok_or_else(missing).while_doing(doing)?;
    let (_, files) = check(&home, &home.join(name)).while_doing(doing)?;
    let layer = |file: &PathBuf| {
        let about = fs::metadata(file)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Layer { name, bytes: about.len(), modified: (about.mtime(), about.mtime_nsec()) })
    };
    files.iter().map(layer).collect::<io::Result<_>>().while_doing(doing)
}

/// One revision.
fn open(home: &Path, name: &str) -> Result<Resolved> {
    let path = home.join(name);
    let (virtual_size, _) = check(home, &path)?;
    Ok(Resolved {
        uri: path.display().to_string(),
        path,
        format: DiskFormat::Qcow2,
        virtual_size: virtual_size.next_multiple_of(512),
        layers: Vec::new(),
    })
}

/// Makes a complete disk, on the same file system, the next revision.
pub(super) fn add(home: &Path, disk: &Path) -> Result<Resolved> {
    let doing = || format!("adding a revision in `{}`", home.display());
    let place = || -> io::Result<String> {
        let file = fs::File::open(disk)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.sync_all()?;
        loop {
            let names = fs::read_dir(home)?;
            let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let last = names.filter_map(|name| revision(&name)).max().unwrap_or_default();
            let name = format!("image-rev{}", last + 1);
            match fs::hard_link(disk, home.join(&name)) {
                Ok(()) => break fs::File::open(home)?.sync_all().map(|()| name),
                // Somebody else's was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => break Err(error),
            }
        }
    };
    place().while_doing(doing).and_then(|name| open(home, &name).while_doing(doing))
}

/// `image` is revision 0, `image-revN` is revision N.
fn revision(file: &str) -> Option<u32> {
    let rest = file.strip_prefix("image")?;
    if rest.is_empty() { Some(0) } else { rest.strip_prefix("-rev")?.parse().ok() }
}

/// Goes down the layers, each an earlier revision than the one above; returns the size
/// of the disk, and the files.
fn check(home: &Path, top: &Path) -> Result<(u64, Vec<PathBuf>)> {
    let (mut size, mut files) = (None, Vec::new());
    let mut path = top.to_owned();
    loop {
        let header = header::inspect_layer(&path)?;
        if header.format != Format::Qcow2 {
            return Err(Error::system(format!("`{}` is no qcow2", path.display())));
        }
        size.get_or_insert(header.virtual_size);
        files.push(path.clone());
        let Some(backing) = header.backing else { break };
        let below = layer_below(home, &path, &backing.file)
            .filter(|_| backing.format.as_deref().is_none_or(|format| format == "qcow2"));
        path = below.ok_or_else(|| {
            Error::system(format!(
                "`{}` lies on `{}`, which is no earlier revision in its folder",
                path.display(),
                backing.file.escape_debug()
            ))
        })?;
    }
    Ok((size.unwrap_or_default(), files))
}

/// The file below, if it is an earlier revision in the same folder. As revisions only
/// go down, there is no loop.
fn layer_below(home: &Path, above: &Path, file: &str) -> Option<PathBuf> {
    let path = Path::new(file);
    let name = path.file_name()?.to_str()?;
    let parent = home.join(path.parent()?);
    let number = |path: &Path| revision(path.file_name()?.to_str()?);
    let inside = fs::canonicalize(parent).ok()? == home;
    let earlier = revision(name)? < number(above)?;
    let path = home.join(name);
    // A link would lead to a file whose name says nothing.
    let plain = fs::symlink_metadata(&path).ok()?.is_file();
    (inside && earlier && plain).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn layer(folder: &Path, name: &str, below: Option<&str>) {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).current_dir(folder);
        if let Some(below) = below {
            command.args(["-u", "-F", "qcow2", "-b", below]);
        }
        // qemu-img refuses to name the file itself; a hostile one does not.
        assert!(command.args(["new", "8M"]).status().unwrap().success());
        fs::rename(folder.join("new"), folder.join(name)).unwrap();
    }

    #[test]
    fn the_highest_revision_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        layer(dir.path(), "image", None);
        assert!(resolve(dir.path()).unwrap().path.ends_with("image"));
        layer(dir.path(), "image-rev2", Some("image"));
        let absolute = dir.path().join("image-rev2");
        layer(dir.path(), "image-rev10", absolute.to_str());
        fs::write(dir.path().join("image-backup"), "not a revision").unwrap();
        let resolved = resolve(dir.path()).unwrap();
        assert!(resolved.path.ends_with("image-rev10"), "{resolved:?}");
        assert_eq!(resolved.virtual_size, 8 << 20);
        // What it is called then means the same again, whatever has come since.
        let rev2 = resolve(&absolute).unwrap();
        assert_eq!(resolve(Path::new(&rev2.uri)).unwrap(), rev2);
        assert!(rev2.path.ends_with("image-rev2"), "{rev2:?}");
        resolve(&dir.path().join("image-backup")).unwrap_err();
        std::os::unix::fs::symlink("image", dir.path().join("image-rev3")).unwrap();
        resolve(&dir.path().join("image-rev3")).unwrap_err();
    }

    #[test]
    fn a_revision_that_is_changed_below_is_another() {
        let dir = tempfile::tempdir().unwrap();
        layer(dir.path(), "image", None);
        layer(dir.path(), "image-rev1", Some("image"));
        let path = dir.path().join("image-rev1");
        let before = layers(&path).unwrap();
        assert_eq!(before.iter().map(|it| &*it.name).collect::<Vec<_>>(), ["image-rev1", "image"]);
        assert_eq!(layers(&path).unwrap(), before);
        layer(dir.path(), "image", None);
        assert_ne!(layers(&path).unwrap(), before);
        fs::remove_file(dir.path().join("image")).unwrap();
        layers(&path).unwrap_err();
        layers(dir.path()).unwrap_err();
    }

    #[test]
    fn a_layer_may_only_lie_on_an_earlier_one_of_its_folder() {
        for below in ["/etc/shadow", "../image", "image-rev1", "image-rev2", "sub/image", "link"] {
            let outer = tempfile::tempdir().unwrap();
            let dir = outer.path().join("vm");
            fs::create_dir(&dir).unwrap();
            fs::create_dir(dir.join("sub")).unwrap();
            layer(outer.path(), "image", None);
            std::os::unix::fs::symlink("/etc/shadow", dir.join("link")).unwrap();
            layer(&dir, "image-rev1", Some(below));
            let error = resolve(&dir).unwrap_err();
            assert!(error.report().contains("which is no earlier revision"), "{below}: {error:?}");
        }
    }
}
