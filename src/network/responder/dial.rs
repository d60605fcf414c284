//! Connections that the cluster's user asks for: from a Unix socket, which only that user may
//! connect to, to any port of a guest.
//!
//! The socket is all the proof there is of who asks. A guest sees its gateway come, as it
//! does at published ports.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::publish::{BUFFER, CONNECT, EXHAUSTED, PER_PORT, is_of_one_connection, permit};
use crate::error::Error;
use crate::model::dial::{Answer, MAX_LINE, Request};

/// How long a caller may take to say what it wants.
const REQUEST: Duration = Duration::from_secs(5);

/// The socket.
#[derive(Debug)]
pub struct Dial {
    listener: UnixListener,
    guests: Arc<BTreeSet<Ipv4Addr>>,
    own: Arc<Semaphore>,
}

impl Dial {
    pub fn new(listener: UnixListener, guests: BTreeSet<Ipv4Addr>) -> Self {
        Self { listener, guests: Arc::new(guests), own: Arc::new(Semaphore::new(PER_PORT)) }
    }

    /// Serves it for ever, within what all ports may have together.
    pub async fn serve(self, budget: Arc<Semaphore>) -> Error {
        let mut connections = JoinSet::new();
        loop {
            let own = permit(&self.own).await;
            let caller = match self.listener.accept().await {
                Ok((caller, _)) => caller,
                Err(error) if is_of_one_connection(&error) => continue,
                Err(error) => {
                    tracing::warn!("accepting a connection to a guest: {error}");
                    sleep(EXHAUSTED).await;
                    continue;
                }
            };
            let permits = (own, permit(&budget).await);
            while connections.try_join_next().is_some() {}
            let guests = self.guests.clone();
            connections.spawn(async move {
                let _permits = permits;
                carry(caller, &guests).await;
            });
        }
    }
}

/// One caller, until both sides are done, or one fails.
async fn carry(mut caller: UnixStream, guests: &BTreeSet<Ipv4Addr>) {
    let Ok(Some(request)) = timeout(REQUEST, request(&mut caller)).await else { return };
    let guest = SocketAddrV4::new(request.address, request.port);
    let (answer, server) = if guests.contains(&request.address) {
        match timeout(CONNECT, TcpStream::connect(guest)).await {
            Ok(Ok(server)) => (Answer::Connected, Some(server)),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                (Answer::Refused, None)
            }
            _ => (Answer::Silent, None),
        }
    } else {
        (Answer::Unknown, None)
    };
    if caller.write_all(answer.line().as_bytes()).await.is_err() {
        return;
    }
    let Some(mut server) = server else { return };
    // Keystrokes must not wait for one another; where it fails they do.
    let _ = server.set_nodelay(true);
    let _ = copy_bidirectional_with_sizes(&mut caller, &mut server, BUFFER, BUFFER).await;
}

/// A line, without reading past it.
async fn request(caller: &mut UnixStream) -> Option<Request> {
    let mut line = String::new();
    while line.len() < MAX_LINE {
        line.push(char::from(caller.read_u8().await.ok()?));
        if line.ends_with('\n') {
            return Request::parse(&line);
        }
    }
    None
}
