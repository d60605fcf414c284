//! Secrets of the machines below, as the inventory keeps them: sealed with a key of its own.
//!
//! ```text
//! inventory.key      0600   made with the first secret
//! inventory.sealed          says that there is, or was, such a key: none takes its place
//! ```
//!
//! The key lies in the folder of the store, for its owner alone. Who has records of the store
//! alone, an export or etcd's own backup, has no password of a BMC; who has the whole folder has
//! all of them, and a backup of it wants to be kept as the key itself.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use base64ct::{Base64, Encoding};
use crypto_box::aead::{Aead, AeadCore, OsRng};
use crypto_box::{SalsaBox, SecretKey};
use sha2::{Digest, Sha256};

use super::{Secret, create, decode_key, encode_key, read_private, reading};
use crate::error::{Context, Error, Result};
use crate::model::node::schema::SEALED;

const FILE: &str = "inventory.key";
const SEALS: &str = "inventory.sealed";
const MARK: &str = "pavo-inventory-private-1";

/// What seals secrets, and opens them for those who use them.
///
/// The box is to ourselves: what is slow of it is done once, for thousands of secrets.
pub struct Vault {
    dir: PathBuf,
    opened: OnceLock<Opened>,
}

/// A key, ready to be used.
struct Opened {
    key: SalsaBox,
    /// By which it is told from others.
    mark: String,
}

/// Before each sealed secret.
const NONCE: usize = 24;

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Vault")
    }
}

impl Vault {
    /// The vault of the store in `dir`. Where there is no key yet, the first secret makes it.
    ///
    /// # Errors
    /// When others may read the key.
    pub fn open(dir: &Path) -> Result<Self> {
        let vault = Self { dir: dir.to_owned(), opened: OnceLock::new() };
        if vault.file().try_exists().while_doing(|| reading(&vault.file()))? {
            vault.opened()?;
        }
        Ok(vault)
    }

    fn file(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    /// The box, with the key that there is.
    fn opened(&self) -> Result<&Opened> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let file = self.file();
        let key = || decode_key(&read_private(&file)?, MARK);
        let key = SecretKey::from(key().while_doing(|| reading(&file))?);
        Ok(self.opened.get_or_init(|| Opened::of(&key)))
    }

    /// The box to seal with: it makes the key, unless there was one that is gone.
    fn to_seal(&self) -> Result<&Opened> {
        let (file, seals) = (self.file(), self.dir.join(SEALS));
        let sealed_before = seals.try_exists().while_doing(|| reading(&seals))?;
        if !file.try_exists().while_doing(|| reading(&file))? {
            if sealed_before {
                return Err(gone(&file).help(format!(
                    "put it back from its copy, or give it up: `rm {}`, and set all passwords anew",
                    seals.display()
                )));
            }
            let key = SecretKey::generate(&mut OsRng);
            create(&file, &encode_key(&key.to_bytes(), MARK), 0o600)?;
        }
        if !sealed_before {
            std::fs::write(&seals, "").while_doing(|| format!("writing `{}`", seals.display()))?;
        }
        self.opened()
    }

    /// By which its key is told from others, if there is one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn mark(&self) -> Result<Option<String>> {
        match self.file().try_exists().while_doing(|| reading(&self.file()))? {
            true => Ok(Some(self.opened()?.mark.clone())),
            false => Ok(None),
        }
    }

    /// The same; makes the key before there is a secret.
    ///
    /// # Errors
    /// When it cannot be made, or there was one that is gone.
    pub fn make(&self) -> Result<String> {
        Ok(self.to_seal()?.mark.clone())
    }

    /// The secret as it may be kept.
    ///
    /// # Errors
    /// When it cannot be sealed; the cause has nothing to say, and might say the secret.
    pub fn seal(&self, secret: &str) -> Result<String> {
        self.to_seal()?.seal(secret)
    }

    /// What was sealed.
    ///
    /// # Errors
    /// When it was sealed with another key, or the key is gone.
    pub fn unseal(&self, sealed: &str) -> Result<Secret> {
        let file = self.file();
        if self.opened.get().is_none() && !file.try_exists().while_doing(|| reading(&file))? {
            return Err(gone(&file).help("put it back from its copy"));
        }
        let opened = self.opened()?;
        opened.unseal(sealed).ok_or_else(|| {
            Error::system("a sealed secret cannot be opened")
                .help("was the inventory's key replaced? set the password anew")
        })
    }
}

