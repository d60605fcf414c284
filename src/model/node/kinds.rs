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
        let shown = match &value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let short: String = shown.chars().take(60).collect();
        let wrong = |what: &str| Err(format!("`{}` is not {what}", short.escape_debug()));
        let text = || Value::String(shown.clone());
        match self {
            Self::Free if super::schema::is_deep(&value, 0) => Err("it is too deep".into()),
            Self::Free if value.is_object() => Ok(value),
            Self::Free => wrong("`{…}`"),
            _ if self.is_list() => list(value, self.part()),
            Self::Secret if shown.starts_with(SEALED) => Ok(text()),
            // The text itself must not be repeated.
            Self::Secret => Err("this secret is not sealed".into()),
            _ if value.is_object() || value.is_array() => wrong("one value"),
            Self::Text if shown.len() > MAX_TEXT => wrong("so short as it must be"),
            Self::Text if shown.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\t')) => {
                wrong("a text that can be shown")
            }
            Self::Text => Ok(text()),
            Self::Name if is_name(&shown) => Ok(text()),
            Self::Name => wrong("a name"),
            Self::Group if is_group(&shown) => Ok(text()),
            Self::Group => wrong("a group's name, of letters, digits and `-_+`"),
            Self::Choice(words) if words.contains(&shown.as_str()) => Ok(text()),
            Self::Choice(words) => match nearest(&shown, words.iter().copied()) {
                Some(near) => wrong(&format!("known; did you mean `{near}`?")),
                None => wrong(&format!("one of {}", words.join(", "))),
            },
            Self::Host if shown.parse::<IpAddr>().is_ok() => Ok(text()),
            Self::Host if name::wrong_with(&shown).is_none() => Ok(text()),
            Self::Host => wrong("an address or a host's name"),
            Self::Ip => match shown.parse::<IpAddr>() {
                Ok(ip) => Ok(Value::String(ip.to_string())),
                Err(_) => wrong("an IP address"),
            },
            Self::Mac => mac(&shown).map_or_else(|| wrong("a MAC address"), |it| Ok(it.into())),
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

/// Six bytes, in lower case with colons; the older system's `42:87:0a:05:65:0` is one, too.
fn mac(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    for part in text.split([':', '-']) {
        let fits = matches!(part.len(), 1 | 2) && part.bytes().all(|it| it.is_ascii_hexdigit());
        bytes.push(u8::from_str_radix(part, 16).ok().filter(|_| fits)?);
    }
    // That of a group (an odd first byte) no card has, but the older system's examples do.
    if bytes.len() != 6 || bytes.iter().all(|it| *it == 0) {
        return None;
    }
    Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"))
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
