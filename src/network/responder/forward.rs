//! Queries that wait for a name server outside.
//!
//! A query goes out under an id of its own, drawn at random; what comes back counts only
//! if a server that was asked answers that id with that question (RFC 5452). Every two
//! seconds the next server is tried, after five the guest is told that it failed. The
//! server that answered last is asked first, so one that is silent costs two seconds once.
//! The sockets are connected, so the kernel drops what other hosts send.
//!
//! [`Pending`] is the table: bounded, fair between guests, without a clock or socket of
//! its own.

use std::collections::{BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::op::{Edns, Header, Message, MessageType, Query, ResponseCode};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use tokio::time::Instant;

use super::dns;

/// When the next server is asked.
pub const RETRY: Duration = Duration::from_secs(2);
/// When the guest is told that nobody answered; resolvers wait as long by default.
pub const GIVE_UP: Duration = Duration::from_secs(5);
/// Queries that wait at once, of all guests and of one.
const MAX_PENDING: usize = 1024;
const MAX_PENDING_OF_GUEST: u32 = 128;
/// Queries a guest may forward per second, and save up.
const RATE: u32 = 500;
/// `resolv.conf` knows three; more only make failures slower.
pub const MAX_SERVERS: usize = 8;
/// The answer we ask for on behalf of a guest that came by TCP.
const STREAM_PAYLOAD: u16 = 4096;
/// What a client takes over UDP unless it says more (RFC 1035, 4.2.1).
const MIN_PAYLOAD: u16 = 512;

/// A query as it is sent on.
#[derive(Debug)]
pub struct Asked {
    query: Message,
    packet: Vec<u8>,
    /// The largest answer that its client takes.
    limit: usize,
    /// Whether it came by TCP.
    is_stream: bool,
}

impl Asked {
    /// A query that came by UDP goes on as it is, but for its id.
    pub fn datagram(query: Message, packet: &[u8]) -> Self {
        let limit = query.max_payload().max(MIN_PAYLOAD).into();
        Self { query, packet: packet.to_vec(), limit, is_stream: false }
    }

    /// A query that came by TCP goes on by UDP, since sockets are inherited connected, but
    /// asks for large answers whatever its client said. `None` if it cannot be encoded.
    pub fn stream(query: Message) -> Option<Self> {
        let mut sent = Message::new();
        sent.set_recursion_desired(query.recursion_desired());
        sent.set_checking_disabled(query.checking_disabled());
        sent.add_queries(query.queries().to_vec());
        let mut edns = Edns::new();
        edns.set_max_payload(STREAM_PAYLOAD);
        edns.set_dnssec_ok(query.extensions().as_ref().is_some_and(|e| e.flags().dnssec_ok));
        sent.set_edns(edns);
        let packet = sent.to_vec().ok()?;
        Some(Self { query, packet, limit: u16::MAX.into(), is_stream: true })
    }

    /// The server's answer as the client may have it.
    fn answer(&self, received: &[u8], end_of_question: usize) -> Vec<u8> {
        let mut answer = received.to_vec();
        if self.is_stream {
            let truncated = received[2] & TRUNCATED != 0;
            return self.unwrapped(answer).filter(|_| !truncated).unwrap_or_else(|| self.failure());
        }
        if answer.len() > self.limit {
            answer.truncate(end_of_question);
            answer[2] |= TRUNCATED;
            answer[6..12].fill(0);
        }
        self.with_own_id(answer)
    }

    /// Without the OPT record that only we asked for (RFC 6891, 6.1.1).
    fn unwrapped(&self, answer: Vec<u8>) -> Option<Vec<u8>> {
        if self.query.extensions().is_some() {
            return Some(self.with_own_id(answer));
        }
        let mut message = Message::from_vec(&answer).ok()?;
        *message.extensions_mut() = None;
        message.to_vec().ok().map(|answer| self.with_own_id(answer))
    }

    fn with_own_id(&self, mut answer: Vec<u8>) -> Vec<u8> {
        answer[..2].copy_from_slice(&self.query.id().to_be_bytes());
        answer
    }

    fn failure(&self) -> Vec<u8> {
        dns::refusal(&self.query, ResponseCode::ServFail)
    }
}

/// The TC bit, in the third byte of a header.
const TRUNCATED: u8 = 0x02;

/// Why a query was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The table is full, or the guest's part of it.
    Full,
    /// The guest asks faster than it may.
    TooFast,
}

