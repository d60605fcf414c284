//! Commands in the guests of a cluster: one connection each, all at the same time.
//!
//! What a command writes is taken as it is shown: nothing is held but what the protocol's
//! credit allows, and one that is not read keeps only itself waiting.

pub mod place;

use std::sync::Arc;

use pavo_agent::{
    Credit, Decoder, Event, Exit, Failure, Frame, Kind, Opening, PIECE, Size, Started, WINDOW,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::agent::AT_ONCE;
use super::reach::Pass;
use crate::error::{Context, Error, Result};
use crate::host::limits::raise_open_files;
use crate::model::job::JobRecord;
use crate::store::Store;
use crate::vm::control::Connection;

/// What is heard of a command.
#[derive(Debug)]
pub enum Heard {
    Started(Started),
    Output(Vec<u8>),
    Errors(Vec<u8>),
    /// An entry of a list.
    Item(pavo_agent::Command),
    /// The last: how it ended.
    Exit(Exit),
    /// The last: it could not be run, and what a shell would exit with.
    Failed(Failure),
    /// The last: whoever should have told more is gone.
    Lost(Error),
}

/// What is told to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Signal(u8),
    Resize(Size),
    /// Let it go on without us, if it may.
    Leave,
}

/// A command that was started, or is about to be.
#[derive(Debug)]
pub struct Running {
    pub rank: u32,
    /// Pieces of at most [`PIECE`] bytes; an empty one ends it. Taken as the command reads.
    pub input: mpsc::Sender<Arc<[u8]>>,
    pub orders: mpsc::Sender<Order>,
}

/// Commands that run; they end with it.
#[derive(Debug)]
pub struct Commands {
    pub all: Vec<Running>,
    heard: mpsc::Receiver<(usize, Heard)>,
    _tasks: JoinSet<()>,
}

impl Commands {
    /// Starts all of them: which VM, and what there.
    pub fn start(
        store: Option<Arc<dyn Store>>,
        job: &JobRecord,
        openings: Vec<(u32, Opening)>,
    ) -> Self {
        raise_open_files();
        // Few: what is not shown yet stays with its command.
        let (tell, heard) = mpsc::channel(16);
        let (job, pass) = (Arc::new(job.clone()), Arc::new(Pass::default()));
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        let (mut all, mut tasks) = (Vec::new(), JoinSet::new());
        for (index, (rank, opening)) in openings.into_iter().enumerate() {
            let (input, typed) = mpsc::channel(1);
            let (orders, ordered) = mpsc::channel(8);
            all.push(Running { rank, input, orders });
            let (store, job, pass) = (store.clone(), job.clone(), pass.clone());
            let (turns, tell) = (turns.clone(), tell.clone());
            tasks.spawn(async move {
                let session = async {
                    let turn = turns.acquire().await.expect("it is never closed");
                    let stream = pass.reach(store.as_deref(), &job, rank).await?;
                    let stream = stream.connect().await?.exec().await?;
                    let mut session = Session::new(index, stream, tell.clone());
                    session.open(&opening).await?;
                    // One that does not answer keeps no other waiting.
                    drop(turn);
                    session.converse(typed, ordered).await
                };
                if let Err(error) = session.await {
                    // Who asked may have left.
                    let _ = tell.send((index, Heard::Lost(error))).await;
                }
            });
        }
        Self { all, heard, _tasks: tasks }
    }

    /// The next that is heard, and of which; `None` after the last of all.
    pub async fn next(&mut self) -> Option<(usize, Heard)> {
        self.heard.recv().await
    }
}

/// One connection.
struct Session {
    index: usize,
    from: ReadHalf<Box<dyn Connection>>,
    to: WriteHalf<Box<dyn Connection>>,
    decoder: Decoder,
    tell: mpsc::Sender<(usize, Heard)>,
    /// What may be typed.
    credit: usize,
}

impl Session {
    fn new(index: usize, stream: Box<dyn Connection>, tell: mpsc::Sender<(usize, Heard)>) -> Self {
        let (from, to) = tokio::io::split(stream);
        Self { index, from, to, decoder: Decoder::in_step(), tell, credit: WINDOW as usize }
    }

