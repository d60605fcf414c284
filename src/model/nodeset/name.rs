//! What a node may be called, and the numbers in its name.

use std::fmt;

use crate::error::{Error, Result};

/// The longest name; DNS has none longer.
pub const MAX_LENGTH: usize = 253;

/// Longer numbers are text: nobody counts so far.
pub const MAX_DIGITS: usize = 17;

/// What stands for a number in a [`Shape`]; no name holds it.
pub const MARK: char = '#';

/// A number in a name, with as many digits as it is written with. In order of its value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Number(u64);

impl Number {
    const BITS: u32 = 5;

    /// `value` with zeros in front up to `digits`; both as [`MAX_DIGITS`] allows.
    pub fn padded(value: u64, digits: usize) -> Self {
        Self(value << Self::BITS | digits.max(decimal(value)) as u64)
    }

    /// `value`, without zeros in front.
    pub fn plain(value: u64) -> Self {
        Self::padded(value, 1)
    }

    pub fn value(self) -> u64 {
        self.0 >> Self::BITS
    }

    pub fn digits(self) -> usize {
        (self.0 & ((1 << Self::BITS) - 1)) as usize
    }

    /// Whether there are zeros in front.
    pub fn is_padded(self) -> bool {
        self.digits() > decimal(self.value())
    }

    pub fn write(self, text: &mut String) {
        let (mut digits, mut value) = ([b'0'; 32], self.value());
        let start = digits.len() - self.digits();
        for digit in digits[start..].iter_mut().rev() {
            *digit = b'0' + (value % 10) as u8;
            value /= 10;
        }
        text.extend(digits[start..].iter().map(|digit| char::from(*digit)));
    }
}

impl fmt::Debug for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.write(&mut text);
        f.write_str(&text)
    }
}

/// How many digits a value has.
fn decimal(value: u64) -> usize {
    value.checked_ilog10().map_or(1, |log| log as usize + 1)
}

/// A name as its text, with a [`MARK`] for each number, and its numbers.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    text: String,
    numbers: Vec<Number>,
}

impl Shape {
    /// Takes a name apart.
    pub fn read(&mut self, name: &str) {
        self.text.clear();
        self.numbers.clear();
        let mut rest = name;
        while !rest.is_empty() {
            let bytes = rest.as_bytes();
            let text = bytes.iter().position(u8::is_ascii_digit).unwrap_or(rest.len());
            self.text.push_str(&rest[..text]);
            let digits = bytes[text..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            let number = &rest[text..text + digits];
            match digits {
                0 => {}
                1..=MAX_DIGITS => {
                    let value = number.bytes().fold(0, |sum, it| sum * 10 + u64::from(it - b'0'));
                    self.text.push(MARK);
                    self.numbers.push(Number::padded(value, digits));
                }
                _ => self.text.push_str(number),
            }
            rest = &rest[text + digits..];
        }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn numbers(&self) -> &[Number] {
        &self.numbers
    }
}

/// Puts a name together again.
pub fn write(shape: &str, numbers: &[Number], text: &mut String) {
    let mut numbers = numbers.iter();
    let mut parts = shape.split(MARK);
    text.push_str(parts.next().unwrap_or_default());
    for part in parts {
        if let Some(number) = numbers.next() {
            number.write(text);
        }
        text.push_str(part);
    }
}

/// Whether a letter may be in a name.
pub fn is_letter(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.')
}

/// Checks a name.
///
/// # Errors
/// Saying what is wrong with it.
pub fn check(name: &str) -> Result<()> {
    wrong_with(name).map_or(Ok(()), |(_, what)| {
        let shown: String = name.chars().take(40).collect();
        let cut = if shown.len() < name.len() { "…" } else { "" };
        let shown = shown.escape_debug();
        Err(Error::usage(format!("`{shown}{cut}` cannot be a node's name")).because(what))
    })
}

/// What is wrong with a name, and at which byte.
pub fn wrong_with(name: &str) -> Option<(usize, String)> {
    if let Some((at, letter)) = name.char_indices().find(|(_, letter)| !is_letter(*letter)) {
        return Some((at, no_letter(letter)));
    }
    let wrong = |at, what: &str| Some((at, what.to_owned()));
    match name {
        "" => wrong(0, "a name is missing"),
        "all" => wrong(0, "`all` stands for all nodes"),
        _ if !name.starts_with(|first: char| first.is_ascii_alphanumeric()) => {
            wrong(0, "a name begins with a letter or a digit")
        }
        _ if name.contains("..") => wrong(name.find("..").unwrap_or(0), "a name has no `..`"),
        _ if name.ends_with('.') => wrong(name.len() - 1, "a name does not end in a dot"),
        _ if name.len() > MAX_LENGTH => {
            let what = format!("a name of {} letters, more than {MAX_LENGTH}", name.len());
            Some((MAX_LENGTH, what))
        }
        _ => None,
    }
}

/// What is said of a letter that is in no name.
pub fn no_letter(letter: char) -> String {
    match letter {
        '\n' | '\r' => "a line ends here; a name cannot go on".into(),
        letter => format!("`{}` cannot be in a node's name", letter.escape_debug()),
    }
}
