//! The names of one cluster network: answers to DNS queries, as bytes from bytes.
//!
//! | asked for | answer |
//! |---|---|
//! | `vmN`, `vmN.<domain>`, `gateway.<domain>` | A, and AAAA where there is IPv6; for other types no data |
//! | another name at or below the domain | no such name, with SOA |
//! | another single label | no such name; only what validating resolvers ask of top-level domains (DS, DNSKEY, NS, SOA) is forwarded |
//! | an address of the subnet or the IPv6 prefix, reversed | PTR, or no such name |
//! | anything else | [`Verdict::Forward`] |
//!
//! Names compare without case (RFC 4343), negative answers carry the SOA that makes
//! them cacheable (RFC 2308), and ANY gets one record set (RFC 8482).

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Edns, Header, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use super::Spec;
use crate::error::{Context, Error, Result};
use crate::model::prefix::Prefix64;

/// Seconds a guest may keep an answer. Names never change while a cluster runs.
const TTL: u32 = 300;
/// Seconds a guest may remember that a name does not exist.
const NEGATIVE_TTL: u32 = 60;
/// What we take over UDP: no fragments on any link (DNS flag day 2020).
const MAX_PAYLOAD: u16 = 1232;
/// More additional records than OPT, a signature and one to spare.
const MAX_ADDITIONAL: u16 = 3;
/// The label of the gateway's own name.
const GATEWAY: &str = "gateway";

/// What to do with a packet.
#[derive(Debug)]
pub enum Verdict {
    Reply(Vec<u8>),
    /// A well-formed query for a name that is not ours.
    Forward(Box<Message>),
    /// No query at all: answering could start a loop.
    Ignore,
}

/// The names that we answer for.
#[derive(Debug)]
pub struct Zone {
    domain: Name,
    /// The name of the server in SOA records, and of who answers for it.
    gateway: Name,
    hostmaster: Name,
    subnet: crate::model::address::Subnet,
    prefix6: Option<Prefix64>,
    /// Addresses by label, in lower case.
    hosts: HashMap<Vec<u8>, (Ipv4Addr, Option<Ipv6Addr>)>,
    /// Full names by address.
    names: HashMap<IpAddr, Name>,
    /// Who may ask.
    clients: HashSet<Ipv4Addr>,
}

/// An answer of ours.
struct Found {
    code: ResponseCode,
    data: Option<RData>,
    /// The owner of the SOA record of an answer without data.
    zone: Option<Name>,
}

impl Found {
    /// The name exists; it has `data` if that is of the type asked for.
    fn name(data: RData, asked: RecordType, zone: Name) -> Self {
        let fits = asked == data.record_type() || asked == RecordType::ANY;
        Self { code: ResponseCode::NoError, data: fits.then_some(data), zone: Some(zone) }
    }

    /// The name exists, without a record.
    fn empty(zone: Name) -> Self {
        Self { code: ResponseCode::NoError, data: None, zone: Some(zone) }
    }

    fn nothing(zone: Option<Name>) -> Self {
        Self { code: ResponseCode::NXDomain, data: None, zone }
    }
}

impl Zone {
    /// # Errors
    ///
    /// A domain or guest whose name DNS does not allow.
    pub fn new(spec: &Spec) -> Result<Self> {
        let doing = || format!("making `{}` the guests' domain", spec.domain);
        let mut domain = Name::from_ascii(&spec.domain).while_doing(doing)?.to_lowercase();
        domain.set_fqdn(true);
        if domain.is_root() {
            return Err(Error::config("the guests' domain is empty").help("set `domain-name`"));
        }
        let below = |label: &str| -> Result<Name> {
            let doing = || format!("naming a guest `{label}.{}`", spec.domain);
            let name = Name::from_ascii(label).while_doing(doing)?;
            if name.iter().count() != 1 {
                return Err(Error::config(format!("`{label}` is not a single label")));
            }
            name.append_domain(&domain).while_doing(doing)
        };
        let prefix6 = spec.ipv6.map(|ipv6| ipv6.prefix);
        let gateway = (spec.gateway, prefix6.map(|prefix| prefix.gateway()));
        let mut zone = Self {
            gateway: below(GATEWAY)?,
            hostmaster: below("hostmaster")?,
            subnet: spec.subnet,
            prefix6,
            hosts: HashMap::new(),
            names: HashMap::new(),
            clients: spec.guests.iter().map(|guest| guest.address).collect(),
            domain: domain.clone(),
        };
        zone.clients.insert(spec.gateway);
        let guests = spec.guests.iter().chain(&spec.others);
        let guests = guests.map(|guest| (guest.name.as_str(), (guest.address, guest.address6)));
        for (label, addresses) in guests.chain([(GATEWAY, gateway)]) {
            let name = below(label)?;
            zone.names.extend(addresses.1.map(|address| (address.into(), name.clone())));
            zone.names.insert(addresses.0.into(), name);
            zone.hosts.insert(label.to_ascii_lowercase().into(), addresses);
        }
        Ok(zone)
    }