/// What to do about a query that waits.
#[derive(Debug, PartialEq, Eq)]
pub enum Due<C> {
    /// Send the packet of this id to this server.
    Ask { id: u16, server: usize },
    /// Tell the client.
    Fail { client: C, answer: Vec<u8> },
}

#[derive(Debug)]
struct Waiting<C> {
    asked: Asked,
    client: C,
    source: Ipv4Addr,
    since: Instant,
    next: Instant,
    /// The one asked last.
    server: Option<usize>,
    /// By server: whether it was asked, and whether it is known to be down.
    tried: [bool; MAX_SERVERS],
    down: [bool; MAX_SERVERS],
}

/// What a guest has used up.
#[derive(Debug)]
struct Share {
    waiting: u32,
    tokens: u32,
    filled: Instant,
}

/// The queries that wait, by the id that they were sent under. `C` is whom to answer.
#[derive(Debug)]
pub struct Pending<C> {
    servers: usize,
    /// The server that answered last.
    preferred: usize,
    waiting: HashMap<u16, Waiting<C>>,
    /// What is to be done when.
    timers: BTreeSet<(Instant, u16)>,
    /// By source; the caller lets guests' addresses through only.
    shares: HashMap<Ipv4Addr, Share>,
}

impl<C> Pending<C> {
    /// A table for that many servers: at least one, [`MAX_SERVERS`] at most.
    pub fn new(servers: usize) -> Self {
        Self {
            servers: servers.min(MAX_SERVERS),
            preferred: 0,
            waiting: HashMap::new(),
            timers: BTreeSet::new(),
            shares: HashMap::new(),
        }
    }

    /// When [`due`](Self::due) has something to say next.
    pub fn next(&self) -> Option<Instant> {
        self.timers.first().map(|(when, _)| *when)
    }

    /// The packet to send under this id.
    pub fn packet(&self, id: u16) -> Option<&[u8]> {
        self.waiting.get(&id).map(|waiting| waiting.asked.packet.as_slice())
    }

    /// Takes a query, which is due at once; its id is the first that `random` draws and no
    /// other query has.
    ///
    /// # Errors
    ///
    /// The query, if it is one too many.
    pub fn insert(
        &mut self,
        now: Instant,
        mut asked: Asked,
        client: C,
        source: Ipv4Addr,
        mut random: impl FnMut() -> u16,
    ) -> Result<u16, (Refused, C)> {
        if let Err(refused) = self.charge(now, source) {
            return Err((refused, client));
        }
        let mut id = random();
        while self.waiting.contains_key(&id) {
            id = random();
        }
        asked.packet[..2].copy_from_slice(&id.to_be_bytes());
        let waiting = Waiting {
            asked,
            client,
            source,
            since: now,
            next: now,
            server: None,
            tried: [false; MAX_SERVERS],
            down: [false; MAX_SERVERS],
        };
        self.timers.insert((now, id));
        self.waiting.insert(id, waiting);
        Ok(id)
    }

    /// Takes a token and a place from the guest's share.
    fn charge(&mut self, now: Instant, source: Ipv4Addr) -> Result<(), Refused> {
        let fresh = || Share { waiting: 0, tokens: RATE, filled: now };
        let share = self.shares.entry(source).or_insert_with(fresh);
        let earned = now.duration_since(share.filled).as_secs_f64() * f64::from(RATE);
        if earned >= 1.0 {
            // At most what was saved up for a second: a whole number that fits.
            share.tokens = (share.tokens + earned.min(f64::from(RATE)) as u32).min(RATE);
            share.filled = now;
        }
        if self.waiting.len() >= MAX_PENDING || share.waiting >= MAX_PENDING_OF_GUEST {
            return Err(Refused::Full);
        }
        share.tokens = share.tokens.checked_sub(1).ok_or(Refused::TooFast)?;
        share.waiting += 1;
        Ok(())
    }

