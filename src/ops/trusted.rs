//! Whose files may be read back into QEMU: what a stranger has written could be made to take
//! it over, as whoever runs it.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Context, Error, Result};

/// Refuses a folder, and files in it, that somebody else than root and us can have written.
/// Returns what is known of the files.
///
/// # Errors
/// With whose it is, or who may write to it.
pub fn check(dir: &Path, names: &[&str]) -> Result<Vec<Metadata>> {
    let looking = |path: &Path| format!("looking at `{}`", path.display());
    let about = fs::metadata(dir).while_doing(|| looking(dir))?;
    check_one(dir, &about)?;
    let check = |name: &&str| {
        let path = dir.join(name);
        // A link leads to what was not looked at.
        let about = fs::symlink_metadata(&path).while_doing(|| looking(&path))?;
        if !about.is_file() {
            return Err(Error::config(format!("`{}` is not a file", path.display())));
        }
        check_one(&path, &about)?;
        Ok(about)
    };
    names.iter().map(check).collect()
}

/// Opens a file that only root and we can have written.
///
/// # Errors
/// When it cannot be opened, or with whose it is.
pub fn open(path: &Path) -> std::io::Result<Result<File>> {
    let file = File::options().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(path)?;
    let about = file.metadata()?;
    Ok(check_one(path, &about).map(|()| file))
}

fn check_one(path: &Path, about: &Metadata) -> Result<()> {
    let (us, owner) = (nix::unistd::geteuid().as_raw(), about.uid());
    let path = path.display();
    if owner != us && owner != 0 {
        let name = nix::unistd::User::from_uid(owner.into()).ok().flatten();
        let name = name.map_or_else(|| format!("user {owner}"), |user| format!("`{}`", user.name));
        return Err(Error::config(format!(
            "`{path}` belongs to {name}: what others have written may hold anything, and QEMU \
             would read it as you"
        ))
        .help("use one that you or root have made"));
    }
    if about.mode() & 0o022 != 0 {
        return Err(Error::config(format!("others may write to `{path}`"))
            .help(format!("make sure that nobody has, and `chmod go-w {path}`")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn only_what_nobody_else_can_have_written_is_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "").unwrap();
        symlink("f", dir.path().join("link")).unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&path, 0o644);
        assert_eq!(check(dir.path(), &["f"]).unwrap().len(), 1);
        let refused = |names: &[&str], why: &str| {
            let error = check(dir.path(), names).unwrap_err().report();
            assert!(error.contains(why), "{error}");
        };
        refused(&["f", "link"], "is not a file");
        refused(&["g"], "looking at");
        mode(&path, 0o664);
        refused(&["f"], "others may write");
        mode(&path, 0o600);
        mode(dir.path(), 0o777);
        refused(&["f"], "others may write");
        mode(dir.path(), 0o700);
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(1), None).unwrap();
            refused(&["f"], "QEMU would read it as you");
            std::os::unix::fs::chown(dir.path(), Some(1), None).unwrap();
            refused(&[], "QEMU would read it as you");
        }
    }
}
