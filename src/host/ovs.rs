//! Open vSwitch: bridges, their ports and flows, without a process per object.
//!
//! Bridges and ports are rows of a database that ovsdb-server keeps and ovs-vswitchd
//! acts upon ([`rpc`]). All bridges of an owner appear in one transaction and go in
//! one; ours carry the owner in `external_ids`. What passes a bridge is decided by
//! flows ([`flows`]), which go in whole by one `ovs-ofctl` each. A bridge without
//! flows passes nothing (`fail_mode=secure`): so it is between the two, and after
//! ovs-vswitchd was restarted.
//!
//! The database outlives the machine's reboot, the journal does not: see [`sweep`].
//!
//! Nothing here waits for ever: see [`LIMIT`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::warn;

use super::Host;
use super::crash;
use super::netlink::Netlink;
use super::step::Outcome;
use crate::error::{Error, Result};
use crate::model::owner::Owner;

pub mod flows;
mod rpc;

use rpc::Client;

/// How long one conversation with Open vSwitch may take, its own work included.
pub const LIMIT: Duration = Duration::from_secs(10);

/// How long it may take where we can do without it.
const SOON: Duration = Duration::from_secs(2);

const IS_IT_RUNNING: &str = "is Open vSwitch running? `systemctl status openvswitch-switch`";

/// The key in `external_ids` that says whose a row is.
const OWNER: &str = "pavo-owner";

/// The mark of packets that the kernel's datapath sends by a tunnel. Only root can set it.
pub const MARK: u32 = 0x7061_766f;

/// What moves the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Datapath {
    /// The kernel's module.
    System,
    /// ovs-vswitchd itself.
    Netdev,
}

impl Datapath {
    fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Netdev => "netdev",
        }
    }
}

/// A bridge of a job's own, entire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bridge {
    pub name: String,
    pub datapath: Datapath,
    /// Links that exist and become ports, with OpenFlow's numbers from 1.
    pub links: Vec<String>,
    pub tunnels: Vec<Tunnel>,
}

/// A VXLAN port, to and from whatever hosts the flows say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tunnel {
    pub name: String,
    pub key: u32,
    /// The address of this host at its end.
    pub local: Ipv4Addr,
    pub udp_port: u16,
    /// Who is at the other ends.
    pub hosts: Vec<Ipv4Addr>,
}

/// What is known of the Open vSwitch of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub version: String,
    /// Whether the kernel's module is there.
    pub kernel: bool,
    /// The bridges with their datapaths.
    pub bridges: BTreeMap<String, String>,
}

/// Makes all bridges of an owner in one transaction, and waits until they work. What
/// exists and differs is replaced.
///
/// # Errors
/// When Open vSwitch does not answer in time, a name is taken, or a port cannot work.
pub async fn ensure(host: &Host, owner: Owner, bridges: &[Bridge]) -> Result<Outcome> {
    in_time(async {
        let mut client = Client::open(&host.ovs_db()).await?;
        let found = ours(&mut client, owner).await?;
        let wanted = described(owner, bridges);
        let outcome = if found.bridges == wanted { Outcome::AlreadySo } else { Outcome::Changed };
        let mut operations = Vec::new();
        if outcome == Outcome::Changed {
            operations.extend(removal(&found));
            operations.extend(insertion(owner, bridges));
        }
        commit(&mut client, operations).await?;
        crash::point("ovs.made")?;
        check_ports(&mut client, owner).await?;
        crash::point("ovs.checked")?;
        mark_links(owner, bridges).await?;
        find_hosts(bridges);
        Ok(outcome)
    })
    .await
}

