//! The responder: DHCP, DNS and published ports of one cluster network.
//!
//! One small process per network answers what guests ask their gateway. It parses
//! packets that hostile guests wrote, so it holds nothing worth taking: when the
//! first packet is read it has no capability, opens no file and starts no program
//! ([`confine`]).
//!
//! ```text
//!   parent ──── life line: Spec in, Answer out, end-of-file = exit
//!                 │
//!   host's namespace        │ the cluster's namespace
//!   upstream DNS ◄── udp ───┤ dns      ◄─ 53/udp, 53/tcp ─┐
//!                           │ dhcp     ◄─ 67/udp ─────────┤ guests
//!                           │ dhcp6    ◄─ 547/udp ────────┤
//!                           │ advertise◄─ ICMPv6 ─────────┤
//!   127.0.0.1:PORT ── tcp ──► publish ── connect ─────────┤
//!   dial-NETWORK ─── unix ──► dial ───── connect ─────────┘
//! ```
//!
//! A socket belongs to the namespace it was made in, wherever its descriptor goes.
//! So the parent makes what must live outside (sockets connected to the host's name
//! servers, `127.0.0.53` among them; listeners on the host's loopback) and this process
//! inherits it. Everything else is made here, once inside the cluster's namespace.
//!
//! # Order
//!
//! read the [`Spec`] → adopt the inherited sockets → enter the namespace → bind →
//! give up all rights → say [`Answer::Ready`] → serve until the life line ends.
//!
//! Each part is a pure half (bytes in, bytes out; [`dhcp::Server`], [`dns::Zone`],
//! [`forward::Pending`]) and a thin loop around its sockets. Nothing ticks: without a
//! packet, and without a forwarded query or a solicitation that waits, no code runs.

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UdpSocket, UnixStream};
use tokio::task::JoinSet;

use crate::error::{Context, Error, Result, WireError};
use crate::model::address::{Mac, Subnet};
use crate::model::prefix::Prefix64;

pub mod advertise;
pub mod confine;
pub mod dhcp;
pub mod dhcp6;
pub mod dial;
pub mod dns;
pub mod forward;
pub mod publish;
mod resolve;
mod sockets;

/// What a [`Spec`] may weigh: 65,533 guests need some 6 MiB.
const MAX_SPEC: u64 = 16 << 20;

/// Everything the responder knows. It looks nothing up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The network's name, for messages.
    pub network: String,
    /// The network namespace to enter; absent, the one it is started in.
    pub namespace: Option<PathBuf>,
    /// The interface that holds the gateway address. Only what comes in there is answered.
    pub interface: String,
    pub gateway: Ipv4Addr,
    pub subnet: Subnet,
    /// Where the network has IPv6, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6>,
    /// Told to guests (option 26).
    pub mtu: u16,
    /// Where guests' names live, such as `pavo.local`.
    pub domain: String,
    /// Told to guests (option 119); `domain` itself is searched where this is empty.
    pub dns_search: Vec<String>,
    /// Told to guests instead of the gateway.
    pub dns_server: Option<Ipv4Addr>,
    pub ntp_server: Option<Ipv4Addr>,
    /// Those on this host, who are answered.
    pub guests: Vec<Guest>,
    /// Those on the job's other hosts, who have names.
    pub others: Vec<Guest>,
    /// Inherited UDP sockets, each connected to a name server, in order of preference.
    /// Without one, names outside the cluster are refused.
    pub upstream: Vec<RawFd>,
    pub publish: Vec<Published>,
    /// An inherited Unix socket that listens: its callers are connected to whichever port of
    /// a guest they name ([`dial`]).
    #[serde(default)]
    pub dial: Option<RawFd>,
    /// The uid and gid to become, where started by the real root.
    pub drop_to: Option<(u32, u32)>,
}

/// What there is to know of a network's IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ipv6 {
    pub prefix: Prefix64,
    pub gateway_mac: Mac,
}

/// One VM's interface in this network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    pub rank: u32,
    /// A single label, such as `vm0`.
    pub name: String,
    pub mac: Mac,
    pub address: Ipv4Addr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<Ipv6Addr>,
    /// Whether it is told the gateway: of its networks one is the way to elsewhere.
    pub default_route: bool,
}

/// A guest's port that is reached through a socket outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// An inherited TCP socket that listens already.
    pub listener: RawFd,
    pub address: Ipv4Addr,
    pub port: u16,
}

/// The one line the responder writes to its life line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Sockets are bound and rights given up: guests may start.
    Ready(bool),
    Error(WireError),
}

/// Serves one network until the other end of `lifeline` closes; that end is also what
/// ends the wait for the specification.
///
/// Call it in a process of its own, on a current-thread runtime with I/O and time: it
/// changes the namespace and the rights of the whole process, and never gives them back.
///
/// # Errors
///
/// What stopped it before it was ready, which it has also told the parent.
pub async fn main(lifeline: UnixStream) -> Result<()> {
    let mut lifeline = BufReader::new(lifeline);
    let parts = match start(&mut lifeline).await {
        Ok(parts) => parts,
        Err(error) => {
            // The parent may be gone; then the exit code is all there is to tell.
            let _ = tell(&mut lifeline, &Answer::Error(error.to_wire())).await;
            return Err(error);
        }
    };
    tell(&mut lifeline, &Answer::Ready(true)).await?;
    serve(parts, lifeline).await
}

/// What serves once all rights are gone.
struct Parts {
    dhcp: (dhcp::Server, UdpSocket),
    dhcp6: Option<(dhcp6::Server, UdpSocket)>,
    advertise: Option<(Vec<u8>, HashSet<Ipv6Addr>, UdpSocket)>,
    dns: resolve::Service,
    ports: Vec<publish::Port>,
    dial: Option<dial::Dial>,
}

