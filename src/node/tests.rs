//! What files of nodes are to be.

use proptest::prelude::*;

use std::collections::BTreeMap;

use super::*;
use crate::model::node::Settings;
use crate::model::node::inventory::Inventory;

fn no_secret(_: &str) -> Result<String> {
    Ok(format!("{}x", schema::SEALED))
}

fn inventory(nodes: &BTreeMap<String, Settings>) -> Inventory {
    let mut inventory = Inventory::default();
    nodes.iter().for_each(|(name, node)| inventory.put(name, node.clone().into()));
    inventory
}

/// The nodes of a file.
fn take(format: Format, text: &str) -> Result<BTreeMap<String, Settings>> {
    let mut nodes = BTreeMap::new();
    let mut keep = |name: String, record: Record| {
        nodes.insert(name, record.settings().unwrap().open());
    };
    let mut read = super::take(Noun::Node, format, text, &mut no_secret, &mut keep)?;
    match read.mistakes.is_empty() {
        true => Ok(nodes),
        false => Err(told(&mut read.mistakes, "`a.json`")),
    }
}

fn records(nodes: &BTreeMap<String, Settings>) -> impl Iterator<Item = (&str, Record)> {
    nodes.iter().map(|(name, it)| (name.as_str(), Record::Settings(it.clone().into())))
}

/// A file as the older system writes it.
const OLDER: &str = r#"{"nodes": [
  {"name": "node0", "mgt": "ipmi", "arch": "x86_64", "netboot": null, "created_at": "2017-03-17",
   "control_info": {"bmc_address": "11.0.0.0", "bmc_username": "admin", "bmc_password": "hunter2"},
   "nics_info": {"nics": [
     {"mac": "42:87:0a:05:65:0", "ip": "12.0.0.0", "name": "eth0", "primary": true},
     {"mac": "43:87:0a:05:00:00", "ip": "13.0.0.0", "extra": {}, "uuid": "153c7c44"}]}},
  {"name": "xcat3test1", "mgt": "kvm", "control_info": {"ssh_username": "root",
   "ssh_virt_type": "virsh", "ssh_address": "10.5.102.1", "ssh_key_filename": "/root/.ssh/id_rsa"},
   "nics_info": {"nics": [{"mac": "52:54:00:36:ac:b1", "extra": {"primary": true}}]}}
]}"#;