/// Deletes all bridges of an owner, with their ports, in one transaction.
///
/// With the kernel's datapath, ovs-vswitchd has to follow; without it goes on in its own time,
/// and nothing of the bridges is left on the host all the same: all links of the owner's group
/// are deleted with them.
pub async fn delete(host: &Host, owner: Owner) -> Result<Outcome> {
    let found = in_time(async {
        let mut client = Client::open(&host.ovs_db()).await?;
        let found = ours(&mut client, owner).await?;
        if !found.uuids.is_empty() {
            client.transact(removal(&found)).await?;
            crash::point("ovs.removed")?;
        }
        Ok(found)
    });
    let found = found.await?;
    if found.uuids.is_empty() {
        return Ok(Outcome::AlreadySo);
    }
    if found.netdev == found.uuids.len() {
        // Their links are of the owner's group. All of it goes at once: one after the other,
        // each makes the kernel wait for all CPUs.
        Netlink::delete_group(owner.link_group()).await?;
        return Ok(Outcome::Changed);
    }
    // It follows when it is back, and there is nothing for us to do then.
    let follow = async { commit(&mut Client::open(&host.ovs_db()).await?, Vec::new()).await };
    if let Err(error) = in_time(follow).await {
        warn!("{}", error.report());
    }
    Ok(Outcome::Changed)
}

/// Deletes the bridges of owners that are not among these, and returns whose they were: after
/// a reboot the database still has bridges that no journal knows.
pub async fn sweep(host: &Host, known: &BTreeSet<Owner>) -> Result<Vec<Owner>> {
    let mut swept = Vec::new();
    for owner in owners(host).await?.difference(known) {
        delete(host, *owner).await?;
        swept.push(*owner);
    }
    Ok(swept)
}

/// The owners of all bridges that are ours.
pub async fn owners(host: &Host) -> Result<BTreeSet<Owner>> {
    let ask = select("Bridge", None, &["external_ids"]);
    let answers = in_time(async { Client::open(&host.ovs_db()).await?.transact(vec![ask]).await });
    let rows = rows(answers.await?.first());
    let owner = |row: &Value| map(&row["external_ids"]).remove(OWNER)?.parse().ok();
    Ok(rows.iter().filter_map(owner).collect())
}

/// What there is to work with, if it answers soon.
pub async fn probe(host: &Host) -> Result<Facts> {
    let ask = vec![
        select("Open_vSwitch", None, &["ovs_version"]),
        select("Bridge", None, &["name", "datapath_type"]),
    ];
    within(SOON, async {
        let mut client = Client::open(&host.ovs_db()).await?;
        // The database alone moves no frame: ovs-vswitchd has to follow, too.
        let answers = commit(&mut client, ask).await?;
        let root = rows(answers.first());
        let version = root.first().and_then(|row| row["ovs_version"].as_str());
        let bridges = rows(answers.get(1)).into_iter().map(|row| {
            let datapath = text(&row["datapath_type"]);
            (text(&row["name"]), if datapath.is_empty() { "system".into() } else { datapath })
        });
        Ok(Facts {
            version: version.unwrap_or("of an unknown version").to_owned(),
            // Open vSwitch lists both datapaths, module or not.
            kernel: std::path::Path::new("/sys/module/openvswitch").exists(),
            bridges: bridges.collect(),
        })
    })
    .await
}

/// The bridges of an owner: their rows, and what is in them.
struct Found {
    uuids: Vec<Value>,
    /// How many are without the kernel's datapath.
    netdev: usize,
    bridges: BTreeMap<String, Vec<String>>,
}

/// A bridge in words to compare: as it is wanted, as it is found.
fn described(owner: Owner, bridges: &[Bridge]) -> BTreeMap<String, Vec<String>> {
    let describe = |bridge: &Bridge| {
        let mut words: Vec<_> = interfaces(bridge)
            .iter()
            .map(|row| word(row["name"].as_str(), &row["type"], &row["options"]))
            .collect();
        words.push(format!("{} {owner}", bridge.datapath.as_str()));
        words.sort();
        (bridge.name.clone(), words)
    };
    bridges.iter().map(describe).collect()
}

fn word(name: Option<&str>, kind: &Value, options: &Value) -> String {
    format!("{} {kind} {:?}", name.unwrap_or_default(), map(options))
}

