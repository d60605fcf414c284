//! The loop: what the host says goes to commands, what they say to the host.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SigSet, SignalFd};
use pavo_agent::{
    ASSUMES, Credit, Decoder, Event, Exec, Failure, Frame, Hello, Kind, MAX_OPENING, MAX_STREAMS,
    Opening, Size, Started, VERSION, mark,
};

use super::assume;
use super::command::Command;
use super::copying;
use super::freeze;
use super::starts::Starts;

/// No command is read while more than this waits to be sent.
const ROOM: usize = 128 << 10;
/// Commands that have ended and that nobody came back for.
const ENDED: usize = 64;

/// Serves the host until it is gone.
pub fn serve(port: &File) -> io::Result<()> {
    let mut child_ended = SigSet::empty();
    child_ended.add(Signal::SIGCHLD);
    child_ended.thread_block()?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&child_ended, flags)?;
    let mut agent = Agent::new()?;
    let outcome = loop {
        match agent.turn(port, &signals) {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    agent.end();
    outcome
}

#[derive(Debug)]
struct Agent {
    decoder: Decoder,
    /// What is to be sent.
    out: Vec<u8>,
    commands: Vec<Command>,
    /// Those that have not begun.
    starts: Starts,
    /// Openings of which a part has come.
    parts: HashMap<u32, Vec<u8>>,
    last_id: u64,
}

impl Agent {
    fn new() -> io::Result<Self> {
        Ok(Self {
            decoder: Decoder::default(),
            out: Vec::new(),
            commands: Vec::new(),
            starts: Starts::new()?,
            parts: HashMap::new(),
            last_id: 0,
        })
    }

    /// Waits for something to do, and does it; false when the host is gone.
    fn turn(&mut self, port: &File, signals: &SignalFd) -> io::Result<bool> {
        let readable = self.wait(port, signals)?;
        while let Ok(Some(_)) = signals.read_signal() {}
        if readable && !self.read(port)? {
            return Ok(false);
        }
        self.take_started();
        self.serve_commands();
        self.write(port)?;
        Ok(true)
    }

    /// Nobody is there any more: what may not be left is ended.
    fn end(&mut self) {
        self.starts.leave_all();
        self.take_started();
        self.commands.iter_mut().for_each(|command| command.leave(&mut drop));
        while let Some(doom) = self.commands.iter().filter_map(Command::doom).min() {
            std::thread::sleep(doom.saturating_duration_since(Instant::now()));
            self.commands.iter_mut().for_each(Command::kill_if_due);
        }
    }

    /// Sleeps until there is something to do; says whether the port is to be read.
    fn wait(&self, port: &File, signals: &SignalFd) -> io::Result<bool> {
        let mut flags = PollFlags::POLLIN;
        if !self.out.is_empty() {
            flags |= PollFlags::POLLOUT;
        }
        let mut fds = vec![PollFd::new(port.as_fd(), flags)];
        for fd in [signals.as_fd(), self.starts.woken()] {
            fds.push(PollFd::new(fd, PollFlags::POLLIN));
        }
        let room = self.out.len() < ROOM;
        for command in &self.commands {
            if room && command.wants_output() {
                for file in [&command.output, &command.errors].into_iter().flatten() {
                    fds.push(PollFd::new(file.as_fd(), PollFlags::POLLIN));
                }
            }
            if let Some(input) = command.hungry() {
                fds.push(PollFd::new(input.as_fd(), PollFlags::POLLOUT));
            }
        }
        let doom = self.commands.iter().filter_map(Command::doom).min();
        let rest = doom.map(|doom| doom.saturating_duration_since(Instant::now()));
        let mut rest = rest.map_or(PollTimeout::NONE, |rest| {
            PollTimeout::try_from(rest.as_millis() as u32 + 1).unwrap_or(PollTimeout::MAX)
        });
        if room && self.commands.iter().any(Command::is_ending) {
            rest = PollTimeout::ZERO;
        }
        match poll(&mut fds, rest) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let read = PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR;
        Ok(fds[0].revents().is_some_and(|events| events.intersects(read)))
    }

    /// Takes what the host has said; false when it is gone.
    fn read(&mut self, mut port: &File) -> io::Result<bool> {
        let mut bytes = [0; 32 << 10];
        match port.read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(count) => self.decoder.push(&bytes[..count]),
            Err(error) if is_soon(&error) => return Ok(true),
            // A terminal whose other side is closed.
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => return Ok(false),
            Err(error) => return Err(error),
        }
        loop {
            match self.decoder.next_event() {
                Ok(Some(Event::Mark(nonce))) => self.begin(&nonce),
                Ok(Some(Event::Frame(frame))) => self.take(frame),
                Ok(None) => return Ok(true),
                // The host begins anew when it misses us.
                Err(_) => {}
            }
        }
    }

    /// A conversation begins: what was said before is nobody's.
    fn begin(&mut self, nonce: &pavo_agent::Nonce) {
        self.parts.clear();
        self.starts.leave_all();
        self.commands.iter_mut().for_each(|command| command.leave(&mut drop));
        // The host passes over the beginning of a frame that has been sent.
        self.out.clear();
        self.out.extend(mark(nonce));
        self.send(Frame::new(0, Kind::Pong, [&[0; 8][..], &hello().encode()].concat()));
    }

    fn send(&mut self, frame: Frame) {
        frame.write(&mut self.out);
    }

    fn take(&mut self, frame: Frame) {
        let Frame { stream, kind, payload } = frame;
        match kind {
            Kind::Ping => {
                let mut token = payload;
                token.resize(8, 0);
                token.extend(hello().encode());
                self.send(Frame::new(0, Kind::Pong, token));
            }
            Kind::Part => {
                let parts = self.parts.entry(stream).or_default();
                if parts.len() + payload.len() <= MAX_OPENING {
                    parts.extend(payload);
                }
            }
            Kind::Open => {
                let mut opening = self.parts.remove(&stream).unwrap_or_default();
                opening.extend(payload);
                if let Err(failure) = self.open(stream, &opening) {
                    self.send(Frame::new(stream, Kind::Fail, failure.encode()));
                }
            }
            _ => self.tell_command(stream, kind, &payload),
        }
    }

    /// What belongs to a command, unless it has just ended.
    fn tell_command(&mut self, stream: u32, kind: Kind, payload: &[u8]) {
        let gone = kind == Kind::Close
            && (self.parts.remove(&stream).is_some() || self.starts.leave(stream));
        if gone {
            // Of a stream that has begun, the last word is ours.
            self.send(Frame::new(stream, Kind::Exit, pavo_agent::Exit::Left.encode()));
        }
        if self.starts.keep(stream, kind, payload) {
            return;
        }
        let out = &mut self.out;
        let mut send = |frame: Frame| frame.write(out);
        let mut commands = self.commands.iter_mut();
        let Some(command) = commands.find(|command| command.stream == Some(stream)) else { return };
        match kind {
            Kind::Data => command.type_in(payload, &mut send),
            Kind::End => command.end_input(&mut send),
            Kind::Credit => {
                if let Ok(Credit(bytes)) = Credit::decode(payload) {
                    command.add_credit(bytes);
                }
            }
            Kind::Signal => payload.iter().take(1).for_each(|signal| command.signal(*signal)),
            Kind::Resize => {
                if let Ok(size) = Size::decode(payload) {
                    command.resize(size);
                }
            }
            Kind::Close => command.leave(&mut send),
            _ => {}
        }
    }

    fn open(&mut self, stream: u32, opening: &[u8]) -> Result<(), Failure> {
        let failure = |why: String, code| Failure { why, code };
        let opening = Opening::decode(opening).map_err(|error| failure(error.to_string(), 126))?;
        match opening {
            Opening::Exec(exec) => self.start(stream, exec)?,
            Opening::Copy(copy) => self.start(stream, copying::command(copy))?,
            Opening::Assume => self.start(stream, assume::command())?,
            Opening::Freeze { seconds } => self.start(stream, freeze::command(seconds))?,
            Opening::Attach { id, unseen } => {
                let command = self.find(id)?;
                if command.stream.is_some() {
                    return Err(failure(format!("somebody is attached to command {id}"), 126));
                }
                command.attach(stream, unseen);
                let started = Started { id, pid: command.pid() };
                self.send(Frame::new(stream, Kind::Started, started.encode()));
            }
            Opening::List => {
                let shown = |command: &&Command| command.is_running() || command.has_ended();
                let all: Vec<_> =
                    self.commands.iter().filter(shown).map(Command::describe).collect();
                for command in all {
                    self.send(Frame::new(stream, Kind::Item, command.encode()));
                }
                self.done(stream);
            }
            Opening::Kill { id, signal } => {
                self.find(id)?.signal(signal);
                self.done(stream);
            }
        }
        Ok(())
    }

    fn start(&mut self, stream: u32, exec: Exec) -> Result<(), Failure> {
        let running = self.commands.iter().filter(|command| command.is_running()).count();
        if running + self.starts.len() >= MAX_STREAMS {
            let why = format!("the guest's agent runs {MAX_STREAMS} commands already");
            return Err(Failure { why, code: 126 });
        }
        self.starts.begin(stream, exec)
    }

    /// Commands that have begun: they hear what they were told meanwhile.
    fn take_started(&mut self) {
        while let Some((start, outcome)) = self.starts.next() {
            let spawned = match (outcome, start.stream) {
                (Ok(spawned), _) => spawned,
                (Err(failure), Some(stream)) => {
                    self.send(Frame::new(stream, Kind::Fail, failure.encode()));
                    continue;
                }
                (Err(_), None) => continue,
            };
            self.last_id += 1;
            let stream = start.stream.unwrap_or_default();
            let mut command = Command::new(self.last_id, stream, &start.exec, spawned);
            if start.stream.is_none() {
                command.leave(&mut drop);
                self.commands.push(command);
                continue;
            }
            let started = Started { id: command.id, pid: command.pid() };
            self.send(Frame::new(stream, Kind::Started, started.encode()));
            self.commands.push(command);
            for (kind, payload) in start.told {
                self.tell_command(stream, kind, &payload);
            }
            if start.exec.leave {
                self.tell_command(stream, Kind::Close, &[]);
            }
        }
    }

    fn find(&mut self, id: u64) -> Result<&mut Command, Failure> {
        let found = self.commands.iter_mut().find(|command| command.id == id);
        found.ok_or_else(|| Failure { why: format!("there is no command {id}"), code: 1 })
    }

    fn done(&mut self, stream: u32) {
        self.send(Frame::new(stream, Kind::Exit, pavo_agent::Exit::Code(0).encode()));
    }

    /// Each command in its turn: what it says, what it takes, whether it has ended.
    fn serve_commands(&mut self) {
        for command in &mut self.commands {
            let out = &mut self.out;
            let has_room = out.len() < ROOM;
            let mut send = |frame: Frame| frame.write(out);
            command.kill_if_due();
            command.feed(&mut send);
            // Before reading: what it wrote last is then read as well.
            command.check();
            if has_room {
                command.show_past(&mut send);
                let some = command.show(Kind::Data, &mut send);
                let more = command.show(Kind::Errors, &mut send);
                if !some && !more {
                    command.tell_end(&mut send);
                }
            }
        }
        self.commands.retain(|command| !command.is_over());
        let ended = self.commands.iter().filter(|command| command.has_ended()).count();
        let mut excess = ended.saturating_sub(ENDED);
        self.commands.retain(|command| {
            let forget = excess > 0 && command.has_ended() && command.stream.is_none();
            excess -= usize::from(forget);
            !forget
        });
    }

    fn write(&mut self, mut port: &File) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.out.len() {
            match port.write(&self.out[sent..]) {
                Ok(count) => sent += count,
                Err(error) if is_soon(&error) => break,
                // Reading says whether the host is gone.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
                Err(error) => return Err(error),
            }
        }
        self.out.drain(..sent);
        Ok(())
    }
}

fn is_soon(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Who we are, now.
fn hello() -> Hello {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let uptime = read("/proc/uptime");
    let seconds: f64 = uptime.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Hello {
        version: VERSION,
        agent: env!("CARGO_PKG_VERSION").into(),
        hostname: nix::unistd::gethostname()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        boot_id: read("/proc/sys/kernel/random/boot_id").trim().into(),
        uptime: (seconds * 1000.0) as u64,
        cores: cores as u32,
        features: ["exec", "pty", "attach", "script", "copy", "freeze", ASSUMES]
            .map(String::from)
            .into(),
    }
}
