//! The DNS server's sockets: guests on one side, name servers on the other.
//!
//! One loop owns the table of waiting queries; connections by TCP hand it theirs through
//! a channel and wait for the answer.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::dns::{self, Verdict, Zone};
use super::forward::{Asked, Due, GIVE_UP, MAX_SERVERS, Pending};
use crate::error::Error;

/// Connections by TCP at once, of all guests and of one.
const MAX_STREAMS: usize = 64;
const MAX_STREAMS_OF_GUEST: usize = 4;
/// How long a connection may say nothing, and a guest take to read.
const IDLE: Duration = Duration::from_secs(10);
/// Rest when the system has no descriptor for a connection.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// The largest datagram.
const MAX_DATAGRAM: usize = 65535;
/// The largest query by TCP: a question, and a signature.
const MAX_QUERY: usize = 4096;

/// Everything DNS needs at run time.
#[derive(Debug)]
pub struct Service {
    zone: Arc<Zone>,
    datagram: UdpSocket,
    stream: TcpListener,
    upstream: Vec<Arc<UdpSocket>>,
}

/// Whom to answer.
#[derive(Debug)]
enum Client {
    Datagram(SocketAddr),
    Stream(oneshot::Sender<Vec<u8>>),
}

/// A query that came by TCP and is not ours to answer.
struct FromStream {
    source: Ipv4Addr,
    query: Box<Message>,
    answer: oneshot::Sender<Vec<u8>>,
}

impl Service {
    pub fn new(
        zone: Zone,
        datagram: UdpSocket,
        stream: TcpListener,
        upstream: Vec<UdpSocket>,
    ) -> Self {
        let upstream = upstream.into_iter().take(MAX_SERVERS).map(Arc::new).collect();
        Self { zone: Arc::new(zone), datagram, stream, upstream }
    }

    /// Answers for ever; returns what broke.
    pub async fn serve(self) -> Error {
        let mut parts = JoinSet::new();
        let (stream_queue, mut from_streams) = mpsc::channel(MAX_STREAMS);
        parts.spawn(serve_streams(self.stream, self.zone.clone(), stream_queue));
        let (server_queue, mut from_servers) = mpsc::channel(64);
        for (server, socket) in self.upstream.iter().enumerate() {
            parts.spawn(hear(server, socket.clone(), server_queue.clone()));
        }
        let mut forwarder = Forwarder {
            zone: self.zone,
            datagram: self.datagram,
            pending: Pending::new(self.upstream.len()),
            upstream: self.upstream,
        };
        let mut query = vec![0; MAX_QUERY];
        loop {
            let next = forwarder.pending.next();
            tokio::select! {
                received = forwarder.datagram.recv_from(&mut query) => match received {
                    Ok((length, client)) => forwarder.asked(&query[..length], client).await,
                    Err(error) => return Error::system("receiving DNS queries").because(error),
                },
                Some(heard) = from_servers.recv() => forwarder.heard(heard).await,
                Some(asked) = from_streams.recv() => forwarder.asked_by_stream(asked).await,
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                Some(ended) = parts.join_next() => {
                    return ended.unwrap_or_else(|panic| {
                        Error::bug("a part of the DNS server panicked").because(panic)
                    });
                }
            }
            forwarder.advance().await;
        }
    }
}

/// A packet from a server, or that its port is closed.
struct Heard {
    server: usize,
    packet: io::Result<Vec<u8>>,
}

/// Passes on what a server sends. That its port is closed is an error of the socket without
/// being readable, which `recv` alone would sleep through.
async fn hear(server: usize, socket: Arc<UdpSocket>, queue: mpsc::Sender<Heard>) -> Error {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        // `try_io` knows one interest at a time: with both it would never run.
        let interest = match socket.ready(Interest::READABLE | Interest::ERROR).await {
            Ok(ready) if ready.is_error() => Interest::ERROR,
            Ok(_) => Interest::READABLE,
            Err(error) => return Error::system("receiving from a name server").because(error),
        };
        let packet = socket
            .try_io(interest, || Ok(recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?));
        let packet = match packet {
            Ok(length) => Ok(buffer[..length].to_vec()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => Err(error),
        };
        if queue.send(Heard { server, packet }).await.is_err() {
            return Error::bug("nobody listens to name servers any more");
        }
    }
}

struct Forwarder {
    zone: Arc<Zone>,
    datagram: UdpSocket,
    upstream: Vec<Arc<UdpSocket>>,
    pending: Pending<Client>,
}

impl Forwarder {
    /// A packet from a guest.
    async fn asked(&mut self, packet: &[u8], from: SocketAddr) {
        let client = Client::Datagram(from);
        match self.zone.answer(packet) {
            Verdict::Reply(answer) => self.reply(client, answer).await,
            Verdict::Forward(query) => {
                let refusal = dns::refusal(&query, ResponseCode::Refused);
                let asked = Asked::datagram(*query, packet);
                self.forward(asked, refusal, client, from.ip()).await;
            }
            Verdict::Ignore => {}
        }
    }

