//! pcocc's agent, in images that were made for pcocc: what `pavo run` needs of it.
//!
//! ```text
//! relay ── command   one client: what it wants, in the agent's words
//!             └── link ── exchange ── line ── pcocc_agent ── pcocc's agent
//! ```
//!
//! That agent runs programs as any user, with their output apart, and takes their input. What it
//! has no words for is done by a shell in the guest: changing the folder as that user, telling
//! the number of the process, and signals other than SIGKILL. It has no flow control either:
//! a command that is read slowly is detached from until there is room again.

mod command;
mod exchange;
mod exec;
mod line;
mod prepare;
mod wire;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::{Answer, Presence};
use crate::error::{Error, Result};
pub(super) use command::carry;
use exchange::{Exchange, Listener};
pub use line::Line;
use wire::{Fields, Kind, Said};

/// The port's name in the guest.
pub const PORT: &str = "pcocc_agent";
/// The name of the port's device in QEMU, which its events have.
pub const DEVICE: &str = "pcocc-agent";
/// What this agent is called.
pub const NAME: &str = "pcocc-agent";

/// How long the agent may take for what is done at once.
const ANSWER: Duration = Duration::from_secs(30);
/// How long it may take to say hello before it is asked again.
const GREETING: Duration = Duration::from_secs(10);
/// As many requests wait for a guest that does not read.
const QUEUE: usize = 512;

/// Ends what an earlier conversation has left: all that the agent has started and that it still
/// waits for, with their process groups.
const END_ALL: &str = r#"for at in /proc/[0-9]*; do
    { read -r line <"$at/stat"; } 2>/dev/null || continue
    pid=${at#/proc/}
    set -- ${line##*) }
    [ "$2" = "$PPID" ] && [ "$pid" != "$$" ] && kill -9 "-$pid"
done"#;

/// The way to pcocc's agent of a guest; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    presence: watch::Sender<Presence>,
    exchange: Mutex<Exchange>,
    /// To the guest, each for one conversation.
    out: mpsc::Sender<(u64, Vec<u8>)>,
}

/// A question that was asked. Who gives it up forgets it.
struct Asked {
    link: Link,
    tag: i64,
    told: oneshot::Receiver<exchange::Answer>,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.link.exchange().forget(self.tag);
    }
}

impl Asked {
    /// The answer, or why there is none.
    async fn answer(mut self) -> exchange::Answer {
        (&mut self.told).await.unwrap_or_else(|_| Err(ended()))
    }
}

fn ended() -> String {
    "the guest's agent has ended".into()
}

impl Link {
    pub(super) fn new(name: String) -> (Self, Line) {
        let (out, queue) = mpsc::channel(QUEUE);
        let presence = watch::Sender::new(Presence::Away);
        let shared = Shared { name, presence, exchange: Mutex::default(), out };
        let link = Self { shared: Arc::new(shared) };
        (link.clone(), Line::new(link, queue))
    }

    fn exchange(&self) -> MutexGuard<'_, Exchange> {
        self.shared.exchange.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn presence(&self) -> watch::Receiver<Presence> {
        self.shared.presence.subscribe()
    }

    pub(super) fn is_here(&self) -> bool {
        *self.shared.presence.borrow() == Presence::Here
    }

    fn send(&self, epoch: u64, line: Vec<u8>) -> std::result::Result<(), String> {
        self.shared
            .out
            .try_send((epoch, line))
            .map_err(|_| "the guest's agent does not answer".into())
    }

    /// Asks for something; `of` is the type of the question.
    fn ask(
        &self,
        epoch: u64,
        name: &'static str,
        of: &str,
        data: Fields,
    ) -> std::result::Result<Asked, String> {
        let (tell, told) = oneshot::channel();
        let tag = {
            let mut exchange = self.exchange();
            if exchange.epoch() != epoch {
                return Err(ended());
            }
            exchange.ask(name, tell)
        };
        let asked = Asked { link: self.clone(), tag, told };
        self.send(epoch, wire::line(Kind::Request, name, tag, of, data))?;
        Ok(asked)
    }

    /// Asks for something that is done at once.
    async fn get(
        &self,
        epoch: u64,
        name: &'static str,
        of: &str,
        data: Fields,
    ) -> exchange::Answer {
        let asked = self.ask(epoch, name, of, data)?;
        let answer = timeout(ANSWER, asked.answer()).await;
        answer.unwrap_or_else(|_| Err("the guest's agent does not answer".into()))
    }

    /// Attaches to a command; its output comes to the listener. Returns the stream's tag.
    fn attach(&self, epoch: u64, id: i64, listener: Listener) -> std::result::Result<i64, String> {
        let tag = {
            let mut exchange = self.exchange();
            if exchange.epoch() != epoch {
                return Err(ended());
            }
            exchange.attach(id, listener)
        };
        let data = Fields::default().signed(2, id);
        let line = wire::line(Kind::StreamRequest, "attach", tag, "AttachMessage", data);
        self.send(epoch, line).inspect_err(|_| self.exchange().forget(tag))?;
        Ok(tag)
    }

    /// Runs a line of a shell in the guest, as root, for a moment.
    async fn shell(&self, epoch: u64, line: &str, words: &[&str]) -> exchange::Answer {
        let words = [&["-c", line, "sh"], words].concat();
        let data = Fields::default().bytes(1, "/bin/sh").items(2, &words).number(3, 10);
        self.get(epoch, "execoutput", "ExecOutputMessage", data).await
    }

    /// Who answers, if one does within this time.
    pub(super) async fn hello(&self, limit: Duration) -> Option<Answer> {
        let epoch = self.exchange().epoch();
        let ask = async {
            let empty = Fields::default;
            let hostname = self.ask(epoch, "hostname", "HostnameMessage", empty())?;
            let cores = self.ask(epoch, "corecount", "CoreCountMessage", empty())?;
            let mut answer =
                Answer { agent: NAME.into(), version: "1".into(), ..Answer::default() };
            if let Said::Hostname(name) = hostname.answer().await? {
                answer.hostname = name;
            }
            if let Said::Cores(cores) = cores.answer().await? {
                answer.cores = cores;
            }
            Ok::<_, String>(answer)
        };
        timeout(limit, ask).await.ok()?.ok()
    }

    /// Whether it still answers: the conversation for a client.
    pub(super) async fn begin(&self, limit: Duration) -> Option<Session> {
        let epoch = self.exchange().epoch();
        let asked = self.ask(epoch, "hello", "HelloMessage", Fields::default()).ok()?;
        timeout(limit, asked.answer()).await.ok()?.ok()?;
        Some(Session { link: self.clone(), epoch })
    }
}

/// A conversation, for one client.
#[derive(Debug)]
pub struct Session {
    link: Link,
    epoch: u64,
}

impl Session {
    /// # Errors
    /// When too many commands run.
    pub(super) fn check_room(self) -> Result<Self> {
        let most = pavo_agent::MAX_STREAMS;
        if self.link.exchange().running.len() < most {
            return Ok(self);
        }
        Err(Error::system(format!("{most} commands run in {} already", self.link.shared.name))
            .help("wait until some have ended, or end them: `pavo agent kill`"))
    }
}
