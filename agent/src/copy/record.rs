//! What the two ends of a copy say: a kind (1 byte), a length (4, little endian) and so many
//! bytes. Neither end believes the other: whatever is too long, or has no place, ends the copy.

use std::io::{self, ErrorKind, Read, Write};

use super::Stop;
use crate::message::{Fields, fields, number, small};

/// Contents are sent in pieces of at most so many bytes: with its head, one fills a frame.
pub const BYTES: usize = crate::MAX_PAYLOAD - HEAD;
/// Any other record: a path or a link has at most 4 KiB.
const MAX: usize = 16 << 10;
const HEAD: usize = 5;

const TOTAL: u8 = 1;
const FOLDER: u8 = 2;
const LEAVE: u8 = 3;
const FILE: u8 = 4;
const LINK: u8 = 5;
const FROM: u8 = 6;
const CONTENT: u8 = 7;
const HOLE: u8 = 8;
const END: u8 = 9;
const ABANDON: u8 = 10;
const TROUBLE: u8 = 11;
const FINISH: u8 = 12;
const HAVE: u8 = 13;
const DONE: u8 = 14;
const FAILED: u8 = 15;

/// A file, a folder or a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Which of the sources it is, or lies in.
    pub source: u32,
    /// Empty for a source that has none, such as `.`: then it is what the folder holds.
    pub name: Vec<u8>,
    pub mode: u32,
    /// When it was changed: seconds, and the rest in nanoseconds.
    pub time: (i64, u32),
    /// Of a file, in bytes.
    pub size: u64,
    /// Of a link.
    pub target: Vec<u8>,
    /// Whether what is there of it already is asked for.
    pub asks: bool,
}

/// What one end says to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// How many bytes all files have, as far as that is known.
    Total(u64),
    /// What follows is in this folder, until it is left.
    Folder(Entry),
    Leave,
    File(Entry),
    Link(Entry),
    /// Of a file that was asked for: where it begins, or goes on.
    From(u64),
    Content(&'a [u8]),
    /// So many zeros that are nowhere stored.
    Hole(u64),
    /// The file is whole.
    End,
    /// The file could not be read to its end.
    Abandon,
    /// Something was not copied, and why.
    Trouble(String),
    /// Nothing more comes.
    Finish,
    /// The answer to a file that asks: how much of it is there, and what of.
    Have {
        length: u64,
        digest: [u8; 16],
    },
    /// The answer to the end: all is written.
    Done,
    /// The last word: it cannot be written.
    Failed(String),
}

impl Entry {
    fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.number(1, self.source.into()).put(2, &self.name).number(3, self.mode.into());
        fields.number(4, self.time.0 as u64).number(5, self.time.1.into()).number(6, self.size);
        fields.put(7, &self.target);
        if self.asks {
            fields.put(8, []);
        }
        fields.into_bytes()
    }

    fn decode(bytes: &[u8]) -> Result<Self, Stop> {
        let mut entry = Self::default();
        for (tag, value) in fields(bytes)? {
            match tag {
                1 => entry.source = small(value)?,
                2 => entry.name = value.to_vec(),
                3 => entry.mode = small(value)?,
                4 => entry.time.0 = number(value)? as i64,
                5 => entry.time.1 = small(value)?,
                6 => entry.size = number(value)?,
                7 => entry.target = value.to_vec(),
                8 => entry.asks = true,
                _ => {}
            }
        }
        match entry.time.1 < 1_000_000_000 {
            true => Ok(entry),
            false => Err(Stop::Wrong("a time that is none".into())),
        }
    }
}

impl Record<'_> {
    /// Its kind, and what is in it.
    fn parts(&self) -> (u8, Vec<u8>) {
        let number = |number: &u64| number.to_le_bytes().to_vec();
        let text = |text: &str| crate::message::cut(text).as_bytes().to_vec();
        match self {
            Self::Total(bytes) => (TOTAL, number(bytes)),
            Self::Folder(entry) => (FOLDER, entry.encode()),
            Self::Leave => (LEAVE, Vec::new()),
            Self::File(entry) => (FILE, entry.encode()),
            Self::Link(entry) => (LINK, entry.encode()),
            Self::From(offset) => (FROM, number(offset)),
            Self::Content(bytes) => (CONTENT, bytes.to_vec()),
            Self::Hole(length) => (HOLE, number(length)),
            Self::End => (END, Vec::new()),
            Self::Abandon => (ABANDON, Vec::new()),
            Self::Trouble(why) => (TROUBLE, text(why)),
            Self::Finish => (FINISH, Vec::new()),
            Self::Have { length, digest } => (HAVE, [&number(length)[..], digest].concat()),
            Self::Done => (DONE, Vec::new()),
            Self::Failed(why) => (FAILED, text(why)),
        }
    }

    /// Says it.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, bytes) = self.parts();
        to.write_all(&[&head(kind, bytes.len())[..], &bytes].concat())
    }

    fn read(kind: u8, bytes: &[u8]) -> Result<Record<'_>, Stop> {
        let text = || crate::message::text(bytes);
        Ok(match kind {
            TOTAL => Record::Total(number(bytes)?),
            FOLDER => Record::Folder(Entry::decode(bytes)?),
            LEAVE => Record::Leave,
            FILE => Record::File(Entry::decode(bytes)?),
            LINK => Record::Link(Entry::decode(bytes)?),
            FROM => Record::From(number(bytes)?),
            CONTENT => Record::Content(bytes),
            HOLE => Record::Hole(number(bytes)?),
            END => Record::End,
            ABANDON => Record::Abandon,
            TROUBLE => Record::Trouble(text()),
            FINISH => Record::Finish,
            HAVE => {
                let digest = bytes.get(8..).and_then(|digest| digest.try_into().ok());
                let digest = digest.ok_or_else(|| Stop::Wrong("a digest that is none".into()))?;
                Record::Have { length: number(&bytes[..8])?, digest }
            }
            DONE => Record::Done,
            FAILED => Record::Failed(text()),
            kind => return Err(Stop::Wrong(format!("a record of kind {kind}"))),
        })
    }
}

