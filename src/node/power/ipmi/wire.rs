//! IPMI's packets as bytes: what is sent, and a reader of what comes that trusts nothing.
//!
//! ```text
//! RMCP header   06 00 ff 07
//! session       06, payload type and flags, session (4), sequence (4), length (2)   little endian
//! payload       opening, RAKP messages 1 to 4, or a message of IPMI, then encrypted
//! trailer       in a session: padding, its length, 07, authentication code
//! ```
//!
//! Intelligent Platform Management Interface Specification 2.0 rev. 1.1, 13.6, 13.17 to 13.24.

/// The longest packet that is read; what is longer is no answer to any of our questions.
pub const MAX_PACKET: usize = 512;

const RMCP: [u8; 4] = [6, 0, 0xff, 7];
const FORMAT: u8 = 6;
const HEADER: usize = 16;
const NEXT_HEADER: u8 = 7;

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Message = 0,
    OpenRequest = 0x10,
    OpenResponse = 0x11,
    Rakp1 = 0x12,
    Rakp2 = 0x13,
    Rakp3 = 0x14,
    Rakp4 = 0x15,
}

impl Kind {
    /// What controllers send.
    fn of(byte: u8) -> Option<Self> {
        [Self::Message, Self::OpenResponse, Self::Rakp2, Self::Rakp4]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// A packet of a controller, in its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    pub kind: Kind,
    /// Encrypted and signed; otherwise it is neither.
    pub in_session: bool,
    pub payload: &'a [u8],
    /// All but the RMCP header: the authentication code is the end of it, and of what is before.
    body: &'a [u8],
    session: u32,
}

impl<'a> Packet<'a> {
    /// Takes a packet apart. None if it is not one that a controller of IPMI 2.0 sends.
    pub fn read(bytes: &'a [u8]) -> Option<Self> {
        let body = bytes.strip_prefix(&RMCP)?;
        let header = bytes.get(..HEADER)?;
        let kind = Kind::of(header[5] & 0x3f)?;
        let flags = header[5] & 0xc0;
        if header[4] != FORMAT || (flags != 0xc0 && flags != 0) {
            return None;
        }
        let session = u32_at(header, 6)?;
        let length = usize::from(u16::from_le_bytes([header[14], header[15]]));
        let payload = bytes[HEADER..].get(..length)?;
        let in_session = flags != 0;
        // Ours begin and end outside a session, all else is said inside.
        if in_session != (kind == Kind::Message) || in_session != (session != 0) {
            return None;
        }
        Some(Self { kind, in_session, payload, body, session })
    }

    /// Our number of the session that it is of. Before there is a session, it is in the payload.
    pub fn addressee(&self) -> Option<u32> {
        if self.in_session { Some(self.session) } else { u32_at(self.payload, 4) }
    }

    /// Whether it says no to the opening of a session, and not to whose.
    pub fn is_bare_refusal(&self) -> bool {
        let status = self.payload.get(1).copied().unwrap_or(0);
        self.kind == Kind::OpenResponse && status != 0 && self.addressee().is_none()
    }

    /// What is signed, and the code, which has `length` bytes.
    pub fn signed(&self, length: usize) -> Option<(&'a [u8], &'a [u8])> {
        let (signed, code) = self.body.split_at_checked(self.body.len().checked_sub(length)?)?;
        // The payload lies in what is signed. How it is padded after that matters to nobody, and
        // some controllers do it in ways of their own.
        (signed.len() >= HEADER - RMCP.len() + self.payload.len()).then_some((signed, code))
    }
}

/// A packet that is of no session yet.
pub fn plain(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(kind as u8, 0, 0, payload.len());
    bytes.extend_from_slice(payload);
    bytes
}

/// A packet of a session, whose payload is encrypted; `sign` says the code of what it is given.
pub fn signed(
    session: u32,
    sequence: u32,
    payload: &[u8],
    sign: impl FnOnce(&[u8]) -> Vec<u8>,
) -> Vec<u8> {
    let mut bytes = header(Kind::Message as u8 | 0xc0, session, sequence, payload.len());
    bytes.extend_from_slice(payload);
    // Up to and with the next header it is a multiple of four.
    let pads = (4 - (bytes.len() - RMCP.len() + 2) % 4) % 4;
    bytes.extend_from_slice(&[0xff; 3][..pads]);
    bytes.extend_from_slice(&[pads as u8, NEXT_HEADER]);
    let code = sign(&bytes[RMCP.len()..]);
    bytes.extend_from_slice(&code);
    bytes
}

fn header(kind: u8, session: u32, sequence: u32, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + length + 40);
    bytes.extend_from_slice(&RMCP);
    bytes.extend_from_slice(&[FORMAT, kind]);
    bytes.extend_from_slice(&session.to_le_bytes());
    bytes.extend_from_slice(&sequence.to_le_bytes());
    let length = u16::try_from(length).expect("what we send is short");
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes
}

