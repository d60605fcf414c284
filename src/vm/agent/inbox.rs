//! What waits for a client: as many bytes as it gave credit for, and not many more in however
//! small pieces they come.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pavo_agent::{Credit, Frame, Kind, PIECE};
use tokio::sync::mpsc;

/// As many frames wait as they came. More are joined.
const MANY: usize = 256;
/// Output, errors and credit are joined each with its own.
const KINDS: usize = 3;

#[derive(Debug)]
struct Frames(Mutex<VecDeque<Frame>>);

impl Frames {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Frame>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where frames are put.
#[derive(Debug)]
pub(super) struct Sender {
    frames: Arc<Frames>,
    wake: mpsc::Sender<()>,
}

/// Where they are taken.
#[derive(Debug)]
pub(super) struct Inbox {
    frames: Arc<Frames>,
    woken: mpsc::Receiver<()>,
}

pub(super) fn channel() -> (Sender, Inbox) {
    let frames = Arc::new(Frames(Mutex::default()));
    let (wake, woken) = mpsc::channel(1);
    (Sender { frames: frames.clone(), wake }, Inbox { frames, woken })
}

impl Sender {
    /// Puts a frame there, unless nobody takes it.
    pub(super) fn send(&self, frame: Frame) {
        if self.wake.is_closed() {
            return;
        }
        let mut frames = self.frames.lock();
        if frames.len() < MANY || !join(&mut frames, &frame) {
            frames.push_back(frame);
        }
        drop(frames);
        // Who has been woken already takes all there is.
        let _ = self.wake.try_send(());
    }
}

/// Adds a frame to the newest of its kind, if that has room.
fn join(frames: &mut VecDeque<Frame>, frame: &Frame) -> bool {
    let mut newest = frames.iter_mut().rev().take(KINDS);
    let Some(earlier) = newest.find(|earlier| earlier.kind == frame.kind) else { return false };
    match frame.kind {
        Kind::Data | Kind::Errors if earlier.payload.len() + frame.payload.len() <= PIECE => {
            earlier.payload.extend(&frame.payload);
            true
        }
        Kind::Credit => match (Credit::decode(&earlier.payload), Credit::decode(&frame.payload)) {
            (Ok(Credit(before)), Ok(Credit(more))) => {
                earlier.payload = Credit(before.saturating_add(more)).encode().into();
                true
            }
            _ => false,
        },
        _ => false,
    }
}

impl Inbox {
    /// The next frame; `None` when no more come. Safe to drop.
    pub(super) async fn recv(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.try_recv() {
                return Some(frame);
            }
            if self.woken.recv().await.is_none() {
                return self.try_recv();
            }
        }
    }

    /// The next frame, if it is there.
    pub(super) fn try_recv(&mut self) -> Option<Frame> {
        self.frames.lock().pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn small_pieces_take_little_room_and_arrive_whole() {
        let (to, mut from) = channel();
        let (mut output, mut errors, mut credit) = (Vec::new(), Vec::new(), 0);
        for number in 0..100_000_u32 {
            let byte = number as u8;
            to.send(Frame::new(1, Kind::Data, [byte]));
            to.send(Frame::new(1, Kind::Errors, [byte.wrapping_add(1)]));
            to.send(Frame::new(1, Kind::Credit, Credit(1).encode()));
            output.push(byte);
            errors.push(byte.wrapping_add(1));
        }
        to.send(Frame::new(1, Kind::Exit, []));
        let waiting = to.frames.lock().len();
        assert!(waiting < MANY + 20, "{waiting}");
        drop(to);
        let (mut said, mut wrong) = (Vec::<u8>::new(), Vec::<u8>::new());
        let mut last = None;
        while let Some(frame) = from.recv().await {
            assert!(frame.payload.len() <= PIECE);
            match frame.kind {
                Kind::Data => said.extend(&frame.payload),
                Kind::Errors => wrong.extend(&frame.payload),
                Kind::Credit => credit += Credit::decode(&frame.payload).unwrap().0,
                _ => {}
            }
            last = Some(frame.kind);
        }
        assert!(said == output && wrong == errors);
        assert_eq!((credit, last), (100_000, Some(Kind::Exit)));
    }

    #[tokio::test]
    async fn nothing_is_kept_for_who_is_gone_and_who_waits_is_woken() {
        let (to, from) = channel();
        drop(from);
        to.send(Frame::new(1, Kind::Data, *b"x"));
        assert_eq!(to.frames.lock().len(), 0);
        let (to, mut from) = channel();
        let waiting = tokio::spawn(async move { from.recv().await });
        tokio::task::yield_now().await;
        to.send(Frame::new(1, Kind::Data, *b"x"));
        assert_eq!(waiting.await.unwrap().unwrap().payload, b"x");
    }
}
