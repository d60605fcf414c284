//! TCP between guests of two hosts: over our switch with all its rules or flows, against a
//! plain bridge and VXLAN without any; on Linux and on Open vSwitch (its own datapath).
//!
//! Needs root; runs in namespaces of its own. Guests are namespaces, behind a veth that has
//! the place and the name of the TAP device. The hosts do not pass bridged frames to the
//! rules for IP packets (`br_netfilter`), which cost each of them as much as all of ours:
//! compute nodes have no reason to. What must hold (README): 0.95 of the plain one.
//! `cargo bench --bench fabric -- linux` measures that switch only.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use pavo::config::{Ethernet, Network};
use pavo::host::journal::Journal;
use pavo::host::ovs::Datapath;
use pavo::host::{Host, netns, process, spawn};
use pavo::model::owner::Owner;
use pavo::network::{Fabric, Outside, Peer, Request, Switch, VmNetworks, plan};

/// How long one connection sends.
const SPAN: Duration = Duration::from_millis(200);
const ROUNDS: usize = 41;

fn main() {
    if !nix::unistd::geteuid().is_root() {
        say("SKIPPED: this bench needs root");
        std::process::exit(i32::from(std::env::var_os("CI").is_some()));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    std::thread::spawn(move || bench(&path)).join().expect("the bench failed");
}

fn bench(dir: &Path) {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();

    say(&format!("TCP between hosts, median of {ROUNDS}    pavo     plain    ratio   allowed"));
    let asked: Vec<_> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let is_asked = |name: &str| asked.is_empty() || asked.iter().any(|word| word == name);
    if is_asked("linux") {
        hosts("ours", None);
        hosts("plain", None);
        compare(
            "Linux switch",
            [0, 1].map(|this| ours(dir, "ours", Switch::Linux, this)),
            [0, 1].map(plain),
        );
    }
    if is_asked("ovs") {
        hosts("flows", Some(dir));
        hosts("normal", Some(dir));
        let switch = Switch::Ovs(Datapath::Netdev);
        let ours = [0, 1].map(|this| ours(dir, "flows", switch, this));
        compare("Open vSwitch", ours, [0, 1].map(|this| normal(dir, this)));
    }
}

/// Both ways in turns, so that both see the same of what else the machine does.
fn compare(name: &str, ours: [End; 2], plain: [End; 2]) {
    // Addresses of the underlay are asked for by the first packets.
    send(&ours);
    send(&plain);
    let mut rates: [Vec<f64>; 2] = Default::default();
    for _ in 0..ROUNDS {
        rates[0].push(send(&ours));
        rates[1].push(send(&plain));
    }
    let mut ratios: Vec<f64> = rates[0].iter().zip(&rates[1]).map(|(a, b)| a / b).collect();
    let [ours, plain] = rates.map(|mut rates| median(&mut rates) * 8.0 / 1e9);
    let ratio = median(&mut ratios);
    say(&format!("{name:20}    {ours:8.2} Gb/s {plain:8.2}  {ratio:7.2}   0.95 at least"));
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Two hosts and their guests' namespaces: `NAME0`, `NAME1`, `NAME0-guest` …
fn hosts(name: &str, ovs: Option<&Path>) {
    sh(&format!(
        "for i in 0 1; do ip netns add {name}$i; ip netns add {name}$i-guest; done
         ip link add under netns {name}0 type veth peer name under netns {name}1
         for i in 0 1; do
           ip -n {name}$i link set under up
           ip -n {name}$i link set lo up
           off=/proc/sys/net/bridge/bridge-nf-call-iptables
           ip netns exec {name}$i sh -c \"! [ -e $off ] || echo 0 > $off\"
         done"
    ));
    for this in [0, 1] {
        let host = format!("{name}{this}");
        let link = if let Some(dir) = ovs {
            start_ovs(&host, &dir.join(&host));
            vsctl(
                &dir.join(&host),
                "add-br br-phy -- set bridge br-phy datapath_type=netdev -- add-port br-phy under",
            );
            // The kernel, too, hears ARP on `under`, where it has no address.
            sh(&format!("ip netns exec {host} sysctl -qw net.ipv4.conf.all.arp_ignore=1"));
            "br-phy"
        } else {
            "under"
        };
        sh(&format!(
            "ip -n {host} link set {link} up
             ip -n {host} addr add 192.0.2.{}/24 dev {link}",
            this + 1
        ));
    }
}

/// Open vSwitch of a host's own, until this thread ends.
#[expect(clippy::zombie_processes, reason = "they end with this bench")]
fn start_ovs(host: &str, dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let at = dir.display();
    sh(&format!("ovsdb-tool create {at}/conf.db /usr/share/openvswitch/vswitch.ovsschema"));
    let database = format!("ovsdb-server {at}/conf.db --remote=punix:{at}/db.sock");
    for command in [database, format!("ovs-vswitchd unix:{at}/db.sock")] {
        let mut words = command.split(' ');
        let name = words.next().unwrap();
        let mut child = Command::new("nsenter");
        child.arg(format!("--net=/run/netns/{host}")).arg(name).args(words);
        child.arg(format!("--unixctl={at}/{name}.ctl"));
        child.args(["-vconsole:off", "-vsyslog:off", "-vfile:off"]);
        child.env("OVS_RUNDIR", dir).stdin(Stdio::null());
        spawn::die_with_parent(&mut child);
        child.spawn().unwrap();
        while !dir.join("db.sock").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        vsctl(dir, "--no-wait init");
    }
}

fn vsctl(dir: &Path, words: &str) {
    sh(&format!("ovs-vsctl --timeout=20 --db=unix:{}/db.sock {words}", dir.display()));
}

/// A guest: its namespace and address.
type End = (PathBuf, Ipv4Addr);

/// Puts a guest in the place of a TAP device. Open vSwitch takes no offloads.
fn plug(name: &str, port: &str, bridge: Option<&str>, mac: &str, address: Ipv4Addr) -> End {
    let join = match bridge {
        Some(bridge) => format!("ip -n {name} link set {port} master {bridge}"),
        None => format!("ip netns exec {name}-guest ethtool -K eth0 tx off tso off gso off"),
    };
    sh(&format!(
        "ip -n {name} link add {port} mtu 1450 type veth \
           peer name eth0 mtu 1450 address {mac} netns {name}-guest
         {join}
         ip -n {name} link set {port} up
         ip -n {name}-guest addr add {address}/16 dev eth0
         ip -n {name}-guest link set eth0 up"
    ));
    (format!("/run/netns/{name}-guest").into(), address)
}

fn ours(dir: &Path, name: &str, switch: Switch, this: u8) -> End {
    let networks = vec!["default".to_owned()];
    let vm = |rank: u8| VmNetworks {
        rank: rank.into(),
        nic_model: "virtio-net".into(),
        nic_queues: 1,
        networks: networks.clone(),
    };
    let address = |host: u8| Ipv4Addr::new(192, 0, 2, host + 1);
    let other = 1 - this;
    let request = Request {
        switch,
        owner: Owner::local(3),
        keeper: process::current(),
        tap_uid: 0,
        outside: Outside::Host,
        uplink_slot: 0,
        networks: vec![("default".into(), Network::Ethernet(Ethernet::default()))],
        vms: vec![vm(this)],
        fabric: Some(Fabric {
            keys: vec![0x301],
            address: address(this),
            link: if switch == Switch::Linux { "under" } else { "br-phy" }.into(),
            mtu: 1500,
            peers: vec![Peer {
                node: "other".into(),
                address: address(other),
                switch: switch.kind(),
                vms: vec![vm(other)],
            }],
        }),
    };
    let plan = plan(&request).unwrap();
    let name = format!("{name}{this}");
    let dir = dir.join(&name);
    let apply = || {
        let host = Host::new(dir.join("netns")).with_ovs_dir(dir.clone());
        let journal = Journal::open(dir.join("journal")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(journal.apply(&plan.plan, &host)).unwrap();
    };
    netns::with_netns(Path::new(&format!("/run/netns/{name}")), apply).unwrap();
    let nic = &plan.nics[0].1[0];
    sh(&format!("ip -n {name} link del {}", nic.tap));
    let ipv4 = nic.ipv4.as_ref().unwrap();
    let bridge = (switch == Switch::Linux).then_some("pbl3-0");
    let end = plug(&name, &nic.tap, bridge, &nic.mac.to_string(), ipv4.address);
    if bridge.is_none() {
        // Open vSwitch keeps listening to the TAP device. Flows know the port by its number.
        let tap = &nic.tap;
        vsctl(&dir, &format!("del-port pbl3 {tap}"));
        vsctl(&dir, &format!("add-port pbl3 {tap} -- set interface {tap} ofport_request=1"));
    }
    end
}

fn plain(this: u8) -> End {
    let name = format!("plain{this}");
    sh(&format!(
        "ip -n {name} link add br0 mtu 1450 type bridge
         ip -n {name} link add vx0 mtu 1450 type vxlan id 7 local 192.0.2.{} dstport 4789
         ip netns exec {name} bridge fdb append 00:00:00:00:00:00 dev vx0 dst 192.0.2.{}
         ip -n {name} link set vx0 master br0 up
         ip -n {name} link set br0 up",
        this + 1,
        2 - this
    ));
    let mac = format!("52:54:00:00:00:0{this}");
    plug(&name, "port", Some("br0"), &mac, [10, 200, 0, this + 1].into())
}

/// A bridge of Open vSwitch that learns, and one VXLAN port.
fn normal(dir: &Path, this: u8) -> End {
    let name = format!("normal{this}");
    let mac = format!("52:54:00:00:00:0{this}");
    let end = plug(&name, "port", None, &mac, [10, 200, 0, this + 1].into());
    vsctl(
        &dir.join(&name),
        &format!(
            "add-br br0 -- set bridge br0 datapath_type=netdev -- add-port br0 port \
             -- add-port br0 vx0 -- set interface vx0 type=vxlan options:key=7 \
             options:local_ip=192.0.2.{} options:remote_ip=192.0.2.{}",
            this + 1,
            2 - this
        ),
    );
    end
}

/// Bytes a second of one connection, as its receiver counts them.
fn send([from, to]: &[End; 2]) -> f64 {
    let (netns, address) = to;
    let listener = netns::with_netns(netns, || TcpListener::bind((*address, 0))).unwrap().unwrap();
    let place = listener.local_addr().unwrap();
    let sender = netns::with_netns(&from.0, || TcpStream::connect(place)).unwrap();
    let mut sender = sender.unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    let sending = std::thread::spawn(move || {
        let data = vec![0; 256 << 10];
        let start = Instant::now();
        while start.elapsed() < SPAN {
            sender.write_all(&data).unwrap();
        }
    });
    let mut buffer = vec![0; 256 << 10];
    let (start, mut all) = (Instant::now(), 0);
    loop {
        match receiver.read(&mut buffer).unwrap() {
            0 => break,
            length => all += length,
        }
    }
    sending.join().unwrap();
    all as f64 / start.elapsed().as_secs_f64()
}

fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

#[expect(clippy::print_stdout, reason = "it is what a bench is for")]
fn say(text: &str) {
    println!("{text}");
}
