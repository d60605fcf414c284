//! IPv6 networks of guests: one /64 each, addresses by rank as with IPv4.
//!
//! Guest `r` has the address `prefix::(r + 1)`, its gateway `prefix::ffff:fffe`. Link-local
//! addresses are those that follow from the MAC (RFC 4291, appendix A).

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use super::address::Mac;
use super::owner::Owner;
use crate::error::{Error, Result};

/// The gateway, in each network: the last but one of 32 bits, as in an IPv4 network.
const GATEWAY: u64 = 0xffff_fffe;

/// An IPv6 network of 2^64 addresses, such as `fd12:3456:789a:1::/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix64(u64);

impl Prefix64 {
    /// The length of all of them.
    pub const BITS: u8 = 64;

    /// The network of a job's `index`-th: local (RFC 4193), the same on all hosts of the job,
    /// and of another job most probably another. 40 bits are of the job, 16 of the network.
    pub fn of_job(owner: Owner, index: u32) -> Self {
        let digest = Sha256::digest(format!("int-network6 {owner}"));
        let global = digest.iter().take(5).fold(0xfd, |bits, byte| bits << 8 | u64::from(*byte));
        Self(global << 16 | u64::from(index & 0xffff))
    }

    pub fn network(&self) -> Ipv6Addr {
        self.address(0)
    }

    /// The address of the guest of this rank.
    pub fn guest(&self, rank: u32) -> Option<Ipv6Addr> {
        let number = u64::from(rank) + 1;
        (number < GATEWAY).then(|| self.address(number))
    }

    pub fn gateway(&self) -> Ipv6Addr {
        self.address(GATEWAY)
    }

    pub fn contains(&self, address: Ipv6Addr) -> bool {
        u128::from(address) >> 64 == u128::from(self.0)
    }

    fn address(&self, number: u64) -> Ipv6Addr {
        Ipv6Addr::from(u128::from(self.0) << 64 | u128::from(number))
    }
}

/// The address that a link with this MAC gives itself.
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let Mac([a, b, c, d, e, f]) = mac;
    let words = [[a ^ 2, b], [c, 0xff], [0xfe, d], [e, f]].map(u16::from_be_bytes);
    Ipv6Addr::new(0xfe80, 0, 0, 0, words[0], words[1], words[2], words[3])
}

impl fmt::Display for Prefix64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), Self::BITS)
    }
}

impl FromStr for Prefix64 {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::usage(format!("`{text}` is not an IPv6 network such as `fd12:3456:789a:1::/64`"))
        };
        let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv6Addr = address.parse().map_err(|_| wrong())?;
        let bits: u8 = bits.parse().ok().filter(|bits| *bits <= 128).ok_or_else(wrong)?;
        if bits != Self::BITS {
            return Err(Error::usage(format!(
                "`{text}` is not a /64, which a network of guests is"
            )));
        }
        let prefix = Self((u128::from(address) >> 64) as u64);
        if prefix.network() != address {
            return Err(Error::usage(format!("`{text}` is an address in the network `{prefix}`")));
        }
        // RFC 4291: the first 8 bits 0 are for special use, and for IPv4 in disguise.
        let special = address.octets()[0] == 0;
        if special || address.is_multicast() || address.is_unicast_link_local() {
            return Err(Error::usage(format!(
                "`{text}` holds no addresses that guests could have"
            )));
        }
        Ok(prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::owner::Manager;

    #[test]
    fn a_rank_is_an_address_and_the_gateway_is_none_of_them() {
        let prefix: Prefix64 = "fd12:3456:789a:1::/64".parse().unwrap();
        assert_eq!(prefix.to_string(), "fd12:3456:789a:1::/64");
        assert_eq!(prefix.guest(0).unwrap().to_string(), "fd12:3456:789a:1::1");
        assert_eq!(prefix.guest(255).unwrap().to_string(), "fd12:3456:789a:1::100");
        assert_eq!(prefix.gateway().to_string(), "fd12:3456:789a:1::ffff:fffe");
        assert_eq!(prefix.guest(0xffff_fffd), None);
        assert!(prefix.contains(prefix.gateway()));
        assert!(!prefix.contains("fd12:3456:789a:2::1".parse().unwrap()));
    }

    #[test]
    fn each_job_and_each_of_its_networks_has_a_local_prefix_of_its_own() {
        let owner = |job| Owner { manager: Manager::Slurm, job };
        let all = [
            Prefix64::of_job(owner(3), 0),
            Prefix64::of_job(owner(3), 1),
            Prefix64::of_job(owner(4), 0),
            Prefix64::of_job(Owner::local(3), 0),
        ];
        assert_eq!(all[0], Prefix64::of_job(owner(3), 0));
        for (index, prefix) in all.iter().enumerate() {
            assert_eq!(prefix.network().octets()[0], 0xfd, "{prefix}");
            assert!(!all[..index].contains(prefix), "{prefix}");
            assert_eq!(prefix.to_string().parse::<Prefix64>().unwrap(), *prefix);
        }
    }

    #[test]
    fn text_that_is_no_network_of_guests_is_refused_with_the_reason() {
        for (wrong, why) in [
            ("", "is not an IPv6 network"),
            ("fd00::", "is not an IPv6 network"),
            ("10.0.0.0/8", "is not an IPv6 network"),
            ("fd00::/+64x", "is not an IPv6 network"),
            ("fd00::/129", "is not an IPv6 network"),
            ("fd00::/48", "is not a /64"),
            ("fd00::/128", "is not a /64"),
            ("fd00::1/64", "is an address in the network `fd00::/64`"),
            ("fe80::/64", "holds no addresses"),
            ("ff02::/64", "holds no addresses"),
            ("::/64", "holds no addresses"),
        ] {
            let error = wrong.parse::<Prefix64>().unwrap_err().to_string();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_link_local_address_follows_from_the_mac() {
        let mac = "52:54:00:ff:ff:fe".parse().unwrap();
        assert_eq!(link_local(mac).to_string(), "fe80::5054:ff:feff:fffe");
    }
}
