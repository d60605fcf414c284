//! Debian packages: downloaded by apt as whoever we are, unpacked, never installed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, Result};
use crate::image::tool;

/// Downloads those of the packages that the cache does not hold yet; returns their files.
pub(super) fn fetch(cache: &Path, names: &[String]) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(cache).while_doing(|| format!("creating `{}`", cache.display()))?;
    let lock = File::open(cache).while_doing(|| format!("opening `{}`", cache.display()))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .while_doing(|| format!("locking `{}`", cache.display()))?;
    let files = locate(names)?;
    let missing: Vec<&str> = names
        .iter()
        .zip(&files)
        .filter(|(_, file)| !cache.join(file).exists())
        .map(|(name, _)| name.as_str())
        .collect();
    if !missing.is_empty() {
        // apt checks size and digest, and renames a file only when it is complete.
        tool::run(Command::new("apt-get").arg("download").args(missing).current_dir(cache))?;
    }
    Ok(files.into_iter().map(|file| cache.join(file)).collect())
}

/// Unpacks packages on top of each other.
pub(super) fn unpack(debs: &[PathBuf], root: &Path) -> Result<()> {
    for deb in debs {
        tool::run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(root))?;
    }
    Ok(())
}

/// The real package behind a kernel's virtual one.
pub(super) fn kernel(name: &str) -> Result<String> {
    let text = tool::run(Command::new("apt-cache").args(["show", "--no-all-versions", name]))
        .map_err(|error| {
            Error::system(format!("apt does not know the package `{name}`"))
                .because(error)
                .help("fetch apt's package lists once, as root: `apt-get update`")
        })?;
    depends(&String::from_utf8_lossy(&text))
        .ok_or_else(|| Error::system(format!("the package `{name}` depends on no kernel")))
}

/// The first kernel a package depends on.
fn depends(control: &str) -> Option<String> {
    let line = control.lines().find_map(|line| line.strip_prefix("Depends:"))?;
    let names = line.split([',', '|']).filter_map(|item| item.split_whitespace().next());
    names.map(str::to_owned).find(|name| name.starts_with("linux-image-"))
}

/// The names of the files that apt would download, in the order of `names`.
fn locate(names: &[String]) -> Result<Vec<String>> {
    // apt says nothing of files that lie in the current folder already.
    let empty = tempfile::tempdir().while_doing(|| "creating a temporary folder".into())?;
    let text = tool::run(
        Command::new("apt-get")
            .args(["download", "--print-uris"])
            .args(names)
            .current_dir(empty.path()),
    )
    .map_err(|error| error.help("fetch apt's package lists once, as root: `apt-get update`"))?;
    let text = String::from_utf8_lossy(&text);
    names
        .iter()
        .map(|name| {
            file_of(&text, name)
                .ok_or_else(|| Error::system(format!("apt names no file for `{name}`")))
        })
        .collect()
}

/// Finds a package's file in lines of `'URL' FILE SIZE DIGEST`.
fn file_of(uris: &str, package: &str) -> Option<String> {
    let files = uris.lines().filter_map(|line| line.split(' ').nth(1));
    let ours = |file: &&str| file.split('_').next() == Some(package) && !file.contains('/');
    files.map(str::trim).find(ours).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_what_the_virtual_package_depends_on() {
        let control = "Package: linux-image-cloud-amd64\n\
             Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nProvides: x\n";
        assert_eq!(depends(control).unwrap(), "linux-image-6.1.0-56-cloud-amd64");
        assert_eq!(depends("Depends: libc6"), None);
    }

    #[test]
    fn a_package_is_known_by_its_whole_name() {
        let uris = "'http://x/busybox-static_1.deb' busybox-static_1%3a1_amd64.deb 9 SHA256:a\n\
             'http://x/busybox_1.deb' busybox_1%3a1_amd64.deb 9 SHA256:a\n";
        assert_eq!(file_of(uris, "busybox").unwrap(), "busybox_1%3a1_amd64.deb");
        assert_eq!(file_of(uris, "busy"), None);
    }
}
