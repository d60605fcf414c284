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
        let mut content = read(path)?;
        lighten(&mut content);
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

/// Takes away what makes loading slow under emulation, 70 ms each: the signature (a
/// kernel that was not told to insist does not) and the type information for BPF,
/// whose section becomes empty. What is not such a file is left as it is.
fn lighten(module: &mut Vec<u8>) {
    // At the end: PKCS#7 message, 8 bytes and its length, this mark.
    const MARK: &[u8] = b"~Module signature appended~\n";
    if let Some(rest) = module.strip_suffix(MARK).and_then(|rest| rest.split_last_chunk::<4>()) {
        let length = u32::from_be_bytes(*rest.1) as usize + 12;
        let end = module.len() - MARK.len();
        module.truncate(end.saturating_sub(length));
    }
    if let Some(size) = size_field_of_section(module, b".BTF\0") {
        module[size..size + 8].fill(0);
    }
}

/// Where the header of an ELF64 section holds the section's size.
fn size_field_of_section(elf: &[u8], name: &[u8]) -> Option<usize> {
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(elf.get(at..at.checked_add(bytes)?)?);
        usize::try_from(u64::from_le_bytes(word)).ok()
    };
    let (headers, size) = (number(0x28, 8)?, number(0x3a, 2)?);
    let (count, names) = (number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |index: usize| headers.checked_add(index.checked_mul(size)?);
    let names = number(header(names)?.checked_add(0x18)?, 8)?;
    (0..count).find_map(|index| {
        let at = header(index)?;
        let text = elf.get(names.checked_add(number(at, 4)?)?..)?;
        let field = at.checked_add(0x20)?;
        (text.starts_with(name) && field.checked_add(8)? <= elf.len()).then_some(field)
    })
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
    fn a_signature_is_cut_off_and_nothing_else() {
        let mut module = b"\x7fELF code".to_vec();
        let plain = module.clone();
        lighten(&mut module);
        assert_eq!(module, plain);
        module.extend_from_slice(b"PKCS7\0\0\0\0\0\0\0\0\0\0\0\x05~Module signature appended~\n");
        lighten(&mut module);
        assert_eq!(module, plain);
    }

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
