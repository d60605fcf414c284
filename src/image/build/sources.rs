//! Where the packages of an image come from: apt's sources for it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::config::Recipe;
use crate::error::{Context, Error, Result};
use crate::image::tool;

/// The release, and the lines of the image's `sources.list`.
pub(super) fn of(recipe: &Recipe) -> Result<(String, String)> {
    let release =
        fs::read_to_string("/etc/os-release").while_doing(|| "reading `/etc/os-release`".into())?;
    let here = Machine { release: &release, targets: &targets()? };
    let keyring = |path: &str| Path::new(path).exists();
    lines(recipe, &here, keyring)
}

/// What apt of this machine uses, a line each: address, code name, origin.
fn targets() -> Result<String> {
    let format = "$(REPO_URI)|$(CODENAME)|$(ORIGIN)";
    let text = tool::run(Command::new("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// What decides of it on this machine.
struct Machine<'a> {
    /// `/etc/os-release`
    release: &'a str,
    targets: &'a str,
}

impl Machine<'_> {
    fn release(&self, key: &str) -> Option<&str> {
        let mut pairs = self.release.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(name, _)| *name == key).map(|(_, value)| value.trim_matches('"'))
    }
}

fn lines(
    recipe: &Recipe,
    here: &Machine,
    exists: impl Fn(&str) -> bool,
) -> Result<(String, String)> {
    let ours = here.release("VERSION_CODENAME");
    let suite = recipe.suite.as_deref().or(ours).ok_or_else(|| {
        Error::config("this machine's release is not known").help("name one in the recipe: `suite`")
    })?;
    let repos = match &recipe.mirror {
        Some(mirror) => BTreeSet::from([(mirror.clone(), suite.to_owned())]),
        None => known(here, suite)?,
    };
    let origin = here.release("ID").unwrap_or_default();
    let keyring = recipe.keyring.clone().or_else(|| {
        let usual = format!("/usr/share/keyrings/{origin}-archive-keyring.gpg");
        exists(&usual).then_some(usual)
    });
    let option = keyring.map(|path| format!("[signed-by={path}] ")).unwrap_or_default();
    let components = recipe.components.join(" ");
    let line = |(uri, suite): (String, String)| format!("deb {option}{uri} {suite} {components}\n");
    Ok((suite.to_owned(), repos.into_iter().map(line).collect()))
}

/// The repositories of a release that this machine's apt knows; of another release of the
/// same distribution, where this machine's is.
fn known(here: &Machine, suite: &str) -> Result<BTreeSet<(String, String)>> {
    let id = here.release("ID").unwrap_or_default();
    let targets = || {
        here.targets.lines().filter_map(|line| {
            let mut parts = line.split('|');
            let (uri, name, origin) = (parts.next()?, parts.next()?, parts.next()?);
            origin.eq_ignore_ascii_case(id).then_some((uri, name))
        })
    };
    let is_part = |name: &str| match name.strip_prefix(suite) {
        Some(rest) => matches!(rest, "" | "-updates" | "-security" | "/updates"),
        None => false,
    };
    let owned = |(uri, name): (&str, &str)| (uri.to_owned(), name.to_owned());
    let found: BTreeSet<_> = targets().filter(|(_, name)| is_part(name)).map(owned).collect();
    if found.iter().any(|(_, name)| name == suite) {
        return Ok(found);
    }
    let ours = here.release("VERSION_CODENAME").unwrap_or_default();
    let main = targets().find(|(_, name)| *name == ours && id == "debian");
    main.map(|(uri, _)| BTreeSet::from([(uri.to_owned(), suite.to_owned())])).ok_or_else(|| {
        Error::system(format!("apt of this machine does not know where packages of `{suite}` are"))
            .help(
                "name a mirror in the recipe (`mirror`), or fetch apt's package lists once, as \
                 root: `apt-get update`",
            )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "ID=debian\nVERSION_CODENAME=bookworm\n";
    const TARGETS: &str = "http://m/debian/|bookworm|Debian\n\
         http://m/debian/|bookworm-updates|Debian\n\
         http://m/security/|bookworm-security|Debian\n\
         http://other/|bookworm|Somebody\n";

    fn sources(recipe: &Recipe, release: &str) -> Result<(String, String)> {
        let recipe = Recipe { components: vec!["main".into()], ..recipe.clone() };
        lines(&recipe, &Machine { release, targets: TARGETS }, |_| true)
    }

    #[test]
    fn this_machines_release_comes_with_its_updates_and_nothing_of_others() {
        let (suite, lines) = sources(&Recipe::default(), DEBIAN).unwrap();
        assert_eq!(suite, "bookworm");
        let key = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
        assert_eq!(
            lines,
            format!(
                "deb {key} http://m/debian/ bookworm main\n\
                 deb {key} http://m/debian/ bookworm-updates main\n\
                 deb {key} http://m/security/ bookworm-security main\n"
            )
        );
    }

    #[test]
    fn another_release_comes_from_the_same_place_and_a_mirror_alone_counts() {
        let mut recipe = Recipe { suite: Some("trixie".into()), ..Recipe::default() };
        let (_, lines) = sources(&recipe, DEBIAN).unwrap();
        assert!(lines.ends_with(" http://m/debian/ trixie main\n"), "{lines}");
        recipe.mirror = Some("http://mine/debian".into());
        recipe.keyring = Some("/k.gpg".into());
        let (_, lines) = sources(&recipe, DEBIAN).unwrap();
        assert_eq!(lines, "deb [signed-by=/k.gpg] http://mine/debian trixie main\n");
    }

    #[test]
    fn a_machine_of_another_distribution_needs_a_mirror() {
        let ubuntu = "ID=ubuntu\nVERSION_CODENAME=noble\n";
        let recipe = Recipe { suite: Some("bookworm".into()), ..Recipe::default() };
        let error = sources(&recipe, ubuntu).unwrap_err().report();
        assert!(error.contains("name a mirror in the recipe"), "{error}");
        assert!(sources(&Recipe::default(), "").is_err());
    }
}
