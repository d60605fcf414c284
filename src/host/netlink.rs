//! Links, addresses, routes and neighbours, by rtnetlink.
//!
//! Requests of a batch are sent before the first answer is read. Single links are
//! asked for by name, never all of them: what others made need not be understood.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use futures_util::TryStreamExt;
use futures_util::future::{join_all, try_join_all};
use nix::libc;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::sys::Socket;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::{AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};

use super::crash;
use super::netns;
use super::step::Outcome;
use crate::error::{Context, Error, Result};
use crate::model::address::Mac;

/// How long the kernel may take for one batch. Others may hold its lock on links
/// while they delete thousands.
const LIMIT: Duration = Duration::from_secs(30);

/// Requests under way at once. Their answers must fit the socket's buffer, for the
/// kernel drops those that do not.
pub(super) const BATCH: usize = 64;

/// The kernel's words for: no such link, route, address, neighbour.
const ABSENT: [i32; 4] = [libc::ENODEV, libc::ESRCH, libc::EADDRNOTAVAIL, libc::ENOENT];

/// A netlink socket of one network namespace.
#[derive(Debug)]
pub struct Netlink {
    pub(super) handle: rtnetlink::Handle,
    connection: tokio::task::JoinHandle<()>,
}

/// What we need to know of a link that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    pub index: u32,
    pub group: u32,
    pub is_up: bool,
}

/// What a link of ours shall be like; all of it is set at once.
#[derive(Clone, Debug)]
pub struct LinkSettings<'a> {
    pub name: &'a str,
    pub mtu: u16,
    pub group: u32,
    /// `ifalias`, for people.
    pub alias: &'a str,
    /// The index of the bridge it is a port of.
    pub bridge: Option<u32>,
}