    /// Whether this is the address of a guest on this host, or the gateway's own.
    pub fn knows(&self, address: Ipv4Addr) -> bool {
        self.clients.contains(&address)
    }

    /// Decides about one packet.
    pub fn answer(&self, packet: &[u8]) -> Verdict {
        let message = match parse(packet) {
            Ok(message) => message,
            Err(verdict) => return verdict,
        };
        let query = &message.queries()[0];
        let transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
        if message.extensions().as_ref().is_some_and(|edns| edns.version() != 0) {
            return Verdict::Reply(refusal(&message, ResponseCode::BADVERS));
        }
        if query.query_class() != DNSClass::IN || transfer {
            return Verdict::Reply(refusal(&message, ResponseCode::Refused));
        }
        match self.find(&query.name().to_lowercase(), query.query_type()) {
            Some(found) => Verdict::Reply(self.reply(&message, found)),
            None => Verdict::Forward(message.into()),
        }
    }

    /// Finds a name in lower case; `None` if it is not for us to say.
    fn find(&self, name: &Name, asked: RecordType) -> Option<Found> {
        let host = |label: &[u8]| {
            let (ipv4, ipv6) = *self.hosts.get(label)?;
            let ipv6 = ipv6.filter(|_| asked == RecordType::AAAA);
            Some(ipv6.map_or(RData::A(A(ipv4)), |ipv6| RData::AAAA(AAAA(ipv6))))
        };
        let mut labels = name.iter();
        let first = labels.next()?;
        if self.domain.zone_of(name) {
            let zone = self.domain.clone();
            return Some(if *name == self.domain {
                Found::name(RData::SOA(self.authority()), asked, zone)
            } else if let Some(host) = host(first).filter(|_| name.base_name() == self.domain) {
                Found::name(host, asked, zone)
            } else {
                Found::nothing(Some(zone))
            });
        }
        if labels.next().is_none() {
            use RecordType::{DNSKEY, DS, NS, SOA};
            return match host(first) {
                Some(host) => Some(Found::name(host, asked, name.clone())),
                None if matches!(asked, DNSKEY | DS | NS | SOA) => None,
                None => Some(Found::nothing(None)),
            };
        }
        self.find_reverse(name, asked)
    }

