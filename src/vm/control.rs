//! How commands reach a VM's process: `control.sock` in the VM's directory.
//!
//! A connection carries requests, one JSON object a line, and an answer line for
//! each; `console` turns the connection into the console itself. Only the user
//! that the process runs as, and root, are listened to: the directory is 0700, and
//! the kernel says who connected.
//!
//! ```text
//! → {"version":1,"op":"monitor","command":"info status"}
//! ← {"return":"VM status: running\r\n"}   or   {"error":{"kind":"system","what":…}}
//! ```

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::console::Console;
use super::machine::Stop;
use super::qmp;
use crate::error::{Context, Error, Kind, Result, WireError};
use crate::model::job::VmStatus;

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
/// Connections served at once; more wait.
const CONNECTIONS: usize = 64;

/// What can be asked of a VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Op {
    /// Who answers: `{"version":1,"pavo":"0.1.0","vm":"vm0"}`.
    Hello,
    /// A [`VmStatus`].
    Status,
    /// The reset button.
    Reset,
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
    /// The newest `replay` bytes of the console's log, then the console.
    Console {
        replay: usize,
    },
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
    Return(Value),
    Error(WireError),
}

/// Listens on `name` in `dir`, however long the directory's path is.
///
/// # Errors
/// When the socket exists or cannot be made.
pub fn listen(dir: &Path, name: &str) -> Result<std::os::unix::net::UnixListener> {
    through_descriptor(dir, name, std::os::unix::net::UnixListener::bind)
        .while_doing(|| format!("making the socket `{}`", dir.join(name).display()))
}

/// A socket's address holds 107 bytes only: name the directory by a descriptor.
fn through_descriptor<T>(
    dir: &Path,
    name: &str,
    call: impl FnOnce(PathBuf) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let dir = std::fs::File::open(dir)?;
    call(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()).into())
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
}

