//! The newest of what a command has written, each piece with where it was written.

use std::collections::VecDeque;

use pavo_agent::{Kind, PIECE, REPLAY};

/// The most pieces. Very small ones, now on one stream and now on the other, cost more than
/// what is in them.
const PIECES: usize = 1024;

/// So many bytes at most.
#[derive(Clone, Debug)]
pub struct Past {
    pieces: VecDeque<(Kind, Vec<u8>)>,
    bytes: usize,
    most: usize,
}

impl Default for Past {
    fn default() -> Self {
        Self::of(REPLAY)
    }
}

impl Past {
    /// One of so many bytes.
    pub fn of(most: usize) -> Self {
        Self { pieces: VecDeque::new(), bytes: 0, most }
    }

    /// Whether `new` bytes, its newest, and one piece more have room in it.
    pub fn holds(&self, new: usize) -> bool {
        new + PIECE <= self.most && self.pieces.len() < PIECES
    }

    /// Leaves its newest bytes, so many.
    pub fn newest(&mut self, bytes: usize) {
        while self.bytes > bytes {
            let excess = self.bytes - bytes;
            drop(self.take(excess));
        }
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub fn clear(&mut self) {
        *self = Self::of(self.most);
    }

    /// Adds what was written last; the oldest goes.
    pub fn add(&mut self, kind: Kind, piece: &[u8]) {
        self.bytes += piece.len();
        match self.pieces.back_mut() {
            Some((last, bytes)) if *last == kind && bytes.len() + piece.len() <= PIECE => {
                bytes.extend_from_slice(piece);
            }
            _ => self.pieces.push_back((kind, piece.to_vec())),
        }
        while self.bytes > self.most || self.pieces.len() > PIECES {
            let excess = self.bytes.saturating_sub(self.most);
            let Some((_, oldest)) = self.pieces.front_mut() else { return };
            if excess > 0 && excess < oldest.len() {
                oldest.drain(..excess);
                self.bytes -= excess;
            } else {
                self.bytes -= oldest.len();
                self.pieces.pop_front();
            }
        }
    }

    /// Takes the oldest, so many bytes at most.
    pub fn take(&mut self, most: usize) -> Option<(Kind, Vec<u8>)> {
        let (kind, oldest) = self.pieces.front_mut()?;
        let kind = *kind;
        if oldest.len() <= most {
            let (_, piece) = self.pieces.pop_front()?;
            self.bytes -= piece.len();
            return Some((kind, piece));
        }
        let rest = oldest.split_off(most);
        self.bytes -= most;
        Some((kind, std::mem::replace(oldest, rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut past: Past, most: usize) -> Vec<(Kind, Vec<u8>)> {
        std::iter::from_fn(|| past.take(most)).collect()
    }

    #[test]
    fn streams_stay_apart_and_in_order() {
        let mut past = Past::default();
        for (kind, text) in [(Kind::Data, "a"), (Kind::Data, "b"), (Kind::Errors, "e")] {
            past.add(kind, text.as_bytes());
        }
        past.add(Kind::Data, b"cde");
        let piece = |kind, text: &str| (kind, text.as_bytes().to_vec());
        let [first, second] = [piece(Kind::Data, "ab"), piece(Kind::Errors, "e")];
        assert_eq!(all(past.clone(), 9), [first, second, piece(Kind::Data, "cde")]);
        let texts: Vec<_> = all(past, 2).into_iter().map(|(_, text)| text).collect();
        assert_eq!(texts.concat(), b"abecde");
    }

    #[test]
    fn the_newest_are_left_and_there_is_room_or_none() {
        let mut past = Past::of(2 * PIECE);
        for (kind, text) in [(Kind::Data, "abc"), (Kind::Errors, "de"), (Kind::Data, "f")] {
            past.add(kind, text.as_bytes());
        }
        assert!(past.holds(PIECE) && !past.holds(PIECE + 1));
        let left = |bytes| {
            let mut past = past.clone();
            past.newest(bytes);
            all(past, PIECE).into_iter().flat_map(|(_, piece)| piece).collect::<Vec<u8>>()
        };
        assert_eq!([left(9), left(4), left(0)], [b"abcdef".to_vec(), b"cdef".to_vec(), vec![]]);
    }

    #[test]
    fn it_is_bounded_in_bytes_and_in_pieces() {
        let mut past = Past::default();
        for number in 0..REPLAY + 1000 {
            past.add(Kind::Data, &[number as u8]);
        }
        let kept: Vec<u8> = all(past.clone(), PIECE).into_iter().flat_map(|(_, it)| it).collect();
        assert_eq!(kept.len(), REPLAY);
        assert_eq!(kept.last(), Some(&((REPLAY + 999) as u8)));
        for _ in 0..REPLAY {
            past.add(Kind::Data, b"o");
            past.add(Kind::Errors, b"e");
        }
        assert_eq!(all(past, PIECE).len(), PIECES);
    }
}
