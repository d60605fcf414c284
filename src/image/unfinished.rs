//! A file that appears under its name once it is whole, and of which nothing is left if it
//! never is.
//!
//! It has no name at all while it is written, where the file system knows such files: then
//! the kernel removes it with its maker. Elsewhere, and for the moment in which it replaces
//! another, it lies in a hidden folder beside; what a killed program leaves of that goes
//! with the next file of this name.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::libc::O_TMPFILE;
use nix::unistd::linkat;
use tempfile::TempPath;

use super::scratch::{self, Scratch};
use crate::error::{Context, Error, Result};

/// See the module.
#[derive(Debug)]
pub(super) struct Unfinished<'a> {
    target: &'a Path,
    folder: &'a Path,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Nameless(File),
    Hidden(Scratch),
}

impl<'a> Unfinished<'a> {
    /// An empty file that may become `target`, which is in `folder`.
    pub fn beside(target: &'a Path, folder: &'a Path) -> Result<Self> {
        scratch::sweep(folder, &prefix(target));
        let content = nameless(folder).map_or_else(|| hidden(target, folder), Ok);
        let content = content.while_doing(|| format!("creating a file in `{}`", folder.display()));
        Ok(Self { target, folder, content: content? })
    }

    /// Where it is to be written, by whichever process.
    pub fn path(&self) -> PathBuf {
        match &self.content {
            // By a path that other programs have, too.
            Content::Nameless(file) => {
                format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
            }
            Content::Hidden(scratch) => scratch.path().join(NAME),
        }
    }

    /// Gives it its name. With `force` it replaces a file of this name.
    ///
    /// # Errors
    /// Without, when there is one: what `exists` says.
    pub fn appear(self, force: bool, exists: impl Fn() -> Error) -> Result<()> {
        let sync = |path: &Path| File::open(path)?.sync_all();
        let path = self.path();
        sync(&path).while_doing(|| "writing it through".into())?;
        let named = match (&self.content, force) {
            (Content::Nameless(_), false) => link(&path, self.target),
            (Content::Nameless(_), true) => Scratch::new(self.folder, &prefix(self.target))
                .and_then(|scratch| {
                    let name = scratch.path().join(NAME);
                    link(&path, &name)?;
                    fs::rename(name, self.target)
                }),
            (Content::Hidden(_), true) => fs::rename(path, self.target),
            (Content::Hidden(_), false) => TempPath::try_from_path(path)
                .and_then(|path| path.persist_noclobber(self.target).map_err(|error| error.error)),
        };
        named.map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => exists(),
            _ => Error::system(format!("naming it `{}`", self.target.display())).because(error),
        })?;
        sync(self.folder).while_doing(|| "writing its folder through".into())
    }
}

/// What it is called in a hidden folder.
const NAME: &str = "file";

/// How the names of the hidden folders of a file begin.
fn prefix(target: &Path) -> String {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    // With what comes after, it must not be too long for a name.
    format!(".{}.pavo-", name.chars().take(50).collect::<String>())
}

fn nameless(folder: &Path) -> Option<Content> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o666).custom_flags(O_TMPFILE);
    options.open(folder).ok().map(Content::Nameless)
}

fn hidden(target: &Path, folder: &Path) -> std::io::Result<Content> {
    let scratch = Scratch::new(folder, &prefix(target))?;
    File::options().write(true).create_new(true).mode(0o666).open(scratch.path().join(NAME))?;
    Ok(Content::Hidden(scratch))
}

/// Gives a file without a name one.
fn link(nameless: &Path, name: &Path) -> std::io::Result<()> {
    Ok(linkat(AT_FDCWD, nameless, AT_FDCWD, name, AtFlags::AT_SYMLINK_FOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(folder: &Path) -> Vec<std::ffi::OsString> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    /// An unfinished file of each kind.
    fn both<'a>(target: &'a Path, folder: &'a Path) -> [Unfinished<'a>; 2] {
        let hidden = Unfinished { target, folder, content: hidden(target, folder).unwrap() };
        [Unfinished::beside(target, folder).unwrap(), hidden]
    }

    #[test]
    fn it_appears_whole_or_never() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, target) = (dir.path(), dir.path().join("disk"));
        let exists = || Error::usage("it exists");
        for at in 0..2 {
            let of_it = || both(&target, folder).into_iter().nth(at).unwrap();
            let first = of_it();
            fs::write(first.path(), "first").unwrap();
            assert!(!target.exists());
            first.appear(false, exists).unwrap();
            assert_eq!(of_it().appear(false, exists).unwrap_err().to_string(), "it exists");
            assert_eq!(fs::read(&target).unwrap(), b"first");
            let second = of_it();
            fs::write(second.path(), "second").unwrap();
            second.appear(true, exists).unwrap();
            assert_eq!(fs::read(&target).unwrap(), b"second");
            drop(of_it());
            assert_eq!(left(folder), ["disk"]);
            fs::remove_file(&target).unwrap();
        }
    }

    #[test]
    fn only_what_the_dead_left_of_this_file_goes_with_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, target) = (dir.path(), dir.path().join("disk"));
        // Its own, killed; another file's; the user's.
        for name in [".disk.pavo-killed", ".other.pavo-killed", "mine"] {
            fs::create_dir(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("lock"), "").unwrap();
            fs::write(folder.join(name).join("file"), "").unwrap();
        }
        let [alive, hidden] = both(&target, folder);
        drop((alive, Unfinished::beside(&target, folder).unwrap()));
        assert!(hidden.path().exists(), "it is being written");
        drop(hidden);
        assert_eq!(left(folder), [".other.pavo-killed", "mine"]);
    }
}
