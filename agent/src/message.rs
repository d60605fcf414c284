//! What is in frames: fields of a tag (1 byte), a length (4, little endian) and bytes. Unknown
//! tags are passed over, so that either side may be newer. Words are bytes, as in Unix.

use super::Malformed;

/// Fields as they are written.
#[derive(Default)]
pub(crate) struct Fields(Vec<u8>);

impl Fields {
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub(crate) fn put(&mut self, tag: u8, bytes: impl AsRef<[u8]>) -> &mut Self {
        let bytes = bytes.as_ref();
        self.0.push(tag);
        self.0.extend((bytes.len() as u32).to_le_bytes());
        self.0.extend(bytes);
        self
    }

    pub(crate) fn number(&mut self, tag: u8, number: u64) -> &mut Self {
        self.put(tag, number.to_le_bytes())
    }

    fn all<T: AsRef<[u8]>>(&mut self, tag: u8, list: &[T]) -> &mut Self {
        for bytes in list {
            self.put(tag, bytes);
        }
        self
    }
}

/// The fields of a payload, in their order.
pub(crate) fn fields(mut bytes: &[u8]) -> Result<Vec<(u8, &[u8])>, Malformed> {
    let mut found = Vec::new();
    while let Some((tag, rest)) = bytes.split_first() {
        let short = || Malformed("a field is cut off".into());
        let (length, rest) = rest.split_first_chunk().ok_or_else(short)?;
        let length = u32::from_le_bytes(*length) as usize;
        let (value, rest) = rest.split_at_checked(length).ok_or_else(short)?;
        found.push((*tag, value));
        bytes = rest;
    }
    Ok(found)
}

pub(crate) fn number(bytes: &[u8]) -> Result<u64, Malformed> {
    let bytes = bytes.try_into().map_err(|_| Malformed("a number is not one".into()))?;
    Ok(u64::from_le_bytes(bytes))
}

/// A number that has to fit.
pub(crate) fn small<T: TryFrom<u64>>(bytes: &[u8]) -> Result<T, Malformed> {
    T::try_from(number(bytes)?).map_err(|_| Malformed("a number is too large".into()))
}

/// The longest text of one field, in bytes.
const MAX_TEXT: usize = 4096;

/// As much of a text as one may show: a frame has room for it, whoever it is from.
pub(crate) fn cut(text: &str) -> &str {
    let end = (0..=MAX_TEXT.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

/// What one may show: no more than a line, and only text.
pub(crate) fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_TEXT)]);
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// The size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
}

impl Size {
    pub fn encode(self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.rows.to_le_bytes(), self.columns.to_le_bytes());
        [a, b, c, d]
    }

    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        match *bytes {
            [a, b, c, d] => {
                Ok(Self { rows: u16::from_le_bytes([a, b]), columns: u16::from_le_bytes([c, d]) })
            }
            _ => Err(Malformed("the size of a terminal is none".into())),
        }
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit(pub u32);

impl Credit {
    pub fn encode(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }

    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let bytes = bytes.try_into().map_err(|_| Malformed("credit is not a number".into()))?;
        Ok(Self(u32::from_le_bytes(bytes)))
    }
}

/// What a stream is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    Exec(Exec),
    /// To see, and speak to, a command that was left.
    Attach {
        id: u64,
        /// Whether only what nobody has seen yet is shown of what it wrote.
        unseen: bool,
    },
    /// Which commands there are.
    List,
    /// A signal to a command, whoever started it.
    Kill {
        id: u64,
        signal: u8,
    },
    /// Its input and output are the two ends of a [`copy`](crate::copy).
    Copy(Copy),
    /// The guest is to be who its input says.
    Assume,
    /// Brings the file systems on the guest's disks to rest, until its input ends, but not for
    /// longer. It writes how many they are.
    Freeze {
        seconds: u32,
    },
}

/// The exit code of a freeze that had an end before its input.
pub const THAWED_BEFORE: u8 = 3;

