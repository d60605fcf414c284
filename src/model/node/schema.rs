//! The settings of records: their names, and what each may be.

use serde_json::Value;

use super::Tree;
use super::request::Noun;
use crate::model::nearest::nearest;
use crate::model::nodeset::name;

pub use super::kinds::Kind;

/// How deep what may be anything may be: it lies in others, and is read again.
const MAX_DEPTH: usize = 16;

/// The most bytes of a record: several fit into a commit.
const MAX_RECORD: usize = 64 << 10;

/// What a sealed secret begins with.
pub const SEALED: &str = "sealed:";

/// One setting.
#[derive(Debug, PartialEq, Eq)]
pub struct Attribute {
    /// With `*` for a name that people choose.
    pub path: &'static str,
    pub kind: Kind,
    /// Whether no two nodes have the same; then groups and profiles cannot have it.
    pub unique: bool,
}

/// The settings whose paths begin alike.
#[derive(Clone, Copy)]
struct Below {
    all: &'static [Attribute],
    /// How much of their paths is alike, with the `/` behind it.
    at: usize,
}

impl Below {
    /// The next part of a path, or nothing behind the last.
    fn part(self, attribute: &Attribute) -> &'static str {
        let rest = attribute.path.get(self.at..).unwrap_or("");
        rest.split('/').next().unwrap_or("")
    }

    /// The only one, if nothing is below it.
    fn lone(self) -> Option<&'static Attribute> {
        match self.all {
            [attribute] if attribute.path.len() < self.at => Some(attribute),
            _ => None,
        }
    }

    /// Those that go on with this part.
    fn step(self, part: &str) -> Option<Self> {
        let fits = |attribute: &Attribute| {
            let rest = attribute.path.get(self.at..).unwrap_or("").as_bytes();
            let is_it = rest.starts_with(part.as_bytes())
                && rest.get(part.len()).is_none_or(|next| *next == b'/');
            (is_it && !part.is_empty()) || (rest.first() == Some(&b'*') && is_name(part))
        };
        let first = self.all.iter().position(fits)?;
        let length = self.all[first..].iter().take_while(|it| fits(it)).count();
        let all = &self.all[first..first + length];
        Some(Self { all, at: self.at + self.part(&all[0]).len() + 1 })
    }
}

const fn one(path: &'static str, kind: Kind) -> Attribute {
    Attribute { path, kind, unique: false }
}

const fn unique(path: &'static str, kind: Kind) -> Attribute {
    Attribute { path, kind, unique: true }
}

const DRIVERS: &[&str] = &["redfish", "ipmi", "ipmitool", "openbmc", "kvm", "virsh", "qmp", "exec"];
const NETBOOT: &[&str] = &["pxe", "ipxe", "petitboot", "http", "grub"];

/// All settings of nodes; those of groups and profiles but for what is one node's alone.
/// What begins alike stands together.
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
    one("control/bmc_key", Kind::Secret),
    one("control/bmc_cipher", Kind::Choice(&["3", "17"])),
    one("control/bmc_privilege", Kind::Choice(&["user", "operator", "administrator"])),
    one("control/bmc_efi", Kind::Flag),
    one("control/qmp_socket", Kind::Text),
    one("control/qmp_net", Kind::Text),
    one("control/qmp_disk", Kind::Text),
    one("control/qmp_cdrom", Kind::Text),
    one("control/exec", Kind::Text),
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
    one("groups", Kind::Groups),
    one("profiles", Kind::Names),
];

const CRYPT: &[&str] = &["md5", "sha256", "sha512", "yescrypt"];

const NETWORK: &[Attribute] = &[
    one("subnet", Kind::Ip),
    one("netmask", Kind::Ip),
    one("gateway", Kind::Ip),
    one("dhcpserver", Kind::Host),
    one("dynamic_range", Kind::Range),
    one("nameservers", Kind::Ips),
    one("ntpservers", Kind::Hosts),
    one("domain", Kind::Host),
    one("vlan", Kind::Vlan),
    one("notes", Kind::Text),
];

