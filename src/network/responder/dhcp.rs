//! DHCP for guests whose addresses are known beforehand (RFC 2131, static allocation).
//!
//! A guest is its MAC, which its tap does not let it change. Nothing is remembered
//! between packets: every answer follows from the table and the packet, so a flood
//! exhausts no pool and a restart loses no lease.
//!
//! Options are read through `dhcproto`'s borrowed view and only where one is used here;
//! its eager decoder asserts on lengths that a guest may choose.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};

use dhcproto::v4::{self, DhcpOption, HType, MessageType, Opcode, OptionCode, borrowed};
use dhcproto::{Encodable, Encoder};
use hickory_proto::rr::Name;
use tokio::net::UdpSocket;

use super::{Guest, Spec};
use crate::error::{Context, Error, Result};
use crate::model::address::Mac;

/// A day: longer than most clusters live, and short enough that a guest resumed from a
/// snapshot asks again.
const LEASE: u32 = 24 * 3600;
const CLIENT_PORT: u16 = 68;
/// BOOTP's minimum, which some clients still insist on (RFC 1542, 2.1).
const MIN_REPLY: usize = 300;
/// What every client takes: 576 bytes less the headers of IP and UDP (RFC 2131, 2).
const MAX_REPLY: usize = 576 - 28;
/// The headers of IP and UDP, which a client's maximum message size includes.
const HEADERS: usize = 28;

/// A packet for a guest's port 68.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The guest's address, or broadcast while it cannot have one: sending to an address
    /// that answers no ARP yet would need a raw socket, and every client takes a broadcast.
    pub to: Ipv4Addr,
    pub bytes: Vec<u8>,
}

/// Why a packet gets no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ignored {
    /// Not a DHCP request of an Ethernet client.
    Malformed,
    /// It came through a relay; our guests are on our own segment.
    Relayed,
    /// Its MAC is no guest's.
    Unknown,
    /// The client took another server's offer.
    ForAnother,
    /// RELEASE and DECLINE: an address belongs to its guest whatever it says.
    NothingToSay,
}

/// What is told to guests, and which guests there are.
#[derive(Debug)]
pub struct Server {
    guests: HashMap<Mac, Guest>,
    gateway: Ipv4Addr,
    /// In the order in which they are left out of a reply that grows too long: last first.
    common: Vec<DhcpOption>,
}

/// What of a request decides the answer.
struct Request {
    kind: MessageType,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    /// Option codes asked for; absent, everything is wanted.
    wanted: Option<Vec<u8>>,
    client_id: Option<Vec<u8>>,
    max_reply: usize,
    rapid_commit: bool,
}

impl Server {
    /// # Errors
    ///
    /// A domain to search that is no domain name.
    pub fn new(spec: &Spec) -> Result<Self> {
        let guests = spec.guests.iter().map(|guest| (guest.mac, guest.clone())).collect();
        let mut common = vec![
            DhcpOption::SubnetMask(spec.subnet.netmask()),
            DhcpOption::Router(vec![spec.gateway]),
            DhcpOption::DomainNameServer(vec![spec.dns_server.unwrap_or(spec.gateway)]),
            DhcpOption::InterfaceMtu(spec.mtu),
            DhcpOption::BroadcastAddr(spec.subnet.broadcast()),
            DhcpOption::DomainName(spec.domain.clone()),
        ];
        common.extend(spec.ntp_server.map(|server| DhcpOption::NtpServers(vec![server])));
        let searched = match spec.dns_search.as_slice() {
            [] => std::slice::from_ref(&spec.domain),
            given => given,
        };
        let names: Result<Vec<Name>> = searched.iter().map(|name| search_domain(name)).collect();
        common.push(DhcpOption::DomainSearch(names?));
        Ok(Self { guests, gateway: spec.gateway, common })
    }

