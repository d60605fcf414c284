//! What others want to know of a node: what it names, and what is its alone.
//!
//! Read from the text that a node is kept as, without a copy of it and without all the rest:
//! a change of all nodes looks at each of them several times.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::ops::Deref;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

/// A part of [`Settings`](super::Settings), by the same names.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Glance<'a> {
    #[serde(borrow)]
    pub control: Control<'a>,
    #[serde(borrow)]
    pub nics: Nics<'a>,
    #[serde(borrow)]
    pub project: Option<Word<'a>>,
    #[serde(borrow)]
    pub groups: Vec<Word<'a>>,
    #[serde(borrow)]
    pub profiles: Vec<Word<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Control<'a> {
    #[serde(borrow)]
    pub bmc_address: Option<Word<'a>>,
    pub bmc_port: Option<u16>,
    #[serde(borrow)]
    pub bmc_system: Option<Word<'a>>,
    #[serde(borrow)]
    pub passwd: Option<Word<'a>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Nic<'a> {
    #[serde(borrow)]
    pub mac: Option<Word<'a>>,
    pub ip: Option<IpAddr>,
    #[serde(borrow)]
    pub network: Option<Word<'a>>,
}

/// Interfaces, with their names.
#[derive(Debug, Default)]
pub struct Nics<'a>(pub Vec<(Word<'a>, Nic<'a>)>);

impl<'de: 'a, 'a> Deserialize<'de> for Nics<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Nics<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("interfaces by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Nics<'de>, A::Error> {
                let mut nics = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    nics.push(entry);
                }
                Ok(Nics(nics))
            }
        }
        from.deserialize_map(Names)
    }
}

/// A text, where it lies already if it can be read there.
#[derive(Debug)]
pub struct Word<'a>(Cow<'a, str>);

impl Deref for Word<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Word<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Word<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Word<'de>, E> {
                Ok(Word(Cow::Borrowed(text)))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Word<'de>, E> {
                Ok(Word(Cow::Owned(text.to_owned())))
            }
        }
        from.deserialize_str(Text)
    }
}
