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
pub(super) const LEASE: u32 = 24 * 3600;
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
            let is_told = |option: &&DhcpOption| {
                guest.default_route || !matches!(option, DhcpOption::Router(_))
            };
            let told = told.filter(is_told);
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
pub(super) fn count(ignored: &mut HashMap<Ignored, u64>, reason: Ignored) {
    let count = ignored.entry(reason).or_default();
    *count += 1;
    if count.is_power_of_two() {
        tracing::warn!("DHCP packets without an answer, {reason:?}: {count}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::responder::tests::spec;
    use dhcproto::{Decodable, Decoder};
    use proptest::prelude::*;

    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);
    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 200, 255, 254);

    fn server() -> Server {
        Server::new(&spec()).unwrap()
    }

    #[test]
    fn only_who_leaves_by_this_network_is_told_a_gateway() {
        let mut spec = spec();
        for default_route in [true, false] {
            spec.guests[0].default_route = default_route;
            let server = Server::new(&spec).unwrap();
            let reply = server.answer(&bytes(&message(MessageType::Discover, &[]))).unwrap();
            let reply = v4::Message::decode(&mut Decoder::new(&reply.bytes)).unwrap();
            assert_eq!(reply.opts().get(OptionCode::Router).is_some(), default_route);
            assert!(reply.opts().get(OptionCode::DomainNameServer).is_some());
        }
    }

    fn message(kind: MessageType, options: &[DhcpOption]) -> v4::Message {
        let none = Ipv4Addr::UNSPECIFIED;
        let mac = [0x52, 0x54, 0, 0, 0, 0];
        let mut message = v4::Message::new_with_id(7, none, none, none, none, &mac);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        for option in options {
            message.opts_mut().insert(option.clone());
        }
        message
    }

    fn bytes(message: &v4::Message) -> Vec<u8> {
        let mut bytes = Vec::new();
        message.encode(&mut Encoder::new(&mut bytes)).unwrap();
        bytes
    }

    fn answer(message: &v4::Message) -> Result<(Ipv4Addr, v4::Message), Ignored> {
        let reply = server().answer(&bytes(message))?;
        Ok((reply.to, v4::Message::decode(&mut Decoder::new(&reply.bytes)).unwrap()))
    }

    fn kind_of(message: &v4::Message) -> MessageType {
        answer(message).unwrap().1.opts().msg_type().unwrap()
    }

    #[test]
    fn a_guest_is_offered_its_address_with_everything_it_needs() {
        let (to, offer) = answer(&message(MessageType::Discover, &[])).unwrap();
        assert_eq!(to, Ipv4Addr::BROADCAST);
        assert_eq!((offer.yiaddr(), offer.xid()), (GUEST, 7));
        let options: Vec<DhcpOption> = offer.opts().iter().map(|(_, o)| o.clone()).collect();
        let search = Name::from_ascii("pavo.local.").unwrap();
        assert_eq!(
            options,
            [
                DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 0, 0)),
                DhcpOption::Router(vec![GATEWAY]),
                DhcpOption::DomainNameServer(vec![GATEWAY]),
                DhcpOption::Hostname("vm0".into()),
                DhcpOption::DomainName("pavo.local".into()),
                DhcpOption::InterfaceMtu(1450),
                DhcpOption::BroadcastAddr(Ipv4Addr::new(10, 200, 255, 255)),
                DhcpOption::AddressLeaseTime(86400),
                DhcpOption::MessageType(MessageType::Offer),
                DhcpOption::ServerIdentifier(GATEWAY),
                DhcpOption::Renewal(43200),
                DhcpOption::Rebinding(75600),
                DhcpOption::DomainSearch(vec![search]),
            ]
        );
    }

    #[test]
    fn only_what_is_asked_for_comes_with_the_essentials() {
        let list =
            DhcpOption::ParameterRequestList(vec![OptionCode::Router, OptionCode::NtpServers]);
        let (_, offer) = answer(&message(MessageType::Discover, &[list])).unwrap();
        let codes: Vec<u8> = offer.opts().iter().map(|(code, _)| (*code).into()).collect();
        assert_eq!(codes, [1, 3, 51, 53, 54, 58, 59], "no time server is configured");
    }

    #[test]
    fn another_name_or_time_server_replaces_or_joins_ours() {
        let (dns, ntp) = (Ipv4Addr::new(192, 0, 2, 53), Ipv4Addr::new(192, 0, 2, 123));
        let spec = Spec { dns_server: Some(dns), ntp_server: Some(ntp), ..spec() };
        let reply =
            Server::new(&spec).unwrap().answer(&bytes(&message(MessageType::Discover, &[])));
        let reply = v4::Message::decode(&mut Decoder::new(&reply.unwrap().bytes)).unwrap();
        let option = |code| reply.opts().get(code).cloned().unwrap();
        assert_eq!(option(OptionCode::DomainNameServer), DhcpOption::DomainNameServer(vec![dns]));
        assert_eq!(option(OptionCode::NtpServers), DhcpOption::NtpServers(vec![ntp]));
    }

    #[test]
    fn the_search_list_is_encoded_as_rfc_3397_says() {
        let dns_search = vec!["eng.apple.com".to_owned(), "marketing.apple.com".to_owned()];
        let server = Server::new(&Spec { dns_search, ..spec() }).unwrap();
        let reply = server.answer(&bytes(&message(MessageType::Discover, &[]))).unwrap();
        let expected = b"\x77\x1b\x03eng\x05apple\x03com\x00\x09marketing\xc0\x04";
        assert!(reply.bytes.windows(expected.len()).any(|part| part == expected));
    }

    #[test]
    fn its_own_address_is_confirmed_and_another_refused() {
        use DhcpOption::{RequestedIpAddress, ServerIdentifier};
        let ours = ServerIdentifier(GATEWAY);
        for (options, expected) in [
            (vec![RequestedIpAddress(GUEST), ours.clone()], MessageType::Ack),
            (vec![RequestedIpAddress(GUEST)], MessageType::Ack),
            (vec![RequestedIpAddress(OTHER), ours.clone()], MessageType::Nak),
            (vec![RequestedIpAddress(OTHER)], MessageType::Nak),
            (vec![ours], MessageType::Nak),
        ] {
            assert_eq!(kind_of(&message(MessageType::Request, &options)), expected, "{options:?}");
        }
        let elsewhere = ServerIdentifier(OTHER);
        let request = message(MessageType::Request, &[RequestedIpAddress(GUEST), elsewhere]);
        assert_eq!(answer(&request).unwrap_err(), Ignored::ForAnother);
    }

    #[test]
    fn a_renewal_is_answered_to_its_address_and_a_refusal_to_everybody() {
        let mut renewal = message(MessageType::Request, &[]);
        renewal.set_ciaddr(GUEST);
        let (to, ack) = answer(&renewal).unwrap();
        assert_eq!((to, ack.opts().msg_type()), (GUEST, Some(MessageType::Ack)));
        renewal.set_ciaddr(OTHER);
        let (to, nak) = answer(&renewal).unwrap();
        assert_eq!((to, nak.opts().msg_type()), (Ipv4Addr::BROADCAST, Some(MessageType::Nak)));
        assert_eq!((nak.ciaddr(), nak.yiaddr()), (Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED));
        assert!(!nak.opts().contains(OptionCode::Router));
    }

    #[test]
    fn who_only_asks_for_settings_gets_no_lease() {
        let mut inform = message(MessageType::Inform, &[]);
        inform.set_ciaddr(GUEST);
        let (to, ack) = answer(&inform).unwrap();
        assert_eq!((to, ack.yiaddr()), (GUEST, Ipv4Addr::UNSPECIFIED));
        assert!(!ack.opts().contains(OptionCode::AddressLeaseTime));
        assert!(ack.opts().contains(OptionCode::DomainNameServer));
    }

    #[test]
    fn one_round_trip_only_where_it_was_asked_for() {
        let (_, ack) = answer(&message(MessageType::Discover, &[DhcpOption::RapidCommit])).unwrap();
        assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
        assert!(ack.opts().contains(OptionCode::RapidCommit));
    }

    #[test]
    fn what_is_not_for_us_is_passed_over_with_a_reason() {
        let discover = || message(MessageType::Discover, &[]);
        for kind in [MessageType::Release, MessageType::Decline] {
            assert_eq!(answer(&message(kind, &[])).unwrap_err(), Ignored::NothingToSay);
        }
        let mut relayed = discover();
        relayed.set_giaddr(OTHER);
        assert_eq!(answer(&relayed).unwrap_err(), Ignored::Relayed);
        let mut stranger = discover();
        stranger.set_chaddr(&[2, 0, 0, 0, 0, 1]);
        assert_eq!(answer(&stranger).unwrap_err(), Ignored::Unknown);
        let mut of_another_host = stranger.clone();
        of_another_host.set_chaddr(&[0x52, 0x54, 0, 0, 0, 7]);
        assert_eq!(answer(&of_another_host).unwrap_err(), Ignored::Unknown);
        let mut reply = discover();
        reply.set_opcode(Opcode::BootReply);
        assert_eq!(answer(&reply).unwrap_err(), Ignored::Malformed);
        let no_kind = bytes(&v4::Message::new_with_id(
            7,
            [0; 4].into(),
            [0; 4].into(),
            [0; 4].into(),
            [0; 4].into(),
            &[0x52, 0x54, 0, 0, 0, 0],
        ));
        assert_eq!(server().answer(&no_kind).unwrap_err(), Ignored::Malformed);
    }

    #[test]
    fn a_reply_is_never_larger_than_its_client_takes() {
        let dns_search = (0..20).map(|n| format!("a-rather-long-name-{n}.example.org")).collect();
        let server = Server::new(&Spec { dns_search, ..spec() }).unwrap();
        let id = DhcpOption::ClientIdentifier(vec![1; 255]);
        let small = message(MessageType::Discover, std::slice::from_ref(&id));
        let reply = server.answer(&bytes(&small)).unwrap().bytes;
        assert!(reply.len() <= 548, "{}", reply.len());
        let large = message(MessageType::Discover, &[id, DhcpOption::MaxMessageSize(u16::MAX)]);
        let reply = server.answer(&bytes(&large)).unwrap().bytes;
        assert!((549..=1472).contains(&reply.len()), "{}", reply.len());
        let reply = v4::Message::decode(&mut Decoder::new(&reply)).unwrap();
        assert!(reply.opts().contains(OptionCode::ClientIdentifier));
        assert!(reply.opts().contains(OptionCode::Router));
    }

    proptest! {
        #[test]
        fn no_packet_makes_it_panic(packet in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = server().answer(&packet);
        }

        /// A guest's well-formed header, and options of its malice.
        #[test]
        fn no_options_make_it_panic_or_give_another_address(
            kind in 0..20_u8,
            ciaddr in any::<u32>(),
            options in proptest::collection::vec(
                (
                    prop_oneof![Just(50), Just(54), Just(55), Just(57), Just(61), Just(80), any::<u8>()],
                    proptest::collection::vec(any::<u8>(), 0..80),
                ),
                0..20,
            ),
            cut in 0..2000_usize,
        ) {
            let mut header = message(MessageType::Discover, &[]);
            header.set_ciaddr(ciaddr);
            let mut packet = bytes(&header);
            packet.truncate(240);
            packet.extend([53, 1, kind]);
            for (code, data) in options {
                packet.extend([code, data.len() as u8]);
                packet.extend(data);
            }
            packet.truncate(240 + cut);
            if let Ok(reply) = server().answer(&packet) {
                prop_assert!((MIN_REPLY..=1472).contains(&reply.bytes.len()));
                let reply = v4::Message::decode(&mut Decoder::new(&reply.bytes)).unwrap();
                prop_assert!([GUEST, Ipv4Addr::UNSPECIFIED].contains(&reply.yiaddr()));
            }
        }
    }
}
