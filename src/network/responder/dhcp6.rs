//! DHCPv6 for guests whose addresses are known beforehand (RFC 8415).
//!
//! As with [DHCP](super::dhcp), nothing is remembered between packets. But a client's
//! identifier says nothing of its interface, and its link-local address may be made up. So
//! the [switch](super::super::switch) writes who asks into the packet, as its source port
//! ([`PORTS`]), which no guest has a say in.
//!
//! Each guest gets one address, for the first association (IA_NA) that it asks for. Names and
//! their server it is told by DHCP, since there is no network without IPv4.

use std::collections::HashMap;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::ops::RangeInclusive;

use tokio::net::UdpSocket;

use super::Spec;
use super::dhcp::{Ignored, LEASE, count};
use crate::error::Error;
use crate::model::address::Mac;

/// Where clients and servers listen.
pub const CLIENT: u16 = 546;
pub const SERVER: u16 = 547;
/// The ports that stand for guests: the first for vm0.
pub const PORTS: RangeInclusive<u16> = 20_000..=u16::MAX;

/// More associations than a client has; what it asks in addition gets no answer.
const MAX_ASSOCIATIONS: usize = 4;
/// More addresses of one association than a client had before.
const MAX_ADDRESSES: usize = 4;
/// The longest identifier (RFC 8415, 11.1).
const MAX_IDENTIFIER: usize = 130;

/// What a guest's packets come from.
pub fn port_of(rank: u32) -> Option<u16> {
    let rank = u16::try_from(rank).ok()?;
    PORTS.start().checked_add(rank)
}

fn rank_of(port: u16) -> Option<u32> {
    port.checked_sub(*PORTS.start()).map(u32::from)
}

mod kind {
    pub const SOLICIT: u8 = 1;
    pub const ADVERTISE: u8 = 2;
    pub const REQUEST: u8 = 3;
    pub const CONFIRM: u8 = 4;
    pub const RENEW: u8 = 5;
    pub const REBIND: u8 = 6;
    pub const REPLY: u8 = 7;
    pub const RELEASE: u8 = 8;
    pub const DECLINE: u8 = 9;
    pub const INFORMATION: u8 = 11;
    pub const RELAYED: [u8; 2] = [12, 13];
}

mod option {
    pub const CLIENT_ID: u16 = 1;
    pub const SERVER_ID: u16 = 2;
    pub const ASSOCIATION: u16 = 3;
    pub const ADDRESS: u16 = 5;
    pub const PREFERENCE: u16 = 7;
    pub const STATUS: u16 = 13;
    pub const RAPID_COMMIT: u16 = 14;
}

#[derive(Clone, Copy)]
enum Status {
    Success = 0,
    NoAddress = 2,
    NotOnLink = 4,
}

/// Which guests there are.
#[derive(Debug)]
pub struct Server {
    /// By rank.
    guests: HashMap<u32, Ipv6Addr>,
    identifier: Vec<u8>,
}

/// What of a request decides the answer.
#[derive(Default)]
struct Request {
    client: Option<Vec<u8>>,
    server: Option<Vec<u8>>,
    associations: Vec<Association>,
    rapid_commit: bool,
}

/// An IA_NA.
struct Association {
    id: [u8; 4],
    addresses: Vec<Ipv6Addr>,
}

impl Server {
    /// `None` where the network has no IPv6.
    pub fn new(spec: &Spec) -> Option<Self> {
        let Mac(mac) = spec.ipv6?.gateway_mac;
        let guests = spec.guests.iter().filter_map(|guest| Some((guest.rank, guest.address6?)));
        // DUID-LL: of hardware type 1, Ethernet.
        let identifier = [&[0, 3, 0, 1][..], &mac].concat();
        Some(Self { guests: guests.collect(), identifier })
    }

