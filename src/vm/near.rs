//! The VM's image on a disk of this host, where it is to be copied first.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::timeout;

use crate::error::{Context, Error, Kind, Result};
use crate::host::blobs::{Blobs, Held};
use crate::model::vm::{NodeCache, VmSpec};

/// How long a start waits for it. What waits for the VM has a limit of its own, of minutes.
const LONGEST: Duration = Duration::from_secs(120);

/// An image's copies: as long as this is there, so are they.
#[derive(Debug)]
pub struct Near {
    /// The top layer's.
    pub top: PathBuf,
    _layers: Vec<Held>,
}

/// Tells the copying thread that nobody waits.
struct Wanted(Arc<AtomicBool>);

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Whether the VM's image is to be copied here, or looked for among the copies.
pub fn is_far(spec: &VmSpec) -> bool {
    far(spec).is_some()
}

fn far(spec: &VmSpec) -> Option<(&NodeCache, Blobs)> {
    let cache = spec.extras.node_cache.as_ref()?;
    let blobs = Blobs::new(&cache.path, cache.bytes);
    let disk = spec.disk.as_ref()?;
    (!blobs.is_near(&disk.backing)).then_some((cache, blobs))
}

/// Copies the image's layers, or finds their copies. `None` where the image is to be used where
/// it is, be it that there is no room, or that it takes too long: a start must not fail for want
/// of what makes it faster.
///
/// # Errors
/// When a layer is damaged.
pub async fn bring(spec: &VmSpec) -> Result<Option<Near>> {
    let Some((cache, blobs)) = far(spec) else { return Ok(None) };
    let layers = cache.layers.clone();
    let wanted = Arc::new(AtomicBool::new(true));
    let _wanted = Wanted(wanted.clone());
    let copy = move || take(&blobs, &layers, &|| wanted.load(Ordering::Relaxed));
    let copied = timeout(LONGEST, tokio::task::spawn_blocking(copy)).await;
    let Ok(copied) = copied else {
        let name = spec.name();
        tracing::warn!(
            "{name}: its image is used where it is: after {LONGEST:?} it is not copied yet; \
             `pavo image cache fetch` brings it before a start"
        );
        return Ok(None);
    };
    match copied.while_doing(|| "copying the image to this host".into())? {
        Err(error) if error.kind() == Kind::Config => Err(error),
        Err(error) => {
            tracing::warn!("{}: its image is used where it is: {}", spec.name(), error.report());
            Ok(None)
        }
        near => near,
    }
}

fn take(blobs: &Blobs, layers: &[PathBuf], wanted: &dyn Fn() -> bool) -> Result<Option<Near>> {
    let mut held = Vec::new();
    for layer in layers {
        let hash = layer.file_name().and_then(|name| name.to_str());
        let hash = hash.ok_or_else(|| Error::bug("a layer has no name"))?;
        match blobs.take(layer, hash, wanted)? {
            Some(copy) => held.push(copy),
            None => return Ok(None),
        }
    }
    let top = held.last().map(|copy| Path::to_owned(copy.path()));
    Ok(top.map(|top| Near { top, _layers: held }))
}
