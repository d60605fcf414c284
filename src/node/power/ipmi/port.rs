//! The few sockets that all conversations with controllers share.
//!
//! A packet belongs to the conversation whose session number it names, if it comes from whom
//! that one talks to; all others are dropped. A controller that talks too much fills its own
//! queue, and nobody else's.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::wire::{MAX_PACKET, Packet};

/// How many sockets there are of each family: each has a queue in the kernel, and a thousand
/// controllers may answer in the same millisecond.
const SOCKETS: usize = 4;
/// What such a queue may hold, in bytes, where the kernel allows it.
const QUEUE: usize = 4 << 20;
/// How many packets wait for a conversation.
const WAITING: usize = 64;

/// Opened with the first conversation.
#[derive(Debug, Default)]
pub struct Port {
    open: Mutex<Open>,
    next: AtomicUsize,
}

#[derive(Debug, Default)]
struct Open {
    v4: Vec<Arc<Socket>>,
    v6: Vec<Arc<Socket>>,
}

#[derive(Debug)]
struct Socket {
    udp: Arc<UdpSocket>,
    book: Arc<Book>,
    reader: AbortHandle,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Who waits for packets.
#[derive(Debug, Default)]
struct Book(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    /// By session number.
    all: HashMap<u32, Entry>,
    /// The last number of each controller.
    last: HashMap<SocketAddr, u32>,
}

#[derive(Debug)]
struct Entry {
    peer: SocketAddr,
    packets: mpsc::Sender<Box<[u8]>>,
}

impl Book {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self, from: SocketAddr, bytes: &[u8]) {
        let Some(packet) = Packet::read(bytes) else { return };
        let from = without_scope(from);
        let entries = self.entries();
        let number = match packet.addressee() {
            Some(number) => Some(number),
            None if packet.is_bare_refusal() => entries.last.get(&from).copied(),
            None => None,
        };
        let entry = number.and_then(|number| entries.all.get(&number));
        if let Some(entry) = entry.filter(|entry| entry.peer == from) {
            // What finds no room was not asked for.
            let _ = entry.packets.try_send(bytes.into());
        }
    }
}

/// The scope of an IPv6 address, and its flow, are how we see it.
fn without_scope(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port())
}

impl Port {
    /// A conversation with a controller, under a new session number.
    ///
    /// # Errors
    /// When no socket can be opened.
    pub fn talk(&self, peer: SocketAddr) -> io::Result<Conversation> {
        let socket = self.socket(peer)?;
        let (packets, received) = mpsc::channel(WAITING);
        let mut entries = socket.book.entries();
        let number = loop {
            let number = random_number()?;
            if number != 0 && !entries.all.contains_key(&number) {
                break number;
            }
        };
        entries.all.insert(number, Entry { peer: without_scope(peer), packets });
        entries.last.insert(without_scope(peer), number);
        drop(entries);
        Ok(Conversation { socket, peer, number, received })
    }

    fn socket(&self, peer: SocketAddr) -> io::Result<Arc<Socket>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let sockets = if peer.is_ipv4() { &mut open.v4 } else { &mut open.v6 };
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % SOCKETS;
        if sockets.len() < SOCKETS {
            let any = if peer.is_ipv4() {
                SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
            } else {
                SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
            };
            sockets.push(Arc::new(Socket::open(any)?));
        }
        Ok(sockets[turn % sockets.len()].clone())
    }
}

fn random_number() -> io::Result<u32> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(u32::from_le_bytes(bytes))
}

impl Socket {
    fn open(address: SocketAddr) -> io::Result<Self> {
        let udp = std::net::UdpSocket::bind(address)?;
        udp.set_nonblocking(true)?;
        // Beyond the limit of the system only root has it; what is lost is asked for again.
        if setsockopt(&udp, sockopt::RcvBufForce, &QUEUE).is_err() {
            let _ = setsockopt(&udp, sockopt::RcvBuf, &QUEUE);
        }
        let udp = Arc::new(UdpSocket::from_std(udp)?);
        let book = Arc::new(Book::default());
        let reader = tokio::spawn(read(udp.clone(), book.clone())).abort_handle();
        Ok(Self { udp, book, reader })
    }
}

/// Hands out what comes, for as long as the socket is.
async fn read(udp: Arc<UdpSocket>, book: Arc<Book>) {
    // One byte more than a packet may have: what fills it is too long.
    let mut bytes = [0; MAX_PACKET + 1];
    loop {
        match udp.recv_from(&mut bytes).await {
            Ok((length, from)) if length <= MAX_PACKET => book.deliver(from, &bytes[..length]),
            Ok(_) => {}
            // Such as a network that is down: its packets are lost, the socket is not.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// What one session sends and receives.
#[derive(Debug)]
pub struct Conversation {
    socket: Arc<Socket>,
    peer: SocketAddr,
    number: u32,
    received: mpsc::Receiver<Box<[u8]>>,
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let mut entries = self.socket.book.entries();
        entries.all.remove(&self.number);
        let peer = without_scope(self.peer);
        if entries.last.get(&peer) == Some(&self.number) {
            entries.last.remove(&peer);
        }
    }
}

impl Conversation {
    /// Our number of the session.
    pub fn number(&self) -> u32 {
        self.number
    }

    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    pub async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.socket.udp.send_to(bytes, self.peer).await.map(drop)
    }

    /// Sends it if that is possible at once.
    pub fn send_now(&self, bytes: &[u8]) {
        let _ = self.socket.udp.try_send_to(bytes, self.peer);
    }

    /// The next packet for this session.
    pub async fn receive(&mut self) -> Box<[u8]> {
        match self.received.recv().await {
            Some(bytes) => bytes,
            // The book keeps the sender for as long as this is.
            None => std::future::pending().await,
        }
    }
}
