//! Addresses of guests: arithmetic on the rank, the same in every cluster.
//!
//! As pcocc's users know them: guest `r` of a network has the address
//! `network + r + 1` and the MAC `prefix + (r + offset)`; the gateway, which also
//! answers DHCP and DNS, is the last usable address (`10.200.255.254` of
//! `10.200.0.0/16`) with the MAC `prefix:ff:ff:fe`.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Parses `count` bytes at most of `aa:bb:…`, at least one.
fn hex_bytes(text: &str, count: usize) -> Option<Vec<u8>> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| match part.len() {
            1 | 2 if part.bytes().all(|b| b.is_ascii_hexdigit()) => {
                u8::from_str_radix(part, 16).ok()
            }
            _ => None,
        })
        .collect();
    bytes.filter(|bytes| bytes.len() <= count)
}

impl FromStr for Mac {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        hex_bytes(text, 6)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| Error::usage(format!("`{text}` is not a MAC address")))
    }
}

/// The first one to four bytes of a network's MACs, such as `52:54:00`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MacPrefix(Vec<u8>);

impl MacPrefix {
    /// The `number`-th address under this prefix, counted from 0; `None` when
    /// the bytes that are left do not hold it.
    pub fn nth(&self, number: u32) -> Option<Mac> {
        let left = 6 - self.0.len();
        if left < 4 && number >> (8 * left) != 0 {
            return None;
        }
        let mut mac = [0; 6];
        mac[..self.0.len()].copy_from_slice(&self.0);
        for (byte, value) in mac[self.0.len()..].iter_mut().rev().zip(number.to_le_bytes()) {
            *byte = value;
        }
        Some(Mac(mac))
    }

    /// The gateway's: all bytes `ff`, but the last `fe`.
    pub fn gateway(&self) -> Mac {
        let mut mac = [0xff; 6];
        mac[..self.0.len()].copy_from_slice(&self.0);
        mac[5] = 0xfe;
        Mac(mac)
    }
}

impl Default for MacPrefix {
    fn default() -> Self {
        Self(vec![0x52, 0x54, 0x00])
    }
}

impl fmt::Display for MacPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        f.write_str(&parts.join(":"))
    }
}

impl FromStr for MacPrefix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bytes = hex_bytes(text, 4);
        let usable = bytes.filter(|bytes| bytes[0] & 1 == 0);
        usable.map(Self).ok_or_else(|| {
            Error::usage(format!(
                "`{text}` is not a prefix of one to four bytes such as `52:54:00`"
            ))
        })
    }
}

/// An IPv4 network such as `10.200.0.0/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    base: u32,
    bits: u8,
}

impl Subnet {
    /// The network of `address` with a prefix of `bits` (at most 31).
    pub fn new(address: Ipv4Addr, bits: u8) -> Option<Self> {
        let host_bits = 32_u32.checked_sub(bits.into()).filter(|left| *left >= 1)?;
        let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
        Some(Self { base: u32::from(address) & mask, bits })
    }

    pub fn network(&self) -> Ipv4Addr {
        self.base.into()
    }

    pub fn bits(&self) -> u8 {
        self.bits
    }

    pub fn netmask(&self) -> Ipv4Addr {
        u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0).into()
    }

    pub fn broadcast(&self) -> Ipv4Addr {
        (self.base | !u32::from(self.netmask())).into()
    }

    pub fn contains(&self, address: Ipv4Addr) -> bool {
        u32::from(address) & u32::from(self.netmask()) == self.base
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        let wider = if self.bits <= other.bits { self } else { other };
        wider.contains(self.network()) && wider.contains(other.network())
    }

    /// `network + number`, if it lies inside.
    pub fn nth(&self, number: u32) -> Option<Ipv4Addr> {
        let address = Ipv4Addr::from(self.base.checked_add(number)?);
        self.contains(address).then_some(address)
    }

    /// How many guests the network can hold: all but its own address, the
    /// gateway's and broadcast.
    pub fn guests(&self) -> u32 {
        (1_u64 << (32 - self.bits)).saturating_sub(3).try_into().unwrap_or(u32::MAX)
    }

    /// The address of the guest of this rank within its network.
    pub fn guest(&self, rank: u32) -> Option<Ipv4Addr> {
        (rank < self.guests()).then(|| Ipv4Addr::from(self.base + rank + 1))
    }

    /// The rank of the guest with this address.
    pub fn rank_of(&self, address: Ipv4Addr) -> Option<u32> {
        let rank = u32::from(address).checked_sub(self.base)?.checked_sub(1)?;
        (rank < self.guests()).then_some(rank)
    }

    /// The last usable address: router, DHCP and DNS server.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.broadcast()) - 1)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.bits)
    }
}

impl FromStr for Subnet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::usage(format!("`{text}` is not a network such as `10.200.0.0/16`"));
        let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        let bits = bits.parse().map_err(|_| wrong())?;
        Self::new(address, bits).ok_or_else(wrong)
    }
}

/// Implements serde through `Display` and `FromStr`.
macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
as_text!(Mac, MacPrefix, Subnet, super::prefix::Prefix64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_have_the_addresses_pcocc_gave_them() {
        let net: Subnet = "10.251.0.0/16".parse().unwrap();
        assert_eq!(net.guest(0).unwrap().to_string(), "10.251.0.1");
        assert_eq!(net.guest(255).unwrap().to_string(), "10.251.1.0");
        assert_eq!(net.gateway().to_string(), "10.251.255.254");
        assert_eq!(net.rank_of(net.guest(300).unwrap()), Some(300));
        let prefix = MacPrefix::default();
        assert_eq!(prefix.nth(258).unwrap().to_string(), "52:54:00:00:01:02");
        assert_eq!(prefix.gateway().to_string(), "52:54:00:ff:ff:fe");
    }

    #[test]
    fn a_small_network_says_how_many_guests_it_holds() {
        let net: Subnet = "192.168.7.0/30".parse().unwrap();
        assert_eq!(net.guests(), 1);
        assert_eq!(net.guest(0).unwrap().to_string(), "192.168.7.1");
        assert_eq!(net.guest(1), None);
        assert_eq!(net.gateway().to_string(), "192.168.7.2");
        assert_eq!("10.0.0.0/31".parse::<Subnet>().unwrap().guests(), 0);
    }

    #[test]
    fn text_that_is_no_address_is_refused() {
        for wrong in ["10.0.0.0", "10.0.0.0/32", "10.0.0.0/-1", "10.0.0/8", "a/8", ""] {
            assert!(wrong.parse::<Subnet>().is_err(), "{wrong}");
        }
        for wrong in ["", "52:54:00:00:00", "gg", "01", "52:+1"] {
            assert!(wrong.parse::<MacPrefix>().is_err(), "{wrong}");
        }
        assert!("52:54:00:00:00".parse::<Mac>().is_err());
    }

    #[test]
    fn overlap_is_symmetric() {
        let net = |text: &str| text.parse::<Subnet>().unwrap();
        assert!(net("10.0.0.0/8").overlaps(&net("10.200.0.0/16")));
        assert!(net("10.200.0.0/16").overlaps(&net("10.0.0.0/8")));
        assert!(!net("10.200.0.0/16").overlaps(&net("10.201.0.0/16")));
    }
}
