//! The agent in a VM's guest, for whoever may control the VM.
//!
//! ```text
//! commands ── control connections ──┐
//!   relay   one stream each         ├─ line ── org.pavo.agent.0 ── pavo-agent
//!   hello   who answers ────────────┘  one reader, one writer, for the VM's life
//!   pcocc     where there is no pavo-agent, pcocc's (its images)
//!   fallback  where there is neither, QEMU's
//! ```
//!
//! A serial port, also where the host has vhost-vsock: a CID is one for the whole host, and who
//! is on it may connect to every guest's ports, whosever it is. This end of a serial port is a
//! socket in the folder of the VM's owner.
//!
//! The protocol is that of [`pavo_agent`]. A guest is believed nothing: what is not in step
//! with it is an error of this VM, and the line begins anew.

mod assume;
mod clock;
mod fallback;
mod freeze;
mod inbox;
mod line;
pub mod pcocc;
mod relay;
mod streams;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pavo_agent::{Frame, Hello, Kind};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::guest_agent;
use crate::error::{Error, Result};
pub use assume::{Assumed, lacks};
pub use freeze::Frozen;
pub use line::{Line, Port};
pub use relay::Relay;
use streams::Streams;

/// The name of the port's device in QEMU, which its events have.
pub const DEVICE: &str = "pavo-agent";

pub use pcocc::NAME as PCOCCS;
/// What QEMU's agent is called.
pub const QEMUS: &str = "qemu-ga";

/// How long an agent that is there may take to say so again, at least and at most.
const PONG: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// The longest that one question waits for an agent.
pub const LONGEST: Duration = Duration::from_secs(30);
/// How often QEMU's agent is asked meanwhile.
const ASK: Duration = Duration::from_secs(3);

/// What is known of the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Presence {
    /// Nothing in the guest has opened its port.
    #[default]
    Away,
    /// Something has, and has not answered yet.
    Silent,
    Here,
    /// It did not keep to the protocol.
    Wrong(String),
}

/// Who answers in a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// `pavo-agent`, `pcocc-agent`, or `qemu-ga`, of which nothing more is known.
    pub agent: String,
    pub version: String,
    #[serde(default)]
    pub hostname: String,
    #[serde(default)]
    pub boot_id: String,
    #[serde(default)]
    pub uptime_ms: u64,
    #[serde(default)]
    pub cores: u32,
    /// What it can do beside running commands.
    #[serde(default)]
    pub features: Vec<String>,
}

impl From<Hello> for Answer {
    fn from(hello: Hello) -> Self {
        Self {
            agent: "pavo-agent".into(),
            version: hello.agent,
            hostname: hello.hostname,
            boot_id: hello.boot_id,
            uptime_ms: hello.uptime,
            cores: hello.cores,
            features: hello.features,
        }
    }
}

impl Answer {
    /// All that QEMU's agent tells.
    fn of_qemu(version: String) -> Self {
        Self { agent: QEMUS.into(), version, ..Self::default() }
    }
}

/// The way to a guest's agent; clones share it.
#[derive(Clone, Debug)]
pub struct Agent {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    /// The VM's directory, where the socket to QEMU's agent is.
    dir: PathBuf,
    presence: watch::Sender<Presence>,
    pcocc: pcocc::Link,
    /// Whether its guest is still another.
    strange: watch::Sender<bool>,
    streams: Mutex<Streams>,
    /// To the guest, each for one conversation.
    out: mpsc::Sender<(u64, Vec<u8>)>,
}

