//! Copies of images on this host: looked at, made before they are needed, removed.
//!
//! VMs make and use them by themselves (`vm::near`).

use std::collections::BTreeMap;
use std::time::UNIX_EPOCH;

use serde::Serialize;

use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::host::blobs::{self, Blobs, Removed};
use crate::image::library::Library;

/// One user's copies on this host.
#[derive(Debug)]
pub struct ImageCache<'a> {
    library: &'a Library,
    blobs: Blobs,
    limit: u64,
}

/// A copy of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Layer {
    pub hash: String,
    pub bytes: u64,
    /// When it was used last, in seconds since 1970.
    pub used: f64,
    pub in_use: bool,
    /// The revisions that it is part of, `REPO:NAME@REVISION`.
    pub images: Vec<String>,
}

/// What has been fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// So many bytes are on this host.
    Here(u64),
    /// The repository is as near.
    NoNeed,
    NoRoom,
}

impl<'a> ImageCache<'a> {
    /// # Errors
    /// When none is configured.
    pub fn of(config: &Config, library: &'a Library) -> Result<Self> {
        let cache = config.image_cache.as_ref().ok_or_else(|| {
            Error::config("hosts keep no copies of images here")
                .help("have them kept: `cache: {path: /var/tmp, size: 20G}` in repos.yaml")
        })?;
        let blobs = Blobs::new(&blobs::folder(&cache.path), cache.bytes);
        Ok(Self { library, blobs, limit: cache.bytes })
    }

    /// All copies, the one first that was not used for longest.
    pub fn list(&self) -> Result<Vec<Layer>> {
        let all = self.blobs.list()?;
        let mut images = match all.is_empty() {
            true => BTreeMap::new(),
            false => self.library.images_by_blob()?,
        };
        let layer = |blob: blobs::Blob| Layer {
            images: images.remove(&blob.hash).unwrap_or_default(),
            bytes: blob.bytes,
            used: blob.used.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            in_use: blob.in_use,
            hash: blob.hash,
        };
        Ok(all.into_iter().map(layer).collect())
    }

    /// Copies an image to this host, unless it is there.
    pub fn fetch(&self, image: &str) -> Result<Fetched> {
        let resolved = self.library.resolve(image)?;
        let mut bytes = 0;
        // Until all are there, none makes room for the next.
        let mut layers = Vec::new();
        for layer in &resolved.layers {
            if self.blobs.is_near(layer) {
                return Ok(Fetched::NoNeed);
            }
            let hash = layer.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let taken = self.blobs.take(layer, hash, &|| true);
            match taken.while_doing(|| format!("copying the image `{image}` to this host"))? {
                Some(held) => {
                    bytes += held.path().metadata().map_or(0, |about| about.len());
                    layers.push(held);
                }
                None => return Ok(Fetched::NoRoom),
            }
        }
        // One of the older form has no layers that could be named.
        Ok(if bytes == 0 { Fetched::NoNeed } else { Fetched::Here(bytes) })
    }

    /// Removes the copies of an image's layers; those in use stay.
    pub fn delete(&self, image: &str) -> Result<Removed> {
        let mut removed = Removed::default();
        for layer in self.library.resolve(image)?.layers {
            let hash = layer.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let one = self.blobs.remove(hash)?;
            removed.count += one.count;
            removed.bytes += one.bytes;
        }
        Ok(removed)
    }

    /// Removes what was not used for longest until no more than so many bytes are left, or as
    /// many as there may be; those in use stay.
    pub fn shrink(&self, below: Option<u64>) -> Result<Removed> {
        self.blobs.shrink(below.unwrap_or(self.limit))
    }
}
