//! Who asks, and what they may.
//!
//! On the daemon's own host a process is known by its user; elsewhere a caller shows a token.
//! Of tokens the daemon keeps digests only, a line each:
//!
//! ```text
//! <state>/tokens   0600   NAME admin|reader SHA256
//! ```

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use nix::unistd::{Gid, Group, Uid, User, geteuid, getgrouplist};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::model::node::schema::is_name;
use crate::store::secret::{Secret, read_private};

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    Look,
    Change,
}

impl Rights {
    fn as_str(self) -> &'static str {
        match self {
            Self::Look => "reader",
            Self::Change => "admin",
        }
    }
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub name: String,
    pub rights: Rights,
}

/// The caller that a process of this user is: root, the daemon's own user and the members of
/// the group may change things. May wait for the site's directory of users.
pub fn of_process(uid: u32, gid: u32, admins: &str) -> Caller {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    let admins = Group::from_name(admins).ok().flatten();
    let is_member = |group: &Group| {
        let groups = user.as_ref().and_then(|user| {
            let name = CString::new(user.name.as_str()).ok()?;
            getgrouplist(&name, user.gid).ok()
        });
        group.gid == Gid::from_raw(gid) || groups.is_some_and(|all| all.contains(&group.gid))
    };
    let is_ours = uid == 0 || uid == geteuid().as_raw();
    let rights = match is_ours || admins.as_ref().is_some_and(is_member) {
        true => Rights::Change,
        false => Rights::Look,
    };
    Caller { name: user.map_or_else(|| uid.to_string(), |user| user.name), rights }
}

/// The digest of a token, and whose it is.
type Known = BTreeMap<String, Caller>;

/// The tokens that are good.
#[derive(Debug)]
pub struct Tokens {
    file: PathBuf,
    /// As they were when the file was as old as this.
    read: Mutex<(Option<SystemTime>, Known)>,
}

impl Tokens {
    /// Those of the daemon with this state.
    pub fn of(state: &Path) -> Self {
        Self { file: state.join("tokens"), read: Mutex::default() }
    }

    /// Whose token this is. A file that cannot be read knows none.
    pub fn caller(&self, token: &str) -> Option<Caller> {
        let digest = digest(token);
        let age = fs::metadata(&self.file).and_then(|it| it.modified()).ok();
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.0 != age || age.is_none() {
            let known = self.load().unwrap_or_else(|error| {
                tracing::warn!("no token is good: {}", error.report());
                Known::new()
            });
            *read = (age, known);
        }
        read.1.get(&digest).cloned()
    }

    /// All callers that have one.
    ///
    /// # Errors
    /// When the file cannot be read, or others may.
    pub fn list(&self) -> Result<Vec<Caller>> {
        Ok(self.load()?.into_values().collect())
    }

    /// A new token of this caller, which is told once.
    ///
    /// # Errors
    /// When there is one of that name, or the file cannot be written.
    pub fn add(&self, name: &str, rights: Rights) -> Result<Secret> {
        if !is_name(name) {
            return Err(Error::usage(format!("`{}` cannot be a name", name.escape_debug())));
        }
        let mut known = self.load()?;
        if known.values().any(|caller| caller.name == name) {
            return Err(Error::usage(format!("`{name}` has a token"))
                .help(format!("make it worthless: `pavo daemon token delete {name}`")));
        }
        let token = Secret::random()?;
        known.insert(digest(token.expose()), Caller { name: name.into(), rights });
        self.store(&known)?;
        Ok(token)
    }

    /// Makes a caller's token worthless.
    ///
    /// # Errors
    /// When there is none, or the file cannot be written.
    pub fn delete(&self, name: &str) -> Result<()> {
        let mut known = self.load()?;
        let before = known.len();
        known.retain(|_, caller| caller.name != name);
        if known.len() == before {
            return Err(Error::not_found(format!("`{name}` has no token")));
        }
        self.store(&known)
    }

    fn load(&self) -> Result<Known> {
        let doing = || format!("reading `{}`", self.file.display());
        match fs::metadata(&self.file) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Known::new()),
            other => other.while_doing(doing)?,
        };
        let text = read_private(&self.file).while_doing(doing)?;
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            let (name, rights, digest) = (words.next()?, words.next()?, words.next()?);
            let rights =
                [Rights::Look, Rights::Change].into_iter().find(|it| it.as_str() == rights)?;
            Some((digest.to_owned(), Caller { name: name.into(), rights }))
        };
        text.lines()
            .map(|text| line(text).ok_or_else(|| Error::config("a line is no token")))
            .collect::<Result<_>>()
            .while_doing(doing)
    }

    fn store(&self, known: &Known) -> Result<()> {
        use std::io::Write;
        let line = |(digest, caller): (&String, &Caller)| {
            format!("{} {} {digest}\n", caller.name, caller.rights.as_str())
        };
        let text: String = known.iter().map(line).collect();
        let doing = || format!("writing `{}`", self.file.display());
        let dir = self.file.parent().unwrap_or(Path::new("."));
        let mut aside = tempfile::NamedTempFile::new_in(dir).while_doing(doing)?;
        aside.write_all(text.as_bytes()).while_doing(doing)?;
        aside.as_file().sync_all().while_doing(doing)?;
        if geteuid().is_root() {
            // The daemon's, whose folder this is.
            use std::os::unix::fs::MetadataExt;
            let owner = fs::metadata(dir).while_doing(doing)?;
            let (uid, gid) = (owner.uid(), owner.gid());
            std::os::unix::fs::chown(aside.path(), Some(uid), Some(gid)).while_doing(doing)?;
        }
        aside.persist(&self.file).while_doing(doing)?;
        Ok(())
    }
}

fn digest(token: &str) -> String {
    Sha256::digest(token).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_until_it_is_deleted_and_in_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::of(dir.path());
        assert_eq!(tokens.list().unwrap(), []);
        let token = tokens.add("ci", Rights::Look).unwrap();
        let other = tokens.add("ops", Rights::Change).unwrap();
        let caller = tokens.caller(token.expose()).unwrap();
        assert_eq!(caller, Caller { name: "ci".into(), rights: Rights::Look });
        assert_eq!(tokens.caller(other.expose()).unwrap().rights, Rights::Change);
        assert_eq!(tokens.caller("guess"), None);
        assert!(tokens.add("ci", Rights::Change).unwrap_err().report().contains("has a token"));
        assert!(tokens.add("a b", Rights::Change).is_err());
        let file = dir.path().join("tokens");
        assert!(!fs::read_to_string(&file).unwrap().contains(token.expose()));
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        tokens.delete("ci").unwrap();
        assert_eq!(Tokens::of(dir.path()).caller(token.expose()), None);
        assert!(tokens.delete("ci").is_err());
        // A file that others may read is not believed.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(Tokens::of(dir.path()).caller(other.expose()), None);
    }

    #[test]
    fn root_and_our_own_user_may_change_things_others_look() {
        assert_eq!(of_process(0, 0, "no-such-group").rights, Rights::Change);
        let stranger = of_process(12_345_678, 12_345_678, "no-such-group");
        assert_eq!(stranger, Caller { name: "12345678".into(), rights: Rights::Look });
        let group = Group::from_gid(Gid::from_raw(0)).unwrap().unwrap().name;
        assert_eq!(of_process(12_345_678, 0, &group).rights, Rights::Change);
    }
}
