//! A stream to an agent as two pipes: what a thread writes and reads, as frames with credit.

use std::io::{self, ErrorKind, Read, Write};

use pavo_agent::{
    Credit, Decoder, Event, Exit, Failure, Frame, Kind, MAX_PAYLOAD, Opening, WINDOW,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Semaphore, mpsc};

use super::super::run::gone;
use crate::error::{Context, Error, Result};
use crate::vm::control::Connection;

/// As many frames wait for the thread, or for us.
const WAITING: usize = 4;
/// Credit is given once so much of it has gathered.
const GATHERED: u32 = WINDOW / 4;
/// What an agent says of a request that it does not know.
const UNKNOWN: &str = "is not known here";

/// Why nothing more comes from a guest.
#[derive(Debug)]
pub enum Lost {
    /// The agent, the VM or its process.
    Gone(Error),
    /// It could not begin.
    Failed(Failure),
    /// The guest's end of the copy.
    Ended(Exit),
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Gone(error) => error,
            Lost::Failed(failure) if failure.why.contains(UNKNOWN) => {
                Self::system("the agent in the guest is too old to copy files").help(
                    "start the VM from an image with today's: `agent: inject` in its template, \
                     or `pavo image build` again; or use `pavo scp`",
                )
            }
            Lost::Failed(failure) => Self::system(failure.why),
            Lost::Ended(Exit::Signal(signal)) => {
                Self::system(format!("the copy was killed in the guest, by signal {signal}"))
                    .help("see whether it is short of memory: `pavo console -l VM`")
            }
            Lost::Ended(_) => Self::system("the copy has ended in the guest")
                .help("see what its console says: `pavo console -l VM`"),
        }
    }
}

/// What the thread writes to.
#[derive(Debug)]
pub struct Outgoing(mpsc::Sender<Vec<u8>>);