/// The end of a veth pair that lies in another namespace.
#[derive(Clone, Debug)]
pub struct VethPeer<'a> {
    pub name: &'a str,
    /// The namespace's file.
    pub namespace: &'a Path,
    pub mac: Option<Mac>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// Opens a socket in the namespace with this file, or the caller's own.
    pub fn open(namespace: Option<&Path>) -> Result<Self> {
        let opened = match namespace {
            Some(path) => netns::with_netns(path, rtnetlink::new_connection)?,
            None => rtnetlink::new_connection(),
        };
        let (connection, handle, _) = opened.while_doing(|| "opening a netlink socket".into())?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// The link of this name, if there is one.
    pub async fn link(&self, name: &str) -> Result<Option<LinkState>> {
        let mut found = self
            .handle
            .link()
            .get()
            .match_name(name)
            .set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats])
            .execute();
        let answer = in_time(found.try_next()).await;
        let message = match answer {
            // ERANGE: no link can have this name.
            Err(error) if is(&error, &[libc::ENODEV, libc::ERANGE]) => None,
            other => other.while_doing(|| format!("looking for link `{name}`"))?,
        };
        Ok(message.map(|message| LinkState {
            index: message.header.index,
            group: message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::Group(group) => Some(*group),
                    _ => None,
                })
                .unwrap_or(0),
            is_up: message.header.flags.contains(LinkFlags::Up),
        }))
    }

    /// The link of this name.
    pub async fn require_link(&self, name: &str) -> Result<LinkState> {
        let link = self.link(name).await?;
        link.ok_or_else(|| Error::system(format!("there is no link `{name}`")))
    }

    /// A link of this name that belongs to `group`, if there is one.
    ///
    /// # Errors
    /// When a link has this name but is not of the group: it is somebody else's.
    pub async fn own_link(&self, name: &str, group: u32) -> Result<Option<LinkState>> {
        match self.link(name).await? {
            Some(link) if link.group != group => {
                Err(Error::system(format!("a link `{name}` exists and is not of this job"))
                    .help(format!("look at it with `ip -d link show {name}`")))
            }
            other => Ok(other),
        }
    }

    /// Makes a bridge without spanning tree or multicast snooping, unless it exists. The host
    /// has no part in what is said by IPv6 behind it ([`silence`]).
    pub async fn ensure_bridge(
        &self,
        settings: &LinkSettings<'_>,
        mac: Option<Mac>,
    ) -> Result<Outcome> {
        let options = vec![
            InfoBridge::StpState(BridgeStpState::Disabled),
            InfoBridge::MulticastSnooping(false),
        ];
        let mut message = new_link(settings, InfoKind::Bridge, InfoData::Bridge(options));
        message.attributes.extend(mac.map(|Mac(bytes)| LinkAttribute::Address(bytes.to_vec())));
        self.ensure_link(message, settings, true).await
    }

    /// Makes a pair of links, one end here and one in another namespace, both up,
    /// unless it exists. One that is a bridge's port is [silent](silence) here, too.
    pub async fn ensure_veth(
        &self,
        settings: &LinkSettings<'_>,
        peer: &VethPeer<'_>,
    ) -> Result<Outcome> {
        let namespace = std::fs::File::open(peer.namespace)
            .while_doing(|| format!("opening `{}`", peer.namespace.display()))?;
        let mut other = LinkMessageBuilder::<LinkUnspec>::new()
            .name(peer.name)
            .mtu(settings.mtu.into())
            .setns_by_fd(std::os::fd::AsRawFd::as_raw_fd(&namespace));
        if let Some(Mac(bytes)) = peer.mac {
            other = other.address(bytes.to_vec());
        }
        let data = InfoData::Veth(InfoVeth::Peer(other.build()));
        let message = new_link(settings, InfoKind::Veth, data);
        let outcome = self.ensure_link(message, settings, settings.bridge.is_some()).await?;
        // It cannot be born up: an end is not connected before both exist.
        Self::open(Some(peer.namespace))?.set_up(peer.name, true).await?;
        Ok(outcome)
    }

    async fn ensure_link(
        &self,
        message: LinkMessage,
        settings: &LinkSettings<'_>,
        silent: bool,
    ) -> Result<Outcome> {
        let outcome = self.make_link(message, settings).await?;
        crash::point("link.made")?;
        if silent {
            silence(settings.name)?;
        }
        self.configure(std::slice::from_ref(settings)).await?;
        Ok(outcome)
    }

    /// Makes a link, unless it exists and is ours.
    pub(super) async fn make_link(
        &self,
        message: LinkMessage,
        settings: &LinkSettings<'_>,
    ) -> Result<Outcome> {
        match in_time(self.handle.link().add(message).execute()).await {
            Ok(()) => Ok(Outcome::Changed),
            Err(error) if is(&error, &[libc::EEXIST]) => {
                match self.own_link(settings.name, settings.group).await? {
                    Some(_) => Ok(Outcome::AlreadySo),
                    // Not its name is taken: only a VXLAN key can be, too.
                    None => Err(Error::system("another link has this VXLAN key")
                        .help("look for it with `ip -d link show type vxlan`")),
                }
            }
            Err(error) => Err(refused(&error)),
        }
    }

    /// Sets everything about these links, one message each, and switches them on.
    pub async fn configure(&self, links: &[LinkSettings<'_>]) -> Result<()> {
        for batch in links.chunks(BATCH) {
            let all = try_join_all(batch.iter().map(|link| self.configure_one(link)));
            within(all).await.map_err(|error| refused(&error))??;
        }
        Ok(())
    }

    async fn configure_one(&self, link: &LinkSettings<'_>) -> Result<()> {
        let mut message = LinkUnspec::new_with_name(link.name)
            .mtu(link.mtu.into())
            .link_group(link.group)
            .alias(link.alias)
            .up();
        if let Some(bridge) = link.bridge {
            message = message.controller(bridge);
        }
        let answer = self.handle.link().set(message.build()).execute().await;
        answer.map_err(to_io).while_doing(|| format!("configuring `{}`", link.name))
    }

    /// Switches a link on or off.
    pub async fn set_up(&self, name: &str, up: bool) -> Result<Outcome> {
        let link = self.require_link(name).await?;
        if link.is_up == up {
            return Ok(Outcome::AlreadySo);
        }
        let message = LinkUnspec::new_with_index(link.index);
        let message = if up { message.up() } else { message.down() };
        in_time(self.handle.link().set(message.build()).execute())
            .await
            .map_err(|error| refused(&error))?;
        Ok(Outcome::Changed)
    }

    /// Puts a link that others made into a group.
    pub async fn set_group(&self, name: &str, group: u32) -> Result<()> {
        let message = LinkUnspec::new_with_name(name).link_group(group).build();
        in_time(self.handle.link().set(message).execute())
            .await
            .while_doing(|| format!("configuring `{name}`"))
    }

    /// Deletes the link of this name, if it belongs to `group`. A link of another
    /// group is not ours to delete, and ours is then already gone.
    pub async fn delete(&self, name: &str, group: u32) -> Result<Outcome> {
        match self.link(name).await? {
            Some(link) if link.group == group => {
                gone(in_time(self.handle.link().del(link.index).execute()).await)
            }
            _ => Ok(Outcome::AlreadySo),
        }
    }

    /// Deletes all links of a group by one message, which takes a tenth of the time
    /// of deleting them one by one: in the caller's namespace.
    ///
    /// The kernel works on it for as long as it takes all CPUs to let go, some 20 ms for
    /// the links and again for each bridge, and keeps the sender waiting: a thread of its
    /// own, so that others go on.
    pub async fn delete_group(group: u32) -> Result<Outcome> {
        // Group 0 holds every link that was never put into one.
        if group == 0 {
            return Err(Error::bug("deleting the default link group"));
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group));
        gone(ask(RouteNetlinkMessage::DelLink(message)).await)
    }

    /// Switches all links of a group off, in the caller's namespace: nothing passes them
    /// any more.
    pub async fn set_group_down(group: u32) -> Result<()> {
        if group == 0 {
            return Err(Error::bug("switching off the default link group"));
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group));
        message.header.change_mask = LinkFlags::Up;
        ask(RouteNetlinkMessage::NewLink(message)).await.map_err(|error| refused(&error))
    }

    /// Gives a link an address and the route to its network.
    pub async fn add_address(&self, link: &str, address: IpAddr, bits: u8) -> Result<Outcome> {
        let index = self.require_link(link).await?.index;
        made(in_time(self.handle.address().add(index, address, bits).execute()).await)
    }

    /// Takes the address away.
    pub async fn delete_address(&self, link: &str, address: IpAddr, bits: u8) -> Result<Outcome> {
        let Some(LinkState { index, .. }) = self.link(link).await? else {
            return Ok(Outcome::AlreadySo);
        };
        let message = match address {
            IpAddr::V4(address) => {
                AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address, bits).build()
            }
            IpAddr::V6(address) => {
                AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(address, bits).build()
            }
        };
        gone(in_time(self.handle.address().del(message).execute()).await)
    }

    /// Adds the default route.
    pub async fn add_default_route(&self, gateway: Ipv4Addr) -> Result<Outcome> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        made(in_time(self.handle.route().add(route).execute()).await)
    }

    /// Takes the default route through this gateway away.
    pub async fn delete_default_route(&self, gateway: Ipv4Addr) -> Result<Outcome> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        gone(in_time(self.handle.route().del(route).execute()).await)
    }

    /// Makes it known for good who has these addresses on a link.
    pub async fn add_neighbours(
        &self,
        index: u32,
        neighbours: &[(IpAddr, Mac)],
    ) -> Result<Outcome> {
        let mut outcome = Outcome::AlreadySo;
        for batch in neighbours.chunks(BATCH) {
            let add = |(address, mac): &(IpAddr, Mac)| {
                let request = self.handle.neighbours().add(index, *address);
                in_time(request.link_layer_address(&mac.0).execute())
            };
            for answer in join_all(batch.iter().map(add)).await {
                if made(answer)? == Outcome::Changed {
                    outcome = Outcome::Changed;
                }
            }
        }
        Ok(outcome)
    }

    /// Forgets them.
    pub async fn delete_neighbours(
        &self,
        index: u32,
        neighbours: &[(IpAddr, Mac)],
    ) -> Result<Outcome> {
        let mut outcome = Outcome::AlreadySo;
        for batch in neighbours.chunks(BATCH) {
            let delete = |(address, _): &(IpAddr, Mac)| {
                let mut message = NeighbourMessage::default();
                let (family, address) = match *address {
                    IpAddr::V4(address) => (AddressFamily::Inet, NeighbourAddress::Inet(address)),
                    IpAddr::V6(address) => (AddressFamily::Inet6, NeighbourAddress::Inet6(address)),
                };
                message.header.family = family;
                message.header.ifindex = index;
                message.attributes.push(NeighbourAttribute::Destination(address));
                in_time(self.handle.neighbours().del(message).execute())
            };
            for answer in join_all(batch.iter().map(delete)).await {
                if gone(answer)? == Outcome::Changed {
                    outcome = Outcome::Changed;
                }
            }
        }
        Ok(outcome)
    }
}

