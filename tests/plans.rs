//! Whole network plans, compared with files that people read.
//!
//! After an intended change: `PAVO_UPDATE_GOLDEN=1 cargo test --test plans`, and read
//! the difference as carefully as the code.

use std::fs;
use std::path::Path;

use pavo::config::{Ethernet, Layer, Network, Network6};
use pavo::error::Kind;
use pavo::host::journal::Plan;
use pavo::host::nft;
use pavo::host::ovs::Datapath;
use pavo::host::ovs::flows::FlowTable;
use pavo::host::step::Step;
use pavo::model::job::ProcessId;
use pavo::model::owner::{Manager, Owner};
use pavo::network::{Fabric, Guest, Outside, Peer, Request, Switch, SwitchKind, VmNetworks, plan};
use serde_json::Value;

fn request(vms: u32, networks: &[(&str, Network)]) -> Request {
    let names: Vec<String> = networks.iter().map(|(name, _)| (*name).to_owned()).collect();
    let vm = |rank| VmNetworks {
        rank,
        nic_model: "virtio-net".into(),
        nic_queues: 1,
        networks: names.clone(),
    };
    Request {
        switch: Switch::Linux,
        owner: Owner::local(3),
        keeper: ProcessId { pid: 4711, start_time: 815 },
        tap_uid: 0,
        outside: Outside::Host,
        uplink_slot: 5,
        networks: networks.iter().map(|(name, n)| ((*name).to_owned(), n.clone())).collect(),
        vms: (0..vms).map(vm).collect(),
        fabric: None,
    }
}

fn l3() -> Network {
    Network::Ethernet(Ethernet::default())
}

fn l2() -> Network {
    Network::Ethernet(Ethernet { layer: Layer::L2, mtu: 9000, ..Ethernet::default() })
}

/// The request of one host of several: node `this` of 192.0.2.1, .2 … with `vms` each.
fn across(request: Request, this: usize, vms: &[u32]) -> Request {
    let networks: Vec<String> = request.networks.iter().map(|(name, _)| name.clone()).collect();
    let vm = |rank| VmNetworks {
        rank,
        nic_model: "virtio-net".into(),
        nic_queues: 1,
        networks: networks.clone(),
    };
    let mut next = 0;
    let mut hosts: Vec<Peer> = (0..)
        .zip(vms)
        .map(|(index, count)| {
            let ranks = next..next + count;
            next = ranks.end;
            let address = [192, 0, 2, index + 1].into();
            let (node, switch) = (format!("n{index}"), request.switch.kind());
            Peer { node, address, switch, vms: ranks.map(vm).collect() }
        })
        .collect();
    let own = hosts.remove(this);
    let fabric = Fabric {
        keys: (0..).map(|index| 0x00ab_cd00 + index).take(networks.len()).collect(),
        address: own.address,
        link: "eth0".into(),
        mtu: 1500,
        peers: hosts,
    };
    let owner = Owner { manager: Manager::Slurm, job: 42 };
    Request { owner, vms: own.vms, fabric: Some(fabric), tap_uid: 1000, ..request }
}

