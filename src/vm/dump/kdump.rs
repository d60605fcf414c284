//! The form in which kdump goes through a pipe (makedumpfile's "flattened"): a page that says
//! so, then parts, each with its place and length, and an end. All numbers are big-endian.

use std::io;

const SIGNATURE: &[u8; 16] = b"makedumpfile\0\0\0\0";
/// The first page.
const PAGE: usize = 4096;
/// A part's place and length.
const HEAD: usize = 16;

/// Reads it, in pieces of any length.
#[derive(Debug, Default)]
pub(super) struct Flat {
    /// What has come of a head.
    head: Vec<u8>,
    begun: bool,
    /// Where the part that comes belongs, and what is left of it.
    at: u64,
    left: u64,
    whole: bool,
}

impl Flat {
    /// Whether its end has come.
    pub(super) fn is_whole(&self) -> bool {
        self.whole
    }

    /// Takes a piece, and puts what is in it where it belongs.
    ///
    /// # Errors
    /// What `put` says, and when it is something else.
    pub(super) fn read(
        &mut self,
        mut bytes: &[u8],
        mut put: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() && !self.whole {
            if self.left > 0 {
                let count = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                let (part, rest) = bytes.split_at(count);
                put(self.at, part)?;
                (self.at, self.left) = (self.at + count as u64, self.left - count as u64);
                bytes = rest;
                continue;
            }
            let wanted = if self.begun { HEAD } else { PAGE };
            let (part, rest) = bytes.split_at((wanted - self.head.len()).min(bytes.len()));
            self.head.extend_from_slice(part);
            bytes = rest;
            if self.head.len() == wanted {
                self.take_head()?;
                self.head.clear();
            }
        }
        Ok(())
    }

    fn take_head(&mut self) -> io::Result<()> {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "QEMU wrote no kdump");
        if !self.begun {
            self.begun = true;
            return if self.head.starts_with(SIGNATURE) { Ok(()) } else { Err(wrong()) };
        }
        let number = |at: usize| {
            let bytes = self.head[at..at + 8].try_into().expect("eight bytes");
            i64::from_be_bytes(bytes)
        };
        match (number(0), number(8)) {
            (-1, -1) => self.whole = true,
            (at @ 0.., length @ 0..) if at.checked_add(length).is_some() => {
                (self.at, self.left) = (at as u64, length as u64);
            }
            _ => return Err(wrong()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(parts: &[(i64, &[u8])]) -> Vec<u8> {
        let mut text = SIGNATURE.to_vec();
        text.resize(PAGE, 0);
        for (at, bytes) in parts {
            text.extend(at.to_be_bytes());
            text.extend((bytes.len() as i64).to_be_bytes());
            text.extend(*bytes);
        }
        text.extend([0xff; HEAD]);
        text
    }

    #[test]
    fn parts_come_to_their_places_however_they_are_cut() {
        let text = flat(&[(4, b"later"), (0, b"ear"), (9, b""), (9, b"!")]);
        for length in [1, 7, 16, 4095, 4096, 4100, text.len()] {
            let (mut flat, mut all) = (Flat::default(), [b'.'; 10]);
            for piece in text.chunks(length) {
                assert!(!flat.is_whole());
                let put = |at: u64, part: &[u8]| {
                    all[at as usize..at as usize + part.len()].copy_from_slice(part);
                    Ok(())
                };
                flat.read(piece, put).unwrap();
            }
            assert!(flat.is_whole());
            assert_eq!(&all, b"ear.later!", "in pieces of {length}");
        }
    }

    #[test]
    fn what_is_something_else_is_refused() {
        let refused = |text: &[u8]| Flat::default().read(text, |_, _| Ok(())).unwrap_err();
        refused(&[0; PAGE]);
        refused(&flat(&[(-2, b"x")]));
        refused(&flat(&[(i64::MAX, b"x")]));
    }
}
