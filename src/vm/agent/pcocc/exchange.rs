//! What was asked of pcocc's agent, and whose the answers are. Pure: no line, no clock.
//!
//! Each conversation has numbers (tags) of its own: what answers an earlier one, before a
//! checkpoint or a guest that lied, is nobody's and no lie.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use pavo_agent::Malformed;
use tokio::sync::{mpsc, oneshot};

use super::wire::{Kind, Message, Piece, Said};

/// How much output may wait for a client, in bytes, and for all of a VM's: far more than
/// comes until an agent has heard that no more is wanted.
const MAX_HELD: usize = 4 << 20;
const MAX_HELD_ALL: usize = 16 << 20;
/// What each piece counts besides its own bytes.
const ENTRY: usize = 64;

/// What comes to who is attached to a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    Attached,
    Piece(Piece),
    /// It sends no more until it is attached to again.
    Detached,
    /// Its exit code; -1 if a signal killed it.
    Status(i32),
    Refused(String),
    /// The conversation is over.
    Lost(String),
}

/// An answer, or why there will be none.
pub type Answer = Result<Said, String>;

/// What waits for a client, counted for it and for all.
#[derive(Clone, Debug)]
pub struct Held {
    own: Arc<AtomicUsize>,
    all: Arc<AtomicUsize>,
}

impl Held {
    /// Whether there is room for so many bytes.
    fn add(&self, bytes: usize) -> bool {
        let own = self.own.fetch_add(bytes + ENTRY, Ordering::Relaxed);
        let all = self.all.fetch_add(bytes + ENTRY, Ordering::Relaxed);
        own < MAX_HELD && all < MAX_HELD_ALL
    }

    /// A piece of which so many bytes are left waits no longer.
    pub fn taken(&self, bytes: usize) {
        self.shrunk(bytes + ENTRY);
    }

