//! `networks.yaml`: the networks that resource sets may name.

use std::collections::BTreeMap;

use super::read::{Fields, Item};
use super::types::{Ethernet, Layer, Network, Network6, ReverseNat};
use crate::model::address::Subnet;

pub const KEYS: &[&str] = &["type", "settings"];
pub const ETHERNET: &[&str] = &[
    "dev-prefix",
    "network-layer",
    "int-network",
    "int-network6",
    "ext-network",
    "mac-prefix",
    "mac-start-offset",
    "mtu",
    "host-if-suffix",
    "domain-name",
    "dns-search",
    "dns-server",
    "ntp-server",
    "reverse-nat",
    "allow-outbound",
    "gateway",
    "manage-ip-forward",
    "license",
];
/// The smallest MTU of IPv6 (RFC 8200).
const MIN_MTU6: u16 = 1280;
pub const REVERSE_NAT: &[&str] = &["vm-port", "min-host-port", "max-host-port"];
pub const INFINIBAND: &[&str] = &[
    "host-device",
    "min-pkey",
    "max-pkey",
    "opensm-daemon",
    "opensm-partition-cfg",
    "opensm-partition-tpl",
    "license",
];
pub const HOST_INFINIBAND: &[&str] = &["host-device"];
pub const BRIDGED: &[&str] = &["host-bridge", "tap-prefix", "mtu", "vlans"];
pub const VLAN: &[&str] = &["vid", "type"];
pub const PCI: &[&str] = &["host-device-addrs", "host-driver"];
/// pcocc's older form of an L3 Ethernet.
const NAT: &[&str] = &[
    "nat-network",
    "vm-network",
    "vm-network-gw",
    "vm-ip",
    "vm-hwaddr",
    "bridge",
    "bridge-hwaddr",
    "tap-prefix",
    "mtu",
    "domain-name",
    "dns-search",
    "dns-server",
    "ntp-server",
    "reverse-nat",
    "allow-outbound",
];
/// pcocc's older form of an L2 Ethernet.
const PV: &[&str] = &["bridge-prefix", "tap-prefix", "mac-prefix", "mtu", "host-if-suffix"];

#[derive(Clone, Copy)]
enum Type {
    Ethernet,
    Infiniband,
    HostInfiniband,
    Bridged,
    Pci,
    Nat,
    Pv,
}

const TYPES: &[(&str, Type)] = &[
    ("ethernet", Type::Ethernet),
    ("eth", Type::Ethernet),
    ("infiniband", Type::Infiniband),
    ("ib", Type::Infiniband),
    ("host-infiniband", Type::HostInfiniband),
    ("hostib", Type::HostInfiniband),
    ("bridged-ethernet", Type::Bridged),
    ("bridged", Type::Bridged),
    ("genericpci", Type::Pci),
    ("nat", Type::Nat),
    ("pv", Type::Pv),
];

pub fn read(file: &Item) -> BTreeMap<String, Network> {
    let read_one = |(name, item): (&str, Item)| {
        let first_ok = name.starts_with(|c: char| c.is_ascii_alphabetic());
        if !first_ok || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)) {
            item.problem("a network's name is a letter, then letters, digits, `_` and `-`");
        }
        // A network that is wrong is still there, so that what names it is right.
        let network = network(&item.fields(KEYS));
        (name.to_owned(), network.unwrap_or(Network::Unsupported { kind: "?".into() }))
    };
    let networks = file.entries().into_iter().map(read_one).collect();
    check_prefixes(file, &networks);
    networks
}

/// A VM may be on any two networks, and could not tell addresses of one prefix apart.
fn check_prefixes(file: &Item, networks: &BTreeMap<String, Network>) {
    let mut given = BTreeMap::new();
    for (name, item) in file.entries() {
        let Some(Network::Ethernet(ethernet)) = networks.get(name) else { continue };
        let Some(Network6::Given(prefix)) = ethernet.int_network6 else { continue };
        if let Some(other) = given.insert(prefix, name).filter(|other| *other != name) {
            item.problem(format!("`int-network6` {prefix} is that of network `{other}`, too"));
        }
    }
}

