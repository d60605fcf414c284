//! Ports of this machine that lead to a guest's, or to its screen.
//!
//! Each connection to one becomes a connection to the VM's process, as `console` makes one,
//! and that asks the network's responder: only who may control the VM gets there.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::callers;
use super::reach::Reach;
use crate::error::{Context, Error, Result};

/// Connections at once of one port; who comes beyond that waits.
const AT_ONCE: usize = 128;
/// How long to rest when the system has no descriptor or memory for a connection.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// `[ADDRESS:]LOCAL:PORT`: a port here, 0 for any, and a port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    pub local: SocketAddr,
    pub port: u16,
}

impl FromStr for Forward {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            let text = text.escape_debug();
            Error::usage(format!("`{text}` does not say which port leads to which: {why}"))
                .help("such as `8080:80`, `0:80` or `[::1]:8080:80`")
        };
        let number = |text: &str| text.parse::<u16>();
        let (rest, port) = text.rsplit_once(':').ok_or_else(|| wrong("it has no `:`"))?;
        let port = number(port).map_err(|_| wrong("the guest's port is no number below 65536"))?;
        if port == 0 {
            return Err(wrong("the guest's port cannot be 0"));
        }
        let (address, local) = match rest.rsplit_once(':') {
            Some((address, local)) => (Some(address), local),
            None => (None, rest),
        };
        let local = number(local).map_err(|_| wrong("the local port is no number below 65536"))?;
        let address: IpAddr = match address {
            None => Ipv4Addr::LOCALHOST.into(),
            Some(text) => {
                let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
                let address = bare.unwrap_or(text).parse();
                address.map_err(|_| wrong("what stands first is no IP address"))?
            }
        };
        Ok(Self { local: (address, local).into(), port })
    }
}

/// Where connections lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    /// A TCP port of the guest.
    Port(u16),
    Screen,
}

/// A port here that somebody listens at: us.
#[derive(Debug)]
pub struct Listening {
    listener: TcpListener,
    to: To,
    /// Whether other machines reach it: then it was asked to be open to all, here, too.
    open: bool,
}

impl Listening {
    /// # Errors
    /// When the port is taken, or the address is not this machine's.
    pub async fn bind(forward: Forward) -> Result<Self> {
        Self::bind_to(forward.local, To::Port(forward.port)).await
    }

    /// A port that leads to the VM's screen, and that programs of this user alone reach.
    ///
    /// # Errors
    /// When the port is taken.
    pub async fn bind_screen(port: u16) -> Result<Self> {
        Self::bind_to((Ipv4Addr::LOCALHOST, port).into(), To::Screen).await
    }

    async fn bind_to(local: SocketAddr, to: To) -> Result<Self> {
        let listener = TcpListener::bind(local).await;
        let doing = || format!("listening at {local}");
        let listener = listener
            .while_doing(doing)
            .map_err(|error| error.help("take another port; 0 finds one that is free"))?;
        let open = !local.ip().to_canonical().is_loopback();
        Ok(Self { listener, to, open })
    }

    /// # Errors
    /// When the system does not say.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().while_doing(|| "looking at the local port".into())
    }

    /// Serves it for ever. What keeps a connection from its guest is told to `trouble`.
    pub async fn serve(self, way: Arc<Reach>, trouble: mpsc::Sender<Error>) {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        let mut connections = JoinSet::new();
        loop {
            let place = room.clone().acquire_owned().await.expect("it is never closed");
            let Ok((client, caller)) = self.listener.accept().await else {
                sleep(EXHAUSTED).await;
                continue;
            };
            while connections.try_join_next().is_some() {}
            let (way, trouble, to) = (way.clone(), trouble.clone(), self.to);
            let open = self.open;
            connections.spawn(async move {
                let _place = place;
                let may = if open { Ok(()) } else { allowed(&client, caller) };
                let carried = match may {
                    Ok(()) => carry(client, &way, to).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = carried {
                    // One that is not told is one of many.
                    let _ = trouble.try_send(error);
                }
            });
        }
    }
}

/// At an address that no other machine reaches, only programs of this user (and root's) are
/// served.
fn allowed(client: &TcpStream, caller: SocketAddr) -> Result<()> {
    let ours = client.local_addr().while_doing(|| "looking at a connection".into())?;
    let us = nix::unistd::geteuid().as_raw();
    match callers::owner(caller, ours)? {
        Some(user) if user == us || user == 0 => Ok(()),
        Some(user) => {
            Err(Error::system(format!("turned away a program of another user (uid {user})"))
                .help("to let everybody in, listen at another address: `0.0.0.0:LOCAL:PORT`"))
        }
        // What it has sent may be another user's.
        None => Err(Error::system("turned away a program that has hung up already")),
    }
}

/// One connection. Whose guest does not take it is told by a reset, as the guest would.
async fn carry(mut client: TcpStream, way: &Reach, to: To) -> Result<()> {
    let guest = async {
        let vm = way.connect().await?;
        match to {
            To::Port(port) => vm.connect_guest(port).await,
            To::Screen => vm.connect_display().await,
        }
    };
    let mut guest = match guest.await {
        Ok(guest) => guest,
        Err(error) => {
            // It ends as it can.
            let _ = client.set_zero_linger();
            return Err(error);
        }
    };
    // Keystrokes must not wait for one another; where it fails they do.
    let _ = client.set_nodelay(true);
    // It has ended, one way or another.
    let _ = copy_bidirectional(&mut client, &mut guest).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_where_is_read_from_its_end() {
        for (text, local) in [
            ("8080:80", "127.0.0.1:8080"),
            ("0:80", "127.0.0.1:0"),
            ("0.0.0.0:1:80", "0.0.0.0:1"),
            ("[::1]:8080:80", "[::1]:8080"),
            ("::1:8080:80", "[::1]:8080"),
        ] {
            let forward: Forward = text.parse().unwrap();
            assert_eq!(forward, Forward { local: local.parse().unwrap(), port: 80 }, "{text}");
        }
        for wrong in ["", "80", ":", "80:", ":80", "1:0", "1:65536", "vm0:1:80", "-1:80", "1:80:"] {
            let error = wrong.parse::<Forward>().unwrap_err();
            assert!(error.report().contains("such as `8080:80`"), "{wrong}");
        }
    }
}
