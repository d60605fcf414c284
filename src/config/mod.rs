//! Configuration: YAML files to typed values, pcocc's files as they are.
//!
//! | file | what | type |
//! |---|---|---|
//! | `batch.yaml` | the scheduler | [`Batch`] |
//! | `networks.yaml` | networks | [`Network`] |
//! | `resources.yaml` | sets of networks a VM gets | [`ResourceSet`] |
//! | `templates.yaml`, `templates.d/*.yaml` | kinds of VM | [`Template`] |
//! | `repos.yaml` | image repositories | [`Repo`] |
//! | `daemon.yaml` | the daemon that keeps the machines below | [`Daemon`] |
//! | `recipes/NAME.yaml` | what `pavo image build` makes an image of | [`Recipe`] |
//!
//! [`load`] reads them all and reports every mistake at once, each with its place
//! and the nearest valid word. What lies in a folder that is absent has a default,
//! file by file, so that a machine without any configuration runs clusters.
//!
//! ```text
//! sources   the folders; a file's text        yaml     text -> tree with places
//! read      tree -> values, mistakes noted    batch, networks, …: one per file
//! load      all files together -> Loaded      expand   %user and the like in paths
//! ```
//!
//! Paths in templates keep their variables: some (`%vm_rank`, `%clusterdir`) only
//! mean something in a cluster, so whoever uses such a path calls [`expand`] once.
//! Those of repositories are expanded already.

mod batch;
mod daemon;
mod expand;
mod load;
mod networks;
mod problem;
mod read;
mod recipe;
mod repos;
mod resources;
mod sources;
mod templates;
pub mod types;
pub mod yaml;

pub use crate::model::nearest::nearest;
pub use expand::{Vars, expand};
pub use load::{Loaded, load, load_batch, load_daemon, load_site};
pub use problem::Problem;
pub use recipe::{Content, Recipe, RecipeFile, RecipeUser};
pub use sources::Sources;
pub use types::*;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Each example, and the lists of all keys it may hold.
    const EXAMPLES: &[(&str, &[&[&str]])] = &[
        ("batch.yaml", &[batch::KEYS, batch::SETTINGS]),
        (
            "networks.yaml",
            &[
                networks::KEYS,
                networks::ETHERNET,
                networks::REVERSE_NAT,
                networks::INFINIBAND,
                networks::HOST_INFINIBAND,
                networks::BRIDGED,
                networks::VLAN,
                networks::PCI,
            ],
        ),
        ("resources.yaml", &[resources::KEYS]),
        (
            "templates.yaml",
            &[templates::SETTINGS, templates::MOUNT_POINT, templates::PERSISTENT_DRIVE],
        ),
        ("repos.yaml", &[repos::KEYS, repos::REPO, repos::CACHE]),
        ("daemon.yaml", &[daemon::KEYS]),
    ];

    #[test]
    fn the_examples_mention_every_key() {
        for (name, lists) in EXAMPLES {
            let text = std::fs::read_to_string(Path::new("etc").join(name)).unwrap();
            let mut words = text.split(|c: char| !c.is_ascii_alphanumeric() && !"-:".contains(c));
            for key in lists.iter().flat_map(|keys| keys.iter()) {
                let mentioned = words.clone().any(|word| word.strip_suffix(':') == Some(*key));
                assert!(mentioned, "etc/{name} does not mention `{key}`");
            }
            assert!(words.next().is_some());
        }
    }

    /// The example with its optional settings taken out of their comments: `#` and
    /// one blank begins prose, anything else after `#` is YAML.
    fn uncommented(text: &str) -> String {
        let line = |line: &str| match line.split_once('#') {
            Some((blank, rest)) if blank.trim().is_empty() => {
                let prose = rest.starts_with(' ') && !rest.starts_with("  ");
                format!("{blank}{}{rest}\n", if prose { "#" } else { "" })
            }
            _ => format!("{line}\n"),
        };
        text.lines().map(line).collect()
    }

    fn load_examples(edit: fn(&str) -> String) -> Loaded {
        let dir = tempfile::tempdir().unwrap();
        for (name, _) in EXAMPLES {
            let text = std::fs::read_to_string(Path::new("etc").join(name)).unwrap();
            std::fs::write(dir.path().join(name), edit(&text)).unwrap();
        }
        load(&Sources {
            system: dir.path().into(),
            user: None,
            home: "/home/ada".into(),
            user_name: "ada".into(),
            env: Default::default(),
        })
    }

    #[test]
    fn the_examples_load_and_show_the_defaults() {
        let loaded = load_examples(str::to_owned);
        assert_eq!(loaded.warnings, []);
        let config = loaded.into_config().unwrap();
        let nothing = load(&Sources {
            system: "/nonexistent".into(),
            user: None,
            home: "/home/ada".into(),
            user_name: "ada".into(),
            env: Default::default(),
        });
        assert_eq!(config.batch, nothing.config.batch);
        assert_eq!(config.networks["nat"], nothing.config.networks["nat"]);
        assert_eq!(config.resource_sets["default"], nothing.config.resource_sets["default"]);
        assert_eq!(config.repos[0], nothing.config.repos[0]);
        let shown = &config.templates["debian"];
        let default = Template::new("debian", &*shown.origin);
        let same = Template {
            image: shown.image.clone(),
            description: shown.description.clone(),
            user_data: shown.user_data.clone(),
            mount_points: shown.mount_points.clone(),
            places: shown.places.clone(),
            ..default
        };
        assert_eq!(*shown, same);
        assert_eq!(config.templates["debian/front"].user_data, None);
    }

    #[test]
    fn who_writes_what_is_the_sites_is_told() {
        let [system, user] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        std::fs::write(user.path().join("networks.yaml"), "nat: {}\n").unwrap();
        let sources = |user: &Path| Sources {
            system: system.path().into(),
            user: Some(user.into()),
            home: "/home/ada".into(),
            user_name: "ada".into(),
            env: Default::default(),
        };
        let loaded = load(&sources(user.path()));
        let said: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
        let file = user.path().join("networks.yaml");
        let place = system.path().display();
        assert_eq!(
            said,
            [format!("{}: is not read: what it sets is the site's, in `{place}`", file.display())]
        );
        assert_eq!(loaded.problems, []);
        // One folder may be both.
        std::fs::write(system.path().join("batch.yaml"), "type: local\n").unwrap();
        assert_eq!(load(&sources(system.path())).warnings, []);
    }

    #[test]
    fn the_examples_optional_settings_are_right_too() {
        let loaded = load_examples(uncommented);
        assert_eq!(loaded.problems, []);
        assert_eq!(loaded.config.batch.etcd.unwrap().servers.len(), 3);
        assert!(loaded.config.networks.contains_key("gpu"));
        assert_eq!(loaded.config.templates["debian"].persistent_drives.len(), 2);
    }
}
