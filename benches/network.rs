//! 64 taps on an L3 network, set up and removed: our plan and journal against the
//! plain tools doing the same in as few calls as they can.
//!
//! Needs root; runs in namespaces of its own. What must hold (README): set-up and
//! removal at most three times the tools', removal within 60 ms.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use pavo::config::{Ethernet, Network};
use pavo::host::journal::{Journal, Plan};
use pavo::host::nft::Table;
use pavo::host::step::Step;
use pavo::host::{Host, process};
use pavo::model::owner::Owner;
use pavo::network::{Outside, Request, Switch, VmNetworks, plan};
use serde_json::json;

const TAPS: u32 = 64;
const ROUNDS: usize = 15;

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
    // As on a host: journal and namespaces lie in memory. `ip netns` wants its place.
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let host = Host::new("/run/netns".into());
    let journal = Journal::open("/run/pavo").unwrap();
    let plan = sixty_four();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    write_batches(&plan, dir);

    let mut times: [Vec<Duration>; 4] = Default::default();
    for _ in 0..ROUNDS {
        let mut timed = |index: usize, work: &dyn Fn()| {
            let start = Instant::now();
            work();
            times[index].push(start.elapsed());
        };
        timed(0, &|| runtime.block_on(journal.apply(&plan, &host)).unwrap());
        assert_eq!(taps(), TAPS as usize);
        timed(1, &|| runtime.block_on(journal.undo(plan.owner, &host)).unwrap());
        assert_eq!(taps(), 0);
        timed(2, &|| sh(&fs::read_to_string(dir.join("up.sh")).unwrap()));
        assert_eq!(taps(), TAPS as usize);
        timed(3, &|| sh(&fs::read_to_string(dir.join("down.sh")).unwrap()));
        assert_eq!(taps(), 0);
    }
    let [up, down, raw_up, raw_down] = times.map(|mut times| {
        times.sort();
        times[ROUNDS / 2].as_secs_f64() * 1e3
    });
    say(&format!("{TAPS} taps, median of {ROUNDS}    pavo      tools     ratio   allowed"));
    say(&format!("set up               {up:8.1} ms {raw_up:8.1} ms {:7.2}   3", up / raw_up));
    let ratio = down / raw_down;
    say(&format!(
        "removed              {down:8.1} ms {raw_down:8.1} ms {ratio:7.2}   3, and 60 ms"
    ));
}

fn sixty_four() -> Plan {
    let networks = vec!["default".to_owned()];
    let nic_model = "virtio-net".to_owned();
    let vm = |rank| VmNetworks {
        rank,
        nic_model: nic_model.clone(),
        nic_queues: 1,
        networks: networks.clone(),
    };
    let request = Request {
        switch: Switch::Linux,
        owner: Owner::local(3),
        keeper: process::current(),
        tap_uid: 0,
        outside: Outside::Host,
        uplink_slot: 0,
        networks: vec![("default".into(), Network::Ethernet(Ethernet::default()))],
        vms: (0..TAPS).map(vm).collect(),
        fabric: None,
    };
    plan(&request).unwrap().plan
}

/// The same objects, as the input of as few tools as possible: a batch of `ip` for
/// each namespace, one of `nft` for each namespace.
fn write_batches(plan: &Plan, dir: &Path) {
    let (mut ip, mut inside, mut nft, mut nft_inside) = (vec![], vec![], vec![], vec![]);
    let mut namespace = String::new();
    for step in &plan.steps {
        match step {
            Step::Namespace { name } => namespace.clone_from(name),
            Step::NftTables { namespace, tables } => {
                let batch = if namespace.is_some() { &mut nft_inside } else { &mut nft };
                for Table { family, name, objects } in tables {
                    batch.push(json!({ "add": { "table": { "family": family, "name": name } } }));
                    for object in objects {
                        let mut object = object.clone();
                        let inner = object.as_object_mut().unwrap().values_mut().next().unwrap();
                        inner["family"] = json!(family);
                        inner["table"] = json!(name);
                        batch.push(json!({ "add": object }));
                    }
                }
            }
            Step::Bridge { name, mtu, group, .. } => ip.push(format!(
                "link add {name} mtu {mtu} group {group} type bridge mcast_snooping 0\n\
                 link set {name} up"
            )),
            Step::Veth { name, mtu, group, bridge, peer, peer_namespace, .. } => {
                let master = bridge.as_ref().map_or(String::new(), |b| format!("master {b}"));
                ip.push(format!(
                    "link add {name} mtu {mtu} group {group} type veth \
                     peer name {peer} netns {peer_namespace}\nlink set {name} {master} up"
                ));
                inside.push(format!("link set {peer} up"));
            }
            Step::Address { namespace, link, address, bits } => {
                let batch = if namespace.is_some() { &mut inside } else { &mut ip };
                batch.push(format!("addr add {address}/{bits} dev {link}"));
            }
            Step::Neighbours { link, known, .. } => {
                let line = |(address, mac): &(_, _)| {
                    format!("neigh add {address} lladdr {mac} dev {link} nud permanent")
                };
                inside.extend(known.iter().map(line));
            }
            Step::Route { gateway, .. } => inside.push(format!("route add default via {gateway}")),
            Step::LinkUp { link, .. } => inside.push(format!("link set {link} up")),
            Step::Folder { .. } | Step::SharedFolder { .. } => {}
            Step::Sysctl { .. } | Step::Vxlan { .. } | Step::Forwarding { .. } => {}
            Step::NoOffloads { .. } | Step::OvsBridges { .. } | Step::OvsFlows { .. } => {}
            Step::Taps { bridge, mtu, group, names, .. } => {
                let bridge = bridge.as_deref().expect("a Linux bridge");
                for name in names {
                    ip.push(format!(
                        "tuntap add dev {name} mode tap user 0\n\
                         link set {name} mtu {mtu} group {group} master {bridge} up"
                    ));
                }
            }
        }
    }
    for (name, text) in [("ip", ip), ("ip-inside", inside)] {
        fs::write(dir.join(name), text.join("\n") + "\n").unwrap();
    }
    for (name, batch) in [("nft", nft), ("nft-inside", nft_inside)] {
        fs::write(dir.join(name), json!({ "nftables": batch }).to_string()).unwrap();
    }
    let (d, group, owner) = (dir.display(), plan.owner.link_group(), plan.owner);
    let up = format!(
        "ip netns add {namespace}
         nft -j -f {d}/nft
         ip -batch {d}/ip
         ip netns exec {namespace} nft -j -f {d}/nft-inside
         ip -n {namespace} -batch {d}/ip-inside
         echo 1 > /proc/sys/net/ipv4/ip_forward"
    );
    let down = format!(
        "ip link delete group {group}
         ip netns delete {namespace}
         nft 'delete table bridge pavo_{owner}; delete table inet pavo_{owner}'"
    );
    fs::write(dir.join("up.sh"), up).unwrap();
    fs::write(dir.join("down.sh"), down).unwrap();
}

fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

fn taps() -> usize {
    let output = Command::new("ip").args(["-o", "link", "show", "type", "tun"]).output().unwrap();
    output.stdout.iter().filter(|byte| **byte == b'\n').count()
}

#[expect(clippy::print_stdout, reason = "it is what a bench is for")]
fn say(text: &str) {
    println!("{text}");
}
