//! The settings of a node: their names, and what each may be.

use std::net::IpAddr;

use serde_json::Value;

use super::Tree;
use crate::model::nearest::nearest;
use crate::model::nodeset::name;

/// What a sealed secret begins with.
pub const SEALED: &str = "sealed:";

/// The longest text of a setting.
const MAX_TEXT: usize = 4096;

/// One setting.
#[derive(Debug, PartialEq, Eq)]
pub struct Attribute {
    /// With `*` for a name that people choose.
    pub path: &'static str,
    pub kind: Kind,
    /// Whether no two nodes have the same; then groups and profiles cannot have it.
    pub unique: bool,
}

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
    /// Names, each once.
    Names,
    /// Anything.
    Free,
    /// A password or key: kept [sealed](SEALED) only, and never shown.
    Secret,
}

const fn one(path: &'static str, kind: Kind) -> Attribute {
    Attribute { path, kind, unique: false }
}

const fn unique(path: &'static str, kind: Kind) -> Attribute {
    Attribute { path, kind, unique: true }
}

const DRIVERS: &[&str] = &["redfish", "ipmi", "ipmitool", "openbmc", "kvm", "virsh", "qmp", "exec"];
const NETBOOT: &[&str] = &["pxe", "ipxe", "petitboot", "http", "grub"];

/// All settings.
pub const ATTRIBUTES: &[Attribute] = &[
    one("arch", Kind::Name),
    one("mgt", Kind::Choice(DRIVERS)),
    one("netboot", Kind::Choice(NETBOOT)),
    one("type", Kind::Name),
    unique("control/bmc_address", Kind::Host),
    one("control/bmc_port", Kind::Port),
    one("control/bmc_username", Kind::Text),
    one("control/bmc_password", Kind::Secret),
    one("control/bmc_trust", Kind::Text),
    one("control/bmc_system", Kind::Text),
    one("control/passwd", Kind::Name),
    one("control/ssh_address", Kind::Host),
    one("control/ssh_port", Kind::Port),
    one("control/ssh_username", Kind::Text),
    one("control/ssh_virt_type", Kind::Name),
    one("control/ssh_key_filename", Kind::Text),
    one("control/ssh_key_contents", Kind::Secret),
    one("control/ssh_password", Kind::Secret),
    one("console/method", Kind::Name),
    one("console/port", Kind::Port),
    one("console/speed", Kind::Number),
    one("console/log", Kind::Flag),
    unique("nics/*/mac", Kind::Mac),
    unique("nics/*/ip", Kind::Ip),
    one("nics/*/netmask", Kind::Ip),
    one("nics/*/network", Kind::Name),
    one("nics/*/primary", Kind::Flag),
    one("nics/*/extra", Kind::Free),
    one("tags", Kind::Names),
    one("notes", Kind::Text),
    one("project", Kind::Name),
    one("groups", Kind::Names),
    one("profiles", Kind::Names),
];

/// The older system's names.
const ALIASES: &[(&str, &str)] =
    &[("control_info", "control"), ("console_info", "console"), ("nics_info", "nics")];

/// The path as this table has it.
pub fn canonical(path: &str) -> Vec<String> {
    let mut parts: Vec<String> = path.split('/').map(Into::into).collect();
    for (alias, name) in ALIASES {
        if parts[0] == *alias {
            parts[0] = (*name).into();
        }
    }
    parts
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    Setting(&'static Attribute),
    /// Several settings, `control` or `nics/eth0`.
    Group,
    /// A part of what may be anything.
    Inside,
}

/// Looks a path up.
///
/// # Errors
/// Saying which part of it is no setting, and naming the nearest that is.
pub fn find(path: &[String]) -> Result<Found, String> {
    let mut under: Vec<(&'static Attribute, &'static str)> =
        ATTRIBUTES.iter().map(|attribute| (attribute, attribute.path)).collect();
    for (depth, part) in path.iter().enumerate() {
        // Anything below is everybody's own business.
        if let [(attribute, "")] = under[..] {
            if attribute.kind == Kind::Free {
                return Ok(Found::Inside);
            }
            return Err(format!("`{}` has nothing below it", path[..depth].join("/")));
        }
        let head = |rest: &'static str| rest.split_once('/').unwrap_or((rest, ""));
        let fits = |(_, rest): &&(&Attribute, &'static str)| {
            head(rest).0 == part || (head(rest).0 == "*" && is_name(part))
        };
        let below: Vec<_> =
            under.iter().filter(fits).map(|(it, rest)| (*it, head(rest).1)).collect();
        if below.is_empty() {
            return Err(unknown(&path[..=depth], under.iter().map(|(_, rest)| head(rest).0)));
        }
        under = below;
    }
    match under[..] {
        [(attribute, "")] => Ok(Found::Setting(attribute)),
        _ => Ok(Found::Group),
    }
}

fn unknown<'a>(path: &[String], known: impl Iterator<Item = &'a str> + Clone) -> String {
    let part = path.last().map_or("", String::as_str);
    let shown = path.join("/");
    if path.len() == 1 && part == "name" {
        return "`name` cannot be changed".into();
    }
    if known.clone().any(|it| it == "*") {
        return format!("`{}` cannot be an interface's name", part.escape_debug());
    }
    let near = nearest(part, known.clone());
    let word = |word: String| {
        let mut whole = path[..path.len() - 1].to_vec();
        whole.push(word);
        format!("did you mean `{}`?", whole.join("/"))
    };
    let mut all: Vec<&str> = known.collect();
    all.dedup();
    let help = near.map_or_else(|| format!("there are {}", all.join(", ")), word);
    format!("there is no setting `{}`; {help}", shown.escape_debug())
}

