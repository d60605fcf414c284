//! A command that was started: its streams, its end, and who looks on.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use pavo_agent::{Command as Listed, Exec, Exit, Frame, Kind, PIECE, Size, WINDOW};

use super::past::Past;
use super::spawn::{self, Spawned};

/// How long a command that nobody wants any more may take to end.
const GRACE: Duration = Duration::from_secs(2);

/// What a person types on a terminal to say that nothing more comes.
const END_OF_INPUT: u8 = 4;

/// A command, until nobody asks for it any more.
#[derive(Debug)]
pub struct Command {
    pub id: u64,
    /// Where it is shown.
    pub stream: Option<u32>,
    child: std::process::Child,
    user: String,
    words: String,
    began: Instant,
    terminal: bool,
    keep: bool,
    /// Whether it waits where nobody sees what it writes.
    whole: bool,
    /// How much of the newest nobody has said to have seen.
    unseen: usize,
    input: Option<File>,
    /// What the command has not read yet.
    typed: VecDeque<u8>,
    /// Nothing more will be typed.
    typed_all: bool,
    /// What a person types on a terminal to say so is still to be given.
    farewell: bool,
    pub output: Option<File>,
    pub errors: Option<File>,
    /// The newest of its output, if it may be left.
    past: Past,
    /// What of it is still to be shown to who came back.
    replay: Past,
    credit: usize,
    exit: Option<Exit>,
    /// When it is killed.
    doom: Option<Instant>,
}

