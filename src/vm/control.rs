//! How commands reach a VM's process: `control.sock` in the VM's directory, and from
//! other hosts the cluster's [`channel`](super::channel).
//!
//! A connection carries requests, one JSON object a line, and an answer line for
//! each; `console` turns the connection into the console itself. At the socket only
//! the user that the process runs as, and root, are listened to: the directory is
//! 0700, and the kernel says who connected. On the channel, members of the cluster are.
//!
//! ```text
//! → {"version":1,"op":"monitor","command":"info status"}
//! ← {"return":"VM status: running\r\n"}   or   {"error":{"kind":"system","what":…}}
//! → {"version":1,"op":"console","replay":2000}
//! ← {"return":{"replay":1234}}   then 1234 bytes of the log, then the console
//! → {"version":1,"op":"connect","port":22}
//! ← {"return":null}              then the connection to the guest's port
//! → {"version":1,"op":"exec"}
//! ← {"return":null}              then a stream of frames to the agent (crate `pavo_agent`)
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::console::{Console, Viewing};
use super::display::Screen;
use super::guest_ports::{Connected, GuestPorts};
use super::machine::Stop;
use super::{agent, channel, checkpoint, display, dump, qmp, save, usage};
use crate::error::{Context, Error, Result, WireError};
use crate::model::job::{VmState, VmStatus};

mod client;
mod outcome;
mod participant;
mod request;
mod socket;
mod standing;
mod work;

pub use client::{Client, Connection, Viewer};
use outcome::Outcome;
pub use participant::Participant;
pub use socket::{connect, listen};

/// The version of this protocol. A process answers requests of its own version
/// and older ones.
pub const VERSION: u32 = 1;

/// The socket's name in the VM's directory.
pub const SOCKET: &str = "control.sock";

/// The longest request, in bytes.
const MAX_REQUEST: usize = 64 << 10;
/// The longest answer, in bytes (what QEMU's monitor says at most, and quotes).
const MAX_ANSWER: usize = 2 * qmp::MAX_LINE;
/// How long a client may take for a whole request line.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long the process may take to answer: what QEMU may, and something for us.
const ANSWER_TIME: Duration = Duration::from_secs(40);
/// How long a change is waited for at once: whoever hung up meanwhile is not seen.
const CHANGE_TIME: Duration = Duration::from_secs(10);
/// Connections served at once, from this host and from others each; more wait for their
/// turn. A console takes two: it also learns how its VM fares.
const CONNECTIONS: usize = 128;
/// How long they wait until they are told that they wait in vain.
const TURN: Duration = Duration::from_secs(3);
/// How many may be connected at all.
const CROWD: usize = 4 * CONNECTIONS;
/// How long one that has ended may take to be told so.
const FAREWELL: Duration = Duration::from_secs(1);

/// What can be asked of a VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Op {
    /// Who answers: `{"version":1,"pavo":"0.1.0","vm":"vm0"}`.
    Hello,
    /// A [`VmStatus`].
    Status,
    /// Another [`VmStatus`] than this one, as soon as there is; the same after some time.
    Changed {
        from: VmStatus,
    },
    /// The reset button. If `hard`, the guest runs afterwards, whether it did or not.
    Reset {
        #[serde(default)]
        hard: bool,
    },
    /// The power button; whether it means anything is the guest's business.
    Powerdown,
    Pause,
    Resume,
    /// Ends the VM at once.
    Quit,
    /// A line for QEMU's human monitor; the answer is its text.
    Monitor {
        command: String,
    },
    /// A command of QMP; the answer is its result.
    Qmp {
        command: String,
        #[serde(default)]
        arguments: serde_json::Map<String, Value>,
    },
    /// Copies the disk; says how far it is until it has. Who hangs up wants it no more.
    Save(save::Wish),
    /// Writes the guest's memory to a file; says how far it is until it has.
    Dump(dump::Wish),
    /// Takes part in a checkpoint in this folder, which this connection becomes.
    Checkpoint {
        dir: PathBuf,
    },
    /// The newest `replay` bytes of the console's log, then the console.
    Console {
        replay: usize,
    },
    /// A [`Usage`](usage::Usage).
    Usage,
    /// A connection to this TCP port of the guest, which this one becomes.
    Connect {
        port: u16,
    },
    /// How the guest's screen is seen, an [`Offer`](display::Offer); and, if `connect`, a
    /// connection to it, which this one becomes.
    Display {
        #[serde(default)]
        connect: bool,
    },
    /// Nothing more: the connection ends with the VM.
    Attend,
    /// An [`agent::Answer`] of the guest's agent, which is waited for so long.
    AgentHello {
        #[serde(default)]
        patience_ms: u64,
    },
    /// A stream to the guest's agent, which this connection becomes.
    Exec,
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    version: u32,
    #[serde(flatten)]
    op: Op,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    /// More comes.
    Progress(save::Progress),
    Return(Value),
    Error(WireError),
}

