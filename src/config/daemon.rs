//! `daemon.yaml`: where the daemon listens that keeps the machines below, and how it is found.

use super::read::{Fields, Item};
use super::types::Daemon;

pub const KEYS: &[&str] =
    &["socket", "listen", "certificate", "key", "admin-group", "state", "address", "ca-cert"];

pub fn read(file: &Item) -> Daemon {
    let fields = file.fields(KEYS);
    let mut daemon = Daemon { is_configured: true, ..Daemon::default() };
    let path = |fields: &Fields, key: &str| fields.get(key).and_then(Item::text).map(Into::into);
    fields.read("socket", &mut daemon.socket, |item| item.text().map(Into::into));
    fields.read("state", &mut daemon.state, |item| item.text().map(Into::into));
    fields.read("admin-group", &mut daemon.admin_group, Item::text);
    fields.read("listen", &mut daemon.listen, |item| item.parse().map(Some));
    daemon.certificate = path(&fields, "certificate");
    daemon.key = path(&fields, "key");
    daemon.address = fields.get("address").and_then(Item::text);
    daemon.ca_cert = path(&fields, "ca-cert");
    if daemon.listen.is_some() && (daemon.certificate.is_none() || daemon.key.is_none()) {
        file.problem("`listen` needs a `certificate` and its `key`: nothing is said in the clear");
    }
    if daemon.address.as_ref().is_some_and(|it| !it.starts_with("https://")) {
        file.problem("`address` begins with `https://`");
    }
    daemon
}