    /// Answers one packet.
    ///
    /// # Errors
    ///
    /// The reason why it gets no answer.
    pub fn answer(&self, packet: &[u8]) -> Result<Reply, Ignored> {
        let message = borrowed::Message::new(packet).map_err(|_| Ignored::Malformed)?;
        let is_ethernet = message.htype() == HType::Eth && message.hlen() == 6;
        if message.opcode() != Opcode::BootRequest || !is_ethernet {
            return Err(Ignored::Malformed);
        }
        if !message.giaddr().is_unspecified() {
            return Err(Ignored::Relayed);
        }
        let mac = message.chaddr().try_into().map_err(|_| Ignored::Malformed)?;
        let guest = self.guests.get(&Mac(mac)).ok_or(Ignored::Unknown)?;
        let request = Request::read(&message).ok_or(Ignored::Malformed)?;
        let kind = self.decide(&request, message.ciaddr(), guest)?;
        Ok(self.reply(kind, &message, &request, guest))
    }

    /// The kind of answer (RFC 2131, 4.3; RFC 4039 for the rapid commit).
    fn decide(
        &self,
        request: &Request,
        ciaddr: Ipv4Addr,
        guest: &Guest,
    ) -> Result<MessageType, Ignored> {
        match request.kind {
            MessageType::Discover if request.rapid_commit => Ok(MessageType::Ack),
            MessageType::Discover => Ok(MessageType::Offer),
            MessageType::Request => {
                if request.server.is_some_and(|server| server != self.gateway) {
                    return Err(Ignored::ForAnother);
                }
                // Selecting or rebooting names it in an option, renewing in the header.
                let address = request.requested.unwrap_or(ciaddr);
                let is_its_own = address == guest.address
                    && (ciaddr.is_unspecified() || ciaddr == guest.address);
                Ok(if is_its_own { MessageType::Ack } else { MessageType::Nak })
            }
            MessageType::Inform if ciaddr == guest.address => Ok(MessageType::Ack),
            MessageType::Release | MessageType::Decline | MessageType::Inform => {
                Err(Ignored::NothingToSay)
            }
            _ => Err(Ignored::Malformed),
        }
    }

    fn reply(
        &self,
        kind: MessageType,
        message: &borrowed::Message<'_>,
        request: &Request,
        guest: &Guest,
    ) -> Reply {
        let is_nak = kind == MessageType::Nak;
        let is_inform = request.kind == MessageType::Inform;
        let none = Ipv4Addr::UNSPECIFIED;
        let yours = if is_nak || is_inform { none } else { guest.address };
        let ciaddr = if is_nak { none } else { message.ciaddr() };
        let mut reply =
            v4::Message::new_with_id(message.xid(), ciaddr, yours, none, none, &guest.mac.0);
        reply.set_opcode(Opcode::BootReply).set_flags(message.flags());
        let options = reply.opts_mut();
        options.insert(DhcpOption::MessageType(kind));
        options.insert(DhcpOption::ServerIdentifier(self.gateway));
        if let Some(id) = &request.client_id {
            // RFC 6842: as it came, also in a refusal.
            options.insert(DhcpOption::ClientIdentifier(id.clone()));
        }
        if !is_nak && !is_inform {
            options.insert(DhcpOption::AddressLeaseTime(LEASE));
            options.insert(DhcpOption::Renewal(LEASE / 2));
            options.insert(DhcpOption::Rebinding(LEASE / 8 * 7));
        }
        if request.kind == MessageType::Discover && kind == MessageType::Ack {
            options.insert(DhcpOption::RapidCommit);
        }
        if !is_nak {
            let hostname = DhcpOption::Hostname(guest.name.clone());
            let told = std::iter::once(&hostname).chain(&self.common);
            for option in told.filter(|option| request.wants(option)) {
                options.insert(option.clone());
            }
        }
        // A client without an address, or with one that it must forget, hears broadcasts.
        let has_address = ciaddr == guest.address && request.kind != MessageType::Discover;
        let to = if has_address { ciaddr } else { Ipv4Addr::BROADCAST };
        Reply { to, bytes: encode(reply, &self.common, request.max_reply) }
    }
}