fn network(fields: &Fields) -> Option<Network> {
    let typed = fields.required("type");
    let kind = typed.and_then(|item| item.word(TYPES));
    let settings = fields.required("settings");
    let (typed, kind, settings) = (typed?, kind?, settings?);
    let unsupported = |kind: &str| Some(Network::Unsupported { kind: kind.into() });
    match kind {
        Type::Ethernet => Some(Network::Ethernet(ethernet(&settings.fields(ETHERNET)))),
        Type::Nat => {
            typed.warn("`nat` is an older form of `ethernet` with `network-layer: L3`; read as it");
            Some(Network::Ethernet(nat(&settings.fields(NAT))))
        }
        Type::Pv => {
            typed.warn("`pv` is an older form of `ethernet` with `network-layer: L2`; read as it");
            let mut network = Ethernet { layer: Layer::L2, ..Ethernet::default() };
            common(&settings.fields(PV), &mut network);
            Some(Network::Ethernet(network))
        }
        Type::Infiniband => {
            infiniband(&settings.fields(INFINIBAND));
            unsupported("infiniband")
        }
        Type::HostInfiniband => {
            settings.fields(HOST_INFINIBAND).required("host-device").and_then(Item::text);
            unsupported("host-infiniband")
        }
        Type::Bridged => {
            bridged(&settings.fields(BRIDGED));
            unsupported("bridged-ethernet")
        }
        Type::Pci => {
            let fields = settings.fields(PCI);
            if let Some(addresses) = fields.required("host-device-addrs") {
                addresses.list().iter().for_each(|item| drop(item.text()));
            }
            fields.required("host-driver").and_then(Item::text);
            unsupported("genericpci")
        }
    }
}

fn ethernet(fields: &Fields) -> Ethernet {
    let mut network = Ethernet::default();
    fields.read("network-layer", &mut network.layer, |item| {
        item.word(&[("L3", Layer::L3), ("L2", Layer::L2)])
    });
    fields.read("int-network", &mut network.int_network, subnet);
    fields.read("ext-network", &mut network.ext_network, subnet);
    fields.read("int-network6", &mut network.int_network6, network6);
    common(fields, &mut network);
    addressing(fields, &mut network);
    if network.layer == Layer::L3 && network.int_network.overlaps(&network.ext_network) {
        let at = fields.get("int-network").or(fields.get("ext-network")).unwrap_or(&fields.owner);
        at.problem(format!(
            "`int-network` {} and `ext-network` {} overlap",
            network.int_network, network.ext_network
        ));
    }
    if let (Layer::L2, Some(item)) = (network.layer, fields.get("int-network6")) {
        item.problem("only a network with `network-layer: L3` has addresses");
    }
    if let (Some(item), true) = (fields.get("int-network6"), network.mtu < MIN_MTU6) {
        item.problem(format!("IPv6 needs an `mtu` of {MIN_MTU6} at least"));
    }
    if let Some(item) = fields.get("mac-start-offset") {
        let fits = |offset: &u32| network.mac_prefix.nth(*offset).is_some();
        match item.integer(0..=u32::MAX) {
            Some(offset) if fits(&offset) => network.mac_start_offset = offset,
            Some(_) => item.problem("there are not so many addresses below `mac-prefix`"),
            None => {}
        }
    }
    network.dev_prefix = fields.get("dev-prefix").and_then(|item| {
        item.text_like("a letter, then at most seven letters, digits or `_`", is_device_prefix)
    });
    network.license = fields.get("license").and_then(|item| {
        item.text_like("letters, digits, `_`, `-`, `.` and `@`", crate::model::cluster::plain_name)
    });
    // The gateway is always ours, and forwarding is on in the job's namespace, and on the
    // host from its start: read, checked, not used.
    fields.get("gateway").and_then(|item| item.word(&[("local-nat", ())]));
    fields.get("manage-ip-forward").and_then(Item::boolean);
    network
}

/// The settings that `ethernet` and `pv` share.
fn common(fields: &Fields, network: &mut Ethernet) {
    network.host_if_suffix = fields.get("host-if-suffix").and_then(Item::text);
    fields.read("mac-prefix", &mut network.mac_prefix, Item::parse);
    fields.read("mtu", &mut network.mtu, |item| item.integer(68..=u16::MAX));
}

/// The settings that `ethernet` and `nat` share.
fn addressing(fields: &Fields, network: &mut Ethernet) {
    fields.read("domain-name", &mut network.domain_name, |item| {
        let name = item.text_like("a domain name", is_domain_or_empty)?;
        Some(Some(name).filter(|name| !name.is_empty()))
    });
    fields.read("dns-search", &mut network.dns_search, |item| Some(domains(item)));
    fields.read("dns-server", &mut network.dns_server, address);
    fields.read("ntp-server", &mut network.ntp_server, address);
    fields.read("reverse-nat", &mut network.reverse_nat, |item| Some(reverse_nat(item)));
    fields.read("allow-outbound", &mut network.allow_outbound, |item| {
        item.word(&[("all", true), ("none", false)])
    });
}

