//! The two cipher suites, what a session's keys are made of, and what proves who knows them.
//!
//! Names are the specification's: R are random numbers, SID session numbers, of M the console
//! (us) and C the controller.

use aes::Aes128;
use cbc::cipher::block_padding::NoPadding;
use cbc::cipher::{BlockDecryptMut, BlockEncryptMut, KeyIvInit};
use hmac::digest::KeyInit;
use hmac::{Hmac, Mac};
use sha1::Sha1;
use sha2::Sha256;

/// AES blocks.
const BLOCK: usize = 16;

/// How a session is authenticated, signed and encrypted, by the number that IPMI gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// HMAC-SHA1, HMAC-SHA1-96, AES-CBC-128.
    Three,
    /// HMAC-SHA256, HMAC-SHA256-128, AES-CBC-128.
    Seventeen,
}

impl Suite {
    pub fn number(self) -> u8 {
        match self {
            Self::Three => 3,
            Self::Seventeen => 17,
        }
    }

    /// The numbers of its algorithms: authentication, integrity, confidentiality.
    pub fn algorithms(self) -> [u8; 3] {
        match self {
            Self::Three => [1, 1, 1],
            Self::Seventeen => [3, 4, 1],
        }
    }

    /// How long a code of a key exchange is.
    fn exchange_code(self) -> usize {
        match self {
            Self::Three => 20,
            Self::Seventeen => 32,
        }
    }

    /// How long a packet's code is.
    pub fn packet_code(self) -> usize {
        match self {
            Self::Three => 12,
            Self::Seventeen => 16,
        }
    }

    fn code(self, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        match self {
            Self::Three => keyed::<Hmac<Sha1>>(key, parts).finalize().into_bytes().to_vec(),
            Self::Seventeen => keyed::<Hmac<Sha256>>(key, parts).finalize().into_bytes().to_vec(),
        }
    }

    /// Whether `code`, all of it or its beginning, is that of `parts`; in a time that says
    /// nothing of where it differs.
    fn is_code(self, key: &[u8], parts: &[&[u8]], code: &[u8]) -> bool {
        match self {
            Self::Three => keyed::<Hmac<Sha1>>(key, parts).verify_truncated_left(code).is_ok(),
            Self::Seventeen => {
                keyed::<Hmac<Sha256>>(key, parts).verify_truncated_left(code).is_ok()
            }
        }
    }
}

fn keyed<M: Mac + KeyInit>(key: &[u8], parts: &[&[u8]]) -> M {
    let mut mac = <M as Mac>::new_from_slice(key).expect("any length will do");
    parts.iter().for_each(|part| mac.update(part));
    mac
}

/// Everything that both sides know of a session before they prove it.
#[derive(Clone)]
pub struct Exchange<'a> {
    pub suite: Suite,
    pub password: &'a [u8],
    /// The controller's own key, where it has one.
    pub key: Option<&'a [u8]>,
    pub user: &'a [u8],
    /// The privilege that is asked for, as it is in the first message.
    pub role: u8,
    pub console: u32,
    pub console_random: [u8; 16],
    pub controller: u32,
    pub controller_random: [u8; 16],
    pub controller_id: [u8; 16],
}

