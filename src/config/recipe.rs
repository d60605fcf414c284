//! A recipe: what an image is made of, for `pavo image build`.

use std::path::{Path, PathBuf};

use super::problem::Problem;
use super::read::{Item, Sink};
use super::sources::{Document, Loading, Sources};
use super::yaml;
use crate::error::{Error, Result};

pub const KEYS: &[&str] = &[
    "description",
    "suite",
    "mirror",
    "components",
    "keyring",
    "kernel",
    "kernel-args",
    "size",
    "packages",
    "agent",
    "users",
    "files",
    "commands",
];
pub const USER: &[&str] = &["name", "groups", "shell", "ssh-keys", "password", "sudo"];
pub const FILE: &[&str] = &["path", "content", "source", "mode", "owner"];

/// Recipes that need no file: name and text.
const BUILT_IN: &[(&str, &str)] = &[("debian", include_str!("../../etc/recipes/debian.yaml"))];

/// The smallest disk, in MiB: what boots, and a system of some use.
const MIN_MIB: u64 = 1024;
const MAX_MIB: u64 = 2 << 20;

/// What an image is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recipe {
    pub description: String,
    /// The release of the distribution. Default: that of this machine.
    pub suite: Option<String>,
    /// Where its packages come from. Default: where those of this machine do.
    pub mirror: Option<String>,
    pub components: Vec<String>,
    /// Of the keys that sign the mirror's lists.
    pub keyring: Option<String>,
    pub kernel: String,
    pub kernel_args: String,
    pub size_mib: u64,
    pub packages: Vec<String>,
    /// Whether it has pavo's agent.
    pub agent: bool,
    pub users: Vec<RecipeUser>,
    pub files: Vec<RecipeFile>,
    pub commands: Vec<String>,
}

/// An account of the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecipeUser {
    pub name: String,
    pub groups: Vec<String>,
    pub shell: Option<String>,
    pub ssh_keys: Vec<String>,
    /// As `/etc/shadow` has it.
    pub password: Option<String>,
    pub sudo: bool,
}

/// A file of the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecipeFile {
    /// In the image.
    pub path: String,
    pub content: Content,
    pub mode: u32,
    pub owner: String,
}

/// Where the bytes of a file come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Text(String),
    /// A file of this machine.
    File(PathBuf),
}

impl Recipe {
    /// Finds a recipe: the file itself if its name has a `/`, else `recipes/NAME.yaml` of the
    /// user or the site, else what is built in. Also gives what its author should know.
    ///
    /// # Errors
    /// When there is none, or it is wrong; then with all that is.
    pub fn load(name: &str, sources: &Sources) -> Result<(Self, Vec<Problem>)> {
        let sink = Sink::default();
        let recipe = match find(name, sources, &sink)? {
            Some(file) => Some(read(&Item::root(&sink, &file.path, &file.root), &file.path)),
            None => None,
        };
        let mut problems = sink.problems.into_inner();
        problems.sort();
        match recipe.filter(|_| problems.is_empty()) {
            Some(recipe) => Ok((recipe, sink.warnings.into_inner())),
            None => Err(wrong(name, &problems)),
        }
    }

    /// The names under which [`load`](Self::load) finds one, with what each is for.
    pub fn names(sources: &Sources) -> Vec<String> {
        let folders = [sources.user.as_deref(), Some(&*sources.system)];
        let files = folders.into_iter().flatten().filter_map(|dir| folder(dir).read_dir().ok());
        let paths = files.flatten().flatten().map(|entry| entry.path());
        let yaml = paths.filter(|path| path.extension().is_some_and(|end| end == "yaml"));
        let stem = |path: PathBuf| Some(path.file_stem()?.to_str()?.to_owned());
        let mut names: Vec<String> = yaml.filter_map(stem).collect();
        names.extend(BUILT_IN.iter().map(|(name, _)| (*name).to_owned()));
        names.sort();
        names.dedup();
        names
    }
}

fn folder(conf: &Path) -> PathBuf {
    conf.join("recipes")
}

fn wrong(name: &str, problems: &[Problem]) -> Error {
    let lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
    Error::config(format!("the recipe `{}` is wrong", name.escape_debug()))
        .because(Error::config(lines.join("\n")))
}