fn gone(file: &Path) -> Error {
    Error::system(format!("the inventory's key `{}` is gone", file.display()))
}

impl Opened {
    fn of(key: &SecretKey) -> Self {
        let digest = Sha256::digest(key.public_key().as_bytes());
        let mark = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Self { key: SalsaBox::new(&key.public_key(), key), mark }
    }

    fn seal(&self, secret: &str) -> Result<String> {
        let nonce = SalsaBox::generate_nonce(&mut OsRng);
        let sealed = self.key.encrypt(&nonce, secret.as_bytes());
        let sealed = sealed.map_err(|_| Error::system("a secret cannot be sealed"))?;
        Ok(format!("{SEALED}{}", Base64::encode_string(&[nonce.as_slice(), &sealed].concat())))
    }

    fn unseal(&self, sealed: &str) -> Option<Secret> {
        let bytes = Base64::decode_vec(sealed.strip_prefix(SEALED)?).ok()?;
        let (nonce, sealed) = bytes.split_at_checked(NONCE)?;
        let secret = self.key.decrypt(nonce.into(), sealed).ok()?;
        String::from_utf8(secret).ok().map(Secret)
    }
}

/// What a secret begins with that is sealed to a passphrase.
pub const LOCKED: &str = "locked:";

/// How much work a passphrase takes: 2^15 steps, 32 MiB, a tenth of a second.
const WORK: u8 = 15;

/// Seals secrets to a passphrase, for a file that leaves the machine.
///
/// ```text
/// locked:15:<salt>:<nonce and box>
/// ```
///
/// Each says how its key is made of the passphrase (scrypt, with r = 8, p = 1). All of a file
/// have one salt, so that the work is done once.
pub struct Lock {
    opened: Opened,
    /// `locked:15:<salt>:`
    head: String,
}

impl std::fmt::Debug for Lock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lock")
    }
}

impl Lock {
    /// A new one.
    ///
    /// # Errors
    /// When there are no random numbers.
    pub fn new(passphrase: &str) -> Result<Self> {
        let mut salt = [0; 16];
        getrandom::fill(&mut salt).while_doing(|| "asking for random numbers".into())?;
        Self::made(passphrase, WORK, &Base64::encode_string(&salt))
    }

    /// The one that has sealed this.
    ///
    /// # Errors
    /// When nothing has.
    pub fn of(locked: &str, passphrase: &str) -> Result<Self> {
        let (work, salt, _) = Self::parts(locked)?;
        Self::made(passphrase, work, salt)
    }

    fn parts(locked: &str) -> Result<(u8, &str, &str)> {
        let parts = || {
            let (work, rest) = locked.strip_prefix(LOCKED)?.split_once(':')?;
            let (salt, sealed) = rest.split_once(':')?;
            // More is somebody's wish to keep us busy.
            let work = work.parse().ok().filter(|work| (10..=20).contains(work))?;
            Some((work, salt, sealed))
        };
        parts().ok_or_else(|| Error::usage("a secret is not as `export --with-secrets` writes it"))
    }

    fn made(passphrase: &str, work: u8, salt: &str) -> Result<Self> {
        let bug = || Error::bug("no key can be made of a passphrase");
        let parameters = scrypt::Params::new(work, 8, 1, 32).map_err(|_| bug())?;
        let mut key = [0; 32];
        scrypt::scrypt(passphrase.as_bytes(), salt.as_bytes(), &parameters, &mut key)
            .map_err(|_| bug())?;
        let opened = Opened::of(&SecretKey::from(key));
        Ok(Self { opened, head: format!("{LOCKED}{work}:{salt}:") })
    }