#[test]
fn the_older_systems_file_is_read() {
    let taken = take(Format::Json, OLDER).unwrap();
    let node = &taken["node0"];
    assert_eq!(node.control.bmc_address.as_deref(), Some("11.0.0.0"));
    assert_eq!(node.control.bmc_password.as_deref(), Some("sealed:x"));
    assert_eq!(node.nics["eth0"].mac.as_deref(), Some("42:87:0a:05:65:00"));
    assert_eq!(node.nics["eth0"].primary, Some(true));
    // Without a name, the first that is free.
    assert_eq!(node.nics["eth1"].mac.as_deref(), Some("43:87:0a:05:00:00"));
    assert_eq!(taken["xcat3test1"].nics["eth0"].primary, Some(true));
    let text = write(Noun::Node, Format::Json, &mut records(&taken)).unwrap();
    assert!(!text.contains("sealed") && !text.contains("hunter2"), "{text}");
    assert!(text.contains(r#""nics_info":{"nics":[{"ip":"12.0.0.0","mac":"#), "{text}");
}

#[test]
fn all_mistakes_of_a_file_are_told_with_their_lines() {
    let text = "\u{feff}{\"nodes\": [
{\"name\": \"n1\", \"arhc\": \"x\"},
{\"name\": \"n2\", \"mgt\": \"ipmi\", \"mgt\": \"kvm\"},
{\"name\": \"a/b\"},
{\"arch\": \"x\"}, 7,
{\"name\": \"n3\",
 \"nics_info\": {\"nics\": [{\"name\": \"e\", \"mac\": \"x\"}, {\"name\": \"e\"}]}},
{\"name\": \"n3\"}
]}";
    let report = take(Format::Json, text).unwrap_err().report();
    for line in [
        "error: `a.json` has 8 mistakes; nothing of it is taken",
        "line 2: `n1`: arhc: there is no setting `arhc`; did you mean `arch`?",
        "line 3: `mgt` is there twice",
        "line 4: `a/b` cannot be a node's name",
        "line 5: a node without a `name`",
        "line 5: a node is `{…}`",
        "line 6: `n3`: nics/e (twice): `e (twice)` cannot be an interface's name",
        "line 6: `n3`: nics/e/mac: `x` is not a MAC address",
        "line 8: `n3` is in line 6, too",
    ] {
        assert!(report.contains(line), "{line}\n{report}");
    }
    for text in ["", "{", "[1", "{\"nodes\": 5}", "{\"nodes\": [], \"x\": 1}", &"[".repeat(10_000)]
    {
        let report = take(Format::Json, text).unwrap_err().report();
        assert!(report.contains("no list of nodes in JSON"), "{text:.20}: {report}");
    }
    let deep = format!("{{\"nodes\": [{{\"name\": \"n\", \"notes\": {}", "[".repeat(10_000));
    assert!(take(Format::Json, &deep).is_err());
    let deep = format!("{deep}{}}}]}}", "]".repeat(10_000));
    let report = take(Format::Json, &deep).unwrap_err().report();
    assert!(report.contains("has a mistake"), "{report}");
}

#[test]
fn yaml_and_csv_tell_theirs() {
    let text = "nodes:\n  n1: {arch: x86_64}\n  n2:\n    tags: [a b]\n  n1: {}\n  n3: 5\nelse: 1\n";
    let report = take(Format::Yaml, text).unwrap_err().report();
    for line in ["line 3: `n2`: tags: `a b` is not a name", "line 5: ", "line 6: `n3`", "line 7: "]
    {
        assert!(report.contains(line), "{line}\n{report}");
    }
    let text = "name,arch,notes\nn1,x86_64,\"a\nb\"\nn2,\"x\"\"\",\nn3,x\n\nn1,,\n";
    let report = take(Format::Csv, text).unwrap_err().report();
    for line in [
        "line 4: `n2`: arch: `x\\\"` is not",
        "line 5: 2 cells, and there are 3",
        "line 7: `n1` is in line 2",
    ] {
        assert!(report.contains(line), "{line}\n{report}");
    }
    let report = take(Format::Csv, "name,arhc,arch,arch\n").unwrap_err().report();
    assert!(report.contains("column 2: there is no setting `arhc`"), "{report}");
    assert!(report.contains("column 4: it is there twice"), "{report}");
    assert!(take(Format::Csv, "").is_err() && take(Format::Csv, "arch\n").is_err());
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z0-9 ]{1,9}",
        "[ -~\n\t]{1,20}",
        "\\PC{1,12}",
        Just("true".to_owned()),
        Just("007".into()),
        Just("1e5".into()),
        Just("~".into()),
        Just("- a".into()),
    ]
}

fn tree() -> impl Strategy<Value = Tree> {
    let name = "[a-z][a-z0-9.+-]{0,5}[a-z0-9]";
    let names = proptest::collection::btree_set(name, 0..4);
    let groups = proptest::collection::btree_set("[a-z][a-z0-9_+-]{0,5}[a-z0-9]", 0..4);
    let free = prop_oneof![
        Just(serde_json::json!({"slot": 7, "on": true, "none": null})),
        text().prop_map(|text| serde_json::json!({"a": {"b": [text, 1.5]}})),
    ];
    let nic = (any::<[u8; 6]>(), any::<u32>(), any::<Option<bool>>(), proptest::option::of(free));
    let nic = nic.prop_map(|(mac, ip, primary, extra)| {
        let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        serde_json::json!({
            "mac": format!("02:{}", mac[1..].join(":")),
            "ip": std::net::Ipv4Addr::from(ip).to_string(),
            "primary": primary, "extra": extra,
        })
    });
    let nics = proptest::collection::btree_map("eth[0-3]|ib0", nic, 0..3);
    let words = (text(), text(), name, any::<u16>(), names, groups);
    (words, nics, any::<[bool; 6]>()).prop_map(
        |((notes, user, arch, port, tags, groups), nics, some)| {
            let port = (port > 0).then_some(port);
            let whole = serde_json::json!({
                "notes": some[0].then_some(notes), "arch": some[1].then_some(arch),
                "control": {"bmc_username": some[2].then_some(user), "bmc_port": port},
                "tags": some[3].then_some(tags), "groups": some[4].then_some(groups),
                "nics": some[5].then_some(nics), "mgt": "ipmi",
            });
            schema::check(Noun::Node, whole.as_object().unwrap().clone()).unwrap()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn what_is_exported_is_imported_as_it_was(
        trees in proptest::collection::btree_map("n[0-9]{1,3}|r[0-9]u[0-9]-x", tree(), 0..5)
    ) {
        let nodes: BTreeMap<String, Settings> = trees
            .into_iter()
            .map(|(name, tree)| (name, Settings::from_tree(tree).unwrap()))
            .collect();
        let each = || nodes.iter().map(|(name, settings)| (name.as_str(), settings));
        for format in [Format::Json, Format::Yaml, Format::Csv] {
            let text = write(Noun::Node, format, &mut records(&nodes)).unwrap();
            prop_assert_eq!(&take(format, &text).unwrap(), &nodes, "{}", text);
        }
        // Groups: who is in which.
        let inventory = inventory(&nodes);
        let read = groups::read(&groups::write(each()), "it", &inventory).unwrap();
        let members = groups::members(each());
        prop_assert_eq!(read.len(), members.len());
        for (group, nodes) in &read {
            prop_assert_eq!(nodes, &members[group.as_str()]);
        }
    }
}

#[test]
fn files_of_groups_may_name_each_other() {
    let nodes: BTreeMap<String, Settings> =
        (1..10).map(|n| (format!("n{n}"), Settings::default())).collect();
    let inventory = inventory(&nodes);
    let text = "# racks\nrack1: n[1-4]\nrack2: n[5-8]\nboth: @rack1,@rack2 # all of them\nrest: all!@both\n";
    let read = groups::read(text, "`g`", &inventory).unwrap();
    assert_eq!(read["both"].to_string(), "n[1-8]");
    assert_eq!(read["rest"].to_string(), "n9");
    let wrong = "rack1: n[1-\nx y: n1\nn1\nrack2: n[8-12]\nz: @slurm:a\n";
    let report = groups::read(wrong, "`g`", &inventory).unwrap_err().report();
    for line in [
        "line 1: ",
        "line 2: `x y` cannot",
        "line 3: no `group: nodes`",
        "line 4: there is no node n[10-12]",
        "line 5: `@slurm:a` cannot",
    ] {
        assert!(report.contains(line), "{line}\n{report}");
    }
}

#[test]
fn nothing_of_a_file_is_lost_without_a_word() {
    for (format, text, why) in [
        (Format::Csv, "name,notes\nn1,\"24 inch rack\nn2,x\n", "the quote of line 2 is not closed"),
        (Format::Csv, "name,notes\nn1,\"a\"b\n", "something is behind a closing quote"),
        (
            Format::Json,
            r#"[{"name": "n1", "control": {}, "control_info": {"bmc_port": 1}}]"#,
            "there is no setting `control_info`",
        ),
        (
            Format::Json,
            r#"[{"name": "n1", "nics_info": {"nics": [], "eth0": {"ip": "10.0.0.1"}}}]"#,
            "`n1`: nics/nics: it has settings of its own",
        ),
    ] {
        let report = take(format, text).unwrap_err().report();
        assert!(report.contains(why), "{text}: {report}");
    }
    let named = r#"[{"name": "n1", "nics_info": {"eth0": {"ip": "10.0.0.1"}}}]"#;
    assert!(take(Format::Json, named).unwrap()["n1"].nics["eth0"].ip.is_some());
    let ones = format!("[{}1]", "1,".repeat(5000));
    let report = take(Format::Json, &ones).unwrap_err().report();
    assert!(report.contains("1000 mistakes or more"), "{report}");
}
