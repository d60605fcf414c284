//! Values that differ from node to node: `10.1.{n/250}.{n%250+1}`, `{node}-bmc`,
//! `42:87:0a:05:{n/256:02x}:{n%256:02x}`.
//!
//! Between braces is a sum of `n`, the last number in the node's name, `n1`, `n2`, … from
//! the left, and whole numbers, with `+ - * / %` and parentheses; `node` is the name. `:03d`
//! and `:02x` give width and base. `{{` and `}}` are braces.

use crate::error::{Error, Result};
use crate::model::nodeset::name::Shape;

/// How deep parentheses may be.
const MAX_DEPTH: usize = 20;

/// The widest number.
const MAX_WIDTH: usize = 64;

/// A text with expressions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    text: String,
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Name,
    Number { sum: Sum, width: usize, hex: bool },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Sum {
    Constant(i128),
    Last,
    /// From the left, from 0.
    Nth(usize),
    Of(Box<Sum>, char, Box<Sum>),
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// When a brace is not closed, or there is no sum in it.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |what: &str| {
            Error::usage(format!("`{text}` is no value: {what}"))
                .help("as in `10.1.{n/250}.{n%250+1}`, `{node}-bmc`, `{n:03d}`; `{{` is a brace")
        };
        let (mut pieces, mut plain, mut rest) = (Vec::new(), String::new(), text);
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            let (brace, after) = rest[at..].split_at(1);
            if let Some(after) = after.strip_prefix(brace) {
                plain.push_str(brace);
                rest = after;
                continue;
            }
            let end = after.find('}').filter(|_| brace == "{");
            let end = end.ok_or_else(|| wrong(&format!("the `{brace}` has no other")))?;
            if !plain.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut plain)));
            }
            pieces.push(piece(&after[..end]).map_err(|what| wrong(&what))?);
            rest = &after[end + 1..];
        }
        plain.push_str(rest);
        if !plain.is_empty() || pieces.is_empty() {
            pieces.push(Piece::Text(plain));
        }
        Ok(Self { text: text.to_owned(), pieces })
    }

    /// The text if it is the same for all nodes.
    pub fn constant(&self) -> Option<&str> {
        match self.pieces.as_slice() {
            [Piece::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// The text for a node.
    ///
    /// # Errors
    /// When the name has no such number, or what is counted cannot be.
    pub fn of(&self, node: &str) -> Result<String> {
        let mut shape = Shape::default();
        shape.read(node);
        let numbers: Vec<i128> = shape.numbers().iter().map(|it| it.value().into()).collect();
        let mut text = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(plain) => text.push_str(plain),
                Piece::Name => text.push_str(node),
                Piece::Number { sum, width, hex } => {
                    let none = |what| {
                        Error::usage(format!("`{}` has no value for `{node}`: {what}", self.text))
                    };
                    let value = count(sum, &numbers).map_err(none)?;
                    if value < 0 {
                        return Err(none(format!("{value} is below 0")));
                    }
                    text += &match hex {
                        true => format!("{value:0width$x}"),
                        false => format!("{value:0width$}"),
                    };
                }
            }
        }
        Ok(text)
    }
}

/// What is between braces.
fn piece(text: &str) -> Result<Piece, String> {
    let (sum, format) = text.split_once(':').unwrap_or((text, "d"));
    if sum.trim() == "node" && format == "d" {
        return Ok(Piece::Name);
    }
    let (width, hex) = match format.split_at_checked(format.len().saturating_sub(1)) {
        Some((width, base @ ("d" | "x"))) => (width, base == "x"),
        _ => return Err(format!("`:{format}` is not as `:03d` or `:02x`")),
    };
    let width = if width.is_empty() { Ok(0) } else { width.parse() };
    let width = width.ok().filter(|width| *width <= MAX_WIDTH);
    let width = width.ok_or_else(|| format!("`:{format}` is not as `:03d` or `:02x`"))?;
    let mut reader = Reader { rest: sum, depth: 0 };
    let read = reader.sum()?;
    match reader.next() {
        None => Ok(Piece::Number { sum: read, width, hex }),
        Some(other) => Err(format!("`{other}` is in the way in `{{{text}}}`")),
    }
}

struct Reader<'a> {
    rest: &'a str,
    depth: usize,
}