impl Command {
    /// One that has just begun.
    pub fn new(id: u64, stream: u32, exec: &Exec, spawned: Spawned) -> Self {
        let words: Vec<_> = exec.argv.iter().map(|word| String::from_utf8_lossy(word)).collect();
        let mut words = words.join(" ").replacen(super::copying::OURSELVES, "pavo-agent", 1);
        if exec.script.is_some() {
            words = format!("(script) {words}");
        }
        Self {
            id,
            stream: Some(stream),
            child: spawned.child,
            user: spawned.user,
            words: words.trim_end().chars().take(1000).collect(),
            began: Instant::now(),
            terminal: exec.terminal.is_some(),
            keep: exec.keep,
            whole: exec.whole,
            unseen: 0,
            input: spawned.input,
            typed: VecDeque::new(),
            typed_all: false,
            farewell: false,
            output: Some(spawned.output),
            errors: spawned.errors,
            // All that may be on its way to who sees it.
            past: if exec.whole { Past::of(WINDOW as usize) } else { Past::default() },
            replay: Past::default(),
            credit: WINDOW as usize,
            exit: None,
            doom: None,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn describe(&self) -> Listed {
        Listed {
            id: self.id,
            pid: self.pid(),
            user: self.user.clone(),
            words: self.words.clone(),
            seconds: self.began.elapsed().as_secs(),
            attached: self.stream.is_some(),
            exit: self.exit,
        }
    }

    /// Whether there is nothing left to do for it, or to tell of it.
    pub fn is_over(&self) -> bool {
        self.exit.is_some() && self.stream.is_none() && !self.keep
    }

    pub fn has_ended(&self) -> bool {
        self.exit.is_some()
    }

    /// Whether it runs, and not only until what it has started is gone, too.
    pub fn is_running(&self) -> bool {
        let ends = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let look = || waitid(Id::Pid(Pid::from_raw(self.pid() as i32)), ends);
        self.exit.is_none() && (self.doom.is_none() || look() == Ok(WaitStatus::StillAlive))
    }

    /// Whether its output may be read now, given there is room to send it.
    pub fn wants_output(&self) -> bool {
        match self.stream {
            Some(_) => self.credit > 0 && self.replay.is_empty(),
            // Nobody waits for it; it does not wait either, unless all of it is to be seen.
            None => self.keep && (!self.whole || self.past.holds(self.unseen)),
        }
    }

    /// Whether it has ended, and what it wrote can be shown to its end without waiting.
    pub fn is_ending(&self) -> bool {
        let unread = self.output.is_some() || self.errors.is_some();
        let shown =
            if self.stream.is_some() { self.credit > 0 } else { unread && self.wants_output() };
        self.exit.is_some() && shown
    }

    /// Where it takes input, if there is any for it.
    pub fn hungry(&self) -> Option<&File> {
        let wants = !self.typed.is_empty() || self.farewell;
        self.input.as_ref().filter(|_| wants)
    }

    pub fn add_credit(&mut self, credit: u32) {
        self.unseen = self.unseen.saturating_sub(credit as usize);
        self.credit = self.credit.saturating_add(credit as usize).min(WINDOW as usize);
    }

    /// Takes input for the command.
    pub fn type_in(&mut self, bytes: &[u8], send: &mut impl FnMut(Frame)) {
        if self.input.is_none() {
            // It reads no more: what was sent for it is taken all the same.
            self.give_credit(bytes.len(), send);
        } else if self.typed.len() + bytes.len() <= WINDOW as usize {
            self.typed.extend(bytes);
            self.feed(send);
        }
    }

    pub fn end_input(&mut self, send: &mut impl FnMut(Frame)) {
        // A terminal stays open: its command may ask again.
        self.farewell = self.terminal;
        self.typed_all = !self.terminal;
        self.feed(send);
    }

    /// Gives the command what it takes of its input.
    pub fn feed(&mut self, send: &mut impl FnMut(Frame)) {
        let mut taken = 0;
        while let Some(input) = &mut self.input {
            let (bytes, _) = self.typed.as_slices();
            let is_farewell = bytes.is_empty() && self.farewell;
            let bytes = if is_farewell { &[END_OF_INPUT] } else { bytes };
            if bytes.is_empty() {
                break;
            }
            match input.write(bytes) {
                // Ours: nobody gave credit for it, and nobody gets any.
                Ok(_) if is_farewell => self.farewell = false,
                Ok(count) => {
                    self.typed.drain(..count);
                    taken += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    // It has closed its input.
                    taken += self.typed.len();
                    self.typed.clear();
                    self.input = None;
                }
            }
        }
        self.give_credit(taken, send);
        if self.typed_all && self.typed.is_empty() {
            self.input = None;
        }
    }

    fn give_credit(&self, bytes: usize, send: &mut impl FnMut(Frame)) {
        if let (Some(stream), true) = (self.stream, bytes > 0) {
            let credit = pavo_agent::Credit(bytes as u32);
            send(Frame::new(stream, Kind::Credit, credit.encode()));
        }
    }

    /// Shows what is there of a stream; says whether there was anything.
    pub fn show(&mut self, kind: Kind, send: &mut impl FnMut(Frame)) -> bool {
        if !self.wants_output() {
            return false;
        }
        let limit = if self.stream.is_some() { self.credit.min(PIECE) } else { PIECE };
        let from = if kind == Kind::Data { &mut self.output } else { &mut self.errors };
        let Some(file) = from else { return false };
        let mut piece = vec![0; limit];
        match file.read(&mut piece) {
            Ok(count @ 1..) => {
                piece.truncate(count);
                self.seen(kind, piece, send);
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            // A terminal that everybody has closed is an error.
            Ok(_) | Err(_) => {
                *from = None;
                false
            }
        }
    }

    fn seen(&mut self, kind: Kind, piece: Vec<u8>, send: &mut impl FnMut(Frame)) {
        if self.keep {
            self.past.add(kind, &piece);
        }
        self.unseen += piece.len();
        if let Some(stream) = self.stream {
            self.credit -= piece.len();
            send(Frame::new(stream, kind, piece));
        }
    }

    /// Shows the past to who has come back.
    pub fn show_past(&mut self, send: &mut impl FnMut(Frame)) {
        let Some(stream) = self.stream else { return };
        while self.credit > 0 {
            let Some((kind, piece)) = self.replay.take(self.credit.min(PIECE)) else { return };
            self.credit -= piece.len();
            send(Frame::new(stream, kind, piece));
        }
    }

    /// Looks whether it has ended. What it had written before is then shown first; who else
    /// holds its streams open is not waited for.
    pub fn check(&mut self) {
        // What nobody wants any more is not waited for before all of its group is killed: until
        // then the group's number is no other's.
        if self.exit.is_none() && self.doom.is_none() {
            if let Ok(Some(status)) = self.child.try_wait() {
                let byte = |number: i32| number.clamp(0, 255) as u8;
                self.exit = Some(match (status.code(), status.signal()) {
                    (Some(code), _) => Exit::Code(byte(code)),
                    (None, signal) => Exit::Signal(byte(signal.unwrap_or_default())),
                });
            }
        }
    }

    /// Says how it ended, once all it wrote is shown. Call it when reading it gave nothing.
    pub fn tell_end(&mut self, send: &mut impl FnMut(Frame)) {
        let unread = self.output.is_some() || self.errors.is_some();
        let can_show = match self.stream {
            Some(_) => self.credit > 0,
            None => !unread || !self.keep || self.wants_output(),
        };
        let all_shown = self.replay.is_empty() && can_show;
        let Some(exit) = self.exit.filter(|_| all_shown) else { return };
        (self.input, self.output, self.errors) = (None, None, None);
        if let Some(stream) = self.stream.take() {
            send(Frame::new(stream, Kind::Exit, exit.encode()));
            // Its end was seen.
            self.keep = false;
        }
    }

    /// Shows it to somebody who comes back: what is kept of it, or what of that nobody has
    /// seen. What is then shown again is to be seen again.
    pub fn attach(&mut self, stream: u32, unseen: bool) {
        self.stream = Some(stream);
        self.credit = WINDOW as usize;
        self.replay = self.past.clone();
        if unseen {
            self.replay.newest(self.unseen);
        }
        self.unseen = self.replay.len();
        // Of who was here before: credit for it is not this stream's.
        self.typed.clear();
        self.farewell = false;
    }

    /// Who was there is gone.
    pub fn leave(&mut self, send: &mut impl FnMut(Frame)) {
        let Some(stream) = self.stream.take() else { return };
        self.replay.clear();
        send(Frame::new(stream, Kind::Exit, Exit::Left.encode()));
        if !self.keep {
            self.end();
        }
    }

    /// Ends it: with a word first.
    pub fn end(&mut self) {
        self.keep = false;
        (self.input, self.output, self.errors) = (None, None, None);
        self.signal(Signal::SIGHUP as u8);
        self.signal(Signal::SIGCONT as u8);
        self.doom.get_or_insert_with(|| Instant::now() + GRACE);
    }

    pub fn doom(&self) -> Option<Instant> {
        self.doom
    }

    /// Kills it if its time has come.
    pub fn kill_if_due(&mut self) {
        if self.doom.is_some_and(|doom| Instant::now() >= doom) {
            self.signal(Signal::SIGKILL as u8);
            self.doom = None;
        }
    }

    /// A signal to all of its process group.
    pub fn signal(&self, signal: u8) {
        let Ok(signal) = Signal::try_from(i32::from(signal)) else { return };
        let pid = Pid::from_raw(self.pid() as i32);
        // Once it has been waited for, its number may be another's.
        if self.exit.is_none() {
            let _ = kill(Pid::from_raw(-pid.as_raw()), signal).or_else(|_| kill(pid, signal));
        }
    }

    pub fn resize(&self, size: Size) {
        if let Some(terminal) = self.output.as_ref().filter(|_| self.terminal) {
            spawn::resize(terminal, size);
        }
    }
}
