//! What a launcher and the task of one VM say to each other over the secure channel.
//!
//! ```text
//! task → launcher   {"hello":{"version":1,"rank":3,…}}   then   {"report":{…}}  …
//! launcher → task   "wait" …   {"spec":{…}}   or   {"refused":{"error":{…}}}   then   {"stop":{…}}
//! ```
//!
//! One JSON value a line. Before that, the launcher gives each task the [`Bootstrap`] on
//! its standard input, which stays open as a life line: when it closes, or the
//! connection does, the VM ends. Slurm sends what comes there over the network as it is, so
//! the cluster's [`Identity`] takes another way wherever there is one (see [`channel`]).

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::stat::{SFlag, fstat};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf,
    WriteHalf,
};
use tokio::net::{UnixStream, unix::pipe};
use tokio::time::timeout;

use super::channel::{self, Identity, Stream};
use super::machine::{GRACE, Stop};
use crate::error::{Context, Error, Result, WireError};
use crate::model::job::{PublishedPort, VmReport};
use crate::model::vm::{Accel, Nic, VmSpec};

/// The version of this protocol. Both sides must speak the same.
pub const VERSION: u32 = 1;

/// The longest line, in bytes: a spec with the largest user-data.
pub const MAX_LINE: usize = 16 << 20;
/// The longest bootstrap, in bytes: a pipe's worth, so that no task starves another.
pub const MAX_BOOTSTRAP: usize = 64 << 10;
/// How long the other side may take for its first message.
const FIRST_TIME: Duration = Duration::from_secs(60);

/// What a task says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToLauncher {
    Hello(Hello),
    Report(VmReport),
    /// Something is wrong with the VM's surroundings; it goes on.
    Trouble(WireError),
}

/// Which VM a task is for, and what it found on its host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`]
    pub version: u32,
    pub rank: u32,
    /// The host's number in the step.
    pub node: u32,
    /// The host as the scheduler names it.
    pub host: String,
    pub cores: u32,
    pub memory_mib: u64,
    /// As root's side made them.
    pub nics: Vec<Nic>,
    pub ports: Vec<PublishedPort>,
    /// Where commands reach the VM's process from other hosts.
    pub control: Option<SocketAddr>,
    pub accel: Accel,
}

/// What a launcher says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToTask {
    Spec(Box<VmSpec>),
    /// What the VM needs is another's still: said now and then, until it is not.
    Wait,
    /// There is no VM for this task.
    Refused {
        error: WireError,
    },
    Stop(Wish),
}

/// A wish of the launcher's, as it is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stop", rename_all = "lowercase")]
pub enum Wish {
    Graceful { seconds: Option<u64> },
    Now,
}

impl From<Stop> for Wish {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Graceful { deadline } => Self::Graceful { seconds: Some(deadline.as_secs()) },
            Stop::Now => Self::Now,
        }
    }
}

impl From<Wish> for Stop {
    fn from(wish: Wish) -> Self {
        match wish {
            Wish::Graceful { seconds } => {
                Self::Graceful { deadline: seconds.map_or(GRACE, Duration::from_secs) }
            }
            Wish::Now => Self::Now,
        }
    }
}

/// What a task is given to find its launcher, and to be believed if it has no other way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// [`VERSION`]
    pub version: u32,
    /// Of the launcher: any will do.
    pub addresses: Vec<SocketAddr>,
    /// Only where the launcher can seal nothing to root on the hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
}

impl Bootstrap {
    pub fn new(addresses: Vec<SocketAddr>, identity: Option<Identity>) -> Self {
        Self { version: VERSION, addresses, identity }
    }

    /// The line that [`read_bootstrap`] reads.
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("a bootstrap is always valid JSON") + "\n"
    }
}

/// A message as a line. Messages of ours always have a JSON form.
fn line_of(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("a message is always valid JSON");
    line.push(b'\n');
    line
}

/// Reads JSON whose values may be secret: the error says where it is wrong and no more.
fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T> {
    serde_json::from_slice(line).map_err(|error| {
        let (category, column) = (error.classify(), error.column());
        Error::system("what was said is not understood")
            .because(format!("{category:?} error at column {column} of the line"))
            .help("is it the same version of pavo on all hosts? (`pavo --version`)")
    })
}

