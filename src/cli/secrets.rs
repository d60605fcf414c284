//! Secrets that people give: from files, from the terminal without an echo, and in files whose
//! secrets are sealed to a passphrase.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::Path;

use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use serde_json::Value;

use crate::error::{Context, Error, Result};
use crate::model::node::request::{Format, Noun};
use crate::model::node::schema::{self, Attribute, Found, Kind};
use crate::store::secret::Secret;
use crate::store::secret::vault::{LOCKED, Lock};

/// Changes in which what is secret is in a file: `control/bmc_password=@FILE`, or `=@-`, which
/// asks. A secret that begins with `@` is written with two.
pub fn from_files(noun: Noun, edits: Vec<String>) -> Result<Vec<String>> {
    let edit = |edit: String| {
        let Some((path, value)) = edit.split_once('=') else { return Ok(edit) };
        let found = schema::find(noun, &schema::canonical(path));
        let is_secret = matches!(found, Ok(Found::Setting(Attribute { kind: Kind::Secret, .. })));
        let Some(file) = value.strip_prefix('@').filter(|_| is_secret) else { return Ok(edit) };
        let secret = match file {
            _ if file.starts_with('@') => file.to_owned(),
            "-" => ask(&format!("{path}: "))?.expose().to_owned(),
            file => Secret::read(Path::new(file))?.expose().to_owned(),
        };
        Ok(format!("{path}={secret}"))
    };
    edits.into_iter().map(edit).collect()
}

/// A line of the terminal, which does not show it; without a terminal, of standard input.
fn ask(prompt: &str) -> Result<Secret> {
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/tty");
    let line = match terminal {
        Ok(terminal) if std::io::stdin().is_terminal() => unseen(&terminal, prompt),
        _ => {
            let mut line = String::new();
            std::io::stdin().lock().read_line(&mut line).map(|_| line)
        }
    };
    let line = line.while_doing(|| "reading a secret".into())?;
    match line.trim_end_matches(['\n', '\r']) {
        "" => Err(Error::usage("a secret is missing")),
        secret => Ok(Secret::from(secret.to_owned())),
    }
}

fn unseen(mut terminal: &File, prompt: &str) -> std::io::Result<String> {
    let before = tcgetattr(terminal)?;
    let mut hidden = before.clone();
    hidden.local_flags.remove(LocalFlags::ECHO);
    write!(terminal, "{prompt}")?;
    tcsetattr(terminal, SetArg::TCSAFLUSH, &hidden)?;
    let mut line = String::new();
    let read = BufReader::new(terminal).read_line(&mut line);
    tcsetattr(terminal, SetArg::TCSAFLUSH, &before)?;
    writeln!(terminal)?;
    read.map(|_| line)
}

/// The passphrase of a file: of another file, or asked for; twice, when it is a new one.
pub fn passphrase(file: Option<&Path>, is_new: bool) -> Result<Secret> {
    if let Some(file) = file {
        return Secret::read(file);
    }
    if !std::io::stdin().is_terminal() {
        return Err(Error::usage("there is no terminal to ask for the passphrase")
            .help("write it to a file of yours alone: `--passphrase-file FILE`"));
    }
    let first = ask("Passphrase: ")?;
    if is_new && ask("The same again: ")? != first {
        return Err(Error::usage("these are two different passphrases"));
    }
    Ok(first)
}

/// The text of a file with the secrets in it that are sealed to a passphrase; as it is, when
/// there are none.
pub fn unlock(format: Format, text: String, file: Option<&Path>) -> Result<String> {
    if !text.contains(LOCKED) {
        return Ok(text);
    }
    let no_list = || "this is no list of records".to_owned();
    let mut whole: Value = match format {
        Format::Json => serde_json::from_str(&text).while_doing(no_list)?,
        Format::Yaml => serde_yaml::from_str(&text).while_doing(no_list)?,
        Format::Csv | Format::Groups => return Ok(text),
    };
    let mut lock = None;
    open(&mut whole, file, &mut lock)?;
    match format {
        Format::Yaml => serde_yaml::to_string(&whole).while_doing(|| "writing YAML".into()),
        _ => serde_json::to_string_pretty(&whole).while_doing(|| "writing JSON".into()),
    }
}

fn open(value: &mut Value, file: Option<&Path>, lock: &mut Option<Lock>) -> Result<()> {
    match value {
        Value::Object(tree) => tree.values_mut().try_for_each(|it| open(it, file, lock)),
        Value::Array(list) => list.iter_mut().try_for_each(|it| open(it, file, lock)),
        Value::String(text) if text.starts_with(LOCKED) => {
            let lock = match lock {
                Some(lock) => lock,
                none => none.insert(Lock::of(text, passphrase(file, false)?.expose())?),
            };
            *text = lock.open(text)?.expose().to_owned();
            Ok(())
        }
        _ => Ok(()),
    }
}