/// Files to copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copy {
    /// Whether they come into the guest; else they leave it.
    pub comes: bool,
    /// What to send, or the one place where to put it.
    pub paths: Vec<Vec<u8>>,
    /// Whether the place is a folder to put it into, also where there is none yet.
    pub into: bool,
    /// Who reads or writes them. Absent: who runs the agent, which is root.
    pub user: Option<Vec<u8>>,
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// The program, looked for in the guest's `PATH`, and its arguments. Of a script, all but
    /// the first are its arguments.
    pub argv: Vec<Vec<u8>>,
    /// Run this instead of a program.
    pub script: Option<Vec<u8>>,
    /// `NAME=VALUE`, besides what the user has from logging in.
    pub env: Vec<Vec<u8>>,
    /// `NAME=VALUE` to be put before what is in the variable, and a colon.
    pub prefixes: Vec<Vec<u8>>,
    /// The same, behind it.
    pub suffixes: Vec<Vec<u8>>,
    /// Absent: the user's home.
    pub cwd: Option<Vec<u8>>,
    /// Absent: who runs the agent, which is root.
    pub user: Option<Vec<u8>>,
    /// On a terminal of this size.
    pub terminal: Option<Size>,
    /// CPUs of the guest to stay on. None: all.
    pub cpus: Vec<u16>,
    /// Whether there is any standard input.
    pub input: bool,
    /// Whether it goes on when nobody is there, to be attached to.
    pub keep: bool,
    /// Whether it is left as soon as it has begun, so that all it says is kept.
    pub leave: bool,
    /// Whether, when nobody is there, it waits rather than that something it wrote is lost.
    pub whole: bool,
}

const VERB: u8 = 1;
const ID: u8 = 2;
const SIGNAL: u8 = 3;
const ARGUMENT: u8 = 4;
const SCRIPT: u8 = 5;
const VARIABLE: u8 = 6;
const PREFIX: u8 = 7;
const SUFFIX: u8 = 8;
const CWD: u8 = 9;
const USER: u8 = 10;
const TERMINAL: u8 = 11;
const CPU: u8 = 12;
const INPUT: u8 = 13;
const KEEP: u8 = 14;
const LEAVE: u8 = 15;
const INTO: u8 = 16;
const WHOLE: u8 = 17;
const UNSEEN: u8 = 18;
const SECONDS: u8 = 19;

impl Opening {
    pub fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        match self {
            Self::Exec(exec) => exec.encode(fields.put(VERB, "exec")),
            Self::Attach { id, unseen } => {
                fields.put(VERB, "attach").number(ID, *id);
                if *unseen {
                    fields.put(UNSEEN, []);
                }
            }
            Self::List => {
                fields.put(VERB, "list");
            }
            Self::Assume => {
                fields.put(VERB, "assume");
            }
            Self::Kill { id, signal } => {
                fields.put(VERB, "kill").number(ID, *id).number(SIGNAL, (*signal).into());
            }
            Self::Copy(copy) => {
                fields.put(VERB, if copy.comes { "receive" } else { "send" });
                fields.all(ARGUMENT, &copy.paths);
                if let Some(user) = &copy.user {
                    fields.put(USER, user);
                }
                if copy.into {
                    fields.put(INTO, []);
                }
            }
            Self::Freeze { seconds } => {
                fields.put(VERB, "freeze").number(SECONDS, (*seconds).into());
            }
        }
        fields.0
    }

    /// # Errors
    /// When it is none, or one that is not known here.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let fields = fields(bytes)?;
        let find = |tag: u8| fields.iter().find(|field| field.0 == tag).map(|field| field.1);
        let id = || number(find(ID).unwrap_or_default());
        match find(VERB).unwrap_or_default() {
            b"exec" => Exec::decode(&fields).map(Self::Exec),
            b"attach" => Ok(Self::Attach { id: id()?, unseen: find(UNSEEN).is_some() }),
            b"list" => Ok(Self::List),
            b"assume" => Ok(Self::Assume),
            b"kill" => {
                Ok(Self::Kill { id: id()?, signal: small(find(SIGNAL).unwrap_or_default())? })
            }
            b"freeze" => Ok(Self::Freeze { seconds: small(find(SECONDS).unwrap_or_default())? }),
            verb @ (b"receive" | b"send") => {
                let all = |tag: u8| fields.iter().filter(move |field| field.0 == tag);
                Ok(Self::Copy(Copy {
                    comes: verb == b"receive",
                    paths: all(ARGUMENT).map(|field| field.1.to_vec()).collect(),
                    into: find(INTO).is_some(),
                    user: find(USER).map(<[u8]>::to_vec),
                }))
            }
            verb => Err(Malformed(format!("`{}` is not known here", text(verb)))),
        }
    }
}

impl Exec {
    fn encode(&self, fields: &mut Fields) {
        fields.all(ARGUMENT, &self.argv).all(VARIABLE, &self.env);
        fields.all(PREFIX, &self.prefixes).all(SUFFIX, &self.suffixes);
        for (tag, value) in [(SCRIPT, &self.script), (CWD, &self.cwd), (USER, &self.user)] {
            if let Some(value) = value {
                fields.put(tag, value);
            }
        }
        if let Some(size) = self.terminal {
            fields.put(TERMINAL, size.encode());
        }
        for cpu in &self.cpus {
            fields.number(CPU, (*cpu).into());
        }
        let flags =
            [(INPUT, self.input), (KEEP, self.keep), (LEAVE, self.leave), (WHOLE, self.whole)];
        for (tag, flag) in flags {
            if flag {
                fields.put(tag, []);
            }
        }
    }

