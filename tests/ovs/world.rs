//! Two hosts, each with an Open vSwitch of its own, joined by a wire.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pavo::config::{Ethernet, Layer};
use pavo::error::Result;
use pavo::host::journal::{Journal, Plan};
use pavo::host::ovs::{Datapath, Tunnel};
use pavo::host::step::Step;
use pavo::host::{Host, netns, process, spawn, tap};
use pavo::model::address::Mac;
use pavo::model::owner::{Manager, Owner};
use pavo::model::vm::{Nic, NicIpv4};
use pavo::network::ovs::{self, Gateway, Network, Peer};
use pavo::network::switch::Port;

use super::lab::{Lab, eventually, sh};

pub const KEY: u32 = 4242;
pub const MTU: u16 = 1500;

/// A host: a network namespace with Open vSwitch.
pub struct Node {
    pub number: u8,
    pub netns: PathBuf,
    pub host: Host,
    pub journal: Journal,
    daemons: Vec<Child>,
}

pub fn owner() -> Owner {
    Owner { manager: Manager::Slurm, job: 42 }
}

/// Hosts 1 and 2, whose underlay is on a bridge of Open vSwitch.
pub fn two_hosts(lab: &Lab) -> [Node; 2] {
    let nodes = [1, 2].map(|number| Node::new(lab, number));
    let [a, b] = &nodes;
    let wire = format!(
        "ip link add eth1 mtu 1600 netns {} type veth peer name eth1 mtu 1600 netns {}",
        a.netns.display(),
        b.netns.display()
    );
    sh(None, &wire);
    nodes.iter().for_each(Node::underlay);
    nodes
}

impl Node {
    pub fn new(lab: &Lab, number: u8) -> Self {
        let dir = lab.dir.join(format!("n{number}"));
        let netns = lab.dir.join("hosts").join(format!("n{number}"));
        netns::create(&netns).unwrap();
        let host = Host::new(dir.join("netns")).with_ovs_dir(dir.join("ovs"));
        std::fs::create_dir_all(host.ovs_dir()).unwrap();
        let journal = Journal::open(dir.join("journal")).unwrap();
        let mut node = Self { number, netns, host, journal, daemons: Vec::new() };
        // The kernel, too, hears ARP on `eth1`, where it has no address.
        node.sh("ip link set lo up; sysctl -qw net.ipv4.conf.all.arp_ignore=1");
        node.start_ovs();
        node
    }

    pub fn start_ovs(&mut self) {
        let dir = self.host.ovs_dir().to_owned();
        let dir = dir.display();
        let schema = "/usr/share/openvswitch/vswitch.ovsschema";
        if !self.host.ovs_dir().join("conf.db").exists() {
            sh(None, &format!("ovsdb-tool create {dir}/conf.db {schema}"));
        }
        // What a killed one left looks like one that answers.
        let _ = std::fs::remove_file(self.host.ovs_db());
        let database = format!("ovsdb-server {dir}/conf.db --remote=punix:{dir}/db.sock");
        self.daemon(&database, "ovsdb");
        eventually(|| self.host.ovs_db().exists().then_some(()));
        self.vsctl("--no-wait init");
        self.start_vswitchd();
    }

    pub fn start_vswitchd(&mut self) {
        let dir = self.host.ovs_dir().display().to_string();
        self.daemon(&format!("ovs-vswitchd unix:{dir}/db.sock"), "vswitchd");
    }

    /// A daemon that ends with this thread.
    fn daemon(&mut self, command: &str, name: &str) {
        let dir = self.host.ovs_dir();
        let log = File::create(dir.join(format!("{name}.log"))).unwrap();
        let mut words = command.split(' ');
        let mut child = Command::new("nsenter");
        child
            .arg(format!("--net={}", self.netns.display()))
            .args(words.by_ref())
            .arg(format!("--unixctl={}", dir.join(format!("{name}.ctl")).display()))
            .args(["-vconsole:warn", "-vsyslog:off", "-vfile:off"])
            .env("OVS_RUNDIR", dir)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stderr(log);
        spawn::die_with_parent(&mut child);
        self.daemons.push(child.spawn().unwrap());
    }