/// Keeps the kernel from speaking IPv6 through a link of the caller's namespace, which is not
/// on yet: it would ask guests' routers, believe their advertisements, and let every user here
/// speak to guests. Where the kernel has no IPv6 there is nothing to do.
pub(super) fn silence(name: &str) -> Result<()> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match fs::write(&path, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).while_doing(|| format!("writing `{path}`"))
        }
        _ => Ok(()),
    }
}

/// Asks the kernel on a thread that waits for it.
async fn ask(message: RouteNetlinkMessage) -> io::Result<()> {
    // Made here: it is the socket whose namespace counts, not the thread's.
    let socket = Socket::new(NETLINK_ROUTE)?;
    let asking = tokio::task::spawn_blocking(move || ask_and_wait(&socket, message));
    within(asking).await?.map_err(io::Error::other)?
}

fn ask_and_wait(socket: &Socket, message: RouteNetlinkMessage) -> io::Result<()> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
    match answer.map_err(io::Error::other)?.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(()),
    }
}

pub(super) fn new_link(settings: &LinkSettings<'_>, kind: InfoKind, data: InfoData) -> LinkMessage {
    // The group is there from the first moment: by it the link is known as ours.
    LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(kind)
        .name(settings.name)
        .mtu(settings.mtu.into())
        .link_group(settings.group)
        .set_info_data(data)
        .build()
}