    fn decode(fields: &[(u8, &[u8])]) -> Result<Self, Malformed> {
        let mut exec = Self::default();
        for (tag, value) in fields {
            let bytes = value.to_vec();
            match *tag {
                ARGUMENT => exec.argv.push(bytes),
                SCRIPT => exec.script = Some(bytes),
                VARIABLE => exec.env.push(bytes),
                PREFIX => exec.prefixes.push(bytes),
                SUFFIX => exec.suffixes.push(bytes),
                CWD => exec.cwd = Some(bytes),
                USER => exec.user = Some(bytes),
                TERMINAL => exec.terminal = Some(Size::decode(value)?),
                CPU => exec.cpus.push(small(value)?),
                INPUT => exec.input = true,
                KEEP => exec.keep = true,
                LEAVE => exec.leave = true,
                WHOLE => exec.whole = true,
                _ => {}
            }
        }
        Ok(exec)
    }
}

/// Who answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Of the protocol.
    pub version: u32,
    /// Of the agent.
    pub agent: String,
    pub hostname: String,
    /// Another one after each start of the guest.
    pub boot_id: String,
    /// Of the guest, in milliseconds.
    pub uptime: u64,
    /// How many CPUs commands may run on.
    pub cores: u32,
    /// What it can do beside running commands.
    pub features: Vec<String>,
}

impl Hello {
    pub fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.number(1, self.version.into()).put(2, &self.agent).put(3, &self.hostname);
        fields.put(4, &self.boot_id).number(5, self.uptime).number(6, self.cores.into());
        fields.all(7, &self.features);
        fields.0
    }

    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut hello = Self::default();
        for (tag, value) in fields(bytes)? {
            match tag {
                1 => hello.version = small(value)?,
                2 => hello.agent = text(value),
                3 => hello.hostname = text(value),
                4 => hello.boot_id = text(value),
                5 => hello.uptime = number(value)?,
                6 => hello.cores = small(value)?,
                7 => hello.features.push(text(value)),
                _ => {}
            }
        }
        Ok(hello)
    }
}

/// A command that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// What it is known by, as long as its agent runs.
    pub id: u64,
    pub pid: u32,
}

impl Started {
    pub fn encode(self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.number(1, self.id).number(2, self.pid.into());
        fields.0
    }

    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut started = Self { id: 0, pid: 0 };
        for (tag, value) in fields(bytes)? {
            match tag {
                1 => started.id = number(value)?,
                2 => started.pid = small(value)?,
                _ => {}
            }
        }
        Ok(started)
    }
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The command's own exit code.
    Code(u8),
    /// The signal that killed the command.
    Signal(u8),
    /// The command goes on, without this stream.
    Left,
}

impl Exit {
    pub fn encode(self) -> Vec<u8> {
        let mut fields = Fields::default();
        match self {
            Self::Code(code) => fields.number(1, code.into()),
            Self::Signal(signal) => fields.number(2, signal.into()),
            Self::Left => fields.put(3, []),
        };
        fields.0
    }

    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        match fields(bytes)?.first() {
            Some((1, code)) => Ok(Self::Code(small(code)?)),
            Some((2, signal)) => Ok(Self::Signal(small(signal)?)),
            Some((3, _)) => Ok(Self::Left),
            _ => Err(Malformed("an end without a status".into())),
        }
    }
}

/// Why something could not be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    pub why: String,
    /// As a shell would exit: 127 where there is no such program, 126 where it cannot be run.
    pub code: u8,
}

impl Failure {
    pub fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.put(1, cut(&self.why)).number(2, self.code.into());
        fields.0
    }

    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut failure = Self::default();
        for (tag, value) in fields(bytes)? {
            match tag {
                1 => failure.why = text(value),
                2 => failure.code = small(value)?,
                _ => {}
            }
        }
        Ok(failure)
    }
}

/// A command that the agent has started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Command {
    pub id: u64,
    pub pid: u32,
    pub user: String,
    /// The words, for people to read.
    pub words: String,
    /// Since it began, in seconds.
    pub seconds: u64,
    pub attached: bool,
    pub exit: Option<Exit>,
}

