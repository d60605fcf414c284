//! Disks of a guest that stands still, and that QEMU has written down.
//!
//! It lets go of its disks then, for another to have them, and takes them again when the guest is
//! let go on. Of one that is to stand still they could not be saved meanwhile. It also takes a
//! disk again that is to be read by a client of NBD: nobody ever is one.

use serde_json::json;

use super::super::qmp;
use crate::error::{Context, Result};
use crate::model::vm::VmSpec;

/// In the VM's folder, for a moment.
const SOCKET: &str = "awake.sock";
/// What QEMU calls the way to a disk.
const EXPORT: &str = "awake";

/// Lets QEMU have the VM's disk again, as it had it before.
pub(super) async fn disks(qmp: &qmp::Client, spec: &VmSpec) -> Result<()> {
    if spec.disk.is_none() {
        return Ok(());
    }
    let socket = spec.dir.join(SOCKET);
    let doing = || "taking its disk again".to_owned();
    let address = json!({ "type": "unix", "data": { "path": socket } });
    qmp.call("nbd-server-start", json!({ "addr": address })).await.while_doing(doing)?;
    let export = json!({ "type": "nbd", "id": EXPORT, "node-name": "disk" });
    let taken = qmp.call("block-export-add", export).await;
    // It ends the export as well.
    let stopped = qmp.call("nbd-server-stop", json!({})).await;
    taken.and(stopped).map(drop).while_doing(doing)
}
