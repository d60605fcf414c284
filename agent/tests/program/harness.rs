//! The program, and the other end of its port.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pavo_agent::{
    Command as Listed, Credit, Decoder, Event, Exec, Exit, Failure, Frame, Hello, Kind, Nonce,
    Opening, Started, mark,
};

/// Far more than anything takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An agent, and our end of its port.
pub struct Agent {
    pub child: Child,
    pub port: UnixStream,
    pub decoder: Decoder,
    pub streams: u32,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What one stream has said, to its end.
#[derive(Debug, Default, PartialEq)]
pub struct Said {
    pub output: Vec<u8>,
    pub errors: Vec<u8>,
    pub exit: Option<Exit>,
    pub failure: Option<Failure>,
    pub items: Vec<Listed>,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    pub fn start_with(change: impl FnOnce(&mut Command)) -> Self {
        let (port, theirs) = UnixStream::pair().unwrap();
        port.set_read_timeout(Some(PATIENCE)).unwrap();
        // As a shell starts what is to run beside it: with interrupts ignored.
        let mut child = Command::new("sh");
        child
            .args(["-c", "trap '' INT; exec \"$0\" --stdio", env!("CARGO_BIN_EXE_pavo-agent")])
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        change(&mut child);
        let child = child.spawn().unwrap();
        let mut agent = Self { child, port, decoder: Decoder::new(), streams: 0 };
        agent.begin([1; 16]);
        agent
    }

    /// Begins a conversation; what was said before it is passed over.
    pub fn begin(&mut self, nonce: Nonce) -> Hello {
        self.port.write_all(&mark(&nonce)).unwrap();
        loop {
            self.decoder.lose_step();
            if self.event() == Event::Mark(nonce) {
                break;
            }
        }
        let Event::Frame(pong) = self.event() else { panic!("no frame") };
        assert_eq!((pong.stream, pong.kind), (0, Kind::Pong));
        Hello::decode(&pong.payload[8..]).unwrap()
    }

    pub fn event(&mut self) -> Event {
        let mut bytes = [0; 4096];
        loop {
            if let Some(event) = self.decoder.next_event().unwrap() {
                return event;
            }
            let count = self.port.read(&mut bytes).unwrap();
            assert!(count > 0, "the agent has ended");
            self.decoder.push(&bytes[..count]);
        }
    }

    pub fn frame(&mut self) -> Frame {
        match self.event() {
            Event::Frame(frame) => frame,
            Event::Mark(_) => panic!("a beginning in the middle"),
        }
    }

    pub fn say(&mut self, stream: u32, kind: Kind, payload: impl Into<Vec<u8>>) {
        self.port.write_all(&Frame::new(stream, kind, payload).bytes()).unwrap();
    }

    pub fn open(&mut self, opening: Opening) -> u32 {
        self.streams += 1;
        self.say(self.streams, Kind::Open, opening.encode());
        self.streams
    }

    /// Opens a stream with a request that need not fit into a frame.
    pub fn open_long(&mut self, opening: &Opening) -> u32 {
        let bytes = opening.encode();
        self.streams += 1;
        let mut pieces = bytes.chunks(pavo_agent::MAX_PAYLOAD).peekable();
        while let Some(piece) = pieces.next() {
            let kind = if pieces.peek().is_some() { Kind::Part } else { Kind::Open };
            self.say(self.streams, kind, piece);
        }
        self.streams
    }

    /// Starts a line of the shell.
    pub fn sh(&mut self, line: &str, change: impl FnOnce(&mut Exec)) -> (u32, Started) {
        let argv = ["sh", "-c", line].map(|word| word.as_bytes().to_vec()).into();
        let mut exec = Exec { argv, ..Exec::default() };
        change(&mut exec);
        let stream = self.open(Opening::Exec(exec));
        let started = self.frame();
        assert_eq!((started.stream, started.kind), (stream, Kind::Started), "{started:?}");
        (stream, Started::decode(&started.payload).unwrap())
    }

    /// Takes what this stream says, with credit for it, to its end; others say nothing.
    pub fn until_end(&mut self, stream: u32) -> Said {
        let mut said = Said::default();
        while said.exit.is_none() && said.failure.is_none() {
            let frame = self.frame();
            assert_eq!(frame.stream, stream, "{frame:?}");
            self.take(frame, &mut said);
        }
        said
    }

    pub fn take(&mut self, frame: Frame, said: &mut Said) {
        match frame.kind {
            Kind::Data => said.output.extend(&frame.payload),
            Kind::Errors => said.errors.extend(&frame.payload),
            Kind::Item => said.items.push(Listed::decode(&frame.payload).unwrap()),
            Kind::Exit => said.exit = Some(Exit::decode(&frame.payload).unwrap()),
            Kind::Fail => said.failure = Some(Failure::decode(&frame.payload).unwrap()),
            Kind::Credit | Kind::Started => {}
            kind => panic!("{kind:?}"),
        }
        if frame.kind.is_output() {
            let credit = Credit(frame.payload.len() as u32);
            self.say(frame.stream, Kind::Credit, credit.encode());
        }
    }

    pub fn run(&mut self, line: &str) -> Said {
        let (stream, _) = self.sh(line, |_| {});
        self.until_end(stream)
    }

    pub fn list(&mut self) -> Vec<Listed> {
        let stream = self.open(Opening::List);
        self.until_end(stream).items
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "not so: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}
