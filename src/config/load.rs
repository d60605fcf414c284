//! All files together: what is absent gets its default, what is wrong is reported,
//! and one mistake is reported once.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::expand::expand;
use super::problem::Problem;
use super::read::{Item, Sink};
use super::resources::Resources;
use super::sources::{Document, Loading, Sources};
use super::templates::Author;
use super::types::{Batch, Config, Daemon, Ethernet, Network, Repo, ResourceSet, ReverseNat};
use super::yaml::Mark;
use super::{batch, daemon, networks, repos, resources, templates};
use crate::error::{Error, Result};

/// The network there is when none is configured.
const DEFAULT_NETWORK: &str = "nat";

/// What was read.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Complete only if there are no problems.
    pub config: Config,
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
    /// Files that templates name, where and as they are written.
    named_files: Vec<(Problem, String)>,
}

impl Loaded {
    /// The configuration, if it is correct.
    ///
    /// # Errors
    /// [`Kind::Config`](crate::error::Kind::Config), whose report lists every problem.
    pub fn into_config(self) -> Result<Config> {
        if self.problems.is_empty() {
            return Ok(self.config);
        }
        let lines: Vec<String> = self.problems.iter().map(Problem::to_string).collect();
        let what = match lines.len() {
            1 => "the configuration has an error".into(),
            count => format!("the configuration has {count} errors"),
        };
        Err(Error::config(what)
            .because(Error::config(lines.join("\n")))
            .help("correct it, and look again with `pavo config check`"))
    }

    /// Looks at the files that templates name, such as `user-data`: one problem for
    /// each that cannot be read. Those whose name depends on the VM are left out.
    pub fn check_named_files(&self, sources: &Sources) -> Vec<Problem> {
        let vars = sources.vars();
        let check = |(place, path): &(Problem, String)| {
            let path = expand(path, &vars);
            let unknown = path.contains('%');
            let error = (!unknown).then(|| unreadable(Path::new(&path))).flatten()?;
            Some(Problem { message: format!("`{path}` cannot be read: {error}"), ..place.clone() })
        };
        self.named_files.iter().filter_map(check).collect()
    }
}

/// Why a file cannot be read, if so. A FIFO is not opened: that would wait.
fn unreadable(path: &Path) -> Option<std::io::Error> {
    match path.metadata() {
        Ok(metadata) if !metadata.is_file() => Some(std::io::Error::other("it is no file")),
        Ok(_) => fs::File::open(path).err(),
        Err(error) => Some(error),
    }
}

/// Reads all configuration. Does not stop at the first mistake.
pub fn load(sources: &Sources) -> Loaded {
    let sink = Sink::default();
    let config = read(sources, &sink);
    let sorted = |problems: Vec<Problem>| {
        let mut problems = problems;
        problems.sort();
        problems.dedup();
        problems
    };
    Loaded {
        config,
        problems: sorted(sink.problems.into_inner()),
        warnings: sorted(sink.warnings.into_inner()),
        named_files: sink.named_files.into_inner(),
    }
}

/// Reads `batch.yaml` alone, for commands that ask only where jobs are.
///
/// # Errors
/// When that file is wrong.
pub fn load_batch(sources: &Sources) -> Result<Batch> {
    let sink = Sink::default();
    let batch = read_batch(sources, &sink);
    finish(Config { batch, ..Config::default() }, sink).map(|config| config.batch)
}

/// Reads `daemon.yaml` alone.
///
/// # Errors
/// When that file is wrong.
pub fn load_daemon(sources: &Sources) -> Result<Daemon> {
    let sink = Sink::default();
    let daemon = read_daemon(sources, &sink);
    finish(Config { daemon, ..Config::default() }, sink).map(|config| config.daemon)
}

/// Reads what root needs to set a host up: the site's `batch.yaml`, networks and resource
/// sets. Nobody's templates.
///
/// # Errors
/// When one of these files is wrong.
pub fn load_site(sources: &Sources) -> Result<Config> {
    let sink = Sink::default();
    let batch = read_batch(sources, &sink);
    let (networks, resources) = read_networks(sources, &sink);
    let networks = networks.unwrap_or_default();
    let (resource_sets, default_resource_set) = resources.unwrap_or_default();
    let config =
        Config { batch, networks, resource_sets, default_resource_set, ..Config::default() };
    finish(config, sink)
}

fn finish(config: Config, sink: Sink) -> Result<Config> {
    let problems = sink.problems.into_inner();
    Loaded { config, problems, warnings: Vec::new(), named_files: Vec::new() }.into_config()
}

type Networks = BTreeMap<String, Network>;

/// The site's networks and resource sets; `None` for a file that is broken.
fn read_networks(sources: &Sources, sink: &Sink) -> (Option<Networks>, Option<Resources>) {
    let system = |name: &str| Loading::of(sources.system.join(name), sink);
    let networks = match system("networks.yaml") {
        Loading::Done(file) => Some(networks::read(&root(&file, sink))),
        Loading::Broken => None,
        Loading::Absent => Some(default_networks()),
    };
    let resources = match system("resources.yaml") {
        Loading::Done(file) => Some(resources::read(&root(&file, sink), networks.as_ref())),
        Loading::Broken => None,
        Loading::Absent => Some(default_resources(sources, networks.as_ref(), sink)),
    };
    (networks, resources)
}

fn read_batch(sources: &Sources, sink: &Sink) -> Batch {
    match Loading::of(sources.system.join("batch.yaml"), sink) {
        Loading::Done(file) => batch::read(&root(&file, sink)),
        _ => Batch::default(),
    }
}