    /// Says something. Where nobody listens any more, what was said before tells why.
    async fn say(&mut self, kind: Kind, payload: impl Into<Vec<u8>>) {
        let bytes = Frame::new(1, kind, payload).bytes();
        if self.to.write_all(&bytes).await.is_ok() {
            let _ = self.to.flush().await;
        }
    }

    async fn open(&mut self, opening: &Opening) -> Result<()> {
        let bytes = opening.encode();
        if bytes.len() > pavo_agent::MAX_OPENING {
            return Err(Error::usage("the command with its environment and script is too long")
                .help("give at most 1 MiB; copy large files into the guest: `pavo cp`"));
        }
        let mut pieces = bytes.chunks(pavo_agent::MAX_PAYLOAD).peekable();
        while let Some(piece) = pieces.next() {
            let kind = if pieces.peek().is_some() { Kind::Part } else { Kind::Open };
            self.say(kind, piece).await;
        }
        Ok(())
    }

    /// The next frame. Safe to drop.
    async fn next(&mut self) -> Result<Frame> {
        let mut bytes = [0; 16 << 10];
        loop {
            match self
                .decoder
                .next_event()
                .while_doing(|| "listening to the VM's process".into())?
            {
                Some(Event::Frame(frame)) => return Ok(frame),
                Some(Event::Mark(_)) => return Err(gone()),
                None => {}
            }
            match self.from.read(&mut bytes).await {
                Ok(0) | Err(_) => return Err(gone()),
                Ok(count) => self.decoder.push(&bytes[..count]),
            }
        }
    }

    async fn converse(
        &mut self,
        mut typed: mpsc::Receiver<Arc<[u8]>>,
        mut orders: mpsc::Receiver<Order>,
    ) -> Result<()> {
        let mut typing = true;
        loop {
            tokio::select! {
                frame = self.next() => if self.take(frame?).await? {
                    return Ok(());
                },
                Some(order) = orders.recv() => match order {
                    Order::Signal(signal) => self.say(Kind::Signal, [signal]).await,
                    Order::Resize(size) => self.say(Kind::Resize, size.encode()).await,
                    Order::Leave => self.say(Kind::Close, []).await,
                },
                piece = typed.recv(), if typing && self.credit >= PIECE => match piece {
                    Some(piece) if !piece.is_empty() => {
                        self.credit -= piece.len();
                        self.say(Kind::Data, &*piece).await;
                    }
                    _ => {
                        typing = false;
                        self.say(Kind::End, []).await;
                    }
                },
            }
        }
    }

    /// Passes on what a frame says; whether it is the last.
    async fn take(&mut self, frame: Frame) -> Result<bool> {
        let doing = || "reading what the VM's process says".to_owned();
        let (length, kind) = (frame.payload.len() as u32, frame.kind);
        let heard = match kind {
            Kind::Started => Heard::Started(Started::decode(&frame.payload).while_doing(doing)?),
            Kind::Data => Heard::Output(frame.payload),
            Kind::Errors => Heard::Errors(frame.payload),
            Kind::Item => {
                Heard::Item(pavo_agent::Command::decode(&frame.payload).while_doing(doing)?)
            }
            Kind::Credit => {
                let Credit(more) = Credit::decode(&frame.payload).while_doing(doing)?;
                self.credit = self.credit.saturating_add(more as usize).min(WINDOW as usize);
                return Ok(false);
            }
            Kind::Exit => Heard::Exit(Exit::decode(&frame.payload).while_doing(doing)?),
            Kind::Fail => {
                let failure = Failure::decode(&frame.payload).while_doing(doing)?;
                // That is ours: it has told nothing of the command.
                match failure.code {
                    255 => Heard::Lost(Error::system(failure.why)),
                    _ => Heard::Failed(failure),
                }
            }
            kind => return Err(Error::system(format!("the VM's process says {kind:?}"))),
        };
        if self.tell.send((self.index, heard)).await.is_err() {
            return Ok(true);
        }
        if kind.is_output() {
            self.say(Kind::Credit, Credit(length).encode()).await;
        }
        Ok(kind.ends())
    }
}

/// Nobody says why.
pub(super) fn gone() -> Error {
    Error::system("the VM, or its process, has ended").help("see how it is: `pavo status`")
}