/// What the thread reads from.
#[derive(Debug)]
pub struct Incoming {
    frames: mpsc::Receiver<Vec<u8>>,
    /// The newest, as far as it was not read.
    piece: Vec<u8>,
    at: usize,
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(MAX_PAYLOAD)];
        let sent = self.0.blocking_send(piece.to_vec());
        sent.map(|()| piece.len()).map_err(|_| ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Incoming {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            match self.frames.blocking_recv() {
                Some(piece) => (self.piece, self.at) = (piece, 0),
                None => return Ok(0),
            }
        }
        let count = bytes.len().min(self.piece.len() - self.at);
        bytes[..count].copy_from_slice(&self.piece[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// One stream.
pub struct Session {
    from: ReadHalf<Box<dyn Connection>>,
    to: WriteHalf<Box<dyn Connection>>,
    up: mpsc::Receiver<Vec<u8>>,
    down: mpsc::Sender<Vec<u8>>,
}

impl Session {
    /// The stream, and the thread's ends of it.
    pub fn new(stream: Box<dyn Connection>) -> (Self, Outgoing, Incoming) {
        let (from, to) = tokio::io::split(stream);
        let (send, up) = mpsc::channel(WAITING);
        let (down, frames) = mpsc::channel(WAITING);
        (Self { from, to, up, down }, Outgoing(send), Incoming { frames, piece: Vec::new(), at: 0 })
    }

    /// Says what the stream is for.
    pub async fn open(&mut self, opening: &Opening) -> Result<()> {
        let bytes = opening.encode();
        if bytes.len() > pavo_agent::MAX_OPENING {
            return Err(Error::usage("these are too many files to name")
                .help("copy the folder they are in"));
        }
        let mut pieces = bytes.chunks(MAX_PAYLOAD).peekable();
        while let Some(piece) = pieces.next() {
            let kind = if pieces.peek().is_some() { Kind::Part } else { Kind::Open };
            // Where nobody listens, what is heard says why.
            let _ = self.to.write_all(&Frame::new(1, kind, piece).bytes()).await;
        }
        let _ = self.to.flush().await;
        Ok(())
    }

    /// Carries bytes to and fro, until nothing more comes of the guest, or our end is gone.
    pub async fn carry(&mut self) -> Result<(), Lost> {
        let credit = Semaphore::new(WINDOW as usize);
        let (give, given) = mpsc::unbounded_channel();
        let Self { from, to, up, down } = self;
        tokio::select! {
            heard = hear(from, down, &credit, give) => heard,
            never = say(to, up, &credit, given) => match never {},
        }
    }
}

/// Takes what the guest says.
async fn hear(
    from: &mut ReadHalf<Box<dyn Connection>>,
    down: &mpsc::Sender<Vec<u8>>,
    credit: &Semaphore,
    give: mpsc::UnboundedSender<u32>,
) -> Result<(), Lost> {
    let mut decoder = Decoder::in_step();
    let mut bytes = vec![0; MAX_PAYLOAD];
    let mut taken = 0;
    loop {
        let wrong = |error| Lost::Gone(error);
        let doing = || "listening to the VM's process".to_owned();
        let Some(event) = decoder.next_event().while_doing(doing).map_err(wrong)? else {
            match from.read(&mut bytes).await {
                Ok(count @ 1..) => decoder.push(&bytes[..count]),
                Ok(_) | Err(_) => return Err(Lost::Gone(gone())),
            }
            continue;
        };
        let Event::Frame(Frame { kind, payload, .. }) = event else {
            return Err(Lost::Gone(gone()));
        };
        match kind {
            Kind::Data => {
                taken += payload.len() as u32;
                if down.send(payload).await.is_err() {
                    // Our end knows why.
                    return Ok(());
                }
                if taken >= GATHERED {
                    // The other half ends with this one.
                    let _ = give.send(std::mem::take(&mut taken));
                }
            }
            // A program that is us has nothing to say there.
            Kind::Errors => drop(give.send(payload.len() as u32)),
            Kind::Credit => {
                let Credit(more) = Credit::decode(&payload).while_doing(doing).map_err(wrong)?;
                let room = (WINDOW as usize).saturating_sub(credit.available_permits());
                credit.add_permits((more as usize).min(room));
            }
            Kind::Started => {}
            Kind::Exit => {
                let exit = Exit::decode(&payload).while_doing(doing).map_err(wrong)?;
                return Err(Lost::Ended(exit));
            }
            Kind::Fail => {
                let failure = Failure::decode(&payload).while_doing(doing).map_err(wrong)?;
                // That is the VM's process: it says what is missing.
                return Err(match failure.code {
                    255 => Lost::Gone(Error::system(failure.why)),
                    _ => Lost::Failed(failure),
                });
            }
            kind => {
                let text = format!("the VM's process says {kind:?}");
                return Err(Lost::Gone(Error::system(text)));
            }
        }
    }
}

/// Says what the thread writes, as far as there is credit, and gives credit.
async fn say(
    to: &mut WriteHalf<Box<dyn Connection>>,
    up: &mut mpsc::Receiver<Vec<u8>>,
    credit: &Semaphore,
    mut given: mpsc::UnboundedReceiver<u32>,
) -> std::convert::Infallible {
    let mut piece: Option<Vec<u8>> = None;
    let mut open = true;
    loop {
        let count = piece.as_ref().map_or(0, Vec::len) as u32;
        let frame = tokio::select! {
            biased;
            Some(more) = given.recv() => Frame::new(1, Kind::Credit, Credit(more).encode()),
            permit = credit.acquire_many(count), if piece.is_some() => {
                permit.expect("it is never closed").forget();
                Frame::new(1, Kind::Data, piece.take().unwrap_or_default())
            }
            next = up.recv(), if piece.is_none() && open => {
                match next {
                    Some(next) => {
                        piece = Some(next);
                        continue;
                    }
                    None => {
                        open = false;
                        Frame::new(1, Kind::End, [])
                    }
                }
            }
            else => std::future::pending().await,
        };
        // Where nobody listens any more, what is heard says why.
        if to.write_all(&frame.bytes()).await.is_err() || to.flush().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_knows_no_copies_is_told_from_one_that_cannot() {
        // Its own words of a request that is newer than it.
        let wrong = Opening::decode(b"\x01\x07\0\0\0receivX").unwrap_err();
        let error = |why: String| Error::from(Lost::Failed(Failure { why, code: 126 })).report();
        let report = error(wrong.to_string());
        assert!(report.contains("too old to copy files"), "{report}");
        assert!(report.contains("agent: inject") && report.contains("pavo scp"), "{report}");
        let report = error("the guest has no user `x`".into());
        assert!(
            report.contains("the guest has no user `x`") && !report.contains("old"),
            "{report}"
        );
        let report = Error::from(Lost::Ended(Exit::Signal(9))).report();
        assert!(report.contains("by signal 9"), "{report}");
    }

    /// A VM's process that is this test, and what a thread has of the stream to it.
    fn pair() -> (tokio::io::DuplexStream, Session, Outgoing, Incoming) {
        let (theirs, ours) = tokio::io::duplex(1 << 20);
        let (session, to, from) = Session::new(Box::new(ours));
        (theirs, session, to, from)
    }

    async fn all(
        stream: &mut tokio::io::DuplexStream,
        decoder: &mut Decoder,
        count: usize,
    ) -> usize {
        let (mut bytes, mut come) = (vec![0; 1 << 20], 0);
        while come < count {
            let read = stream.read(&mut bytes).await.unwrap();
            decoder.push(&bytes[..read]);
            while let Some(Event::Frame(frame)) = decoder.next_event().unwrap() {
                assert!([Kind::Data, Kind::End].contains(&frame.kind), "{frame:?}");
                come += frame.payload.len();
            }
        }
        come
    }

    #[tokio::test]
    async fn no_more_is_sent_than_there_is_credit_for() {
        let (mut theirs, mut session, mut to, _from) = pair();
        let thread = std::thread::spawn(move || to.write_all(&vec![0; 3 * WINDOW as usize]));
        let carried = tokio::spawn(async move { session.carry().await });
        let mut decoder = Decoder::in_step();
        let window = WINDOW as usize;
        assert_eq!(all(&mut theirs, &mut decoder, window).await, window);
        let silence = std::time::Duration::from_millis(50);
        let more = tokio::time::timeout(silence, all(&mut theirs, &mut decoder, 1)).await;
        assert!(more.is_err(), "{more:?}");
        for _ in 0..2 {
            // More credit than there can be is no more than there can be.
            let credit = Frame::new(1, Kind::Credit, Credit(u32::MAX).encode());
            theirs.write_all(&credit.bytes()).await.unwrap();
            assert_eq!(all(&mut theirs, &mut decoder, window).await, window);
        }
        thread.join().unwrap().unwrap();
        drop(theirs);
        assert!(matches!(carried.await.unwrap(), Err(Lost::Gone(_))));
    }
}
