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
pub mod exchange;
mod exec;
mod line;
mod prepare;
pub mod wire;

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

#[cfg(test)]
mod tests {
    use super::super::{Agent, Port};
    use super::*;
    use base64ct::{Base64, Encoding};
    use pavo_agent::{Credit, Decoder, Event, Exec, Exit, Failure, Frame, Opening, WINDOW};
    use tokio::io::{
        AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, ReadHalf, WriteHalf,
    };
    use tokio::net::UnixStream;

    /// A VM whose guest is this test.
    struct Vm {
        agent: Agent,
        port: watch::Sender<Port>,
        guest: BufReader<UnixStream>,
    }

    /// A question: its name and tag.
    type Question = (String, i64);

    impl Vm {
        async fn new() -> Self {
            let (ours, guest) = UnixStream::pair().unwrap();
            let (port, opened) = watch::channel(Port::default());
            let (agent, _, line) = Agent::new("vm0".into(), "/nonexistent".into());
            tokio::spawn(line.serve(ours, opened));
            let mut vm = Self { agent, port, guest: BufReader::new(guest) };
            vm.port.send_modify(|port| *port = Port { changes: 1, open: true });
            // Whatever was there before.
            vm.guest.write_all(b"\nhalf a line\nCAES\n").await.unwrap();
            vm.begin().await;
            vm
        }

        async fn hear(&mut self) -> Question {
            loop {
                let mut line = String::new();
                assert!(self.guest.read_line(&mut line).await.unwrap() > 0, "the line has ended");
                if let Some(question) = wire::question(&Base64::decode_vec(line.trim()).unwrap()) {
                    return question;
                }
            }
        }

        async fn say(&mut self, kind: Kind, name: &str, tag: i64, of: &str, data: Fields) {
            let line = wire::line(kind, name, tag, of, data);
            self.guest.write_all(&line).await.unwrap();
        }

        /// Answers a question of this name.
        async fn answer(&mut self, name: &str, of: &str, data: Fields) -> i64 {
            let (asked, tag) = self.hear().await;
            assert_eq!(asked, name);
            self.say(Kind::Reply, name, tag, of, data).await;
            tag
        }

        async fn begin(&mut self) {
            let version = Fields::default().number(2, 1);
            self.answer("hello", "HelloResult", version).await;
            let left = Fields::default().item(1, Fields::default().number(1, 41).into_bytes());
            self.answer("listexec", "ListExecResult", left).await;
            self.answer("execoutput", "ExecOutputResult", Fields::default()).await;
            let mut presence = self.agent.shared.pcocc.presence();
            presence.wait_for(|presence| *presence == Presence::Here).await.unwrap();
        }

        /// A client whose command runs, and the tag of its output.
        async fn client(&mut self) -> (Client, i64) {
            let agent = self.agent.clone();
            let relay = tokio::spawn(async move { agent.connect().await });
            self.answer("hello", "HelloResult", Fields::default().number(2, 1)).await;
            let relay = relay.await.unwrap().unwrap();
            let (client, mut theirs) = tokio::io::duplex(1 << 20);
            tokio::spawn(async move { relay.carry(&mut theirs).await });
            let (from, to) = tokio::io::split(client);
            let mut client = Client { from, to, decoder: Decoder::in_step() };
            let exec = Exec { argv: vec![b"true".into()], input: true, ..Exec::default() };
            client.say(pavo_agent::Kind::Open, Opening::Exec(exec).encode()).await;
            self.answer("userinfo", "UserInfoResult", Fields::default().bytes(3, "/root")).await;
            self.answer("execve", "ExecResult", Fields::default()).await;
            let (name, tag) = self.hear().await;
            assert_eq!(name, "attach");
            self.say(Kind::StreamReply, "attach", tag, "AttachResult", Fields::default()).await;
            self.piece(tag, 2, b"4242\n").await;
            assert_eq!(client.hear().await.kind, pavo_agent::Kind::Started);
            (client, tag)
        }

        async fn piece(&mut self, tag: i64, kind: u64, bytes: &[u8]) {
            let data = Fields::default().number(1, kind).bytes(3, bytes);
            self.say(Kind::StreamReply, "attach", tag, "IOMessage", data).await;
        }
    }

    struct Client {
        from: ReadHalf<DuplexStream>,
        to: WriteHalf<DuplexStream>,
        decoder: Decoder,
    }

    impl Client {
        async fn say(&mut self, kind: pavo_agent::Kind, payload: impl Into<Vec<u8>>) {
            self.to.write_all(&Frame::new(1, kind, payload).bytes()).await.unwrap();
        }

        async fn hear(&mut self) -> Frame {
            let mut bytes = [0; 4096];
            loop {
                if let Some(Event::Frame(frame)) = self.decoder.next_event().unwrap() {
                    return frame;
                }
                let count = self.from.read(&mut bytes).await.unwrap();
                assert!(count > 0, "no last word");
                self.decoder.push(&bytes[..count]);
            }
        }

        /// All that comes until the last word, without giving credit.
        async fn until_end(&mut self) -> (usize, Frame) {
            let mut bytes = 0;
            loop {
                let frame = self.hear().await;
                if frame.kind.ends() {
                    return (bytes, frame);
                }
                bytes += if frame.kind.is_output() { frame.payload.len() } else { 0 };
            }
        }
    }

