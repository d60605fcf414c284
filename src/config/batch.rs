//! `batch.yaml`: which scheduler runs jobs, and how the site's etcd is reached.

use super::read::{Fields, Item};
use super::types::{Batch, BatchManager, Etcd, SwitchChoice};

pub const KEYS: &[&str] = &["type", "settings"];
pub const SETTINGS: &[&str] = &[
    "etcd-servers",
    "etcd-client-port",
    "etcd-protocol",
    "etcd-ca-cert",
    "etcd-auth-type",
    "batch-args",
    "switch",
    "responder-uids",
];

pub fn read(file: &Item) -> Batch {
    let fields = file.fields(KEYS);
    let managers = [("local", BatchManager::Local), ("slurm", BatchManager::Slurm)];
    let manager = fields.required("type").and_then(|item| item.word(&managers));
    let mut batch = Batch { manager: manager.unwrap_or_default(), ..Batch::default() };
    let Some(settings) = fields.get("settings") else {
        if batch.manager == BatchManager::Slurm {
            file.problem("the setting `settings` is missing");
        }
        return batch;
    };
    let settings = settings.fields(SETTINGS);
    settings.read("batch-args", &mut batch.batch_args, |item| {
        Some(item.list().iter().filter_map(Item::any_text).collect())
    });
    let switches =
        [("auto", SwitchChoice::Auto), ("linux", SwitchChoice::Linux), ("ovs", SwitchChoice::Ovs)];
    settings.read("switch", &mut batch.switch, |item| item.word(&switches));
    settings.read("responder-uids", &mut batch.responder_uids, Item::parse);
    // One machine needs no etcd; but a site may run local jobs against its own.
    if batch.manager == BatchManager::Slurm || settings.get("etcd-servers").is_some() {
        batch.etcd = etcd(&settings);
    }
    batch
}

fn etcd(settings: &Fields) -> Option<Etcd> {
    let servers = settings.required("etcd-servers");
    let client_port = settings.required("etcd-client-port");
    let protocol = settings.required("etcd-protocol");
    let auth_type = settings.required("etcd-auth-type");
    let servers = servers.map(|item| item.list().iter().filter_map(Item::text).collect());
    let client_port = client_port.and_then(|item| item.integer(1..=u16::MAX));
    let protocol = protocol.and_then(|item| item.word(&[("http", "http"), ("https", "https")]));
    let auth_types = [("password", "password"), ("munge", "munge"), ("none", "none")];
    let auth_type = auth_type.and_then(|item| item.word(&auth_types));
    let ca_cert = settings.get("etcd-ca-cert").and_then(Item::text);
    Some(Etcd {
        servers: servers?,
        client_port: client_port?,
        protocol: protocol?.into(),
        ca_cert: ca_cert.map(Into::into),
        auth_type: auth_type?.into(),
    })
}