impl Exchange<'_> {
    /// Whether the controller's second message is of one who knows the password.
    pub fn knows_password(&self, code: &[u8]) -> bool {
        let (console, controller) = (self.console.to_le_bytes(), self.controller.to_le_bytes());
        let parts = [
            &console[..],
            &controller,
            &self.console_random,
            &self.controller_random,
            &self.controller_id,
            &[self.role, self.user.len() as u8],
            self.user,
        ];
        code.len() == self.suite.exchange_code() && self.suite.is_code(self.password, &parts, code)
    }

    /// That we know it, for the third message.
    pub fn proof(&self) -> Vec<u8> {
        let console = self.console.to_le_bytes();
        let about = [self.role, self.user.len() as u8];
        let parts = [&self.controller_random[..], &console, &about, self.user];
        self.suite.code(self.password, &parts)
    }

    /// The keys of the session, if the code of the fourth message says that the controller has
    /// the same.
    pub fn keys(&self, code: &[u8]) -> Option<Keys> {
        let about = [self.role, self.user.len() as u8];
        let parts = [&self.console_random[..], &self.controller_random, &about, self.user];
        let session = self.suite.code(self.key.unwrap_or(self.password), &parts);
        let controller = self.controller.to_le_bytes();
        let parts = [&self.console_random[..], &controller, &self.controller_id];
        let known =
            code.len() == self.suite.packet_code() && self.suite.is_code(&session, &parts, code);
        known.then(|| {
            let mut encryption = [0; BLOCK];
            encryption.copy_from_slice(&self.suite.code(&session, &[&[2; 20]])[..BLOCK]);
            Keys { suite: self.suite, signing: self.suite.code(&session, &[&[1; 20]]), encryption }
        })
    }
}

/// The keys of an open session.
pub struct Keys {
    suite: Suite,
    signing: Vec<u8>,
    encryption: [u8; BLOCK],
}

impl Keys {
    pub fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        let mut code = self.suite.code(&self.signing, &[bytes]);
        code.truncate(self.suite.packet_code());
        code
    }

    pub fn is_signed(&self, bytes: &[u8], code: &[u8]) -> bool {
        code.len() == self.suite.packet_code() && self.suite.is_code(&self.signing, &[bytes], code)
    }

    pub fn code_length(&self) -> usize {
        self.suite.packet_code()
    }

    /// `message` after a random beginning, encrypted.
    pub fn encrypt(&self, random: [u8; BLOCK], message: &[u8]) -> Vec<u8> {
        let pads = (BLOCK - (message.len() + 1) % BLOCK) % BLOCK;
        let mut bytes = random.to_vec();
        bytes.extend_from_slice(message);
        bytes.extend((1..=pads).map(|pad| pad as u8));
        bytes.push(pads as u8);
        let (_, text) = bytes.split_at_mut(BLOCK);
        let length = text.len();
        cbc::Encryptor::<Aes128>::new(&self.encryption.into(), &random.into())
            .encrypt_padded_mut::<NoPadding>(text, length)
            .expect("whole blocks");
        bytes
    }

    /// The message that was encrypted, if it was.
    pub fn decrypt(&self, payload: &[u8]) -> Option<Vec<u8>> {
        let (random, text) = payload.split_at_checked(BLOCK)?;
        let random: [u8; BLOCK] = random.try_into().expect("a block");
        let mut text = text.to_vec();
        cbc::Decryptor::<Aes128>::new(&self.encryption.into(), &random.into())
            .decrypt_padded_mut::<NoPadding>(&mut text)
            .ok()?;
        let pads = usize::from(*text.last()?);
        let length = text.len().checked_sub(pads + 1).filter(|_| pads < BLOCK)?;
        text.truncate(length);
        Some(text)
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(the keys of a session)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(suite: Suite) -> Keys {
        Keys { suite, signing: vec![1; 20], encryption: [7; 16] }
    }

    #[test]
    fn what_was_encrypted_comes_out_again() {
        let keys = keys(Suite::Three);
        for length in 0..70 {
            let message = vec![3; length];
            let secret = keys.encrypt([9; 16], &message);
            assert_eq!(secret.len() % 16, 0);
            assert_eq!(keys.decrypt(&secret), Some(message));
        }
        for length in (0..16).chain([17, 31]) {
            assert_eq!(keys.decrypt(&vec![0; length]), None, "{length}");
        }
    }

    #[test]
    fn a_code_is_whole() {
        for suite in [Suite::Three, Suite::Seventeen] {
            let keys = keys(suite);
            let code = keys.sign(b"this");
            assert!(keys.is_signed(b"this", &code) && !keys.is_signed(b"that", &code));
            for length in 0..code.len() {
                assert!(!keys.is_signed(b"this", &code[..length]), "{length} bytes are too few");
            }
        }
    }
}
