//! The responder's sockets: those it inherits, and those it makes in the namespace.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, UnixAddr,
    bind, getsockname, getsockopt, listen, setsockopt, socket, sockopt,
};
use tokio::net::{TcpListener, UdpSocket, UnixListener};

use super::advertise::{ALL_ROUTERS, SOLICITATION};
use super::dhcp6;
use super::dial::Dial;
use super::publish::Port;
use super::{Published, Spec};
use crate::error::{Context, Error, Result};

const DHCP_PORT: u16 = 67;
const DNS_PORT: u16 = 53;
const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);

/// Moves this thread, and the sockets it makes from now on, into a network namespace.
pub fn enter(namespace: &Path) -> Result<()> {
    let doing = || format!("entering the network namespace `{}`", namespace.display());
    let file = File::open(namespace).while_doing(doing)?;
    setns(&file, CloneFlags::CLONE_NEWNET).while_doing(doing)
}

/// Takes the sockets that our parent made elsewhere: those connected to name servers,
/// and the listeners of published ports. Call it before anything else opens descriptors.
pub fn inherited(spec: &Spec) -> Result<(Vec<UdpSocket>, Vec<Port>)> {
    let listeners = spec.publish.iter().map(|published| &published.listener);
    let mut named = BTreeSet::new();
    if let Some(twice) = spec.upstream.iter().chain(listeners).find(|fd| !named.insert(**fd)) {
        return Err(Error::bug(format!("descriptor {twice} was named twice")));
    }
    let upstream = spec.upstream.iter().map(|fd| upstream(*fd)).collect::<Result<_>>()?;
    let ports = spec.publish.iter().map(published).collect::<Result<_>>()?;
    Ok((upstream, ports))
}

fn upstream(number: RawFd) -> Result<UdpSocket> {
    let doing = || format!("taking descriptor {number} as a socket to a name server");
    let socket = std::net::UdpSocket::from(adopt(number, SockType::Datagram)?);
    socket.peer_addr().while_doing(doing)?;
    socket.set_nonblocking(true).while_doing(doing)?;
    UdpSocket::from_std(socket).while_doing(doing)
}

fn published(published: &Published) -> Result<Port> {
    let number = published.listener;
    let doing = || format!("taking descriptor {number} as a published port");
    let listener = std::net::TcpListener::from(adopt(number, SockType::Stream)?);
    if !getsockopt(&listener, sockopt::AcceptConn).while_doing(doing)? {
        return Err(Error::bug(format!("descriptor {number} does not listen")));
    }
    listener.set_nonblocking(true).while_doing(doing)?;
    let listener = TcpListener::from_std(listener).while_doing(doing)?;
    Ok(Port::new(listener, SocketAddrV4::new(published.address, published.port)))
}

/// Takes the socket at which connections to guests are asked for. Call it where
/// [`inherited`] is called.
pub fn dial(spec: &Spec) -> Result<Option<Dial>> {
    let Some(number) = spec.dial else { return Ok(None) };
    let doing = || format!("taking descriptor {number} as the socket for connections to guests");
    let listener = std::os::unix::net::UnixListener::from(adopt_listener(number)?);
    listener.set_nonblocking(true).while_doing(doing)?;
    let listener = UnixListener::from_std(listener).while_doing(doing)?;
    Ok(Some(Dial::new(listener, spec.guests.iter().map(|guest| guest.address))))
}

/// Makes ours the Unix socket that our parent left open under this number.
fn adopt_listener(number: RawFd) -> Result<OwnedFd> {
    let wrong = || Error::bug(format!("descriptor {number} is not the socket it was said to be"));
    if number <= 2 {
        return Err(wrong());
    }
    #[expect(unsafe_code)]
    // SAFETY: our parent made this descriptor for us and named it once; no Unix socket of
    // this process's own listens, so the check below hands back what is not meant.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    let is_unix = getsockname::<UnixAddr>(number).is_ok();
    if is_unix && getsockopt(&owned, sockopt::AcceptConn) == Ok(true) {
        return Ok(owned);
    }
    let _not_ours = owned.into_raw_fd();
    Err(wrong())
}

/// Makes ours the descriptor that our parent left open under this number.
fn adopt(number: RawFd, kind: SockType) -> Result<OwnedFd> {
    let wrong = || Error::bug(format!("descriptor {number} is not the socket it was said to be"));
    // 0 is the life line; 1 and 2 are the standard library's.
    if number <= 2 {
        return Err(wrong());
    }
    #[expect(unsafe_code)]
    // SAFETY: our parent made this descriptor for us and named it once; what this
    // process itself has open by now (the event loop, the life line) is no IPv4 socket,
    // so the check below hands it back.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    let is_inet = getsockname::<SockaddrIn>(number).is_ok();
    if is_inet && getsockopt(&owned, sockopt::SockType) == Ok(kind) {
        return Ok(owned);
    }
    let _not_ours = owned.into_raw_fd();
    Err(wrong())
}

