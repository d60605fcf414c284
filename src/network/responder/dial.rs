//! Connections that the cluster's user asks for: from a Unix socket, which only that user may
//! connect to, to any port of a guest.
//!
//! The socket is all the proof there is of who asks. A guest sees its gateway come, as it
//! does at published ports. Who comes when there are as many connections as there may be is
//! told so: one that waited would take a place from who asks for another guest.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::publish::{BUFFER, EXHAUSTED, PER_CONNECTION, connect, is_of_one_connection, permit};
use crate::error::Error;
use crate::model::dial::{Answer, MAX_LINE, PER_GUEST, PER_NETWORK, Request};

/// How long a caller may take to say what it wants, and how many may be about to.
const REQUEST: Duration = Duration::from_secs(5);
const ASKING: usize = 64;

/// The socket.
#[derive(Debug)]
pub struct Dial {
    listener: UnixListener,
    room: Arc<Room>,
}

impl Dial {
    pub fn new(listener: UnixListener, guests: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        Self { listener, room: Arc::new(Room::new(guests)) }
    }

    /// How many descriptors it needs.
    pub fn descriptors(&self) -> u64 {
        let connections = PER_NETWORK.min(self.room.guests.len() * PER_GUEST);
        (1 + ASKING + PER_CONNECTION * connections) as u64
    }

    /// Serves it for ever.
    pub async fn serve(self) -> Error {
        let mut connections = JoinSet::new();
        let asking = Arc::new(Semaphore::new(ASKING));
        loop {
            let asks = permit(&asking).await;
            let caller = match self.listener.accept().await {
                Ok((caller, _)) => caller,
                Err(error) if is_of_one_connection(&error) => continue,
                Err(error) => {
                    tracing::warn!("accepting a connection to a guest: {error}");
                    sleep(EXHAUSTED).await;
                    continue;
                }
            };
            while connections.try_join_next().is_some() {}
            connections.spawn(carry(caller, self.room.clone(), asks));
        }
    }
}

/// How many connections there may be.
#[derive(Debug)]
struct Room {
    guests: BTreeMap<Ipv4Addr, Arc<Semaphore>>,
    all: Arc<Semaphore>,
}

impl Room {
    fn new(guests: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        let own = |guest| (guest, Arc::new(Semaphore::new(PER_GUEST)));
        let guests = guests.into_iter().map(own).collect();
        Self { guests, all: Arc::new(Semaphore::new(PER_NETWORK)) }
    }

    /// A place for a connection to this guest, or why there is none.
    fn take(&self, guest: Ipv4Addr) -> Result<[OwnedSemaphorePermit; 2], Answer> {
        let own = self.guests.get(&guest).ok_or(Answer::Unknown)?;
        let place = |room: &Arc<Semaphore>| room.clone().try_acquire_owned();
        let busy = |_| Answer::Busy;
        Ok([place(own).map_err(busy)?, place(&self.all).map_err(busy)?])
    }
}

/// One caller, until both sides are done, or one fails.
async fn carry(mut caller: UnixStream, room: Arc<Room>, asks: OwnedSemaphorePermit) {
    let Ok(Some(request)) = timeout(REQUEST, request(&mut caller)).await else { return };
    let place = room.take(request.address);
    let guest = SocketAddrV4::new(request.address, request.port);
    let (answer, server) = match &place {
        Err(answer) => (*answer, None),
        Ok(_) => {
            drop(asks);
            reach(guest).await
        }
    };
    if caller.write_all(answer.line().as_bytes()).await.is_err() {
        return;
    }
    let Some(mut server) = server else { return };
    // Keystrokes must not wait for one another; where it fails they do.
    let _ = server.set_nodelay(true);
    let _ = copy_bidirectional_with_sizes(&mut caller, &mut server, BUFFER, BUFFER).await;
}

async fn reach(guest: SocketAddrV4) -> (Answer, Option<TcpStream>) {
    match connect(guest).await {
        Ok(server) => (Answer::Connected, Some(server)),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            (Answer::Refused, None)
        }
        Err(_) => (Answer::Silent, None),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_guest_takes_its_share_and_all_of_them_no_more_than_there_is() {
        let guest = |rank: u8| Ipv4Addr::new(10, 200, 0, rank);
        let room = Room::new((1..=9).map(guest));
        let take = |rank| room.take(guest(rank));
        let mut first: Vec<_> = (0..PER_GUEST).map(|_| take(1).unwrap()).collect();
        assert_eq!(take(1).unwrap_err(), Answer::Busy);
        let places = (2..=9).flat_map(|rank| std::iter::repeat_with(move || rank).take(PER_GUEST));
        let others: Vec<_> = places.map_while(|rank| take(rank).ok()).collect();
        assert_eq!(first.len() + others.len(), PER_NETWORK);
        // A refusal keeps no place, of a guest that has some neither.
        assert_eq!(take(9).unwrap_err(), Answer::Busy);
        first.pop();
        assert!(take(9).is_ok());
        assert_eq!(room.take([192, 0, 2, 2].into()).unwrap_err(), Answer::Unknown);
    }
}
