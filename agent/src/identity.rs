//! Who a guest is to be that goes on from the memory of another.

use super::Malformed;
use super::message::{Fields, fields, number, small};

/// The longest that is taken, in bytes.
pub const MAX_IDENTITY: usize = 64 << 10;

/// What makes a guest the one that it is and no other.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Identity {
    pub hostname: String,
    pub domain: Option<String>,
    /// 32 hexadecimal digits.
    pub machine_id: String,
    /// In the order in which the guest has them.
    pub interfaces: Vec<Interface>,
    /// Words of network configuration, and what they become: addresses.
    pub words: Vec<(String, String)>,
    /// Who may log in: keys that the other had, and what they become.
    pub keys: Vec<(String, String)>,
    /// The ssh server's key, as OpenSSH writes it: private and public.
    pub host_key: (String, String),
    /// The same as dropbear writes it.
    pub dropbear_key: Vec<u8>,
    /// What nobody else knows, for the guest's random numbers.
    pub entropy: Vec<u8>,
    /// The time: nanoseconds since the epoch.
    pub now: u64,
}

/// An interface that changes its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// As the other had it.
    pub former: [u8; 6],
    pub mac: [u8; 6],
    pub mtu: u16,
}

/// It is full of secrets.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.hostname)
    }
}

const HOSTNAME: u8 = 1;
const DOMAIN: u8 = 2;
const MACHINE_ID: u8 = 3;
const INTERFACE: u8 = 4;
const WORD: u8 = 5;
const KEY: u8 = 6;
const PRIVATE_KEY: u8 = 7;
const PUBLIC_KEY: u8 = 8;
const DROPBEAR_KEY: u8 = 9;
const ENTROPY: u8 = 10;
const NOW: u8 = 11;

impl Identity {
    pub fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.put(HOSTNAME, &self.hostname).put(MACHINE_ID, &self.machine_id);
        if let Some(domain) = &self.domain {
            fields.put(DOMAIN, domain);
        }
        for interface in &self.interfaces {
            fields.put(INTERFACE, interface.encode());
        }
        for (tag, pairs) in [(WORD, &self.words), (KEY, &self.keys)] {
            for (from, to) in pairs {
                let mut pair = Fields::default();
                pair.put(1, from).put(2, to);
                fields.put(tag, pair.into_bytes());
            }
        }
        fields.put(PRIVATE_KEY, &self.host_key.0).put(PUBLIC_KEY, &self.host_key.1);
        fields.put(DROPBEAR_KEY, &self.dropbear_key).put(ENTROPY, &self.entropy);
        fields.number(NOW, self.now);
        fields.into_bytes()
    }

    /// # Errors
    /// When it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut identity = Self::default();
        for (tag, value) in fields(bytes)? {
            match tag {
                HOSTNAME => identity.hostname = string(value)?,
                DOMAIN => identity.domain = Some(string(value)?),
                MACHINE_ID => identity.machine_id = string(value)?,
                INTERFACE => identity.interfaces.push(Interface::decode(value)?),
                WORD => identity.words.push(pair(value)?),
                KEY => identity.keys.push(pair(value)?),
                PRIVATE_KEY => identity.host_key.0 = string(value)?,
                PUBLIC_KEY => identity.host_key.1 = string(value)?,
                DROPBEAR_KEY => identity.dropbear_key = value.to_vec(),
                ENTROPY => identity.entropy = value.to_vec(),
                NOW => identity.now = number(value)?,
                _ => {}
            }
        }
        if identity.hostname.is_empty() {
            return Err(Malformed("an identity without a name".into()));
        }
        Ok(identity)
    }
}

impl Interface {
    fn encode(&self) -> Vec<u8> {
        let mut fields = Fields::default();
        fields.put(1, self.former).put(2, self.mac).number(3, self.mtu.into());
        fields.into_bytes()
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mac =
            |value: &[u8]| value.try_into().map_err(|_| Malformed("a MAC address is none".into()));
        let mut interface = Self::default();
        for (tag, value) in fields(bytes)? {
            match tag {
                1 => interface.former = mac(value)?,
                2 => interface.mac = mac(value)?,
                3 => interface.mtu = small(value)?,
                _ => {}
            }
        }
        Ok(interface)
    }
}

fn string(bytes: &[u8]) -> Result<String, Malformed> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Malformed("a text is none".into()))
}

fn pair(bytes: &[u8]) -> Result<(String, String), Malformed> {
    match &*fields(bytes)? {
        [(1, from), (2, to)] if !from.is_empty() => Ok((string(from)?, string(to)?)),
        _ => Err(Malformed("a pair is none".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_arrives_as_it_was_sent() {
        let pair = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        let identity = Identity {
            hostname: "vm3".into(),
            domain: Some("pavo.internal".into()),
            machine_id: "0af0".repeat(8),
            interfaces: vec![Interface { former: [0; 6], mac: [2, 0, 0, 0, 0, 1], mtu: 1450 }],
            words: vec![pair("52:54:00:00:00:01", "52:54:00:00:00:04"), pair("a", "")],
            keys: vec![pair("ssh-ed25519 AAAA", "ssh-ed25519 BBBB")],
            host_key: pair("-----BEGIN\n", "ssh-ed25519 CCCC"),
            dropbear_key: vec![0, 255],
            entropy: vec![7; 64],
            now: u64::MAX,
        };
        let bytes = identity.encode();
        assert_eq!(Identity::decode(&bytes).unwrap(), identity);
        assert!(!format!("{identity:?}").contains("BEGIN"));
        // One that is cut off is none, or another's.
        let wrong = |end: usize| Identity::decode(&bytes[..end]).is_ok_and(|it| it == identity);
        assert!((0..bytes.len()).all(|end| !wrong(end)));
        Identity::decode(&[]).unwrap_err();
        for (tag, value) in [(INTERFACE, &b"\x01\x05\0\0\0abcde"[..]), (KEY, b""), (NOW, b"1")] {
            let mut fields = Fields::default();
            fields.put(HOSTNAME, "vm0").put(tag, value);
            Identity::decode(&fields.into_bytes()).unwrap_err();
        }
    }
}
