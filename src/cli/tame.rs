//! What guests say, for a terminal: nothing of it may move the cursor, or pretend to be ours.

/// The longest sequence that is waited for to its end.
const LONGEST: usize = 64;

/// What becomes of the bytes that a terminal would obey.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wild {
    /// They are shown as they are written in programs, `\x1b`.
    Shown,
    /// They are left out.
    Dropped,
}

/// Takes bytes as they come. Text, tabs, ends of lines and colours pass.
#[derive(Debug)]
pub struct Tamer {
    wild: Wild,
    /// The beginning of what may become a colour, or of a letter.
    held: Vec<u8>,
    coloured: bool,
}

impl Tamer {
    pub fn new(wild: Wild) -> Self {
        Self { wild, held: Vec::new(), coloured: false }
    }

    /// What of it can be shown now.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut tame = Vec::with_capacity(bytes.len());
        for byte in bytes {
            self.held.push(*byte);
            while !self.held.is_empty() && self.one(&mut tame) {}
        }
        tame
    }

    /// What is left at the end.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut tame = Vec::new();
        for byte in std::mem::take(&mut self.held) {
            self.show(byte, &mut tame);
        }
        self.end_colour(&mut tame);
        tame
    }

    /// Takes the first of what is held, if it is known what it is.
    fn one(&mut self, tame: &mut Vec<u8>) -> bool {
        let taken = match *self.held {
            [b'\n', ..] => {
                self.end_colour(tame);
                tame.push(b'\n');
                1
            }
            // At the end of a line, as on terminals, it does nothing.
            [b'\r', b'\n', ..] => 1,
            [b'\r'] | [0x1b] => 0,
            [0x1b, b'[', ref rest @ ..] => return self.sequence(rest.to_vec(), tame),
            [0xc2..=0xf4, ..] => return self.letter(tame),
            [first, ..] => {
                self.show(first, tame);
                1
            }
            [] => 0,
        };
        self.held.drain(..taken);
        taken > 0
    }

    /// What begins as a letter of several bytes.
    fn letter(&mut self, tame: &mut Vec<u8>) -> bool {
        let length = match self.held[0] {
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            _ => 4,
        };
        let bytes = &self.held[..length.min(self.held.len())];
        let taken = match std::str::from_utf8(bytes) {
            // Controls of eight bits.
            Ok(text) if text.contains(char::is_control) => {
                bytes.iter().for_each(|byte| self.show_wild(*byte, tame));
                length
            }
            Ok(text) => {
                tame.extend(text.as_bytes());
                length
            }
            // The rest of it may come.
            Err(error) if error.error_len().is_none() => return false,
            Err(_) => {
                self.show(bytes[0], tame);
                1
            }
        };
        self.held.drain(..taken);
        true
    }

    /// Behind `ESC [`.
    fn sequence(&mut self, rest: Vec<u8>, tame: &mut Vec<u8>) -> bool {
        let is_inside = |byte: &u8| (0x20..0x40).contains(byte);
        let Some(end) = rest.iter().position(|byte| !is_inside(byte)) else {
            if rest.len() < LONGEST {
                return false;
            }
            self.show(0x1b, tame);
            self.held.remove(0);
            return true;
        };
        let plain = rest[..end].iter().all(|byte| byte.is_ascii_digit() || *byte == b';');
        let is_end = (0x40..0x7f).contains(&rest[end]);
        if rest[end] == b'm' && plain {
            tame.extend(&self.held[..end + 3]);
            self.coloured = true;
            self.held.drain(..end + 3);
        } else if is_end && self.wild == Wild::Dropped {
            self.held.drain(..end + 3);
        } else {
            self.show(0x1b, tame);
            self.held.remove(0);
        }
        true
    }

    /// No colour goes on in the next line, which may be another's.
    fn end_colour(&mut self, tame: &mut Vec<u8>) {
        if std::mem::take(&mut self.coloured) {
            tame.extend(b"\x1b[0m");
        }
    }

    fn show(&self, byte: u8, tame: &mut Vec<u8>) {
        match byte {
            b'\t' | b'\n' | b' '..=b'~' | 0xa0.. => tame.push(byte),
            byte => self.show_wild(byte, tame),
        }
    }

    fn show_wild(&self, byte: u8, tame: &mut Vec<u8>) {
        match byte {
            _ if self.wild == Wild::Dropped => {}
            b'\r' => tame.extend(b"\\r"),
            byte => tame.extend(format!("\\x{byte:02x}").into_bytes()),
        }
    }
}

/// All of it.
pub fn tame(wild: Wild, bytes: &[u8]) -> Vec<u8> {
    let mut tamer = Tamer::new(wild);
    let mut tame = tamer.take(bytes);
    tame.extend(tamer.rest());
    tame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        String::from_utf8(tame(Wild::Shown, text.as_bytes())).unwrap()
    }

    #[test]
    fn text_and_colours_pass_and_what_moves_the_cursor_does_not() {
        for text in ["plain\ttext\n", "üñ – 漢字 🦚 à\n", "\x1b[1;31mred\x1b[0m\n", "no end"]
        {
            assert!(shown(text).starts_with(text.trim_end()), "{text:?} {:?}", shown(text));
        }
        for (text, said) in [
            ("x\rvm7: forged\n", "x\\rvm7: forged\n"),
            ("dos\r\n", "dos\n"),
            ("\x1b[2Jx", "\\x1b[2Jx"),
            ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
            ("a\x08b\x00", "a\\x08b\\x00"),
            ("\u{9b}2J", "\\xc2\\x9b2J"),
            ("\x1b", "\\x1b"),
            ("\x1b[31mred\nnext", "\x1b[31mred\x1b[0m\nnext"),
        ] {
            assert_eq!(shown(text), said, "{text:?}");
        }
        // No letters, in an encoding of eight bits.
        assert_eq!(tame(Wild::Shown, b"\xe9t\xa0\x9b2J\xe2\x80"), b"\xe9t\xa0\\x9b2J\xe2\\x80");
        assert_eq!(
            tame(Wild::Dropped, b"\x1b[2J\x1b[1;1Hboot\x1b[32m ok\x07\r\n"),
            b"boot\x1b[32m ok\x1b[0m\n"
        );
    }

    #[test]
    fn it_does_not_matter_how_the_bytes_come() {
        let text = "a\x1b[1;31mb\r\n\x1b[2Jc\u{9b}d\rü – 漢字 🦚\x1b".as_bytes();
        let mut tamer = Tamer::new(Wild::Shown);
        let mut one_by_one: Vec<u8> = text.iter().flat_map(|byte| tamer.take(&[*byte])).collect();
        one_by_one.extend(tamer.rest());
        assert_eq!(one_by_one, tame(Wild::Shown, text));
    }
}
