//! What goes: revisions, the blobs that nothing needs any more, and what killed programs left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind};

use serde::Serialize;

use super::super::scratch;
use super::{Repository, entry_of, is_hash, sync};
use crate::error::{Context, Error, Result};

/// What deleting gave back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Freed {
    pub revisions: Vec<u32>,
    pub blobs: usize,
    pub bytes: u64,
}

/// What collecting garbage has found, and removed unless it was only to look.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Blobs that no revision needs.
    pub blobs: usize,
    /// Imports, saves and the like that were never finished.
    pub unfinished: usize,
    pub bytes: u64,
}

impl Repository {
    /// Deletes one revision or all, and the blobs that nothing needs any more.
    pub fn delete(&self, name: &str, revision: Option<u32>) -> Result<Freed> {
        let _lock = self.lock()?;
        let doomed: Vec<u32> = self
            .revisions(name)?
            .into_iter()
            .filter(|number| revision.is_none_or(|wanted| wanted == *number))
            .collect();
        let mut blobs = BTreeSet::new();
        for number in &doomed {
            // What cannot be read has no blobs that could be named.
            if let Ok(meta) = self.read(name, *number) {
                blobs.extend(meta.data_blobs);
            }
        }
        for number in &doomed {
            let path = self.meta_path(name, *number);
            fs::remove_file(&path).while_doing(|| format!("deleting `{}`", path.display()))?;
        }
        let meta = self.path.join("meta");
        sync(&meta).while_doing(|| format!("writing `{}` through", meta.display()))?;
        let (blobs, bytes) = self.remove_unused(blobs)?;
        Ok(Freed { revisions: doomed, blobs, bytes })
    }

    /// Removes what nothing needs: blobs of no revision, and what killed programs left. What
    /// somebody works on stays. With `dry_run` it only looks.
    pub fn collect(&self, dry_run: bool) -> Result<Collected> {
        if !self.is_initialised()? {
            return Ok(Collected::default());
        }
        let _lock = self.lock()?;
        let tmp = self.path.join(".tmp");
        let (unfinished, left) = scratch::clear(&tmp, dry_run)?;
        // The blobs first: one that a program without our lock (pcocc) stores after this line
        // is not among them.
        let stored = self.blobs()?;
        let needed = self.needed()?;
        let unused = stored.iter().filter(|(hash, _)| !needed.contains(*hash));
        let unused: BTreeMap<&str, u64> = unused.map(|(hash, len)| (hash.as_str(), *len)).collect();
        if !dry_run {
            for hash in unused.keys() {
                self.remove_blob(hash)?;
            }
        }
        let bytes = left + unused.values().sum::<u64>();
        Ok(Collected { blobs: unused.len(), unfinished, bytes })
    }

    /// All blobs, with their size in bytes.
    pub fn blobs(&self) -> Result<BTreeMap<String, u64>> {
        let data = self.path.join("data");
        let list = || -> io::Result<BTreeMap<String, u64>> {
            let mut found = BTreeMap::new();
            for folder in fs::read_dir(&data)? {
                let folder = folder?;
                if !folder.file_type()?.is_dir() {
                    continue;
                }
                for entry in fs::read_dir(folder.path())? {
                    let entry = entry?;
                    let Ok(hash) = entry.file_name().into_string() else { continue };
                    let here = is_hash(&hash) && folder.file_name() == hash[..2];
                    if !here {
                        continue;
                    }
                    match entry.metadata() {
                        Ok(data) if data.is_file() => drop(found.insert(hash, data.len())),
                        // Deleted meanwhile.
                        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
            }
            Ok(found)
        };
        match self.is_initialised()? {
            true => list().while_doing(|| format!("listing `{}`", data.display())),
            false => Ok(BTreeMap::new()),
        }
    }

    /// After a failure: what was stored for nothing goes.
    pub(super) fn drop_unused(&self, blobs: &[String]) {
        if let Err(error) = self.remove_unused(blobs.iter().cloned().collect()) {
            tracing::warn!("{error:?}");
        }
    }

    /// Removes those of `blobs` that no revision needs; returns how many, and their
    /// size. The caller holds the lock.
    fn remove_unused(&self, blobs: BTreeSet<String>) -> Result<(usize, u64)> {
        if blobs.is_empty() {
            return Ok((0, 0));
        }
        let needed = self.needed()?;
        let (mut count, mut bytes) = (0, 0);
        for hash in blobs.difference(&needed) {
            if let Some(size) = self.remove_blob(hash)? {
                (count, bytes) = (count + 1, bytes + size);
            }
        }
        Ok((count, bytes))
    }

    /// Removes a blob, if it is there; returns its size.
    fn remove_blob(&self, hash: &str) -> Result<Option<u64>> {
        let blob = self.blob(hash);
        let size = blob.metadata().map_or(0, |data| data.len());
        match fs::remove_file(&blob) {
            Ok(()) => Ok(Some(size)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).while_doing(|| format!("deleting `{}`", blob.display())),
        }
    }

    /// The blobs that revisions need.
    ///
    /// # Errors
    ///
    /// When one cannot be read: nobody knows what it needs, so nothing may go.
    fn needed(&self) -> Result<BTreeSet<String>> {
        let meta = self.path.join("meta");
        let mut needed = BTreeSet::new();
        let entries = fs::read_dir(&meta).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        for entry in entries.while_doing(|| format!("listing `{}`", meta.display()))? {
            let file = entry.file_name();
            match file.to_str().and_then(entry_of) {
                Some((name, revision)) => needed.extend(self.read(&name, revision)?.data_blobs),
                // A deleted file that somebody on NFS still reads.
                None if file.as_encoded_bytes().starts_with(b".nfs") => {}
                None => {
                    let error = format!("`{}` is no revision of an image", entry.path().display());
                    return Err(Error::system(error).help(
                        "nobody knows which blobs it needs, so none is removed: move it away",
                    ));
                }
            }
        }
        Ok(needed)
    }
}
