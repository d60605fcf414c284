//! Queries that wait for a name server outside.
//!
//! A query goes out under an id of its own, drawn at random; what comes back counts only
//! if a server that was asked answers that id with that question (RFC 5452). Every two
//! seconds the next server is tried, after five the guest is told that it failed. The
//! sockets are connected, so the kernel drops what other hosts send.
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
    server: usize,
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

    /// Takes a query; its id is the first that `random` draws and no other query has. It
    /// is to be sent to server 0.
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
        let mut waiting = Waiting {
            asked,
            client,
            source,
            since: now,
            next: now + RETRY,
            server: 0,
            tried: [false; MAX_SERVERS],
            down: [false; MAX_SERVERS],
        };
        waiting.tried[0] = true;
        self.timers.insert((waiting.next, id));
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
        let waiting = self.remove(header.id())?;
        Some((waiting.client, waiting.asked.answer(packet, end)))
    }

    /// A server's port is closed: what waits for it goes on at once.
    pub fn refused(&mut self, server: usize, now: Instant) {
        for (id, waiting) in &mut self.waiting {
            if waiting.server == server && !waiting.down[server] {
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
        let up = (1..=self.servers).map(|step| (waiting.server + step) % self.servers);
        let next =
            up.filter(|_| now < waiting.since + GIVE_UP).find(|server| !waiting.down[*server]);
        let Some(server) = next else {
            let waiting = self.remove(id)?;
            return Some(Due::Fail { answer: waiting.asked.failure(), client: waiting.client });
        };
        self.timers.remove(&(waiting.next, id));
        waiting.next = (now + RETRY).min(waiting.since + GIVE_UP);
        waiting.server = server;
        waiting.tried[server] = true;
        self.timers.insert((waiting.next, id));
        Some(Due::Ask { id, server })
    }
}