    fn remove(&mut self, id: u16) -> Option<Waiting<C>> {
        let waiting = self.waiting.remove(&id)?;
        self.timers.remove(&(waiting.next, id));
        if let Some(share) = self.shares.get_mut(&waiting.source) {
            share.waiting -= 1;
        }
        Some(waiting)
    }

    /// Judges a packet from a server: whom it answers, and how. `None`: it answers nothing
    /// that was asked.
    pub fn accept(&mut self, server: usize, packet: &[u8]) -> Option<(C, Vec<u8>)> {
        let mut decoder = BinDecoder::new(packet);
        let header = Header::read(&mut decoder).ok()?;
        if header.message_type() != MessageType::Response || header.query_count() != 1 {
            return None;
        }
        let question = Query::read(&mut decoder).ok()?;
        let end = decoder.index();
        let waiting = self.waiting.get(&header.id())?;
        let is_answer = waiting.asked.query.query() == Some(&question);
        if !is_answer || !*waiting.tried.get(server)? {
            return None;
        }
        self.preferred = server;
        let waiting = self.remove(header.id())?;
        Some((waiting.client, waiting.asked.answer(packet, end)))
    }

    /// A server's port is closed: what waits for it goes on at once.
    pub fn refused(&mut self, server: usize, now: Instant) {
        for (id, waiting) in &mut self.waiting {
            if waiting.server == Some(server) && !waiting.down[server] {
                waiting.down[server] = true;
                self.timers.remove(&(waiting.next, *id));
                waiting.next = now;
                self.timers.insert((now, *id));
            }
        }
    }

