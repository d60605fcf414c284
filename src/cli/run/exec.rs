//! What a command in a guest is given of the environment here.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use regex_lite::Regex;

use crate::error::{Error, Result};

/// Variables that are the guest's and its user's own.
const OWN: [&str; 11] =
    ["HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "SHLVL", "_", "TERM", "HOSTNAME", "MAIL"];

/// `NAME=VALUE` for all that is wished.
pub fn environment(
    here: &[(OsString, OsString)],
    wishes: &[String],
    mirror: bool,
) -> Result<Vec<Vec<u8>>> {
    let pair = |(name, value): &(OsString, OsString)| assignment(name, value);
    let is_own = |name: &OsStr| OWN.iter().any(|own| name == *own);
    let mut words = Vec::new();
    if mirror {
        words.extend(here.iter().filter(|(name, _)| !is_own(name)).map(pair));
    }
    for wish in wishes {
        if let Some(pattern) = wish.strip_prefix("re(").and_then(|wish| wish.strip_suffix(')')) {
            let regex = Regex::new(&format!("^(?:{pattern})$")).map_err(|error| {
                Error::usage(format!("`{}` is no regular expression", pattern.escape_debug()))
                    .because(error)
            })?;
            let meant = |name: &OsStr| name.to_str().is_some_and(|name| regex.is_match(name));
            words.extend(here.iter().filter(|(name, _)| meant(name)).map(pair));
        } else if wish.contains('=') {
            words.extend(assignments("--env", std::slice::from_ref(wish))?);
        } else if !is_name(wish) {
            let wish = wish.escape_debug();
            return Err(Error::usage(format!("`-e {wish}` names no variable"))
                .help("write VAR, VAR=VALUE or `re(PATTERN)`"));
        } else {
            // What is not set here is not set there.
            words.extend(here.iter().filter(|(name, _)| *name == **wish).map(pair));
        }
    }
    Ok(words)
}

/// Those that are wished by name and not set: they may be mistyped.
pub fn unset<'a>(here: &[(OsString, OsString)], wishes: &'a [String]) -> Vec<&'a str> {
    let is_set = |wish: &String| here.iter().any(|(name, _)| *name == **wish);
    let missing = wishes.iter().filter(|wish| is_name(wish) && !is_set(wish));
    missing.map(String::as_str).collect()
}

fn is_name(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// What kind of terminal there is.
pub fn terminal(here: &[(OsString, OsString)]) -> Option<Vec<u8>> {
    here.iter().find(|(name, _)| name == "TERM").map(|(name, value)| assignment(name, value))
}

fn assignment(name: &OsStr, value: &OsStr) -> Vec<u8> {
    [name.as_bytes(), b"=", value.as_bytes()].concat()
}

/// Words that have to be `NAME=VALUE`.
pub fn assignments(option: &str, words: &[String]) -> Result<Vec<Vec<u8>>> {
    let one = |word: &String| match word.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(word.clone().into_bytes()),
        _ => {
            let word = word.escape_debug();
            Err(Error::usage(format!("`{option} {word}` sets no variable")).help("write VAR=VALUE"))
        }
    };
    words.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(wishes: &[&str], mirror: bool) -> Result<String> {
        let here: Vec<(OsString, OsString)> = [("HOME", "/h"), ("OMP_A", "1"), ("OMP_B", "a=b")]
            .map(|(name, value)| (name.into(), value.into()))
            .into();
        let wishes: Vec<String> = wishes.iter().map(|wish| (*wish).to_owned()).collect();
        let words = environment(&here, &wishes, mirror)?;
        Ok(String::from_utf8(words.join(&b' ')).unwrap())
    }

    #[test]
    fn variables_are_set_by_name_by_value_and_by_pattern() {
        assert_eq!(given(&[], false).unwrap(), "");
        assert_eq!(
            given(&["OMP_B", "X=1=2", "HOME", "NONE"], false).unwrap(),
            "OMP_B=a=b X=1=2 HOME=/h"
        );
        assert_eq!(given(&["re(OMP_.*)"], false).unwrap(), "OMP_A=1 OMP_B=a=b");
        assert_eq!(given(&["re(A)"], false).unwrap(), "");
        assert_eq!(given(&["OMP_A=2"], true).unwrap(), "OMP_A=1 OMP_B=a=b OMP_A=2");
        given(&["re(()"], false).unwrap_err();
        given(&["=x"], false).unwrap_err();
        // What was to be a pattern is no name.
        let error = given(&["re(OMP_"], false).unwrap_err().report();
        assert!(error.contains("`-e re(OMP_` names no variable"), "{error}");
        let here = [("HOME".into(), "/h".into())];
        let wishes = ["HOME", "HMOE", "X=1", "re(Y)"].map(String::from);
        assert_eq!(unset(&here, &wishes), ["HMOE"]);
        assignments("--path-prefix", &["PATH".into()]).unwrap_err();
    }
}
