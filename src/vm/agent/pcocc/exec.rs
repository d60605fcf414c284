//! A command that pcocc's agent runs for a client.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use pavo_agent::{Credit, Exit, Failure, Frame, Kind, PIECE, Size, Started, WINDOW};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::Session;
use super::command::{Conversation, credit, fail, lacks, lost};
use super::exchange::{Answer, Event, Held, Listener};
use super::prepare::{self, Ready};
use super::wire::{Fields, Said};

/// A shell sends a signal to a process group.
pub(super) const SIGNAL: &str = "kill \"-$1\" \"-$2\"";

/// Where more output than this waits, the agent is told to stop; under the other, to go on.
const HIGH: usize = 256 << 10;
const LOW: usize = 64 << 10;
/// What the first line says where the command cannot begin.
const NO_FOLDER: &str = "no folder";
const NO_PROGRAM: &str = "no program";
/// The longest first line: the number of the process.
const MAX_FIRST: usize = 64;
/// How long a command that nobody wants any more may take to end, and how long its end is then
/// waited for.
const GRACE: Duration = Duration::from_secs(2);
const LINGER: Duration = Duration::from_secs(10);
/// Signals that wait to be sent.
const MAX_SIGNALS: usize = 16;
/// What a person types on a terminal to say that nothing more comes.
const END_OF_INPUT: &[u8] = &[4];

/// Runs a command to its end.
pub(super) async fn run(
    conversation: &mut Conversation,
    exec: pavo_agent::Exec,
) -> Result<Exit, Failure> {
    if exec.keep || exec.leave {
        return Err(lacks("lets no command be left"));
    }
    let ready = prepare::begin(&conversation.session, &exec).await?;
    let id = ready.id;
    let outcome = Command::new(conversation, &ready).run().await.map_err(|failure| {
        let (program, folder) = (&ready.program, &ready.folder);
        match &*failure.why {
            NO_FOLDER => fail(126, format!("there is no folder `{folder}`")),
            NO_PROGRAM => fail(127, format!("there is no program `{program}`")),
            _ => failure,
        }
    });
    let Session { link, epoch } = &conversation.session;
    link.exchange().running.remove(&id);
    prepare::clean_up(link, *epoch, &ready).await;
    outcome
}

/// What was asked for has been done.
enum Done {
    Typed(usize, Answer),
    Signalled,
    Other,
}

/// Whether output comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Comes,
    /// No more is wanted.
    Stopping,
    Stopped,
}

/// It runs, and somebody looks on.
struct Command<'a> {
    conversation: &'a mut Conversation,
    id: i64,
    terminal: bool,
    pid: Option<u32>,
    /// What has come of the first line.
    first: Vec<u8>,
    listener: Listener,
    events: mpsc::UnboundedReceiver<Event>,
    tag: i64,
    flow: Flow,
    /// Output that waits for credit.
    waiting: VecDeque<(Kind, Vec<u8>)>,
    bytes: usize,
    credit: usize,
    exit: Option<Exit>,
    input: Input,
    signals: VecDeque<u8>,
    signalling: bool,
    last_signal: Option<u8>,
    resize: Option<Size>,
    /// When what nobody wants any more is killed, and given up.
    doom: Option<Instant>,
    end: Option<Instant>,
    jobs: FuturesUnordered<BoxFuture<'static, Done>>,
}

/// What a client types.
#[derive(Default)]
struct Input {
    typed: VecDeque<u8>,
    credit: usize,
    /// Nothing more will be typed.
    ended: bool,
    /// The command reads no more.
    closed: bool,
    /// A piece is on its way.
    busy: bool,
}

impl<'a> Command<'a> {
    fn new(conversation: &'a mut Conversation, ready: &Ready) -> Self {
        let (to, events) = mpsc::unbounded_channel();
        let held = conversation.session.link.exchange().held();
        Self {
            conversation,
            id: ready.id,
            terminal: ready.size.is_some(),
            pid: None,
            first: Vec::new(),
            listener: Listener { to, held },
            events,
            tag: 0,
            flow: Flow::Comes,
            waiting: VecDeque::new(),
            bytes: 0,
            credit: WINDOW as usize,
            exit: None,
            input: Input { credit: WINDOW as usize, ended: !ready.input, ..Input::default() },
            signals: VecDeque::new(),
            signalling: false,
            last_signal: None,
            resize: ready.size,
            doom: None,
            end: None,
            jobs: FuturesUnordered::new(),
        }
    }

    fn held(&self) -> &Held {
        &self.listener.held
    }

    async fn run(mut self) -> Result<Exit, Failure> {
        self.attach()?;
        loop {
            self.show();
            if let Some(exit) = self.exit.filter(|_| self.is_shown()) {
                return Ok(exit);
            }
            self.act()?;
            tokio::select! {
                Some(event) = self.events.recv() => self.hear(event)?,
                Some(done) = self.jobs.next() => self.done(done),
                frame = self.conversation.frames.recv(), if self.doom.is_none() => match frame {
                    Some(frame) => self.take(frame)?,
                    None => self.leave(),
                },
                () = at(self.doom), if self.end.is_none() => {
                    self.end = Some(Instant::now() + LINGER);
                    self.signal(9);
                }
                () = at(self.end) => return Ok(Exit::Left),
            }
        }
    }