async fn ours(client: &mut Client, owner: Owner) -> Result<Found> {
    let answers = client
        .transact(vec![
            select("Bridge", Some(owner), &["_uuid", "name", "datapath_type", "ports"]),
            select("Port", Some(owner), &["_uuid", "name"]),
            select("Interface", Some(owner), &["name", "type", "options"]),
        ])
        .await?;
    // A port has one interface, of the same name.
    let interfaces: BTreeMap<_, _> = rows(answers.get(2))
        .iter()
        .map(|row| (text(&row["name"]), word(row["name"].as_str(), &row["type"], &row["options"])))
        .collect();
    let ports: BTreeMap<_, _> = rows(answers.get(1))
        .iter()
        .map(|row| (text(&row["_uuid"][1]), interfaces.get(row["name"].as_str().unwrap_or(""))))
        .collect();
    let mut found = Found { uuids: Vec::new(), netdev: 0, bridges: BTreeMap::new() };
    for row in rows(answers.first()) {
        let mut words: Vec<_> = set(&row["ports"])
            .iter()
            .filter_map(|uuid| ports.get(uuid[1].as_str()?).copied().flatten().cloned())
            .collect();
        words.push(format!("{} {owner}", text(&row["datapath_type"])));
        words.sort();
        if row["datapath_type"] == Datapath::Netdev.as_str() {
            found.netdev += 1;
        }
        found.bridges.insert(text(&row["name"]), words);
        found.uuids.push(row["_uuid"].clone());
    }
    Ok(found)
}

/// A question about all rows of a table, or those of an owner.
fn select(table: &str, owner: Option<Owner>, columns: &[&str]) -> Value {
    let condition = |owner| json!(["external_ids", "includes", ["map", [[OWNER, owner]]]]);
    let conditions: Vec<_> = owner.into_iter().map(condition).collect();
    json!({ "op": "select", "table": table, "where": conditions, "columns": columns })
}

/// A change of the one row that everything hangs on.
fn mutate(mutation: Value) -> Value {
    json!({ "op": "mutate", "table": "Open_vSwitch", "where": [], "mutations": [mutation] })
}

/// Ports and interfaces of no bridge are deleted by ovsdb-server.
fn removal(found: &Found) -> Vec<Value> {
    if found.uuids.is_empty() {
        return Vec::new();
    }
    vec![mutate(json!(["bridges", "delete", ["set", found.uuids]]))]
}

/// The interfaces of a bridge, its own among them.
fn interfaces(bridge: &Bridge) -> Vec<Value> {
    let none = json!(["map", []]);
    let own = json!({ "name": bridge.name, "type": "internal", "options": none });
    let links = (1..).zip(&bridge.links).map(|(number, link)| {
        json!({ "name": link, "type": "", "options": none, "ofport_request": number })
    });
    let first = bridge.links.len() + 1;
    let tunnels = (first..).zip(&bridge.tunnels).map(|(number, tunnel)| {
        let mut options = vec![
            ("dst_port", tunnel.udp_port.to_string()),
            ("key", tunnel.key.to_string()),
            ("local_ip", tunnel.local.to_string()),
            // The flows say to whom, and look from whom.
            ("remote_ip", "flow".to_owned()),
        ];
        if bridge.datapath == Datapath::System {
            options.push(("egress_pkt_mark", MARK.to_string()));
        }
        json!({
            "name": tunnel.name, "type": "vxlan", "options": ["map", options],
            "ofport_request": number,
        })
    });
    std::iter::once(own).chain(links).chain(tunnels).collect()
}

fn insertion(owner: Owner, bridges: &[Bridge]) -> Vec<Value> {
    let ids = json!(["map", [[OWNER, owner]]]);
    let (mut operations, mut made) = (Vec::new(), Vec::new());
    for (index, bridge) in bridges.iter().enumerate() {
        let mut ports = Vec::new();
        for (number, mut row) in interfaces(bridge).into_iter().enumerate() {
            let (interface, port) = (format!("i{index}_{number}"), format!("p{index}_{number}"));
            let name = row["name"].clone();
            row["external_ids"] = ids.clone();
            operations.push(insert("Interface", &interface, row));
            let row = json!({
                "name": name, "external_ids": ids, "interfaces": ["named-uuid", interface],
            });
            operations.push(insert("Port", &port, row));
            ports.push(json!(["named-uuid", port]));
        }
        let name = format!("b{index}");
        let row = json!({
            "name": bridge.name,
            "datapath_type": bridge.datapath.as_str(),
            "fail_mode": "secure",
            "external_ids": ids,
            "other_config": ["map", [["disable-in-band", "true"]]],
            "ports": ["set", ports],
        });
        operations.push(insert("Bridge", &name, row));
        made.push(json!(["named-uuid", name]));
    }
    operations.push(mutate(json!(["bridges", "insert", ["set", made]])));
    operations
}

