//! Where a store may lie: a private directory on a file system of this machine.
//!
//! Locks and shared memory, on which SQLite's WAL rests, do not hold between
//! hosts: there a store is refused, before it is damaged. FUSE is allowed: the root
//! of a rootless container is one (fuse-overlayfs), `statfs` does not tell it from
//! sshfs, and between processes of one host both work or fail with an error.

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use nix::sys::statfs::statfs;
use nix::unistd::geteuid;

use crate::error::{Context, Error, Result};

/// Makes the directory if it is missing, 0700, and checks it.
pub fn prepare(dir: &Path) -> Result<()> {
    if !check(dir)? {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .while_doing(|| format!("creating `{}`", dir.display()))?;
        check(dir)?;
    }
    Ok(())
}

/// Checks that a store may lie in the directory; `false` when it does not exist.
pub fn check(dir: &Path) -> Result<bool> {
    let path = dir.display();
    // Not following: a link in `/tmp` could be somebody's, and be turned after the check.
    let found = match fs::symlink_metadata(dir) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).while_doing(|| format!("looking at `{path}`")),
    };
    if !found.is_dir() {
        return Err(Error::system(format!("`{path}` is not a directory"))
            .help("name the directory itself in PAVO_STATE_DIR, not a link to it"));
    }
    if found.uid() != geteuid().as_raw() {
        return Err(Error::system(format!("`{path}` belongs to the user {}", found.uid()))
            .help("choose a directory of your own: set PAVO_STATE_DIR"));
    }
    if found.mode() & 0o022 != 0 {
        return Err(Error::system(format!("others may write to `{path}`"))
            .help(format!("make it private: `chmod go-w {path}`")));
    }
    let magic = statfs(dir).while_doing(|| format!("looking at `{path}`"))?.filesystem_type().0;
    match network_file_system(magic) {
        None => Ok(true),
        Some(name) => Err(Error::system(format!("`{path}` lies on {name}, a network file system"))
            .help("choose a directory on a local disk: set PAVO_STATE_DIR")),
    }
}

/// Whether a store may lie on the file system of `path`, which exists.
pub fn is_local(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| network_file_system(found.filesystem_type().0).is_none())
}

/// The name of a file system that several hosts write to, by the magic number that
/// `statfs` gives (`linux/magic.h`, and the modules' own sources).
fn network_file_system(magic: i64) -> Option<&'static str> {
    // Some architectures extend the sign.
    Some(match magic & 0xffff_ffff {
        0x6969 => "NFS",
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => "SMB",
        0x0bd0_0bd0 => "Lustre",
        0x4750_4653 => "GPFS",
        0x5346_414f | 0x6b41_4653 => "AFS",
        0x00c3_6400 => "CephFS",
        0x1983_0326 => "BeeGFS",
        0x2003_0528 => "OrangeFS",
        0xaad7_aaea => "PanFS",
        0x0116_1970 => "GFS2",
        0x7461_636f => "OCFS2",
        0x7375_7245 => "Coda",
        0x0102_1997 => "9P",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn network_file_systems_are_told_from_local_ones() {
        for (magic, name) in [
            (0x6969, Some("NFS")),
            (0xff53_4d42, Some("SMB")),
            (i64::from(0xff53_4d42_u32.cast_signed()), Some("SMB")),
            (0x0bd0_0bd0, Some("Lustre")),
            (0x4750_4653, Some("GPFS")),
            (0x5346_414f, Some("AFS")),
            (0xef53, None),      // ext4
            (0x5846_5342, None), // XFS
            (0x0102_1994, None), // tmpfs
            (0x794c_7630, None), // overlayfs
            (0x9123_683e, None), // Btrfs
            (0x6573_5546, None), // FUSE
        ] {
            assert_eq!(network_file_system(magic), name, "{magic:x}");
        }
    }

    #[test]
    fn a_directory_is_made_private_and_only_on_request() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("a/b");
        assert!(!check(&dir).unwrap());
        assert!(!temp.path().join("a").exists());
        prepare(&dir).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o077, 0);
        assert!(check(&dir).unwrap());
    }

    #[test]
    fn a_directory_that_is_not_only_ours_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let (dir, link, file) =
            (temp.path().join("d"), temp.path().join("link"), temp.path().join("file"));
        prepare(&dir).unwrap();
        symlink(&dir, &link).unwrap();
        fs::write(&file, "").unwrap();
        for wrong in [&link, &file] {
            let report = check(wrong).unwrap_err().report();
            assert!(report.contains("is not a directory"), "{report}");
        }
        fs::set_permissions(&dir, PermissionsExt::from_mode(0o770)).unwrap();
        let report = check(&dir).unwrap_err().report();
        assert!(report.contains("others may write") && report.contains("chmod go-w"), "{report}");
        // As root nothing but root's is ours; as a user nothing of root's.
        let foreign = if geteuid().is_root() { temp.path() } else { Path::new("/") };
        if geteuid().is_root() {
            std::os::unix::fs::chown(foreign, Some(65534), None).unwrap();
        }
        let report = check(foreign).unwrap_err().report();
        assert!(report.contains("belongs to the user"), "{report}");
    }
}
