//! What people write: configuration, command lines, user-data.

use std::collections::BTreeMap;
use std::path::Path;

use pavo::config::{Sources, load};
use pavo::model::cluster::{ClusterDef, MAX_VMS};
use pavo::model::hostlist;
use pavo::model::node::inventory::Inventory;
use pavo::model::node::records::Record;
use pavo::model::node::request::{Format, Noun};
use pavo::model::node::schema;
use pavo::model::nodeset::fold::Style;
use pavo::model::nodeset::parse::{nodes, parse};
use pavo::model::nodeset::{MAX_NAMES, NodeSet, name};
use pavo::model::vm::{HostKey, Seed};
use pavo::model::vmset::{VmSet, fold};
use pavo::node;
use pavo::vm::seed;

/// The files of configuration; an input's first byte says which it is.
const FILES: &[(&str, &str)] = &[
    ("batch.yaml", include_str!("../../etc/batch.yaml")),
    ("networks.yaml", include_str!("../../etc/networks.yaml")),
    ("resources.yaml", include_str!("../../etc/resources.yaml")),
    ("templates.yaml", include_str!("../../etc/templates.yaml")),
    ("repos.yaml", include_str!("../../etc/repos.yaml")),
];

/// All files together: mistakes are told with places in the file, never more than that.
pub fn config(data: &[u8]) -> bool {
    let Some((which, text)) = data.split_first() else { return false };
    let folder = folder();
    for (number, (name, example)) in FILES.iter().enumerate() {
        let mine = number == usize::from(*which) % FILES.len();
        let text = if mine { text } else { example.as_bytes() };
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let sources = Sources {
        system: folder.path().into(),
        user: None,
        home: "/nonexistent".into(),
        user_name: "alice".into(),
        env: BTreeMap::new(),
    };
    let loaded = load(&sources);
    let lines = text.split(|byte| matches!(byte, b'\n' | b'\r')).count();
    for problem in &loaded.problems {
        let shown = problem.to_string();
        assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
        let mine =
            problem.file.file_name() == Some(FILES[usize::from(*which) % FILES.len()].0.as_ref());
        assert!(!mine || problem.line <= lines + 1, "{shown} of {lines} lines");
    }
    let faulty = !loaded.problems.is_empty();
    assert_eq!(loaded.into_config().is_err(), faulty);
    !faulty
}

pub fn config_seeds() -> Vec<Vec<u8>> {
    let seed = |(number, (_, text)): (usize, &(&str, &str))| {
        let mut seed = vec![number as u8];
        seed.extend_from_slice(text.as_bytes());
        seed
    };
    let mut seeds: Vec<Vec<u8>> = FILES.iter().enumerate().map(seed).collect();
    seeds.push(b"\x03a: &a [*a, *a]\nb: {<<: *a, image: 'x:y'}\n".to_vec());
    seeds.push(b"\x03vm: {image: tiny, nested: [[[[[[[[1]]]]]]]], image: \"\\u0000\"}\n".to_vec());
    seeds
}

/// A cluster definition reads back as it is written.
pub fn cluster(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let Ok(def) = text.parse::<ClusterDef>() else { return false };
    assert!((1..=MAX_VMS).contains(&def.count()), "{text}");
    assert_eq!(def.to_string().parse::<ClusterDef>().unwrap(), def);
    true
}

pub fn cluster_seeds() -> Vec<Vec<u8>> {
    ["debian:8", "front,fs/mds0:2,site:img:1", "a:10000", "a:-1,b:0"].map(Into::into).into()
}

/// Sets of VMs and lists of hosts: bounded, and folded sets mean the same.
pub fn sets(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let set = text.parse::<VmSet>();
    if let Ok(set) = &set {
        if let Ok(ranks) = set.select(10_000) {
            assert!(ranks.windows(2).all(|pair| pair[0] < pair[1]));
            if !ranks.is_empty() {
                let again = fold(&ranks).parse::<VmSet>().unwrap().select(10_000).unwrap();
                assert_eq!(again, ranks);
            }
        }
    }
    let names = hostlist::expand(text);
    assert!(names.as_ref().is_ok_and(|names| names.len() <= 100_000) || names.is_err());
    set.is_ok() && names.is_ok()
}

pub fn sets_seeds() -> Vec<Vec<u8>> {
    let texts = ["all", "vm[0-3,7]", "0-3,5", "n[1-3,07],login", "r[1-9]n[01-16]", "vm99999"];
    texts.map(Into::into).into()
}

/// Sets of nodes: counted before they are expanded, and folded sets mean the same.
pub fn nodeset(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let expr = match parse(text) {
        Ok(expr) => expr,
        Err(error) => {
            let report = error.report();
            assert!(!report.chars().any(|c| c.is_control() && c != '\n'), "{report:?}");
            return false;
        }
    };
    assert!(expr.count() <= MAX_NAMES);
    // Larger ones take their time, and there is no more to see.
    if expr.count() > 10_000 {
        return true;
    }
    let known: NodeSet = ["n1", "n02", "x7y8-z"].iter().collect();
    let set = expr.eval(&mut |_| Ok(known.clone())).unwrap();
    assert!(set.len() <= expr.count() + known.len());
    for style in [Style::Slurm, Style::Full] {
        let folded = set.fold(style);
        match set.is_empty() {
            true => assert_eq!(folded, ""),
            false => assert_eq!(nodes(&folded, &mut |_| unreachable!()).unwrap(), set, "{folded}"),
        }
    }
    set.names().iter().for_each(|name| name::check(name).unwrap());
    true
}

pub fn nodeset_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "cn[43-45,47],r[1-3]u[01-10]!r2u[1-9]",
        "n[0-10/2]&n[098-101]^login",
        "@rack[1-3]!(@slurm:debug,@job:1234 ~^n[0-9]{1,2}$)",
        "control/bmc_address!=10.0.0.1,notes=\"a, b\",arch~=x86.*",
        "@list.txt @\"a file\" @- all!n1-bmc",
    ];
    texts.map(Into::into).into()
}

