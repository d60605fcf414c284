//! Kernel modules with what they need, in the order in which they must be loaded.
//!
//! The package comes without `modules.dep` (depmod writes it at installation), but
//! every module says in its `.modinfo` section what it depends on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::image::tool;

/// A module, uncompressed.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// Reads `wanted` and all they depend on from a folder `/lib/modules/<version>`;
/// each follows what it depends on. What is built into the kernel is left out.
pub(super) fn select(tree: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    index(&tree.join("kernel"), &mut files)?;
    let builtin = fs::read_to_string(tree.join("modules.builtin"))
        .while_doing(|| format!("reading `{}/modules.builtin`", tree.display()))?;
    let builtin = builtin.lines().filter_map(|line| name_of(line.rsplit('/').next()?)).collect();
    let mut selection = Selection { files, builtin, seen: BTreeSet::new(), order: Vec::new() };
    wanted.iter().try_for_each(|name| selection.add(name))?;
    Ok(selection.order)
}

struct Selection {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    seen: BTreeSet<String>,
    order: Vec<Module>,
}

impl Selection {
    fn add(&mut self, name: &str) -> Result<()> {
        if self.builtin.contains(name) || !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name);
        let path =
            path.ok_or_else(|| Error::system(format!("the kernel has no module `{name}`")))?;
        let content = read(path)?;
        for needed in depends(&content) {
            self.add(&needed)?;
        }
        self.order.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

fn index(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(dir).while_doing(|| format!("listing `{}`", dir.display()))?;
    for entry in entries {
        let path = entry.while_doing(|| format!("listing `{}`", dir.display()))?.path();
        if path.is_dir() {
            index(&path, files)?;
        } else if let Some(name) = path.file_name().and_then(|name| name_of(name.to_str()?)) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `virtio-rng.ko.xz` is the module `virtio_rng`.
fn name_of(file: &str) -> Option<String> {
    let (name, rest) = file.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"].contains(&rest).then(|| name.replace('-', "_"))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let unpacker = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).while_doing(|| format!("reading `{}`", path.display())),
    };
    tool::run(Command::new(unpacker).arg("-dc").arg(path))
}

/// What the module's own `depends=` says.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_follows_what_it_depends_on_and_comes_once() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        fs::write(kernel.join("a-net.ko"), b"ELF\0license=GPL\0depends=b-ring,c,core\0").unwrap();
        fs::write(kernel.join("b-ring.ko"), b"ELF\0depends=c\0").unwrap();
        fs::write(kernel.join("c.ko"), b"ELF\0depends=\0").unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/core.ko\n").unwrap();

        let names = |wanted: &[&str]| -> Vec<String> {
            select(dir.path(), wanted).unwrap().into_iter().map(|module| module.name).collect()
        };
        assert_eq!(names(&["a_net", "c"]), ["c", "b_ring", "a_net"]);
        assert_eq!(names(&["core"]), Vec::<String>::new());
        let error = select(dir.path(), &["zfs"]).unwrap_err();
        assert_eq!(error.to_string(), "the kernel has no module `zfs`");
    }
}