    /// So many bytes of a piece wait no longer.
    pub fn shrunk(&self, bytes: usize) {
        self.own.fetch_sub(bytes, Ordering::Relaxed);
        self.all.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // The last of a client's: what it has not taken is no longer there.
        if Arc::strong_count(&self.own) == 1 {
            self.all.fetch_sub(self.own.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

/// To who is attached.
#[derive(Clone, Debug)]
pub struct Listener {
    pub to: mpsc::UnboundedSender<Event>,
    pub held: Held,
}

#[derive(Debug)]
enum Waiter {
    One(&'static str, oneshot::Sender<Answer>),
    Attached(i64, Listener),
}

/// A command that runs, for who asks which do.
#[derive(Clone, Debug)]
pub struct Running {
    /// Not known before it has said so.
    pub pid: Option<u32>,
    pub user: String,
    pub words: String,
    pub began: Instant,
}

/// One conversation after the other.
#[derive(Debug, Default)]
pub struct Exchange {
    epoch: u64,
    /// The high half of this conversation's tags.
    base: u32,
    last: u32,
    waiting: HashMap<i64, Waiter>,
    /// Whether the agent has answered at all.
    greeted: bool,
    last_id: i64,
    all: Arc<AtomicUsize>,
    pub running: BTreeMap<i64, Running>,
}

impl Exchange {
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether what is no message is an error, and not another's leftovers.
    pub fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// A new conversation begins. Who waited in the last one is told why in vain.
    pub fn begin_anew(&mut self, why: &str, base: u32) -> u64 {
        for (_, waiter) in self.waiting.drain() {
            // Who waited may have given up.
            match waiter {
                Waiter::One(_, tell) => drop(tell.send(Err(why.into()))),
                Waiter::Attached(_, listener) => {
                    drop(listener.to.send(Event::Lost(why.into())));
                }
            }
        }
        self.epoch += 1;
        // A tag is never negative.
        (self.base, self.last, self.greeted) = (base >> 1, 0, false);
        self.running.clear();
        self.epoch
    }

    /// A place where output is held.
    pub fn held(&self) -> Held {
        Held { own: Arc::default(), all: self.all.clone() }
    }

    /// Numbers that the agent has given to others are not used.
    pub fn skip_ids(&mut self, known: &[i64]) {
        // One that has used up all numbers lies.
        let known = known.iter().filter(|id| **id < 1 << 40).max();
        self.last_id = self.last_id.max(known.copied().unwrap_or_default());
    }

    pub fn new_id(&mut self) -> i64 {
        self.last_id += 1;
        self.last_id
    }

    fn tag(&mut self, waiter: Waiter) -> i64 {
        self.last += 1;
        let tag = i64::from(self.base) << 32 | i64::from(self.last);
        self.waiting.insert(tag, waiter);
        tag
    }

    /// The tag of a question.
    pub fn ask(&mut self, name: &'static str, tell: oneshot::Sender<Answer>) -> i64 {
        self.tag(Waiter::One(name, tell))
    }

    /// The tag under which a command is attached to.
    pub fn attach(&mut self, id: i64, listener: Listener) -> i64 {
        self.tag(Waiter::Attached(id, listener))
    }

    /// Nobody waits for it any more.
    pub fn forget(&mut self, tag: i64) {
        self.waiting.remove(&tag);
    }

    /// Takes a message of the agent's. An error is one of the whole line.
    pub fn hear(&mut self, message: Message) -> Result<(), Malformed> {
        let Message { kind, name, tag, said } = message;
        if (tag >> 32) != i64::from(self.base) {
            return Ok(());
        }
        if (tag & i64::from(u32::MAX)) > i64::from(self.last) {
            return Err(Malformed("an answer to no question".into()));
        }
        let wrong = |said: &Said| {
            let text = format!("{said:?}");
            let text = text.split(['(', '{']).next().unwrap_or_default().trim();
            Malformed(format!("{text} as an answer to `{name}`"))
        };
        match self.waiting.remove(&tag) {
            // Who asked has given up.
            None => {}
            Some(Waiter::One(asked, tell)) => {
                if kind != Kind::Reply || name != asked || !answers(asked, &said) {
                    return Err(wrong(&said));
                }
                self.greeted = true;
                let _ = tell.send(Ok(said));
            }
            Some(Waiter::Attached(id, listener)) => {
                // Until it is over, whoever listens is told when all is lost.
                self.waiting.insert(tag, Waiter::Attached(id, listener.clone()));
                let event = match (kind, said) {
                    (Kind::StreamReply, Said::Done("AttachResult")) => Event::Attached,
                    (Kind::StreamReply, Said::Piece(piece)) => {
                        if piece.id != 0 && piece.id != id {
                            return Err(Malformed("another command's output".into()));
                        }
                        Event::Piece(piece)
                    }
                    (Kind::Reply, Said::Done("DetachResult")) => Event::Detached,
                    (Kind::Reply, Said::Status(status)) => Event::Status(status),
                    (Kind::Reply, Said::Refused(why)) => Event::Refused(why),
                    (_, said) => return Err(wrong(&said)),
                };
                self.pass(tag, &listener, event)?;
            }
        }
        Ok(())
    }

    /// Passes on what has come to who listens. What was not over is, where nobody does.
    fn pass(&mut self, tag: i64, listener: &Listener, event: Event) -> Result<(), Malformed> {
        let goes_on = matches!(event, Event::Piece(_) | Event::Attached);
        if let Event::Piece(piece) = &event {
            // The end of one of its streams says nothing: its own end follows.
            if piece.bytes.is_empty() {
                return Ok(());
            }
            if !listener.held.add(piece.bytes.len()) {
                return Err(Malformed("more output than was asked for".into()));
            }
        }
        let is_heard = listener.to.send(event).is_ok();
        if !goes_on || !is_heard {
            self.waiting.remove(&tag);
        }
        Ok(())
    }
}

/// Whether this may be said to that question.
fn answers(asked: &str, said: &Said) -> bool {
    match (asked, said) {
        (_, Said::Refused(_)) => asked != "hello",
        ("hello", Said::Hello(version)) => *version > 0,
        ("hostname", Said::Hostname(_)) | ("corecount", Said::Cores(_)) => true,
        ("userinfo", Said::Home(_)) | ("listexec", Said::Commands(_)) => true,
        ("execoutput", Said::Returned(_)) | ("writefile", Said::Written(_)) => true,
        ("execve", Said::Done(done)) => *done == "ExecResult",
        ("detach", Said::Done(done)) => *done == "DetachResult",
        ("kill", Said::Done(done)) => *done == "KillResult",
        ("remove", Said::Done(done)) => *done == "RemoveResult",
        ("stdin", Said::Done(done)) => *done == "IOResult",
        ("resize", Said::Done(done)) => ["IOResult", "ResizeResult"].contains(done),
        _ => false,
    }
}