fn nat(fields: &Fields) -> Ethernet {
    let mut network = Ethernet::default();
    fields.read("vm-network", &mut network.int_network, subnet);
    fields.read("nat-network", &mut network.ext_network, subnet);
    fields.read("mtu", &mut network.mtu, |item| item.integer(68..=u16::MAX));
    addressing(fields, &mut network);
    network
}

/// Domains, separated by blanks or commas (pcocc's form) or in a list.
fn domains(item: &Item) -> Vec<String> {
    let items = if item.node().as_scalar().is_some() { vec![item.clone()] } else { item.list() };
    let names = items.iter().filter_map(|item| {
        item.text_like("domain names", |text| text.split([' ', ',']).all(is_domain_or_empty))
    });
    let split = |text: String| text.split([' ', ',']).map(str::to_owned).collect::<Vec<_>>();
    names.flat_map(split).filter(|name| !name.is_empty()).collect()
}

/// One published port (pcocc's form) or a list of them.
fn reverse_nat(item: &Item) -> Vec<ReverseNat> {
    let one = |item: &Item| {
        let fields = item.fields(REVERSE_NAT);
        let port = |key| fields.required(key).and_then(|item| item.integer(1..=u16::MAX));
        let (vm_port, min, max) = (port("vm-port"), port("min-host-port"), port("max-host-port"));
        let (vm_port, min_host_port, max_host_port) = (vm_port?, min?, max?);
        if min_host_port > max_host_port {
            item.problem("`min-host-port` is above `max-host-port`");
        }
        Some(ReverseNat { vm_port, min_host_port, max_host_port })
    };
    if item.is_mapping() {
        return one(item).into_iter().collect();
    }
    let mut published: Vec<ReverseNat> = Vec::new();
    for item in item.list() {
        let Some(port) = one(&item) else { continue };
        if published.iter().any(|other| other.vm_port == port.vm_port) {
            item.problem(format!("the port {} is published already", port.vm_port));
        }
        published.push(port);
    }
    published
}

fn infiniband(fields: &Fields) {
    for key in ["host-device", "opensm-daemon", "opensm-partition-cfg", "opensm-partition-tpl"] {
        fields.required(key).and_then(Item::text);
    }
    let is_pkey = |text: &str| {
        let digits = text.strip_prefix("0x").unwrap_or("");
        digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_hexdigit())
    };
    for key in ["min-pkey", "max-pkey"] {
        let read = |item: &Item| item.text_like("a key such as `0x8001`", is_pkey);
        fields.required(key).and_then(read);
    }
    fields.get("license").and_then(Item::text);
}

fn bridged(fields: &Fields) {
    fields.required("host-bridge").and_then(Item::text);
    fields.required("tap-prefix").and_then(Item::text);
    fields.get("mtu").and_then(|item| item.integer(68..=u16::MAX));
    for vlan in fields.get("vlans").map(Item::list).unwrap_or_default() {
        let vlan = vlan.fields(VLAN);
        vlan.required("vid").and_then(|item| item.integer(1..=4094_u16));
        let types = [("native", ()), ("tagged", ()), ("untagged", ())];
        vlan.required("type").and_then(|item| item.word(&types));
    }
}

/// A network with room for one guest at least.
fn subnet(item: &Item) -> Option<Subnet> {
    let subnet: Subnet = item.parse()?;
    if subnet.guests() == 0 {
        item.problem(format!("`{subnet}` has no room for a guest"));
    }
    Some(subnet)
}

/// IPv6 addresses of guests; `none` is as if it were not there.
fn network6(item: &Item) -> Option<Option<Network6>> {
    match item.text()?.as_str() {
        "none" => Some(None),
        "auto" => Some(Some(Network6::Auto)),
        _ => item.parse().map(|prefix| Some(Network6::Given(prefix))),
    }
}

/// An address; an empty text, as in pcocc's defaults, is none.
fn address(item: &Item) -> Option<Option<std::net::Ipv4Addr>> {
    if item.any_text()?.is_empty() {
        return Some(None);
    }
    item.text_like("an IPv4 address", |text| text.parse::<std::net::Ipv4Addr>().is_ok())
        .map(|text| text.parse().ok())
}

fn is_domain_or_empty(name: &str) -> bool {
    name.is_empty() || is_domain(name)
}

fn is_domain(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn is_device_prefix(text: &str) -> bool {
    text.len() <= 8
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
