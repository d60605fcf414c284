//! Secrets of the machines below, as the inventory keeps them: sealed with a key of its own.
//!
//! The key lies beside the store, for its owner alone. Who copies the store, or reads a
//! backup of it, has no password of a BMC.

use std::path::Path;

use base64ct::{Base64, Encoding};
use crypto_box::aead::{Aead, AeadCore, OsRng};
use crypto_box::{SalsaBox, SecretKey};
use sha2::{Digest, Sha256};

use super::{Secret, create, decode_key, encode_key, read_private, reading};
use crate::error::{Context, Error, Result};
use crate::model::node::schema::SEALED;

const FILE: &str = "inventory.key";
const MARK: &str = "pavo-inventory-private-1";

/// What seals secrets, and opens them for those who use them.
///
/// The box is to ourselves: what is slow of it is done once, for thousands of secrets.
pub struct Vault(SalsaBox, String);

/// Before each sealed secret.
const NONCE: usize = 24;

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Vault")
    }
}

impl Vault {
    /// The vault of the store in `dir`; its key is made if there is none.
    ///
    /// # Errors
    /// When others may read the key.
    pub fn open(dir: &Path) -> Result<Self> {
        let file = dir.join(FILE);
        if !file.try_exists().while_doing(|| reading(&file))? {
            let key = SecretKey::generate(&mut OsRng);
            create(&file, &encode_key(&key.to_bytes(), MARK), 0o600)?;
        }
        let key = || decode_key(&read_private(&file)?, MARK);
        let key = SecretKey::from(key().while_doing(|| reading(&file))?);
        let digest = Sha256::digest(key.public_key().as_bytes());
        let mark = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(SalsaBox::new(&key.public_key(), &key), mark))
    }

    /// By which its key is told from others.
    pub fn mark(&self) -> String {
        self.1.clone()
    }

    /// The secret as it may be kept.
    ///
    /// # Errors
    /// When it cannot be sealed; the cause has nothing to say, and might say the secret.
    pub fn seal(&self, secret: &str) -> Result<String> {
        let nonce = SalsaBox::generate_nonce(&mut OsRng);
        let sealed = self.0.encrypt(&nonce, secret.as_bytes());
        let sealed = sealed.map_err(|_| Error::system("a secret cannot be sealed"))?;
        Ok(format!("{SEALED}{}", Base64::encode_string(&[nonce.as_slice(), &sealed].concat())))
    }

    /// What was sealed.
    ///
    /// # Errors
    /// When it was sealed with another key.
    pub fn unseal(&self, sealed: &str) -> Result<Secret> {
        let bytes = sealed.strip_prefix(SEALED).and_then(|text| Base64::decode_vec(text).ok());
        let secret = bytes.and_then(|bytes| {
            let (nonce, sealed) = bytes.split_at_checked(NONCE)?;
            self.0.decrypt(nonce.into(), sealed).ok()
        });
        let secret = secret.and_then(|secret| String::from_utf8(secret).ok());
        secret.map(Secret).ok_or_else(|| {
            Error::system("a sealed secret cannot be opened")
                .help("was the inventory's key replaced? set the password anew")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