/// The DHCP server's socket: on one interface, and allowed to broadcast there.
pub fn dhcp(spec: &Spec) -> Result<UdpSocket> {
    let doing = || format!("listening for DHCP on `{}`", spec.interface);
    let socket = bound(spec, SockType::Datagram, Ipv4Addr::UNSPECIFIED, DHCP_PORT);
    let socket = socket.while_doing(doing)?;
    setsockopt(&socket, sockopt::Broadcast, &true).while_doing(doing)?;
    UdpSocket::from_std(socket.into()).while_doing(doing)
}

/// The DHCPv6 server's socket: on one interface, as a server of that link.
pub fn dhcp6(spec: &Spec) -> Result<UdpSocket> {
    const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
    let open = || {
        let socket = socket(AddressFamily::Inet6, SockType::Datagram, FLAGS, None)?;
        setsockopt(&socket, sockopt::BindToDevice, &spec.interface.clone().into())?;
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
        let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, dhcp6::SERVER, 0, 0);
        bind(socket.as_raw_fd(), &SockaddrIn6::from(any))?;
        Ok(socket)
    };
    let doing = || format!("listening for DHCPv6 on `{}`", spec.interface);
    join(spec, open().map_err(nix_error), SERVERS).while_doing(doing)
}

/// Where router solicitations come in, and advertisements go out.
pub fn solicitations(spec: &Spec) -> Result<UdpSocket> {
    let open = || {
        let protocol = Some(SockProtocol::IcmpV6);
        let socket = socket(AddressFamily::Inet6, SockType::Raw, FLAGS, protocol)?;
        only(&socket, SOLICITATION)?;
        setsockopt(&socket, sockopt::BindToDevice, &spec.interface.clone().into())?;
        // They are believed only if no router has passed them on.
        setsockopt(&socket, sockopt::Ipv6Ttl, &255)?;
        setsockopt(&socket, sockopt::Ipv6MulticastHops, &255)?;
        Ok(socket)
    };
    let doing = || format!("listening for router solicitations on `{}`", spec.interface);
    join(spec, open().map_err(nix_error), ALL_ROUTERS).while_doing(doing)
}

/// Keeps every ICMPv6 message but those of this type from taking room at a raw socket.
fn only(socket: &OwnedFd, kind: u8) -> nix::Result<()> {
    /// Of `linux/icmpv6.h`, as is the filter: a bit for each type that does not pass.
    const ICMPV6_FILTER: libc::c_int = 1;
    let mut filter = [u32::MAX; 8];
    filter[usize::from(kind / 32)] &= !(1 << (kind % 32));
    #[expect(unsafe_code)]
    // SAFETY: the kernel reads so many bytes of `filter`, which outlives the call.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_ICMPV6,
            ICMPV6_FILTER,
            filter.as_ptr().cast(),
            size_of_val(&filter) as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(answer).map(drop)
}

fn nix_error(error: nix::Error) -> Error {
    Error::system(error.desc())
}

/// Hears what is said to a group, on the guests' interface. The standard library's name for a
/// socket of datagrams does for one of raw packets, too: each is read and written whole.
fn join(spec: &Spec, socket: Result<OwnedFd>, group: Ipv6Addr) -> Result<UdpSocket> {
    let doing = || format!("joining the group {group}");
    let socket = std::net::UdpSocket::from(socket?);
    let index = if_nametoindex(spec.interface.as_str()).while_doing(doing)?;
    socket.join_multicast_v6(&group, index).while_doing(doing)?;
    UdpSocket::from_std(socket).while_doing(doing)
}

/// Where guests ask for names.
pub fn dns_datagram(spec: &Spec) -> Result<UdpSocket> {
    let doing =
        || format!("listening for DNS on {}:{DNS_PORT}/udp of `{}`", spec.gateway, spec.interface);
    let socket = bound(spec, SockType::Datagram, spec.gateway, DNS_PORT).while_doing(doing)?;
    UdpSocket::from_std(socket.into()).while_doing(doing)
}

/// Where guests ask again what did not fit into a datagram.
pub fn dns_stream(spec: &Spec) -> Result<TcpListener> {
    let doing =
        || format!("listening for DNS on {}:{DNS_PORT}/tcp of `{}`", spec.gateway, spec.interface);
    let socket = bound(spec, SockType::Stream, spec.gateway, DNS_PORT).while_doing(doing)?;
    listen(&socket, Backlog::new(64).expect("a small backlog")).while_doing(doing)?;
    TcpListener::from_std(socket.into()).while_doing(doing)
}

/// A socket that only sees the guests' interface.
fn bound(spec: &Spec, kind: SockType, address: Ipv4Addr, port: u16) -> nix::Result<OwnedFd> {
    let socket = socket(AddressFamily::Inet, kind, FLAGS, None)?;
    setsockopt(&socket, sockopt::BindToDevice, &spec.interface.clone().into())?;
    if kind == SockType::Stream {
        // Connections of a responder that was replaced linger in TIME_WAIT.
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(address, port)))?;
    Ok(socket)
}
