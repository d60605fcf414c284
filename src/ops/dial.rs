//! The sockets at which a VM's process asks for connections to its guest.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::unistd::{Uid, chown};

use crate::error::{Context, Result};
use crate::model::dial;
use crate::network::responder;
use crate::vm::control;

/// Makes the socket of a responder's network in `dir`, for us or for that user alone, and
/// names it in the specification. The responder is to inherit it.
pub fn listen(dir: &Path, spec: &mut responder::Spec, user: Option<u32>) -> Result<OwnedFd> {
    let name = dial::socket(&spec.network);
    let listener: UnixListener = control::listen(dir, &name)?;
    let path = dir.join(&name);
    let doing = || format!("handing over `{}`", path.display());
    // Connecting takes the right to write.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o200)).while_doing(doing)?;
    if let Some(user) = user {
        chown(&path, Some(Uid::from_raw(user)), None).while_doing(doing)?;
    }
    spec.dial = Some(listener.as_raw_fd());
    Ok(listener.into())
}
