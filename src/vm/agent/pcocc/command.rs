//! One client of pcocc's agent: what it wants, in that agent's words.

use pavo_agent::{
    Credit, Decoder, Event as Heard, Exit, Failure, Frame, Kind, MAX_OPENING, Opening,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, split};
use tokio::sync::mpsc;

use super::super::inbox::{self, Sender};
use super::super::relay::{hang_up, pass_on};
use super::Session;
use super::exchange::Running;
use super::exec;
use super::wire::Said;

/// Serves a client.
pub(in super::super) async fn carry(
    session: Session,
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
) {
    let (mut from_client, mut to_client) = split(client);
    let (say, mut said) = inbox::channel();
    let (tell, frames) = mpsc::channel(4);
    let up = async {
        hear(&mut from_client, tell).await;
        // Who is gone is missed by the conversation.
        std::future::pending::<()>().await;
    };
    let work = Conversation { session, frames, say }.converse();
    let down = pass_on(&mut said, &mut to_client);
    tokio::select! {
        _ = async { tokio::join!(work, down) } => {}
        () = up => {}
    }
    hang_up(&mut from_client, &mut to_client).await;
}

/// Passes on what the client says until it is gone, or wrong.
async fn hear(from: &mut (impl AsyncRead + Unpin), tell: mpsc::Sender<Frame>) {
    let mut decoder = Decoder::in_step();
    let mut bytes = vec![0; 16 << 10];
    loop {
        match decoder.next_event() {
            Ok(Some(Heard::Frame(frame))) => {
                if tell.send(frame).await.is_err() {
                    return;
                }
                continue;
            }
            Ok(Some(Heard::Mark(_))) | Err(_) => return,
            Ok(None) => {}
        }
        match from.read(&mut bytes).await {
            Ok(count @ 1..) => decoder.push(&bytes[..count]),
            _ => return,
        }
    }
}

/// What cannot be done, and is said instead.
pub(super) fn fail(code: u8, why: impl Into<String>) -> Failure {
    Failure { why: why.into(), code }
}

/// The same of what is lost, or was never begun.
pub(super) fn lost(why: impl Into<String>) -> Failure {
    fail(255, why)
}

/// What pcocc's agent has no words for.
pub(super) fn lacks(what: &str) -> Failure {
    lost(format!(
        "only pcocc's agent answers in this guest, and it {what}; give the image pavo's own: \
         `agent: inject` in the template"
    ))
}

/// One with a client.
#[derive(Debug)]
pub(super) struct Conversation {
    pub session: Session,
    /// What the client says. It ends when the client is gone.
    pub frames: mpsc::Receiver<Frame>,
    /// To the client.
    pub say: Sender,
}

impl Conversation {
    pub fn say(&self, kind: Kind, payload: impl Into<Vec<u8>>) {
        self.say.send(Frame::new(1, kind, payload));
    }

    async fn converse(mut self) {
        let Some(opening) = self.opening().await else { return };
        match self.serve(&opening).await {
            Ok(exit) => self.say(Kind::Exit, exit.encode()),
            Err(failure) => self.say(Kind::Fail, failure.encode()),
        }
    }

    async fn opening(&mut self) -> Option<Vec<u8>> {
        let mut opening = Vec::new();
        loop {
            let frame = self.frames.recv().await?;
            if opening.len() + frame.payload.len() > MAX_OPENING {
                self.say(Kind::Fail, lost("the request is too long").encode());
                return None;
            }
            opening.extend(&frame.payload);
            match frame.kind {
                Kind::Open => return Some(opening),
                Kind::Part => {}
                _ => return None,
            }
        }
    }

    async fn serve(&mut self, opening: &[u8]) -> Result<Exit, Failure> {
        let opening = Opening::decode(opening);
        match opening.map_err(|wrong| lost(format!("the request is not understood: {wrong}")))? {
            Opening::Exec(exec) => exec::run(self, exec).await,
            Opening::List => Ok(self.list()),
            Opening::Kill { id, signal } => self.kill(id, signal).await,
            Opening::Copy(_) => Err(lacks("copies no files")),
            Opening::Attach { .. } => Err(lacks("lets no command be left")),
            Opening::Assume => Err(lacks("cannot become another guest")),
            Opening::Freeze { .. } => Err(lacks("cannot freeze file systems")),
        }
    }

    /// The commands of this VM's process: the agent's own list has neither words nor users.
    fn list(&self) -> Exit {
        let running = self.session.link.exchange().running.clone();
        let mut credit = pavo_agent::WINDOW as usize;
        for (id, Running { pid, user, words, began }) in running {
            let seconds = began.elapsed().as_secs();
            let (id, pid) = (id as u64, pid.unwrap_or_default());
            let item =
                pavo_agent::Command { id, pid, user, words, seconds, attached: true, exit: None };
            let item = item.encode();
            // There are as many as streams, each of a line.
            credit = credit.saturating_sub(item.len());
            if credit > 0 {
                self.say(Kind::Item, item);
            }
        }
        Exit::Code(0)
    }

    async fn kill(&self, id: u64, signal: u8) -> Result<Exit, Failure> {
        let Session { link, epoch } = &self.session;
        let number = i64::try_from(id).unwrap_or_default();
        let found = link.exchange().running.get(&number).map(|running| running.pid);
        let pid = found.ok_or_else(|| fail(1, format!("there is no command {id}")))?;
        let pid = pid.ok_or_else(|| fail(1, format!("command {id} has not begun")))?;
        match link.shell(*epoch, exec::SIGNAL, &[&signal.to_string(), &pid.to_string()]).await {
            Ok(Said::Refused(why)) => Err(fail(1, why)),
            Ok(_) => Ok(Exit::Code(0)),
            Err(why) => Err(lost(why)),
        }
    }
}

/// So much may be sent again.
pub(super) fn credit(bytes: usize) -> Vec<u8> {
    Credit(bytes as u32).encode().into()
}