fn head(kind: u8, length: usize) -> [u8; HEAD] {
    let [a, b, c, d] = (length as u32).to_le_bytes();
    [kind, a, b, c, d]
}

/// Room for a piece of contents, to be read into behind its head.
#[derive(Debug)]
pub struct Piece(Vec<u8>);

impl Default for Piece {
    fn default() -> Self {
        Self(vec![0; HEAD + BYTES])
    }
}

impl Piece {
    /// Where contents are put.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.0[HEAD..]
    }

    /// Says the first so many bytes that were put there.
    pub fn write(&mut self, length: usize, to: &mut impl Write) -> io::Result<()> {
        self.0[..HEAD].copy_from_slice(&head(CONTENT, length));
        to.write_all(&self.0[..HEAD + length])
    }
}

/// What the other end says. Holds a few pieces at most.
#[derive(Debug)]
pub struct Records<R> {
    from: R,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl<R: Read> Records<R> {
    pub fn new(from: R) -> Self {
        Self { from, bytes: vec![0; 4 * crate::MAX_PAYLOAD], start: 0, end: 0 }
    }

    /// Waits until there are so many bytes more.
    fn need(&mut self, count: usize) -> Result<(), Stop> {
        while self.end - self.start < count {
            if self.start + count > self.bytes.len() {
                self.bytes.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            match self.from.read(&mut self.bytes[self.end..]) {
                Ok(0) => return Err(Stop::Gone),
                Ok(more) => self.end += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Stop::Gone),
            }
        }
        Ok(())
    }

    /// The next.
    ///
    /// # Errors
    /// When there is none, or none that is understood.
    pub fn hear(&mut self) -> Result<Record<'_>, Stop> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        self.need(HEAD)?;
        let head = &self.bytes[self.start..];
        let (kind, length) = (head[0], [head[1], head[2], head[3], head[4]]);
        let length = u32::from_le_bytes(length) as usize;
        if length > (if kind == CONTENT { BYTES } else { MAX }) {
            return Err(Stop::Wrong(format!("a record of {length} bytes")));
        }
        self.need(HEAD + length)?;
        let at = self.start + HEAD;
        self.start = at + length;
        Record::read(kind, &self.bytes[at..at + length])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_in_whatever_pieces() {
        struct Slow<'a>(&'a [u8], usize);
        impl Read for Slow<'_> {
            fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
                let count = self.1.min(to.len()).min(self.0.len());
                to[..count].copy_from_slice(&self.0[..count]);
                self.0 = &self.0[count..];
                Ok(count)
            }
        }
        let entry = Entry {
            source: 3,
            name: b"\xff name".into(),
            mode: 0o100_644,
            time: (-5, 7),
            size: u64::MAX,
            target: b"../x".into(),
            asks: true,
        };
        let much = vec![b'x'; BYTES];
        let all = [
            Record::Total(9),
            Record::Folder(Entry::default()),
            Record::Leave,
            Record::File(entry.clone()),
            Record::Link(entry),
            Record::From(u64::MAX),
            Record::Content(&much),
            Record::Hole(1),
            Record::Content(b"y"),
            Record::End,
            Record::Abandon,
            Record::Trouble("no".into()),
            Record::Have { length: 5, digest: [9; 16] },
            Record::Failed("full".into()),
            Record::Done,
            Record::Finish,
        ];
        let mut bytes = Vec::new();
        for _ in 0..5 {
            all.iter().for_each(|record| record.write(&mut bytes).unwrap());
        }
        for size in [1, 1000, 70_000, bytes.len()] {
            let mut records = Records::new(Slow(&bytes, size));
            for record in all.iter().cycle().take(5 * all.len()) {
                assert_eq!(records.hear().unwrap(), *record, "{size}");
            }
            assert!(matches!(records.hear(), Err(Stop::Gone)));
        }
    }

    #[test]
    fn what_no_record_can_be_is_an_error() {
        let long = (BYTES as u32 + 1).to_le_bytes();
        let name = (MAX as u32 + 1).to_le_bytes();
        for wrong in [
            &[&[CONTENT][..], &long].concat()[..],
            &[&[FILE][..], &name].concat(),
            &[99, 0, 0, 0, 0],
            &[TOTAL, 1, 0, 0, 0, 9],
            &[HAVE, 2, 0, 0, 0, 9, 9],
            &[FILE, 1, 0, 0, 0, 2],
            &[FILE, 13, 0, 0, 0, 5, 8, 0, 0, 0, 0, 0xca, 0x9a, 0x3b, 0, 0, 0, 0],
        ] {
            let said = Records::new(wrong).hear().map(|record| format!("{record:?}"));
            assert!(matches!(said, Err(Stop::Wrong(_))), "{wrong:?}: {said:?}");
        }
        assert!(matches!(Records::new(&[FILE, 5, 0, 0, 0][..]).hear(), Err(Stop::Gone)));
    }
}
