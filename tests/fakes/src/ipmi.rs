//! A controller's side of IPMI 2.0: sessions, and the few commands that concern power and boot.
//!
//! Written after the specification's tables (13.17 to 13.32), not after the other side.

use std::collections::HashMap;

use aes::Aes128;
use cbc::cipher::block_padding::NoPadding;
use cbc::cipher::{BlockDecryptMut, BlockEncryptMut, KeyIvInit};
use hmac::{Hmac, Mac};

use crate::{Bmc, Manner, USER};

/// The cipher suites that a controller has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suites {
    Three,
    Both,
}

/// Packets to send.
pub struct Said(pub Vec<Vec<u8>>);

/// The most sessions at once; the oldest goes.
const MAX_SESSIONS: usize = 32;
const GUID: [u8; 16] = *b"a fake machine's";

/// The sessions of one controller.
#[derive(Clone, Default)]
pub struct Sessions {
    open: HashMap<u32, Session>,
    last: u32,
}

#[derive(Clone)]
struct Session {
    console: u32,
    sha256: bool,
    role: u8,
    console_random: [u8; 16],
    our_random: [u8; 16],
    /// Of one that is open.
    keys: Option<(Vec<u8>, [u8; 16])>,
    sequence: u32,
}

fn hmac(sha256: bool, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let text = parts.concat();
    if sha256 {
        let mac = <Hmac<sha2::Sha256> as Mac>::new_from_slice(key).expect("any length");
        mac.chain_update(text).finalize().into_bytes().to_vec()
    } else {
        let mac = <Hmac<sha1::Sha1> as Mac>::new_from_slice(key).expect("any length");
        mac.chain_update(text).finalize().into_bytes().to_vec()
    }
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("random numbers");
    bytes
}

fn checksum(bytes: &[u8]) -> u8 {
    0_u8.wrapping_sub(bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte)))
}