/// Files of nodes; an input's first byte says which. What is taken is written and read again
/// as it was, and no secret is.
pub fn inventory(data: &[u8]) -> bool {
    let Some((which, text)) = data.split_first() else { return false };
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let mut seal = |secret: &str| Ok(format!("{}{}", schema::SEALED, secret.len()));
    let format = [Format::Json, Format::Yaml, Format::Csv, Format::Groups][usize::from(which % 4)];
    if format == Format::Groups {
        return node::groups::read(text, "it", &Inventory::default()).is_ok();
    }
    let noun = Noun::ALL[usize::from(which / 4) % Noun::ALL.len()];
    let mut take = |format, text: &str| {
        let mut taken = BTreeMap::new();
        let mut keep = |name, record| drop(taken.insert(name, record));
        let read = node::take(noun, format, text, &mut seal, &mut keep);
        read.map(|read| (taken, read.mistakes))
    };
    let (taken, mut mistakes) = match take(format, text) {
        Ok(read) => read,
        Err(error) => {
            let report = error.report();
            assert!(!report.chars().any(|c| c.is_control() && c != '\n'), "{report:?}");
            return false;
        }
    };
    let report = node::told(&mut mistakes, "it").report();
    assert!(!report.chars().any(|c| c.is_control() && c != '\n'), "{report:?}");
    let mut each = taken.iter().map(|(name, record): (&String, &Record)| (&**name, record.clone()));
    let again = node::write(noun, Format::Json, &mut each).unwrap();
    let (again, mistakes) = take(Format::Json, &again).unwrap();
    assert_eq!((taken.len(), mistakes), (again.len(), Vec::new()));
    for (name, record) in &taken {
        assert_eq!(node::shown(noun, record).unwrap(), again[name].tree().unwrap());
    }
    true
}

pub fn inventory_seeds() -> Vec<Vec<u8>> {
    let json = r#"{"nodes": [{"name": "n1", "mgt": "ipmi", "control_info": {"bmc_address": "b",
        "bmc_password": "x"}, "nics_info": {"nics": [{"mac": "42:87:0a:05:65:0", "extra": {}}]}}]}"#;
    let yaml = "nodes:\n  n1: {arch: x86_64, tags: [a, b], nics: {e0: {ip: 10.0.0.1}}}\n  n2:\n";
    let csv = "name,arch,notes,nics/e0/extra\nn1,x86_64,\"a, b\",\"{\"\"a\"\": 1}\"\n";
    let groups = "rack1: n[1-4]!n[1-4]\nboth: @rack1,@rack1 # all\n";
    let seed = |(which, text): (u8, &str)| [&[which], text.as_bytes()].concat();
    [(0, json), (1, yaml), (2, csv), (3, groups)].map(seed).into()
}

/// What a user tells cloud-init: what passes the check can be written.
pub fn user_data(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let seed = Seed {
        instance_id: "i".into(),
        hostname: "vm0".into(),
        domain: Some("pavo.internal".into()),
        user_data: Some(text.into()),
        authorized_keys: vec!["ssh-ed25519 AAAA alice".into()],
        host_key: HostKey {
            seed: "00".repeat(32),
            public: "00".repeat(32),
            openssh_private: "-----BEGIN OPENSSH PRIVATE KEY-----\n".into(),
            openssh_public: "ssh-ed25519 AAAA".into(),
        },
    };
    if seed::check(&seed).is_err() {
        return false;
    }
    let folder = folder();
    seed::write(&folder.path().join("seed"), &seed, &[], false).unwrap();
    true
}

pub fn user_data_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "#cloud-config\nusers: [default]\n",
        "#!/bin/sh\ntrue\n",
        "Content-Type: multipart/mixed; boundary=\"x\"\nMIME-Version: 1.0\n\n--x\n\na\n--x--\n",
        "#include https://localhost/a\n",
        "## template: jinja\n#cloud-config\n",
        "\u{feff}#cloud-config\r\n",
    ];
    texts.map(Into::into).into()
}

/// A folder in memory, where there is one.
pub fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.unwrap()
}
