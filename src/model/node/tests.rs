//! What settings, edits and an inventory are to be.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;

use super::edit::Edit;
use super::inventory::Inventory;
use super::records::Record;
use super::request::Noun;
use super::*;
use crate::model::nodeset::NodeSet;
use crate::model::nodeset::expr::Test;
use crate::model::nodeset::fold::Style;

/// A node with these changes.
fn node(edits: &[&str]) -> Settings {
    let mut tree = Tree::new();
    for edit in edits {
        let edit =
            Edit::parse(Noun::Node, edit).unwrap_or_else(|error| panic!("{}", error.report()));
        edit.apply("node12", &mut tree).unwrap_or_else(|error| panic!("{}", error.report()));
    }
    Settings::from_tree(tree).unwrap()
}

fn tree(edits: &[&str]) -> Value {
    Value::Object(node(edits).tree().unwrap())
}

#[test]
fn paths_set_add_take_and_remove() {
    for (edits, settings) in [
        (&["arch=x86_64", "mgt=ipmi"][..], json!({"arch": "x86_64", "mgt": "ipmi"})),
        (&["control/bmc_address=10.0.0.1"], json!({"control": {"bmc_address": "10.0.0.1"}})),
        (&["control_info/bmc_port=623"], json!({"control": {"bmc_port": 623}})),
        (&["control/bmc_username=a", "control/bmc_username="], json!({})),
        (
            &["nics/eth0/mac=42:87:0A:05:65:0"],
            json!({"nics": {"eth0": {"mac": "42:87:0a:05:65:00"}}}),
        ),
        (&["nics/eth0/ip=10.1.{n/250}.{n%250+1}"], json!({"nics": {"eth0": {"ip": "10.1.0.13"}}})),
        (
            &["nics/eth0/ip=10.0.0.1", "nics/eth1/ip=10.0.0.2", "nics/eth0="],
            json!({"nics": {"eth1": {"ip": "10.0.0.2"}}}),
        ),
        (
            &[r#"nics={"ib0": {"ip": "10.0.0.1", "primary": true}}"#],
            json!({"nics": {"ib0": {"ip": "10.0.0.1", "primary": true}}}),
        ),
        (&["nics/eth0/extra/slot=7"], json!({"nics": {"eth0": {"extra": {"slot": 7}}}})),
        (&["tags=gpu,old", "tags+=new", "tags-=old"], json!({"tags": ["gpu", "new"]})),
        (&[r#"tags=["b", "a"]"#, "tags+=a"], json!({"tags": ["a", "b"]})),
        (&["tags+=a", "tags-=a"], json!({})),
        (&["groups=rack2,rack1", "groups+=rack2"], json!({"groups": ["rack1", "rack2"]})),
        (&["notes=7"], json!({"notes": "7"})),
        (&["notes=007 = {{x}}"], json!({"notes": "007 = {x}"})),
        (&["notes={node} is number {n1:03d}"], json!({"notes": "node12 is number 012"})),
        (
            &["console/log=yes", "console/speed=115200"],
            json!({"console": {"log": true, "speed": 115_200}}),
        ),
        (&["arch=null", "type=node"], json!({"type": "node"})),
    ] {
        assert_eq!(tree(edits), settings, "{edits:?}");
    }
}

#[test]
fn what_cannot_be_set_is_said_with_the_nearest_that_can() {
    for (edit, why) in [
        ("arhc=x86_64", "there is no setting `arhc`; did you mean `arch`?"),
        ("control/bmc_adress=x", "did you mean `control/bmc_address`?"),
        ("nics/eth0/amc=x", "did you mean `nics/eth0/mac`?"),
        ("nics/e th/mac=x", "`e th` cannot be an interface's name"),
        ("name=x", "`name` cannot be changed"),
        ("arch/x=y", "`arch` has nothing below it"),
        ("control=x", "it has settings of its own: control/bmc_address"),
        ("mgt=impi", "`impi` is not known; did you mean `ipmi`?"),
        ("netboot=zzz", "`zzz` is not one of pxe"),
        ("nics/eth0/mac=42:87", "`42:87` is not a MAC address"),
        ("nics/eth0/ip=10.0.0.256", "`10.0.0.256` is not an IP address"),
        ("control/bmc_port=0", "`0` is not a port"),
        ("control/bmc_address=a/b", "`a/b` is not an address or a host's name"),
        ("arch+=x", "`+=` is for lists"),
        ("tags+=a b", "`a b` is not a name"),
        ("console/log=maybe", "`maybe` is not `true` or `false`"),
        ("nics/eth0/ip=10.{m}", "`m` is neither `n`"),
        ("tags={n}", "a list has no expressions"),
        ("notes=\u{1b}[1m", "is not a text that can be shown"),
        ("zzzzzzz=1", "there are arch, mgt,"),
        (r#"control={"bmc_adress": "x"}"#, "did you mean `control/bmc_address`?"),
        ("arch", "is no change of a setting"),
    ] {
        let report = Edit::parse(Noun::Node, edit).expect_err(edit).report();
        assert!(report.contains(why), "{edit}: {report}");
    }
    let edit = Edit::parse(Noun::Node, "nics/eth0/ip=10.0.0.{n}").unwrap();
    let error = edit.apply("node256", &mut Tree::new()).unwrap_err();
    assert_eq!(error.to_string(), "`nics/eth0/ip` of `node256`: `10.0.0.256` is not an IP address");
    assert!(edit.apply("login", &mut Tree::new()).unwrap_err().to_string().contains("no number"));
}

#[test]
fn secrets_are_sealed_before_they_are_kept_and_never_repeated() {
    let mut seal = |secret: &str| Ok(format!("sealed:{}", secret.len()));
    for (edit, sealed) in [
        ("control/bmc_password=pass{word", "sealed:9"),
        ("control/bmc_password=12345", "sealed:5"),
        (r#"control={"bmc_password": "secret"}"#, "sealed:6"),
    ] {
        let mut edit = Edit::parse(Noun::Node, edit).unwrap();
        edit.seal(&mut seal).unwrap();
        let mut tree = Tree::new();
        edit.apply("n1", &mut tree).unwrap();
        assert_eq!(
            Settings::from_tree(tree).unwrap().control.bmc_password.as_deref(),
            Some(sealed)
        );
    }
    for edit in ["control/bmc_passwd=hunter2", r#"control={"bmc_pasword": "hunter2"}"#] {
        assert!(!Edit::parse(Noun::Node, edit).unwrap_err().report().contains("hunter2"), "{edit}");
    }
    let tree = json!({"control": {"bmc_password": "hunter2"}});
    let wrong = schema::check(Noun::Node, tree.as_object().unwrap().clone()).unwrap_err();
    assert_eq!(
        wrong,
        [("control/bmc_password".to_owned(), "this secret is not sealed".to_owned())]
    );
}

fn inventory() -> Inventory {
    let mut inventory = Inventory::default();
    let mut add = |name: &str, edits: &[&str]| inventory.put(name, node(edits).into());
    add("n1", &["groups=rack1", "arch=x86_64", "nics/eth0/mac=42:00:00:00:00:01"]);
    add("n2", &["groups=rack1,gpu", "nics/eth0/ip=10.0.0.2"]);
    add("n3", &["profiles=base", "tags=new"]);
    let rack1 = node(&["arch=ppc64le", "mgt=ipmi", "profiles=base"]);
    inventory.groups.insert("rack1".into(), rack1.into());
    let gpu = node(&["mgt=redfish", "control/bmc_port=443"]);
    inventory.groups.insert("gpu".into(), gpu.into());
    let base = node(&["netboot=pxe", "mgt=kvm", "tags=all", "control/bmc_username=admin"]);
    inventory.profiles.insert("base".into(), base.into());
    inventory
}

#[test]
fn a_node_inherits_from_its_groups_and_then_from_profiles() {
    let inventory = inventory();
    let of = |name: &str| inventory.effective(&inventory.nodes[name]).unwrap();
    let n1 = of("n1");
    assert_eq!((n1.arch.as_deref(), n1.mgt.as_deref()), (Some("x86_64"), Some("ipmi")));
    assert_eq!(n1.netboot.as_deref(), Some("pxe"));
    let n2 = of("n2");
    assert_eq!((n2.arch.as_deref(), n2.mgt.as_deref()), (Some("ppc64le"), Some("ipmi")));
    assert_eq!(
        (n2.control.bmc_port, n2.control.bmc_username.as_deref()),
        (Some(443), Some("admin"))
    );
    let n3 = of("n3");
    assert_eq!(n3.mgt.as_deref(), Some("kvm"));
    assert_eq!(n3.tags.iter().map(String::as_str).collect::<Vec<_>>(), ["all", "new"]);
    assert_eq!(n3.groups, Vec::<String>::new());
}

#[test]
fn nodes_are_found_by_groups_and_by_what_they_inherit() {
    let inventory = inventory();
    assert_eq!(inventory.members("rack1").fold(Style::Slurm), "n[1-2]");
    assert_eq!(inventory.group_names(), ["gpu", "rack1"]);
    for (path, test, value, nodes) in [
        ("arch", Test::Is, "ppc64le", "n2"),
        ("mgt", Test::IsNot, "ipmi", "n3"),
        ("mgt", Test::Matches, "^(kvm|ipmi)$", "n[1-3]"),
        ("tags", Test::Is, "new", "n3"),
        ("control_info/bmc_port", Test::Is, "443", "n2"),
        ("nics/eth0/mac", Test::Is, "42-00-00-00-00-01", "n1"),
        ("arch", Test::Is, "arm64", ""),
    ] {
        let found: NodeSet =
            inventory.having(Noun::Node, path, test, value).unwrap().into_iter().collect();
        assert_eq!(found.fold(Style::Slurm), nodes, "{path}{}{value}", test.as_str());
    }
    assert!(inventory.having(Noun::Node, "arhc", Test::Is, "x").is_err());
    assert!(inventory.having(Noun::Node, "control/bmc_password", Test::Matches, "^a").is_err());
}

#[test]
fn who_is_in_a_group_is_known_after_every_change() {
    let mut inventory = inventory();
    let before = inventory.to_read();
    inventory.put("n1", node(&["groups=gpu,new"]).into());
    let of = |inventory: &Inventory, group| inventory.members(group).fold(Style::Slurm);
    assert_eq!(of(&inventory, "gpu"), "n[1-2]");
    assert_eq!(of(&inventory, "rack1"), "n2");
    assert_eq!(inventory.group_names(), ["gpu", "new", "rack1"]);
    assert!(inventory.remove("n1") && inventory.remove("n2"));
    // One that only members name is gone with the last of them.
    assert_eq!(inventory.group_names(), ["gpu", "rack1"]);
    assert!(inventory.get(Noun::Group, "new").is_none());
    assert!(inventory.get(Noun::Group, "gpu").is_some());
    assert_eq!(of(&inventory, "gpu"), "");
    assert_eq!((of(&before, "gpu"), of(&before, "rack1")), ("n2".into(), "n[1-2]".into()));
}

#[test]
fn settings_are_kept_as_they_are_stored() {
    let settings = node(&["groups=a,b", "nics/e/network=x", "project=p", "control/passwd=w"]);
    let packed = Packed::from(&settings);
    assert_eq!(packed.open(), settings);
    assert_eq!(packed.tree().unwrap(), settings.tree().unwrap());
    assert_eq!(Packed::read(packed.json().as_bytes()).unwrap(), packed);
    // An odd text of nothing, which would be no tree.
    let odd = Packed::read(br#"{"console": [], "control": [], "groups": []}"#).unwrap();
    assert_eq!((odd.json(), odd.tree().unwrap()), ("{}", Tree::new()));
    assert_eq!(Packed::read(b"[]").unwrap(), Packed::default());
    for wrong in ["", "0", r#"{"arhc": "x"}"#, r#"{"nics": null}"#] {
        assert!(Packed::read(wrong.as_bytes()).is_err(), "{wrong}");
    }
    assert!(Packed::read(b"{\"notes\": \"\xff\"}").is_err());
    // What can be read is looked at, whoever wrote it: here, a name with an escape.
    let odd =
        br#"{"nics": {"e\"0": {"network": "\u0078\n", "extra": {"a": [1, {}]}}}, "console": {}}"#;
    let new = [("n9".to_owned(), Record::from_json(Noun::Node, odd).unwrap())].into();
    let problems = Inventory::default().problems(Noun::Node, &new);
    assert_eq!(
        problems.iter().map(|it| &*it.what).collect::<Vec<_>>(),
        ["there is no network `x\n`"]
    );
}

#[test]
fn what_only_one_can_have_and_two_do_is_found() {
    let inventory = inventory();
    let record =
        |(name, node): (&Arc<str>, &Packed)| (name.to_string(), Record::Settings(node.clone()));
    let all: BTreeMap<String, Record> = inventory.nodes.iter().map(record).collect();
    assert_eq!(inventory.problems(Noun::Node, &all), []);
    let mut new: BTreeMap<String, Record> = BTreeMap::new();
    let mut add = |name: &str, edits: &[&str]| new.insert(name.into(), Record::from(&node(edits)));
    add("n4", &["nics/eth7/mac=42-00-00-00-00-01", "control/bmc_address=BMC1"]);
    add("n5", &["nics/eth0/ip=10.0.0.2", "control/bmc_address=bmc1"]);
    add("n6", &["control/bmc_address=bmc1", "control/bmc_port=6230", "profiles=bas"]);
    add("n7", &["nics/a/mac=42:00:00:00:00:07", "nics/b/mac=42:00:00:00:00:07"]);
    let said: Vec<String> = inventory
        .problems(Noun::Node, &new)
        .iter()
        .map(|it| format!("{}: {}", it.name, it.what))
        .collect();
    assert_eq!(
        said,
        [
            "n4: the MAC address 42:00:00:00:00:01 is `n1`'s, too",
            "n5: the address 10.0.0.2 is `n2`'s, too",
            "n5: the BMC bmc1 is `n4`'s, too",
            "n6: there is no profile `bas`; did you mean `base`?",
            "n7: the MAC address 42:00:00:00:00:07 is `n7`'s, too",
        ]
    );
    // Two change places in one go; a third cannot have what one of them leaves to the other.
    let swap: BTreeMap<String, Record> = [
        ("n1", node(&["nics/eth0/ip=10.0.0.2"])),
        ("n2", node(&["nics/eth0/mac=42:00:00:00:00:01"])),
    ]
    .map(|(name, node)| (name.to_owned(), Record::from(&node)))
    .into();
    assert_eq!(inventory.problems(Noun::Node, &swap), []);
    let mut swapped = inventory.clone();
    swap.iter().for_each(|(name, node)| swapped.put_record(Noun::Node, name, node.clone()));
    let third: BTreeMap<String, Record> =
        [("n3".to_owned(), Record::from(&node(&["nics/eth0/mac=42:00:00:00:00:01"])))].into();
    assert_eq!(swapped.problems(Noun::Node, &third).len(), 1);
    assert!(swapped.remove("n2") && !swapped.remove("n2"));
    assert_eq!(swapped.problems(Noun::Node, &third), []);
}

#[test]
fn the_table_and_the_types_are_of_the_same_settings() {
    for noun in Noun::ALL {
        for attribute in schema::attributes(noun) {
            let path = attribute.path.replace('*', "eth0");
            let value = match attribute.kind {
                schema::Kind::Choice(words) => words[0].into(),
                schema::Kind::Mac => json!("42:00:00:00:00:01"),
                schema::Kind::Ip => json!("10.0.0.1"),
                schema::Kind::Ips => json!(["10.0.0.1", "fe80::1"]),
                schema::Kind::Range => json!("10.0.0.1-10.0.0.9"),
                schema::Kind::Flag => json!(true),
                schema::Kind::Port | schema::Kind::Number | schema::Kind::Vlan => json!(7),
                schema::Kind::Names | schema::Kind::Hosts => json!(["a"]),
                schema::Kind::Free => json!({"a": 1}),
                schema::Kind::Secret => json!("sealed:x"),
                _ => json!("word"),
            };
            let whole = path.split('/').rev().fold(value, |below, part| json!({ part: below }));
            let tree = whole.as_object().unwrap().clone();
            let alone = attribute.unique
                || attribute.path == "groups"
                || (noun == Noun::Profile && attribute.path == "profiles");
            if alone && matches!(noun, Noun::Group | Noun::Profile) {
                let wrong = schema::check(noun, tree).unwrap_err();
                assert!(wrong[0].1.starts_with("it is a node's alone"), "{wrong:?}");
                continue;
            }
            let tree = schema::check(noun, tree).unwrap();
            let record = Record::from_tree(noun, tree.clone()).unwrap();
            assert_eq!(record.tree().unwrap(), tree, "{path}");
            assert_eq!(Record::from_json(noun, &record.to_json().unwrap()).unwrap(), record);
        }
    }
}