    /// Answers one packet, which came from this port.
    ///
    /// # Errors
    ///
    /// The reason why it gets no answer.
    pub fn answer(&self, packet: &[u8], port: u16) -> Result<Vec<u8>, Ignored> {
        let guest = rank_of(port).and_then(|rank| self.guests.get(&rank));
        let own = *guest.ok_or(Ignored::Unknown)?;
        let (&kind, rest) = packet.split_first().ok_or(Ignored::Malformed)?;
        if kind::RELAYED.contains(&kind) {
            return Err(Ignored::Relayed);
        }
        let (id, options) = rest.split_first_chunk::<3>().ok_or(Ignored::Malformed)?;
        let request = Request::read(options).ok_or(Ignored::Malformed)?;
        self.check(kind, &request)?;
        let rapid = kind == kind::SOLICIT && request.rapid_commit;
        let answer = if kind == kind::SOLICIT && !rapid { kind::ADVERTISE } else { kind::REPLY };
        let mut reply = [&[answer][..], id].concat();
        put(&mut reply, option::SERVER_ID, &self.identifier);
        if let Some(client) = &request.client {
            put(&mut reply, option::CLIENT_ID, client);
        }
        match kind {
            kind::SOLICIT | kind::REQUEST | kind::RENEW | kind::REBIND => {
                if rapid {
                    put(&mut reply, option::RAPID_COMMIT, &[]);
                }
                // A client need not wait for better offers.
                put(&mut reply, option::PREFERENCE, &[255]);
                for (index, association) in request.associations.iter().enumerate() {
                    let own = Some(own).filter(|_| index == 0);
                    put(&mut reply, option::ASSOCIATION, &association.answer(own));
                }
            }
            kind::CONFIRM => {
                let mut asked = request.associations.iter().flat_map(|it| &it.addresses).peekable();
                asked.peek().ok_or(Ignored::NothingToSay)?;
                let right = asked.all(|address| *address == own);
                put_status(&mut reply, if right { Status::Success } else { Status::NotOnLink });
            }
            kind::RELEASE | kind::DECLINE => put_status(&mut reply, Status::Success),
            // Nothing but that there is a server.
            _ => {}
        }
        Ok(reply)
    }

    /// Whether it has the identifiers that it must have (RFC 8415, 16).
    fn check(&self, kind: u8, request: &Request) -> Result<(), Ignored> {
        let for_us = request.server.as_ref() == Some(&self.identifier);
        match kind {
            kind::SOLICIT | kind::CONFIRM | kind::REBIND => match (&request.client, for_us) {
                (Some(_), _) if request.server.is_none() => Ok(()),
                _ => Err(Ignored::Malformed),
            },
            kind::REQUEST | kind::RENEW | kind::RELEASE | kind::DECLINE => {
                match (&request.client, &request.server) {
                    (Some(_), Some(_)) if for_us => Ok(()),
                    (Some(_), Some(_)) => Err(Ignored::ForAnother),
                    _ => Err(Ignored::Malformed),
                }
            }
            kind::INFORMATION if request.server.is_some() && !for_us => Err(Ignored::ForAnother),
            // It must not ask for addresses.
            kind::INFORMATION if request.associations.is_empty() => Ok(()),
            _ => Err(Ignored::Malformed),
        }
    }
}

impl Request {
    /// Reads the options that matter; `None` where one is malformed, or there twice.
    fn read(options: &[u8]) -> Option<Self> {
        let mut request = Self::default();
        for option in Options(options) {
            let (code, data) = option?;
            match code {
                option::CLIENT_ID | option::SERVER_ID => {
                    let identifier = Some(data.to_vec());
                    let fits = (3..=MAX_IDENTIFIER).contains(&data.len());
                    let place = match code {
                        option::CLIENT_ID => &mut request.client,
                        _ => &mut request.server,
                    };
                    if !fits || place.is_some() {
                        return None;
                    }
                    *place = identifier;
                }
                option::ASSOCIATION if request.associations.len() < MAX_ASSOCIATIONS => {
                    request.associations.push(Association::read(data)?);
                }
                option::RAPID_COMMIT => request.rapid_commit = true,
                _ => {}
            }
        }
        Some(request)
    }
}