pub(super) fn made(answer: io::Result<()>) -> Result<Outcome> {
    match answer {
        Ok(()) => Ok(Outcome::Changed),
        Err(error) if is(&error, &[libc::EEXIST]) => Ok(Outcome::AlreadySo),
        Err(error) => Err(refused(&error)),
    }
}

pub(super) fn gone(answer: io::Result<()>) -> Result<Outcome> {
    match answer {
        Ok(()) => Ok(Outcome::Changed),
        Err(error) if is(&error, &ABSENT) => Ok(Outcome::AlreadySo),
        Err(error) => Err(refused(&error)),
    }
}

/// Whether the kernel answered with one of these error numbers.
fn is(error: &io::Error, numbers: &[i32]) -> bool {
    error.raw_os_error().is_some_and(|number| numbers.contains(&number))
}

/// The kernel's error number, which is all that callers look at.
fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// The kernel's answer as an error of ours; what was asked is said by the caller.
pub(super) fn refused(answer: &io::Error) -> Error {
    Error::system(answer.to_string())
}

pub(super) async fn in_time<T>(
    request: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> io::Result<T> {
    within(request).await?.map_err(to_io)
}

async fn within<T>(work: impl Future<Output = T>) -> io::Result<T> {
    tokio::time::timeout(LIMIT, work).await.map_err(|_| {
        let text = format!("the kernel did not answer on netlink for {} s", LIMIT.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, text)
    })
}