/// JSON with a line for each step, and for each object of a table.
fn render(plan: &Plan) -> String {
    let line = |value: &Value| serde_json::to_string(value).unwrap();
    let list = |lines: Vec<String>, indent: &str| {
        format!("[\n{indent}  {}\n{indent}]", lines.join(&format!(",\n{indent}  ")))
    };
    let table = |table: &nft::Table| {
        let objects = list(table.objects.iter().map(line).collect(), "    ");
        let (family, name) = (table.family.as_str(), &table.name);
        format!(r#"{{"family":"{family}","name":"{name}","objects":{objects}}}"#)
    };
    let step = |step: &Step| match step {
        Step::NftTables { namespace, tables } => {
            let tables = list(tables.iter().map(table).collect(), "  ");
            let namespace = line(&serde_json::json!(namespace));
            format!(r#"{{"nft-tables":{{"namespace":{namespace},"tables":{tables}}}}}"#)
        }
        Step::OvsFlows { tables } => {
            let table = |table: &FlowTable| {
                let flows = list(
                    table.flows.iter().map(|flow| line(&flow.as_str().into())).collect(),
                    "    ",
                );
                let (bridge, meters) = (&table.bridge, line(&serde_json::json!(table.meters)));
                format!(r#"{{"bridge":"{bridge}","meters":{meters},"flows":{flows}}}"#)
            };
            let tables = list(tables.iter().map(table).collect(), "  ");
            format!(r#"{{"ovs-flows":{{"tables":{tables}}}}}"#)
        }
        other => line(&serde_json::to_value(other).unwrap()),
    };
    list(plan.steps.iter().map(step).collect(), "") + "\n"
}

fn compare(name: &str, request: &Request) {
    let plan = plan(request).unwrap().plan;
    let found = render(&plan);
    // What is compared is what is journalled.
    let steps: Value = serde_json::from_str(&found).unwrap();
    assert_eq!(steps, serde_json::to_value(&plan.steps).unwrap());
    let path = Path::new("tests/golden/plans").join(name);
    if std::env::var_os("PAVO_UPDATE_GOLDEN").is_some() {
        fs::write(&path, &found).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    let difference = expected
        .lines()
        .zip(found.lines())
        .find(|(expected, found)| expected != found)
        .map(|(expected, found)| format!("expected {expected}\n   found {found}"));
    assert!(
        expected == found,
        "{}:\n{}\nto accept: PAVO_UPDATE_GOLDEN=1 cargo test --test plans",
        path.display(),
        difference.unwrap_or_else(|| "one has more lines than the other".into())
    );
}

#[test]
fn two_vms_on_one_network_in_a_cell() {
    let gateway = [10, 250, 0, 1].into();
    let outside = Outside::Pasta { link: "pasta0".into(), gateway };
    compare("ethernet-l3-cell.json", &Request { outside, ..request(2, &[("default", l3())]) });
}

fn l3_with_ipv6() -> Network {
    Network::Ethernet(Ethernet { int_network6: Some(Network6::Auto), ..Ethernet::default() })
}

#[test]
fn two_hosts_of_a_job_with_ipv6() {
    compare("ethernet-l3-ipv6.json", &across_of(0));
    let all = [0, 1].map(|this| plan(&across_of(this)).unwrap());
    // Each host knows what the other's guests have, and all have one prefix.
    assert_eq!(all[0].l3[0].prefix6, all[1].l3[0].prefix6);
    let addresses = |guests: &[Guest]| guests.iter().map(|g| g.address6).collect::<Vec<_>>();
    assert_eq!(addresses(&all[0].l3[0].others), addresses(&all[1].l3[0].guests));
    let nics = all.iter().flat_map(|plan| &plan.nics).flat_map(|(_, nics)| nics);
    for (nic, rank) in nics.zip(0..) {
        let ipv6 = nic.ipv6.unwrap();
        assert_eq!(Some(ipv6.address), ipv6.prefix.guest(rank));
    }
}

fn across_of(this: usize) -> Request {
    across(request(0, &[("default", l3_with_ipv6())]), this, &[2, 1])
}

#[test]
fn ipv6_is_refused_where_it_could_not_be_guarded() {
    let ovs = Request { switch: Switch::Ovs(Datapath::System), ..across_of(0) };
    let mut there = across_of(0);
    there.fabric.as_mut().unwrap().peers[0].switch = SwitchKind::Ovs;
    let mut tight = across_of(0);
    tight.fabric.as_mut().unwrap().mtu = 1329;
    for (request, text) in [
        (ovs, "Open vSwitch does not carry IPv6 yet, which network `default` has"),
        (there, "Open vSwitch does not carry IPv6 yet, which network `default` has"),
        (tight, "guests of network `default` have an MTU of 1279, too small for IPv6"),
    ] {
        let error = plan(&request).err().unwrap_or_else(|| panic!("{text}"));
        assert_eq!((error.kind(), error.to_string().as_str()), (Kind::Config, text));
    }
}

#[test]
fn two_vms_on_one_network_of_a_host_without_a_way_out() {
    let closed = Ethernet { allow_outbound: false, ..Ethernet::default() };
    let owner = Owner { manager: Manager::Slurm, job: 42 };
    let request = request(2, &[("default", Network::Ethernet(closed))]);
    compare("ethernet-l3-host-closed.json", &Request { owner, tap_uid: 1000, ..request });
}

#[test]
fn a_network_without_addresses() {
    compare("ethernet-l2.json", &request(2, &[("raw", l2())]));
}

#[test]
fn one_vm_on_three_networks() {
    compare("ethernet-three.json", &request(1, &[("a", l3()), ("raw", l2()), ("b", l3())]));
}

#[test]
fn the_second_of_two_hosts() {
    compare("ethernet-l3-two-hosts.json", &across(request(0, &[("default", l3())]), 1, &[2, 1]));
}

#[test]
fn the_first_of_three_hosts_with_two_networks() {
    let request = request(0, &[("default", l3()), ("raw", l2())]);
    compare("ethernet-three-hosts.json", &across(request, 0, &[1, 2, 1]));
}

/// What all hosts of a job must agree on.
#[test]
fn each_host_knows_of_the_others_guests_what_they_know_of_themselves() {
    let networks = [("a", l3()), ("raw", l2())];
    let plans: Vec<_> = (0..3)
        .map(|this| plan(&across(request(0, &networks), this, &[2, 3, 1])).unwrap())
        .collect();
    let own: Vec<_> = plans.iter().flat_map(|plan| plan.l3[0].guests.clone()).collect();
    assert_eq!(own.iter().map(|guest| guest.rank).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    for plan in &plans {
        let l3 = &plan.l3[0];
        let mut all = [&l3.guests[..], &l3.others[..]].concat();
        all.sort_by_key(|guest| guest.rank);
        let known = |guest: &Guest| (guest.rank, guest.mac, guest.address);
        assert_eq!(
            all.iter().map(known).collect::<Vec<_>>(),
            own.iter().map(known).collect::<Vec<_>>()
        );
        assert_eq!(
            (l3.gateway, l3.gateway_mac),
            (plans[0].l3[0].gateway, plans[0].l3[0].gateway_mac)
        );
        assert_eq!(l3.mtu, 1450);
        assert!(plan.nics.iter().flat_map(|(_, nics)| nics).all(|nic| nic.mtu == 1450));
    }
}

#[test]
fn a_tunnel_is_only_where_other_hosts_have_guests() {
    let tunnels = |request: &Request| {
        let steps = plan(request).unwrap().plan.steps.into_iter();
        let tunnels = steps.filter_map(|step| match step {
            Step::Vxlan { name, key, mtu, .. } => Some((name, key, mtu)),
            _ => None,
        });
        tunnels.collect::<Vec<_>>()
    };
    let mut request = across(request(0, &[("a", l3()), ("raw", l2())]), 0, &[2, 1]);
    let keys = [("px42-0".to_owned(), 0x00ab_cd00, 1450), ("px42-1".to_owned(), 0x00ab_cd01, 1450)];
    assert_eq!(tunnels(&request), keys);
    // Of what a jumbo underlay carries, guests get what is configured.
    request.fabric.as_mut().unwrap().mtu = 9000;
    let mtus: Vec<_> = tunnels(&request).into_iter().map(|(_, _, mtu)| mtu).collect();
    assert_eq!(mtus, [1500, 8950]);
    // A network that is on this host only is as on one host.
    request.fabric.as_mut().unwrap().peers[0].vms[0].networks.remove(1);
    request.fabric.as_mut().unwrap().mtu = 1500;
    assert_eq!(tunnels(&request), keys[..1]);
    let nics = plan(&request).unwrap().nics;
    assert_eq!(nics[0].1.iter().map(|nic| nic.mtu).collect::<Vec<_>>(), [1450, 9000]);
    // Without others all is as without a fabric.
    request.fabric.as_mut().unwrap().peers.clear();
    let alone = Request { fabric: None, ..request.clone() };
    assert_eq!(plan(&request).unwrap().plan, plan(&alone).unwrap().plan);
}

#[test]
fn a_fabric_that_cannot_be_is_refused_with_the_reason() {
    let with = |change: fn(&mut Fabric)| {
        let mut request = across(request(0, &[("a", l3()), ("raw", l2())]), 0, &[2, 1, 1]);
        change(request.fabric.as_mut().unwrap());
        request
    };
    let full = across(request(0, &[("n", l3())]), 0, &[1022, 1]);
    let keys = "each network needs a VXLAN key of its own";
    let cases = [
        (with(|f| f.mtu = 117), Kind::System, "the MTU of `eth0`, 117, is too small for VXLAN"),
        (with(|f| f.keys[1] = f.keys[0]), Kind::Bug, keys),
        (with(|f| f.keys.truncate(1)), Kind::Bug, keys),
        (with(|f| f.keys[0] = 1 << 24), Kind::Bug, keys),
        (with(|f| f.keys[0] = 0), Kind::Bug, keys),
        (with(|f| f.peers[0].address = f.address), Kind::System, "the address 192.0.2.1"),
        (with(|f| f.peers[0].address = f.peers[1].address), Kind::System, "two hosts of the job"),
        (with(|f| f.peers[1].vms[0].rank = 1), Kind::Bug, "vm1 runs on two hosts"),
        (with(|f| f.peers[1].vms[0].rank = 70_000), Kind::Config, "no address for vm70000"),
        (full, Kind::Usage, "more than 1023 ports on network `n`"),
    ];
    for (request, kind, text) in cases {
        let error = plan(&request).err().unwrap_or_else(|| panic!("{text}"));
        assert!(error.to_string().contains(text), "{error:?} is not {text}");
        assert_eq!(error.kind(), kind, "{error:?}");
    }
    assert!(plan(&across(request(0, &[("n", l3())]), 0, &[1021, 1])).is_ok());
}

#[test]
fn three_vms_of_two_hosts_on_open_vswitch() {
    let request = request(0, &[("default", l3()), ("raw", l2())]);
    let switch = Switch::Ovs(Datapath::Netdev);
    let request = Request { switch, ..across(request, 0, &[2, 1]) };
    compare("ovs-two-hosts.json", &request);
    let plan = plan(&request).unwrap();
    assert!(plan.nics.iter().flat_map(|(_, nics)| nics).all(|nic| !nic.offloads));
}

#[test]
fn open_vswitch_in_the_kernel_takes_offloads_and_marks_what_it_sends() {
    let request = across(request(0, &[("default", l3())]), 0, &[1, 1]);
    let text = |datapath| {
        let plan = plan(&Request { switch: Switch::Ovs(datapath), ..request.clone() }).unwrap();
        (render(&plan.plan), plan.nics[0].1[0].offloads)
    };
    let (netdev, system) = (text(Datapath::Netdev), text(Datapath::System));
    assert_eq!((netdev.1, system.1), (false, true));
    assert!(netdev.0.contains("no-offloads") && !system.0.contains("no-offloads"));
    // The rest is the same.
    let same = netdev.0.replace("netdev", "system");
    let lines = same.lines().filter(|line| !line.contains("no-offloads"));
    assert!(lines.eq(system.0.lines()));
}

#[test]
fn nics_are_in_the_order_the_vm_lists_them() {
    let mut request = request(2, &[("a", l3()), ("raw", l2())]);
    request.vms[1].networks.reverse();
    request.vms[0].networks.truncate(1);
    let plan = plan(&request).unwrap();
    let nics: Vec<_> = plan
        .nics
        .iter()
        .flat_map(|(rank, nics)| nics.iter().map(move |nic| (*rank, nic)))
        .map(|(rank, nic)| format!("vm{rank} {} {} {}", nic.network, nic.tap, nic.mac))
        .collect();
    let expected = [
        "vm0 a ptl3-0 52:54:00:00:00:00",
        "vm1 raw ptl3-1 52:54:00:00:00:01",
        "vm1 a ptl3-2 52:54:00:00:00:01",
    ];
    assert_eq!(nics, expected);
    let l3 = &plan.l3[0];
    let guests: Vec<_> =
        l3.guests.iter().map(|guest| (guest.rank, guest.address.to_string())).collect();
    assert_eq!(guests, [(0, "10.200.0.1".to_owned()), (1, "10.200.0.2".to_owned())]);
    assert_eq!((l3.namespace.as_str(), l3.interface.as_str()), ("pnl3-0", "guests"));
}

#[test]
fn networks_nobody_uses_are_not_made_whatever_they_are() {
    let broken = Network::Unsupported { kind: "infiniband".into() };
    let mut request = request(1, &[("ib", broken), ("default", l3())]);
    request.vms[0].networks.remove(0);
    let plan = plan(&request).unwrap();
    assert_eq!(plan.l3[0].namespace, "pnl3-1");
    request.vms.clear();
    assert_eq!(pavo::network::plan(&request).unwrap().plan.steps, []);
}

#[test]
fn what_cannot_be_planned_is_refused_with_the_reason() {
    let ethernet = |change: fn(&mut Ethernet)| {
        let mut ethernet = Ethernet::default();
        change(&mut ethernet);
        Network::Ethernet(ethernet)
    };
    let unknown = {
        let mut request = request(1, &[("default", l3())]);
        request.vms[0].networks = vec!["defualt".into()];
        request
    };
    let twice = {
        let mut request = request(1, &[("default", l3())]);
        request.vms[0].networks.push("default".into());
        request
    };
    let many: Vec<(&str, Network)> = ["a", "b", "c", "d", "e", "f", "g", "h", "i"]
        .into_iter()
        .map(|name| (name, l3()))
        .collect();
    let small = ethernet(|e| e.int_network = "192.168.7.0/29".parse().unwrap());
    let overlap = ethernet(|e| e.ext_network = "10.200.8.0/24".parse().unwrap());
    let tight = ethernet(|e| e.ext_network = "10.201.0.0/26".parse().unwrap());
    let offset = ethernet(|e| e.mac_start_offset = 0xff_fffe);
    let infiniband = Network::Unsupported { kind: "infiniband".into() };
    let cases = [
        (unknown, Kind::Config, "there is no network `defualt`"),
        (twice, Kind::Config, "network `default` is listed twice for one VM"),
        (request(1, &[("ib", infiniband)]), Kind::Config, "network `ib` has the type `infiniband`"),
        (request(6, &[("n", small)]), Kind::Config, "network `n` (192.168.7.0/29) has no address"),
        (request(1, &[("n", overlap)]), Kind::Config, "`int-network` 10.200.0.0/16 and"),
        (request(1, &[("n", tight)]), Kind::Config, "has no addresses left for one more job"),
        (request(1, &[("n", offset)]), Kind::Config, "network `n` has no MAC address for vm0"),
        (request(1, &many), Kind::Usage, "a job may use 8 L3 networks on a host"),
        (request(1023, &[("n", l3())]), Kind::Usage, "more than 1023 ports on network `n`"),
    ];
    for (request, kind, text) in cases {
        let error = plan(&request).err().unwrap_or_else(|| panic!("{text}"));
        assert!(error.to_string().contains(text), "{error:?} is not {text}");
        assert_eq!(error.kind(), kind, "{error:?}");
    }
    assert!(plan(&request(1022, &[("n", l3())])).is_ok());
    let many: Vec<(&str, Network)> = many.into_iter().map(|(name, _)| (name, l2())).collect();
    let owner = Owner { manager: Manager::Slurm, job: 99_999_999 };
    let error = plan(&Request { owner, ..request(1112, &many) }).err().unwrap().to_string();
    assert_eq!(error, "`pt99999999-10000` is longer than the 15 characters of a link's name");
}

#[test]
fn jobs_of_one_host_share_neither_names_nor_uplinks() {
    let words = |owner, uplink_slot| {
        let request = Request { owner, uplink_slot, ..request(2, &[("a", l3()), ("b", l3())]) };
        let mut names = Vec::new();
        for step in plan(&request).unwrap().plan.steps {
            match step {
                Step::Namespace { name } | Step::Bridge { name, .. } => names.push(name),
                Step::Veth { name, .. } => names.push(name),
                Step::Taps { names: taps, .. } => names.extend(taps),
                Step::Address { namespace: None, address, .. } => names.push(address.to_string()),
                Step::NftTables { namespace: None, tables } => {
                    names.extend(tables.iter().map(|t| format!("{:?} {}", t.family, t.name)));
                }
                _ => {}
            }
        }
        names
    };
    let slurm = Owner { manager: Manager::Slurm, job: 3 };
    let [a, b] = [words(Owner::local(3), 0), words(slurm, 1)];
    assert_eq!(a.len(), b.len());
    assert!(a.iter().all(|name| !b.contains(name)), "{a:?} {b:?}");
    assert_eq!(a.iter().collect::<std::collections::BTreeSet<_>>().len(), a.len());
}