    /// Finds `d.c.b.a.in-addr.arpa` (RFC 1035, 3.5) inside the subnet.
    fn find_reverse(&self, name: &Name, asked: RecordType) -> Option<Found> {
        let mut labels = name.iter().rev();
        if labels.next()? != b"arpa" {
            return None;
        }
        match labels.next()? {
            b"in-addr" => {}
            b"ip6" => return self.find_reverse6(name, asked),
            _ => return None,
        }
        let mut octets = Vec::new();
        let mut labels = labels.peekable();
        while let Some(octet) = labels.next_if(|_| octets.len() < 4) {
            let Some(octet) = octet_of(octet) else { break };
            octets.push(octet);
        }
        let known = octets.len();
        octets.resize(4, 0);
        let address = Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?);
        if known * 8 < usize::from(self.subnet.bits()) || !self.subnet.contains(address) {
            return None;
        }
        // The smallest set of whole octets that lies inside the subnet, under `in-addr.arpa`.
        let zone = name.trim_to(2 + usize::from(self.subnet.bits()).div_ceil(8));
        let is_whole = labels.next().is_none() && name.iter().count() == 2 + known;
        Some(match self.names.get(&address.into()) {
            Some(owner) if is_whole && known == 4 => {
                Found::name(RData::PTR(PTR(owner.clone())), asked, zone)
            }
            _ if is_whole && known < 4 => Found::empty(zone),
            _ => Found::nothing(Some(zone)),
        })
    }

    /// Finds an address of 32 digits (RFC 3596, 2.5) inside the prefix.
    fn find_reverse6(&self, name: &Name, asked: RecordType) -> Option<Found> {
        const DIGITS: usize = 32;
        let prefix = self.prefix6?;
        let within = usize::from(Prefix64::BITS) / 4;
        let digits: Vec<u8> = name.iter().rev().skip(2).take(DIGITS).map_while(digit_of).collect();
        let number = (0..DIGITS).map(|index| digits.get(index).copied().unwrap_or_default());
        let address = Ipv6Addr::from(number.fold(0, |bits, digit| bits << 4 | u128::from(digit)));
        if digits.len() < within || !prefix.contains(address) {
            return None;
        }
        let zone = name.trim_to(2 + within);
        let is_whole = name.iter().count() == 2 + digits.len();
        Some(match self.names.get(&address.into()) {
            Some(owner) if is_whole && digits.len() == DIGITS => {
                Found::name(RData::PTR(PTR(owner.clone())), asked, zone)
            }
            _ if is_whole && digits.len() < DIGITS => Found::empty(zone),
            _ => Found::nothing(Some(zone)),
        })
    }

    fn reply(&self, message: &Message, found: Found) -> Vec<u8> {
        let mut reply = response(message, found.code);
        reply.set_authoritative(true);
        match (found.data, found.zone) {
            (Some(data), _) => {
                let owner = message.queries()[0].name().clone();
                reply.add_answer(Record::from_rdata(owner, TTL, data));
            }
            (None, Some(zone)) => {
                let authority = RData::SOA(self.authority());
                reply.add_name_server(Record::from_rdata(zone, NEGATIVE_TTL, authority));
            }
            (None, None) => {}
        }
        encode(&reply)
    }

    fn authority(&self) -> SOA {
        let (server, person) = (self.gateway.clone(), self.hostmaster.clone());
        SOA::new(server, person, 1, 3600, 600, 86400, NEGATIVE_TTL)
    }
}

/// A number without superfluous zeros, as in addresses.
fn octet_of(label: &[u8]) -> Option<u8> {
    let octet: u8 = std::str::from_utf8(label).ok()?.parse().ok()?;
    (octet.to_string().as_bytes() == label).then_some(octet)
}

/// One hexadecimal digit; the name is in lower case.
fn digit_of(label: &[u8]) -> Option<u8> {
    let [digit] = label else { return None };
    char::from(*digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// Reads a query, or says what else to do with the packet.
fn parse(packet: &[u8]) -> Result<Message, Verdict> {
    let header = Header::read(&mut BinDecoder::new(packet)).map_err(|_| Verdict::Ignore)?;
    if header.message_type() != MessageType::Query {
        return Err(Verdict::Ignore);
    }
    let refuse = |code| {
        let reply = Message::error_msg(header.id(), header.op_code(), code);
        Verdict::Reply(encode(&reply))
    };
    if header.op_code() != OpCode::Query {
        return Err(refuse(ResponseCode::NotImp));
    }
    // Before the parser reserves memory for as many records as the header claims.
    let is_plausible = header.query_count() == 1
        && header.answer_count() == 0
        && header.name_server_count() == 0
        && header.additional_count() <= MAX_ADDITIONAL;
    if !is_plausible {
        return Err(refuse(ResponseCode::FormErr));
    }
    Message::from_vec(packet).map_err(|_| refuse(ResponseCode::FormErr))
}

/// A response to a query, with its question and without an answer.
pub fn refusal(message: &Message, code: ResponseCode) -> Vec<u8> {
    encode(&response(message, code))
}

fn response(message: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::new();
    reply.set_header(Header::response_from_request(message.header()));
    reply.set_recursion_available(true).set_response_code(code);
    reply.add_queries(message.queries().to_vec());
    if message.extensions().is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_PAYLOAD).set_rcode_high(code.high());
        reply.set_edns(edns);
    }
    reply
}

