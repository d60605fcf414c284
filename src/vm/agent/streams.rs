//! What is open to a guest's agent, and what may come on it. Pure: no line, no clock.

use std::collections::HashMap;

use pavo_agent::{
    Credit, Failure, Frame, Hello, Kind, MAX_STREAMS, Malformed, Opening, PIECE, WINDOW,
};
use tokio::sync::oneshot;

use super::inbox::{self, Inbox, Sender};

/// The longest list, in bytes, and what each entry counts besides its own.
const MAX_LIST: usize = 2 << 20;
const ENTRY: usize = 64;

/// Streams and questions of one conversation after the other.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: HashMap<u32, Route>,
    last: u32,
    pings: HashMap<u64, oneshot::Sender<Hello>>,
    last_ping: u64,
    epoch: u64,
}

/// Where frames of a stream go, and how many may come.
#[derive(Debug)]
struct Route {
    /// What waits there is bounded by what may come.
    to: Sender,
    /// What the guest may send.
    credit: u32,
    /// What the client may send.
    input: u32,
    /// How much of a list may come, if one was asked for.
    list: Option<usize>,
    started: bool,
    /// What the opening has had so far.
    pub(super) opening: usize,
}

impl Streams {
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// A new conversation begins. What was open is lost.
    pub(super) fn begin_anew(&mut self, why: &str) -> u64 {
        self.lose(why);
        self.epoch += 1;
        self.epoch
    }

    /// Tells everybody that their stream is over.
    fn lose(&mut self, why: &str) {
        self.pings.clear();
        for (stream, route) in self.open.drain() {
            let failure = Failure { why: why.into(), code: 255 };
            route.to.send(Frame::new(stream, Kind::Fail, failure.encode()));
        }
    }

    /// A stream's number, the conversation it belongs to, and what comes on it.
    pub(super) fn open(&mut self) -> Option<(u32, u64, Inbox)> {
        if self.open.len() >= MAX_STREAMS {
            return None;
        }
        loop {
            self.last = self.last.wrapping_add(1).max(1);
            if !self.open.contains_key(&self.last) {
                break;
            }
        }
        let (to, from) = inbox::channel();
        let route =
            Route { to, credit: WINDOW, input: WINDOW, list: None, started: false, opening: 0 };
        self.open.insert(self.last, route);
        Some((self.last, self.epoch, from))
    }

    /// A number that was never used with the guest is free again.
    pub(super) fn forget(&mut self, stream: u32) {
        self.open.remove(&stream);
    }

    pub(super) fn is_open(&self, stream: u32, epoch: u64) -> bool {
        self.epoch == epoch && self.open.contains_key(&stream)
    }

    /// Takes a frame of a client for the guest: what it may send of it.
    pub(super) fn hear_client(
        &mut self,
        stream: u32,
        frame: Frame,
    ) -> Result<Option<Frame>, Malformed> {
        // It has ended, and the client does not know yet.
        let Some(route) = self.open.get_mut(&stream) else { return Ok(None) };
        let mut payload = frame.payload;
        match frame.kind {
            Kind::Open | Kind::Part => {
                let is_whole = frame.kind == Kind::Open && route.opening == 0;
                if is_whole && Opening::decode(&payload) == Ok(Opening::List) {
                    route.list = Some(MAX_LIST);
                }
                route.opening += payload.len();
                if route.opening > pavo_agent::MAX_OPENING {
                    return Err(Malformed("too long a request".into()));
                }
            }
            Kind::Data => take(&mut route.input, payload.len())?,
            Kind::Credit => {
                let Credit(more) = Credit::decode(&payload)?;
                let more = more.min(WINDOW - route.credit);
                route.credit += more;
                payload = Credit(more).encode().into();
            }
            Kind::End | Kind::Signal | Kind::Resize | Kind::Close => {}
            kind => return Err(Malformed(format!("{kind:?}, which is the agent's to say"))),
        }
        Ok(Some(Frame::new(stream, frame.kind, payload)))
    }