fn le32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn plain(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![6, 0, 255, 7, 6, kind, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend_from_slice(&(payload.len() as u16).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

impl Sessions {
    /// What the controller says to this packet.
    pub fn answer(&mut self, bmc: &mut Bmc, packet: &[u8]) -> Said {
        match bmc.manner {
            Manner::Dead => return Said(Vec::new()),
            Manner::Deaf(of) if bmc.packets % of != 0 => return Said(Vec::new()),
            _ => {}
        }
        let mut said: Vec<Vec<u8>> = self.read(bmc, packet).into_iter().collect();
        bmc.sessions = self.open.values().filter(|session| session.keys.is_some()).count();
        if let Some(first) = said.first().cloned() {
            spoil(bmc.manner, first, &mut said);
        }
        Said(said)
    }

    fn read(&mut self, bmc: &mut Bmc, packet: &[u8]) -> Option<Vec<u8>> {
        let body = packet.strip_prefix(&[6, 0, 255, 7])?;
        if *body.first()? == 0 {
            // IPMI 1.5, in which one asks what there is.
            return without_session(body.get(10..)?);
        }
        let kind = *body.get(1)?;
        let session = le32(body.get(2..)?)?;
        let length = usize::from(u16::from_le_bytes([*body.get(10)?, *body.get(11)?]));
        let payload = body.get(12..)?.get(..length)?;
        match kind {
            0x10 => self.open(bmc, payload),
            0x12 => self.rakp2(bmc, payload),
            0x14 => self.rakp4(bmc, payload),
            0xc0 => self.command(bmc, session, body, payload),
            _ => None,
        }
    }

    fn open(&mut self, bmc: &Bmc, payload: &[u8]) -> Option<Vec<u8>> {
        let (tag, role) = (*payload.first()?, *payload.get(1)?);
        let console = le32(payload.get(4..)?)?;
        let wanted = [*payload.get(12)?, *payload.get(20)?, *payload.get(28)?];
        let sha256 = wanted == [3, 4, 1];
        let known = wanted == [1, 1, 1] || (sha256 && bmc.suites == Suites::Both);
        let status = match bmc.manner {
            Manner::Full => 1,
            _ if !known => 0x11,
            _ => 0,
        };
        let mut answer = vec![tag, status, role, 0];
        answer.extend_from_slice(&console.to_le_bytes());
        if status != 0 {
            return Some(plain(0x11, &answer));
        }
        self.last = self.last.wrapping_add(1).max(1);
        if self.open.len() >= MAX_SESSIONS {
            let oldest = *self.open.keys().min()?;
            self.open.remove(&oldest);
        }
        let session = Session {
            console,
            sha256,
            role: 0,
            console_random: [0; 16],
            our_random: random(),
            keys: None,
            sequence: 0,
        };
        self.open.insert(self.last, session);
        answer.extend_from_slice(&self.last.to_le_bytes());
        answer.extend_from_slice(&payload[8..32]);
        Some(plain(0x11, &answer))
    }

    fn rakp2(&mut self, bmc: &Bmc, payload: &[u8]) -> Option<Vec<u8>> {
        let (tag, id) = (*payload.first()?, le32(payload.get(4..)?)?);
        let session = self.open.get_mut(&id)?;
        session.console_random = payload.get(8..24)?.try_into().ok()?;
        session.our_random = random();
        session.role = *payload.get(24)?;
        let user = payload.get(28..)?.get(..usize::from(*payload.get(27)?))?;
        let (console, id) = (session.console.to_le_bytes(), id.to_le_bytes());
        if user != USER.as_bytes() {
            return Some(plain(0x13, &[&[tag, 0x0d, 0, 0], &console[..]].concat()));
        }
        let password = if bmc.manner == Manner::ForgedLogin { "guess" } else { &bmc.password };
        let about = [session.role, user.len() as u8];
        let parts =
            [&console[..], &id, &session.console_random, &session.our_random, &GUID, &about, user];
        let code = hmac(session.sha256, password.as_bytes(), &parts);
        let answer = [&[tag, 0, 0, 0], &console[..], &session.our_random, &GUID, &code];
        Some(plain(0x13, &answer.concat()))
    }

    fn rakp4(&mut self, bmc: &Bmc, payload: &[u8]) -> Option<Vec<u8>> {
        let (tag, id) = (*payload.first()?, le32(payload.get(4..)?)?);
        let session = self.open.get_mut(&id)?;
        let (console, id) = (session.console.to_le_bytes(), id.to_le_bytes());
        let about = [session.role, USER.len() as u8];
        let proof = [&session.our_random[..], &console, &about, USER.as_bytes()];
        let proof = hmac(session.sha256, bmc.password.as_bytes(), &proof);
        if payload.get(8..)? != proof {
            return Some(plain(0x15, &[&[tag, 0x0f, 0, 0], &console[..]].concat()));
        }
        let parts = [&session.console_random[..], &session.our_random, &about, USER.as_bytes()];
        let key = bmc.key.as_ref().unwrap_or(&bmc.password);
        let mut sik = hmac(session.sha256, key.as_bytes(), &parts);
        if bmc.manner == Manner::ForgedKeys {
            sik[0] ^= 1;
        }
        let mut code = hmac(session.sha256, &sik, &[&session.console_random, &id, &GUID]);
        code.truncate(if session.sha256 { 16 } else { 12 });
        let encryption = hmac(session.sha256, &sik, &[&[2; 20]])[..16].try_into().ok()?;
        session.keys = Some((hmac(session.sha256, &sik, &[&[1; 20]]), encryption));
        Some(plain(0x15, &[&[tag, 0, 0, 0], &console[..], &code].concat()))
    }

    fn command(&mut self, bmc: &mut Bmc, id: u32, body: &[u8], payload: &[u8]) -> Option<Vec<u8>> {
        let session = self.open.get_mut(&id)?;
        let (signing, encryption) = session.keys.clone()?;
        let length = if session.sha256 { 16 } else { 12 };
        let (signed, code) = body.split_at(body.len().checked_sub(length)?);
        if hmac(session.sha256, &signing, &[signed])[..length] != *code {
            return None;
        }
        // What was seen before is not said twice.
        let sequence = le32(body.get(6..)?)?;
        if sequence <= session.sequence {
            return None;
        }
        session.sequence = sequence;
        let (random, text) = payload.split_at_checked(16)?;
        let random: [u8; 16] = random.try_into().ok()?;
        let mut text = text.to_vec();
        cbc::Decryptor::<Aes128>::new(&encryption.into(), &random.into())
            .decrypt_padded_mut::<NoPadding>(&mut text)
            .ok()?;
        let pads = usize::from(*text.last()?);
        text.truncate(text.len().checked_sub(pads + 1)?);
        let changes = bmc.changes.len();
        let answer = message(bmc, session.role & 0xf, &text)?;
        let packet = seal(session, &signing, &encryption, &answer);
        // Closing, which is the last that is answered.
        if text.get(1)? >> 2 == 6 && text.get(5) == Some(&0x3c) {
            self.open.remove(&id);
        }
        let is_mute = match bmc.manner {
            Manner::Mute => true,
            Manner::Unconfirmed => bmc.changes.len() > changes,
            _ => false,
        };
        (!is_mute).then_some(packet)
    }
}

/// A packet of the session with this message.
fn seal(session: &Session, signing: &[u8], encryption: &[u8; 16], message: &[u8]) -> Vec<u8> {
    let random = random();
    let mut text = message.to_vec();
    let pads = (15 - message.len() % 16) as u8;
    text.extend(1..=pads);
    text.push(pads);
    let length = text.len();
    cbc::Encryptor::<Aes128>::new(encryption.into(), &random.into())
        .encrypt_padded_mut::<NoPadding>(&mut text, length)
        .expect("whole blocks");
    let mut body = vec![6, 0xc0];
    body.extend_from_slice(&session.console.to_le_bytes());
    body.extend_from_slice(&session.sequence.to_le_bytes());
    body.extend_from_slice(&((16 + text.len()) as u16).to_le_bytes());
    body.extend_from_slice(&random);
    body.extend_from_slice(&text);
    let mut pads = 0;
    while (body.len() + 2) % 4 != 0 {
        body.push(0xff);
        pads += 1;
    }
    body.extend_from_slice(&[pads, 7]);
    let code = hmac(session.sha256, signing, &[&body]);
    let length = if session.sha256 { 16 } else { 12 };
    [&[6, 0, 255, 7], &body[..], &code[..length]].concat()
}

/// The message that answers a message.
fn message(bmc: &mut Bmc, role: u8, request: &[u8]) -> Option<Vec<u8>> {
    let [to, function, _, from, number, command, data @ .., _] = request else { return None };
    if checksum(&request[..3]) != 0 || checksum(&request[3..]) != 0 {
        return None;
    }
    let completed = if bmc.manner == Manner::Busy {
        Err(0xc0)
    } else {
        complete(bmc, role, function >> 2, *command, data)
    };
    let (code, data) = match completed {
        Ok(data) => (0, data),
        Err(code) => (code, Vec::new()),
    };
    let mut answer = vec![*from, function | 4];
    answer.push(checksum(&answer));
    answer.extend_from_slice(&[*to, *number, *command, code]);
    answer.extend_from_slice(&data);
    answer.push(checksum(&answer[3..]));
    Some(answer)
}

/// Runs a command: what it answers, or the code why not.
fn complete(
    bmc: &mut Bmc,
    role: u8,
    function: u8,
    command: u8,
    data: &[u8],
) -> Result<Vec<u8>, u8> {
    const NO_PRIVILEGE: u8 = 0xd4;
    let changes = matches!((function, command), (0, 2 | 8));
    if changes && role < 3 {
        return Err(NO_PRIVILEGE);
    }
    match (function, command, data) {
        (0, 1, []) => Ok(vec![u8::from(bmc.on), 0, 0]),
        (0, 2, _) if bmc.manner == Manner::NoChange => Err(0xd5),
        (0, 2, [number]) if bmc.change(number & 0xf) => Ok(Vec::new()),
        (0, 2, _) => Err(0xcc),
        (0, 8, [5, flags @ ..]) => {
            bmc.boot = flags.try_into().map_err(|_| 0xc7)?;
            Ok(Vec::new())
        }
        // Others are not kept, and that is said.
        (0, 8, [0 | 3 | 4, ..]) => Ok(Vec::new()),
        (0, 8, _) => Err(0x80),
        (0, 9, [5, _, _]) => Ok([&[1, 5], &bmc.boot[..]].concat()),
        (0, 9, _) => Err(0x80),
        (6, 1, []) => Ok(vec![0x20, 1, 2, 0, 2, 0, 0, 0, 0, 1, 0]),
        (6, 0x38, _) => Ok(vec![1, 0x80, 4, 3, 0, 0, 0, 0]),
        (6, 0x3b, [level]) if *level <= role => Ok(vec![*level]),
        (6, 0x3b, _) => Err(0x81),
        (6, 0x3c, _) => Ok(Vec::new()),
        _ => Err(0xc1),
    }
}

/// A message of IPMI 1.5 outside of sessions: the capabilities of the channel.
fn without_session(request: &[u8]) -> Option<Vec<u8>> {
    let [to, function, _, from, number, command, ..] = request else { return None };
    if (function >> 2, *command) != (6, 0x38) {
        return None;
    }
    // Channel 1, IPMI 2.0, names of users, no anonymous ones.
    let mut answer = vec![*from, function | 4];
    answer.push(checksum(&answer));
    answer.extend_from_slice(&[*to, *number, *command, 0, 1, 0x80, 4, 3, 0, 0, 0, 0]);
    answer.push(checksum(&answer[3..]));
    let mut packet = vec![6, 0, 255, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, answer.len() as u8];
    packet.extend_from_slice(&answer);
    Some(packet)
}

/// Makes of an honest answer what this manner does.
fn spoil(manner: Manner, first: Vec<u8>, said: &mut Vec<Vec<u8>>) {
    let in_session = first[5] == 0xc0;
    let flipped = |at: usize| {
        let mut packet = first.clone();
        packet[at] ^= 0x55;
        packet
    };
    match manner {
        Manner::Twice => said.push(first),
        Manner::ForgedAnswers if in_session => said[0] = flipped(first.len() - 1),
        Manner::WrongSession => said[0] = flipped(if in_session { 6 } else { 20 }),
        Manner::Truncated => said[0].truncate(first.len() / 2),
        Manner::Noise => {
            // Who is on the way can always spoil the beginning; here its head and tag are.
            let end = if in_session { first.len() } else { 17 };
            let mut noise: Vec<Vec<u8>> = (4..end).map(flipped).collect();
            noise.append(said);
            *said = noise;
        }
        _ => {}
    }
}