impl Command {
    pub fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.number(1, self.id).number(2, self.pid.into()).put(3, cut(&self.user));
        fields.put(4, cut(&self.words)).number(5, self.seconds);
        if self.attached {
            fields.put(6, []);
        }
        if let Some(exit) = self.exit {
            fields.put(7, exit.encode());
        }
        fields.0
    }

    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut command = Self::default();
        for (tag, value) in fields(bytes)? {
            match tag {
                1 => command.id = number(value)?,
                2 => command.pid = small(value)?,
                3 => command.user = text(value),
                4 => command.words = text(value),
                5 => command.seconds = number(value)?,
                6 => command.attached = true,
                7 => command.exit = Some(Exit::decode(value)?),
                _ => {}
            }
        }
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openings_arrive_as_they_were_sent() {
        let exec = Exec {
            argv: vec![b"printf".into(), b"\xff %s\n".into(), Vec::new()],
            script: Some(b"#!/bin/sh\n".into()),
            env: vec![b"A=1".into(), b"B==".into()],
            prefixes: vec![b"PATH=/opt/bin".into()],
            suffixes: vec![b"MANPATH=/opt/man".into()],
            cwd: Some(b"/tmp".into()),
            user: Some(b"ada".into()),
            terminal: Some(Size { rows: 24, columns: 300 }),
            cpus: vec![0, 3],
            input: true,
            keep: true,
            leave: true,
            whole: true,
        };
        for opening in [
            Opening::Exec(exec),
            Opening::Exec(Exec::default()),
            Opening::Attach { id: u64::MAX, unseen: false },
            Opening::Attach { id: 1, unseen: true },
            Opening::List,
            Opening::Assume,
            Opening::Kill { id: 3, signal: 15 },
            Opening::Copy(Copy::default()),
            Opening::Freeze { seconds: 20 },
            Opening::Copy(Copy {
                comes: true,
                paths: vec![b"/\xff".into(), b"b".into()],
                into: true,
                user: Some(b"ada".into()),
            }),
        ] {
            assert_eq!(Opening::decode(&opening.encode()).unwrap(), opening);
        }
    }

    #[test]
    fn answers_arrive_as_they_were_sent() {
        let hello = Hello {
            version: 1,
            agent: "0.1.0".into(),
            hostname: "vm0".into(),
            boot_id: "0af".into(),
            uptime: 12_345,
            cores: 4,
            features: vec!["replay".into(), "pty".into()],
        };
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
        let started = Started { id: 7, pid: 42 };
        assert_eq!(Started::decode(&started.encode()).unwrap(), started);
        for exit in [Exit::Code(0), Exit::Code(255), Exit::Signal(9), Exit::Left] {
            assert_eq!(Exit::decode(&exit.encode()).unwrap(), exit);
            let command = Command {
                id: 1,
                pid: 2,
                user: "root".into(),
                words: "sleep 5".into(),
                seconds: 3,
                attached: exit == Exit::Left,
                exit: Some(exit),
            };
            assert_eq!(Command::decode(&command.encode()).unwrap(), command);
        }
        let failure = Failure { why: "no such program".into(), code: 127 };
        assert_eq!(Failure::decode(&failure.encode()).unwrap(), failure);
    }

    #[test]
    fn texts_of_any_length_fit_into_a_frame() {
        // In the middle of a letter there is no end.
        for (long, length) in [("x".repeat(1 << 20), 4096), ("€".repeat(1 << 18), 4095)] {
            let failure = Failure { why: long.clone(), code: 127 }.encode();
            assert_eq!(Failure::decode(&failure).unwrap().why, long[..length]);
            let (user, words) = (long.clone(), long.clone());
            let command = Command { user, words, ..Command::default() }.encode();
            assert!(command.len() < crate::PIECE);
            assert_eq!(Command::decode(&command).unwrap().words, long[..length]);
        }
    }

    #[test]
    fn what_is_newer_is_passed_over_and_what_is_wrong_is_an_error() {
        let mut fields = Fields::default();
        fields.put(99, "new").put(VERB, "list").put(0, []);
        assert_eq!(Opening::decode(&fields.0).unwrap(), Opening::List);
        for wrong in [&[VERB, 1, 0, 0][..], &[VERB, 9, 0, 0, 0, b'x'], b"\x01\x04\0\0\0sing"] {
            Opening::decode(wrong).unwrap_err();
        }
        let mut large = Fields::default();
        large.number(1, 256);
        Exit::decode(&large.0).unwrap_err();
        Exit::decode(&[]).unwrap_err();
        // What a guest says is shown on a terminal.
        let failure = Failure { why: "a\x1b[2J\nb".into(), code: 1 };
        assert_eq!(Failure::decode(&failure.encode()).unwrap().why, "a [2J b");
    }
}