/// The text of a recipe, if it can be read; if not, why has been recorded.
fn find(name: &str, sources: &Sources, sink: &Sink) -> Result<Option<Document>> {
    let absent = |what: String, help: String| Err(Error::not_found(what).help(help));
    if name.contains('/') {
        return match Loading::of(name.into(), sink) {
            Loading::Absent => absent(
                format!("there is no file `{}`", name.escape_debug()),
                "a recipe without `/` is looked for by its name: `pavo image build debian NAME`"
                    .into(),
            ),
            loading => Ok(loading.done()),
        };
    }
    for dir in [sources.user.as_deref(), Some(&*sources.system)].into_iter().flatten() {
        match Loading::of(folder(dir).join(format!("{name}.yaml")), sink) {
            Loading::Absent => {}
            loading => return Ok(loading.done()),
        }
    }
    if let Some((_, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
        let document = yaml::parse(text).expect("a test reads it");
        return Ok(Some(Document { path: format!("{name}.yaml").into(), root: document.root }));
    }
    let names = Recipe::names(sources).join(", ");
    absent(
        format!("there is no recipe `{}`", name.escape_debug()),
        format!("there are: tiny, {names}; a file of yours is named with a `/`: `./{name}.yaml`"),
    )
}

/// Words of an option or a list that a tool splits again: none of it may be taken for more.
fn plain(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-._:/~=*".contains(&byte))
}

fn one_line(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

fn read(item: &Item, path: &Path) -> Recipe {
    let fields = item.fields(KEYS);
    let word = |item: &Item| item.text_like("one plain word", plain);
    let words = |item: &Item| Some(item.list().iter().filter_map(word).collect());
    let mut recipe = Recipe {
        components: vec!["main".into()],
        kernel: "linux-image-cloud-amd64".into(),
        size_mib: 4096,
        ..Recipe::default()
    };
    fields.read("description", &mut recipe.description, Item::text);
    fields.read("suite", &mut recipe.suite, |item| word(item).map(Some));
    fields.read("mirror", &mut recipe.mirror, |item| {
        item.text_like("the address of a mirror", |text| plain(text) && text.contains("://"))
            .map(Some)
    });
    fields.read("components", &mut recipe.components, words);
    fields.read("keyring", &mut recipe.keyring, |item| {
        item.text_like("an absolute path", |text| plain(text) && text.starts_with('/')).map(Some)
    });
    fields.read("kernel", &mut recipe.kernel, word);
    fields.read("kernel-args", &mut recipe.kernel_args, |item| {
        let plain = |text: &str| one_line(text) && !text.contains(['\'', '"', '\\', '$', ';']);
        item.text_like("words without quotes", plain)
    });
    fields.read("size", &mut recipe.size_mib, size);
    fields.read("packages", &mut recipe.packages, words);
    fields.read("agent", &mut recipe.agent, Item::boolean);
    fields.read("users", &mut recipe.users, |item| {
        Some(item.list().iter().filter_map(user).collect())
    });
    fields.read("files", &mut recipe.files, |item| {
        Some(item.list().iter().filter_map(|item| file(item, path)).collect())
    });
    fields.read("commands", &mut recipe.commands, |item| {
        Some(item.list().iter().filter_map(Item::any_text).collect())
    });
    recipe
}

/// `4G`, `512M`, in MiB.
pub(super) fn size(item: &Item) -> Option<u64> {
    let value = |text: &str| -> Option<u64> {
        let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
        let factor = match unit.trim_end_matches("iB").to_ascii_uppercase().as_str() {
            "M" => 1,
            "G" => 1024,
            "T" => 1 << 20,
            _ => return None,
        };
        let mib = digits.parse::<u64>().ok()?.checked_mul(factor)?;
        (MIN_MIB..=MAX_MIB).contains(&mib).then_some(mib)
    };
    let text = item.text_like("a size from 1G to 2T", |text| value(text).is_some())?;
    value(&text)
}

fn user(item: &Item) -> Option<RecipeUser> {
    let fields = item.fields(USER);
    let account = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            && text.len() <= 32
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
    };
    let name = fields.required("name")?.text_like("the name of an account", account)?;
    let lines = |item: &Item| {
        let line = |item: &Item| item.text_like("one line", one_line);
        Some(item.list().iter().filter_map(line).collect())
    };
    let mut user = RecipeUser { name, ..RecipeUser::default() };
    fields.read("groups", &mut user.groups, |item| {
        let group = |item: &Item| item.text_like("the name of a group", account);
        Some(item.list().iter().filter_map(group).collect())
    });
    fields.read("shell", &mut user.shell, |item| {
        item.text_like("an absolute path", |text| text.starts_with('/') && one_line(text)).map(Some)
    });
    fields.read("ssh-keys", &mut user.ssh_keys, lines);
    fields.read("password", &mut user.password, |item| {
        let hash = |text: &str| text.starts_with('$') && one_line(text) && !text.contains(':');
        item.text_like("a password's hash (`openssl passwd -6`)", hash).map(Some)
    });
    fields.read("sudo", &mut user.sudo, Item::boolean);
    Some(user)
}

fn file(item: &Item, recipe: &Path) -> Option<RecipeFile> {
    let fields = item.fields(FILE);
    let absolute = |text: &str| text.starts_with('/') && !text.ends_with('/') && one_line(text);
    let path = fields.required("path")?.text_like("an absolute path", absolute)?;
    let content = match (fields.get("content"), fields.get("source")) {
        (Some(text), None) => Content::Text(text.any_text()?),
        (None, Some(source)) => {
            let folder = recipe.parent().unwrap_or(Path::new(""));
            Content::File(folder.join(source.text()?))
        }
        _ => {
            item.problem("either `content` or `source` is needed");
            return None;
        }
    };
    let mut file = RecipeFile { path, content, mode: 0o644, owner: "root:root".into() };
    fields.read("mode", &mut file.mode, |item| {
        let octal = |text: &str| u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
        octal(&item.text_like("a mode such as 0644", |text| octal(text).is_some())?)
    });
    fields.read("owner", &mut file.owner, |item| item.text_like("`USER:GROUP`", plain));
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(dir: &Path) -> Sources {
        Sources {
            system: dir.into(),
            user: None,
            home: "/home/ada".into(),
            user_name: "ada".into(),
            env: Default::default(),
        }
    }

    fn load(text: &str) -> Result<Recipe> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.yaml");
        std::fs::write(&path, text).unwrap();
        Recipe::load(path.to_str().unwrap(), &sources(dir.path())).map(|(recipe, _)| recipe)
    }

    #[test]
    fn what_is_built_in_is_right_and_mentions_every_key() {
        let none = sources(Path::new("/nonexistent"));
        for (name, text) in BUILT_IN {
            let (recipe, warnings) = Recipe::load(name, &none).unwrap();
            assert_eq!(warnings, []);
            assert!(recipe.packages.contains(&"cloud-init".into()));
            for key in KEYS.iter().chain(USER).chain(FILE) {
                assert!(text.contains(&format!("{key}:")), "{name} does not mention `{key}`");
            }
        }
        assert_eq!(Recipe::names(&none), ["debian"]);
    }

    /// `#` and one blank begins prose, anything else after `#` is YAML.
    #[test]
    fn the_optional_settings_of_what_is_built_in_are_right_too() {
        for (_, text) in BUILT_IN {
            let line = |line: &str| match line.split_once('#') {
                Some((blank, rest)) if blank.trim().is_empty() => {
                    let prose = rest.is_empty() || rest.starts_with(' ') && !rest.starts_with("  ");
                    format!("{blank}{}{rest}\n", if prose { "#" } else { "" })
                }
                _ => format!("{line}\n"),
            };
            let recipe = load(&text.lines().map(line).collect::<String>()).unwrap();
            assert_eq!(recipe.users.len(), 1);
            assert_eq!(recipe.components.len(), 3);
            assert!(recipe.mirror.is_some() && recipe.keyring.is_some());
            assert!(matches!(recipe.files.last().unwrap().content, Content::File(_)));
        }
    }

    #[test]
    fn a_file_comes_before_what_is_built_in_and_sources_lie_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("recipes")).unwrap();
        let text = "size: 2G\nfiles: [{path: /a, source: b, mode: 0755}]\n";
        std::fs::write(dir.path().join("recipes/debian.yaml"), text).unwrap();
        let (recipe, _) = Recipe::load("debian", &sources(dir.path())).unwrap();
        assert_eq!(recipe.size_mib, 2048);
        let [file] = &recipe.files[..] else { panic!("{recipe:?}") };
        assert_eq!(file.content, Content::File(dir.path().join("recipes/b")));
        assert_eq!((file.mode, &*file.owner), (0o755, "root:root"));
    }

    #[test]
    fn every_mistake_is_named_with_its_place() {
        let text = "siez: 4G\nsize: 10\npackages: [a b, -x]\nusers: [{name: Root}]\n\
                    files: [{path: etc/x, content: a}, {path: /y}]\nkernel-args: \"a' b\"\n";
        let error = load(text).unwrap_err().report();
        for part in [
            ":1:1: siez: unknown setting; did you mean `size`?",
            ":2:7: size: expected a size from 1G to 2T, found `10`",
            ":3:12: packages[0]: expected one plain word",
            "packages[1]: expected one plain word",
            "expected the name of an account, found `Root`",
            "expected an absolute path, found `etc/x`",
            "either `content` or `source` is needed",
            "expected words without quotes",
        ] {
            assert!(error.contains(part), "no `{part}` in\n{error}");
        }
    }

    #[test]
    fn a_recipe_that_is_not_there_is_said_with_those_that_are() {
        let none = sources(Path::new("/nonexistent"));
        let error = Recipe::load("debain", &none).unwrap_err().report();
        assert!(error.contains("there is no recipe `debain`"), "{error}");
        assert!(error.contains("there are: tiny, debian"), "{error}");
        assert!(Recipe::load("./none.yaml", &none).is_err());
    }
}
