//! What pcocc's agent says and is told: lines of base64, each a protocol buffer. Pure.
//!
//! ```text
//! line     base64(AgentMessage) \n                    an empty one says nothing
//! message  1 kind, 2 name, 3 tag, 4 { 1 type, 2 value }
//! ```
//!
//! Only what this side needs of it is known here. Fields that are not known are passed over;
//! lengths are checked against what there is, and nothing is kept that was only announced.

use base64ct::{Base64, Encoding};
use pavo_agent::Malformed;

/// The longest line, in bytes. Output comes in pieces of 32 KiB.
pub const MAX_LINE: usize = 256 << 10;
/// The longest piece of output.
const MAX_PIECE: usize = 64 << 10;
/// As much of a text as one may show.
const MAX_TEXT: usize = 1000;
/// How many commands a list may have.
const MAX_LIST: usize = 4096;
/// What each type's name has before it.
const URL: &str = "type.googleapis.com/";

/// What a message is. The agent asks nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Request = 0,
    /// Also the last word of a stream.
    Reply = 1,
    StreamRequest = 3,
    StreamReply = 4,
}

/// What the agent has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub kind: Kind,
    pub name: String,
    pub tag: i64,
    pub said: Said,
}

/// What is in a message of the agent's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Done, and there is no more to say. The name of the answer's type.
    Done(&'static str),
    /// It could not be done.
    Refused(String),
    /// Its version.
    Hello(u32),
    Hostname(String),
    Cores(u32),
    /// A user's home.
    Home(String),
    /// The commands it has, by their numbers.
    Commands(Vec<i64>),
    /// What a program that was waited for has returned.
    Returned(i32),
    Written(u64),
    Piece(Piece),
    /// A command's exit code; -1 if a signal killed it.
    Status(i32),
}

/// A piece of a command's output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    pub errors: bool,
    pub bytes: Vec<u8>,
    /// Whose it is, where that is said.
    pub id: i64,
}

/// The types of answers that say no more than that it was done.
const DONE: &[&str] = &[
    "ExecResult",
    "AttachResult",
    "DetachResult",
    "KillResult",
    "IOResult",
    "ResizeResult",
    "RemoveResult",
];

/// Fields as they are written. What is zero or empty is left away, as it is by others.
#[derive(Debug, Default)]
pub struct Fields(Vec<u8>);

impl Fields {
    pub fn number(mut self, field: u8, number: u64) -> Self {
        if number != 0 {
            self.varint(u64::from(field) << 3);
            self.varint(number);
        }
        self
    }

    /// A number that may be negative.
    pub fn signed(self, field: u8, number: i64) -> Self {
        self.number(field, number as u64)
    }

    pub fn bytes(self, field: u8, bytes: impl AsRef<[u8]>) -> Self {
        if bytes.as_ref().is_empty() { self } else { self.item(field, bytes) }
    }

    /// One of several, which may be empty.
    pub fn item(mut self, field: u8, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.varint(u64::from(field) << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    pub fn items<T: AsRef<[u8]>>(self, field: u8, items: &[T]) -> Self {
        items.iter().fold(self, |fields, item| fields.item(field, item))
    }

    /// Several numbers.
    pub fn numbers(self, field: u8, numbers: impl IntoIterator<Item = u64>) -> Self {
        let mut all = Self::default();
        numbers.into_iter().for_each(|number| all.varint(number));
        self.bytes(field, all.0)
    }

    /// As a message within another.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }
}

/// A request, as a line. `data` is the value of a message of type `of`.
pub fn line(kind: Kind, name: &str, tag: i64, of: &str, data: Fields) -> Vec<u8> {
    let any = Fields::default().bytes(1, format!("{URL}{of}")).bytes(2, data.0);
    let message = Fields::default().number(1, kind as u64).bytes(2, name).signed(3, tag);
    let mut line = Base64::encode_string(&message.item(4, any.0).0).into_bytes();
    line.push(b'\n');
    line
}

/// The name and the tag of a message, whoever's it is.
pub fn question(bytes: &[u8]) -> Option<(String, i64)> {
    let name = text(bytes, 2).ok().filter(|name| !name.is_empty())?;
    Some((name, number(bytes, 3).ok()?))
}

/// The value of a field.
#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Of a kind that nothing we know has.
    Other,
}

impl<'a> Value<'a> {
    fn number(self) -> Result<u64, Malformed> {
        match self {
            Self::Number(number) => Ok(number),
            _ => Err(Malformed("a number that is none".into())),
        }
    }

