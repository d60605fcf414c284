//! One control connection and one stream to the agent: frames go to and fro.

use std::path::PathBuf;
use std::time::Duration;

use pavo_agent::{Decoder, Event, Failure, Frame, Kind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::inbox::{self, Inbox};
use super::pcocc::{self, Session};
use super::{Agent, fallback};
use crate::error::{Error, Result};

/// As many bytes are sent to a client at once.
const BATCH: usize = 64 << 10;
/// How long a client may take to hang up that was told all.
const FAREWELL: Duration = Duration::from_secs(3);

/// A stream, before it is carried.
#[derive(Debug)]
pub enum Relay {
    Ours(Stream),
    Pcocc(Session),
    /// QEMU's agent, at the socket in this directory.
    Qemu(PathBuf),
}

/// A stream to our agent.
#[derive(Debug)]
pub struct Stream {
    agent: Agent,
    number: u32,
    epoch: u64,
    from: Inbox,
    /// Whether the guest has heard of it.
    begun: bool,
}

impl Relay {
    pub(super) fn begin(agent: &Agent) -> Result<Self> {
        let opened = agent.streams().open();
        let (number, epoch, from) = opened.ok_or_else(|| {
            let most = pavo_agent::MAX_STREAMS;
            Error::system(format!("{most} commands run in {} already", agent.shared.name))
                .help("wait until some have ended, or end them: `pavo agent kill`")
        })?;
        Ok(Self::Ours(Stream { agent: agent.clone(), number, epoch, from, begun: false }))
    }

    pub(super) fn fallback(dir: PathBuf) -> Self {
        Self::Qemu(dir)
    }

    /// Carries frames until the stream is over, or the client gone.
    pub async fn carry(self, client: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
        match self {
            Self::Ours(stream) => stream.carry(client).await,
            Self::Pcocc(session) => pcocc::carry(session, client).await,
            Self::Qemu(dir) => fallback::carry(&dir, client).await,
        }
    }
}

impl Stream {
    async fn carry(mut self, client: &mut (impl AsyncRead + AsyncWrite + Unpin)) {
        let (mut from_client, mut to_client) = tokio::io::split(client);
        let mut guest = std::mem::replace(&mut self.from, inbox::channel().1);
        let down = pass_on(&mut guest, &mut to_client);
        let wrong = tokio::select! {
            // A client that is gone is told nothing more.
            _ = down => None,
            wrong = self.take(&mut from_client) => match wrong {
                Some(why) => Some(why),
                None => return,
            },
        };
        if let Some(why) = wrong {
            let last = Frame::new(0, Kind::Fail, Failure { why, code: 255 }.encode());
            let _ = to_client.write_all(&last.bytes()).await;
        }
        hang_up(&mut from_client, &mut to_client).await;
    }

    /// Takes what the client says, until it is gone, or wrong: then why.
    async fn take(&mut self, client: &mut (impl AsyncRead + Unpin)) -> Option<String> {
        let mut decoder = Decoder::in_step();
        let mut bytes = vec![0; 32 << 10];
        loop {
            let count = client.read(&mut bytes).await.ok().filter(|count| *count > 0)?;
            decoder.push(&bytes[..count]);
            loop {
                let frame = match decoder.next_event() {
                    Ok(Some(Event::Frame(frame))) => frame,
                    Ok(Some(Event::Mark(_))) => return Some("a beginning in the middle".into()),
                    Ok(None) => break,
                    Err(wrong) => return Some(wrong.to_string()),
                };
                let passed = self.agent.streams().hear_client(self.number, frame);
                match passed {
                    Ok(Some(frame)) => {
                        self.begun = true;
                        // The VM ends: so does this connection.
                        self.agent.shared.out.send((self.epoch, frame.bytes())).await.ok()?;
                    }
                    Ok(None) => {}
                    Err(wrong) => return Some(format!("the request is not understood: {wrong}")),
                }
            }
        }
    }
}

/// Passes frames on to a client until the stream is over, or the client gone.
pub(super) async fn pass_on(from: &mut Inbox, to: &mut (impl AsyncWrite + Unpin)) {
    while let Some(frame) = from.recv().await {
        let mut over = frame.kind.ends();
        let mut bytes = frame.bytes();
        // What is there already goes with the first.
        while !over && bytes.len() < BATCH {
            let Some(next) = from.try_recv() else { break };
            over = next.kind.ends();
            next.write(&mut bytes);
        }
        if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() || over {
            return;
        }
    }
}

/// Were the client cut off while it still speaks, it might never hear the last word.
pub(super) async fn hang_up(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) {
    let hung_up = async {
        let _ = to.shutdown().await;
        let mut ignored = [0; 4096];
        while matches!(from.read(&mut ignored).await, Ok(1..)) {}
    };
    let _ = timeout(FAREWELL, hung_up).await;
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut streams = self.agent.streams();
        if !self.begun {
            streams.forget(self.number);
        } else if streams.is_open(self.number, self.epoch) {
            // The agent says the last word. It may take a while until it hears of this.
            let close = Frame::new(self.number, Kind::Close, []).bytes();
            let (out, epoch) = (self.agent.shared.out.clone(), self.epoch);
            tokio::spawn(async move { drop(out.send((epoch, close)).await) });
        }
    }
}