impl Association {
    fn read(data: &[u8]) -> Option<Self> {
        let (id, rest) = data.split_first_chunk::<4>()?;
        // The times that it would like to have.
        let (_, options) = rest.split_first_chunk::<8>()?;
        let mut addresses = Vec::new();
        for option in Options(options) {
            let (code, data) = option?;
            if code == option::ADDRESS && addresses.len() < MAX_ADDRESSES {
                let (address, lifetimes) = data.split_first_chunk::<16>()?;
                lifetimes.first_chunk::<8>()?;
                addresses.push(Ipv6Addr::from(*address));
            }
        }
        Some(Self { id: *id, addresses })
    }

    /// The same with what it may have, and without what it may not.
    fn answer(&self, own: Option<Ipv6Addr>) -> Vec<u8> {
        let lease = if own.is_some() { LEASE } else { 0 };
        let mut answer = self.id.to_vec();
        answer.extend((lease / 2).to_be_bytes());
        answer.extend((lease / 8 * 7).to_be_bytes());
        let mut address = |address: Ipv6Addr, lease: u32| {
            let lease = lease.to_be_bytes();
            put(&mut answer, option::ADDRESS, &[&address.octets()[..], &lease, &lease].concat());
        };
        if let Some(own) = own {
            address(own, lease);
        }
        for other in self.addresses.iter().filter(|other| Some(**other) != own) {
            address(*other, 0);
        }
        if own.is_none() {
            put_status(&mut answer, Status::NoAddress);
        }
        answer
    }
}

/// Options side by side; `None` where one is cut short, and no more after it.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = Option<(u16, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let option = self.0.split_first_chunk::<4>().and_then(|(head, rest)| {
            let [a, b, c, d] = *head;
            let (data, rest) = rest.split_at_checked(u16::from_be_bytes([c, d]).into())?;
            self.0 = rest;
            Some((u16::from_be_bytes([a, b]), data))
        });
        if option.is_none() {
            self.0 = &[];
        }
        Some(option)
    }
}

/// Appends an option. Ours are short.
fn put(packet: &mut Vec<u8>, code: u16, data: &[u8]) {
    packet.extend(code.to_be_bytes());
    packet.extend((data.len() as u16).to_be_bytes());
    packet.extend(data);
}

fn put_status(packet: &mut Vec<u8>, status: Status) {
    put(packet, option::STATUS, &(status as u16).to_be_bytes());
}