/// What requests act on.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// `vm0`
    pub name: String,
    pub status: watch::Receiver<VmStatus>,
    /// `None` until QEMU answers.
    pub qmp: watch::Receiver<Option<qmp::Client>>,
    pub console: Console,
    pub stop: mpsc::Sender<Stop>,
    /// The VM's directory.
    pub dir: PathBuf,
    /// The size of its disk, in bytes.
    pub disk: Option<u64>,
    /// One copy at a time; how many there were.
    pub saves: Arc<Mutex<u64>>,
    /// What a checkpoint is of.
    pub subject: checkpoint::Subject,
    pub ports: GuestPorts,
    pub screen: Screen,
    pub meter: usage::Meter,
    pub agent: agent::Agent,
}

/// What the answer to `console` returns.
#[derive(Debug, Serialize, Deserialize)]
struct Replay {
    /// As many bytes of the log come first.
    replay: usize,
}

/// Answers requests at the socket until it is dropped.
pub async fn serve(listener: UnixListener, endpoint: Endpoint) {
    let us = nix::unistd::geteuid().as_raw();
    let mut connections = Connections::new(endpoint);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let peer = stream.peer_cred().map(|peer| peer.uid());
                if peer.is_ok_and(|uid| uid == us || uid == 0) {
                    connections.take(stream).await;
                }
            }
            // Out of descriptors: connections that end will free some.
            Err(error) => {
                tracing::warn!("the control socket: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Answers requests of the cluster's members until it is dropped.
pub async fn serve_members(mut listener: channel::Listener, endpoint: Endpoint) {
    let mut connections = Connections::new(endpoint);
    loop {
        let stream = listener.accept().await;
        connections.take(stream).await;
    }
}

/// Those who are connected; they end with it.
struct Connections {
    endpoint: Endpoint,
    turns: Arc<Semaphore>,
    tasks: JoinSet<()>,
}

impl Connections {
    fn new(endpoint: Endpoint) -> Self {
        let turns = Arc::new(Semaphore::new(CONNECTIONS));
        Self { endpoint, turns, tasks: JoinSet::new() }
    }

    /// Serves one more; waits only where there is a crowd already.
    async fn take(&mut self, mut stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        while self.tasks.try_join_next().is_some() {}
        if self.tasks.len() >= CROWD {
            self.tasks.join_next().await;
        }
        let (endpoint, turns) = (self.endpoint.clone(), self.turns.clone());
        self.tasks.spawn(async move {
            match timeout(TURN, turns.acquire_owned()).await {
                Ok(Ok(turn)) => converse(stream, endpoint, turn).await,
                // It is never closed.
                Ok(Err(_)) => {}
                Err(_) => {
                    let busy = format!("{} is asked by {CONNECTIONS} others", endpoint.name);
                    let busy = Error::system(busy)
                        .help("close consoles that nobody looks at, or try again");
                    // It may be gone already.
                    let _ = say(&mut stream, &Answer::Error(busy.to_wire())).await;
                    let _ = timeout(FAREWELL, stream.shutdown()).await;
                }
            }
        });
    }
}

/// One connection, until it ends or sends what is no request.
async fn converse(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    endpoint: Endpoint,
    turn: OwnedSemaphorePermit,
) {
    let becomes = answer_requests(&mut stream, &endpoint).await;
    match becomes {
        Some(Becomes::Console(mut console)) => console.show(&mut stream).await,
        Some(Becomes::Guest(mut guest)) => {
            // They have a limit of their own; who has a question is not kept waiting.
            drop(turn);
            guest.carry(&mut stream).await;
        }
        Some(Becomes::Screen(mut screen)) => {
            drop(turn);
            screen.carry(&mut stream).await;
        }
        Some(Becomes::Agent(relay)) => {
            // Limited by the agent.
            drop(turn);
            relay.carry(&mut stream).await;
        }
        Some(Becomes::Checkpoint(held)) => {
            drop(turn);
            work::take_part(&mut stream, *held, &endpoint).await;
        }
        Some(Becomes::Nothing) => while matches!(stream.read(&mut [0]).await, Ok(1)) {},
        None => {}
    }
    // While the console is held, the VM's process waits (if not for long).
    let _ = timeout(FAREWELL, stream.shutdown()).await;
}

/// Sends an answer; `None` if it is not taken.
async fn say(stream: &mut (impl AsyncWrite + Unpin), answer: &Answer) -> Option<()> {
    let mut line = serde_json::to_vec(answer).expect("an answer is always valid JSON");
    line.push(b'\n');
    let sent = async {
        stream.write_all(&line).await?;
        stream.flush().await
    };
    timeout(ANSWER_TIME, sent).await.ok()?.ok()
}

/// What a connection is once its last request is answered.
enum Becomes {
    Console(Viewing),
    Guest(Connected),
    Screen(display::Connected),
    Agent(agent::Relay),
    Checkpoint(Box<checkpoint::Held>),
    Nothing,
}

/// Answers requests until one is for something else, or there are no more.
async fn answer_requests(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    endpoint: &Endpoint,
) -> Option<Becomes> {
    let mut ahead = None;
    loop {
        let line = timeout(REQUEST_TIME, request::line(stream, ahead.take())).await.ok()??;
        let request = request::parse(&line);
        let known = request.is_ok();
        if request.as_ref().is_ok_and(Op::changes) && request::given_up(stream, &mut ahead).await {
            return None;
        }
        let request = request.and_then(|op| endpoint.check_standing(&op).map(|()| op));
        let mut becomes = None;
        let answer = match request {
            Ok(Op::Save(wish)) => {
                let copy = |tell| endpoint.copy(&wish, tell);
                with_progress(stream, copy).await.map(|saved| json!(saved))
            }
            Ok(Op::Dump(wish)) => {
                let dump = |tell| endpoint.dump(&wish, tell);
                with_progress(stream, dump).await.map(|dumped| json!(dumped))
            }
            Ok(Op::Checkpoint { dir }) => {
                let begin = |tell| endpoint.checkpoint(&dir, tell);
                with_progress(stream, begin).await.map(|held| {
                    becomes = Some(Becomes::Checkpoint(Box::new(held)));
                    Value::Null
                })
            }
            Ok(Op::Console { replay }) => {
                let console = endpoint.console.view(replay);
                let replay = console.replay();
                becomes = Some(Becomes::Console(console));
                Ok(json!(Replay { replay }))
            }
            Ok(Op::Connect { port }) => endpoint.ports.connect(port).await.map(|connected| {
                becomes = Some(Becomes::Guest(connected));
                Value::Null
            }),
            Ok(Op::Display { connect }) => endpoint.display(connect).await.map(|(offer, seen)| {
                becomes = seen.map(Becomes::Screen);
                json!(offer)
            }),
            Ok(Op::Exec) => endpoint.agent.connect().await.map(|relay| {
                becomes = Some(Becomes::Agent(relay));
                Value::Null
            }),
            Ok(Op::Attend) => {
                becomes = Some(Becomes::Nothing);
                Ok(Value::Null)
            }
            Ok(op) => endpoint.carry_out(op).await,
            Err(error) => Err(error),
        };
        let answer = match answer {
            Ok(value) => Answer::Return(value),
            Err(error) => Answer::Error(error.to_wire()),
        };
        say(stream, &answer).await?;
        if becomes.is_some() || !known {
            return becomes;
        }
    }
}

/// Does what takes long, saying over `stream` how far it is.
async fn with_progress<T, F>(
    stream: &mut (impl AsyncWrite + Unpin),
    work: impl FnOnce(mpsc::Sender<save::Progress>) -> F,
) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let (tell, mut told) = mpsc::channel(1);
    let work = work(tell);
    tokio::pin!(work);
    loop {
        tokio::select! {
            outcome = &mut work => return outcome,
            Some(progress) = told.recv() => {
                if say(stream, &Answer::Progress(progress)).await.is_none() {
                    told.close();
                }
            }
        }
    }
}

impl Endpoint {
    async fn carry_out(&self, op: Op) -> Result<Value> {
        if matches!(op, Op::Reset { .. } | Op::Powerdown | Op::Pause | Op::Resume) {
            self.subject.check_free()?;
        }
        match op {
            Op::Hello => {
                let pavo = env!("CARGO_PKG_VERSION");
                return Ok(json!({ "version": VERSION, "pavo": pavo, "vm": self.name }));
            }
            Op::Status => return Ok(json!(*self.status.borrow())),
            Op::Changed { from } => {
                let mut status = self.status.clone();
                // After that time it is the same, and with an end it is the last.
                let _ = timeout(CHANGE_TIME, status.wait_for(|status| *status != from)).await;
                return Ok(json!(*self.status.borrow()));
            }
            Op::Usage => {
                let state = self.status.borrow().state;
                let usage = self.meter.read(&self.qmp()?, state).await;
                let doing = || format!("looking at what {} uses", self.name);
                return usage.map(|usage| json!(usage)).while_doing(doing);
            }
            Op::Reset { hard } => {
                let run = hard || self.status.borrow().state == VmState::Off;
                match self.execute(qapi::qmp::system_reset {}).await {
                    // Its processors stand still until they are told to run.
                    Ok(()) if run => self.execute(qapi::qmp::cont {}).await,
                    reset => reset,
                }
            }
            Op::Powerdown => self.execute(qapi::qmp::system_powerdown {}).await,
            Op::Pause => {
                let done = self.execute(qapi::qmp::stop {}).await;
                self.once_seen(done, |state| !state.is_up()).await
            }
            Op::Resume => {
                let done = self.execute(qapi::qmp::cont {}).await;
                self.once_seen(done, |state| state != VmState::Paused).await
            }
            Op::Quit => {
                let asked = self.stop.send(Stop::Now).await;
                asked.map_err(|_| Error::system(format!("{} is ending already", self.name)))
            }
            Op::Monitor { command } => {
                let command =
                    qapi::qmp::human_monitor_command { command_line: command, cpu_index: None };
                return self.execute(command).await.map(Value::String);
            }
            Op::Qmp { command, arguments } => {
                let done = self.qmp()?.call(&command, Value::Object(arguments)).await;
                return done.while_doing(|| {
                    format!("telling QEMU of {} `{}`", self.name, command.escape_debug())
                });
            }
            Op::AgentHello { patience_ms } => {
                let answer = self.agent.hello(Duration::from_millis(patience_ms)).await;
                return answer.map(|answer| json!(answer));
            }
            // Answered before this.
            Op::Console { .. } | Op::Save(_) | Op::Dump(_) | Op::Connect { .. } => Ok(()),
            Op::Checkpoint { .. } => Ok(()),
            Op::Display { .. } | Op::Attend | Op::Exec => Ok(()),
        }
        .map(|()| Value::Null)
    }

    async fn execute<C, T>(&self, command: C) -> Result<T>
    where
        C: qapi::Command<Ok: Into<Outcome<T>>> + 'static,
    {
        let done = self.qmp()?.execute(command).await;
        let done = match done {
            Err(late @ qmp::Failure::Late(_)) => Err(Error::system(late.to_string())
                .help("see, once it answers again, what has come of it: `pavo status`")),
            done => done.map_err(|failure| Error::system(failure.to_string())),
        };
        done.map(|ok| ok.into().0).while_doing(|| format!("telling QEMU of {}", self.name))
    }

    fn qmp(&self) -> Result<qmp::Client> {
        let client = self.qmp.borrow().clone();
        client.ok_or_else(|| {
            Error::system(format!("{} has not started yet", self.name))
                .help("wait until it runs: `pavo wait`")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use tokio::net::UnixStream;

    struct Fixture {
        dir: tempfile::TempDir,
        guest: UnixStream,
        stops: mpsc::Receiver<Stop>,
        _status: watch::Sender<VmStatus>,
        _qmp: watch::Sender<Option<qmp::Client>>,
        _serving: JoinSet<()>,
    }

    /// A process whose QEMU has not answered yet.
    fn serving() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let (ours, guest) = UnixStream::pair().unwrap();
        let status = VmStatus { state: VmState::Starting, since: 7, detail: String::new() };
        let (status_sender, status) = watch::channel(status);
        let (qmp_sender, qmp) = watch::channel(None);
        let (stop, stops) = mpsc::channel(1);
        let console = Console::start(ours, dir.path()).unwrap();
        let endpoint = Endpoint {
            name: "vm0".into(),
            status,
            qmp,
            console,
            stop,
            dir: dir.path().to_owned(),
            disk: None,
            saves: Arc::default(),
            subject: checkpoint::Subject::new(&crate::vm::testing::spec(dir.path()), &[]),
            ports: GuestPorts::new(&crate::vm::testing::spec(dir.path())),
            screen: Screen::new(&crate::vm::testing::spec(dir.path())),
            meter: usage::Meter::new(&crate::vm::testing::spec(dir.path())),
            agent: agent::Agent::new("vm0".into(), dir.path().to_owned()).0,
        };
        let listener = listen(dir.path(), SOCKET).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(serve(UnixListener::from_std(listener).unwrap(), endpoint));
        Fixture { dir, guest, stops, _status: status_sender, _qmp: qmp_sender, _serving: serving }
    }

    /// A connection of somebody who need not speak the protocol.
    fn connected(fixture: &Fixture) -> UnixStream {
        let connect = std::os::unix::net::UnixStream::connect;
        let stream = socket::through_descriptor(fixture.dir.path(), SOCKET, connect).unwrap();
        stream.set_nonblocking(true).unwrap();
        UnixStream::from_std(stream).unwrap()
    }

    #[tokio::test]
    async fn requests_are_answered_in_turn_on_one_connection() {
        let mut fixture = serving();
        let mut client = Client::connect(fixture.dir.path()).unwrap();
        assert_eq!(client.ask(Op::Hello).await.unwrap()["vm"], "vm0");
        assert_eq!(client.status().await.unwrap().since, 7);
        client.ask(Op::Quit).await.unwrap();
        assert_eq!(fixture.stops.recv().await, Some(Stop::Now));
    }

    #[tokio::test]
    async fn before_qemu_answers_a_command_says_so() {
        let fixture = serving();
        let error = Client::connect(fixture.dir.path()).unwrap().reset().await;
        assert_eq!(error.unwrap_err().to_string(), "vm0 has not started yet");
    }

    #[tokio::test]
    async fn the_console_follows_its_answer_with_no_byte_lost() {
        let mut fixture = serving();
        fixture.guest.write_all(b"first light").await.unwrap();
        let client = Client::connect(fixture.dir.path()).unwrap();
        let mut viewer = client.console(1000).await.unwrap();
        let mut text = [0; 11];
        viewer.stream.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"first light");
        // What the guest said at once is replayed, or comes after: both are right.
        assert!(viewer.replay <= 11);
        viewer.stream.write_all(b"x").await.unwrap();
        viewer.stream.flush().await.unwrap();
        assert_eq!(fixture.guest.read_u8().await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn what_is_no_request_is_told_so_and_hung_up_on() {
        for (line, said) in [
            (&b"hello\n"[..], "the request is not understood"),
            (b"{\"version\":1,\"op\":\"explode\"}\n", "the request is not understood"),
            (b"{\"version\":9,\"op\":\"new\"}\n", "speaks version 1"),
        ] {
            let fixture = serving();
            let mut stream = connected(&fixture);
            stream.write_all(line).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.contains(said), "{answer}");
            assert_eq!(answer.lines().count(), 1, "it hangs up");
        }
    }

    #[tokio::test]
    async fn an_endless_request_is_not_read_to_its_end() {
        let fixture = serving();
        let mut stream = connected(&fixture);
        let chunk = vec![b'x'; MAX_REQUEST];
        while stream.write_all(&chunk).await.is_ok() {}
    }

    #[tokio::test]
    async fn a_long_directory_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(120));
        std::fs::create_dir(&long).unwrap();
        let _listener = listen(&long, SOCKET).unwrap();
        assert!(long.join(SOCKET).exists());
        Client::connect(&long).unwrap();
    }

    #[test]
    fn where_nobody_listens_the_error_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = Client::connect(dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
    }
}