    /// A secret as a file may have it.
    ///
    /// # Errors
    /// When it cannot be sealed.
    pub fn seal(&self, secret: &str) -> Result<String> {
        let sealed = self.opened.seal(secret)?;
        Ok(format!("{}{}", self.head, sealed.trim_start_matches(SEALED)))
    }

    /// What was sealed.
    ///
    /// # Errors
    /// When it was sealed to another passphrase, or in another file.
    pub fn open(&self, locked: &str) -> Result<Secret> {
        let (_, _, sealed) = Self::parts(locked)?;
        let ours = locked.starts_with(&self.head);
        let opened = self.opened.unseal(&format!("{SEALED}{sealed}")).filter(|_| ours);
        opened.ok_or_else(|| Error::usage("the passphrase is another"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_locked_is_opened_by_the_passphrase_alone() {
        let lock = Lock::new("correct horse").unwrap();
        let locked = lock.seal("hunter2").unwrap();
        assert!(locked.starts_with("locked:15:") && !locked.contains("hunter2"));
        assert_eq!(
            Lock::of(&locked, "correct horse").unwrap().open(&locked).unwrap().expose(),
            "hunter2"
        );
        assert!(Lock::of(&locked, "wrong horse").unwrap().open(&locked).is_err());
        assert!(Lock::new("correct horse").unwrap().open(&locked).is_err(), "another salt");
        for wrong in ["locked:", "locked:15:a", "locked:60:a:b", "locked:x:a:b", "hunter2"] {
            assert!(Lock::of(wrong, "correct horse").is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_key_is_made_with_the_first_secret_and_none_in_the_place_of_one_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let vault = Vault::open(dir.path()).unwrap();
        assert!(!dir.path().join(FILE).exists());
        assert!(Vault::open(&dir.path().join("none")).is_ok());
        let sealed = vault.seal("hunter2").unwrap();
        let (key, away) = (dir.path().join(FILE), dir.path().join("away"));
        std::fs::rename(&key, &away).unwrap();
        let lost = Vault::open(dir.path()).unwrap();
        for why in [lost.seal("other").unwrap_err(), lost.unseal(&sealed).unwrap_err()] {
            let why = why.report();
            assert!(why.contains("is gone") && why.contains("put it back"), "{why}");
        }
        assert!(!key.exists());
        std::fs::rename(&away, &key).unwrap();
        assert_eq!(lost.unseal(&sealed).unwrap().expose(), "hunter2");
        // Of a time when nobody wrote that down.
        std::fs::remove_file(dir.path().join(SEALS)).unwrap();
        lost.seal("other").unwrap();
        assert!(dir.path().join(SEALS).exists());
    }

    #[test]
    fn what_is_sealed_is_opened_with_the_same_key_alone() {
        let dir = tempfile::tempdir().unwrap();
        let vault = Vault::open(dir.path()).unwrap();
        let sealed = vault.seal("hunter2").unwrap();
        assert!(!sealed.contains("hunter2") && sealed.starts_with(SEALED));
        assert_ne!(vault.seal("hunter2").unwrap(), sealed);
        let again = Vault::open(dir.path()).unwrap();
        assert_eq!(again.unseal(&sealed).unwrap().expose(), "hunter2");
        let other = tempfile::tempdir().unwrap();
        Vault::open(other.path()).unwrap().seal("x").unwrap();
        for wrong in [sealed.as_str(), "sealed:", "hunter2", "sealed:AAAA"] {
            assert!(Vault::open(other.path()).unwrap().unseal(wrong).is_err());
        }
        use std::os::unix::fs::PermissionsExt;
        let file = dir.path().join(FILE);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Vault::open(dir.path()).unwrap_err().report().contains("others may read it"));
    }
}