    /// Takes a frame of the guest. An error is one of the whole line.
    pub(super) fn hear_guest(&mut self, frame: Frame) -> Result<(), Malformed> {
        if frame.stream == 0 {
            return self.pong(&frame);
        }
        let stream = frame.stream;
        let nobodys = || Malformed("a frame of a stream that is not open".into());
        let route = self.open.get_mut(&stream).ok_or_else(nobodys)?;
        match frame.kind {
            Kind::Data | Kind::Errors => take(&mut route.credit, frame.payload.len())?,
            Kind::Credit => {
                let Credit(more) = Credit::decode(&frame.payload)?;
                if more == 0 || more > WINDOW - route.input {
                    return Err(Malformed("credit for what it was never sent".into()));
                }
                route.input += more;
            }
            Kind::Started if !route.started => {
                pavo_agent::Started::decode(&frame.payload)?;
                route.started = true;
            }
            Kind::Item if frame.payload.len() <= PIECE => {
                pavo_agent::Command::decode(&frame.payload)?;
                let room =
                    route.list.and_then(|list| list.checked_sub(frame.payload.len() + ENTRY));
                let none = || Malformed("more of a list than was asked for".into());
                route.list = Some(room.ok_or_else(none)?);
            }
            Kind::Exit => drop(pavo_agent::Exit::decode(&frame.payload)?),
            Kind::Fail => drop(Failure::decode(&frame.payload)?),
            kind => return Err(Malformed(format!("{kind:?} where it has no place"))),
        }
        let ends = frame.kind.ends();
        // A client that is gone has told the agent so, or is about to.
        route.to.send(frame);
        if ends {
            self.open.remove(&stream);
        }
        Ok(())
    }

    /// The number of a question, and the conversation it belongs to.
    pub(super) fn ping(&mut self, tell: oneshot::Sender<Hello>) -> (u64, u64) {
        self.last_ping += 1;
        self.pings.insert(self.last_ping, tell);
        (self.last_ping, self.epoch)
    }

    pub(super) fn forget_ping(&mut self, token: u64) {
        self.pings.remove(&token);
    }

    fn pong(&mut self, frame: &Frame) -> Result<(), Malformed> {
        let pong = frame.payload.split_first_chunk().filter(|_| frame.kind == Kind::Pong);
        let (token, hello) =
            pong.ok_or_else(|| Malformed(format!("{:?} of no stream", frame.kind)))?;
        let (token, hello) = (u64::from_le_bytes(*token), Hello::decode(hello)?);
        if hello.version == 0 || token > self.last_ping {
            return Err(Malformed("an answer to no question".into()));
        }
        if let Some(tell) = self.pings.remove(&token) {
            // Who asked has given up.
            let _ = tell.send(hello);
        }
        Ok(())
    }
}