    /// Whether all that the command has written was shown, or nobody is there to see it.
    fn is_shown(&self) -> bool {
        self.waiting.is_empty() || self.doom.is_some()
    }

    fn attach(&mut self) -> Result<(), Failure> {
        let Session { link, epoch } = &self.conversation.session;
        self.tag = link.attach(*epoch, self.id, self.listener.clone()).map_err(lost)?;
        self.flow = Flow::Comes;
        Ok(())
    }

    fn ask(
        &self,
        name: &'static str,
        of: &str,
        data: Fields,
        done: fn(Answer) -> Done,
    ) -> Result<(), Failure> {
        let Session { link, epoch } = &self.conversation.session;
        let asked = link.ask(*epoch, name, of, data).map_err(lost)?;
        self.jobs.push(Box::pin(async move { done(asked.answer().await) }));
        Ok(())
    }

    /// Asks for what has become necessary.
    fn act(&mut self) -> Result<(), Failure> {
        if self.flow == Flow::Comes && self.bytes > HIGH && self.exit.is_none() {
            let data = Fields::default().signed(2, self.id).signed(3, self.tag);
            self.ask("detach", "DetachMessage", data, |_| Done::Other)?;
            self.flow = Flow::Stopping;
        }
        if self.flow == Flow::Stopped && self.bytes < LOW {
            self.attach()?;
        }
        if self.pid.is_none() || self.exit.is_some() {
            return Ok(());
        }
        self.type_in()?;
        if let Some(Size { rows, columns }) = self.resize.take() {
            let data = Fields::default().signed(4, self.id).number(5, rows.into());
            let data = data.number(6, columns.into());
            self.ask("resize", "ResizeMessage", data, |_| Done::Other)?;
        }
        if let (false, Some(signal)) = (self.signalling, self.signals.pop_front()) {
            self.send_signal(signal);
        }
        Ok(())
    }

    fn send_signal(&mut self, signal: u8) {
        self.signalling = true;
        self.last_signal = Some(signal);
        let Session { link, epoch } = &self.conversation.session;
        let (link, epoch, id) = (link.clone(), *epoch, self.id);
        let words = [signal.to_string(), self.pid.unwrap_or_default().to_string()];
        self.jobs.push(Box::pin(async move {
            let answer = link.shell(epoch, SIGNAL, &[&words[0], &words[1]]).await;
            // An older agent has one word for one signal.
            if signal == 9 && matches!(answer, Ok(Said::Refused(_))) {
                let data = Fields::default().signed(2, id);
                let _ = link.get(epoch, "kill", "KillMessage", data).await;
            }
            Done::Signalled
        }));
    }

