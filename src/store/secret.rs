//! What proves to etcd who a person is, and how it travels.
//!
//! ```text
//! ~/.pavo/etcd-secret   0400, the person's      43 random characters: the etcd password
//! /etc/pavo/site.pub    0644, root's            `pavo-site-1 <base64>`: to seal with
//! /etc/pavo/site.key    0600, root's            `pavo-site-key-1 <base64>`: to open with
//! ```
//!
//! The secret reaches root's side of a job in a [`Letter`], through the environment of the
//! job's step, which schedulers send in the clear, record and show. It is sealed there, so
//! that only root's key opens it, and says whose it is and of which job: another's letter,
//! copied from somewhere, is refused. Whoever can seal can only set a password of his own.

pub mod vault;

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64ct::{Base64, Base64UrlUnpadded, Encoding};
use crypto_box::aead::OsRng;
use crypto_box::{PublicKey, SecretKey};
use nix::unistd::geteuid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

/// The longest sealed text, as the plugin has it.
pub const MAX_SEALED: usize = 4096;

/// The longest of the files.
const MAX_FILE: u64 = 1 << 20;

const PUBLIC_MARK: &str = "pavo-site-1";
const PRIVATE_MARK: &str = "pavo-site-key-1";

/// A text that is in no log and no error.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// 256 random bits.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).while_doing(|| "asking for random numbers".into())?;
        Ok(Self(Base64UrlUnpadded::encode_string(&bytes)))
    }

    /// A secret that somebody else made: the content of a file, less its line's end.
    ///
    /// # Errors
    /// When the file is empty, belongs to somebody else but root, or others may read it.
    pub fn read(file: &Path) -> Result<Self> {
        let text = read_private(file).while_doing(|| reading(file))?;
        let text = text.trim_end_matches(['\n', '\r']);
        if text.is_empty() || text.contains(['\n', '\0']) {
            let what = format!("`{}` does not hold one line with a secret", file.display());
            return Err(Error::config(what));
        }
        Ok(Self(text.to_owned()))
    }

    /// The text itself, for where it has to go.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(a secret)")
    }
}

/// The secret of the person whose home this is; made at the first time, by one of
/// several processes at once.
///
/// # Errors
/// When the file, or its folder, is not the caller's alone.
pub fn person_secret(home: &Path) -> Result<Secret> {
    let dir = home.join(".pavo");
    let file = dir.join("etcd-secret");
    let make = || {
        make_private_dir(&dir)?;
        if !file.try_exists()? {
            create(&file, &format!("{}\n", Secret::random()?.expose()), 0o400)?;
        }
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    };
    make().while_doing(|| format!("making `{}`", file.display()))?;
    Secret::read(&file).map_err(|error| {
        error.help(format!("remove it, and start another job: `rm -f {}`", file.display()))
    })
}

fn make_private_dir(dir: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(error).while_doing(|| format!("creating `{}`", dir.display()));
        }
        _ => {}
    }
    let found =
        fs::symlink_metadata(dir).while_doing(|| format!("looking at `{}`", dir.display()))?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(Error::system(format!("`{}` is not a folder of yours alone", dir.display()))
            .help(format!("see what it is: `ls -ld {}`", dir.display())));
    }
    Ok(())
}

/// The site's public key, with which a person seals.
#[derive(Clone, Debug)]
pub struct SitePublic(PublicKey);

impl SitePublic {
    /// # Errors
    /// When the file is not root's (or ours), or others may write to it: whoever does
    /// could open what we seal.
    pub fn read(file: &Path) -> Result<Self> {
        let key = || {
            let text = read_owned(file, 0o022)?;
            Ok::<_, Error>(Self(PublicKey::from(decode_key(&text, PUBLIC_MARK)?)))
        };
        key().while_doing(|| reading(file))
    }

    /// The letter, for the environment of a step.
    pub fn seal(&self, letter: &Letter<impl Serialize>) -> Result<String> {
        let content = serde_json::to_vec(letter).while_doing(|| "sealing a secret".into())?;
        // The cause has nothing to say, and might say it about the secret.
        let sealed = self.0.seal(&mut OsRng, &content);
        let sealed = sealed.map_err(|_| cannot_seal(&letter.user))?;
        let text = Base64::encode_string(&sealed);
        if text.len() > MAX_SEALED { Err(cannot_seal(&letter.user)) } else { Ok(text) }
    }
}

/// What a person's launcher tells root on the hosts of one job, and nobody else.
#[derive(Serialize, Deserialize)]
pub struct Letter<T> {
    version: u32,
    user: String,
    uid: u32,
    job: u32,
    /// The person's, by which the site knows them.
    pub secret: Secret,
    /// What makes a process a member of the job's cluster.
    pub member: T,
}