/// The version in a message of whatever version.
fn check_version(version: u32, theirs: &str) -> Result<()> {
    if version == VERSION {
        return Ok(());
    }
    Err(Error::system(format!(
        "{theirs} speaks version {version} of the cluster's protocol, this host version {VERSION}"
    ))
    .help("install the same version of pavo on all hosts"))
}

/// The half of a connection that sends messages.
#[derive(Debug)]
pub struct Sender<W = WriteHalf<Stream>>(W);

impl<W: AsyncWrite + Unpin> Sender<W> {
    pub fn new(writer: W) -> Self {
        Self(writer)
    }

    /// Not to be dropped half way: what follows would not be understood.
    ///
    /// # Errors
    /// When the other side is gone.
    pub async fn send(&mut self, message: &impl Serialize) -> Result<()> {
        let line = line_of(message);
        let sent = async {
            self.0.write_all(&line).await?;
            self.0.flush().await
        };
        sent.await.while_doing(|| "talking to the cluster's other process".into())
    }

    /// Lets the other side see that nothing more comes.
    pub async fn close(mut self) {
        // It may be gone already, or not read what it was sent.
        let _ = timeout(Duration::from_secs(1), self.0.shutdown()).await;
    }
}

/// The half of a connection that receives messages.
#[derive(Debug)]
pub struct Receiver<R = ReadHalf<Stream>> {
    reader: BufReader<R>,
    /// Of a line whose end is still to come.
    line: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Receiver<R> {
    pub fn new(reader: R) -> Self {
        Self { reader: BufReader::new(reader), line: Vec::new() }
    }

    /// A line without its end; `None` when the other side has ended. May be dropped and
    /// called again at any time.
    ///
    /// # Errors
    /// When the line is longer than [`MAX_LINE`]: then nothing more can be read.
    pub async fn line(&mut self) -> Result<Option<Vec<u8>>> {
        let rest = (MAX_LINE + 1).saturating_sub(self.line.len());
        let read = (&mut self.reader).take(rest as u64).read_until(b'\n', &mut self.line).await;
        if self.line.last() == Some(&b'\n') {
            self.line.pop();
            return Ok(Some(std::mem::take(&mut self.line)));
        }
        if self.line.len() > MAX_LINE {
            return Err(Error::system(format!("a message is longer than {MAX_LINE} bytes")));
        }
        match read {
            Ok(_) => Ok(None),
            Err(error) => {
                tracing::debug!("the other side is gone: {error}");
                Ok(None)
            }
        }
    }

    /// The next message; `None` when the other side has ended. May be dropped and
    /// called again at any time.
    ///
    /// # Errors
    /// When it is none, or too long.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        self.line().await?.map(|line| parse(&line)).transpose()
    }
}

/// A connection as its two halves.
pub fn halves(stream: Stream) -> (Sender, Receiver) {
    let (reader, writer) = tokio::io::split(stream);
    (Sender::new(writer), Receiver::new(reader))
}

/// The launcher's side of a new connection: who is it? One of another version is told
/// so, and is an error.
///
/// # Errors
/// When it says nothing, or not what it should.
pub async fn greet(stream: Stream) -> Result<(Hello, Sender, Receiver)> {
    let (sender, mut receiver) = halves(stream);
    let hello = timeout(FIRST_TIME, receiver.line()).await;
    let hello = hello
        .map_err(|_| Error::system(format!("a task has said nothing within {FIRST_TIME:?}")))
        .and_then(|line| line)
        .and_then(|line| line.ok_or_else(|| Error::system("a task has ended before it said hello")))
        .and_then(|line| read_hello(&line));
    match hello {
        Ok(hello) => Ok((hello, sender, receiver)),
        Err(error) => {
            refuse(sender, &error).await;
            Err(error)
        }
    }
}