/// Answers requests until it is dropped.
pub async fn serve(listener: UnixListener, endpoint: Endpoint) {
    let us = nix::unistd::geteuid().as_raw();
    let mut connections = JoinSet::new();
    loop {
        if connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        tokio::select! {
            connection = listener.accept() => match connection {
                Ok((stream, _)) => {
                    let peer = stream.peer_cred().map(|peer| peer.uid());
                    if peer.is_ok_and(|uid| uid == us || uid == 0) {
                        connections.spawn(converse(stream, endpoint.clone()));
                    }
                }
                // Out of descriptors: connections that end will free some.
                Err(error) => {
                    tracing::warn!("the control socket: {error}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection, until it ends or sends what is no request.
async fn converse(mut stream: UnixStream, endpoint: Endpoint) {
    loop {
        let line = tokio::time::timeout(REQUEST_TIME, request_line(&mut stream)).await;
        let Ok(Some(line)) = line else { return };
        let request = parse(&line);
        let known = request.is_ok();
        let console = match &request {
            Ok(Op::Console { replay }) => Some(*replay),
            _ => None,
        };
        let answer = match request {
            Ok(op) => endpoint.carry_out(op).await,
            Err(error) => Err(error),
        };
        let answer = match answer {
            Ok(value) => Answer::Return(value),
            Err(error) => Answer::Error(error.to_wire()),
        };
        let mut line = serde_json::to_vec(&answer).expect("an answer is always valid JSON");
        line.push(b'\n');
        let sent = tokio::time::timeout(ANSWER_TIME, stream.write_all(&line)).await;
        if !matches!(sent, Ok(Ok(()))) || !known {
            return;
        }
        if let Some(replay) = console {
            return endpoint.console.attach(stream, replay).await;
        }
    }
}

/// A line, without reading past it: what follows may be the console's.
async fn request_line(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await.ok()? {
            b'\n' => return Some(line),
            _ if line.len() == MAX_REQUEST => return None,
            byte => line.push(byte),
        }
    }
}

fn parse(line: &[u8]) -> Result<Op> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let wrong = |error: serde_json::Error| {
        Error::usage("the request is not understood").because(error.to_string())
    };
    let versioned: Versioned = serde_json::from_slice(line).map_err(wrong)?;
    if versioned.version > VERSION {
        return Err(Error::usage(format!(
            "this VM's process speaks version {VERSION} of the control protocol, the request {}",
            versioned.version
        ))
        .help("use the pavo that started the cluster"));
    }
    Ok(serde_json::from_slice::<Request>(line).map_err(wrong)?.op)
}

impl Endpoint {
    async fn carry_out(&self, op: Op) -> Result<Value> {
        match op {
            Op::Hello => {
                let pavo = env!("CARGO_PKG_VERSION");
                return Ok(json!({ "version": VERSION, "pavo": pavo, "vm": self.name }));
            }
            Op::Status => return Ok(json!(*self.status.borrow())),
            Op::Reset => self.execute(qapi::qmp::system_reset {}).await,
            Op::Powerdown => self.execute(qapi::qmp::system_powerdown {}).await,
            Op::Pause => self.execute(qapi::qmp::stop {}).await,
            Op::Resume => self.execute(qapi::qmp::cont {}).await,
            Op::Quit => {
                let asked = self.stop.send(Stop::Now).await;
                asked.map_err(|_| Error::system(format!("{} is ending already", self.name)))
            }
            Op::Monitor { command } => {
                let command =
                    qapi::qmp::human_monitor_command { command_line: command, cpu_index: None };
                return self.execute(command).await.map(Value::String);
            }
            Op::Console { .. } => Ok(()),
        }
        .map(|()| Value::Null)
    }

    async fn execute<C, T>(&self, command: C) -> Result<T>
    where
        C: qapi::Command<Ok: Into<Outcome<T>>> + 'static,
    {
        let client = self.qmp.borrow().clone();
        let client =
            client.ok_or_else(|| Error::system(format!("{} has not started yet", self.name)))?;
        let done = client.execute(command).await;
        done.map(|ok| ok.into().0).while_doing(|| format!("telling QEMU of {}", self.name))
    }
}

/// An answer of QMP that is nothing (`{}`) or text.
struct Outcome<T>(T);

impl From<qapi::Empty> for Outcome<()> {
    fn from(_: qapi::Empty) -> Self {
        Self(())
    }
}

impl From<String> for Outcome<String> {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// A command's side of the connection; it blocks.
#[derive(Debug)]
pub struct Client {
    stream: std::os::unix::net::UnixStream,
}

impl Client {
    /// Connects to the process of the VM whose directory this is.
    ///
    /// # Errors
    /// When nobody listens there: the VM has ended or has not begun.
    pub fn connect(dir: &Path) -> Result<Self> {
        let stream = through_descriptor(dir, SOCKET, std::os::unix::net::UnixStream::connect)
            .map_err(|error| {
                Error::new(Kind::NotFound, "the VM's process does not answer")
                    .because(error)
                    .help("see how it is: `pavo status`")
            })?;
        stream
            .set_read_timeout(Some(ANSWER_TIME))
            .and_then(|()| stream.set_write_timeout(Some(REQUEST_TIME)))
            .while_doing(|| "preparing the control connection".into())?;
        Ok(Self { stream })
    }

    /// # Errors
    /// As all requests: when the process is gone, does not answer in time, or
    /// refuses.
    pub fn status(&mut self) -> Result<VmStatus> {
        let value = self.ask(Op::Status)?;
        serde_json::from_value(value).while_doing(|| "reading the VM's status".into())
    }

    /// Presses the reset button.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub fn reset(&mut self) -> Result<()> {
        self.ask(Op::Reset).map(drop)
    }

    /// Asks anything that is not `console`.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub fn ask(&mut self, op: Op) -> Result<Value> {
        let request = Request { version: VERSION, op };
        let mut line = serde_json::to_vec(&request).expect("a request is always valid JSON");
        line.push(b'\n');
        let mut exchange = || {
            self.stream.write_all(&line)?;
            answer_line(&mut self.stream)
        };
        let line = exchange().while_doing(|| "asking the VM's process".into())?;
        match serde_json::from_slice(&line).while_doing(|| "reading the answer".into())? {
            Answer::Return(value) => Ok(value),
            Answer::Error(error) => Err(error.into()),
        }
    }

    /// Turns the connection into the VM's console: the newest `replay` bytes of
    /// its log, then whatever the guest writes. No time limit is on it.
    ///
    /// # Errors
    /// As [`status`](Self::status).
    pub fn console(mut self, replay: usize) -> Result<std::os::unix::net::UnixStream> {
        self.ask(Op::Console { replay })?;
        self.stream
            .set_read_timeout(None)
            .and_then(|()| self.stream.set_write_timeout(None))
            .while_doing(|| "opening the console".into())?;
        Ok(self.stream)
    }
}

/// A line, without reading past it.
fn answer_line(stream: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        match byte[0] {
            b'\n' => return Ok(line),
            _ if line.len() == MAX_ANSWER => {
                return Err(std::io::Error::other("the answer is too long"));
            }
            byte => line.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::job::VmState;
    use std::io::{BufRead, BufReader};

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
        let endpoint = Endpoint { name: "vm0".into(), status, qmp, console, stop };
        let listener = listen(dir.path(), SOCKET).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(serve(UnixListener::from_std(listener).unwrap(), endpoint));
        Fixture { dir, guest, stops, _status: status_sender, _qmp: qmp_sender, _serving: serving }
    }

    /// Runs a blocking client beside the server.
    async fn beside<T: Send + 'static>(
        fixture: &Fixture,
        client: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> T {
        let dir = fixture.dir.path().to_owned();
        tokio::task::spawn_blocking(move || client(&dir)).await.unwrap()
    }

    #[tokio::test]
    async fn requests_are_answered_in_turn_on_one_connection() {
        let mut fixture = serving();
        beside(&fixture, |dir| {
            let mut client = Client::connect(dir).unwrap();
            assert_eq!(client.ask(Op::Hello).unwrap()["vm"], "vm0");
            assert_eq!(client.status().unwrap().since, 7);
            client.ask(Op::Quit).unwrap();
        })
        .await;
        assert_eq!(fixture.stops.recv().await, Some(Stop::Now));
    }

    #[tokio::test]
    async fn before_qemu_answers_a_command_says_so() {
        let fixture = serving();
        let error = beside(&fixture, |dir| Client::connect(dir).unwrap().reset()).await;
        assert_eq!(error.unwrap_err().to_string(), "vm0 has not started yet");
    }

    #[tokio::test]
    async fn the_console_follows_its_answer_with_no_byte_lost() {
        let mut fixture = serving();
        fixture.guest.write_all(b"first light").await.unwrap();
        let mut console =
            beside(&fixture, |dir| Client::connect(dir).unwrap().console(1000).unwrap()).await;
        let (text, console) = tokio::task::spawn_blocking(move || {
            let mut text = [0; 11];
            console.read_exact(&mut text).unwrap();
            console.write_all(b"x").unwrap();
            (text, console)
        })
        .await
        .unwrap();
        assert_eq!(&text, b"first light");
        assert_eq!(fixture.guest.read_u8().await.unwrap(), b'x');
        drop(console);
    }

    #[tokio::test]
    async fn what_is_no_request_is_told_so_and_hung_up_on() {
        for (line, said) in [
            (&b"hello\n"[..], "the request is not understood"),
            (b"{\"version\":1,\"op\":\"explode\"}\n", "the request is not understood"),
            (b"{\"version\":9,\"op\":\"new\"}\n", "speaks version 1"),
        ] {
            let fixture = serving();
            let answer = beside(&fixture, move |dir| {
                let client = Client::connect(dir).unwrap();
                (&client.stream).write_all(line).unwrap();
                let mut lines = BufReader::new(client.stream).lines();
                let answer = lines.next().unwrap().unwrap();
                assert!(lines.next().is_none(), "it hangs up");
                answer
            })
            .await;
            assert!(answer.contains(said), "{answer}");
        }
    }

    #[tokio::test]
    async fn an_endless_request_is_not_read_to_its_end() {
        let fixture = serving();
        beside(&fixture, |dir| {
            let client = Client::connect(dir).unwrap();
            let chunk = vec![b'x'; MAX_REQUEST];
            while (&client.stream).write_all(&chunk).is_ok() {}
        })
        .await;
    }

    #[test]
    fn a_long_directory_is_no_obstacle() {
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