fn read_daemon(sources: &Sources, sink: &Sink) -> Daemon {
    match Loading::of(sources.system.join("daemon.yaml"), sink) {
        Loading::Done(file) => daemon::read(&root(&file, sink)),
        _ => Daemon::default(),
    }
}

/// Files that only the site has: what they say concerns others, too.
const SITE_ONLY: [&str; 4] = ["batch.yaml", "networks.yaml", "resources.yaml", "daemon.yaml"];

/// Warns of files that somebody wrote in vain.
fn warn_of_unread(sources: &Sources, sink: &Sink) {
    let folder = sources.user.as_ref().filter(|folder| **folder != sources.system);
    let files = folder.into_iter().flat_map(|folder| SITE_ONLY.map(|name| folder.join(name)));
    let warn = |file: PathBuf| Problem {
        file,
        line: 0,
        column: 0,
        key: String::new(),
        message: format!(
            "is not read: what it sets is the site's, in `{}`",
            sources.system.display()
        ),
        suggestion: None,
    };
    sink.warnings.borrow_mut().extend(files.filter(|file| file.exists()).map(warn));
}

fn read(sources: &Sources, sink: &Sink) -> Config {
    warn_of_unread(sources, sink);
    let system = |name: &str| Loading::of(sources.system.join(name), sink);
    let user = |name: &str| match &sources.user {
        Some(folder) => Loading::of(folder.join(name), sink),
        None => Loading::Absent,
    };
    let batch = read_batch(sources, sink);
    let daemon = read_daemon(sources, sink);
    let (networks, resources) = read_networks(sources, sink);
    let templates = read_templates(sources, resources.as_ref(), sink);
    let (repos, image_cache) = match [user("repos.yaml"), system("repos.yaml")] {
        [Loading::Absent, Loading::Absent] => (vec![default_repo(&sources.home)], None),
        files => {
            let files: Vec<Document> = files.into_iter().filter_map(Loading::done).collect();
            let files: Vec<Item> = files.iter().map(|file| root(file, sink)).collect();
            repos::read(&files, &sources.vars())
        }
    };
    let networks = networks.unwrap_or_default();
    let (resource_sets, default_resource_set) = resources.unwrap_or_default();
    Config {
        batch,
        networks,
        resource_sets,
        default_resource_set,
        templates,
        repos,
        image_cache,
        daemon,
    }
}

fn root<'a>(file: &'a Document, sink: &'a Sink) -> Item<'a> {
    Item::root(sink, &file.path, &file.root)
}

fn read_templates(
    sources: &Sources,
    resources: Option<&Resources>,
    sink: &Sink,
) -> BTreeMap<String, super::types::Template> {
    let mut files = Vec::new();
    let folders = [(Author::Site, Some(&sources.system)), (Author::User, sources.user.as_ref())];
    for (author, folder) in folders {
        let Some(folder) = folder else { continue };
        let paths = std::iter::once(folder.join("templates.yaml"))
            .chain(yaml_files(&folder.join("templates.d"), sink));
        let done = paths.filter_map(|path| Loading::of(path, sink).done());
        files.extend(done.map(|file| (author, file)));
    }
    let files: Vec<(Author, Item)> =
        files.iter().map(|(author, file)| (*author, root(file, sink))).collect();
    templates::read(&files, resources)
}

/// The `*.yaml` files of a folder, by name; of one that does not exist, none.
fn yaml_files(folder: &Path, sink: &Sink) -> Vec<PathBuf> {
    let listed = fs::read_dir(folder).and_then(|entries| {
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()
    });
    let mut paths = match listed {
        Ok(paths) => paths,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            let message = format!("cannot be listed: {error}");
            let problem = Problem::new(folder, Mark::default(), "", message);
            sink.problems.borrow_mut().push(problem);
            Vec::new()
        }
    };
    let hidden = |path: &Path| path.file_name().is_none_or(|n| n.as_encoded_bytes()[0] == b'.');
    paths.retain(|path| path.extension().is_some_and(|e| e == "yaml") && !hidden(path));
    paths.sort();
    paths
}

/// One network behind the host's address, with each VM's ssh published.
fn default_networks() -> BTreeMap<String, Network> {
    let ssh = ReverseNat { vm_port: 22, min_host_port: 60222, max_host_port: 60999 };
    let nat = Ethernet { reverse_nat: vec![ssh], ..Ethernet::default() };
    [(DEFAULT_NETWORK.to_owned(), Network::Ethernet(nat))].into()
}

/// One resource set, with the default network.
fn default_resources(
    sources: &Sources,
    networks: Option<&BTreeMap<String, Network>>,
    sink: &Sink,
) -> Resources {
    if networks.is_some_and(|networks| !networks.contains_key(DEFAULT_NETWORK)) {
        let message = format!(
            "is needed, since networks.yaml has no network `{DEFAULT_NETWORK}` that VMs would be \
             given without it"
        );
        let file = sources.system.join("resources.yaml");
        sink.problems.borrow_mut().push(Problem::new(file, Mark::default(), "", message));
    }
    let set = ResourceSet { networks: vec![DEFAULT_NETWORK.into()], ..ResourceSet::default() };
    ([("default".to_owned(), set)].into(), Some("default".into()))
}

fn default_repo(home: &Path) -> Repo {
    Repo { name: "user".into(), path: home.join(".local/share/pavo/images") }
}