fn read_hello(line: &[u8]) -> Result<Hello> {
    #[derive(Deserialize)]
    struct Versioned {
        hello: Version,
    }
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    check_version(parse::<Versioned>(line)?.hello.version, "the task")?;
    match parse(line)? {
        ToLauncher::Hello(hello) => Ok(hello),
        ToLauncher::Report(_) | ToLauncher::Trouble(_) => {
            Err(Error::system("a task does not say hello first"))
        }
    }
}

/// Tells a task that there is no VM for it, and why, and hangs up.
pub async fn refuse(mut sender: Sender, error: &Error) {
    let refused = ToTask::Refused { error: error.to_wire() };
    // It may be gone already.
    let _ = timeout(Duration::from_secs(2), sender.send(&refused)).await;
    sender.close().await;
}

/// The task's side: says hello to the launcher and is given its VM.
///
/// # Errors
/// When the launcher is not reached, or why it refuses.
pub async fn join(
    addresses: &[SocketAddr],
    identity: &Identity,
    hello: Hello,
    limit: Duration,
) -> Result<(VmSpec, Sender, Receiver)> {
    let doing = || "asking the launcher for the VM".to_owned();
    let stream = channel::connect(addresses, identity, limit).await;
    let (mut sender, mut receiver) = halves(stream.while_doing(doing)?);
    sender.send(&ToLauncher::Hello(hello)).await.while_doing(doing)?;
    loop {
        let answer = timeout(FIRST_TIME, receiver.receive::<ToTask>()).await;
        let answer = answer
            .map_err(|_| Error::system(format!("it has not answered within {FIRST_TIME:?}")))
            .and_then(|answer| answer);
        match answer.while_doing(doing)? {
            Some(ToTask::Wait) => {}
            Some(ToTask::Spec(spec)) => return Ok((*spec, sender, receiver)),
            Some(ToTask::Refused { error }) => return Err(Error::from(error)).while_doing(doing),
            Some(ToTask::Stop(_)) | None => {
                return Err(Error::system("the launcher ended before it gave a VM"));
            }
        }
    }
}

/// A task's standard input, after the bootstrap.
pub struct LifeLine(Box<dyn AsyncRead + Send + Unpin>);

impl std::fmt::Debug for LifeLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LifeLine")
    }
}

impl LifeLine {
    /// Standard input, which must be a pipe or a socket.
    ///
    /// # Errors
    /// When it is something else.
    pub fn new(input: OwnedFd) -> Result<Self> {
        let doing = || "opening the life line on standard input".to_owned();
        let kind = fstat(&input).while_doing(doing)?.st_mode & SFlag::S_IFMT.bits();
        Ok(Self(if kind == SFlag::S_IFIFO.bits() {
            Box::new(pipe::Receiver::from_owned_fd(input).while_doing(doing)?)
        } else if kind == SFlag::S_IFSOCK.bits() {
            let socket = std::os::unix::net::UnixStream::from(input);
            socket.set_nonblocking(true).while_doing(doing)?;
            Box::new(UnixStream::from_std(socket).while_doing(doing)?)
        } else {
            return Err(Error::system("standard input is not a launcher's")
                .help("the scheduler starts this command, not people"));
        }))
    }

    /// Ends when the launcher's end is closed. What else comes is ignored.
    pub async fn cut(&mut self) {
        let mut ignored = [0; 256];
        while !matches!(self.0.read(&mut ignored).await, Ok(0) | Err(_)) {}
    }
}

/// Reads the bootstrap from a task's standard input, not a byte more.
///
/// # Errors
/// When it does not come within `limit`, or is none.
pub async fn read_bootstrap(input: OwnedFd, limit: Duration) -> Result<(Bootstrap, LifeLine)> {
    let doing = || "reading what the launcher gives the task".to_owned();
    let mut input = LifeLine::new(input)?;
    let line = timeout(limit, bootstrap_line(&mut input.0)).await;
    let line = line
        .map_err(|_| Error::system(format!("nothing has come within {limit:?}")))
        .and_then(|line| line)
        .while_doing(doing)?;
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let versioned = parse::<Versioned>(&line).while_doing(doing)?;
    check_version(versioned.version, "the launcher")?;
    Ok((parse(&line).while_doing(doing)?, input))
}

