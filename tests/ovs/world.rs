//! Two hosts, each with an Open vSwitch of its own, joined by a wire.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pavo::config::{Ethernet, Layer};
use pavo::error::Result;
use pavo::host::journal::{Journal, Plan};
use pavo::host::ovs::Datapath;
use pavo::host::{Host, netns, spawn, tap};
use pavo::model::address::Mac;
use pavo::model::owner::{Manager, Owner};
use pavo::model::vm::Nic;
use pavo::network::{Switch, SwitchKind, ovs, plan};

use super::lab::{Counters, Lab, across, eventually, in_netns, request, sh, skip};

pub const KEY: u32 = 4242;

/// A host: a network namespace with Open vSwitch.
pub struct Node {
    pub number: u8,
    pub netns: PathBuf,
    pub host: Host,
    pub journal: Journal,
    daemons: Vec<Child>,
}

/// Runs `test` in namespaces of its own, where Open vSwitch can run.
pub fn with_ovs(test: impl FnOnce(&Lab) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root");
    }
    if !["ovsdb-server", "ovs-vswitchd"].iter().all(|name| installed(name)) {
        return skip("needs Open vSwitch: `apt install openvswitch-switch`");
    }
    in_netns(test);
}

fn installed(program: &str) -> bool {
    ["/usr/sbin", "/usr/bin"].iter().any(|dir| Path::new(dir).join(program).exists())
}

pub fn owner() -> Owner {
    Owner { manager: Manager::Slurm, job: 42 }
}

/// Hosts 1 and 2, whose underlay is on a bridge of Open vSwitch.
pub fn two_hosts(lab: &Lab) -> [Node; 2] {
    let nodes = wired(lab);
    nodes.iter().for_each(Node::underlay);
    nodes
}

/// Hosts 1 and 2, with a wire between them.
pub fn wired(lab: &Lab) -> [Node; 2] {
    let nodes = [1, 2].map(|number| Node::new(lab, number));
    let [a, b] = &nodes;
    let wire = format!(
        "ip link add eth1 mtu 1600 netns {} type veth peer name eth1 mtu 1600 netns {}",
        a.netns.display(),
        b.netns.display()
    );
    sh(None, &wire);
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
    pub fn underlay(&self) {
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
    pub fn counters(&self) -> Counters {
        self.run(|| ovs::counters(&self.host, owner())).unwrap()
    }
}

pub const NAMESPACE: &str = "pn42-0";
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 200, 255, 254);

/// What a job needs of one host.
pub struct Job {
    pub plan: Plan,
    /// Of all VMs here.
    pub nics: Vec<Nic>,
}

/// A job of two hosts with two VMs on each, all on these networks: its part on one of them.
pub fn job(node: &Node, networks: &[(&str, Ethernet)]) -> Job {
    job_on(node, networks, Switch::Ovs(Datapath::Netdev))
}

pub fn job_on(node: &Node, networks: &[(&str, Ethernet)], switch: Switch) -> Job {
    let mut request = across(request(42, 0, networks), usize::from(node.number - 1), &[2, 2]);
    (request.owner, request.switch) = (owner(), switch);
    let fabric = request.fabric.as_mut().unwrap();
    (fabric.address, fabric.mtu, fabric.link) = (node.address(), 1600, "br-phy".into());
    fabric.keys = (KEY..).take(networks.len()).collect();
    for peer in &mut fabric.peers {
        peer.address = Ipv4Addr::new(10, 98, 0, 3 - node.number);
        peer.switch = SwitchKind::Ovs;
    }
    let plan = plan(&request).unwrap();
    let nics = plan.nics.into_iter().flat_map(|(_, nics)| nics).collect();
    Job { plan: plan.plan, nics }
}

/// An L3 network with the MTU that most have.
pub fn l3() -> Ethernet {
    Ethernet { mtu: 1500, ..Ethernet::default() }
}

pub fn l2() -> Ethernet {
    Ethernet { layer: Layer::L2, ..l3() }
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
pub fn started(lab: &Lab, networks: &[(&str, Ethernet)]) -> ([Node; 2], [Job; 2]) {
    let nodes = two_hosts(lab);
    let jobs = nodes.each_ref().map(|node| job(node, networks));
    for (node, job) in nodes.iter().zip(&jobs) {
        node.apply(&job.plan).unwrap();
    }
    (nodes, jobs)
}
