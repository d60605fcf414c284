//! QEMU's control protocol (QMP), on a connection of our own.
//!
//! One task owns the socket. Every command carries our id, and its answer is
//! matched by that id alone, so a caller that gave up leaves nothing behind that
//! could confuse the next one. Events keep their name and data as text: a newer
//! QEMU's events and values are never a reason to lose a running VM. The types of
//! commands and answers are those of the crate `qapi`.
//!
//! The protocol: QEMU, docs/interop/qmp-spec.rst.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use qapi::{Command, Execute};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// The longest answer or event that is read, in bytes.
pub const MAX_LINE: usize = 16 << 20;

/// How long a command may take unless its caller says otherwise. QEMU answers
/// within milliseconds; a host that swaps may need seconds.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Why a command has no result.
#[derive(Debug)]
pub enum Failure {
    /// The connection is gone: QEMU ended, or said what is not QMP.
    Lost,
    /// QEMU refused.
    Refused { class: String, description: String },
    /// No answer came in time. A later one is ignored.
    Late(Duration),
    /// An answer that this command should not have.
    Garbled(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost => f.write_str("the connection to QEMU is lost"),
            Self::Refused { description, .. } => write!(f, "QEMU refused: {description}"),
            Self::Late(patience) => {
                write!(f, "QEMU did not answer within {patience:?}, and may still do it")
            }
            Self::Garbled(why) => write!(f, "QEMU's answer is not understood: {why}"),
        }
    }
}

impl std::error::Error for Failure {}

/// Something that QEMU reports without being asked.
#[derive(Clone, Debug)]
pub struct Event {
    /// Such as `STOP`; possibly one that this program does not know.
    pub name: String,
    data: Option<Box<RawValue>>,
}

impl Event {
    /// The event's data, where it is of this type.
    pub fn data<T: for<'de> Deserialize<'de>>(&self) -> Option<T> {
        serde_json::from_str(self.data.as_ref()?.get()).ok()
    }
}

/// Sends commands; clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    requests: mpsc::Sender<Request>,
}

/// Writes a command as text, given its id.
type Compose = Box<dyn FnOnce(u64) -> Vec<u8> + Send>;

/// A command on its way: what to write, given its id, and who waits for it.
struct Request {
    line: Compose,
    /// What goes with it.
    descriptor: Option<OwnedFd>,
    reply: oneshot::Sender<Result<Box<RawValue>, Failure>>,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Request")
    }
}

/// Speaks QMP on a connected socket, as far as commands being accepted.
///
/// The events must be taken: when [`EVENTS`] of them wait, answers wait behind
/// them. Dropping the receiver discards them instead.
///
/// # Errors
/// When no greeting comes within `patience`, or QEMU is gone.
pub async fn connect(
    stream: UnixStream,
    patience: Duration,
) -> Result<(Client, mpsc::Receiver<Event>), Failure> {
    let (reader, writer) = stream.into_split();
    let mut lines = Lines { reader: BufReader::new(reader), partial: Vec::new() };
    let greeting = timeout(patience, lines.next()).await.map_err(|_| Failure::Late(patience))?;
    let greeting = greeting.ok_or(Failure::Lost)?;
    if !matches!(serde_json::from_slice(&greeting), Ok(Greeting { qmp: Some(_) })) {
        return Err(Failure::Garbled("it does not greet".into()));
    }
    let (requests, commands) = mpsc::channel(16);
    let (events, taken) = mpsc::channel(EVENTS);
    let connection = Connection { writer, events, pending: HashMap::new(), next_id: 0 };
    tokio::spawn(connection.run(lines, commands));
    let client = Client { requests };
    client.execute_within(qapi::qmp::qmp_capabilities { enable: None }, patience).await?;
    Ok((client, taken))
}

/// How many events wait for their taker.
pub const EVENTS: usize = 64;

impl Client {
    /// Runs a command, with [`PATIENCE`].
    ///
    /// # Errors
    /// See [`Failure`]. Dropping the future is harmless; the command may still
    /// have been carried out.
    pub async fn execute<C>(&self, command: C) -> Result<C::Ok, Failure>
    where
        C: Command + 'static,
    {
        self.execute_within(command, PATIENCE).await
    }