async fn bootstrap_line(input: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        match input.read_u8().await {
            Ok(b'\n') => return Ok(line),
            Ok(_) if line.len() == MAX_BOOTSTRAP => {
                return Err(Error::system(format!("it is longer than {MAX_BOOTSTRAP} bytes")));
            }
            Ok(byte) => line.push(byte),
            Err(_) => return Err(Error::system("the launcher ended before it gave anything")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::model::job::VmState;
    use crate::vm::channel::Listener;

    const LIMIT: Duration = Duration::from_secs(20);

    fn hello() -> Hello {
        Hello {
            version: VERSION,
            rank: 3,
            node: 1,
            host: "n2".into(),
            cores: 2,
            memory_mib: 900,
            nics: Vec::new(),
            ports: Vec::new(),
            control: Some(SocketAddr::from(([127, 0, 0, 1], 9))),
            accel: Accel::Tcg,
        }
    }

    fn launcher() -> (Listener, Vec<SocketAddr>, Identity) {
        let identity = Identity::generate("7").unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = Listener::bind(any, &identity).unwrap();
        let addresses = vec![listener.address().unwrap()];
        (listener, addresses, identity)
    }

    #[tokio::test]
    async fn a_task_says_hello_gets_its_vm_and_both_go_on_talking() {
        let dir = tempfile::tempdir().unwrap();
        let spec = crate::vm::testing::spec(dir.path());
        let (mut listener, addresses, identity) = launcher();
        let launcher = async {
            let (said, mut sender, mut receiver) = greet(listener.accept().await).await.unwrap();
            assert_eq!(said, hello());
            sender.send(&ToTask::Wait).await.unwrap();
            sender.send(&ToTask::Spec(Box::new(spec.clone()))).await.unwrap();
            sender.send(&ToTask::Stop(Stop::Now.into())).await.unwrap();
            let report = receiver.receive::<ToLauncher>().await.unwrap();
            assert!(matches!(report, Some(ToLauncher::Report(VmReport { rank: 3, .. }))));
            assert_eq!(receiver.receive::<ToLauncher>().await.unwrap(), None);
        };
        let task = async {
            let (given, mut sender, mut receiver) =
                join(&addresses, &identity, hello(), LIMIT).await.unwrap();
            assert_eq!(given, spec);
            assert_eq!(receiver.receive().await.unwrap(), Some(ToTask::Stop(Wish::Now)));
            let report =
                VmReport { rank: 3, state: VmState::Running, detail: String::new(), error: None };
            sender.send(&ToLauncher::Report(report)).await.unwrap();
        };
        tokio::join!(launcher, task);
    }

    #[tokio::test]
    async fn a_task_of_another_version_is_told_so() {
        let (mut listener, addresses, identity) = launcher();
        let newer = Hello { version: VERSION + 1, ..hello() };
        let launcher = async { greet(listener.accept().await).await.unwrap_err() };
        let (error, refused) = tokio::join!(launcher, join(&addresses, &identity, newer, LIMIT));
        let said = "the task speaks version 2 of the cluster's protocol, this host version 1";
        assert_eq!(error.to_string(), said);
        let refused = refused.unwrap_err().report();
        assert!(refused.contains(said) && refused.contains("help: install the same"), "{refused}");
    }

    #[tokio::test]
    async fn what_is_no_hello_is_an_error_without_what_was_said() {
        for said in ["{\"hello\":{\"version\":1,\"host\":\"hunter2\"}}\n", "hunter2\n", "hunter2"] {
            let (mut listener, addresses, identity) = launcher();
            let task = async {
                let mut stream = channel::connect(&addresses, &identity, LIMIT).await.unwrap();
                stream.write_all(said.as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            };
            let launcher = async { greet(listener.accept().await).await };
            let (outcome, ()) = tokio::join!(launcher, task);
            let report = outcome.unwrap_err().report();
            assert!(!report.contains("hunter2"), "{report}");
        }
    }

    #[tokio::test]
    async fn a_line_is_bounded_and_may_be_read_in_pieces() {
        let (mut theirs, ours) = tokio::io::duplex(1 << 16);
        let mut receiver = Receiver::new(ours);
        theirs.write_all(b"[1,").await.unwrap();
        let soon = Duration::from_millis(20);
        timeout(soon, receiver.receive::<Vec<u8>>()).await.unwrap_err();
        theirs.write_all(b"2]\n[3]\n").await.unwrap();
        assert_eq!(receiver.receive::<Vec<u8>>().await.unwrap(), Some(vec![1, 2]));
        assert_eq!(receiver.receive::<Vec<u8>>().await.unwrap(), Some(vec![3]));

        let flood = async { while theirs.write_all(&[b'x'; 1 << 16]).await.is_ok() {} };
        let error = tokio::select! {
            () = flood => unreachable!("it is read"),
            line = receiver.line() => line.unwrap_err(),
        };
        assert_eq!(error.to_string(), "a message is longer than 16777216 bytes");
    }

    #[tokio::test]
    async fn the_longest_line_is_received() {
        let (theirs, ours) = tokio::io::duplex(1 << 16);
        let (mut sender, mut receiver) = (Sender::new(theirs), Receiver::new(ours));
        let longest = "x".repeat(MAX_LINE - 2);
        let (sent, received) = tokio::join!(sender.send(&longest), receiver.receive::<String>());
        sent.unwrap();
        assert_eq!(received.unwrap().unwrap().len(), MAX_LINE - 2);
    }

    #[tokio::test]
    async fn the_bootstrap_is_read_to_its_end_and_the_life_line_to_its_own() {
        let (_, addresses, identity) = launcher();
        for socket in [false, true] {
            // With and without the secret part.
            let identity = socket.then(|| identity.clone());
            let bootstrap = Bootstrap::new(addresses.clone(), identity);
            let (reader, mut writer): (OwnedFd, Box<dyn Write>) = if socket {
                let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
                (ours.into(), Box::new(theirs))
            } else {
                let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
                (reader, Box::new(std::fs::File::from(writer)))
            };
            let watch = reader.try_clone().unwrap();
            let mut line = bootstrap.line();
            assert!(line.len() < 4096);
            assert_eq!(line.contains("key"), socket, "{line}");
            line += "more";
            writer.write_all(line.as_bytes()).unwrap();
            let (read, mut life) = read_bootstrap(reader, LIMIT).await.unwrap();
            assert_eq!(read, bootstrap);
            let mut rest = [0; 9];
            assert_eq!(nix::unistd::read(&watch, &mut rest).unwrap(), 4, "left for others");
            let soon = Duration::from_millis(20);
            timeout(soon, life.cut()).await.unwrap_err();
            drop(writer);
            timeout(LIMIT, life.cut()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_bootstrap_that_is_none_is_an_error_that_says_why() {
        let (_, addresses, identity) = launcher();
        let secret = serde_json::to_string(&identity).unwrap();
        let newer = Bootstrap::new(addresses, Some(identity)).line();
        let newer = newer.replace("\"version\":1", "\"version\":2");
        let cases = [
            (String::new(), "the launcher ended before it gave anything"),
            ("{\"version\":1".into(), "the launcher ended before it gave anything"),
            (newer, "the launcher speaks version 2 of the cluster's protocol"),
            ("x".repeat(MAX_BOOTSTRAP + 1), "it is longer than 65536 bytes"),
            (format!("{{\"version\":1,\"identity\":{secret:?}}}\n"), "is not understood"),
        ];
        for (said, expected) in cases {
            let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            theirs.write_all(said.as_bytes()).unwrap();
            drop(theirs);
            let report = read_bootstrap(ours.into(), LIMIT).await.unwrap_err().report();
            assert!(report.contains(expected), "{report}");
            assert!(report.len() < 500, "{report}");
        }
        let (reader, _writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let soon = Duration::from_millis(20);
        let late = read_bootstrap(reader, soon).await.unwrap_err().report();
        assert!(late.contains("nothing has come within 20ms"), "{late}");
        let null = std::fs::File::open("/dev/null").unwrap();
        let error = read_bootstrap(null.into(), LIMIT).await.unwrap_err().to_string();
        assert_eq!(error, "standard input is not a launcher's");
    }
}
