//! Frames and marks, from and to bytes that arrive in any pieces.

use std::fmt;

use super::{MAX_PAYLOAD, Nonce};

/// Begins a conversation, before a nonce. Its first bytes are a length that no frame has.
const MARK: [u8; 16] = *b"\xff\xff\xff\xffpavo-agent\r\n";
const MARK_AND_NONCE: usize = MARK.len() + size_of::<Nonce>();
const HEADER: usize = 9;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// To the agent: say who you are. Its payload comes back, before the answer's own.
    Ping = 1,
    /// To the agent: a stream begins. The payload is the end of an [`Opening`](super::Opening).
    Open = 2,
    /// To the agent: the beginning of an opening that is longer than a frame.
    Part = 3,
    /// Standard input; from the agent, standard output.
    Data = 4,
    /// From the agent: standard error.
    Errors = 5,
    /// To the agent: standard input ends.
    End = 6,
    /// So many bytes more may be sent.
    Credit = 7,
    /// To the agent: a signal (1 byte) for the command's process group.
    Signal = 8,
    /// To the agent: the terminal has another [`Size`](super::Size).
    Resize = 9,
    /// To the agent: nobody is there any more. What may not be left is ended.
    Close = 10,
    /// From the agent: the payload of a ping (8 bytes), and a [`Hello`](super::Hello).
    Pong = 16,
    /// From the agent: the command runs.
    Started = 17,
    /// From the agent: a [`Command`](super::Command) of a list.
    Item = 18,
    /// From the agent, and the last of a stream: how it ended.
    Exit = 19,
    /// From the agent, and the last of a stream: it could not be done.
    Fail = 20,
}

impl Kind {
    const ALL: [Self; 15] = [
        Self::Ping,
        Self::Open,
        Self::Part,
        Self::Data,
        Self::Errors,
        Self::End,
        Self::Credit,
        Self::Signal,
        Self::Resize,
        Self::Close,
        Self::Pong,
        Self::Started,
        Self::Item,
        Self::Exit,
        Self::Fail,
    ];

    fn of(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Whether it is the last of its stream.
    pub fn ends(self) -> bool {
        matches!(self, Self::Exit | Self::Fail)
    }

    /// Whether it takes credit.
    pub fn is_output(self) -> bool {
        matches!(self, Self::Data | Self::Errors)
    }
}

/// What is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub stream: u32,
    pub kind: Kind,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(stream: u32, kind: Kind, payload: impl Into<Vec<u8>>) -> Self {
        Self { stream, kind, payload: payload.into() }
    }

    /// Adds it to bytes that are to be sent.
    ///
    /// # Panics
    /// When its payload is longer than [`MAX_PAYLOAD`].
    pub fn write(&self, bytes: &mut Vec<u8>) {
        assert!(self.payload.len() <= MAX_PAYLOAD, "a frame of {} bytes", self.payload.len());
        bytes.extend((self.payload.len() as u32).to_le_bytes());
        bytes.extend(self.stream.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.extend(&self.payload);
    }

    /// As bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        self.write(&mut bytes);
        bytes
    }
}

/// What begins a conversation.
pub fn mark(nonce: &Nonce) -> Vec<u8> {
    [&MARK[..], nonce].concat()
}

/// What has been received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Mark(Nonce),
    Frame(Frame),
}

/// The other side has not kept to the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(pub String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Malformed {}

/// Finds frames and marks in what arrives. Holds at most a frame and what was pushed last.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Where what has not been read begins.
    at: usize,
    /// Between frames, and not in search of a mark.
    in_step: bool,
}

impl Decoder {
    /// One that waits for a mark.
    pub fn new() -> Self {
        Self::default()
    }

    /// One on a line that has just begun, where no mark is needed.
    pub fn in_step() -> Self {
        Self { in_step: true, ..Self::default() }
    }

    /// From here on, and in what has arrived already, nothing counts before the next mark.
    pub fn lose_step(&mut self) {
        self.in_step = false;
    }