    /// Ends ovs-vswitchd, or both daemons, as a crash would.
    pub fn kill(&mut self, all: bool) {
        let left = if all { 0 } else { 1 };
        for mut child in self.daemons.drain(left..) {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Like an administrator.
    pub fn vsctl(&self, words: &str) -> String {
        let db = self.host.ovs_db();
        self.sh(&format!("ovs-vsctl --timeout=20 --db=unix:{} {words}", db.display()))
    }

    /// The address of the underlay moves to a bridge, as `ovs-vswitchd` wants it.
    fn underlay(&self) {
        self.vsctl(
            "add-br br-phy -- set bridge br-phy datapath_type=netdev \
             -- add-port br-phy eth1 -- set interface br-phy mtu_request=1600",
        );
        let address = self.address();
        self.sh(&format!(
            "ip link set eth1 up; ip link set br-phy up; ip addr add {address}/24 dev br-phy"
        ));
    }

    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 98, 0, self.number)
    }

    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::with_netns(&self.netns, work).unwrap()
    }

    pub fn sh(&self, script: &str) -> String {
        sh(Some(&self.netns), script)
    }

    pub fn run<T: Send, F: Future<Output = T>>(&self, work: impl FnOnce() -> F + Send) -> T {
        self.inside(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(work())
        })
    }

    pub fn apply(&self, plan: &Plan) -> Result<()> {
        self.run(|| self.journal.apply(plan, &self.host))
    }

    pub fn undo(&self) -> Result<()> {
        self.run(|| self.journal.undo(owner(), &self.host))
    }

    /// Everything that a job can leave on a host.
    pub fn traces(&self) -> Vec<String> {
        let mut traces: Vec<String> = Vec::new();
        let mut list = |script: &str| traces.extend(self.sh(script).lines().map(str::to_owned));
        // The datapath's own link belongs to no bridge.
        list("ip -o link show | cut -d: -f2 | cut -d@ -f1 | grep -vw ovs-netdev");
        list("nft list tables");
        traces.extend(self.vsctl("show").lines().map(str::to_owned));
        for dir in [self.host.netns_dir().to_owned(), self.netns.with_file_name("journal")] {
            let entries = std::fs::read_dir(dir).into_iter().flatten();
            traces.extend(entries.map(|entry| entry.unwrap().path().display().to_string()));
        }
        traces.sort();
        traces
    }

    /// The counters of the job's bridge.
    pub fn counters(&self, job: &Job) -> BTreeMap<String, u64> {
        let taps: Vec<_> = job.nics.iter().map(|nic| nic.tap.clone()).collect();
        self.run(|| ovs::counters(&self.host, BRIDGE, &taps)).unwrap()
    }
}

pub const BRIDGE: &str = "pb42-0";
pub const NAMESPACE: &str = "pn42-0";
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 200, 255, 254);
const GATEWAY_LINK: &str = "pg42-0";

/// What a job needs of one host.
pub struct Job {
    pub plan: Plan,
    pub nics: Vec<Nic>,
}

/// A job of two hosts with two VMs on each: its part on one of them.
pub fn job(node: &Node, layer: Layer) -> Job {
    let config = Ethernet { layer, ..Ethernet::default() };
    let subnet = config.int_network;
    let mine = u32::from(node.number - 1) * 2;
    let others = 2 - mine;
    let l3 = layer == Layer::L3;
    let mac = |rank| config.mac_prefix.nth(rank).unwrap();
    let address = |rank| l3.then(|| subnet.guest(rank).unwrap());
    let nic = |rank: u32| Nic {
        network: "net".into(),
        tap: owner().indexed('t', rank - mine),
        mac: mac(rank),
        model: "virtio-net".into(),
        mtu: MTU,
        ipv4: address(rank).map(|address| NicIpv4 {
            address,
            subnet,
            gateway: subnet.gateway(),
            domain: "pavo.internal".into(),
        }),
        offloads: false,
    };
    let nics: Vec<_> = (mine..mine + 2).map(nic).collect();
    let ports: Vec<_> = nics
        .iter()
        .map(|nic| Port {
            tap: nic.tap.clone(),
            mac: nic.mac,
            address: nic.ipv4.as_ref().map(|ipv4| ipv4.address),
        })
        .collect();
    let gateway = l3.then(|| Gateway {
        link: GATEWAY_LINK,
        mac: config.mac_prefix.gateway(),
        address: subnet.gateway(),
    });
    let tunnel = Tunnel { name: "px42-0".into(), key: KEY, local: node.address(), udp_port: 4789 };
    let peer = Peer {
        address: Ipv4Addr::new(10, 98, 0, 3 - node.number),
        guests: (others..others + 2).map(|rank| (mac(rank), address(rank))).collect(),
    };
    let network = Network {
        layer,
        bridge: BRIDGE,
        datapath: Datapath::Netdev,
        ports: &ports,
        gateway,
        tunnel: Some(tunnel),
        peers: vec![peer],
    };
    Job { plan: Plan { owner: owner(), keeper: process::current(), steps: steps(&network) }, nics }
}

