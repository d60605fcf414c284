//! Published ports: connections made outside, carried to a guest.
//!
//! The listener was made in the host's namespace, the connection to the guest is made
//! here, and bytes are pumped between the two; half-closes are passed on. A guest that is
//! booting refuses, or does not answer: then the connection is closed without a byte.
//!
//! So many connections at once per port, and over all ports; who comes beyond that waits
//! in the listener's queue until one ends, and then is served as if it had come just then.

use std::io;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::error::Error;

/// Connections of one port, and of all.
pub const PER_PORT: usize = 64;
pub const IN_TOTAL: usize = 1024;
/// How long a guest may take to accept.
const CONNECT: Duration = Duration::from_secs(5);
/// After how long to ask one that does not answer anew.
const AGAIN: Duration = Duration::from_millis(500);
/// Descriptors of one connection: the client, the guest, and the guest asked anew.
pub(super) const PER_CONNECTION: usize = 3;
/// How long it has for a client that says nothing, and has already ended its side.
const CONNECT_IN_VAIN: Duration = Duration::from_secs(1);
/// How long to rest when the system has no descriptor or memory for a connection.
pub(super) const EXHAUSTED: Duration = Duration::from_millis(100);
/// Bytes under way in each direction.
pub(super) const BUFFER: usize = 16 << 10;
/// Descriptors beside connections: the life line, the event loop, DHCP, DNS.
const OTHERS: u64 = 256;

/// How many descriptors the process needs with this many ports.
pub fn descriptors(ports: usize) -> u64 {
    let connections = IN_TOTAL.min(ports * PER_PORT);
    // A port has its listener, and a connection that waits for a place.
    OTHERS + (2 * ports + PER_CONNECTION * connections) as u64
}

/// What all ports share.
pub fn budget() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(IN_TOTAL))
}

/// One published port.
#[derive(Debug)]
pub struct Port {
    listener: TcpListener,
    guest: SocketAddrV4,
    own: Arc<Semaphore>,
}

impl Port {
    pub fn new(listener: TcpListener, guest: SocketAddrV4) -> Self {
        Self { listener, guest, own: Arc::new(Semaphore::new(PER_PORT)) }
    }

    /// Serves the port for ever, within what all ports may have together.
    pub async fn serve(self, budget: Arc<Semaphore>) -> Error {
        let mut connections = JoinSet::new();
        loop {
            let own = permit(&self.own).await;
            let client = match self.listener.accept().await {
                Ok((client, _)) => client,
                Err(error) if is_of_one_connection(&error) => continue,
                Err(error) => {
                    tracing::warn!("accepting a connection for {}: {error}", self.guest);
                    sleep(EXHAUSTED).await;
                    continue;
                }
            };
            let permits = (own, permit(&budget).await);
            while connections.try_join_next().is_some() {}
            connections.spawn(carry(client, self.guest, permits));
        }
    }
}

/// Whether accepting failed because the client had gone.
pub(super) fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// Carries one connection until both sides are done, or one fails.
async fn carry(mut client: TcpStream, guest: SocketAddrV4, _permits: impl Sized) {
    let connected = tokio::select! {
        connected = connect(guest) => connected,
        // Whoever asks a booting guest again and again must not wait for its own past.
        () = left(&client) => return,
    };
    // Refused, unreachable or silent: the guest is not there yet. The client sees the end.
    let Ok(mut server) = connected else { return };
    // Keystrokes must not wait for one another; where it fails they do.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let _ = copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER, BUFFER).await;
}

/// Connects to a guest. One that boots loses the first packets of its network, and the kernel
/// sends them again after 1, 3 and 7 s: so that a first try is waited for, and a second
/// beside it is made anew each time. One that is given up unanswered never gets to a program
/// in the guest.
pub(super) async fn connect(guest: SocketAddrV4) -> io::Result<TcpStream> {
    let anew = async {
        loop {
            sleep(AGAIN).await;
            if let Ok(done) = timeout(AGAIN, TcpStream::connect(guest)).await {
                return done;
            }
        }
    };
    tokio::select! {
        done = TcpStream::connect(guest) => done,
        done = anew => done,
        () = sleep(CONNECT) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Done once the client is gone. One that only sends nothing looks the same: it gets the
/// time in which a guest that is there answers.
async fn left(client: &TcpStream) {
    match client.peek(&mut [0]).await {
        Ok(0) | Err(_) => sleep(CONNECT_IN_VAIN).await,
        Ok(_) => std::future::pending().await,
    }
}

pub(super) async fn permit(semaphore: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    semaphore.clone().acquire_owned().await.expect("it is never closed")
}