async fn start(lifeline: &mut BufReader<UnixStream>) -> Result<Parts> {
    let spec = read_spec(lifeline).await?;
    // First, while no descriptor of our own could be mistaken for an inherited one.
    let (upstream, ports) = sockets::inherited(&spec)?;
    let dial = sockets::dial(&spec)?;
    if let Some(namespace) = &spec.namespace {
        sockets::enter(namespace)?;
    }
    let dns = resolve::Service::new(
        dns::Zone::new(&spec)?,
        sockets::dns_datagram(&spec)?,
        sockets::dns_stream(&spec)?,
        upstream,
    );
    let dhcp = (dhcp::Server::new(&spec)?, sockets::dhcp(&spec)?);
    let dhcp6 = match dhcp6::Server::new(&spec) {
        Some(server) => Some((server, sockets::dhcp6(&spec)?)),
        None => None,
    };
    let advertise = match advertise::advertisement(&spec) {
        Some(said) => Some((said, advertise::known(&spec), sockets::solicitations(&spec)?)),
        None => None,
    };
    let dialled = dial.as_ref().map_or(0, dial::Dial::descriptors);
    confine::confine(spec.drop_to, publish::descriptors(ports.len()) + dialled)?;
    Ok(Parts { dhcp, dhcp6, advertise, dns, ports, dial })
}

async fn read_spec(lifeline: &mut BufReader<UnixStream>) -> Result<Spec> {
    let mut line = Vec::new();
    let doing = || "reading the responder's specification".to_owned();
    lifeline.take(MAX_SPEC).read_until(b'\n', &mut line).await.while_doing(doing)?;
    if line.last() != Some(&b'\n') {
        return Err(Error::bug("the responder's specification is cut short"));
    }
    serde_json::from_slice(&line)
        .map_err(|error| Error::bug("the responder's specification is malformed").because(error))
}

async fn tell(lifeline: &mut BufReader<UnixStream>, answer: &Answer) -> Result<()> {
    let mut line = serde_json::to_vec(answer).expect("an answer is always valid JSON");
    line.push(b'\n');
    lifeline.write_all(&line).await.while_doing(|| "answering the parent".into())
}

/// Runs every part until the life line ends. None of them ends by itself.
async fn serve(parts: Parts, mut lifeline: BufReader<UnixStream>) -> Result<()> {
    let mut tasks = JoinSet::new();
    let (server, socket) = parts.dhcp;
    tasks.spawn(dhcp::serve(server, socket));
    if let Some((server, socket)) = parts.dhcp6 {
        tasks.spawn(dhcp6::serve(server, socket));
    }
    if let Some((advertisement, known, socket)) = parts.advertise {
        tasks.spawn(advertise::serve(advertisement, known, socket));
    }
    tasks.spawn(parts.dns.serve());
    let budget = publish::budget();
    for port in parts.ports {
        tasks.spawn(port.serve(budget.clone()));
    }
    if let Some(dial) = parts.dial {
        tasks.spawn(dial.serve());
    }
    let mut ignored = [0; 64];
    loop {
        tokio::select! {
            read = lifeline.read(&mut ignored) => match read {
                // Closed, or reset because the parent was killed.
                Ok(0) | Err(_) => return Ok(()),
                Ok(_) => {}
            },
            Some(ended) = tasks.join_next() => {
                return Err(match ended {
                    Ok(error) => error,
                    Err(panic) => Error::bug("a part of the responder panicked").because(panic),
                });
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two guests of `10.200.0.0/16`, and one on another host; nothing outside.
    pub fn spec() -> Spec {
        let subnet: Subnet = "10.200.0.0/16".parse().unwrap();
        let prefix: Prefix64 = "fd12:3456:789a:1::/64".parse().unwrap();
        let guest = |rank| Guest {
            rank,
            name: format!("vm{rank}"),
            mac: Mac([0x52, 0x54, 0, 0, 0, rank as u8]),
            address: subnet.guest(rank).unwrap(),
            address6: prefix.guest(rank),
            default_route: true,
        };
        Spec {
            network: "nat".into(),
            namespace: None,
            interface: "gw".into(),
            gateway: subnet.gateway(),
            subnet,
            ipv6: Some(Ipv6 { prefix, gateway_mac: Mac([0x52, 0x54, 0, 0xff, 0xff, 0xfe]) }),
            mtu: 1450,
            domain: "pavo.local".into(),
            dns_search: Vec::new(),
            dns_server: None,
            ntp_server: None,
            guests: (0..2).map(guest).collect(),
            others: vec![guest(7)],
            upstream: Vec::new(),
            publish: Vec::new(),
            dial: None,
            drop_to: None,
        }
    }

    #[test]
    fn a_specification_survives_its_journey() {
        let line = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&line).unwrap(), spec());
    }

    #[test]
    fn the_answer_is_what_the_parent_reads() {
        assert_eq!(serde_json::to_string(&Answer::Ready(true)).unwrap(), r#"{"ready":true}"#);
        let error = Answer::Error(Error::system("no").to_wire());
        assert!(serde_json::to_string(&error).unwrap().starts_with(r#"{"error":{"#));
    }

    #[test]
    fn a_specification_cut_short_is_refused() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(br#"{"network": "na"#).await.unwrap();
            theirs.shutdown().await.unwrap();
            let error = read_spec(&mut BufReader::new(ours)).await.unwrap_err();
            assert_eq!(error.to_string(), "the responder's specification is cut short");
        });
    }
}