/// Answers guests for ever; returns what broke the socket.
pub async fn serve(server: Server, socket: UdpSocket) -> Error {
    let mut packet = [0; 1500];
    let mut ignored: HashMap<Ignored, u64> = HashMap::new();
    loop {
        let (length, from) = match socket.recv_from(&mut packet).await {
            Ok((length, SocketAddr::V6(from))) => (length, from),
            Ok(_) => continue,
            Err(error) => return Error::system("receiving DHCPv6 packets").because(error),
        };
        match server.answer(&packet[..length], from.port()) {
            // A full queue, or nobody who has the address any more: the client asks again.
            Ok(reply) => {
                let to = SocketAddrV6::new(*from.ip(), CLIENT, 0, from.scope_id());
                drop(socket.send_to(&reply, to).await);
            }
            Err(reason) => count(&mut ignored, reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::responder::tests::spec;
    use dhcproto::v6::{DhcpOption, IAAddr, IANA, Message, MessageType, OptionCode};
    use dhcproto::{Decodable, Decoder, Encodable, Encoder};
    use proptest::prelude::*;

    const VM0: u16 = 20_000;
    const OWN: &str = "fd12:3456:789a:1::1";

    fn server() -> Server {
        Server::new(&spec()).unwrap()
    }

    fn ours() -> DhcpOption {
        DhcpOption::ServerId(server().identifier)
    }

    fn message(kind: MessageType, options: &[DhcpOption]) -> Vec<u8> {
        let mut message = Message::new_with_id(kind, [1, 2, 3]);
        message.opts_mut().insert(DhcpOption::ClientId(vec![0, 2, 0, 0, 0xab, 0x11, 7]));
        options.iter().for_each(|option| message.opts_mut().insert(option.clone()));
        let mut bytes = Vec::new();
        message.encode(&mut Encoder::new(&mut bytes)).unwrap();
        bytes
    }

    fn association(id: u32, addresses: &[&str]) -> DhcpOption {
        let opts = addresses.iter().map(|addr| {
            let addr = addr.parse().unwrap();
            let opts = Default::default();
            DhcpOption::IAAddr(IAAddr { addr, preferred_life: 0, valid_life: 0, opts })
        });
        DhcpOption::IANA(IANA { id, t1: 0, t2: 0, opts: opts.collect() })
    }

    fn ask(packet: &[u8], port: u16) -> Result<Message, Ignored> {
        let reply = server().answer(packet, port)?;
        let reply = Message::decode(&mut Decoder::new(&reply)).unwrap();
        assert_eq!(reply.xid(), [1, 2, 3]);
        assert_eq!(reply.opts().get(OptionCode::ServerId), Some(&ours()));
        Ok(reply)
    }

    /// Addresses of the first association, with their lifetimes.
    fn given(reply: &Message) -> Vec<(String, u32)> {
        let Some(DhcpOption::IANA(association)) = reply.opts().get(OptionCode::IANA) else {
            panic!("{reply}");
        };
        let addresses = association.opts.iter().filter_map(|option| match option {
            DhcpOption::IAAddr(it) => Some((it.addr.to_string(), it.valid_life)),
            _ => None,
        });
        addresses.collect()
    }

    #[test]
    fn a_guest_gets_its_own_address_whoever_it_says_it_is() {
        let own = vec![(OWN.to_owned(), LEASE)];
        let solicit = message(MessageType::Solicit, &[association(9, &[])]);
        let reply = ask(&solicit, VM0).unwrap();
        assert_eq!((reply.msg_type(), given(&reply)), (MessageType::Advertise, own.clone()));
        let request = message(MessageType::Request, &[ours(), association(9, &[OWN])]);
        let reply = ask(&request, VM0).unwrap();
        assert_eq!((reply.msg_type(), given(&reply)), (MessageType::Reply, own.clone()));
        assert!(reply.opts().get(OptionCode::ClientId).is_some());
        // The same words of another.
        let reply = ask(&solicit, VM0 + 1).unwrap();
        assert_eq!(given(&reply), [("fd12:3456:789a:1::2".to_owned(), LEASE)]);
        for nobody in [VM0 + 7, VM0 + 9, 546, VM0 - 1, u16::MAX] {
            assert_eq!(ask(&solicit, nobody).unwrap_err(), Ignored::Unknown, "{nobody}");
        }
    }

    #[test]
    fn two_messages_are_enough_for_who_says_so() {
        let solicit = [association(9, &[]), DhcpOption::RapidCommit];
        let reply = ask(&message(MessageType::Solicit, &solicit), VM0).unwrap();
        assert_eq!(reply.msg_type(), MessageType::Reply);
        assert!(reply.opts().get(OptionCode::RapidCommit).is_some());
        assert_eq!(given(&reply).len(), 1);
    }

    #[test]
    fn what_is_not_its_own_a_guest_loses() {
        let other = "fd12:3456:789a:1::2";
        for (kind, server) in [(MessageType::Renew, Some(ours())), (MessageType::Rebind, None)] {
            let options: Vec<_> = server.into_iter().chain([association(1, &[other])]).collect();
            let reply = ask(&message(kind, &options), VM0).unwrap();
            assert_eq!(given(&reply), [(OWN.to_owned(), LEASE), (other.to_owned(), 0)]);
        }
        let status = |address| {
            let confirm = message(MessageType::Confirm, &[association(1, &[address])]);
            let reply = ask(&confirm, VM0).unwrap();
            let Some(DhcpOption::StatusCode(code)) = reply.opts().get(OptionCode::StatusCode)
            else {
                panic!("{reply}");
            };
            u16::from(code.status)
        };
        assert_eq!((status(OWN), status(other)), (0, 4));
    }

    #[test]
    fn a_second_association_stays_empty() {
        let asked = [association(1, &[]), association(2, &[])];
        let reply = server().answer(&message(MessageType::Solicit, &asked), VM0).unwrap();
        let reply = Message::decode(&mut Decoder::new(&reply)).unwrap();
        let all: Vec<_> = reply.opts().get_all(OptionCode::IANA).unwrap().iter().collect();
        assert_eq!(all.len(), 2);
        let [DhcpOption::IANA(a), DhcpOption::IANA(b)] = all[..] else { panic!("{reply}") };
        assert!(a.opts.get(OptionCode::IAAddr).is_some());
        assert!(b.opts.get(OptionCode::IAAddr).is_none());
        assert!(b.opts.get(OptionCode::StatusCode).is_some());
    }

    #[test]
    fn what_is_no_question_for_us_gets_no_answer() {
        let stranger = DhcpOption::ServerId(vec![0, 3, 0, 1, 1, 1, 1, 1, 1, 1]);
        let association = || association(1, &[OWN]);
        for (kind, options, reason) in [
            (MessageType::Request, vec![stranger, association()], Ignored::ForAnother),
            (MessageType::Request, vec![association()], Ignored::Malformed),
            (MessageType::Solicit, vec![ours(), association()], Ignored::Malformed),
            (MessageType::InformationRequest, vec![association()], Ignored::Malformed),
            (MessageType::Confirm, vec![], Ignored::NothingToSay),
            (MessageType::Advertise, vec![], Ignored::Malformed),
            (MessageType::Reply, vec![ours()], Ignored::Malformed),
            (MessageType::RelayForw, vec![], Ignored::Relayed),
            (MessageType::Unknown(200), vec![], Ignored::Malformed),
        ] {
            let packet = message(kind, &options);
            assert_eq!(ask(&packet, VM0).unwrap_err(), reason, "{kind:?}");
        }
        assert!(ask(&message(MessageType::InformationRequest, &[]), VM0).is_ok());
        assert!(ask(&message(MessageType::Release, &[ours(), association()]), VM0).is_ok());
    }

    #[test]
    fn a_packet_cut_short_is_malformed_wherever_that_is() {
        let packet = message(MessageType::Request, &[ours(), association(9, &[OWN])]);
        // But between two options: then it asks for nothing.
        let whole = packet.len() - 44;
        for length in (0..packet.len()).filter(|length| *length != whole) {
            let answer = server().answer(&packet[..length], VM0);
            assert_eq!(answer, Err(Ignored::Malformed), "{length}");
        }
        assert_eq!(server().answer(&packet[..whole], VM0).map(|reply| reply.len()), Ok(34));
        let twice = [&packet[..], &[0, 2, 0, 4, 0, 3, 0, 1]].concat();
        assert_eq!(server().answer(&twice, VM0), Err(Ignored::Malformed));
        let long = [&packet[..4], &[0, 1, 0, 131], &[7; 131]].concat();
        assert_eq!(server().answer(&long, VM0), Err(Ignored::Malformed));
    }

    #[test]
    fn ports_stand_for_ranks() {
        assert_eq!((port_of(0), port_of(9_999)), (Some(20_000), Some(29_999)));
        assert_eq!((port_of(45_535), port_of(45_536)), (Some(u16::MAX), None));
        assert_eq!(port_of(1 << 17), None);
        assert_eq!(rank_of(port_of(9_999).unwrap()), Some(9_999));
    }

    proptest! {
        #[test]
        fn answers_fit_into_a_packet_whatever_comes(
            kind in 0_u8..14,
            options in prop::collection::vec((0_u16..20, prop::collection::vec(any::<u8>(), 0..80)), 0..20),
        ) {
            let mut packet = vec![kind, 1, 2, 3];
            options.iter().for_each(|(code, data)| put(&mut packet, *code, data));
            if let Ok(reply) = server().answer(&packet, VM0) {
                prop_assert!(reply.len() <= 1232, "{}", reply.len());
                prop_assert!(Message::decode(&mut Decoder::new(&reply)).is_ok());
            }
        }
    }
}