const PASSWD: &[Attribute] = &[
    one("username", Kind::Text),
    one("password", Kind::Secret),
    one("crypt_method", Kind::Choice(CRYPT)),
    one("notes", Kind::Text),
];

const PROJECT: &[Attribute] = &[
    one("members", Kind::Names),
    one("networks", Kind::Names),
    one("admin", Kind::Flag),
    one("quota/nodes", Kind::Number),
    one("notes", Kind::Text),
];

/// The older system's names.
const ALIASES: &[(&str, &str)] =
    &[("control_info", "control"), ("console_info", "console"), ("nics_info", "nics")];

/// The path as these tables have it.
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

/// The settings that records of a kind have.
pub fn attributes(noun: Noun) -> &'static [Attribute] {
    match noun {
        Noun::Node | Noun::Group | Noun::Profile => ATTRIBUTES,
        Noun::Net => NETWORK,
        Noun::Passwd => PASSWD,
        Noun::Project => PROJECT,
    }
}

/// Whether records of a kind may not have a setting that the table has: it is nodes' alone.
fn refused(noun: Noun, attribute: &Attribute) -> bool {
    match noun {
        Noun::Group => attribute.unique || attribute.path == "groups",
        Noun::Profile => attribute.unique || matches!(attribute.path, "groups" | "profiles"),
        _ => false,
    }
}

/// Looks a path up.
///
/// # Errors
/// Saying which part of it is no setting, and naming the nearest that is.
pub fn find(noun: Noun, path: &[impl AsRef<str>]) -> Result<Found, String> {
    if path.len() > MAX_DEPTH {
        return Err("it is too deep".into());
    }
    let mut below = Below { all: attributes(noun), at: 0 };
    for depth in 0..path.len() {
        match step(below, &path[..=depth])? {
            Some(next) => below = next,
            None => return Ok(Found::Inside),
        }
    }
    found(noun, below)
}

/// A step down to the end of a path; nothing, where all is everybody's own business.
fn step(below: Below, path: &[impl AsRef<str>]) -> Result<Option<Below>, String> {
    let Some((part, above)) = path.split_last() else { return Ok(Some(below)) };
    let shown = || above.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join("/");
    match below.lone() {
        Some(attribute) if attribute.kind == Kind::Free => return Ok(None),
        Some(_) => return Err(format!("`{}` has nothing below it", shown())),
        None => {}
    }
    let known = below.all.iter().map(|it| below.part(it));
    let next = below.step(part.as_ref());
    next.map(Some).ok_or_else(|| unknown(&shown(), part.as_ref(), known))
}

/// What is there.
fn found(noun: Noun, below: Below) -> Result<Found, String> {
    match below.lone() {
        Some(attribute) if refused(noun, attribute) => {
            Err(format!("it is a node's alone: no {} can have it", noun.as_str()))
        }
        Some(attribute) => Ok(Found::Setting(attribute)),
        None => Ok(Found::Group),
    }
}

fn unknown<'a>(above: &str, part: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    if above.is_empty() && part == "name" {
        return "`name` cannot be changed".into();
    }
    if known.clone().any(|it| it == "*") {
        return format!("`{}` cannot be an interface's name", part.escape_debug());
    }
    let whole = |word: &str| match above {
        "" => word.to_owned(),
        above => format!("{above}/{word}"),
    };
    let near = nearest(part, known.clone());
    let mut all: Vec<&str> = known.collect();
    all.dedup();
    let help = near.map_or_else(
        || format!("there are {}", all.join(", ")),
        |near| format!("did you mean `{}`?", whole(&near)),
    );
    format!("there is no setting `{}`; {help}", whole(part).escape_debug())
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

/// What takes a secret's place, by its path and text.
pub type Replace<'a, E> = dyn FnMut(&'static str, &str) -> Result<Option<String>, E> + 'a;