    fn small<T: TryFrom<i64>>(self) -> Result<T, Malformed> {
        T::try_from(self.number()? as i64).map_err(|_| Malformed("a number is too large".into()))
    }

    fn bytes(self) -> Result<&'a [u8], Malformed> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(Malformed("a text that is none".into())),
        }
    }

    /// What one may show: no more than a line, and only text.
    fn text(self) -> Result<String, Malformed> {
        let bytes = self.bytes()?;
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_TEXT)]);
        Ok(text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect())
    }
}

/// Reads fields one after the other.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or_else(short)?;
            self.0 = rest;
            // The tenth has one bit only.
            if shift == 63 && *byte > 1 {
                break;
            }
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Malformed("a number of more than 64 bits".into()))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], Malformed> {
        let length = usize::try_from(length).map_err(|_| short())?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or_else(short)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, Malformed> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let head = self.varint()?;
        let value = match head & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.take(8).map(|_| Value::Other)?,
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Value::Other)?,
            kind => return Err(Malformed(format!("a field of kind {kind}"))),
        };
        Ok(Some((head >> 3, value)))
    }
}

fn short() -> Malformed {
    Malformed("a message is cut off".into())
}

/// Calls `take` with each field.
fn each<'a>(
    bytes: &'a [u8],
    mut take: impl FnMut(u64, Value<'a>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    let mut reader = Reader(bytes);
    while let Some((field, value)) = reader.next()? {
        take(field, value)?;
    }
    Ok(())
}

/// The last of a field, which is what counts.
fn last<'a>(bytes: &'a [u8], wanted: u64) -> Result<Option<Value<'a>>, Malformed> {
    let mut found = None;
    each(bytes, |field, value| {
        if field == wanted {
            found = Some(value);
        }
        Ok(())
    })?;
    Ok(found)
}

fn number<T: TryFrom<i64> + Default>(bytes: &[u8], field: u64) -> Result<T, Malformed> {
    last(bytes, field)?.map_or(Ok(T::default()), Value::small)
}

fn text(bytes: &[u8], field: u64) -> Result<String, Malformed> {
    last(bytes, field)?.map_or(Ok(String::new()), Value::text)
}

impl Message {
    /// Reads what is in a line of the agent's.
    ///
    /// # Errors
    /// When it is no message, or one that an agent does not send.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (mut kind, mut tag, mut name, mut any) = (0, 0, String::new(), None);
        each(bytes, |field, value| {
            match field {
                1 => kind = value.number()?,
                2 => name = value.text()?,
                3 => tag = value.number()? as i64,
                4 => any = Some(value.bytes()?),
                _ => {}
            }
            Ok(())
        })?;
        let kind = match kind {
            1 => Kind::Reply,
            4 => Kind::StreamReply,
            kind => return Err(Malformed(format!("a message of kind {kind}"))),
        };
        let said = Said::decode(any.ok_or_else(|| Malformed("a message without data".into()))?)?;
        Ok(Self { kind, name, tag, said })
    }
}

