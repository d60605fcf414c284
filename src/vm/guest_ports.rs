//! Connections to the ports of a VM's guest, for whoever may control the VM.
//!
//! The guest's network is a namespace that is not this process's: its responder is asked, at
//! the sockets of [`dial`](crate::model::dial).

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::control;
use crate::error::{Context, Error, Result};
use crate::model::dial::{self, Answer, MAX_LINE, PER_GUEST, PER_NETWORK};
use crate::model::vm::VmSpec;

/// How long the responder may take, the guest's time included.
const ANSWER: Duration = Duration::from_secs(10);

/// Where the guest's ports are reached.
#[derive(Clone, Debug)]
pub struct GuestPorts {
    name: String,
    dir: PathBuf,
    /// The guest's networks with addresses, in the order of its interfaces.
    addresses: Vec<(String, Ipv4Addr)>,
    room: Arc<Semaphore>,
}

/// A connection to the guest.
#[derive(Debug)]
pub struct Connected {
    stream: UnixStream,
    _room: OwnedSemaphorePermit,
}

impl GuestPorts {
    pub fn new(spec: &VmSpec) -> Self {
        let address = |nic: &crate::model::vm::Nic| {
            nic.ipv4.as_ref().map(|ipv4| (nic.network.clone(), ipv4.address))
        };
        let outer = || spec.dir.parent().map(PathBuf::from).unwrap_or_default();
        Self {
            name: spec.name(),
            dir: spec.dial.clone().unwrap_or_else(outer),
            addresses: spec.nics.iter().filter_map(address).collect(),
            room: Arc::new(Semaphore::new(PER_GUEST)),
        }
    }

    /// Connects to a port, at the first of the guest's addresses that takes it.
    ///
    /// # Errors
    /// When none does: what is wrong with the first.
    pub async fn connect(&self, port: u16) -> Result<Connected> {
        let room = self.room.clone().try_acquire_owned().map_err(|_| {
            Error::system(format!("{PER_GUEST} connections to {} are open already", self.name))
                .help("close some of them, or wait until they end")
        })?;
        let mut first = None;
        for (network, address) in &self.addresses {
            match self.connect_at(network, *address, port).await {
                Ok(stream) => return Ok(Connected { stream, _room: room }),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or_else(|| {
            let what = format!("{} has no address that pavo gave it", self.name);
            Error::not_found(what).help("give its resource set a network with `network-layer: L3`")
        }))
        .while_doing(|| format!("connecting to port {port} of {}", self.name))
    }

    async fn connect_at(&self, network: &str, address: Ipv4Addr, port: u16) -> Result<UnixStream> {
        let ended = || {
            Error::system(format!("the responder of network `{network}` does not answer"))
                .help("start the cluster anew, if its other ports do not answer either")
        };
        let ask = async {
            let mut stream = control::connect(&self.dir, &dial::socket(network))?;
            let request = dial::Request { address, port };
            stream.write_all(request.line().as_bytes()).await?;
            let mut line = String::new();
            while line.len() < MAX_LINE && !line.ends_with('\n') {
                line.push(char::from(stream.read_u8().await?));
            }
            Ok::<_, std::io::Error>((stream, Answer::parse(&line)))
        };
        let asked = timeout(ANSWER, ask).await.map_err(|_| ended())?;
        let (stream, answer) = asked.map_err(|error| ended().because(error))?;
        match answer {
            Some(Answer::Connected) => Ok(stream),
            Some(Answer::Refused) => Err(Error::system(format!("nothing listens at {address}"))
                .help(format!("start it in the guest: `pavo console {}`", self.name))),
            Some(Answer::Silent) => Err(Error::system(format!("{address} does not answer"))
                .help("wait until the guest has booted: `pavo wait`; does it filter packets?")),
            Some(Answer::Busy) => Err(Error::system(format!(
                "as many connections to guests of network `{network}` are open on this host as \
                 there may be: {PER_GUEST} to one, {PER_NETWORK} to all"
            ))
            .help("close some of them, or wait until they end")),
            Some(Answer::Unknown) | None => Err(ended()),
        }
    }
}

impl Connected {
    /// Carries what both sides have to say, until both are done or one is gone.
    pub async fn carry(&mut self, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
        // It has ended, one way or another.
        let _ = copy_bidirectional(stream, &mut self.stream).await;
    }
}
