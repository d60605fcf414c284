//! What a link leaves to hardware, by ethtool's ioctl.
//!
//! Kernels hand frames with half a checksum, and larger than any wire takes, to links that
//! promise to finish them. A switch outside of the kernel sees them as they are.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use nix::libc;

use super::step::Outcome;
use crate::error::{Context, Error, Result};

nix::ioctl_readwrite_bad!(ethtool, SIOCETHTOOL, libc::ifreq);

const SIOCETHTOOL: libc::c_ulong = 0x8946;

/// Commands of `linux/ethtool.h`: to read and to write transmit checksums, segmentation of
/// TCP by the link and in general.
const FEATURES: [(u32, u32); 3] = [(0x16, 0x17), (0x1e, 0x1f), (0x23, 0x24)];

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

/// Lets a link of this thread's namespace send nothing that somebody else would have to
/// finish.
pub fn switch_off(link: &str) -> Result<Outcome> {
    let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("0.0.0.0:0"));
    let socket = socket.while_doing(|| "opening a socket".into())?;
    let mut outcome = Outcome::AlreadySo;
    for (get, set) in FEATURES {
        let ask = |command| {
            request(&socket, link, command)
                .while_doing(|| format!("setting the offloads of `{link}`"))
        };
        if ask(get)? != 0 {
            ask(set)?;
            outcome = Outcome::Changed;
        }
    }
    Ok(outcome)
}

/// Asks with the value 0, and returns what the kernel put there.
fn request(socket: &UdpSocket, link: &str, command: u32) -> Result<u32> {
    let mut value = EthtoolValue { command, value: 0 };
    #[expect(unsafe_code)]
    // SAFETY: `ifreq` is plain bytes, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if link.len() >= request.ifr_name.len() {
        return Err(Error::system(format!("no link is called `{link}`")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(link.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    #[expect(unsafe_code)]
    // SAFETY: these commands read and write one `ethtool_value`, which, like the `ifreq` that
    // points to it, lives across the call.
    let answer = unsafe { ethtool(socket.as_raw_fd(), &raw mut request) };
    answer.while_doing(|| "asking the kernel".into())?;
    Ok(value.value)
}
