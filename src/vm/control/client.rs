//! A command's side of the control protocol.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader,
};
use tokio::time::timeout;

use super::super::agent;
use super::super::channel::Caller;
use super::super::display::Offer;
use super::super::dump::{self, Dumped};
use super::super::save::{Progress, Saved, Wish};
use super::{ANSWER_TIME, Answer, MAX_ANSWER, Op, Participant, Replay, Request, SOCKET, VERSION};
use crate::error::{Context, Error, Kind, Result};
use crate::model::job::VmStatus;

/// Either kind of connection.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// A connection to a VM's process.
pub struct Client {
    stream: BufReader<Box<dyn Connection>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    fn new(stream: impl Connection + 'static) -> Self {
        Self { stream: BufReader::new(Box::new(stream)) }
    }

    /// Connects to the process, on this host, of the VM whose directory this is.
    ///
    /// # Errors
    /// When nobody listens there: the VM has ended or has not begun.
    pub fn connect(dir: &Path) -> Result<Self> {
        super::connect(dir, SOCKET).map(Self::new).map_err(unanswered)
    }

    /// Connects to the process of a VM on whatever host, as a member of its cluster.
    ///
    /// # Errors
    /// When nobody answers there within `limit`, or somebody else does.
    pub async fn connect_remote(
        address: SocketAddr,
        caller: &Caller,
        limit: Duration,
    ) -> Result<Self> {
        caller.connect(&[address], limit).await.map(Self::new).map_err(unanswered)
    }

    /// # Errors
    /// As all requests: when the process is gone, does not answer in time, or
    /// refuses.
    pub async fn status(&mut self) -> Result<VmStatus> {
        let value = self.ask(Op::Status).await?;
        serde_json::from_value(value).while_doing(|| "reading the VM's status".into())
    }

    /// Waits until its status is not that any more, or for some time.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub async fn changed(&mut self, from: &VmStatus) -> Result<VmStatus> {
        let value = self.ask(Op::Changed { from: from.clone() }).await?;
        serde_json::from_value(value).while_doing(|| "reading the VM's status".into())
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub async fn reset(&mut self) -> Result<()> {
        self.ask(Op::Reset { hard: false }).await.map(drop)
    }

    /// Copies the VM's disk into a file that its host sees, too.
    ///
    /// # Errors
    /// As [`status`](Self::status), and when the copy fails; then no file is left.
    pub async fn save(&mut self, wish: Wish, told: &mut impl FnMut(Progress)) -> Result<Saved> {
        let value = self.exchange(Op::Save(wish), told).await?;
        serde_json::from_value(value).while_doing(|| "reading how the disk was saved".into())
    }

    /// Writes the guest's memory to a file of the VM's host.
    ///
    /// # Errors
    /// As [`status`](Self::status), and when it cannot be written; then no file is left.
    pub async fn dump(
        &mut self,
        wish: dump::Wish,
        told: &mut impl FnMut(Progress),
    ) -> Result<Dumped> {
        let value = self.exchange(Op::Dump(wish), told).await?;
        serde_json::from_value(value).while_doing(|| "reading what was written".into())
    }

    /// Takes part in a checkpoint, in a folder that its host sees, too. The guest goes on as
    /// soon as what is returned is gone.
    ///
    /// # Errors
    /// As [`status`](Self::status), and when the VM cannot be written down.
    pub async fn checkpoint(mut self, dir: &Path) -> Result<Participant> {
        let dir = dir.to_owned();
        self.ask(Op::Checkpoint { dir }).await?;
        Ok(Participant::new(self.stream))
    }