impl Request {
    /// Reads the options that matter; `None` where one that decides is malformed.
    fn read(message: &borrowed::Message<'_>) -> Option<Self> {
        let mut kind = None;
        let mut request = Self {
            kind: MessageType::Discover,
            requested: None,
            server: None,
            wanted: None,
            client_id: None,
            max_reply: MAX_REPLY,
            rapid_commit: false,
        };
        for option in message.opts() {
            let data = option.data();
            match option.code() {
                OptionCode::MessageType => kind = Some(MessageType::from(*data.first()?)),
                OptionCode::RequestedIpAddress => request.requested = Some(address(data)?),
                OptionCode::ServerIdentifier => request.server = Some(address(data)?),
                OptionCode::ParameterRequestList => request.wanted = Some(data.to_vec()),
                // Longer ones would need RFC 3396 in the reply; none exist.
                OptionCode::ClientIdentifier if data.len() <= 255 => {
                    request.client_id = Some(data.to_vec());
                }
                OptionCode::MaxMessageSize => {
                    let size = u16::from_be_bytes(data.try_into().ok()?);
                    // Never beyond an Ethernet frame, whatever it claims.
                    request.max_reply = usize::from(size.clamp(576, 1500)) - HEADERS;
                }
                OptionCode::RapidCommit => request.rapid_commit = true,
                _ => {}
            }
        }
        request.kind = kind?;
        Some(request)
    }

    fn wants(&self, option: &DhcpOption) -> bool {
        let code = OptionCode::from(option);
        let wanted = |list: &Vec<u8>| list.contains(&code.into());
        // Without a mask a client would guess one from the address' class.
        code == OptionCode::SubnetMask || self.wanted.as_ref().is_none_or(wanted)
    }
}

fn address(data: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from)
}

fn search_domain(name: &str) -> Result<Name> {
    Name::from_ascii(name).while_doing(|| format!("telling guests to search the domain `{name}`"))
}

/// The packet, without the last of the `optional` options as long as it is too big.
fn encode(mut reply: v4::Message, optional: &[DhcpOption], max: usize) -> Vec<u8> {
    let mut given_up = optional.iter().rev();
    loop {
        let mut bytes = Vec::with_capacity(MAX_REPLY);
        let encoded = reply.encode(&mut Encoder::new(&mut bytes));
        if encoded.is_ok() && bytes.len() <= max {
            bytes.resize(bytes.len().max(MIN_REPLY), 0);
            return bytes;
        }
        match given_up.next() {
            Some(option) => reply.opts_mut().remove(option.into()),
            // A client identifier of 255 bytes and the rest: 240 + 257 + 30 < 548.
            None => return bytes,
        };
    }
}

/// Answers guests for ever; returns what broke the socket.
pub async fn serve(server: Server, socket: UdpSocket) -> Error {
    let mut packet = [0; 1500];
    let mut ignored: HashMap<Ignored, u64> = HashMap::new();
    loop {
        let received = match socket.recv_from(&mut packet).await {
            Ok((length, _)) => &packet[..length],
            Err(error) => return Error::system("receiving DHCP packets").because(error),
        };
        match server.answer(received) {
            // A full queue or a route that is gone: the client asks again.
            Ok(reply) => {
                drop(socket.send_to(&reply.bytes, SocketAddrV4::new(reply.to, CLIENT_PORT)).await)
            }
            Err(reason) => count(&mut ignored, reason),
        }
    }
}

/// Counts a packet without an answer, and says so ever more rarely.
fn count(ignored: &mut HashMap<Ignored, u64>, reason: Ignored) {
    let count = ignored.entry(reason).or_default();
    *count += 1;
    if count.is_power_of_two() {
        tracing::warn!("DHCP packets without an answer, {reason:?}: {count}");
    }
}