    /// Gives the command the next piece of its input, once it has taken the last.
    fn type_in(&mut self) -> Result<(), Failure> {
        let input = &mut self.input;
        let ends = input.ended && input.typed.len() <= PIECE;
        if input.busy || input.closed || (input.typed.is_empty() && !input.ended) {
            return Ok(());
        }
        let count = input.typed.len().min(PIECE);
        let mut piece: Vec<u8> = input.typed.drain(..count).collect();
        if ends {
            input.closed = true;
            if self.terminal {
                // Its end would be that of the terminal.
                piece.extend(END_OF_INPUT);
            }
        }
        input.busy = true;
        let eof = ends && !self.terminal;
        let data = Fields::default().number(2, eof.into()).bytes(3, piece).signed(4, self.id);
        let Session { link, epoch } = &self.conversation.session;
        let asked = link.ask(*epoch, "stdin", "IOMessage", data).map_err(lost)?;
        self.jobs.push(Box::pin(async move { Done::Typed(count, asked.answer().await) }));
        Ok(())
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Signalled => self.signalling = false,
            Done::Other => {}
            Done::Typed(mut bytes, answer) => {
                self.input.busy = false;
                // One that reads no more is given no more, and keeps nobody waiting.
                if !matches!(answer, Ok(Said::Done(_))) {
                    self.input.closed = true;
                    bytes += std::mem::take(&mut self.input.typed).len();
                }
                self.give_credit(bytes);
            }
        }
    }

    fn give_credit(&mut self, bytes: usize) {
        if bytes > 0 {
            self.input.credit += bytes;
            self.conversation.say(Kind::Credit, credit(bytes));
        }
    }

    /// Takes what the client says.
    fn take(&mut self, frame: Frame) -> Result<(), Failure> {
        let wrong = |why: &str| lost(format!("the request is not understood: {why}"));
        match frame.kind {
            Kind::Data => {
                let length = frame.payload.len();
                let rest = self.input.credit.checked_sub(length);
                self.input.credit = rest.ok_or_else(|| wrong("data without credit for it"))?;
                if self.input.closed || self.input.ended {
                    self.give_credit(length);
                } else {
                    self.input.typed.extend(frame.payload);
                }
            }
            Kind::End => self.input.ended = true,
            Kind::Credit => {
                let Credit(more) = Credit::decode(&frame.payload).map_err(|it| wrong(&it.0))?;
                self.credit = (self.credit.saturating_add(more as usize)).min(WINDOW as usize);
            }
            Kind::Signal => frame.payload.iter().take(1).for_each(|signal| self.signal(*signal)),
            Kind::Resize => self.resize = Size::decode(&frame.payload).ok(),
            Kind::Close => self.leave(),
            kind => return Err(wrong(&format!("{kind:?}, which is the agent's to say"))),
        }
        Ok(())
    }

    fn signal(&mut self, signal: u8) {
        if (1..32).contains(&signal) && self.signals.len() < MAX_SIGNALS {
            self.signals.push_back(signal);
        }
    }

    /// Who asked is gone: the command is to end.
    fn leave(&mut self) {
        self.doom = Some(Instant::now() + GRACE);
        self.forget_waiting();
        self.signals = [1, 18].into();
    }

    fn forget_waiting(&mut self) {
        for (_, bytes) in std::mem::take(&mut self.waiting) {
            self.held().taken(bytes.len());
        }
        self.bytes = 0;
    }

    fn hear(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Attached => {}
            Event::Piece(piece) => {
                // On a terminal all is output.
                let kind = if piece.errors { Kind::Errors } else { Kind::Data };
                let length = piece.bytes.len();
                let of_first = self.pid.is_none() && piece.errors != self.terminal;
                let bytes = if of_first { self.begin(piece.bytes)? } else { piece.bytes };
                if bytes.is_empty() || self.doom.is_some() {
                    self.held().taken(length);
                    return Ok(());
                }
                // What the first line was does not wait.
                if bytes.len() < length {
                    self.held().shrunk(length - bytes.len());
                }
                self.bytes += bytes.len();
                self.waiting.push_back((kind, bytes));
            }
            Event::Detached if self.flow == Flow::Stopping => self.flow = Flow::Stopped,
            Event::Detached => return Err(lost("the guest's agent shows the command no more")),
            Event::Status(status) => self.exit = Some(self.ended(status)?),
            Event::Refused(why) => return Err(lost(format!("the guest's agent refuses: {why}"))),
            Event::Lost(why) => return Err(lost(why)),
        }
        Ok(())
    }

    /// Takes the first line, which says the process's number or why there is none, and returns
    /// what is behind it.
    fn begin(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>, Failure> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        self.first.extend(&bytes[..end.unwrap_or(bytes.len())]);
        if self.first.len() > MAX_FIRST {
            return Err(lost("the guest's shell does not run the command"));
        }
        let Some(end) = end else { return Ok(Vec::new()) };
        let first = String::from_utf8_lossy(&self.first).trim_end().to_owned();
        let pid = first.parse().ok().filter(|pid| *pid > 1);
        let pid = pid.ok_or_else(|| lost("the guest's shell does not run the command"));
        self.pid = Some(match &*first {
            NO_FOLDER | NO_PROGRAM => return Err(lost(first)),
            _ => pid?,
        });
        let started = Started { id: self.id as u64, pid: self.pid.unwrap_or_default() };
        self.conversation.say(Kind::Started, started.encode());
        let mut exchange = self.conversation.session.link.exchange();
        if let Some(running) = exchange.running.get_mut(&self.id) {
            running.pid = self.pid;
        }
        Ok(bytes[end + 1..].to_vec())
    }

    fn ended(&self, status: i32) -> Result<Exit, Failure> {
        if self.pid.is_none() && self.doom.is_none() {
            return Err(lost("the guest's shell does not run the command"));
        }
        // The shell tells of a signal by a code, and the agent not by which one it was killed.
        let of_signal = |signal: &u8| status == 128 + i32::from(*signal);
        Ok(match (u8::try_from(status), self.last_signal) {
            (Ok(_), Some(signal)) if of_signal(&signal) => Exit::Signal(signal),
            (Ok(code), _) => Exit::Code(code),
            (Err(_), signal) => Exit::Signal(signal.unwrap_or(9)),
        })
    }

    /// Shows the client what it has credit for, once it knows that the command runs.
    fn show(&mut self) {
        while let (Some(_), Some((kind, bytes))) = (self.pid, self.waiting.front_mut()) {
            let count = bytes.len().min(self.credit).min(PIECE);
            if count == 0 {
                return;
            }
            let (kind, rest) = (*kind, bytes.split_off(count));
            let piece = std::mem::replace(bytes, rest);
            let is_whole = bytes.is_empty();
            if is_whole {
                self.waiting.pop_front();
                self.held().taken(count);
            } else {
                self.held().shrunk(count);
            }
            self.credit -= count;
            self.bytes -= count;
            self.conversation.say(kind, piece);
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