    /// Runs a command, waiting at most `patience` for its answer.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn execute_within<C>(&self, command: C, patience: Duration) -> Result<C::Ok, Failure>
    where
        C: Command + 'static,
    {
        let line = move |id| {
            serde_json::to_vec(&Execute::with_id(command, id))
                .expect("a command is always valid JSON")
        };
        let answer = self.exchange(Box::new(line), None, patience).await?;
        serde_json::from_str(answer.get()).map_err(|error| Failure::Garbled(error.to_string()))
    }

    /// Runs a command by its name, one that `qapi` has no handy type for.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn call(&self, name: &str, arguments: Value) -> Result<Value, Failure> {
        let mut command = json!({ "execute": name, "arguments": arguments });
        let line = move |id| {
            command["id"] = Value::from(id);
            command.to_string().into_bytes()
        };
        let answer = self.exchange(Box::new(line), None, PATIENCE).await?;
        serde_json::from_str(answer.get()).map_err(|error| Failure::Garbled(error.to_string()))
    }

    /// Hands QEMU an open file, which other commands name.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn send_descriptor(
        &self,
        name: &str,
        descriptor: impl Into<OwnedFd>,
    ) -> Result<(), Failure> {
        let mut command = json!({ "execute": "getfd", "arguments": { "fdname": name } });
        let line = move |id| {
            command["id"] = Value::from(id);
            command.to_string().into_bytes()
        };
        self.exchange(Box::new(line), Some(descriptor.into()), PATIENCE).await.map(drop)
    }

    async fn exchange(
        &self,
        line: Compose,
        descriptor: Option<OwnedFd>,
        patience: Duration,
    ) -> Result<Box<RawValue>, Failure> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let request = Request { line, descriptor, reply };
            self.requests.send(request).await.map_err(|_| Failure::Lost)?;
            answer.await.unwrap_or(Err(Failure::Lost))
        };
        timeout(patience, exchange).await.map_err(|_| Failure::Late(patience))?
    }
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: Option<Box<RawValue>>,
}

/// Any line that QEMU sends after its greeting.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow, rename = "return")]
    result: Option<&'a RawValue>,
    error: Option<Refusal>,
    #[serde(borrow)]
    event: Option<Cow<'a, str>>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

/// The task's state.
struct Connection {
    writer: OwnedWriteHalf,
    events: mpsc::Sender<Event>,
    /// Who waits for which id. A caller that gave up stays until QEMU answers.
    pending: HashMap<u64, oneshot::Sender<Result<Box<RawValue>, Failure>>>,
    next_id: u64,
}

impl Connection {
    /// Until QEMU or the last [`Client`] is gone. What is pending then fails with
    /// [`Failure::Lost`], since its sender is dropped with `self`.
    async fn run(mut self, mut lines: Lines, mut commands: mpsc::Receiver<Request>) {
        loop {
            tokio::select! {
                line = lines.next() => {
                    let Some(line) = line else { break };
                    if !self.incoming(&line).await {
                        break;
                    }
                }
                request = commands.recv() => {
                    let Some(request) = request else { break };
                    if !self.outgoing(request).await {
                        break;
                    }
                }
            }
        }
    }

    /// Handles one line; `false` when it is not QMP.
    async fn incoming(&mut self, line: &[u8]) -> bool {
        let Ok(line) = serde_json::from_slice::<Line<'_>>(line) else { return false };
        if let Some(name) = line.event {
            let event = Event { name: name.into_owned(), data: line.data.map(RawValue::to_owned) };
            // Nobody wants events any more: fine.
            let _ = self.events.send(event).await;
            return true;
        }
        let id = line.id.and_then(|id| id.get().parse().ok());
        // An error without an id is about a line that QEMU could not read, which
        // none of ours is.
        let Some(reply) = id.and_then(|id: u64| self.pending.remove(&id)) else { return true };
        let answer = match (line.result, line.error) {
            (Some(result), _) => Ok(result.to_owned()),
            (None, Some(refusal)) => {
                Err(Failure::Refused { class: refusal.class, description: refusal.desc })
            }
            (None, None) => Err(Failure::Garbled("neither result nor error".into())),
        };
        // The caller may have given up.
        let _ = reply.send(answer);
        true
    }

