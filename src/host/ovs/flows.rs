//! Flows: what a bridge does with frames.

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::LIMIT;
use crate::error::{Context, Error, Result};
use crate::host::Host;
use crate::host::cmd::{self, Command};
use crate::host::crash;

/// All flows of a bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowTable {
    pub bridge: String,
    /// Meters, numbered from 1: so many packets a second, and at once.
    pub meters: Vec<u32>,
    /// In the words of ovs-ofctl(8), without `add`.
    pub flows: Vec<String>,
}

/// What a bridge has counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    pub flows: Vec<Counted>,
    /// Packets that meters dropped.
    pub metered: u64,
}

/// The packets that met one flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    pub cookie: u64,
    /// Where the flow asks for it, the name of the port they came by.
    pub in_port: Option<String>,
    pub packets: u64,
}

/// Puts these flows in place of all others of the bridge, at one moment.
pub async fn replace(host: &Host, table: &FlowTable) -> Result<()> {
    super::in_time(settings(host, table)).await?;
    crash::point("ovs.settings")?;
    let input = format!("delete\n{}\n", table.flows.join("\n"));
    ofctl(host, &["--bundle", "add-flows"], &table.bridge, &["-"], &input).await.map(drop)
}

/// What ovs-vswitchd counts shows here within a second or so.
pub async fn counters(host: &Host, bridge: &str) -> Result<Counters> {
    let flows = ofctl(host, &["--names", "dump-flows"], bridge, &[], "").await?;
    let meters = ofctl(host, &["meter-stats"], bridge, &[], "").await?;
    Ok(Counters {
        flows: flows.lines().filter_map(read_flow).collect(),
        metered: meters.lines().filter_map(read_band).sum(),
    })
}

async fn ofctl(
    host: &Host,
    command: &[&str],
    bridge: &str,
    more: &[&str],
    input: &str,
) -> Result<String> {
    let path = socket(host, bridge);
    let path = path.to_str().ok_or_else(|| Error::bug("Open vSwitch's folder is not UTF-8"))?;
    let target = format!("unix:{path}");
    let args = [&["-O", "OpenFlow14"], command, &[&target], more].concat();
    let input = input.as_bytes();
    let ofctl = Command { program: "ovs-ofctl", args: &args, input, namespace: None, limit: LIMIT };
    Ok(String::from_utf8_lossy(&cmd::run(&ofctl).await?).into_owned())
}

fn read_flow(line: &str) -> Option<Counted> {
    let value = |key: &str| {
        let mut words = line.trim().split([',', ' ']);
        words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    };
    Some(Counted {
        cookie: u64::from_str_radix(value("cookie")?.strip_prefix("0x")?, 16).ok()?,
        in_port: value("in_port").map(|name| name.trim_matches('"').to_owned()),
        packets: value("n_packets")?.parse().ok()?,
    })
}

/// A line such as `0: packet_count:7 byte_count:420`: the only kind with a space there.
fn read_band(line: &str) -> Option<u64> {
    line.split(' ').nth(1)?.strip_prefix("packet_count:")?.parse().ok()
}

fn socket(host: &Host, bridge: &str) -> std::path::PathBuf {
    host.ovs_dir().join(format!("{bridge}.mgmt"))
}

/// What is neither a row of the database nor a flow: a process for each would cost more than
/// the flows.
///
/// Flows see the ports of a datagram's first fragment, too: otherwise a guest could answer
/// DHCP in fragments. And meters must be there before flows that name them.
async fn settings(host: &Host, table: &FlowTable) -> Result<()> {
    const HELLO: u8 = 0;
    const ERROR: u8 = 1;
    const SET_CONFIG: u8 = 9;
    const BARRIER_REQUEST: u8 = 20;
    const BARRIER_REPLY: u8 = 21;
    const METER_MOD: u8 = 29;
    /// OFPET_METER_MOD_FAILED, OFPMMFC_METER_EXISTS.
    const METER_EXISTS: [u8; 4] = [0, 12, 0, 1];
    let path = socket(host, &table.bridge);
    let asking = || format!("asking ovs-vswitchd at `{}`", path.display());
    let mut stream = UnixStream::connect(&path).await.while_doing(asking)?;
    let mut messages = message(HELLO, &[]);
    // Nicira's "nx-match", then how much of a missed packet goes to a controller: none.
    messages.extend(message(SET_CONFIG, &[0, 3, 0, 0]));
    for (number, rate) in (1_u32..).zip(&table.meters) {
        // To add; packets a second and a burst; one band, of 16 bytes, that drops.
        let band = [&[0, 1, 0, 16][..], &rate.to_be_bytes(), &rate.to_be_bytes(), &[0; 4]];
        let meter = [&[0, 0, 0, 6][..], &number.to_be_bytes(), &band.concat()];
        messages.extend(message(METER_MOD, &meter.concat()));
    }
    messages.extend(message(BARRIER_REQUEST, &[]));
    let (mut reader, mut writer) = stream.split();
    let write = async { writer.write_all(&messages).await.while_doing(asking) };
    let read = async {
        loop {
            let mut head = [0; 8];
            reader.read_exact(&mut head).await.while_doing(asking)?;
            let length = u16::from_be_bytes([head[2], head[3]]).saturating_sub(8);
            let mut rest = vec![0; length.into()];
            reader.read_exact(&mut rest).await.while_doing(asking)?;
            match head[1] {
                ERROR if !rest.starts_with(&METER_EXISTS) => {
                    let text = format!("it refused: OpenFlow error {rest:02x?}");
                    return Err(Error::system(text)).while_doing(asking);
                }
                BARRIER_REPLY => return Ok(()),
                _ => {}
            }
        }
    };
    tokio::try_join!(write, read).map(drop)
}

/// A message of OpenFlow 1.4.
fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + body.len()).expect("a short message").to_be_bytes();
    [&[5, kind, length[0], length[1], 0, 0, 0, 0], body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_as_ovs_ofctl_prints_them() {
        let line = " cookie=0x7061766f00000001, duration=0.017s, table=3, n_packets=12, n_bytes=0, \
                    idle_age=7, priority=10,in_port=\"pt1-0\",vlan_tci=0x1000/0x1000 actions=drop";
        let counted =
            Counted { cookie: 0x7061_766f_0000_0001, in_port: Some("pt1-0".into()), packets: 12 };
        assert_eq!(read_flow(line), Some(counted));
        assert_eq!(read_flow("OFPST_FLOW reply (OF1.4) (xid=0x2):"), None);
        let meter = "meter:1 flow_count:1 packet_in_count:5 byte_in_count:0 duration:0.5s bands:";
        assert_eq!(read_band(meter), None);
        assert_eq!(read_band("0: packet_count:3 byte_count:180"), Some(3));
    }
}