    /// What is to be done by now. Call it until it has nothing more.
    pub fn due(&mut self, now: Instant) -> Option<Due<C>> {
        let &(_, id) = self.timers.first().filter(|(when, _)| *when <= now)?;
        let waiting = self.waiting.get_mut(&id)?;
        let first = waiting.server.map_or(self.preferred, |last| last + 1);
        let next = (0..self.servers)
            .map(|step| (first + step) % self.servers)
            .filter(|_| now < waiting.since + GIVE_UP)
            .find(|server| !waiting.down[*server]);
        let Some(server) = next else {
            let waiting = self.remove(id)?;
            return Some(Due::Fail { answer: waiting.asked.failure(), client: waiting.client });
        };
        self.timers.remove(&(waiting.next, id));
        waiting.next = (now + RETRY).min(waiting.since + GIVE_UP);
        waiting.server = Some(server);
        waiting.tried[server] = true;
        self.timers.insert((waiting.next, id));
        Some(Due::Ask { id, server })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::rdata::{A, TXT};
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use proptest::prelude::*;

    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
    const SECOND: Duration = Duration::from_secs(1);

    fn query(name: &str) -> Message {
        let mut message = Message::new();
        message.set_id(0x4242).set_recursion_desired(true);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message
    }

    fn asked(name: &str) -> Asked {
        let query = query(name);
        let packet = query.to_vec().unwrap();
        Asked::datagram(query, &packet)
    }

    /// Draws 1, 2, 3 …
    fn counter() -> impl FnMut() -> u16 {
        let mut last = 0;
        move || {
            last += 1;
            last
        }
    }

    /// Takes a query and sends it to whom it is due; returns that server.
    fn sent<C: std::fmt::Debug + PartialEq>(
        pending: &mut Pending<C>,
        now: Instant,
        asked: Asked,
        client: C,
        id: u16,
    ) -> usize {
        assert_eq!(pending.insert(now, asked, client, GUEST, || id), Ok(id));
        let Some(Due::Ask { id: due, server }) = pending.due(now) else { panic!("not due") };
        assert_eq!(due, id);
        server
    }

    fn response(id: u16, name: &str) -> Message {
        let mut message = query(name);
        message.set_id(id).set_message_type(MessageType::Response);
        let data = RData::A(A::new(192, 0, 2, 1));
        message.add_answer(Record::from_rdata(Name::from_ascii(name).unwrap(), 60, data));
        message
    }

    fn packet(id: u16, name: &str) -> Vec<u8> {
        response(id, name).to_vec().unwrap()
    }

    #[test]
    fn an_answer_comes_back_under_the_guests_own_id() {
        let mut pending = Pending::new(1);
        assert_eq!(sent(&mut pending, Instant::now(), asked("a.org."), 'c', 99), 0);
        assert_eq!(pending.packet(99).unwrap()[..2], 99_u16.to_be_bytes());
        let (client, answer) = pending.accept(0, &packet(99, "A.org.")).unwrap();
        assert_eq!((client, &answer[..2]), ('c', &[0x42, 0x42][..]));
        assert!(pending.accept(0, &packet(99, "a.org.")).is_none(), "one answer only");
        assert_eq!(pending.next(), None, "nothing waits, so nothing wakes us");
    }

    #[test]
    fn what_was_not_asked_is_no_answer() {
        let mut pending = Pending::new(2);
        let now = Instant::now();
        pending.insert(now, asked("a.org."), (), GUEST, || 99).unwrap();
        assert!(pending.accept(0, &packet(99, "a.org.")).is_none(), "not sent yet");
        assert_eq!(pending.due(now), Some(Due::Ask { id: 99, server: 0 }));
        assert!(pending.accept(0, &packet(98, "a.org.")).is_none(), "another id");
        assert!(pending.accept(0, &packet(99, "b.org.")).is_none(), "another question");
        assert!(pending.accept(1, &packet(99, "a.org.")).is_none(), "a server not asked yet");
        assert!(pending.accept(7, &packet(99, "a.org.")).is_none(), "no server at all");
        let mut question = response(99, "a.org.");
        question.set_message_type(MessageType::Query);
        assert!(pending.accept(0, &question.to_vec().unwrap()).is_none(), "a query");
        assert!(pending.accept(0, &packet(99, "a.org.")[..20]).is_none(), "half a packet");
        assert!(pending.accept(0, &packet(99, "a.org.")).is_some());
    }

    #[test]
    fn two_queries_never_share_an_id() {
        let mut pending = Pending::new(1);
        let mut draws = [5, 5, 5, 6].into_iter();
        let mut draw = || draws.next().unwrap();
        let now = Instant::now();
        assert_eq!(pending.insert(now, asked("a.org."), 'a', GUEST, &mut draw), Ok(5));
        assert_eq!(pending.insert(now, asked("a.org."), 'b', GUEST, &mut draw), Ok(6));
        while pending.due(now).is_some() {}
        assert_eq!(pending.accept(0, &packet(6, "a.org.")).unwrap().0, 'b');
        assert_eq!(pending.accept(0, &packet(5, "a.org.")).unwrap().0, 'a');
    }

    #[test]
    fn every_two_seconds_the_next_server_and_after_five_the_end() {
        let start = Instant::now();
        let mut pending = Pending::new(2);
        let id = 9;
        assert_eq!(sent(&mut pending, start, asked("a.org."), 'c', id), 0);
        assert_eq!(pending.due(start + SECOND), None);
        assert_eq!(pending.next(), Some(start + RETRY));
        assert_eq!(pending.due(start + 2 * SECOND), Some(Due::Ask { id, server: 1 }));
        assert_eq!(pending.due(start + 2 * SECOND), None);
        assert_eq!(pending.due(start + 4 * SECOND), Some(Due::Ask { id, server: 0 }));
        assert_eq!(pending.next(), Some(start + GIVE_UP));
        let Some(Due::Fail { client, answer }) = pending.due(start + GIVE_UP) else { panic!() };
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!((client, answer.id()), ('c', 0x4242));
        assert_eq!(answer.response_code(), ResponseCode::ServFail);
        assert_eq!(pending.next(), None);
    }

    #[test]
    fn a_server_that_is_down_is_skipped_and_the_last_one_ends_it() {
        let start = Instant::now();
        let mut pending = Pending::new(3);
        let id = 9;
        assert_eq!(sent(&mut pending, start, asked("a.org."), 'c', id), 0);
        pending.refused(0, start);
        assert_eq!(pending.due(start), Some(Due::Ask { id, server: 1 }));
        pending.refused(0, start);
        assert_eq!(pending.due(start), None, "it waits for another server by now");
        pending.refused(1, start);
        assert_eq!(pending.due(start), Some(Due::Ask { id, server: 2 }));
        pending.refused(2, start);
        assert!(matches!(pending.due(start), Some(Due::Fail { client: 'c', .. })));
    }

    #[test]
    fn who_answered_last_is_asked_first() {
        let start = Instant::now();
        let mut pending = Pending::new(2);
        assert_eq!(sent(&mut pending, start, asked("a.org."), (), 9), 0);
        assert_eq!(pending.due(start + RETRY), Some(Due::Ask { id: 9, server: 1 }));
        assert!(pending.accept(1, &packet(9, "a.org.")).is_some());
        assert_eq!(sent(&mut pending, start, asked("b.org."), (), 8), 1);
    }

    #[test]
    fn one_guest_cannot_use_up_what_others_need() {
        let (now, mut draw) = (Instant::now(), counter());
        let mut pending = Pending::new(1);
        let mut taken = 0;
        let refused = loop {
            match pending.insert(now, asked("a.org."), (), GUEST, &mut draw) {
                Ok(_) => taken += 1,
                Err((refused, ())) => break refused,
            }
        };
        assert_eq!((taken, refused), (MAX_PENDING_OF_GUEST, Refused::Full));
        let other = Ipv4Addr::new(10, 200, 0, 2);
        assert!(pending.insert(now, asked("a.org."), (), other, &mut draw).is_ok());
    }

    #[test]
    fn a_guest_may_ask_so_many_a_second() {
        let (start, mut draw) = (Instant::now(), counter());
        let mut pending = Pending::new(1);
        let mut ask = |now| {
            let id = pending.insert(now, asked("a.org."), (), GUEST, &mut draw).map_err(|e| e.0)?;
            assert!(pending.due(now).is_some());
            pending.accept(0, &packet(id, "a.org.")).unwrap();
            Ok(())
        };
        for _ in 0..RATE {
            assert_eq!(ask(start), Ok(()));
        }
        assert_eq!(ask(start), Err(Refused::TooFast));
        assert_eq!(ask(start + SECOND / 10), Ok(()));
    }

    #[test]
    fn an_answer_too_large_for_its_client_is_truncated() {
        let mut pending = Pending::new(1);
        sent(&mut pending, Instant::now(), asked("a.org."), (), 9);
        let mut large = response(9, "a.org.");
        for _ in 0..10 {
            let data = RData::TXT(TXT::new(vec!["x".repeat(100)]));
            large.add_answer(Record::from_rdata(Name::from_ascii("a.org.").unwrap(), 60, data));
        }
        let (_, answer) = pending.accept(0, &large.to_vec().unwrap()).unwrap();
        assert!(answer.len() <= 512);
        let answer = Message::from_vec(&answer).unwrap();
        assert!(answer.truncated());
        assert_eq!((answer.queries().len(), answer.answers().len()), (1, 0));
    }

    #[test]
    fn by_stream_an_answer_is_whole_or_a_failure() {
        let mut pending = Pending::new(1);
        for truncated in [false, true] {
            let stream = Asked::stream(query("a.org.")).unwrap();
            sent(&mut pending, Instant::now(), stream, (), 9);
            let sent = Message::from_vec(pending.packet(9).unwrap()).unwrap();
            assert_eq!(sent.max_payload(), STREAM_PAYLOAD);
            let mut answer = response(9, "a.org.");
            answer.set_truncated(truncated).set_edns(Edns::new());
            let (_, answer) = pending.accept(0, &answer.to_vec().unwrap()).unwrap();
            let answer = Message::from_vec(&answer).unwrap();
            assert_eq!(answer.id(), 0x4242);
            assert!(answer.extensions().is_none() && !answer.truncated());
            let failed = answer.response_code() == ResponseCode::ServFail;
            assert_eq!(failed, truncated);
        }
    }

    proptest! {
        #[test]
        fn no_packet_from_a_server_makes_it_panic(
            rest in proptest::collection::vec(any::<u8>(), 0..300),
            keep in 0..30_usize,
            stream in any::<bool>(),
        ) {
            let mut pending = Pending::new(1);
            let query = query("a.org.");
            let bytes = query.to_vec().unwrap();
            let asked =
                if stream { Asked::stream(query).unwrap() } else { Asked::datagram(query, &bytes) };
            sent(&mut pending, Instant::now(), asked, (), 9);
            let mut packet = packet(9, "a.org.");
            packet.truncate(keep);
            packet.extend(rest);
            let _ = pending.accept(0, &packet);
        }
    }
}