impl<T> Letter<T> {
    const VERSION: u32 = 1;

    pub fn new(user: &str, uid: u32, job: u32, secret: Secret, member: T) -> Self {
        Self { version: Self::VERSION, user: user.into(), uid, job, secret, member }
    }
}

impl<T> fmt::Debug for Letter<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Letter of {} in job {}", self.uid, self.job)
    }
}

fn cannot_seal(user: &str) -> Error {
    Error::system(format!("the secret of `{user}` cannot be sealed"))
}

/// The site's private key, root's.
pub struct SiteKey(SecretKey);

impl SiteKey {
    /// Makes both files in `dir` if they are missing. Says whether the key is new.
    pub fn ensure(dir: &Path) -> Result<(Self, bool)> {
        let file = dir.join("site.key");
        let is_new =
            !file.try_exists().while_doing(|| format!("looking at `{}`", file.display()))?;
        if is_new {
            let key = SecretKey::generate(&mut OsRng);
            create(&file, &encode_key(&key.to_bytes(), PRIVATE_MARK), 0o600)?;
        }
        let key = Self::read(&file)?;
        let public = dir.join("site.pub");
        let text = encode_key(key.0.public_key().as_bytes(), PUBLIC_MARK);
        if fs::read_to_string(&public).ok().as_deref() != Some(&text) {
            match fs::remove_file(&public) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).while_doing(|| format!("replacing `{}`", public.display()));
                }
                _ => create(&public, &text, 0o644)?,
            }
        }
        Ok((key, is_new))
    }

    /// # Errors
    /// When others may read the file.
    pub fn read(file: &Path) -> Result<Self> {
        let key = || decode_key(&read_private(file)?, PRIVATE_MARK);
        Ok(Self(SecretKey::from(key().while_doing(|| reading(file))?)))
    }

    /// The letter that this person sealed for this job.
    ///
    /// # Errors
    /// When the text was not sealed for this site, or is another person's or job's.
    pub fn open<T: DeserializeOwned>(
        &self,
        sealed: &str,
        user: &str,
        uid: u32,
        job: u32,
    ) -> Result<Letter<T>> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let unseal = || {
            let bytes = (sealed.len() <= MAX_SEALED).then(|| Base64::decode_vec(sealed).ok())??;
            self.0.unseal(&bytes).ok()
        };
        let content = unseal().ok_or_else(|| {
            Error::system("the sealed secret of the job cannot be opened").help(
                "an administrator compares /etc/pavo/site.pub of the login node with that of this node",
            )
        })?;
        // What serde quotes is secret.
        let version = serde_json::from_slice::<Versioned>(&content).map(|it| it.version).ok();
        let letter = version.filter(|version| *version == Letter::<T>::VERSION);
        let letter = letter.and_then(|_| serde_json::from_slice::<Letter<T>>(&content).ok());
        let letter = letter.ok_or_else(|| {
            Error::system("another version of pavo sealed the secret of the job")
                .help("install the same version of pavo on all hosts (`pavo --version`)")
        })?;
        let other = |what: String| {
            Err(Error::system(format!("the sealed secret of the job is of {what}"))
                .help("start the job without PAVO_SEALED in the environment"))
        };
        if (letter.user.as_str(), letter.uid) != (user, uid) {
            let (theirs, name) = (letter.uid, letter.user.escape_default());
            return other(format!("the user {theirs} (`{name}`), not of {uid} (`{user}`)"));
        }
        if letter.job != job {
            return other(format!("the job {}, not of {job}", letter.job));
        }
        Ok(letter)
    }
}

impl fmt::Debug for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SiteKey")
    }
}

fn encode_key(key: &[u8; 32], mark: &str) -> String {
    format!("{mark} {}\n", Base64::encode_string(key))
}

fn decode_key(text: &str, mark: &str) -> Result<[u8; 32]> {
    let decode = || {
        let (found, key) = text.trim_end().split_once(' ')?;
        let key = (found == mark).then(|| Base64::decode_vec(key).ok())??;
        key.try_into().ok()
    };
    decode().ok_or_else(|| Error::config(format!("it does not hold `{mark} KEY`")))
}

fn reading(file: &Path) -> String {
    format!("reading `{}`", file.display())
}

/// The text of a file that is ours, or root's, alone.
///
/// # Errors
/// When it belongs to somebody else, or others may read it.
pub fn read_private(file: &Path) -> Result<String> {
    read_owned(file, 0o077)
}