    /// Adds what has arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// What comes next, if all of it has arrived.
    ///
    /// # Errors
    /// When it is neither frame nor mark. Until the next mark, nothing counts.
    pub fn next_event(&mut self) -> Result<Option<Event>, Malformed> {
        if !self.in_step {
            return Ok(self.find_mark());
        }
        let event = self.read();
        self.in_step = event.is_ok();
        event
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    fn find_mark(&mut self) -> Option<Event> {
        let found = self.rest().windows(MARK.len()).position(|window| window == MARK);
        match found {
            Some(offset) => {
                self.at += offset;
                let event = self.mark()?;
                self.in_step = true;
                Some(event)
            }
            None => {
                // The mark may have begun.
                self.at = self.bytes.len() - self.rest().len().min(MARK.len() - 1);
                None
            }
        }
    }

    /// The mark that begins here.
    fn mark(&mut self) -> Option<Event> {
        let nonce = self.rest().get(MARK.len()..MARK_AND_NONCE)?;
        let nonce = nonce.try_into().expect("it has that length");
        self.at += MARK_AND_NONCE;
        Some(Event::Mark(nonce))
    }

    fn read(&mut self) -> Result<Option<Event>, Malformed> {
        let rest = self.rest();
        let Some(length) = rest.first_chunk().map(|length| u32::from_le_bytes(*length)) else {
            return Ok(None);
        };
        if length == u32::MAX {
            if rest.iter().zip(&MARK).any(|(is, should)| is != should) {
                return Err(Malformed("what should be a mark is none".into()));
            }
            return Ok(self.mark());
        }
        let length = length as usize;
        if length > MAX_PAYLOAD {
            return Err(Malformed(format!("a frame of {length} bytes")));
        }
        let Some(header) = rest.get(..HEADER) else { return Ok(None) };
        let kind = Kind::of(header[8]);
        let kind = kind.ok_or_else(|| Malformed(format!("a frame of kind {}", header[8])))?;
        let stream = u32::from_le_bytes(header[4..8].try_into().expect("four bytes"));
        let Some(payload) = rest.get(HEADER..HEADER + length) else { return Ok(None) };
        let frame = Frame::new(stream, kind, payload);
        self.at += HEADER + length;
        Ok(Some(Event::Frame(frame)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(decoder: &mut Decoder) -> Vec<Event> {
        std::iter::from_fn(|| decoder.next_event().unwrap()).collect()
    }

    #[test]
    fn frames_arrive_whole_in_whatever_pieces() {
        let frames = [
            Frame::new(1, Kind::Data, b"hello".as_slice()),
            Frame::new(u32::MAX, Kind::Exit, []),
            Frame::new(2, Kind::Errors, vec![0xff; MAX_PAYLOAD]),
        ];
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
        for size in [1, 7, 4096, bytes.len()] {
            let mut decoder = Decoder::in_step();
            let mut found = Vec::new();
            for piece in bytes.chunks(size) {
                decoder.push(piece);
                found.extend(all(&mut decoder));
            }
            assert_eq!(found, frames.clone().map(Event::Frame), "{size}");
        }
    }

    #[test]
    fn nothing_counts_before_a_mark() {
        let old = Frame::new(9, Kind::Exit, b"old".as_slice()).bytes();
        let new = Frame::new(1, Kind::Data, b"new".as_slice());
        // The rest of a frame, one more, the beginning of a mark, and then ours.
        let bytes =
            [&old[5..], &old, &MARK[..9], &mark(&[7; 16]), &new.bytes(), &mark(&[8; 16])].concat();
        for size in [1, 5, bytes.len()] {
            let mut decoder = Decoder::new();
            let mut found = Vec::new();
            for piece in bytes.chunks(size) {
                decoder.push(piece);
                found.extend(all(&mut decoder));
                assert!(decoder.rest().len() < MARK_AND_NONCE + size);
            }
            let new = Event::Frame(new.clone());
            assert_eq!(found, [Event::Mark([7; 16]), new, Event::Mark([8; 16])], "{size}");
        }
    }

    #[test]
    fn what_no_frame_can_be_is_an_error_until_the_next_mark() {
        let long = (MAX_PAYLOAD as u32 + 1).to_le_bytes();
        let kind = [0, 0, 0, 0, 1, 0, 0, 0, 99];
        let no_mark = *b"\xff\xff\xff\xffpavo!";
        for wrong in [&long[..], &kind, &no_mark] {
            let mut decoder = Decoder::in_step();
            decoder.push(wrong);
            decoder.next_event().unwrap_err();
            decoder.push(&Frame::new(1, Kind::Exit, []).bytes());
            assert_eq!(all(&mut decoder), []);
            decoder.push(&mark(&[1; 16]));
            assert_eq!(all(&mut decoder), [Event::Mark([1; 16])]);
        }
    }
}
