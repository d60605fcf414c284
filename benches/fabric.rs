//! TCP between guests of two hosts: over our switch with all its rules, against a plain
//! bridge and VXLAN device without any.
//!
//! Needs root; runs in namespaces of its own. Guests are namespaces, behind a veth that has
//! the place and the name of the TAP device. The hosts do not pass bridged frames to the
//! rules for IP packets (`br_netfilter`), which cost each of them as much as all of ours:
//! compute nodes have no reason to. What must hold (README): 0.95 of the plain one.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use pavo::config::{Ethernet, Network};
use pavo::host::journal::Journal;
use pavo::host::{Host, netns, process};
use pavo::model::owner::Owner;
use pavo::network::{Fabric, Outside, Peer, Request, Switch, SwitchKind, VmNetworks, plan};

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

    hosts("ours");
    let ours = [0, 1].map(|this| ours(dir, this));
    hosts("plain");
    let plain = [0, 1].map(plain);

    let mut rates: [Vec<f64>; 2] = Default::default();
    for _ in 0..ROUNDS {
        rates[0].push(send(&ours));
        rates[1].push(send(&plain));
    }
    let mut ratios: Vec<f64> = rates[0].iter().zip(&rates[1]).map(|(a, b)| a / b).collect();
    let [ours, plain] = rates.map(|mut rates| median(&mut rates) * 8.0 / 1e9);
    let ratio = median(&mut ratios);
    say(&format!("TCP between hosts, median of {ROUNDS}    pavo     plain    ratio   allowed"));
    say(&format!(
        "Linux switch            {ours:8.2} Gb/s {plain:8.2}  {ratio:7.2}   0.95 at least"
    ));
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Two hosts and their guests' namespaces: `NAME0`, `NAME1`, `NAME0-guest` …
fn hosts(name: &str) {
    sh(&format!(
        "for i in 0 1; do ip netns add {name}$i; ip netns add {name}$i-guest; done
         ip link add under netns {name}0 type veth peer name under netns {name}1
         for i in 0 1; do
           ip -n {name}$i addr add 192.0.2.$((i + 1))/24 dev under
           ip -n {name}$i link set under up
           ip -n {name}$i link set lo up
           off=/proc/sys/net/bridge/bridge-nf-call-iptables
           ip netns exec {name}$i sh -c \"! [ -e $off ] || echo 0 > $off\"
         done"
    ));
}

/// A guest: its namespace and address.
type End = (PathBuf, Ipv4Addr);

/// Puts a guest in the place of a TAP device.
fn plug(name: &str, port: &str, bridge: &str, mac: &str, address: Ipv4Addr) -> End {
    sh(&format!(
        "ip -n {name} link add {port} mtu 1450 type veth \
           peer name eth0 mtu 1450 address {mac} netns {name}-guest
         ip -n {name} link set {port} master {bridge} up
         ip -n {name}-guest addr add {address}/16 dev eth0
         ip -n {name}-guest link set eth0 up"
    ));
    (format!("/run/netns/{name}-guest").into(), address)
}

fn ours(dir: &Path, this: u8) -> End {
    let networks = vec!["default".to_owned()];
    let vm = |rank: u8| VmNetworks {
        rank: rank.into(),
        nic_model: "virtio-net".into(),
        networks: networks.clone(),
    };
    let address = |host: u8| Ipv4Addr::new(192, 0, 2, host + 1);
    let other = 1 - this;
    let request = Request {
        switch: Switch::Linux,
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
            link: "under".into(),
            mtu: 1500,
            peers: vec![Peer {
                node: "other".into(),
                address: address(other),
                switch: SwitchKind::Linux,
                vms: vec![vm(other)],
            }],
        }),
    };
    let plan = plan(&request).unwrap();
    let name = format!("ours{this}");
    let dir = dir.join(&name);
    let apply = || {
        let host = Host::new(dir.join("netns"));
        let journal = Journal::open(dir.join("journal")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(journal.apply(&plan.plan, &host)).unwrap();
    };
    netns::with_netns(Path::new(&format!("/run/netns/{name}")), apply).unwrap();
    let nic = &plan.nics[0].1[0];
    sh(&format!("ip -n {name} link del {}", nic.tap));
    let ipv4 = nic.ipv4.as_ref().unwrap();
    plug(&name, &nic.tap, "pbl3-0", &nic.mac.to_string(), ipv4.address)
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
    plug(&name, "port", "br0", &mac, [10, 200, 0, this + 1].into())
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
