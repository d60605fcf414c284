//! Files that are there whole or not at all, and folders.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use super::crash;
use super::step::Outcome;
use crate::error::{Context, Error, Result};

/// Replaces the file by `bytes`, with these permission bits, so that a reader or a
/// crash at any moment finds the old content or the new, never a part. On return
/// it is on disk.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::bug(format!("`{}` cannot be a file", path.display())));
    };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    // Its own name for each writer; the leading dot keeps it out of lists.
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = name.to_string_lossy();
    let temporary = dir.join(format!(".{name}.{}-{number}.tmp", std::process::id()));
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        // The umask has no say.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        crash::written(path).map_err(std::io::Error::other)?;
        fs::rename(&temporary, path)?;
        File::open(dir)?.sync_all()
    };
    write()
        .inspect_err(|_| {
            // Perhaps it was never made; the error that counts is the first.
            let _ = fs::remove_file(&temporary);
        })
        .while_doing(|| format!("writing `{}`", path.display()))
}

/// Makes a folder with this mode, unless it exists.
pub fn ensure_folder(path: &Path, mode: u32) -> Result<Outcome> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => {
            return Ok(Outcome::AlreadySo);
        }
        // The umask has no say.
        made => made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode))),
    }
    .while_doing(|| format!("creating `{}`", path.display()))?;
    Ok(Outcome::Changed)
}

/// Removes a folder in which nothing is, and nothing mounted; else it is somebody's.
pub fn remove_empty_folder(path: &Path) -> Result<Outcome> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(Outcome::Changed),
        Err(error) => match error.kind() {
            ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty | ErrorKind::ResourceBusy => {
                Ok(Outcome::AlreadySo)
            }
            _ => Err(error).while_doing(|| format!("removing `{}`", path.display())),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plan.json");
        write_atomically(&path, b"old", 0o644).unwrap();
        write_atomically(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_names_the_file_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("taken");
        fs::create_dir_all(path.join("by a folder")).unwrap();
        let error = write_atomically(&path, b"new", 0o600).unwrap_err();
        assert_eq!(error.to_string(), format!("writing `{}`", path.display()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