/// The text of a file of ours, or root's, on which others have none of these rights.
fn read_owned(file: &Path, forbidden: u32) -> Result<String> {
    let path = file.display();
    // Not waiting for the writer of a named pipe.
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits() | nix::fcntl::OFlag::O_NOFOLLOW.bits();
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(file);
    let opened: File = opened.while_doing(|| "opening it".into())?;
    let found = opened.metadata().while_doing(|| "looking at it".into())?;
    if !found.is_file() {
        return Err(Error::system("it is not a file"));
    }
    if ![0, geteuid().as_raw()].contains(&found.uid()) {
        return Err(Error::system(format!("it belongs to the user {}", found.uid())));
    }
    if found.mode() & forbidden != 0 {
        let how = if forbidden & 0o044 != 0 { "read" } else { "write" };
        let take = if forbidden & 0o044 != 0 { "go-rwx" } else { "go-w" };
        return Err(Error::system(format!("others may {how} it"))
            .help(format!("take that from them: `chmod {take} {path}`")));
    }
    let mut text = String::new();
    opened.take(MAX_FILE).read_to_string(&mut text).while_doing(|| "reading it".into())?;
    Ok(text)
}

/// Makes the file, whole, unless somebody else has made one.
fn create(file: &Path, text: &str, mode: u32) -> Result<()> {
    let mut aside = file.as_os_str().to_owned();
    aside.push(format!(".{}.new", Secret::random()?.expose()));
    let aside = PathBuf::from(aside);
    let write = || {
        let mut made = OpenOptions::new().write(true).create_new(true).mode(mode).open(&aside)?;
        made.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        made.write_all(text.as_bytes())?;
        made.sync_all()?;
        match fs::hard_link(&aside, file) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    };
    let written = write();
    // What cannot be removed is of no use to anybody.
    let _ = fs::remove_file(&aside);
    written.while_doing(|| format!("creating `{}`", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn site() -> (tempfile::TempDir, SiteKey, SitePublic) {
        let dir = tempfile::tempdir().unwrap();
        let (key, is_new) = SiteKey::ensure(dir.path()).unwrap();
        assert!(is_new);
        let public = SitePublic::read(&dir.path().join("site.pub")).unwrap();
        (dir, key, public)
    }

    fn mode(file: &Path) -> u32 {
        fs::metadata(file).unwrap().mode() & 0o7777
    }

    fn letter(user: &str, uid: u32, member: &str) -> Letter<String> {
        Letter::new(user, uid, 42, Secret::random().unwrap(), member.to_owned())
    }

    #[test]
    fn a_letter_is_opened_by_the_site_for_its_owner_and_job_only() {
        let (_dir, key, public) = site();
        let letter = letter("ada", 1000, "hunter2");
        let sealed = public.seal(&letter).unwrap();
        assert!(sealed.len() <= MAX_SEALED && sealed.bytes().all(|b| b.is_ascii_graphic()));
        let opened = key.open::<String>(&sealed, "ada", 1000, 42).unwrap();
        assert!(opened.secret == letter.secret && opened.member == "hunter2");
        for (user, uid, job, whose) in [
            ("ada", 1001, 42, "is of the user 1000 (`ada`), not of 1001"),
            ("bob", 1000, 42, "is of the user 1000 (`ada`), not of 1000 (`bob`)"),
            ("ada", 1000, 43, "is of the job 42, not of 43"),
        ] {
            let report = key.open::<String>(&sealed, user, uid, job).unwrap_err().report();
            assert!(report.contains(whose) && report.contains("without PAVO_SEALED"), "{report}");
            assert!(!report.contains(letter.secret.expose()) && !report.contains("hunter2"));
        }
        let (_dir, other, _) = site();
        let error = other.open::<String>(&sealed, "ada", 1000, 42).unwrap_err();
        assert!(error.report().contains("site.pub"), "{error:?}");
        // Never twice the same: what was seen in one job says nothing of the next.
        assert_ne!(sealed, public.seal(&letter).unwrap());
    }

    #[test]
    fn what_was_changed_on_its_way_is_refused() {
        let (_dir, key, public) = site();
        let sealed = public.seal(&letter("ada", 1000, "x")).unwrap();
        let open = |sealed: &str| key.open::<String>(sealed, "ada", 1000, 42);
        assert!(open(&sealed).is_ok());
        for at in 0..sealed.len() {
            let mut changed = sealed.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert!(open(&String::from_utf8(changed).unwrap()).is_err(), "{at}");
        }
        for wrong in ["", "=", "ä", &sealed[..40], &"A".repeat(100_000)] {
            assert!(open(wrong).is_err());
        }
        assert!(public.seal(&letter("ada", 1, &"x".repeat(3000))).is_err());
        assert!(public.seal(&letter(&"x".repeat(190), u32::MAX, &"x".repeat(2000))).is_ok());
    }

    #[test]
    fn a_letter_of_another_version_is_told_apart() {
        let (_dir, key, public) = site();
        let newer = Letter { version: 2, ..letter("ada", 1000, "hunter2") };
        let numbers = Letter::new("ada", 1000, 42, Secret::random().unwrap(), 5);
        for sealed in [public.seal(&newer).unwrap(), public.seal(&numbers).unwrap()] {
            let report = key.open::<String>(&sealed, "ada", 1000, 42).unwrap_err().report();
            assert!(report.contains("another version of pavo sealed the secret"), "{report}");
            assert!(!report.contains("hunter2"), "{report}");
        }
    }

    #[test]
    fn a_site_keeps_its_key() {
        let (dir, key, _) = site();
        let (file, public) = (dir.path().join("site.key"), dir.path().join("site.pub"));
        assert_eq!((mode(&file), mode(&public)), (0o600, 0o644));
        let text = fs::read_to_string(&public).unwrap();
        assert!(text.starts_with("pavo-site-1 ") && text.ends_with('\n'));
        // A public key that is lost, or another's, is made again of the private one.
        for lost in ["", "pavo-site-1 AAAA\n"] {
            fs::write(&public, lost).unwrap();
            let (again, is_new) = SiteKey::ensure(dir.path()).unwrap();
            assert!(!is_new);
            assert!(again.0.to_bytes() == key.0.to_bytes());
            assert_eq!(fs::read_to_string(&public).unwrap(), text);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside");
        fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
        let report = SiteKey::read(&file).unwrap_err().report();
        assert!(
            report.contains("others may read it") && report.contains("chmod go-rwx"),
            "{report}"
        );
        fs::set_permissions(&public, PermissionsExt::from_mode(0o666)).unwrap();
        let report = SitePublic::read(&public).unwrap_err().report();
        assert!(report.contains("others may write it"), "{report}");
        fs::set_permissions(&public, PermissionsExt::from_mode(0o644)).unwrap();
        fs::write(&public, "ssh-ed25519 AAAA").unwrap();
        assert_eq!(SitePublic::read(&public).unwrap_err().kind(), Kind::Config);
    }

    #[test]
    fn a_person_has_one_secret_and_alone() {
        let home = tempfile::tempdir().unwrap();
        let secrets: Vec<Secret> = std::thread::scope(|scope| {
            let make = || scope.spawn(|| person_secret(home.path()).unwrap());
            let threads: Vec<_> = (0..8).map(|_| make()).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(secrets.iter().all(|secret| *secret == secrets[0]), "one wins");
        assert_eq!(secrets[0].expose().len(), 43);
        let dir = home.path().join(".pavo");
        let file = dir.join("etcd-secret");
        assert_eq!((mode(&file), mode(&dir)), (0o400, 0o700));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);

        fs::set_permissions(&file, PermissionsExt::from_mode(0o440)).unwrap();
        let report = person_secret(home.path()).unwrap_err().report();
        assert!(report.contains("others may read it") && report.contains("rm -f"), "{report}");
        assert!(!report.contains(secrets[0].expose()));
        fs::remove_file(&file).unwrap();
        symlink("/etc/hostname", &file).unwrap();
        assert!(person_secret(home.path()).is_err(), "a link is not followed");
        fs::remove_file(&file).unwrap();
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        assert!(person_secret(home.path()).is_err(), "an empty secret is none");
    }

    #[test]
    fn a_secret_that_another_user_laid_there_is_refused() {
        if !geteuid().is_root() {
            // Only root can lay such a file; CI is root.
            assert!(std::env::var_os("CI").is_none(), "needs root");
            return;
        }
        let home = tempfile::tempdir().unwrap();
        person_secret(home.path()).unwrap();
        let file = home.path().join(".pavo/etcd-secret");
        std::os::unix::fs::chown(&file, Some(65534), None).unwrap();
        let report = person_secret(home.path()).unwrap_err().report();
        assert!(report.contains("belongs to the user 65534"), "{report}");
    }

    #[test]
    fn no_secret_is_shown() {
        let (_dir, key, _) = site();
        let secret = Secret::random().unwrap();
        let letter = letter("ada", 1000, "hunter2");
        let shown = format!("{secret:?} {key:?} {:?} {letter:?}", Some(&secret));
        let told = [secret.expose(), letter.secret.expose(), "hunter2", "["];
        assert!(!told.iter().any(|text| shown.contains(text)), "{shown}");
    }
}