    /// Asks anything that is not `console`.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub async fn ask(&mut self, op: Op) -> Result<Value> {
        self.exchange(op, &mut |_| {}).await
    }

    async fn exchange(&mut self, op: Op, told: &mut impl FnMut(Progress)) -> Result<Value> {
        self.say(&Request { version: VERSION, op }, told).await
    }

    async fn say(
        &mut self,
        request: &impl Serialize,
        told: &mut impl FnMut(Progress),
    ) -> Result<Value> {
        let mut line = serde_json::to_vec(request).expect("a request is always valid JSON");
        line.push(b'\n');
        let send = async {
            self.stream.write_all(&line).await?;
            self.stream.flush().await
        };
        in_time(send).await?;
        loop {
            let answer = in_time(self.line()).await?;
            match serde_json::from_slice(&answer).while_doing(|| "reading the answer".into())? {
                Answer::Progress(progress) => told(progress),
                Answer::Return(value) => return Ok(value),
                Answer::Error(error) => return Err(error.into()),
            }
        }
    }

    async fn line(&mut self) -> io::Result<Vec<u8>> {
        rest_of_line(&mut self.stream, &mut Vec::new()).await
    }

    /// Turns the connection into the VM's console: the newest `replay` bytes of
    /// its log, then whatever the guest writes. No time limit is on it.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub async fn console(mut self, replay: usize) -> Result<Viewer> {
        let answer = self.ask(Op::Console { replay }).await?;
        let Replay { replay } =
            serde_json::from_value(answer).while_doing(|| "opening the console".into())?;
        Ok(Viewer { stream: Box::new(self.stream), replay })
    }

    /// Turns the connection into one to a TCP port of the guest. No time limit is on it.
    ///
    /// # Errors
    /// As [`status`](Self::status), and when nothing listens there.
    pub async fn connect_guest(mut self, port: u16) -> Result<Box<dyn Connection>> {
        self.ask(Op::Connect { port }).await?;
        Ok(Box::new(self.stream))
    }

    /// How the guest's screen is seen.
    ///
    /// # Errors
    /// As [`status`](Self::status), and when it has none.
    pub async fn display(&mut self) -> Result<Offer> {
        let value = self.ask(Op::Display { connect: false }).await?;
        serde_json::from_value(value).while_doing(|| "reading how the screen is seen".into())
    }

    /// Turns the connection into one to the guest's screen. No time limit is on it.
    ///
    /// # Errors
    /// As [`display`](Self::display).
    pub async fn connect_display(mut self) -> Result<Box<dyn Connection>> {
        self.ask(Op::Display { connect: true }).await?;
        Ok(Box::new(self.stream))
    }

    /// Asks the guest's agent who it is, waiting so long for one.
    ///
    /// # Errors
    /// As [`status`](Self::status), and when no agent answers.
    pub async fn agent_hello(&mut self, patience: Duration) -> Result<agent::Answer> {
        let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        let value = self.ask(Op::AgentHello { patience_ms }).await?;
        serde_json::from_value(value).while_doing(|| "reading the agent's answer".into())
    }

    /// Turns the connection into a stream of frames to the guest's agent. No time limit is
    /// on it.
    ///
    /// # Errors
    /// As [`status`](Self::status), and when no agent answers.
    pub async fn exec(mut self) -> Result<Box<dyn Connection>> {
        self.ask(Op::Exec).await?;
        Ok(Box::new(self.stream))
    }

    /// Waits for the end of the VM's process, or of the way to it.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub async fn attend(mut self) -> Result<()> {
        self.ask(Op::Attend).await?;
        while !matches!(self.stream.read(&mut [0]).await, Ok(0) | Err(_)) {}
        Ok(())
    }

    /// The newest `limit` bytes of what the VM's console has said.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub async fn log(self, limit: usize) -> Result<Vec<u8>> {
        let mut viewer = self.console(limit).await?;
        let mut log = vec![0; viewer.replay.min(limit)];
        let read = timeout(ANSWER_TIME, viewer.stream.read_exact(&mut log)).await;
        read.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .while_doing(|| "reading the console's log".into())?;
        Ok(log)
    }
}

/// A VM's console, as it is attached to.
pub struct Viewer {
    /// Flush what was written: it may be kept until then.
    pub stream: Box<dyn Connection>,
    /// As many of the first bytes are from the log.
    pub replay: usize,
}

impl std::fmt::Debug for Viewer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Viewer({} from the log)", self.replay)
    }
}

/// A line of answers; what has come of it stays in `answer` where nobody waits to the end.
pub(super) async fn rest_of_line(
    stream: &mut (impl AsyncBufRead + Unpin),
    answer: &mut Vec<u8>,
) -> io::Result<Vec<u8>> {
    let left = (MAX_ANSWER + 1).saturating_sub(answer.len());
    stream.take(left as u64).read_until(b'\n', answer).await?;
    match answer.pop() {
        Some(b'\n') => Ok(std::mem::take(answer)),
        Some(_) if answer.len() == MAX_ANSWER => Err(io::Error::other("the answer is too long")),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Bounds one half of an exchange.
pub(super) async fn in_time<T>(half: impl Future<Output = io::Result<T>>) -> Result<T> {
    let doing = || "asking the VM's process".to_owned();
    match timeout(ANSWER_TIME, half).await {
        Ok(done) => done.while_doing(doing),
        Err(_) => {
            let why = format!("it has not answered within {ANSWER_TIME:?}");
            Err(Error::system(why)).while_doing(doing)
        }
    }
}

fn unanswered(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(Kind::NotFound, "the VM's process does not answer")
        .because(error)
        .help("see how it is: `pavo status`")
}
