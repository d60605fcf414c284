//! `qemu-img`, kept on a short leash: it is told the format, sees only files that
//! [`header`](super::header) has checked, and may not use more than it needs.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sys::resource::{Resource, setrlimit};

use super::header::{self, Format, Header};
use super::tool;
use crate::error::{Context, Error, Result};

/// Processor time: an image of 64 GiB converts in a tenth of it.
const CPU_SECONDS: u64 = 1800;
/// Address space: OpenStack's advice after CVE-2015-5162 is 1 GiB for `info`.
const ADDRESS_SPACE: u64 = 2 << 30;

/// Converts an image into a qcow2 that stands alone.
///
/// # Errors
///
/// When the header of `source` is refused, or `qemu-img` fails; then `target` may
/// exist in part.
pub(super) fn to_qcow2(source: &Path, format: Format, target: &Path) -> Result<Header> {
    let header = header::inspect(source)?;
    if header.format != format {
        return Err(Error::usage(format!(
            "`{}` is not {}: it looks like {}",
            source.display(),
            format.as_str(),
            header.format.as_str()
        )));
    }
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-f", format.as_str(), "-O", "qcow2", "--"])
        .arg(file(source)?)
        .arg(file(target)?);
    limit(&mut command);
    tool::run(&mut command)?;
    let result = header::inspect(target)?;
    if result.format != Format::Qcow2 || result.virtual_size < header.virtual_size {
        return Err(Error::bug("`qemu-img convert` wrote something else than it was asked for"));
    }
    Ok(result)
}

/// Writes all of a disk, whose layers the caller has checked, into a file of its own.
///
/// # Errors
///
/// When `qemu-img` fails; then `target` may exist in part.
pub(super) fn flatten(top: &Path, size: u64, format: Format, target: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-f", "qcow2", "-O", format.as_str(), "--"])
        .arg(file(top)?)
        .arg(file(target)?);
    limit(&mut command);
    tool::run(&mut command)?;
    let written = match format {
        // What the guest has at the start of its disk may look like anything.
        Format::Raw => {
            let data = target.metadata().while_doing(|| "looking at the result".into())?;
            (Format::Raw, data.len())
        }
        _ => header::inspect(target).map(|header| (header.format, header.virtual_size))?,
    };
    if written.0 != format || written.1 < size {
        return Err(Error::bug("`qemu-img convert` wrote something else than it was asked for"));
    }
    Ok(())
}

/// A file name that QEMU takes for nothing but a file name: no `json:`, no protocol,
/// no option.
fn file(path: &Path) -> Result<OsString> {
    let path = std::path::absolute(path).while_doing(|| format!("naming `{}`", path.display()))?;
    let mut name = OsString::from("file:");
    name.push(path);
    Ok(name)
}

/// Bounds what the child may use.
pub(super) fn limit(command: &mut Command) {
    let set = || {
        setrlimit(Resource::RLIMIT_CPU, CPU_SECONDS, CPU_SECONDS)?;
        setrlimit(Resource::RLIMIT_AS, ADDRESS_SPACE, ADDRESS_SPACE)?;
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        Ok(())
    };
    #[expect(unsafe_code)]
    // SAFETY: runs between fork and exec; setrlimit is async-signal-safe and nothing
    // is allocated or locked.
    unsafe {
        command.pre_exec(set)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_are_names_and_contents_survive() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["nbd:localhost:1", "json:{}", "-o", "a b,c"] {
            let source = dir.path().join(name);
            let target = dir.path().join(format!("{name}.qcow2"));
            std::fs::write(&source, [7; 1024]).unwrap();
            let header = to_qcow2(&source, Format::Raw, &target).unwrap();
            assert_eq!((header.format, header.virtual_size), (Format::Qcow2, 1024));
            let back = dir.path().join("back");
            to_raw(&target, &back);
            assert_eq!(std::fs::read(&back).unwrap(), [7; 1024]);
        }
    }

    fn to_raw(source: &Path, target: &Path) {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "qcow2", "-O", "raw", "--"]);
        tool::run(command.arg(file(source).unwrap()).arg(file(target).unwrap())).unwrap();
    }

    #[test]
    fn a_claim_that_the_header_contradicts_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("disk.vmdk");
        std::fs::write(&source, [0; 4096]).unwrap();
        let error = to_qcow2(&source, Format::Vmdk, &dir.path().join("out")).unwrap_err();
        assert!(error.to_string().ends_with("is not vmdk: it looks like raw"), "{error}");
    }
}