/// Whether a word can be the name of a group, a profile, an interface.
pub fn is_name(word: &str) -> bool {
    let letter = |c: char| name::is_letter(c) || matches!(c, '+' | ':' | '@');
    !word.is_empty()
        && word.len() <= name::MAX_LENGTH
        && word.chars().all(letter)
        && word != "."
        && word != ".."
}

impl Kind {
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
            Self::Free if value.is_object() => Ok(value),
            Self::Free => wrong("`{…}`"),
            Self::Names => names(value),
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
            Self::Number => {
                shown.parse::<u32>().map_or_else(|_| wrong("a number"), |it| Ok(it.into()))
            }
            Self::Flag => match shown.as_str() {
                "true" | "yes" | "on" | "1" => Ok(true.into()),
                "false" | "no" | "off" | "0" => Ok(false.into()),
                _ => wrong("`true` or `false`"),
            },
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

/// A list of names; text is one, with commas between them.
fn names(value: Value) -> Result<Value, String> {
    let parts: Vec<Value> = match value {
        Value::Array(parts) => parts,
        Value::String(text) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            parts.map(|part| part.into()).collect()
        }
        other => vec![other],
    };
    let mut names: Vec<Value> = Vec::new();
    for part in parts {
        let name = Kind::Name.keep(part)?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(Value::Array(names))
}

/// Calls `change` with each secret in a tree; what it gives takes the secret's place.
///
/// # Errors
/// Those of `change`.
pub fn secrets<E>(
    tree: &mut Tree,
    change: &mut dyn FnMut(&str) -> Result<Option<String>, E>,
) -> Result<(), E> {
    for attribute in ATTRIBUTES.iter().filter(|attribute| attribute.kind == Kind::Secret) {
        let Some((group, key)) = attribute.path.split_once('/') else { continue };
        let Some(Value::Object(group)) = tree.get_mut(group) else { continue };
        let secret = match group.get(key) {
            Some(Value::String(secret)) => secret.clone(),
            Some(Value::Number(secret)) => secret.to_string(),
            _ => continue,
        };
        match change(&secret)? {
            Some(other) => drop(group.insert(key.to_owned(), other.into())),
            None => drop(group.remove(key)),
        }
    }
    Ok(())
}

/// Checks a tree of settings and brings it into the form in which it is kept; says all
/// that is wrong, each with its path.
pub fn check(tree: Tree) -> Result<Tree, Vec<(String, String)>> {
    let mut wrong = Vec::new();
    let tree = check_below(&mut Vec::new(), tree, &mut wrong);
    if wrong.is_empty() { Ok(tree) } else { Err(wrong) }
}

fn check_below(path: &mut Vec<String>, tree: Tree, wrong: &mut Vec<(String, String)>) -> Tree {
    let mut kept = Tree::new();
    for (key, value) in tree {
        if value.is_null() {
            continue;
        }
        path.push(key.clone());
        let result = match (find(path), value) {
            (Err(what), _) => Err(what),
            (Ok(Found::Setting(attribute)), value) => attribute.kind.keep(value),
            (Ok(Found::Group), Value::Object(below)) => {
                Ok(Value::Object(check_below(path, below, wrong)))
            }
            (Ok(Found::Inside), value) => Ok(value),
            (Ok(Found::Group), other) => Err(format!("`{other}` is not settings of its own")),
        };
        match result {
            // What has nothing in it says nothing.
            Ok(Value::Object(below)) if below.is_empty() => {}
            Ok(Value::Array(below)) if below.is_empty() => {}
            Ok(value) => drop(kept.insert(key, value)),
            Err(what) => wrong.push((path.join("/"), what)),
        }
        path.pop();
    }
    kept
}