impl Said {
    fn decode(any: &[u8]) -> Result<Self, Malformed> {
        let name = text(any, 1)?;
        let name = name.rsplit('/').next().unwrap_or_default();
        let data = last(any, 2)?.map_or(Ok(&[][..]), Value::bytes)?;
        if let Some(done) = DONE.iter().find(|done| **done == name) {
            return Ok(Self::Done(done));
        }
        Ok(match name {
            "GenericError" => Self::Refused(text(data, 2)?),
            "HelloResult" => Self::Hello(number(data, 2)?),
            "HostnameResult" => Self::Hostname(text(data, 1)?),
            "CoreCountResult" => Self::Cores(number(data, 1)?),
            "UserInfoResult" => Self::Home(text(data, 3)?),
            "ListExecResult" => Self::Commands(commands(data)?),
            "ExecOutputResult" => Self::Returned(number(data, 1)?),
            "WriteFileResult" => Self::Written(number(data, 1)?),
            "IOMessage" => Self::Piece(Piece::decode(data)?),
            "ExitStatus" => match number(data, 1)? {
                status @ -1..=255 => Self::Status(status),
                status => return Err(Malformed(format!("an exit code of {status}"))),
            },
            name => return Err(Malformed(format!("an answer of type `{name}`"))),
        })
    }
}

/// The keys of a map from numbers to what is known of each.
fn commands(data: &[u8]) -> Result<Vec<i64>, Malformed> {
    let mut all = Vec::new();
    each(data, |field, value| {
        if field == 1 {
            all.push(number(value.bytes()?, 1)?);
        }
        match all.len() {
            0..=MAX_LIST => Ok(()),
            _ => Err(Malformed("a list without an end".into())),
        }
    })?;
    Ok(all)
}

impl Piece {
    fn decode(data: &[u8]) -> Result<Self, Malformed> {
        let errors = match number(data, 1)? {
            1 => false,
            2 => true,
            other => return Err(Malformed(format!("output of kind {other}"))),
        };
        let bytes = last(data, 3)?.map_or(Ok(&[][..]), Value::bytes)?;
        if bytes.len() > MAX_PIECE {
            return Err(Malformed(format!("a piece of {} bytes", bytes.len())));
        }
        Ok(Self { errors, bytes: bytes.to_vec(), id: number(data, 4)? })
    }
}

/// Lines from bytes that arrive in any pieces.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Vec<u8>,
    /// Where the rest begins, and how far it was looked through.
    at: usize,
    seen: usize,
    /// Of a line that is too long, the rest is nobody's.
    skips: bool,
}

