//! Sockets that belong to the host's network and are handed into the cell.
//!
//! A socket stays in the network namespace it was made in. So the launcher, out
//! here, binds the ports at which VMs are published and connects to the name
//! servers; the responder, inside, accepts and asks through them. Nothing has to
//! be forwarded by anybody, and a port that is bound cannot be lost to a race.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use crate::config::ReverseNat;
use crate::error::{Context, Error, Result};
use crate::model::job::PublishedPort;
use crate::network::{Guest, L3, NetworkPlan, responder};

/// More name servers than this are not asked (as the C library's resolver).
const MAX_NAME_SERVERS: usize = 3;

/// A bound, listening port of the host.
#[derive(Debug)]
pub struct BoundPort {
    pub port: PublishedPort,
    pub listener: OwnedFd,
}

/// Binds one free port of the range, at this address of the host, for each of `count` VMs,
/// in their order.
///
/// # Errors
/// When the range has too few free ports: nothing stays bound.
pub fn bind(rule: &ReverseNat, address: Ipv4Addr, count: u32) -> Result<Vec<BoundPort>> {
    let mut bound = Vec::new();
    for host_port in rule.min_host_port..=rule.max_host_port {
        if bound.len() == count as usize {
            break;
        }
        match TcpListener::bind((address, host_port)) {
            Ok(listener) => {
                listener
                    .set_nonblocking(true)
                    .while_doing(|| format!("listening on port {host_port}"))?;
                let port =
                    PublishedPort { vm_port: rule.vm_port, host_address: address, host_port };
                bound.push(BoundPort { port, listener: listener.into() });
            }
            Err(error) if taken(error.kind()) => {}
            Err(error) => return Err(error).while_doing(|| format!("binding port {host_port}")),
        }
    }
    if bound.len() < count as usize {
        return Err(Error::system("Unable to find a free host port for reverse NAT")
            .because(Error::system(format!(
                "{count} VMs need one each of {}–{}, and {} are free",
                rule.min_host_port,
                rule.max_host_port,
                bound.len()
            )))
            .help("widen `reverse-nat` in networks.yaml, or end a job of yours (`pavo ps`)"));
    }
    Ok(bound)
}

fn taken(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::AddrInUse | ErrorKind::PermissionDenied)
}

/// Connected UDP sockets to this host's name servers, none if it has none.
pub fn name_servers() -> Vec<OwnedFd> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    parse_resolv_conf(&text)
        .into_iter()
        .filter_map(|address| {
            let any: SocketAddr = match address {
                IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                IpAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            // A server that cannot even be routed to is no server.
            let socket = UdpSocket::bind(any).ok()?;
            socket.connect((address, 53)).ok()?;
            socket.set_nonblocking(true).ok()?;
            Some(socket.into())
        })
        .collect()
}

fn parse_resolv_conf(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse().ok())
        .take(MAX_NAME_SERVERS)
        .collect()
}

/// Binds, at this address of the host, every port that the networks of a plan publish.
pub fn bind_all(plan: &NetworkPlan, address: Ipv4Addr) -> Result<Vec<Bound>> {
    let mut all = Vec::new();
    for l3 in &plan.l3 {
        for rule in &l3.reverse_nat {
            let count = u32::try_from(l3.guests.len()).unwrap_or(u32::MAX);
            for (guest, bound) in l3.guests.iter().zip(bind(rule, address, count)?) {
                all.push(Bound { network: l3.network.clone(), rank: guest.rank, bound });
            }
        }
    }
    Ok(all)
}

/// A guest's published port, bound on the host.
#[derive(Debug)]
pub struct Bound {
    pub network: String,
    pub rank: u32,
    pub bound: BoundPort,
}

/// What the responder of each L3 network has to know: the network joined with the sockets
/// that were made for it.
pub fn responders(
    plan: &NetworkPlan,
    netns_dir: &Path,
    bound: &[Bound],
    upstream: &[OwnedFd],
    drop_to: Option<(u32, u32)>,
) -> Vec<responder::Spec> {
    let spec = |l3: &L3| {
        let published = bound.iter().filter(|port| port.network == l3.network);
        let publish = published.filter_map(|port| {
            let guest = l3.guests.iter().find(|guest| guest.rank == port.rank)?;
            Some(responder::Published {
                listener: port.bound.listener.as_raw_fd(),
                address: guest.address,
                port: port.bound.port.vm_port,
            })
        });
        let named = |guest: &Guest| responder::Guest {
            rank: guest.rank,
            name: format!("vm{}", guest.rank),
            mac: guest.mac,
            address: guest.address,
            address6: guest.address6,
            default_route: guest.default_route,
        };
        // Names of the outside are a way out, too.
        let asked = if l3.allow_outbound { upstream } else { &[] };
        responder::Spec {
            network: l3.network.clone(),
            namespace: Some(netns_dir.join(&l3.namespace)),
            interface: l3.interface.clone(),
            gateway: l3.gateway,
            subnet: l3.subnet,
            ipv6: l3.prefix6.map(|prefix| responder::Ipv6 { prefix, gateway_mac: l3.gateway_mac }),
            mtu: l3.mtu,
            domain: l3.domain.clone(),
            dns_search: l3.dns_search.clone(),
            dns_server: l3.dns_server,
            ntp_server: l3.ntp_server,
            guests: l3.guests.iter().map(named).collect(),
            others: l3.others.iter().map(named).collect(),
            upstream: asked.iter().map(AsRawFd::as_raw_fd).collect(),
            publish: publish.collect(),
            dial: None,
            drop_to,
        }
    };
    plan.l3.iter().map(spec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LO: Ipv4Addr = Ipv4Addr::LOCALHOST;

    #[test]
    fn two_clusters_at_once_get_different_ports_and_a_full_range_says_so() {
        // A range of its own, found free: the kernel's choice and what follows it.
        let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let first = probe.local_addr().unwrap().port().min(65_000);
        drop(probe);
        let rule = ReverseNat { vm_port: 22, min_host_port: first, max_host_port: first + 40 };
        let (a, b) = (bind(&rule, LO, 2).unwrap(), bind(&rule, LO, 2).unwrap());
        let ports =
            |bound: &[BoundPort]| bound.iter().map(|b| b.port.host_port).collect::<Vec<_>>();
        assert!(ports(&a).iter().all(|port| !ports(&b).contains(port)));
        let error = bind(&rule, LO, 50).unwrap_err();
        assert_eq!(error.to_string(), "Unable to find a free host port for reverse NAT");
    }

    #[test]
    fn name_servers_are_read_as_the_resolver_reads_them() {
        let text = "# none\nsearch x\nnameserver 127.0.0.53\nnameserver ::1\nnameserver junk\n";
        let found = parse_resolv_conf(text);
        assert_eq!(found, ["127.0.0.53".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
    }
}
