//! VXLAN devices, and the frames' ways by them.
//!
//! Nothing is learned: which MAC is behind which host is written down in two tables,
//! that of the bridge (which port) and that of the device (which host).

use std::io;
use std::net::Ipv4Addr;

use futures_util::StreamExt;
use futures_util::future::join_all;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVxlan};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{LinkBridgePort, LinkUnspec};

use super::crash;
use super::netlink::{
    BATCH, LinkSettings, Netlink, gone, in_time, made, new_link, refused, silence,
};
use super::step::Outcome;
use crate::error::Result;
use crate::model::address::Mac;

/// The UDP port of VXLAN (RFC 7348).
pub const PORT: u16 = 4789;
/// The ports that our devices send from. Only root has these: what comes from a higher
/// one was written by somebody's program.
pub const SOURCE_PORTS: (u16, u16) = (512, 1023);

/// An entry that neither ages nor is the bridge's own, in both tables.
const STATIC: NeighbourState = NeighbourState::Other(0x40 | 0x02);

/// What a VXLAN device is like, beside what every link has.
#[derive(Clone, Copy, Debug)]
pub struct VxlanSettings {
    pub key: u32,
    /// The address it sends from.
    pub local: Ipv4Addr,
    /// Whether the bridge answers ARP for those behind it, where it knows them.
    pub answers_arp: bool,
}

impl Netlink {
    /// Makes a VXLAN device that is a port of a bridge, unless it exists. It is switched on
    /// last: at no time does the bridge learn from it.
    pub async fn ensure_vxlan(
        &self,
        settings: &LinkSettings<'_>,
        vxlan: &VxlanSettings,
    ) -> Result<Outcome> {
        let options = vec![
            InfoVxlan::Id(vxlan.key),
            InfoVxlan::Local(vxlan.local),
            InfoVxlan::Port(PORT),
            InfoVxlan::PortRange(SOURCE_PORTS),
            InfoVxlan::Learning(false),
        ];
        let message = new_link(settings, InfoKind::Vxlan, InfoData::Vxlan(options));
        let outcome = self.make_link(message, settings).await?;
        crash::point("link.tunnel")?;
        silence(settings.name)?;
        let index = self.require_link(settings.name).await?.index;
        if let Some(bridge) = settings.bridge {
            let join = LinkUnspec::new_with_index(index).controller(bridge).build();
            let joined = in_time(self.handle.link().set(join).execute()).await;
            joined.map_err(|error| refused(&error))?;
            let port = LinkBridgePort::new(index)
                .learning(false)
                .flood(false)
                .neigh_suppress(vxlan.answers_arp)
                .build();
            let changed = in_time(self.handle.link().set_port(port).execute()).await;
            changed.map_err(|error| refused(&error))?;
        }
        self.configure(std::slice::from_ref(settings)).await?;
        Ok(outcome)
    }

    /// Makes it known, to the VXLAN device of this index and its bridge, behind which host
    /// each MAC is, and which hosts get what is for all.
    pub async fn add_forwarding(
        &self,
        index: u32,
        known: &[(Mac, Ipv4Addr)],
        all: &[Ipv4Addr],
    ) -> Result<Outcome> {
        let mut outcome = Outcome::AlreadySo;
        for batch in known.chunks(BATCH / 2) {
            let add = |message| self.new_neighbour(message, NLM_F_EXCL);
            let entries = batch.iter().flat_map(|(mac, host)| both(index, *mac, *host));
            for answer in join_all(entries.map(add)).await {
                if made(answer)? == Outcome::Changed {
                    outcome = Outcome::Changed;
                }
            }
        }
        // Of several entries for one MAC only the first can be refused as known, so it alone
        // tells whether there was something to do.
        let Some((first, others)) = all.split_first() else { return Ok(outcome) };
        let for_all = |host: &Ipv4Addr| behind(index, Mac([0; 6]), *host);
        if made(self.new_neighbour(for_all(first), NLM_F_EXCL).await)? == Outcome::Changed {
            outcome = Outcome::Changed;
        }
        for batch in others.chunks(BATCH) {
            let add = |host| self.new_neighbour(for_all(host), NLM_F_APPEND);
            for answer in join_all(batch.iter().map(add)).await {
                made(answer)?;
            }
        }
        Ok(outcome)
    }

    /// Forgets it.
    pub async fn delete_forwarding(
        &self,
        index: u32,
        known: &[(Mac, Ipv4Addr)],
        all: &[Ipv4Addr],
    ) -> Result<Outcome> {
        let entries = known
            .iter()
            .flat_map(|(mac, host)| both(index, *mac, *host))
            .chain(all.iter().map(|host| behind(index, Mac([0; 6]), *host)));
        let entries: Vec<_> = entries.collect();
        let mut outcome = Outcome::AlreadySo;
        for batch in entries.chunks(BATCH) {
            let delete = |entry: &NeighbourMessage| {
                in_time(self.handle.neighbours().del(entry.clone()).execute())
            };
            for answer in join_all(batch.iter().map(delete)).await {
                if gone(answer)? == Outcome::Changed {
                    outcome = Outcome::Changed;
                }
            }
        }
        Ok(outcome)
    }

    /// rtnetlink itself cannot append.
    async fn new_neighbour(&self, entry: NeighbourMessage, how: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(entry));
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | how;
        let mut handle = self.handle.clone();
        in_time(async move {
            let mut answers = handle.request(message)?;
            while let Some(answer) = answers.next().await {
                if let NetlinkPayload::Error(error) = answer.payload {
                    if error.code.is_some() {
                        return Err(rtnetlink::Error::NetlinkError(error));
                    }
                }
            }
            Ok(())
        })
        .await
    }
}

/// A MAC's two entries: the bridge sends it to this port, the device to this host.
fn both(index: u32, mac: Mac, host: Ipv4Addr) -> [NeighbourMessage; 2] {
    let mut port = entry(index, mac, NeighbourFlags::Controller);
    port.header.state = STATIC;
    [port, behind(index, mac, host)]
}

/// The device sends what is for `mac` (of all zeros: for all) to this host.
fn behind(index: u32, mac: Mac, host: Ipv4Addr) -> NeighbourMessage {
    let mut entry = entry(index, mac, NeighbourFlags::Own);
    entry.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(host)));
    entry
}

fn entry(index: u32, Mac(mac): Mac, table: NeighbourFlags) -> NeighbourMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Bridge;
    entry.header.ifindex = index;
    entry.header.state = STATIC;
    entry.header.flags = table;
    entry.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    entry
}