/// Our own answers are small: two names of 255 bytes at most, and 100 bytes.
fn encode(message: &Message) -> Vec<u8> {
    message.to_vec().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::responder::tests::spec;
    use hickory_proto::op::Query;
    use proptest::prelude::*;

    fn zone() -> Zone {
        Zone::new(&spec()).unwrap()
    }

    fn query(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new();
        message.set_id(7).set_recursion_desired(true);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    /// The zone's own answer; `None` if it forwards.
    fn answer(query: &Message) -> Option<Message> {
        match zone().answer(&query.to_vec().unwrap()) {
            Verdict::Reply(reply) => Some(Message::from_vec(&reply).unwrap()),
            Verdict::Forward(_) => None,
            Verdict::Ignore => panic!("ignored"),
        }
    }

    fn ask(name: &str, kind: RecordType) -> (ResponseCode, Vec<String>, bool) {
        let reply = answer(&query(name, kind)).unwrap_or_else(|| panic!("{name} was forwarded"));
        assert!(reply.authoritative());
        assert_eq!(reply.id(), 7);
        let data = reply.answers().iter().map(|record| record.data().to_string()).collect();
        (reply.response_code(), data, !reply.name_servers().is_empty())
    }

    const NO_DATA: (ResponseCode, Vec<String>, bool) = (ResponseCode::NoError, Vec::new(), true);
    const NO_NAME: (ResponseCode, Vec<String>, bool) = (ResponseCode::NXDomain, Vec::new(), true);

    fn data(text: &str) -> (ResponseCode, Vec<String>, bool) {
        (ResponseCode::NoError, vec![text.to_owned()], false)
    }

    #[test]
    fn guests_and_gateway_have_short_and_full_names_in_any_case() {
        for name in ["vm1", "VM1.", "vm1.pavo.local.", "Vm1.PAVO.Local."] {
            assert_eq!(ask(name, RecordType::A), data("10.200.0.2"), "{name}");
        }
        assert_eq!(ask("gateway.pavo.local.", RecordType::A), data("10.200.255.254"));
        assert_eq!(ask("vm0.", RecordType::ANY), data("10.200.0.1"));
    }

    #[test]
    fn guests_of_other_hosts_have_names_but_do_not_ask_here() {
        assert_eq!(ask("vm7", RecordType::A), data("10.200.0.8"));
        assert_eq!(ask("8.0.200.10.in-addr.arpa.", RecordType::PTR), data("vm7.pavo.local."));
        let asks = |last| zone().knows([10, 200, 0, last].into());
        assert!(asks(1) && asks(2) && !asks(8) && !asks(9));
        assert!(zone().knows([10, 200, 255, 254].into()), "the gateway");
    }

    #[test]
    fn the_question_comes_back_as_it_was_written() {
        let reply = answer(&query("vM1.paVO.local.", RecordType::A)).unwrap();
        assert!(reply.queries()[0].name().eq_case(&Name::from_ascii("vM1.paVO.local.").unwrap()));
    }

    #[test]
    fn another_type_of_a_name_that_exists_is_no_data() {
        for name in ["vm0.", "vm0.pavo.local.", "gateway.pavo.local.", "pavo.local."] {
            assert_eq!(ask(name, RecordType::MX), NO_DATA, "{name}");
        }
        assert_eq!(ask("pavo.local.", RecordType::SOA).0, ResponseCode::NoError);
        assert_eq!(ask("pavo.local.", RecordType::SOA).1.len(), 1);
    }

    #[test]
    fn with_ipv6_names_have_two_addresses_and_both_are_found_back() {
        for (name, address) in [
            ("vm1.", "fd12:3456:789a:1::2"),
            ("VM7.pavo.local.", "fd12:3456:789a:1::8"),
            ("gateway.pavo.local.", "fd12:3456:789a:1::ffff:fffe"),
        ] {
            assert_eq!(ask(name, RecordType::AAAA), data(address), "{name}");
        }
        let reversed = |address: &str| {
            let address: Ipv6Addr = address.parse().unwrap();
            let digits = format!("{:032x}", u128::from(address));
            let labels: Vec<String> = digits.chars().rev().map(String::from).collect();
            labels.join(".") + ".IP6.arpa."
        };
        let ptr = |name: &str| ask(name, RecordType::PTR);
        let vm1 = reversed("fd12:3456:789a:1::2");
        assert_eq!(ptr(&vm1), data("vm1.pavo.local."));
        assert_eq!(ptr(&reversed("fd12:3456:789a:1::ffff:fffe")), data("gateway.pavo.local."));
        assert_eq!(ptr(&reversed("fd12:3456:789a:1::9")), NO_NAME);
        // Between the prefix and the whole there are names without data, below it nothing.
        assert_eq!(ptr(&vm1[2..]), NO_DATA);
        assert_eq!(ptr(&vm1[32..]), NO_DATA);
        assert_eq!(ptr(&format!("1.{vm1}")), NO_NAME);
        assert_eq!(ptr(&format!("ff.{}", &vm1[2..])), NO_NAME);
        // What is not ours is asked for outside.
        let forwarded = |name: &str| answer(&query(name, RecordType::PTR)).is_none();
        assert!(forwarded(&vm1[34..]) && forwarded(&reversed("fd12:3456:789a:2::2")));
    }

    #[test]
    fn without_ipv6_there_is_no_data_of_it() {
        let mut spec = Spec { ipv6: None, ..spec() };
        spec.guests.iter_mut().chain(&mut spec.others).for_each(|guest| guest.address6 = None);
        let zone = Zone::new(&spec).unwrap();
        let reply = |name, kind| match zone.answer(&query(name, kind).to_vec().unwrap()) {
            Verdict::Reply(reply) => Some(Message::from_vec(&reply).unwrap()),
            _ => None,
        };
        let none = reply("vm0.", RecordType::AAAA).unwrap();
        assert_eq!((none.response_code(), none.answers()), (ResponseCode::NoError, &[][..]));
        let nibbles = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa.";
        assert!(reply(nibbles, RecordType::PTR).is_none());
    }

    #[test]
    fn names_that_do_not_exist_do_not_leave() {
        for name in ["vm2.pavo.local.", "a.vm0.pavo.local.", "vm0.pavo.local.pavo.local."] {
            assert_eq!(ask(name, RecordType::A), NO_NAME, "{name}");
        }
        assert_eq!(ask("printer.", RecordType::A), (ResponseCode::NXDomain, Vec::new(), false));
        let forwarded = |name, kind| answer(&query(name, kind)).is_none();
        assert!(forwarded("example.org.", RecordType::A));
        assert!(forwarded("org.", RecordType::DS), "a validating resolver needs it");
        assert!(forwarded(".", RecordType::NS));
        assert!(forwarded("notpavo.local.", RecordType::A));
    }

    #[test]
    fn addresses_of_the_subnet_have_names_or_none() {
        assert_eq!(ask("2.0.200.10.in-addr.arpa.", RecordType::PTR), data("vm1.pavo.local."));
        let gateway = "254.255.200.10.IN-ADDR.arpa.";
        assert_eq!(ask(gateway, RecordType::PTR), data("gateway.pavo.local."));
        assert_eq!(ask(gateway, RecordType::A), NO_DATA);
        assert_eq!(ask("9.9.200.10.in-addr.arpa.", RecordType::PTR), NO_NAME);
        assert_eq!(ask("02.0.200.10.in-addr.arpa.", RecordType::PTR), NO_NAME);
        assert_eq!(ask("1.2.0.200.10.in-addr.arpa.", RecordType::PTR), NO_NAME);
        assert_eq!(ask("200.10.in-addr.arpa.", RecordType::PTR), NO_DATA);
        assert_eq!(ask("0.200.10.in-addr.arpa.", RecordType::PTR), NO_DATA);
        for outside in ["1.0.201.10.in-addr.arpa.", "10.in-addr.arpa.", "x.10.in-addr.arpa."] {
            assert!(answer(&query(outside, RecordType::PTR)).is_none(), "{outside}");
        }
    }

    #[test]
    fn a_negative_answer_can_be_cached_below_its_zone() {
        for (name, zone) in [
            ("vm2.pavo.local.", "pavo.local."),
            ("vm0.", "vm0."),
            ("9.9.200.10.in-addr.arpa.", "200.10.in-addr.arpa."),
        ] {
            let reply = answer(&query(name, RecordType::MX)).unwrap();
            assert_eq!(reply.name_servers()[0].name().to_string(), zone);
        }
    }

    #[test]
    fn what_we_do_not_do_is_said() {
        let code = |message: &Message| answer(message).unwrap().response_code();
        let mut update = query("vm0.", RecordType::A);
        update.set_op_code(OpCode::Update);
        assert_eq!(code(&update), ResponseCode::NotImp);
        let mut chaos = query("version.bind.", RecordType::TXT);
        chaos.queries_mut()[0].set_query_class(DNSClass::CH);
        assert_eq!(code(&chaos), ResponseCode::Refused);
        assert_eq!(code(&query("pavo.local.", RecordType::AXFR)), ResponseCode::Refused);
        let mut two = query("vm0.", RecordType::A);
        two.add_query(Query::query(Name::from_ascii("vm1.").unwrap(), RecordType::A));
        assert_eq!(code(&two), ResponseCode::FormErr);
        let mut future = query("vm0.", RecordType::A);
        future.set_edns(Edns::new().set_version(1).clone());
        let reply = answer(&future).unwrap();
        assert_eq!(reply.extensions().as_ref().unwrap().rcode_high(), 1, "BADVERS is 16");
    }

    #[test]
    fn a_response_is_not_answered() {
        let mut response = query("vm0.", RecordType::A);
        response.set_message_type(MessageType::Response);
        assert!(matches!(zone().answer(&response.to_vec().unwrap()), Verdict::Ignore));
    }

    #[test]
    fn edns_is_spoken_to_who_speaks_it() {
        let mut with = query("vm0.", RecordType::A);
        with.set_edns(Edns::new());
        assert!(answer(&with).unwrap().extensions().is_some());
        assert!(answer(&query("vm0.", RecordType::A)).unwrap().extensions().is_none());
    }

    #[test]
    fn a_domain_that_dns_does_not_allow_is_refused() {
        for domain in ["", ".", "a..b", &"a".repeat(64), &"abcdefg.".repeat(31)] {
            let spec = Spec { domain: (*domain).to_owned(), ..spec() };
            assert!(Zone::new(&spec).is_err(), "{domain}");
        }
        let mut spec = spec();
        spec.guests[0].name = "a.b".into();
        assert!(Zone::new(&spec).is_err());
    }

    proptest! {
        #[test]
        fn no_packet_makes_it_panic(packet in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = zone().answer(&packet);
        }

        /// A header that is believed, and what follows of a guest's malice.
        #[test]
        fn no_question_makes_it_panic(
            additional in 0..4_u8,
            rest in proptest::collection::vec(prop_oneof![0..4_u8, any::<u8>()], 0..300),
        ) {
            let mut packet = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, additional];
            packet.extend(rest);
            match zone().answer(&packet) {
                Verdict::Reply(reply) => prop_assert_eq!(&reply[..2], &[0, 7]),
                Verdict::Forward(query) => prop_assert_eq!(query.id(), 7),
                Verdict::Ignore => prop_assert!(false, "a query is answered"),
            }
        }

        #[test]
        fn any_name_gets_its_own_answer(name in "([a-z0-9*_-]{1,20}\\.){1,6}", kind in any::<u16>()) {
            let Ok(name) = Name::from_ascii(&name) else { return Ok(()) };
            let mut message = Message::new();
            message.add_query(Query::query(name.clone(), kind.into()));
            let Ok(packet) = message.to_vec() else { return Ok(()) };
            if let Verdict::Reply(reply) = zone().answer(&packet) {
                let reply = Message::from_vec(&reply).unwrap();
                prop_assert!(reply.queries().iter().all(|query| *query.name() == name));
            }
        }
    }
}