fn insert(table: &str, name: &str, row: Value) -> Value {
    json!({ "op": "insert", "table": table, "uuid-name": name, "row": row })
}

/// Does these operations, and waits until ovs-vswitchd has followed them and all before.
async fn commit(client: &mut Client, mut operations: Vec<Value>) -> Result<Vec<Value>> {
    operations.push(mutate(json!(["next_cfg", "+=", 1])));
    operations.push(select("Open_vSwitch", None, &["next_cfg"]));
    let answers = client.transact(operations).await?;
    let number = rows(answers.last()).first().and_then(|row| row["next_cfg"].as_i64());
    client.configured(number.ok_or_else(|| Error::system("its database is empty"))?).await?;
    Ok(answers)
}

/// A port that cannot work is in the database all the same, with the reason.
async fn check_ports(client: &mut Client, owner: Owner) -> Result<()> {
    let ask = select("Interface", Some(owner), &["name", "error", "ofport"]);
    let answers = client.transact(vec![ask]).await?;
    for row in rows(answers.first()) {
        let reason = row["error"].as_str();
        if reason.is_some() || row["ofport"].as_i64().is_none_or(|number| number < 0) {
            let (name, reason) = (text(&row["name"]), reason.unwrap_or("no reason is given"));
            return Err(Error::system(format!("port `{name}` does not work: {reason}"))
                .help("see the log of ovs-vswitchd: `journalctl -u ovs-vswitchd`"));
        }
    }
    Ok(())
}

/// The link of a bridge outlives an ovs-vswitchd that is its datapath and crashes. As one of the
/// owner's group it goes with the owner's others, whether or not the bridge is still known
/// by then. The kernel's datapath keeps its own, and would refuse to delete the group.
async fn mark_links(owner: Owner, bridges: &[Bridge]) -> Result<()> {
    let netlink = Netlink::open(None)?;
    for bridge in bridges.iter().filter(|bridge| bridge.datapath == Datapath::Netdev) {
        netlink.set_group(&bridge.name, owner.link_group()).await?;
    }
    Ok(())
}

/// Lets the kernel ask for the MACs of the hosts at other ends. ovs-vswitchd that is its own
/// datapath asks when it sends, drops what it was about to send, and hears the kernel's answers.
///
/// A kernel that was asked by that host just before knows it already, and asks back 5 s later.
/// Who cannot be asked at all is asked by a guest's first frame.
fn find_hosts(bridges: &[Bridge]) {
    /// Discard (RFC 863): nobody listens, and nobody has to.
    const PORT: u16 = 9;
    let tunnels = bridges.iter().filter(|bridge| bridge.datapath == Datapath::Netdev);
    for tunnel in tunnels.flat_map(|bridge| &bridge.tunnels) {
        let Ok(socket) = UdpSocket::bind((tunnel.local, 0)) else { continue };
        if socket.set_nonblocking(true).is_ok() {
            for host in &tunnel.hosts {
                let _ = socket.send_to(&[], (*host, PORT));
            }
        }
    }
}

/// Gives up on a conversation after [`LIMIT`].
async fn in_time<T>(conversation: impl Future<Output = Result<T>>) -> Result<T> {
    within(LIMIT, conversation).await
}

async fn within<T>(limit: Duration, conversation: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, conversation).await.unwrap_or_else(|_| {
        let text = format!("Open vSwitch did not follow within {} s", limit.as_secs());
        Err(Error::system(text).help(IS_IT_RUNNING))
    })
}

fn rows(answer: Option<&Value>) -> Vec<Value> {
    answer.and_then(|answer| answer["rows"].as_array()).cloned().unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// OVSDB writes `["set", […]]`, or the element itself where there is one.
fn set(value: &Value) -> Vec<Value> {
    match value.as_array().map(Vec::as_slice) {
        Some([kind, Value::Array(elements)]) if kind == "set" => elements.clone(),
        _ => vec![value.clone()],
    }
}

/// OVSDB writes `["map", [[key, value], …]]`.
fn map(value: &Value) -> BTreeMap<String, String> {
    let pairs = value[1].as_array().into_iter().flatten();
    pairs.map(|pair| (text(&pair[0]), text(&pair[1]))).collect()
}