fn steps(network: &Network<'_>) -> Vec<Step> {
    let bridge = ovs::bridge(network);
    let mut steps =
        vec![Step::NftTables { namespace: None, tables: ovs::guard(owner(), &bridge.links) }];
    let (group, alias) = (owner().link_group(), "pavo: a test".to_owned());
    let namespace = || Some(NAMESPACE.to_owned());
    if let Some(gateway) = &network.gateway {
        let link = "guests".to_owned();
        steps.extend([
            Step::Namespace { name: NAMESPACE.into() },
            Step::LinkUp { namespace: namespace(), link: "lo".into() },
            Step::Veth {
                name: gateway.link.into(),
                mtu: MTU,
                group,
                alias: alias.clone(),
                bridge: None,
                peer: link.clone(),
                peer_namespace: NAMESPACE.into(),
                peer_mac: Some(gateway.mac),
            },
            Step::NoOffloads { namespace: namespace(), link: link.clone() },
            Step::Address { namespace: namespace(), link, address: gateway.address, bits: 16 },
        ]);
    }
    let names = network.ports.iter().map(|port| port.tap.clone()).collect();
    steps.extend([
        Step::Taps { bridge: None, mtu: MTU, group, alias, owner: 0, names },
        Step::OvsBridges { owner: owner(), bridges: vec![bridge] },
        Step::OvsFlows { tables: vec![ovs::flow_table(network)] },
    ]);
    steps
}

/// A guest with a kernel of its own, as far as its network goes: a namespace whose `eth0` is
/// the other end of a NIC's tap.
pub struct Machine {
    pub netns: PathBuf,
    pub ip: Ipv4Addr,
    pub mac: Mac,
    stop: Arc<AtomicBool>,
    pumps: Vec<JoinHandle<()>>,
}

impl Machine {
    pub fn boot(lab: &Lab, node: &Node, nic: &Nic) -> Self {
        let netns = lab.dir.join("machines").join(nic.mac.to_string().replace(':', ""));
        netns::create(&netns).unwrap();
        let inner = netns::with_netns(&netns, || tap::open("eth0")).unwrap().unwrap();
        let outer = eventually(|| node.inside(|| tap::open(&nic.tap)).ok());
        let address = nic.ipv4.as_ref().unwrap();
        sh(
            Some(&netns),
            &format!(
                "ip link set lo up; sysctl -qw net.ipv6.conf.all.disable_ipv6=1
                 ip link set eth0 address {} mtu {}; ip link set eth0 up
                 ip addr add {}/{} dev eth0; ip route add default via {}",
                nic.mac,
                nic.mtu,
                address.address,
                address.subnet.bits(),
                address.gateway
            ),
        );
        let stop = Arc::new(AtomicBool::new(false));
        let files = [inner, outer].map(Arc::new);
        let pumps = [(0, 1), (1, 0)].map(|(from, to)| {
            let (from, to, stop) = (files[from].clone(), files[to].clone(), stop.clone());
            std::thread::spawn(move || pump(&from, &to, &stop))
        });
        Self { netns, ip: address.address, mac: nic.mac, stop, pumps: pumps.into() }
    }

    pub fn sh(&self, script: &str) -> String {
        sh(Some(&self.netns), script)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for pump in self.pumps.drain(..) {
            pump.join().unwrap();
        }
    }
}

/// Carries frames one way.
fn pump(from: &File, to: &File, stop: &AtomicBool) {
    let mut frame = vec![0; 65536];
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(20_u8)).unwrap();
        while let Ok(length) = (&*from).read(&mut frame) {
            // A link that is down, or full, takes none.
            let _ = (&*to).write(&frame[..length]);
        }
    }
}

/// Two hosts with a job on them.
pub fn started(lab: &Lab, layer: Layer) -> ([Node; 2], [Job; 2]) {
    let nodes = two_hosts(lab);
    let jobs = nodes.each_ref().map(|node| job(node, layer));
    for (node, job) in nodes.iter().zip(&jobs) {
        node.apply(&job.plan).unwrap();
    }
    (nodes, jobs)
}
