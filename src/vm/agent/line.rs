//! The line to the guest: one reader and one writer, from QEMU's start to its end.

use pavo_agent::{Decoder, Event, Frame, Malformed, Nonce, mark};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, sleep_until};

use super::{Agent, Presence};

/// Before one that was not in step is asked anew.
const PAUSE: Duration = Duration::from_secs(1);

/// Whether the guest has opened the port, and how often that has changed: it may have been
/// closed and opened between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Port {
    pub changes: u64,
    pub open: bool,
}

/// What is to be served.
#[derive(Debug)]
pub struct Line {
    agent: Agent,
    queue: mpsc::Receiver<(u64, Vec<u8>)>,
}

impl Line {
    pub(super) fn new(agent: Agent, queue: mpsc::Receiver<(u64, Vec<u8>)>) -> Self {
        Self { agent, queue }
    }

    /// Serves the guest at the other end of `stream` until QEMU closes it. `port` says when
    /// the guest has opened its end.
    pub async fn serve(self, stream: UnixStream, port: watch::Receiver<Port>) {
        let (mut from, to) = stream.into_split();
        let (marks, marked) = mpsc::channel(1);
        let writer = write(self.agent.clone(), to, marked, self.queue);
        let mut reader = Reader { agent: self.agent, decoder: Decoder::new(), nonce: None, marks };
        tokio::select! {
            () = reader.read(&mut from, port) => {}
            () = writer => {}
        }
        reader.begin("its VM has ended", false).await;
    }
}

struct Reader {
    agent: Agent,
    decoder: Decoder,
    /// What is to come back before anything counts.
    nonce: Option<Nonce>,
    /// To the writer: a conversation begins.
    marks: mpsc::Sender<(u64, Nonce)>,
}

impl Reader {
    async fn read(
        &mut self,
        from: &mut (impl AsyncReadExt + Unpin),
        mut port: watch::Receiver<Port>,
    ) {
        let mut bytes = vec![0; 32 << 10];
        let mut again: Option<Instant> = None;
        if port.borrow_and_update().open {
            self.begin("it has only begun", true).await;
        }
        loop {
            let pause = async {
                match again {
                    Some(time) => sleep_until(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // What the guest does with its port comes before what it says there.
                biased;
                changed = port.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    again = None;
                    let open = port.borrow_and_update().open;
                    self.begin("the guest's agent has ended", open).await;
                }
                () = pause => {
                    again = None;
                    self.begin("the guest's agent is asked anew", true).await;
                }
                count = from.read(&mut bytes) => match count {
                    Ok(0) | Err(_) => return,
                    Ok(count) => {
                        // What is said before it is asked is of nobody we know.
                        if again.is_none() && self.nonce_or_here() {
                            self.decoder.push(&bytes[..count]);
                            if let Err(wrong) = self.take_all() {
                                self.distrust(&wrong);
                                again = Some(Instant::now() + PAUSE);
                            }
                        }
                    }
                },
            }
        }
    }

    fn nonce_or_here(&self) -> bool {
        self.nonce.is_some() || self.agent.is_here()
    }

    /// Forgets what was, and asks who is there if the port is open.
    async fn begin(&mut self, why: &str, open: bool) {
        let epoch = self.agent.streams().begin_anew(why);
        self.decoder = Decoder::new();
        self.nonce = None;
        let presence = if open { Presence::Silent } else { Presence::Away };
        self.agent.shared.presence.send_replace(presence);
        if open {
            let mut nonce = [0; 16];
            // Without it another's leftovers might count, and no more.
            let _ = getrandom::fill(&mut nonce);
            self.nonce = Some(nonce);
            // The writer ends with us.
            let _ = self.marks.send((epoch, nonce)).await;
        }
    }

    fn take_all(&mut self) -> Result<(), Malformed> {
        while let Some(event) = self.decoder.next_event()? {
            match event {
                Event::Mark(nonce) if self.nonce == Some(nonce) => self.nonce = None,
                // Of an earlier conversation; ours follows.
                Event::Mark(_) if self.nonce.is_some() => self.decoder.lose_step(),
                Event::Mark(_) => return Err(Malformed("a beginning in the middle".into())),
                // What follows a beginning that is not ours.
                Event::Frame(_) if self.nonce.is_some() => {}
                Event::Frame(frame) => self.take(frame)?,
            }
        }
        Ok(())
    }

    fn take(&mut self, frame: Frame) -> Result<(), Malformed> {
        let is_hello = frame.stream == 0;
        self.agent.streams().hear_guest(frame)?;
        if is_hello && !self.agent.is_here() {
            self.agent.shared.presence.send_replace(Presence::Here);
        }
        Ok(())
    }

    fn distrust(&mut self, wrong: &Malformed) {
        tracing::info!("the agent of {}: {wrong}", self.agent.shared.name);
        let why = format!("the guest's agent has sent {wrong}");
        self.agent.streams().begin_anew(&why);
        self.nonce = None;
        self.agent.shared.presence.send_replace(Presence::Wrong(wrong.to_string()));
    }
}

/// Writes what is to be said, frame by frame: what is begun is brought to its end, also when
/// the guest takes it late.
async fn write(
    agent: Agent,
    mut to: OwnedWriteHalf,
    mut marked: mpsc::Receiver<(u64, Nonce)>,
    mut queue: mpsc::Receiver<(u64, Vec<u8>)>,
) {
    let mut begun = 0;
    loop {
        let bytes = tokio::select! {
            biased;
            Some((epoch, nonce)) = marked.recv() => {
                begun = epoch;
                mark(&nonce)
            }
            Some((epoch, bytes)) = queue.recv() => {
                // For another agent, which is gone.
                if epoch != begun || agent.streams().epoch() != epoch {
                    continue;
                }
                bytes
            }
            else => return,
        };
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