impl Lines {
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.seen -= self.at;
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// What is in the next line that has arrived whole and is not empty.
    ///
    /// # Errors
    /// When it is too long, or no base64. The next one may be right.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, Malformed> {
        loop {
            let end = self.bytes[self.seen..].iter().position(|byte| *byte == b'\n');
            let Some(end) = end.map(|end| self.seen + end) else {
                self.seen = self.bytes.len();
                if self.seen - self.at <= MAX_LINE {
                    return Ok(None);
                }
                (self.bytes, self.at, self.seen) = (Vec::new(), 0, 0);
                return match std::mem::replace(&mut self.skips, true) {
                    true => Ok(None),
                    false => Err(Malformed("a line without an end".into())),
                };
            };
            let (begin, skips) = (self.at, std::mem::take(&mut self.skips));
            (self.at, self.seen) = (end + 1, end + 1);
            let line = &self.bytes[begin..end];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.len() > MAX_LINE {
                return Err(Malformed("a line without an end".into()));
            }
            if !skips && !line.is_empty() {
                let text = std::str::from_utf8(line).ok();
                let bytes = text.and_then(|text| Base64::decode_vec(text).ok());
                return bytes.map(Some).ok_or_else(|| Malformed("what is no base64".into()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(line: &str) -> Result<Message, Malformed> {
        let mut lines = Lines::default();
        lines.push(line.as_bytes());
        lines.push(b"\n");
        Message::decode(&lines.next_line()?.expect("a line"))
    }

    /// The texts are what `protoc` 3.21 makes of the same messages.
    #[test]
    fn lines_are_those_of_other_writers_and_readers() {
        let exec = Fields::default().signed(1, 300).bytes(2, "/bin/sh").items(3, &["-c", "", "é"]);
        let exec = exec.items(4, &["A=b"]).bytes(5, "ada").numbers(6, [0, 3, 200]).number(7, 1);
        let line = line(Kind::Request, "execve", (2 << 32) + 1, "ExecMessage", exec.bytes(8, ""));
        let expected = "EgZleGVjdmUYgYCAgCAiSwofdHlwZS5nb29nbGVhcGlzLmNvbS9FeGVjTWVzc2FnZRIoCKwCEgcvYmluL3NoGgItYxoAGgLDqSIDQT1iKgNhZGEyBAADyAE4AQ==\n";
        assert_eq!(String::from_utf8(line).unwrap(), expected);
        let status =
            "CAESBmF0dGFjaBgFIi0KHnR5cGUuZ29vZ2xlYXBpcy5jb20vRXhpdFN0YXR1cxILCP///////////wE=";
        let (kind, name, tag) = (Kind::Reply, "attach".into(), 5);
        assert_eq!(decode(status).unwrap(), Message { kind, name, tag, said: Said::Status(-1) });
        let list = "CAESCGxpc3RleGVjGAUiQQoidHlwZS5nb29nbGVhcGlzLmNvbS9MaXN0RXhlY1Jlc3VsdBIbCgoIBBIGCgJzaBgBCg0I////////////ARIA";
        assert_eq!(decode(list).unwrap().said, Said::Commands(vec![4, -1]));
    }

    fn answer(of: &str, data: Fields) -> Result<Said, Malformed> {
        let line = line(Kind::Reply, "x", 1, of, data);
        decode(std::str::from_utf8(&line).unwrap().trim_end()).map(|message| message.said)
    }

    #[test]
    fn answers_that_are_none_are_errors() {
        let number = |number| Fields::default().number(1, number);
        assert_eq!(
            answer("HostnameResult", Fields::default().bytes(1, "a\x1b[2J\n")).unwrap(),
            Said::Hostname("a [2J ".into())
        );
        assert_eq!(answer("ExitStatus", number(255)).unwrap(), Said::Status(255));
        for (of, data) in [
            ("ExitStatus", number(256)),
            ("ExitStatus", Fields::default().signed(1, -2)),
            ("ExitStatus", Fields::default().bytes(1, "x")),
            ("CoreCountResult", number(1 << 32)),
            ("IOMessage", Fields::default()),
            ("IOMessage", number(3)),
            ("IOMessage", number(1).bytes(3, vec![0; MAX_PIECE + 1])),
            ("ListExecResult", Fields::default().items(1, &vec![""; MAX_LIST + 1])),
            ("ExecMessage", Fields::default()),
            ("", Fields::default()),
        ] {
            answer(of, data).expect_err(of);
        }
        let request = line(Kind::Request, "hello", 1, "HelloResult", Fields::default());
        decode(std::str::from_utf8(&request).unwrap().trim_end()).unwrap_err();
        for wrong in [
            &b""[..],
            b"\x08\x01",
            b"\x08\x01\x22",
            b"\x08\x01\x22\x7f",
            b"\x08\x01\x22\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02",
            b"\x0b\x0c",
            b"\x09\x01",
        ] {
            Message::decode(wrong).expect_err(&format!("{wrong:?}"));
        }
    }

    #[test]
    fn lines_come_in_any_pieces_and_have_an_end() {
        let mut lines = Lines::default();
        for byte in b"\n\r\nYWI=\r\nYQ==\n" {
            lines.push(&[*byte]);
        }
        assert_eq!(lines.next_line(), Ok(Some(b"ab".to_vec())));
        assert_eq!(lines.next_line(), Ok(Some(b"a".to_vec())));
        assert_eq!(lines.next_line(), Ok(None));
        for wrong in ["YWI\n", "Y WI=\n", "\u{e9}\n"] {
            lines.push(wrong.as_bytes());
            lines.next_line().expect_err(wrong);
        }
        // It is told once, and takes no memory.
        let mut errors = 0;
        for _ in 0..100 {
            lines.push(&[b'A'; 32 << 10]);
            errors += usize::from(lines.next_line().is_err());
            assert!(lines.bytes.capacity() <= 4 * MAX_LINE);
        }
        assert_eq!(errors, 1);
        lines.push(b"AAAA\nYQ==\n");
        assert_eq!(lines.next_line(), Ok(Some(b"a".to_vec())));
    }
}
