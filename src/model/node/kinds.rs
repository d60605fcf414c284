//! What a setting may be, and how it is kept.

use std::collections::HashSet;
use std::net::IpAddr;

use serde_json::Value;

use super::schema::{SEALED, is_name};
use crate::model::nearest::nearest;
use crate::model::nodeset::name;

/// The longest text of a setting.
const MAX_TEXT: usize = 4096;

/// What a setting may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    /// One word: the name of something.
    Name,
    /// One of these.
    Choice(&'static [&'static str]),
    /// An address, or a host's name.
    Host,
    Mac,
    Ip,
    Port,
    Number,
    Flag,
    /// 1 to 4094.
    Vlan,
    /// `10.0.0.100-10.0.0.200`
    Range,
    /// Names, each once.
    Names,
    /// The name of a group, as sets of nodes can have it.
    Group,
    /// Names of groups, each once.
    Groups,
    /// Addresses, each once.
    Ips,
    /// Addresses or hosts' names, each once.
    Hosts,
    /// Anything.
    Free,
    /// A password or key: kept [sealed](SEALED) only, and never shown.
    Secret,
}

impl Kind {
    /// Of a list, what its parts are.
    pub fn part(self) -> Self {
        match self {
            Self::Names => Self::Name,
            Self::Groups => Self::Group,
            Self::Ips => Self::Ip,
            Self::Hosts => Self::Host,
            other => other,
        }
    }

    /// Whether it is a list, to which `+=` adds.
    pub fn is_list(self) -> bool {
        matches!(self, Self::Names | Self::Groups | Self::Ips | Self::Hosts)
    }

    /// The value as it is kept: MACs in lower case, texts that are numbers as texts.
    ///
    /// # Errors
    /// Saying what it should be.
    pub fn keep(self, value: Value) -> Result<Value, String> {
        match self {
            Self::Free if super::schema::is_deep(&value, 0) => {
                return Err("it is too deep".into());
            }
            Self::Free if value.is_object() => return Ok(value),
            _ if self.is_list() => return list(value, self.part()),
            _ => {}
        }
        let is_one = !value.is_object() && !value.is_array();
        let shown = match value {
            Value::String(text) => text,
            other => other.to_string(),
        };
        self.keep_one(shown, is_one)
    }

    /// The same of what is no list: its text, and whether it is one value.
    fn keep_one(self, shown: String, is_one: bool) -> Result<Value, String> {
        let wrong = |what: &str| {
            let short: String = shown.chars().take(60).collect();
            Err(format!("`{}` is not {what}", short.escape_debug()))
        };
        let text = |shown| Ok(Value::String(shown));
        match self {
            Self::Free => wrong("`{…}`"),
            Self::Secret if shown.starts_with(SEALED) => text(shown),
            // The text itself must not be repeated.
            Self::Secret => Err("this secret is not sealed".into()),
            _ if !is_one => wrong("one value"),
            Self::Text if shown.len() > MAX_TEXT => wrong("so short as it must be"),
            Self::Text if shown.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\t')) => {
                wrong("a text that can be shown")
            }
            Self::Text => text(shown),
            Self::Name if is_name(&shown) => text(shown),
            Self::Name => wrong("a name"),
            Self::Group if is_group(&shown) => text(shown),
            Self::Group => wrong("a group's name, of letters, digits and `-_+`"),
            Self::Choice(words) if words.contains(&shown.as_str()) => text(shown),
            Self::Choice(words) => match nearest(&shown, words.iter().copied()) {
                Some(near) => wrong(&format!("known; did you mean `{near}`?")),
                None => wrong(&format!("one of {}", words.join(", "))),
            },
            Self::Host if shown.parse::<IpAddr>().is_ok() => text(shown),
            Self::Host if name::wrong_with(&shown).is_none() => text(shown),
            Self::Host => wrong("an address or a host's name"),
            Self::Ip => match shown.parse::<IpAddr>() {
                Ok(ip) => Ok(Value::String(ip.to_string())),
                Err(_) => wrong("an IP address"),
            },
            Self::Mac => {
                mac(&shown).map_or_else(|| wrong("a MAC address"), |it| Ok(mac_text(it).into()))
            }
            Self::Port => match shown.parse::<u16>() {
                Ok(port @ 1..) => Ok(port.into()),
                _ => wrong("a port, 1 to 65535"),
            },
            Self::Vlan => match shown.parse::<u16>() {
                Ok(vlan @ 1..=4094) => Ok(vlan.into()),
                _ => wrong("a VLAN, 1 to 4094"),
            },
            Self::Range => range(&shown).map_or_else(
                || wrong("a range of addresses, `10.0.0.100-10.0.0.200`"),
                |(first, last)| Ok(format!("{first}-{last}").into()),
            ),
            Self::Number => {
                shown.parse::<u32>().map_or_else(|_| wrong("a number"), |it| Ok(it.into()))
            }
            Self::Flag => match shown.as_str() {
                "true" | "yes" | "on" | "1" => Ok(true.into()),
                "false" | "no" | "off" | "0" => Ok(false.into()),
                _ => wrong("`true` or `false`"),
            },
            Self::Names | Self::Groups | Self::Ips | Self::Hosts => wrong("a list"),
        }
    }
}

/// Six bytes; the older system's `42:87:0a:05:65:0` is one, too.
pub(super) fn mac(text: &str) -> Option<[u8; 6]> {
    let (mut bytes, mut parts) = ([0; 6], text.split([':', '-']));
    for byte in &mut bytes {
        let part = parts.next()?;
        let fits = matches!(part.len(), 1 | 2) && part.bytes().all(|it| it.is_ascii_hexdigit());
        *byte = u8::from_str_radix(part, 16).ok().filter(|_| fits)?;
    }
    // That of a group (an odd first byte) no card has, but the older system's examples do.
    let is_one = parts.next().is_none() && bytes != [0; 6];
    is_one.then_some(bytes)
}

/// A MAC address as it is kept: in lower case, with colons.
pub(super) fn mac_text([a, b, c, d, e, f]: [u8; 6]) -> String {
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// Whether a set of nodes can name a group of this name: `@a.b` is a file, `@a:b` a source.
pub fn is_group(word: &str) -> bool {
    is_name(word) && word != "all" && !word.contains(['.', ':']) && !word.starts_with(['-', '@'])
}

/// The ends of a range of addresses.
pub fn range(text: &str) -> Option<(IpAddr, IpAddr)> {
    let (first, last) = text.split_once('-')?;
    let ends: (IpAddr, IpAddr) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (ends.0.is_ipv4() == ends.1.is_ipv4() && ends.0 <= ends.1).then_some(ends)
}

/// A list; text is one, with commas between its parts.
fn list(value: Value, kind: Kind) -> Result<Value, String> {
    let parts: Vec<Value> = match value {
        Value::Array(parts) => parts,
        Value::String(text) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            parts.map(|part| part.into()).collect()
        }
        other => vec![other],
    };
    let (mut kept, mut seen) = (Vec::new(), HashSet::new());
    for part in parts {
        let part = kind.keep(part)?;
        if seen.insert(part.to_string()) {
            kept.push(part);
        }
    }
    Ok(Value::Array(kept))
}