    #[tokio::test]
    async fn one_that_is_read_slowly_is_detached_from_and_loses_nothing() {
        let mut vm = Vm::new().await;
        let (mut client, tag) = vm.client().await;
        for _ in 0..20 {
            vm.piece(tag, 1, &[b'x'; 32 << 10]).await;
        }
        vm.answer("detach", "DetachResult", Fields::default()).await;
        vm.say(Kind::Reply, "attach", tag, "DetachResult", Fields::default()).await;
        let mut total = 0;
        while total < 20 * (32 << 10) {
            let frame = client.hear().await;
            assert_eq!(frame.kind, pavo_agent::Kind::Data);
            total += frame.payload.len();
            let credit = Credit(frame.payload.len() as u32).encode();
            client.say(pavo_agent::Kind::Credit, credit).await;
        }
        let (name, tag) = vm.hear().await;
        assert_eq!(name, "attach");
        vm.say(Kind::StreamReply, "attach", tag, "AttachResult", Fields::default()).await;
        let status = Fields::default().number(1, 7);
        vm.say(Kind::Reply, "attach", tag, "ExitStatus", status).await;
        let (_, last) = client.until_end().await;
        assert_eq!(Exit::decode(&last.payload).unwrap(), Exit::Code(7));
    }

    #[tokio::test]
    async fn a_guest_that_lies_is_an_error_until_it_begins_anew() {
        let status = |code| Fields::default().number(1, code);
        let mut vm = Vm::new().await;
        for lie in 0..8 {
            let (mut client, tag) = vm.client().await;
            match lie {
                0 => vm.guest.write_all(b"%%%\n").await.unwrap(),
                1 => vm.guest.write_all(&[b'A'; wire::MAX_LINE + 1]).await.unwrap(),
                2 => vm.guest.write_all(b"CAES\n").await.unwrap(),
                3 => vm.say(Kind::Reply, "attach", tag + 9, "ExitStatus", status(0)).await,
                4 => vm.say(Kind::Reply, "attach", tag, "ExitStatus", status(300)).await,
                5 => vm.say(Kind::Reply, "attach", tag, "HelloResult", status(1)).await,
                6 => {
                    let data = Fields::default().number(1, 1).bytes(3, "x").number(4, 999);
                    vm.say(Kind::StreamReply, "attach", tag, "IOMessage", data).await;
                }
                _ => {
                    // It goes on though nothing is wanted any more.
                    for _ in 0..600 {
                        let data = Fields::default().number(1, 1).bytes(3, [0; 16 << 10]);
                        let line = wire::line(Kind::StreamReply, "attach", tag, "IOMessage", data);
                        vm.guest.write_all(&line).await.unwrap();
                    }
                }
            }
            let (bytes, last) = client.until_end().await;
            let why = Failure::decode(&last.payload).unwrap().why;
            assert!(why.starts_with("the guest's agent has sent "), "{lie}: {why}");
            assert!(bytes <= WINDOW as usize);
            let error = vm.agent.connect().await.unwrap_err().report();
            // What is long may still be coming when it is asked anew.
            assert!(lie == 7 || error.contains("is not to be trusted"), "{error}");
            // What was asked meanwhile is nobody's.
            let mut asked = vm.hear().await;
            while asked.0 != "hello" {
                asked = vm.hear().await;
            }
            vm.say(Kind::Reply, "hello", asked.1, "HelloResult", Fields::default().number(2, 1))
                .await;
            vm.answer("listexec", "ListExecResult", Fields::default()).await;
            let mut presence = vm.agent.shared.pcocc.presence();
            presence.wait_for(|presence| *presence == Presence::Here).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_answers_an_earlier_conversation_is_no_lie_and_the_end_is_told() {
        let mut vm = Vm::new().await;
        let (mut client, tag) = vm.client().await;
        let other = tag ^ (1 << 40);
        vm.say(Kind::Reply, "attach", other, "ExitStatus", Fields::default()).await;
        // A reply that comes late, twice.
        let hello = || Fields::default().number(2, 1);
        vm.say(Kind::Reply, "hello", tag - 3, "HelloResult", hello()).await;
        vm.piece(tag, 1, b"still here").await;
        assert_eq!(client.hear().await.payload, b"still here");
        vm.port.send_modify(|port| *port = Port { changes: 2, open: false });
        let (_, last) = client.until_end().await;
        assert_eq!(Failure::decode(&last.payload).unwrap().why, "the guest's agent has ended");
        assert!(vm.agent.connect().await.unwrap_err().report().contains("no agent answers"));
    }

    #[tokio::test]
    async fn a_guest_that_stands_still_is_an_error_and_is_told_nothing_to_run() {
        let mut vm = Vm::new().await;
        let session = vm.agent.shared.pcocc.begin(Duration::from_millis(50)).await;
        assert!(session.is_none());
        assert_eq!(vm.hear().await.0, "hello");
        let (client, _) = vm.client().await;
        // Who is gone has its command ended, with a word first.
        drop(client);
        vm.answer("execoutput", "ExecOutputResult", Fields::default()).await;
        vm.answer("execoutput", "ExecOutputResult", Fields::default()).await;
        vm.answer("execoutput", "ExecOutputResult", Fields::default()).await;
    }
}