    async fn asked_by_stream(&mut self, from: FromStream) {
        let refusal = dns::refusal(&from.query, ResponseCode::Refused);
        let client = Client::Stream(from.answer);
        if let Some(asked) = Asked::stream(*from.query) {
            self.forward(asked, refusal, client, from.source.into()).await;
        }
    }

    async fn forward(&mut self, asked: Asked, refusal: Vec<u8>, client: Client, source: IpAddr) {
        let guest = match source {
            IpAddr::V4(source) if self.zone.knows(source) => source,
            _ => return self.reply(client, refusal).await,
        };
        if self.upstream.is_empty() {
            return self.reply(client, refusal).await;
        }
        let taken = self.pending.insert(Instant::now(), asked, client, guest, random);
        if let Err((reason, _)) = taken {
            // Silence slows a resolver down; an answer would only bring the next query.
            tracing::debug!("a DNS query of {guest} was dropped: {reason:?}");
        }
    }

    async fn ask(&mut self, id: u16, server: usize, now: Instant) {
        let Some(packet) = self.pending.packet(id) else { return };
        if self.upstream[server].send(packet).await.is_err() {
            self.pending.refused(server, now);
        }
    }

    async fn heard(&mut self, Heard { server, packet }: Heard) {
        match packet {
            Ok(packet) => {
                if let Some((client, answer)) = self.pending.accept(server, &packet) {
                    self.reply(client, answer).await;
                }
            }
            Err(_) => self.pending.refused(server, Instant::now()),
        }
    }

    /// Does what is due.
    async fn advance(&mut self) {
        let now = Instant::now();
        while let Some(due) = self.pending.due(now) {
            match due {
                Due::Ask { id, server } => self.ask(id, server, now).await,
                Due::Fail { client, answer } => self.reply(client, answer).await,
            }
        }
    }

    async fn reply(&self, client: Client, answer: Vec<u8>) {
        match client {
            // Lost like any datagram; the guest asks again.
            Client::Datagram(to) => drop(self.datagram.send_to(&answer, to).await),
            Client::Stream(waiting) => drop(waiting.send(answer)),
        }
    }
}

/// An id that a server outside cannot guess.
fn random() -> u16 {
    let mut bytes = [0; 2];
    // It fails only where the system call does not exist; the filter lets it pass.
    getrandom::fill(&mut bytes).expect("the kernel has random numbers");
    u16::from_ne_bytes(bytes)
}

/// Accepts connections of guests, so many of each.
async fn serve_streams(
    listener: TcpListener,
    zone: Arc<Zone>,
    queue: mpsc::Sender<FromStream>,
) -> Error {
    let mut open: HashMap<Ipv4Addr, usize> = HashMap::new();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_STREAMS => match accepted {
                Ok((stream, SocketAddr::V4(from))) if zone.knows(*from.ip()) => {
                    let source = *from.ip();
                    let count = open.entry(source).or_default();
                    if *count < MAX_STREAMS_OF_GUEST {
                        *count += 1;
                        connections.spawn(serve_stream(stream, source, zone.clone(), queue.clone()));
                    }
                }
                Ok(_) => {}
                Err(_) => sleep(EXHAUSTED).await,
            },
            Some(ended) = connections.join_next() => match ended {
                Ok(source) => {
                    if let Some(count) = open.get_mut(&source) {
                        *count -= 1;
                    }
                }
                Err(panic) => {
                    return Error::bug("a DNS connection panicked").because(panic);
                }
            },
        }
    }
}

/// Answers one connection's queries, one after the other (RFC 7766), until it ends or idles.
async fn serve_stream(
    mut stream: TcpStream,
    source: Ipv4Addr,
    zone: Arc<Zone>,
    queue: mpsc::Sender<FromStream>,
) -> Ipv4Addr {
    while let Ok(Ok(query)) = timeout(IDLE, read_query(&mut stream)).await {
        let answer = match zone.answer(&query) {
            Verdict::Reply(answer) => answer,
            Verdict::Ignore => break,
            Verdict::Forward(query) => {
                let (answer, answered) = oneshot::channel();
                if queue.send(FromStream { source, query, answer }).await.is_err() {
                    break;
                }
                // A query that was dropped closes the channel.
                let Ok(Ok(answer)) = timeout(GIVE_UP + IDLE, answered).await else { break };
                answer
            }
        };
        if !matches!(timeout(IDLE, write_answer(&mut stream, &answer)).await, Ok(Ok(()))) {
            break;
        }
    }
    source
}

/// Reads one query: its length in two bytes, then itself (RFC 1035, 4.2.2).
async fn read_query(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > MAX_QUERY {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut query = vec![0; length];
    stream.read_exact(&mut query).await?;
    Ok(query)
}

async fn write_answer(stream: &mut TcpStream, answer: &[u8]) -> io::Result<()> {
    let length = u16::try_from(answer.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let framed = [&length.to_be_bytes(), answer].concat();
    stream.write_all(&framed).await
}