impl Reader<'_> {
    /// The next letter that is no blank.
    fn next(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn take(&mut self, letters: &[char]) -> Option<char> {
        let letter = self.next().filter(|letter| letters.contains(letter))?;
        self.rest = &self.rest[1..];
        Some(letter)
    }

    fn sum(&mut self) -> Result<Sum, String> {
        let mut left = self.product()?;
        while let Some(sign) = self.take(&['+', '-']) {
            left = Sum::Of(Box::new(left), sign, Box::new(self.product()?));
        }
        Ok(left)
    }

    fn product(&mut self) -> Result<Sum, String> {
        let mut left = self.factor()?;
        while let Some(sign) = self.take(&['*', '/', '%']) {
            left = Sum::Of(Box::new(left), sign, Box::new(self.factor()?));
        }
        Ok(left)
    }

    fn factor(&mut self) -> Result<Sum, String> {
        if self.take(&['(']).is_some() {
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err("the parentheses are too deep".into());
            }
            let inner = self.sum()?;
            self.depth -= 1;
            return self.take(&[')']).map(|_| inner).ok_or_else(|| "a `)` is missing".into());
        }
        self.next();
        let length = self.rest.find(|c: char| !c.is_ascii_alphanumeric());
        let (word, rest) = self.rest.split_at(length.unwrap_or(self.rest.len()));
        self.rest = rest;
        let number = |digits: &str| digits.parse::<u32>().ok();
        match word.strip_prefix('n') {
            Some("") => Ok(Sum::Last),
            Some(digits) if number(digits).is_some_and(|it| it > 0) => {
                Ok(Sum::Nth(number(digits).unwrap_or(1) as usize - 1))
            }
            _ => match word.parse::<u64>() {
                Ok(constant) => Ok(Sum::Constant(constant.into())),
                Err(_) if word.is_empty() => Err("a number is missing between braces".into()),
                Err(_) => Err(format!("`{word}` is neither `n`, `n1`, … nor a number")),
            },
        }
    }
}

fn count(sum: &Sum, numbers: &[i128]) -> Result<i128, String> {
    let value = match sum {
        Sum::Constant(value) => Some(*value),
        Sum::Last => return numbers.last().copied().ok_or("there is no number in it".into()),
        Sum::Nth(index) => {
            let none = || format!("there is no number {} in it", index + 1);
            return numbers.get(*index).copied().ok_or_else(none);
        }
        Sum::Of(left, sign, right) => {
            let (left, right) = (count(left, numbers)?, count(right, numbers)?);
            match sign {
                '+' => left.checked_add(right),
                '-' => left.checked_sub(right),
                '*' => left.checked_mul(right),
                _ if right == 0 => return Err("nothing is divided by 0".into()),
                '/' => left.checked_div_euclid(right),
                _ => left.checked_rem_euclid(right),
            }
        }
    };
    value.ok_or_else(|| "the number is too large".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_each_node_its_own() {
        for (template, node, text) in [
            ("10.1.{n/250}.{n%250+1}", "node501", "10.1.2.2"),
            ("10.1.{(n-1)/250}.{(n-1)%250+1}", "node250", "10.1.0.250"),
            ("{node}-bmc", "r1u2", "r1u2-bmc"),
            ("{n1}.{n2:02d}.{ n2 * 2 + 1 :04x}", "r7u010", "7.10.0015"),
            ("42:87:0a:05:{n/256:02x}:{n%256:02x}", "node9999", "42:87:0a:05:27:0f"),
            ("{{{n}}}", "a1", "{1}"),
            ("plain", "a", "plain"),
            ("", "a", ""),
        ] {
            assert_eq!(Template::parse(template).unwrap().of(node).unwrap(), text, "{template}");
        }
        assert_eq!(Template::parse("{{a}}").unwrap().constant(), Some("{a}"));
        assert_eq!(Template::parse("{n}").unwrap().constant(), None);
    }

    #[test]
    fn what_cannot_be_counted_is_said() {
        for wrong in
            ["{n", "}", "{}", "{x}", "{n+}", "{n:5}", "{n:xd}", "{(n}", "{n n}", "{n0}", "{n:999d}"]
        {
            assert!(Template::parse(wrong).is_err(), "{wrong}");
        }
        assert!(Template::parse(&format!("{{{}", "(".repeat(99_999))).is_err());
        assert!(Template::parse(&format!("{{{}}}", "(".repeat(99_999))).is_err());
        for (template, node, why) in [
            ("{n}", "login", "there is no number in it"),
            ("{n2}", "a1", "there is no number 2 in it"),
            ("{1/n}", "a0", "nothing is divided by 0"),
            ("{n-2}", "a1", "-1 is below 0"),
            ("{n*n*n*n*n*n*n*n*n*n}", "a99999999999999999", "too large"),
        ] {
            let error = Template::parse(template).unwrap().of(node).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
