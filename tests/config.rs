//! Configuration as users meet it: files in, lines and exit codes out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use pavo::config::{Batch, BatchManager, Layer, Loaded, Network, Sources, UserData, load};
use proptest::prelude::*;
use tempfile::TempDir;

/// A home and the two folders of configuration, away from this machine's own.
struct Site {
    root: TempDir,
}

impl Site {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in ["site", "home/.pavo"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        Self { root }
    }

    /// Writes a file below `site/` or `home/.pavo/`.
    fn with(self, path: &str, text: &str) -> Self {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn path(&self) -> &Path {
        self.root.path()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pavo"));
        command.args(args).current_dir(self.path()).env_clear();
        command.env("HOME", self.path().join("home")).env("PATH", "/usr/bin:/bin");
        command.env("PAVO_SYSTEM_CONF_DIR", self.path().join("site"));
        command
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        self.text(self.command(args).output().unwrap())
    }

    fn text(&self, output: Output) -> (i32, String, String) {
        let root = format!("{}/", self.path().display());
        let text = |bytes| String::from_utf8(bytes).unwrap().replace(&root, "");
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    /// What the library makes of the files.
    fn load(&self) -> Loaded {
        load(&Sources {
            system: self.path().join("site"),
            user: Some(self.path().join("home/.pavo")),
            home: "/home/ada".into(),
            user_name: "ada".into(),
            env: BTreeMap::from([("XDG_CACHE_HOME".into(), "/cache".into())]),
        })
    }

    fn check(&self) -> (i32, String, String) {
        self.run(&["config", "check"])
    }
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

/// Files as a site running pcocc has them, with what PyYAML took.
fn pcocc_site() -> Site {
    Site::new()
        .with("site/batch.yaml", include_str!("golden/pcocc/batch.yaml"))
        .with("site/networks.yaml", include_str!("golden/pcocc/networks.yaml"))
        .with("site/resources.yaml", include_str!("golden/pcocc/resources.yaml"))
        .with("site/templates.yaml", include_str!("golden/pcocc/templates.yaml"))
        .with("site/repos.yaml", include_str!("golden/pcocc/repos.yaml"))
}

#[test]
fn without_any_configuration_there_is_one_that_is_correct() {
    let site = Site::new();
    assert_eq!(site.check(), (0, "configuration is correct\n".into(), String::new()));
    assert_eq!(site.run(&["config", "check", "-o", "json"]).1, "[]\n");
    let (code, out, err) = site.run(&["template", "list"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, "NAME\tIMAGE\tRESOURCE-SET\tINHERITS\tDESCRIPTION\n");
}

#[test]
fn the_files_of_a_site_with_pcocc_load_unchanged() {
    let site = pcocc_site();
    let (code, out, err) = site.check();
    assert_eq!((code, out.as_str()), (0, "configuration is correct\n"));
    assert_eq!(
        lines(&err),
        [
            "warning: site/networks.yaml:51:3: old-nat.type: `nat` is an older form of `ethernet` \
             with `network-layer: L3`; read as it",
            "warning: site/networks.yaml:66:3: old-pv.type: `pv` is an older form of `ethernet` \
             with `network-layer: L2`; read as it",
            "warning: site/templates.yaml:30:3: twice.image: given twice, first in line 29: the \
             last one counts",
        ]
    );
    let (code, out, _) = site.run(&["template", "list"]);
    assert_eq!(code, 0);
    assert_eq!(
        lines(&out),
        [
            "NAME\tIMAGE\tRESOURCE-SET\tINHERITS\tDESCRIPTION",
            "base\t/srv/images/base\tdefault\t\tthe old form: a folder",
            "compute\t/srv/images/base\tcluster\tbase\t",
            "fs/mds0\tsite:lustre@3\tcluster\tcompute\tyes",
            "merged\tsite:a\tcluster\t\t",
            "nodisk\t\tdefault\tbase\t",
            "twice\tsite:b\tdefault\t\t",
        ]
    );
}

#[test]
fn every_mistake_is_reported_with_its_place_and_the_nearest_word() {
    let site = Site::new()
        .with("site/batch.yaml", include_str!("golden/faulty/batch.yaml"))
        .with("site/networks.yaml", include_str!("golden/faulty/networks.yaml"))
        .with("site/resources.yaml", include_str!("golden/faulty/resources.yaml"))
        .with("site/templates.yaml", include_str!("golden/faulty/templates.yaml"))
        .with("site/repos.yaml", include_str!("golden/faulty/repos.yaml"))
        .with("home/.pavo/templates.yaml", include_str!("golden/faulty/user.yaml"))
        .with("home/.pavo/templates.d/broken.yaml", "a:\n  image: x\n c: [\n");
    let (code, out, _) = site.check();
    assert_eq!(code, 3);
    let golden = Path::new("tests/golden/faulty/report.txt");
    if std::env::var_os("PAVO_GOLDEN_WRITE").is_some() {
        fs::write(golden, &out).unwrap();
    }
    assert_eq!(out, fs::read_to_string(golden).unwrap());

    // The other verbs give all of them too, with the same exit code.
    let (code, _, err) = site.run(&["template", "list"]);
    assert_eq!(code, 3);
    let count = out.lines().filter(|line| !line.contains("cannot be read")).count();
    assert!(err.contains(&format!("error: the configuration has {count} errors\n")), "{err}");
    for line in out.lines().filter(|line| !line.contains("cannot be read")) {
        assert!(err.contains(line), "{line}");
    }
}

#[test]
fn programs_get_the_findings_as_records() {
    let site =
        Site::new().with("site/templates.yaml", "vm:\n  imgae: x\n  kernel: a\n  kernel: b\n");
    let (code, out, _) = site.run(&["config", "check", "-o", "json"]);
    assert_eq!(code, 3);
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        found,
        serde_json::json!([
            {"severity": "error", "file": "site/templates.yaml", "line": 2, "column": 3,
             "key": "vm.imgae", "message": "unknown setting", "suggestion": "image"},
            {"severity": "warning", "file": "site/templates.yaml", "line": 4, "column": 3,
             "key": "vm.kernel", "message": "given twice, first in line 3: the last one counts",
             "suggestion": null},
        ])
    );
}

#[test]
fn a_cycle_of_inherits_is_reported_once_and_ends() {
    let text = "a: {inherits: b}\nb: {inherits: c}\nc: {inherits: b}\nd: {inherits: d}\n";
    let (code, out, _) = Site::new().with("home/.pavo/templates.yaml", text).check();
    assert_eq!(code, 3);
    assert_eq!(
        lines(&out),
        [
            "home/.pavo/templates.yaml:2:5: b.inherits: the template inherits from itself: b -> c -> b",
            "home/.pavo/templates.yaml:4:5: d.inherits: the template inherits from itself: d -> d",
        ]
    );
}

#[test]
fn user_data_that_cannot_be_read_is_found_by_a_check_only() {
    let site = Site::new().with("home/.pavo/ok.yaml", "#cloud-config\n").with(
        "home/.pavo/templates.yaml",
        "a: {user-data: ~/.pavo/ok.yaml}\nb: {user-data: /none}\nc: {inherits: b}\n\
             d: {user-data: '/none/%{vm_rank}'}\ne: {user-data: '%{env:X}/f'}\nf: {user-data: /}\n",
    );
    let mut check = site.command(&["template", "check"]);
    let (code, out, _) = site.text(check.env("X", "/nowhere").output().unwrap());
    assert_eq!(code, 3);
    let file = "home/.pavo/templates.yaml";
    assert_eq!(
        lines(&out),
        [
            format!(
                "{file}:2:16: b.user-data: `/none` cannot be read: No such file or directory (os error 2)"
            ),
            format!(
                "{file}:5:16: e.user-data: `/nowhere/f` cannot be read: No such file or directory (os error 2)"
            ),
            format!("{file}:6:16: f.user-data: `/` cannot be read: it is no file"),
        ]
    );
    assert_eq!(site.run(&["template", "list"]).0, 0);
    assert_eq!(site.run(&["template", "check", "a"]).1, "templates are correct\n");
    assert_eq!(site.run(&["template", "check", "a", "b"]).1.lines().count(), 1);
}

#[test]
fn a_template_is_shown_without_its_defaults_unless_asked() {
    let site = pcocc_site();
    let (code, out, _) = site.run(&["template", "show", "fs/mds0"]);
    assert_eq!(code, 0);
    assert_eq!(
        lines(&out),
        [
            "name               fs/mds0",
            "origin             site/templates.yaml",
            "image              site:lustre@3",
            "resource-set       cluster",
            "bind-vcpus         false",
            "description        yes",
            "inherits           compute",
            "mount-points       {\"home\":{\"path\":\"%homedir\",\"readonly\":false,\"type\":\"virtio-9p\"}}",
            "persistent-drives  [{\"backup\":null,\"cache\":\"writeback\",\"mmp\":\"yes\",\"path\":\"/work/%user/a.qcow2\"},\
             {\"backup\":\"user:b\",\"cache\":\"none\",\"mmp\":\"no\",\"path\":\"/work/b.qcow2\"}]",
            "user-data          #cloud-config",
            "    packages:",
            "      - htop",
            "    ssh_pwauth: Yes",
            "    write_files:",
            "      - path: /etc/motd",
            "        permissions: \"0644\"",
        ]
    );
    let all = site.run(&["template", "show", "-a", "fs/mds0"]).1;
    assert!(all.contains("\nmachine-type       q35\n"), "{all}");
    let json = site.run(&["template", "show", "base", "-o", "json"]).1;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["machine-type"], "q35");
    assert_eq!(json["image"], "/srv/images/base");
}

#[test]
fn an_unknown_template_is_not_found() {
    let site = pcocc_site();
    for verb in ["show", "check"] {
        let (code, out, err) = site.run(&["template", verb, "compte"]);
        assert_eq!((code, out.as_str()), (4, ""));
        assert!(err.contains("error: Template not found: compte\n"), "{err}");
        assert!(err.contains("help: did you mean `compute`?\n"), "{err}");
    }
}

#[test]
fn a_template_that_may_be_in_a_broken_file_is_not_called_unknown() {
    let site = Site::new().with("home/.pavo/templates.d/mine.yaml", "mine: [");
    let (code, out, _) = site.run(&["template", "check", "mine"]);
    assert_eq!(code, 3);
    assert!(out.starts_with("home/.pavo/templates.d/mine.yaml:2:1: no YAML: "), "{out}");
}

#[test]
fn pcoccs_folder_is_read_where_ours_is_absent_and_said_so() {
    let site = Site::new().with("home/.pcocc/templates.yaml", "mine: {image: x}\n");
    fs::remove_dir(site.path().join("home/.pavo")).unwrap();
    let (code, out, err) = site.run(&["template", "list"]);
    assert_eq!(code, 0);
    assert!(out.contains("\nmine\tx\tdefault\t"), "{out}");
    assert_eq!(err, "note: reading `home/.pcocc`, since there is no `home/.pavo`\n");
}

#[test]
fn files_that_are_no_files_or_too_large_are_reported_and_nothing_waits() {
    let site = Site::new()
        .with("site/networks.yaml", &"#".repeat((8 << 20) + 1))
        .with("site/batch.yaml", "type: local # \u{e9}\n");
    fs::write(site.path().join("site/batch.yaml"), b"type: local\n# \xff\n").unwrap();
    fs::create_dir(site.path().join("site/repos.yaml")).unwrap();
    let fifo = site.path().join("site/resources.yaml");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (code, out, _) = site.check();
    assert_eq!(code, 3);
    assert_eq!(
        lines(&out),
        [
            "site/batch.yaml:2:3: no YAML: this is not UTF-8",
            "site/networks.yaml: is larger than 8 MiB",
            "site/repos.yaml: is no file",
            "site/resources.yaml: is no file",
        ]
    );
}

#[test]
fn without_configuration_a_machine_runs_clusters_behind_its_own_address() {
    let config = Site::new().load().into_config().unwrap();
    assert_eq!(config.batch, Batch::default());
    assert_eq!(config.default_resource_set.as_deref(), Some("default"));
    assert_eq!(config.resource_sets["default"].networks, ["nat"]);
    let Network::Ethernet(nat) = &config.networks["nat"] else { panic!("{:?}", config.networks) };
    assert_eq!(nat.layer, Layer::L3);
    assert_eq!(nat.reverse_nat[0].vm_port, 22);
    let [repo] = config.repos.as_slice() else { panic!("{:?}", config.repos) };
    assert_eq!(repo.path, Path::new("/home/ada/.local/share/pavo/images"));
}

#[test]
fn what_pcoccs_files_say_is_what_is_loaded() {
    let config = pcocc_site().load().into_config().unwrap();
    assert_eq!(config.batch.manager, BatchManager::Slurm);
    assert_eq!(config.batch.batch_args, ["--exclusive", "-c", "4"]);
    assert_eq!(config.batch.etcd.unwrap().client_port, 2379);

    let Network::Ethernet(net1) = &config.networks["net1"] else { panic!() };
    assert_eq!((net1.mtu, net1.allow_outbound), (9000, false));
    assert_eq!(net1.dns_server, None);
    assert_eq!(net1.reverse_nat[0].max_host_port, 60322);
    let Network::Ethernet(net2) = &config.networks["net2"] else { panic!() };
    assert_eq!((net2.layer, net2.mac_start_offset), (Layer::L2, 16));
    let Network::Ethernet(nat) = &config.networks["old-nat"] else { panic!() };
    assert_eq!(nat.int_network.to_string(), "192.168.1.0/24");
    let Network::Ethernet(pv) = &config.networks["old-pv"] else { panic!() };
    assert_eq!((pv.layer, pv.mac_prefix.to_string().as_str()), (Layer::L2, "52:54:01"));
    let kind = |name: &str| match &config.networks[name] {
        Network::Unsupported { kind } => kind.clone(),
        Network::Ethernet(_) => panic!("{name}"),
    };
    assert_eq!(
        ["ib0", "hostib", "gpu", "bridge"].map(kind),
        ["infiniband", "host-infiniband", "genericpci", "bridged-ethernet"]
    );

    let base = &config.templates["base"];
    assert_eq!(base.custom_args, ["-device", "intel-hda", "-smp", "4"]);
    let mds = &config.templates["fs/mds0"];
    assert!(mds.custom_args.is_empty(), "a null brings the default back");
    assert_eq!(mds.bind_vcpus, Some(false));
    assert_eq!(mds.mount_points["home"].path, "%homedir");
    let Some(UserData::Inline(text)) = &mds.user_data else { panic!("{mds:?}") };
    assert!(text.starts_with("#cloud-config\npackages:\n"), "{text}");
    assert!(config.templates["nodisk"].full_node);
    assert_eq!(config.templates["nodisk"].image, None);

    let paths: Vec<_> = config.repos.iter().map(|repo| repo.path.to_str().unwrap()).collect();
    assert_eq!(paths, ["/srv/images/repo", "/home/ada/.pcocc/images"]);
}

#[test]
fn the_users_repositories_come_first_and_may_not_replace_the_sites() {
    let mine = "repos:\n  - {name: mine, path: ~/r}\n  - {name: site, path: /x}\n";
    let site = pcocc_site().with("home/.pavo/repos.yaml", mine);
    let loaded = site.load();
    let names: Vec<_> = loaded.config.repos.iter().map(|repo| repo.name.as_str()).collect();
    assert_eq!(names, ["mine", "site", "user"]);
    let [problem] = loaded.problems.as_slice() else { panic!("{:?}", loaded.problems) };
    assert_eq!(problem.message, "Duplicate repository: site");
    assert!(problem.file.ends_with("site/repos.yaml"));
}

#[test]
fn a_file_that_is_no_yaml_does_not_make_others_wrong() {
    let site = pcocc_site().with("site/networks.yaml", "net1: [").with("site/resources.yaml", "{");
    let problems = site.load().problems;
    let files: Vec<_> = problems.iter().map(|p| p.file.file_name().unwrap()).collect();
    assert_eq!(files, ["networks.yaml", "resources.yaml"], "{problems:?}");
}

#[test]
fn each_missing_file_has_its_default_but_one_that_cannot_be_guessed_is_asked_for() {
    let networks = "lan: {type: eth, settings: {}}\n";
    let loaded = Site::new().with("site/networks.yaml", networks).load();
    let [problem] = loaded.problems.as_slice() else { panic!("{:?}", loaded.problems) };
    assert!(problem.file.ends_with("resources.yaml"), "{problem}");
    let resources = "mine: {networks: [nat], default: on}\n";
    let config = Site::new().with("site/resources.yaml", resources).load().into_config().unwrap();
    assert_eq!(config.default_resource_set.as_deref(), Some("mine"));
}

#[test]
fn without_a_default_resource_set_templates_must_name_theirs() {
    let site = Site::new()
        .with("site/resources.yaml", "one: {networks: [nat]}\n")
        .with("site/templates.yaml", "a: {resource-set: one}\nb: {inherits: a}\nc: {image: x}\n");
    let loaded = site.load();
    let [problem] = loaded.problems.as_slice() else { panic!("{:?}", loaded.problems) };
    assert_eq!(problem.key, "c");
    assert_eq!(loaded.warnings.len(), 1);
    assert_eq!(loaded.config.templates["b"].resource_set, "one");
}

#[test]
fn a_long_line_of_ancestors_is_followed() {
    let link = |n: u32| format!("t{n}: {{inherits: t{}}}\n", n + 1);
    let text: String = (0..5000).map(link).collect::<String>() + "t5000: {image: first}\n";
    let config = Site::new().with("site/templates.yaml", &text).load().into_config().unwrap();
    assert_eq!(config.templates["t0"].image.as_deref(), Some("first"));
}

/// Text made of what such files hold, in any order.
fn almost_a_file() -> impl Strategy<Value = String> {
    let words = "a b nat type settings ethernet nat pv inherits image user-data mount-points \
        persistent-drives reverse-nat vm-port mtu networks default repos name path cache <<: *x \
        &x yes ~ 0x1 -1 99999999999999999999 '' % !!str !x | > - ? : :\n , { } [ ] # --- \n";
    let words: Vec<&str> = words.split(' ').filter(|word| !word.is_empty()).collect();
    let gap = prop::sample::select(vec!["", " ", "\n", "\n  ", "\n    ", ": ", ":\n  "]);
    let part = (prop::sample::select(words), gap).prop_map(|(word, gap)| format!("{word}{gap}"));
    prop::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_files_hold_loading_ends_without_a_panic(text in almost_a_file()) {
        let site = Site::new();
        for name in ["batch", "networks", "resources", "templates", "repos"] {
            fs::write(site.path().join(format!("site/{name}.yaml")), &text).unwrap();
        }
        fs::write(site.path().join("home/.pavo/templates.yaml"), &text).unwrap();
        let loaded = site.load();
        prop_assert!(loaded.problems.iter().all(|problem| !problem.to_string().contains('\n')));
    }
}
