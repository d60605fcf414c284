//! Flows: what a bridge does with frames.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::LIMIT;
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::host::cmd::{self, Command};

/// All flows of a bridge, in the words of ovs-ofctl(8), without `add`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowTable {
    pub bridge: String,
    pub flows: Vec<String>,
}

/// Puts these flows in place of all others of the bridge, at one moment.
pub async fn replace(host: &Host, table: &FlowTable) -> Result<()> {
    super::in_time(show_fragments(host, &table.bridge)).await?;
    let target = target(host, &table.bridge)?;
    let args = ["--bundle", "-O", "OpenFlow14", "add-flows", &target, "-"];
    let input = format!("delete\n{}\n", table.flows.join("\n"));
    let command = Command {
        program: "ovs-ofctl",
        args: &args,
        input: input.as_bytes(),
        namespace: None,
        limit: LIMIT,
    };
    cmd::run(&command).await.map(drop)
}

/// How many packets met each flow, by table and cookie, added up. What ovs-vswitchd counts
/// shows here within a second or so.
pub async fn counters(host: &Host, bridge: &str) -> Result<BTreeMap<(u8, u64), u64>> {
    let target = target(host, bridge)?;
    let args = ["-O", "OpenFlow14", "--no-names", "dump-flows", &target];
    let command =
        Command { program: "ovs-ofctl", args: &args, input: b"", namespace: None, limit: LIMIT };
    let output = cmd::run(&command).await?;
    let mut counters = BTreeMap::new();
    for line in String::from_utf8_lossy(&output).lines() {
        if let Some((key, packets)) = read_flow(line) {
            *counters.entry(key).or_default() += packets;
        }
    }
    Ok(counters)
}

fn read_flow(line: &str) -> Option<((u8, u64), u64)> {
    let value = |key: &str| {
        let mut words = line.trim().split([',', ' ']);
        words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    };
    let cookie = u64::from_str_radix(value("cookie")?.strip_prefix("0x")?, 16).ok()?;
    Some(((value("table")?.parse().ok()?, cookie), value("n_packets")?.parse().ok()?))
}

fn socket(host: &Host, bridge: &str) -> std::path::PathBuf {
    host.ovs_dir().join(format!("{bridge}.mgmt"))
}

fn target(host: &Host, bridge: &str) -> Result<String> {
    let path = socket(host, bridge);
    let path = path.to_str().ok_or_else(|| Error::bug("Open vSwitch's folder is not UTF-8"))?;
    Ok(format!("unix:{path}"))
}

/// Lets flows see the ports of a datagram's first fragment too. Otherwise a guest could answer
/// DHCP in fragments.
///
/// This one setting is no row of the database, and a process just for it would cost more
/// than the flows.
async fn show_fragments(host: &Host, bridge: &str) -> Result<()> {
    const VERSION: u8 = 5;
    const HELLO: u8 = 0;
    const ERROR: u8 = 1;
    const SET_CONFIG: u8 = 9;
    const BARRIER_REQUEST: u8 = 20;
    const BARRIER_REPLY: u8 = 21;
    let path = socket(host, bridge);
    let asking = || format!("asking ovs-vswitchd at `{}`", path.display());
    let mut stream = UnixStream::connect(&path).await.while_doing(asking)?;
    let header = |kind: u8, length: u8, id: u8| [VERSION, kind, 0, length, 0, 0, 0, id];
    // Nicira's "nx-match", then how much of a missed packet goes to a controller: none.
    let settings = [0, 3, 0, 0];
    let messages = [
        &header(HELLO, 8, 1)[..],
        &header(SET_CONFIG, 12, 2),
        &settings,
        &header(BARRIER_REQUEST, 8, 3),
    ];
    stream.write_all(&messages.concat()).await.while_doing(asking)?;
    loop {
        let mut head = [0; 8];
        stream.read_exact(&mut head).await.while_doing(asking)?;
        let length = u16::from_be_bytes([head[2], head[3]]).saturating_sub(8);
        let mut rest = vec![0; length.into()];
        stream.read_exact(&mut rest).await.while_doing(asking)?;
        match head[1] {
            ERROR => {
                let text = format!("it refused: OpenFlow error {rest:02x?}");
                return Err(Error::system(text)).while_doing(asking);
            }
            BARRIER_REPLY => return Ok(()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_read_as_ovs_ofctl_prints_them() {
        let line = " cookie=0x7061766f00000001, duration=0.017s, table=3, n_packets=12, n_bytes=0, \
                    idle_age=7, priority=10,in_port=2,vlan_tci=0x1000/0x1000 actions=drop";
        assert_eq!(read_flow(line), Some(((3, 0x7061_766f_0000_0001), 12)));
        assert_eq!(read_flow("OFPST_FLOW reply (OF1.4) (xid=0x2):"), None);
    }
}
