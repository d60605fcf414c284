//! How images are named: `[REPO:]NAME[@REVISION]`, or the path of a folder.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};

/// An image as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Uri {
    InRepo(Name),
    /// The older form: a folder with `image` and `image-rev1`, `image-rev2`, …
    Folder(PathBuf),
}

/// `[REPO:]NAME[@REVISION]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) repo: Option<String>,
    pub(super) image: String,
    pub(super) revision: Option<u32>,
}

/// Whether `name` may name an image: letters, digits, `_`, `-`, `.`, and nothing that a
/// path could mean.
pub(super) fn plain(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    (1..=200).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with(['.', '-'])
        && !name.contains("..")
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.contains('/') && !text.contains('\0') {
            return Ok(Self::Folder(text.into()));
        }
        let wrong = || {
            Error::usage(format!("`{}` cannot be the name of an image", text.escape_debug()))
                .help("write [REPO:]NAME[@REVISION]; names have letters, digits and `_.-`")
        };
        let (repo, rest) = match text.split_once(':') {
            Some((repo, rest)) => (Some(repo), rest),
            None => (None, text),
        };
        let (image, revision) = match rest.split_once('@') {
            Some((image, revision)) => (image, Some(revision)),
            None => (rest, None),
        };
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let revision = match revision {
            Some(text) if digits(text) => Some(text.parse().map_err(|_| wrong())?),
            Some(_) => return Err(wrong()),
            None => None,
        };
        if !plain(image) || repo.is_some_and(|repo| !plain(repo)) {
            return Err(wrong());
        }
        Ok(Self::InRepo(Name { repo: repo.map(str::to_owned), image: image.into(), revision }))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(repo) = &self.repo {
            write!(f, "{repo}:")?;
        }
        f.write_str(&self.image)?;
        match self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_reads_back_as_it_was_written() {
        for text in ["tiny", "user:tiny", "tiny@3", "site:debian-12.1_x@0"] {
            let Uri::InRepo(name) = text.parse().unwrap() else { panic!("{text} is no path") };
            assert_eq!(name.to_string(), text);
        }
        assert_eq!("./old".parse::<Uri>().unwrap(), Uri::Folder("./old".into()));
    }

    #[test]
    fn what_could_be_a_path_or_a_line_is_no_name() {
        for text in [
            "",
            "..",
            "a..b",
            ".a",
            "-a",
            "a\nb",
            "a b",
            "a@",
            "a@x",
            "a@-1",
            ":a",
            "a:b:c",
            "a@99999999999",
            "a@1@2",
            "é",
            "r:",
            "a@+1",
        ] {
            assert!(text.parse::<Uri>().is_err(), "{text:?}");
        }
    }
}