/// Four bytes, little endian.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(four.try_into().expect("four bytes")))
}

/// A command of IPMI, as the payload of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command<'a> {
    pub function: u8,
    pub command: u8,
    pub data: &'a [u8],
}

const CONTROLLER: u8 = 0x20;
const CONSOLE: u8 = 0x81;

impl Command<'_> {
    /// The message with the number `sequence`, below 64.
    pub fn message(&self, sequence: u8) -> Vec<u8> {
        let mut bytes = vec![CONTROLLER, self.function << 2];
        bytes.push(checksum(&bytes));
        bytes.extend_from_slice(&[CONSOLE, sequence << 2, self.command]);
        bytes.extend_from_slice(self.data);
        bytes.push(checksum(&bytes[3..]));
        bytes
    }

    /// The completion code and data of a message that answers this command.
    pub fn answer<'m>(&self, sequence: u8, message: &'m [u8]) -> Option<(u8, &'m [u8])> {
        let (head, rest) = message.split_at_checked(3)?;
        let (_, rest) = rest.split_last().filter(|_| checksum(&message[3..]) == 0)?;
        let &[_, number, command, code, ref data @ ..] = rest else { return None };
        let ours = head[1] == (self.function | 1) << 2
            && checksum(head) == 0
            && number >> 2 == sequence
            && command == self.command;
        ours.then_some((code, data))
    }
}

/// What makes the sum of all bytes, with it, zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_packet_is_read_as_it_was_written() {
        let mut payload = vec![7, 0, 4, 0];
        payload.extend_from_slice(&0x1234_5678_u32.to_le_bytes());
        let bytes = plain(Kind::Rakp2, &payload);
        let packet = Packet::read(&bytes).unwrap();
        assert_eq!((packet.kind, packet.payload), (Kind::Rakp2, &payload[..]));
        assert_eq!(packet.addressee(), Some(0x1234_5678));
        for length in 0..bytes.len() {
            assert_eq!(Packet::read(&bytes[..length]), None, "{length}");
        }
        // Whoever sends more after it said no more than that.
        let longer = [&bytes[..], b"more"].concat();
        assert_eq!(Packet::read(&longer).unwrap().payload, payload);
    }

    #[test]
    fn what_is_signed_reaches_to_the_code_and_is_a_multiple_of_four() {
        for length in 0..40 {
            let payload = vec![5; length];
            let bytes = signed(9, 3, &payload, |signed| {
                assert_eq!(signed.len() % 4, 0);
                vec![0xaa; 12]
            });
            let packet = Packet::read(&bytes).unwrap();
            assert_eq!((packet.addressee(), packet.payload), (Some(9), &payload[..]));
            let (what, code) = packet.signed(12).unwrap();
            assert_eq!((what, code), (&bytes[4..bytes.len() - 12], &[0xaa; 12][..]));
            // A code is never of the payload's own bytes.
            let cut = &bytes[..16 + length + 11];
            assert_eq!(Packet::read(cut).unwrap().signed(12), None);
        }
    }

    #[test]
    fn an_answer_is_of_its_command_alone() {
        let command = Command { function: 0, command: 1, data: &[] };
        let message = Command { function: 1, command: 1, data: &[0, 0x21, 0x10] }.message(5);
        assert_eq!(command.answer(5, &message), Some((0, &[0x21, 0x10][..])));
        assert_eq!(command.answer(6, &message), None);
        let other = Command { function: 0, command: 2, data: &[] };
        assert_eq!(other.answer(5, &message), None);
        for at in 0..message.len() {
            let mut changed = message.clone();
            changed[at] ^= 0x10;
            assert_eq!(command.answer(5, &changed), None, "{at}");
            assert_eq!(command.answer(5, &message[..at]), None, "{at}");
        }
    }
}