/// Calls `change` with the path of each secret in a tree, and the secret; what it gives takes
/// the secret's place.
///
/// # Errors
/// Those of `change`.
pub fn secrets<E>(noun: Noun, tree: &mut Tree, change: &mut Replace<'_, E>) -> Result<(), E> {
    for attribute in attributes(noun).iter().filter(|attribute| attribute.kind == Kind::Secret) {
        let (tree, key) = match attribute.path.split_once('/') {
            None => (&mut *tree, attribute.path),
            Some((group, key)) => match tree.get_mut(group) {
                Some(Value::Object(group)) => (group, key),
                _ => continue,
            },
        };
        let secret = match tree.get(key) {
            Some(Value::String(secret)) => secret.clone(),
            Some(Value::Number(secret)) => secret.to_string(),
            _ => continue,
        };
        match change(attribute.path, &secret)? {
            Some(other) => drop(tree.insert(key.to_owned(), other.into())),
            None => drop(tree.remove(key)),
        }
    }
    Ok(())
}

/// How many levels a value has; at most one more than it may.
pub(super) fn is_deep(value: &Value, above: usize) -> bool {
    match value {
        _ if above > MAX_DEPTH => true,
        Value::Object(tree) => tree.values().any(|it| is_deep(it, above + 1)),
        Value::Array(list) => list.iter().any(|it| is_deep(it, above + 1)),
        _ => false,
    }
}

/// About how many bytes a value has.
fn size(value: &Value) -> usize {
    match value {
        Value::Object(tree) => tree.iter().map(|(key, it)| key.len() + 4 + size(it)).sum(),
        Value::Array(list) => list.iter().map(|it| 1 + size(it)).sum(),
        Value::String(text) => text.len() + 2,
        _ => 8,
    }
}

/// Checks a tree of settings and brings it into the form in which it is kept; says all
/// that is wrong, each with its path.
pub fn check(noun: Noun, tree: Tree) -> Result<Tree, Vec<(String, String)>> {
    let mut wrong = Vec::new();
    let bytes: usize = tree.iter().map(|(key, it)| key.len() + size(it)).sum();
    if bytes > MAX_RECORD {
        let what = format!("{bytes} bytes, and {MAX_RECORD} are the most");
        return Err(vec![("all of it".into(), what)]);
    }
    let below = Below { all: attributes(noun), at: 0 };
    let tree = check_below(noun, below, &mut Vec::new(), tree, &mut wrong);
    if wrong.is_empty() { Ok(tree) } else { Err(wrong) }
}

fn check_below(
    noun: Noun,
    below: Below,
    path: &mut Vec<String>,
    tree: Tree,
    wrong: &mut Vec<(String, String)>,
) -> Tree {
    let mut kept = Tree::new();
    for (key, value) in tree {
        if value.is_null() {
            continue;
        }
        path.push(key);
        let result = match step(below, &path[..]) {
            Err(what) => Err(what),
            Ok(None) => Ok(value),
            Ok(Some(below)) => match (found(noun, below), value) {
                (Err(what), _) => Err(what),
                (Ok(Found::Setting(attribute)), value) => attribute.kind.keep(value),
                (Ok(Found::Inside), value) => Ok(value),
                (Ok(Found::Group), Value::Object(tree)) => {
                    Ok(Value::Object(check_below(noun, below, path, tree, wrong)))
                }
                // It may hold a secret in a wrong place: it is not repeated.
                (Ok(Found::Group), _) => Err("it has settings of its own, `{…}`".into()),
            },
        };
        let key = path.pop().unwrap_or_default();
        match result {
            // What has nothing in it says nothing.
            Ok(Value::Object(below)) if below.is_empty() => {}
            Ok(Value::Array(below)) if below.is_empty() => {}
            Ok(value) => drop(kept.insert(key, value)),
            Err(what) => {
                path.push(key);
                wrong.push((path.join("/"), what));
                path.pop();
            }
        }
    }
    kept
}