impl Agent {
    /// One for a VM, and the lines that have to be served: ours and pcocc's.
    pub fn new(name: String, dir: PathBuf) -> (Self, Line, pcocc::Line) {
        let (out, queue) = mpsc::channel(16);
        let presence = watch::Sender::new(Presence::Away);
        let (pcocc, pcoccs) = pcocc::Link::new(name.clone());
        let (strange, streams) = (watch::Sender::new(false), Mutex::default());
        let shared = Shared { name, dir, presence, pcocc, strange, streams, out };
        let agent = Self { shared: Arc::new(shared) };
        let line = Line::new(agent.clone(), queue);
        (agent, line, pcoccs)
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.shared.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_here(&self) -> bool {
        *self.shared.presence.borrow() == Presence::Here
    }

    /// Asks the agent who it is, and waits so long for one, [`LONGEST`] at most.
    ///
    /// # Errors
    /// When none answers.
    pub async fn hello(&self, patience: Duration) -> Result<Answer> {
        let end = Instant::now() + patience.min(LONGEST);
        let mut strange = self.shared.strange.subscribe();
        let known = strange.wait_for(|strange| !strange);
        if timeout_at(end, known).await.is_err() {
            return Err(self.check_known().err().unwrap_or_else(|| self.absence()));
        }
        self.answer(end).await
    }

    /// As long as a guest is still another, nobody speaks to its agent.
    pub fn set_strange(&self, strange: bool) {
        self.shared.strange.send_replace(strange);
    }

    fn check_known(&self) -> Result<()> {
        if !*self.shared.strange.borrow() {
            return Ok(());
        }
        let name = &self.shared.name;
        Err(Error::system(format!("the guest has begun from a snapshot and is not {name} yet"))
            .help("wait until it is: `pavo wait`"))
    }

    async fn answer(&self, end: Instant) -> Result<Answer> {
        let mut presence = self.shared.presence.subscribe();
        let mut pcoccs = self.shared.pcocc.presence();
        loop {
            if self.is_here() {
                let limit = end.saturating_duration_since(Instant::now()).clamp(PONG.0, PONG.1);
                match self.ping(limit).await {
                    Ok(hello) => return Ok(hello.into()),
                    Err(error) if Instant::now() >= end => return Err(error),
                    Err(_) => {}
                }
            } else if self.shared.pcocc.is_here() {
                let limit = end.saturating_duration_since(Instant::now()).clamp(PONG.0, PONG.1);
                match self.shared.pcocc.hello(limit).await {
                    Some(answer) => return Ok(answer),
                    None if Instant::now() >= end => return Err(self.absence()),
                    None => {}
                }
            }
            let again = (Instant::now() + ASK).min(end);
            let nobody = async {
                match fallback::version(&self.shared.dir).await {
                    Ok(version) => Some(version),
                    Err(_) => {
                        sleep_until(again).await;
                        None
                    }
                }
            };
            tokio::select! {
                // Ours is preferred.
                biased;
                _ = presence.wait_for(|presence| *presence == Presence::Here) => {}
                _ = pcoccs.wait_for(|presence| *presence == Presence::Here) => {}
                version = nobody => match version {
                    Some(version) => return Ok(Answer::of_qemu(version)),
                    None if Instant::now() >= end => return Err(self.absence()),
                    None => {}
                }
            }
        }
    }

    /// Why there is none to ask.
    fn absence(&self) -> Error {
        let own = self.shared.presence.borrow().clone();
        let pcoccs = || self.shared.pcocc.presence().borrow().clone();
        match if own == Presence::Away { pcoccs() } else { own } {
            Presence::Away => Error::system("no agent answers in the guest").help(
                "wait until it has booted: `pavo wait --for agent`; of other images than pavo's \
                 own: `agent: inject` in the template",
            ),
            Presence::Silent | Presence::Here => Error::system("the guest's agent does not answer")
                .help(
                    "see whether the VM is paused: `pavo status`; and what its guest does: \
                     `pavo console -l VM`",
                ),
            Presence::Wrong(why) => Error::system("the guest's agent is not to be trusted")
                .because(format!("it has sent {why}"))
                .help("start it again in the guest, or all of the guest: `pavo reset VM`"),
        }
    }

    async fn ping(&self, limit: Duration) -> Result<Hello> {
        let (tell, told) = oneshot::channel();
        let (token, epoch) = self.streams().ping(tell);
        let frame = Frame::new(0, Kind::Ping, token.to_le_bytes());
        let exchange = async {
            self.shared.out.send((epoch, frame.bytes())).await.ok()?;
            told.await.ok()
        };
        let hello = timeout(limit, exchange).await;
        self.streams().forget_ping(token);
        hello.ok().flatten().ok_or_else(|| self.absence())
    }

    /// A stream to the agent, to be carried; where there is only pcocc's or QEMU's, to that.
    ///
    /// # Errors
    /// When neither answers, or too many are open.
    pub async fn connect(&self) -> Result<Relay> {
        self.connect_within(PONG.1).await
    }

    async fn connect_within(&self, patience: Duration) -> Result<Relay> {
        self.check_known()?;
        if !self.is_here() && self.shared.pcocc.is_here() {
            let session = self.shared.pcocc.begin(patience).await;
            return session.ok_or_else(|| self.absence())?.check_room().map(Relay::Pcocc);
        }
        if !self.is_here() {
            if guest_agent::Agent::connect(&self.shared.dir).await.is_ok() {
                return Ok(Relay::fallback(self.shared.dir.clone()));
            }
            // It may have come meanwhile.
            if !self.is_here() {
                return Err(self.absence());
            }
        }
        // A guest that stands still would run what it is told once it goes on, when nobody
        // waits for it any more.
        self.ping(patience).await?;
        Relay::begin(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pavo_agent::{Credit, Decoder, Event, Exit, Failure, Opening, mark};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::net::UnixStream;
    use tokio::task::JoinHandle;

    /// A VM whose guest is this test.
    struct Vm {
        agent: Agent,
        port: watch::Sender<Port>,
        guest: UnixStream,
        decoder: Decoder,
    }

    impl Vm {
        fn new() -> Self {
            let (ours, guest) = UnixStream::pair().unwrap();
            let (port, opened) = watch::channel(Port::default());
            let (agent, line, _) = Agent::new("vm0".into(), "/nonexistent".into());
            tokio::spawn(line.serve(ours, opened));
            Self { agent, port, guest, decoder: Decoder::new() }
        }

        fn change(&self, open: bool) {
            self.port.send_modify(|port| *port = Port { changes: port.changes + 1, open });
        }

        async fn hear(&mut self) -> Event {
            let mut bytes = [0; 4096];
            loop {
                if let Some(event) = self.decoder.next_event().unwrap() {
                    return event;
                }
                let count = self.guest.read(&mut bytes).await.unwrap();
                assert!(count > 0, "the line has ended");
                self.decoder.push(&bytes[..count]);
            }
        }

        async fn say(&mut self, stream: u32, kind: Kind, payload: impl Into<Vec<u8>>) {
            self.guest.write_all(&Frame::new(stream, kind, payload).bytes()).await.unwrap();
        }

        async fn pong(&mut self, token: &[u8]) {
            let hello = Hello { version: 1, hostname: "tiny".into(), ..Hello::default() };
            self.say(0, Kind::Pong, [token, &hello.encode()].concat()).await;
        }

        /// Answers as an agent that begins.
        async fn begin(&mut self) {
            loop {
                if let Event::Mark(nonce) = self.hear().await {
                    self.guest.write_all(&mark(&nonce)).await.unwrap();
                    break;
                }
            }
            self.pong(&[0; 8]).await;
            let mut presence = self.agent.shared.presence.subscribe();
            presence.wait_for(|presence| *presence == Presence::Here).await.unwrap();
        }

        /// A client with a stream, which the guest has heard of under this number.
        async fn client(&mut self) -> (DuplexStream, u32, JoinHandle<()>) {
            let agent = self.agent.clone();
            let relay = tokio::spawn(async move { agent.connect().await });
            let Event::Frame(ping) = self.hear().await else { panic!("no frame") };
            assert_eq!(ping.kind, Kind::Ping);
            self.pong(&ping.payload).await;
            let relay = relay.await.unwrap().unwrap();
            let (mut client, mut theirs) = tokio::io::duplex(1 << 20);
            let carried = tokio::spawn(async move { relay.carry(&mut theirs).await });
            let open = Frame::new(1, Kind::Open, Opening::List.encode());
            client.write_all(&open.bytes()).await.unwrap();
            let Event::Frame(heard) = self.hear().await else { panic!("no frame") };
            assert_eq!((heard.kind, &heard.payload), (open.kind, &open.payload));
            (client, heard.stream, carried)
        }
    }

    /// The last that a client hears.
    async fn last(mut client: DuplexStream) -> Frame {
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.unwrap();
        let mut decoder = Decoder::in_step();
        decoder.push(&heard);
        let mut last = None;
        while let Some(Event::Frame(frame)) = decoder.next_event().unwrap() {
            last = Some(frame);
        }
        last.unwrap()
    }

    fn why(frame: &Frame) -> String {
        Failure::decode(&frame.payload).unwrap().why
    }

    #[tokio::test]
    async fn an_agent_is_found_when_it_comes_and_missed_when_it_has_gone() {
        let mut vm = Vm::new();
        let error = vm.agent.hello(Duration::ZERO).await.unwrap_err().report();
        assert!(error.contains("no agent answers") && error.contains("agent: inject"), "{error}");
        let waiting = vm.agent.clone();
        let waiting = tokio::spawn(async move { waiting.hello(LONGEST).await });
        vm.change(true);
        // What another left half said is passed over.
        vm.guest.write_all(&Frame::new(9, Kind::Exit, [1; 50]).bytes()[7..]).await.unwrap();
        vm.begin().await;
        let Event::Frame(ping) = vm.hear().await else { panic!("no frame") };
        vm.pong(&ping.payload).await;
        assert_eq!(waiting.await.unwrap().unwrap().hostname, "tiny");

        let (client, ..) = vm.client().await;
        vm.change(false);
        assert_eq!(why(&last(client).await), "the guest's agent has ended");
        assert!(vm.agent.connect().await.is_err());
        vm.change(true);
        vm.begin().await;
        vm.client().await;
    }

    #[tokio::test]
    async fn a_guest_that_lies_is_an_error_until_it_begins_anew() {
        let long = u32::MAX.wrapping_sub(1).to_le_bytes().to_vec();
        let nobodys = Frame::new(77, Kind::Data, *b"x").bytes();
        let mut vm = Vm::new();
        vm.change(true);
        vm.begin().await;
        for lie in [Some(long), Some(nobodys), None] {
            let (client, stream, _) = vm.client().await;
            let credit = || Frame::new(stream, Kind::Credit, Credit(1).encode()).bytes();
            let lie = lie.unwrap_or_else(credit);
            vm.guest.write_all(&lie).await.unwrap();
            let said = why(&last(client).await);
            assert!(said.starts_with("the guest's agent has sent "), "{said}");
            let error = vm.agent.connect().await.unwrap_err().report();
            assert!(error.contains("is not to be trusted"), "{error}");
            // What it says meanwhile is not listened to.
            vm.guest.write_all(&[0xff; 5000]).await.unwrap();
            vm.begin().await;
        }
    }

    #[tokio::test]
    async fn a_guest_that_stands_still_is_an_error_and_is_told_nothing_to_run() {
        let mut vm = Vm::new();
        vm.change(true);
        vm.begin().await;
        let error = vm.agent.connect_within(Duration::from_millis(50)).await.unwrap_err();
        assert!(error.report().contains("agent does not answer"), "{}", error.report());
        assert!(error.report().contains("is paused"), "{}", error.report());
        // It goes on, and answers late: that is nobody's, and no lie.
        let Event::Frame(ping) = vm.hear().await else { panic!("no frame") };
        vm.pong(&ping.payload).await;
        vm.client().await;
    }

    #[tokio::test]
    async fn who_is_gone_is_told_of_and_the_agent_has_the_last_word() {
        let mut vm = Vm::new();
        vm.change(true);
        vm.begin().await;
        let (client, stream, carried) = vm.client().await;
        drop(client);
        carried.await.unwrap();
        let Event::Frame(close) = vm.hear().await else { panic!("no frame") };
        assert_eq!((close.stream, close.kind), (stream, Kind::Close));
        // What was under way is no lie, and nobody's.
        vm.say(stream, Kind::Data, b"late".as_slice()).await;
        vm.say(stream, Kind::Exit, Exit::Left.encode()).await;
        let (client, other, _) = vm.client().await;
        assert_ne!(other, stream);
        vm.say(other, Kind::Exit, Exit::Code(3).encode()).await;
        assert_eq!(Exit::decode(&last(client).await.payload).unwrap(), Exit::Code(3));
    }

    #[tokio::test]
    async fn a_client_that_is_wrong_ends_its_own_stream() {
        let mut vm = Vm::new();
        vm.change(true);
        vm.begin().await;
        let (mut client, stream, _) = vm.client().await;
        client.write_all(&Frame::new(1, Kind::Exit, []).bytes()).await.unwrap();
        let said = last(client).await;
        assert!(why(&said).starts_with("the request is not understood"), "{said:?}");
        let Event::Frame(close) = vm.hear().await else { panic!("no frame") };
        assert_eq!((close.stream, close.kind), (stream, Kind::Close));
    }
}