    async fn outgoing(&mut self, request: Request) -> bool {
        if request.reply.is_closed() {
            return true;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.pending.insert(id, request.reply);
        let mut line = (request.line)(id);
        line.push(b'\n');
        let sent = match &request.descriptor {
            Some(descriptor) => self.send_with(&line, descriptor).await,
            None => Ok(0),
        };
        match sent {
            Ok(sent) => self.writer.write_all(&line[sent..]).await.is_ok(),
            Err(_) => false,
        }
    }

    /// Writes the first of `line`, and with it a descriptor; returns how much.
    async fn send_with(&self, line: &[u8], descriptor: &OwnedFd) -> std::io::Result<usize> {
        let stream: &UnixStream = self.writer.as_ref();
        let descriptors = [descriptor.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&descriptors)];
        let send = || {
            let text = [IoSlice::new(line)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            Ok(sendmsg::<()>(stream.as_raw_fd(), &text, &message, flags, None)?)
        };
        stream.async_io(Interest::WRITABLE, send).await
    }
}

/// Reads lines of at most [`MAX_LINE`]. [`next`](Self::next) may be dropped at
/// any await: what was read so far stays.
struct Lines {
    reader: BufReader<OwnedReadHalf>,
    partial: Vec<u8>,
}

impl Lines {
    /// The next line; `None` at the end, or where a line is too long.
    async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let available = self.reader.fill_buf().await.ok().filter(|bytes| !bytes.is_empty())?;
            let end = available.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(available.len(), |end| end + 1);
            self.partial.extend_from_slice(&available[..taken]);
            self.reader.consume(taken);
            if self.partial.len() > MAX_LINE {
                return None;
            }
            if end.is_some() {
                return Some(std::mem::take(&mut self.partial));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::qmp;
    use tokio::io::AsyncReadExt;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob", "later"]}}"#;

    /// A QEMU that says what the test wants.
    struct Fake {
        socket: BufReader<UnixStream>,
    }

    impl Fake {
        async fn connected() -> (Self, Client, mpsc::Receiver<Event>) {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let fake = async {
                let mut fake = Self { socket: BufReader::new(theirs) };
                fake.say(GREETING).await;
                let id = fake.asked("qmp_capabilities").await;
                fake.answer(id, "{}").await;
                fake
            };
            let (fake, connected) = tokio::join!(fake, connect(ours, PATIENCE));
            let (client, events) = connected.unwrap();
            (fake, client, events)
        }

        async fn say(&mut self, line: &str) {
            self.socket.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
        }

        async fn asked(&mut self, command: &str) -> u64 {
            let mut line = String::new();
            self.socket.read_line(&mut line).await.unwrap();
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!(line["execute"], command);
            line["id"].as_u64().unwrap()
        }

        async fn answer(&mut self, id: u64, result: &str) {
            self.say(&format!(r#"{{"return": {result}, "id": {id}}}"#)).await;
        }
    }

    fn status() -> qmp::query_status {
        qmp::query_status {}
    }

    const RUNNING: &str = r#"{"status": "running", "singlestep": false, "running": true}"#;

    #[tokio::test]
    async fn an_unknown_event_is_passed_on_and_harms_nothing() {
        let (mut fake, client, mut events) = Fake::connected().await;
        fake.say(r#"{"event": "SINGULARITY", "data": {"near": true}, "timestamp": {}}"#).await;
        let (status, ()) = tokio::join!(client.execute(status()), async {
            let id = fake.asked("query-status").await;
            fake.answer(id, RUNNING).await;
        });
        assert!(status.unwrap().running);
        let event = events.recv().await.unwrap();
        assert_eq!(event.name, "SINGULARITY");
        assert_eq!(event.data::<serde_json::Value>().unwrap()["near"], true);
    }

    #[tokio::test]
    async fn a_value_we_do_not_know_fails_its_own_command_only() {
        let (mut fake, client, _events) = Fake::connected().await;
        for (answer, fine) in
            [(RUNNING.replace("\"running\",", "\"dreaming\","), false), (RUNNING.to_owned(), true)]
        {
            let (status, ()) = tokio::join!(client.execute(status()), async {
                let id = fake.asked("query-status").await;
                fake.answer(id, &answer).await;
            });
            match status {
                Err(Failure::Garbled(_)) => assert!(!fine),
                other => assert!(other.unwrap().running && fine),
            }
        }
    }

    #[tokio::test]
    async fn a_late_answer_is_ignored_and_the_next_command_gets_its_own() {
        let (mut fake, client, _events) = Fake::connected().await;
        let late = client.execute_within(status(), Duration::from_millis(5)).await;
        assert!(matches!(late, Err(Failure::Late(_))));
        let first = fake.asked("query-status").await;
        let (name, ()) = tokio::join!(client.execute(qmp::query_name {}), async {
            let second = fake.asked("query-name").await;
            assert_ne!(first, second);
            fake.answer(first, RUNNING).await;
            fake.answer(second, r#"{"name": "vm0"}"#).await;
        });
        assert_eq!(name.unwrap().name.as_deref(), Some("vm0"));
    }

    #[tokio::test]
    async fn answers_in_any_order_reach_their_callers() {
        let (mut fake, client, _events) = Fake::connected().await;
        let (one, two, ()) =
            tokio::join!(client.execute(status()), client.execute(qmp::query_name {}), async {
                let first = fake.asked("query-status").await;
                let second = fake.asked("query-name").await;
                fake.answer(second, "{}").await;
                fake.answer(first, RUNNING).await;
            });
        assert!(one.unwrap().running && two.unwrap().name.is_none());
    }

    #[tokio::test]
    async fn what_is_pending_when_qemu_dies_is_lost_and_so_is_all_that_follows() {
        let (mut fake, client, mut events) = Fake::connected().await;
        let (pending, ()) = tokio::join!(client.execute(status()), async move {
            fake.asked("query-status").await;
            drop(fake);
        });
        assert!(matches!(pending, Err(Failure::Lost)));
        assert!(matches!(client.execute(status()).await, Err(Failure::Lost)));
        assert!(events.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_refusal_says_what_qemu_said() {
        let (mut fake, client, _events) = Fake::connected().await;
        let (refused, ()) = tokio::join!(client.execute(qmp::cont {}), async {
            let id = fake.asked("cont").await;
            let error = r#""error": {"class": "GenericError", "desc": "no space"}"#;
            fake.say(&format!("{{{error}, \"id\": {id}}}")).await;
        });
        assert_eq!(refused.unwrap_err().to_string(), "QEMU refused: no space");
    }

    #[tokio::test]
    async fn a_megabyte_is_read_and_an_endless_line_is_not() {
        let (mut fake, client, _events) = Fake::connected().await;
        let name = "x".repeat(1 << 20);
        let (long, ()) = tokio::join!(client.execute(qmp::query_name {}), async {
            let id = fake.asked("query-name").await;
            fake.answer(id, &format!(r#"{{"name": "{name}"}}"#)).await;
        });
        assert_eq!(long.unwrap().name.unwrap().len(), 1 << 20);

        let (endless, ()) = tokio::join!(client.execute(status()), async {
            let chunk = vec![b' '; 1 << 20];
            while fake.socket.write_all(&chunk).await.is_ok() {}
        });
        assert!(matches!(endless, Err(Failure::Lost)));
        let mut rest = Vec::new();
        // Reset or ended: either way the client has hung up.
        let _ = fake.socket.read_to_end(&mut rest).await;
    }

    #[tokio::test]
    async fn silence_and_nonsense_instead_of_a_greeting_are_told_apart() {
        let (ours, _silent) = UnixStream::pair().unwrap();
        let patience = Duration::from_millis(20);
        assert!(matches!(connect(ours, patience).await, Err(Failure::Late(_))));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"SSH-2.0-dropbear\r\n").await.unwrap();
        assert!(matches!(connect(ours, PATIENCE).await, Err(Failure::Garbled(_))));
    }
}
