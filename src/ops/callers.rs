//! Whose program has connected to a port of ours, by what the kernel lists of TCP.
//!
//! A port of 127.0.0.1 is open to every user of the machine. Both ends of a connection to it
//! are in our network namespace's tables, each with its owner.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::error::{Context, Result};

/// The user whose program holds the `caller` end of a connection to `ours`, `None` if none
/// does any more.
///
/// # Errors
/// When the kernel's tables cannot be read.
pub fn owner(caller: SocketAddr, ours: SocketAddr) -> Result<Option<u32>> {
    let (caller, ours) = (plain(caller), plain(ours));
    // A program may reach an IPv4 port by a socket of IPv6.
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        let text = match fs::read_to_string(table) {
            // A kernel without IPv6.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            text => text.while_doing(|| format!("reading `{table}`"))?,
        };
        let found = text.lines().skip(1).filter_map(Entry::parse);
        let mut found = found.filter(|entry| (entry.local, entry.remote) == (caller, ours));
        if let Some(entry) = found.next() {
            return Ok(entry.owner);
        }
    }
    Ok(None)
}

fn plain(address: SocketAddr) -> SocketAddr {
    (address.ip().to_canonical(), address.port()).into()
}

/// One end of a connection.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    local: SocketAddr,
    remote: SocketAddr,
    /// One that its program has closed is listed as root's, and is nobody's.
    owner: Option<u32>,
}

impl Entry {
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (uid, inode): (u32, u64) = (fields.get(7)?.parse().ok()?, fields.get(9)?.parse().ok()?);
        Some(Self {
            local: address(fields.get(1)?)?,
            remote: address(fields.get(2)?)?,
            owner: (inode != 0).then_some(uid),
        })
    }
}

/// `0100007F:1F90`: words in the order of this machine's bytes, the port as people write it.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            Ipv6Addr::from(<[u8; 16]>::try_from(words.concat()).ok()?).into()
        }
        _ => return None,
    };
    Some(plain((ip, u16::from_str_radix(port, 16).ok()?).into()))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_live_connection_has_its_owner_and_a_closed_one_nobody() {
        let us = nix::unistd::geteuid().as_raw();
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(any) else { continue };
            let ours = listener.local_addr().unwrap();
            let stream = TcpStream::connect(ours).unwrap();
            let (_accepted, caller) = listener.accept().unwrap();
            assert_eq!(owner(caller, ours).unwrap(), Some(us), "{any}");
            // The other end is not the caller's.
            assert_eq!(owner(ours, ours).unwrap(), None);
            drop(stream);
            assert_eq!(owner(caller, ours).unwrap(), None, "{any}");
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn both_forms_of_an_ipv4_address_are_the_same() {
        let expected = Some("127.0.0.1:8080".parse().unwrap());
        assert_eq!(address("0100007F:1F90"), expected);
        assert_eq!(address("0000000000000000FFFF00000100007F:1F90"), expected);
        assert_eq!(address("00000000:1F90:1"), None);
        assert_eq!(address("é100007F:1F90"), None);
    }
}