fn take(credit: &mut u32, length: usize) -> Result<(), Malformed> {
    let length = u32::try_from(length).ok().filter(|length| *length > 0);
    match length.and_then(|length| credit.checked_sub(length)) {
        Some(rest) => {
            *credit = rest;
            Ok(())
        }
        None => Err(Malformed("data without credit for it".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pavo_agent::{Command, Exit, Started};

    fn frame(stream: u32, kind: Kind, payload: impl Into<Vec<u8>>) -> Frame {
        Frame::new(stream, kind, payload)
    }

    #[test]
    fn what_a_guest_may_not_send_is_an_error() {
        let started = Started { id: 1, pid: 2 }.encode();
        let mut streams = Streams::default();
        let (stream, _, mut from) = streams.open().unwrap();
        for wrong in [
            frame(2, Kind::Data, b"x".as_slice()),
            frame(0, Kind::Data, b"x".as_slice()),
            frame(0, Kind::Pong, b"x".as_slice()),
            frame(0, Kind::Pong, [9; 8]),
            frame(stream, Kind::Data, []),
            frame(stream, Kind::Open, []),
            frame(stream, Kind::Close, []),
            frame(stream, Kind::Exit, []),
            frame(stream, Kind::Credit, Credit(0).encode()),
            frame(stream, Kind::Credit, Credit(1).encode()),
            frame(stream, Kind::Credit, Credit(u32::MAX).encode()),
        ] {
            streams.hear_guest(wrong.clone()).expect_err(&format!("{wrong:?}"));
        }
        streams.hear_guest(frame(stream, Kind::Started, started.clone())).unwrap();
        streams.hear_guest(frame(stream, Kind::Started, started)).unwrap_err();
        streams.hear_guest(frame(stream, Kind::Exit, Exit::Code(0).encode())).unwrap();
        streams.hear_guest(frame(stream, Kind::Exit, Exit::Code(0).encode())).unwrap_err();
        assert_eq!(from.try_recv().unwrap().kind, Kind::Started);
        assert_eq!(from.try_recv().unwrap().kind, Kind::Exit);
        assert_eq!(from.try_recv(), None);
    }

    #[test]
    fn no_more_waits_for_a_client_than_it_gave_credit_for() {
        let mut streams = Streams::default();
        let (stream, _, mut from) = streams.open().unwrap();
        let piece = || frame(stream, Kind::Data, vec![0; 64 << 10]);
        for _ in 0..4 {
            streams.hear_guest(piece()).unwrap();
        }
        streams.hear_guest(frame(stream, Kind::Errors, b"x".as_slice())).unwrap_err();
        // More credit than there can be is cut to what there can be.
        let much = frame(stream, Kind::Credit, Credit(u32::MAX).encode());
        let passed = streams.hear_client(stream, much.clone()).unwrap().unwrap();
        assert_eq!(Credit::decode(&passed.payload).unwrap(), Credit(WINDOW));
        let passed = streams.hear_client(stream, much).unwrap().unwrap();
        assert_eq!(Credit::decode(&passed.payload).unwrap(), Credit(0));
        for _ in 0..4 {
            streams.hear_guest(piece()).unwrap();
        }
        streams.hear_guest(piece()).unwrap_err();
        let mut waiting = 0;
        while let Some(frame) = from.try_recv() {
            waiting += frame.payload.len();
        }
        assert_eq!(waiting, 2 * WINDOW as usize);
    }

    #[test]
    fn a_list_comes_where_it_was_asked_for_and_has_an_end() {
        let mut streams = Streams::default();
        let (stream, ..) = streams.open().unwrap();
        let item = |length| {
            let mut item = Command::default().encode();
            // A field that is not known is passed over.
            let rest: usize = length - item.len() - 5;
            item.push(99);
            item.extend((rest as u32).to_le_bytes());
            item.resize(length, 0);
            frame(stream, Kind::Item, item)
        };
        streams.hear_guest(item(1000)).unwrap_err();
        let list = frame(1, Kind::Open, Opening::List.encode());
        streams.hear_client(stream, list).unwrap();
        streams.hear_guest(item(PIECE + 1)).unwrap_err();
        let mut count = 0;
        while streams.hear_guest(item(PIECE)).is_ok() {
            count += 1;
        }
        assert!((100..=MAX_LIST / PIECE).contains(&count), "{count}");
    }

    #[test]
    fn a_client_is_held_to_the_guests_credit() {
        let mut streams = Streams::default();
        let (stream, ..) = streams.open().unwrap();
        let data = || frame(9, Kind::Data, vec![0; 64 << 10]);
        for _ in 0..4 {
            assert_eq!(streams.hear_client(stream, data()).unwrap().unwrap().stream, stream);
        }
        streams.hear_client(stream, data()).unwrap_err();
        streams.hear_guest(frame(stream, Kind::Credit, Credit(WINDOW).encode())).unwrap();
        streams.hear_client(stream, data()).unwrap();
        streams.hear_client(stream, frame(1, Kind::Exit, [])).unwrap_err();
        let part = frame(1, Kind::Part, vec![0; 64 << 10]);
        for _ in 0..16 {
            streams.hear_client(stream, part.clone()).unwrap();
        }
        streams.hear_client(stream, part).unwrap_err();
    }

    #[test]
    fn streams_are_counted_and_lost_together() {
        let mut streams = Streams::default();
        let mut all: Vec<_> = (0..MAX_STREAMS).map(|_| streams.open().unwrap()).collect();
        assert!(streams.open().is_none());
        let (stream, epoch, _) = &all[5];
        assert!(streams.is_open(*stream, *epoch));
        assert_eq!(streams.begin_anew("the agent has ended"), epoch + 1);
        assert!(!streams.is_open(*stream, *epoch));
        for (_, _, from) in &mut all {
            let last = from.try_recv().unwrap();
            assert_eq!(Failure::decode(&last.payload).unwrap().why, "the agent has ended");
        }
        streams.open().unwrap();
    }
}
