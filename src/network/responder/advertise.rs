//! Router advertisements (RFC 4861): how guests learn that their addresses come by DHCPv6.
//!
//! A solicitation from a guest's address is answered at once, to that; others, where everybody
//! hears it, now and then (RFC 4861, 6.2.6). Nothing is said unasked: what is said never
//! expires. The prefix is on the link, and nobody makes an address of it (no A
//! flag); the router is one to nowhere (a lifetime of 0).

use std::collections::HashSet;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep_until};

use super::Spec;
use crate::error::Error;
use crate::model::prefix::{Prefix64, link_local};

pub const SOLICITATION: u8 = 133;
const ADVERTISEMENT: u8 = 134;
/// Between two that all guests hear (RFC 4861, 10).
const PAUSE: Duration = Duration::from_secs(3);
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
pub const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// What is always said. The kernel fills the checksum in.
///
/// `None` where the network has no IPv6.
pub fn advertisement(spec: &Spec) -> Option<Vec<u8>> {
    let ipv6 = spec.ipv6?;
    const HOPS: u8 = 64;
    const MANAGED: u8 = 0x80;
    let mut packet = vec![ADVERTISEMENT, 0, 0, 0, HOPS, MANAGED];
    // Lifetime of the router; then how long neighbours are reachable, and when they are asked
    // again: as the guest likes.
    packet.extend([0; 2 + 4 + 4]);
    // Our MAC.
    packet.extend([1, 1]);
    packet.extend(ipv6.gateway_mac.0);
    // MTU.
    packet.extend([5, 1, 0, 0]);
    packet.extend(u32::from(spec.mtu).to_be_bytes());
    // The prefix, with its two lifetimes.
    const ON_LINK: u8 = 0x80;
    packet.extend([3, 4, Prefix64::BITS, ON_LINK]);
    packet.extend([0xff; 8]);
    packet.extend([0; 4]);
    packet.extend(ipv6.prefix.network().octets());
    Some(packet)
}

/// Whether it is a solicitation as it must be (RFC 4861, 6.1.1); the hop limit has been looked
/// at.
pub fn is_solicitation(packet: &[u8]) -> bool {
    let [SOLICITATION, 0, _, _, _, _, _, _, options @ ..] = packet else { return false };
    let mut options = options;
    while let [_, words, ..] = options {
        let Some((_, rest)) = options.split_at_checked(usize::from(*words) * 8) else {
            return false;
        };
        if *words == 0 {
            return false;
        }
        options = rest;
    }
    options.is_empty()
}

/// Who is answered alone: those of whom the kernel knows the MACs for good. Each other address
/// would be one more entry in its table of neighbours, and the guests choose these.
pub fn known(spec: &Spec) -> HashSet<Ipv6Addr> {
    spec.guests.iter().flat_map(|it| [Some(link_local(it.mac)), it.address6]).flatten().collect()
}

/// Answers guests for ever; returns what broke the socket.
pub async fn serve(advertisement: Vec<u8>, known: HashSet<Ipv6Addr>, socket: UdpSocket) -> Error {
    let mut packet = [0; 1500];
    // When all may hear the next, and whether somebody waits for it.
    let (mut next, mut waiting) = (Instant::now(), false);
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut packet) => Some(received),
            () = sleep_until(next), if waiting => None,
        };
        let from = match received {
            None => None,
            Some(Ok((length, SocketAddr::V6(from)))) if is_solicitation(&packet[..length]) => {
                Some(from)
            }
            Some(Ok(_)) => continue,
            Some(Err(error)) => {
                return Error::system("receiving router solicitations").because(error);
            }
        };
        let to = match from.filter(|from| known.contains(from.ip())) {
            Some(from) => SocketAddrV6::new(*from.ip(), 0, 0, from.scope_id()),
            None if from.is_none() || Instant::now() >= next => {
                (next, waiting) = (Instant::now() + PAUSE, false);
                // By the one interface that the socket has.
                SocketAddrV6::new(ALL_NODES, 0, 0, 0)
            }
            None => {
                waiting = true;
                continue;
            }
        };
        // Lost like any packet; the guest asks again.
        drop(socket.send_to(&advertisement, to).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::responder::tests::spec;

    #[test]
    fn the_prefix_is_there_and_no_address_to_be_made_of_it() {
        let packet = advertisement(&spec()).unwrap();
        assert_eq!(packet[..8], [134, 0, 0, 0, 64, 0x80, 0, 0], "managed, and no router");
        let options: Vec<&[u8]> = vec![&packet[16..24], &packet[24..32], &packet[32..]];
        assert_eq!(options[0], [1, 1, 0x52, 0x54, 0, 0xff, 0xff, 0xfe]);
        assert_eq!(options[1], [5, 1, 0, 0, 0, 0, 5, 0xaa], "1450");
        assert_eq!(options[2][..4], [3, 4, 64, 0x80], "on the link, not autonomous");
        assert_eq!(options[2][16..], "fd12:3456:789a:1::".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(advertisement(&Spec { ipv6: None, ..spec() }), None);
    }

    #[test]
    fn only_addresses_that_guests_were_given_are_answered_alone() {
        let known = known(&spec());
        let vm = |text: &str| text.parse::<Ipv6Addr>().unwrap();
        for address in ["fe80::5054:ff:fe00:0", "fe80::5054:ff:fe00:1", "fd12:3456:789a:1::2"] {
            assert!(known.contains(&vm(address)), "{address}");
        }
        // Not those of guests on other hosts, either.
        assert_eq!(known.len(), 4);
    }

    #[test]
    fn what_is_no_solicitation_is_not_answered() {
        let bare = [133, 0, 9, 9, 0, 0, 0, 0];
        let with = |options: &[u8]| is_solicitation(&[&bare[..], options].concat());
        assert!(with(&[]) && with(&[1, 1, 2, 3, 4, 5, 6, 7]));
        for options in
            [&[0][..], &[1, 0, 0, 0, 0, 0, 0, 0], &[1, 1, 2, 3], &[1, 2, 0, 0, 0, 0, 0, 0]]
        {
            assert!(!with(options), "{options:?}");
        }
        assert!(!is_solicitation(&bare[..7]) && !is_solicitation(&[]));
        assert!(!is_solicitation(&[134, 0, 9, 9, 0, 0, 0, 0]));
        assert!(!is_solicitation(&[133, 1, 9, 9, 0, 0, 0, 0]));
    }
}
