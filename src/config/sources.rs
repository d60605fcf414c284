//! Where configuration lies, and reading one file of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::expand::Vars;
use super::problem::Problem;
use super::read::Sink;
use super::yaml::{self, Mark, Node};

/// The largest file that is read, in bytes.
const MAX_SIZE: u64 = 8 << 20;

/// Where configuration is read from, and what variables in it stand for.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The site's folder; need not exist.
    pub system: PathBuf,
    /// The user's folder, if there is one.
    pub user: Option<PathBuf>,
    pub home: PathBuf,
    pub user_name: String,
    /// For `%{env:VAR}`.
    pub env: BTreeMap<String, String>,
}

impl Sources {
    /// Finds the folders: the overrides if given, else `/etc/pavo` and `~/.pavo`;
    /// where one is absent, pcocc's. Also gives notes, one line each, on what the
    /// user may not expect.
    pub fn find(
        system_override: Option<&Path>,
        user_override: Option<&Path>,
        home: &Path,
        user_name: &str,
        env: BTreeMap<String, String>,
    ) -> (Self, Vec<String>) {
        let mut notes = Vec::new();
        let system = folder(system_override, Path::new("/etc"), ["pavo", "pcocc"], &mut notes);
        let user = folder(user_override, home, [".pavo", ".pcocc"], &mut notes);
        let sources = Self {
            system: system.unwrap_or_else(|| "/etc/pavo".into()),
            user,
            home: home.into(),
            user_name: user_name.into(),
            env,
        };
        (sources, notes)
    }

    /// The variables that are known before there is a cluster.
    pub fn vars(&self) -> Vars {
        let vars = Vars::default()
            .with("user", &*self.user_name)
            .with("clusteruser", &*self.user_name)
            .with("homedir", self.home.to_string_lossy());
        self.env.iter().fold(vars, |vars, (name, value)| vars.with(format!("env:{name}"), value))
    }
}

/// The folder that is configured, else the first of these below `base`.
fn folder(
    configured: Option<&Path>,
    base: &Path,
    [ours, older]: [&str; 2],
    notes: &mut Vec<String>,
) -> Option<PathBuf> {
    if let Some(configured) = configured {
        if !configured.is_dir() {
            notes.push(format!("there is no folder `{}`", configured.display()));
        }
        return Some(configured.into());
    }
    let (ours, older) = (base.join(ours), base.join(older));
    if ours.is_dir() {
        return Some(ours);
    }
    older.is_dir().then(|| {
        let (older, ours) = (older.display(), ours.display());
        notes.push(format!("reading `{older}`, since there is no `{ours}`"));
    })?;
    Some(older)
}

/// A file that is YAML.
#[derive(Debug)]
pub struct Document {
    pub path: PathBuf,
    pub root: Rc<Node>,
}

/// A file, as far as it could be read.
#[derive(Debug)]
pub enum Loading {
    Absent,
    /// Why has been recorded.
    Broken,
    Done(Document),
}

impl Loading {
    /// The file, if it could be read.
    pub fn done(self) -> Option<Document> {
        match self {
            Self::Done(file) => Some(file),
            Self::Absent | Self::Broken => None,
        }
    }

    /// Reads a file; what is wrong with it, and keys given twice, go to `sink`.
    pub fn of(path: PathBuf, sink: &Sink) -> Self {
        let text = match text(&path) {
            Ok(Some(text)) => text,
            Ok(None) => return Self::Absent,
            Err((mark, message)) => {
                sink.problems.borrow_mut().push(Problem::new(path, mark, "", message));
                return Self::Broken;
            }
        };
        match yaml::parse(&text) {
            Ok(document) => {
                let warn = |twice: yaml::Duplicate| {
                    let first = twice.first.line;
                    let message =
                        format!("given twice, first in line {first}: the last one counts");
                    Problem::new(&path, twice.mark, twice.path, message)
                };
                sink.warnings.borrow_mut().extend(document.duplicates.into_iter().map(warn));
                Self::Done(Document { path, root: document.root })
            }
            Err(fault) => {
                let problem = Problem::new(path, fault.mark, "", fault.message);
                sink.problems.borrow_mut().push(problem);
                Self::Broken
            }
        }
    }
}

/// The file's text, if there is a file.
fn text(path: &Path) -> Result<Option<String>, (Mark, String)> {
    let whole = |message: String| (Mark::default(), message);
    // Looked at before it is opened: opening a FIFO would wait for its other end.
    let metadata = match path.metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        metadata => metadata.map_err(|error| whole(format!("cannot be read: {error}")))?,
    };
    if !metadata.is_file() {
        return Err(whole("is no file".into()));
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_SIZE + 1).read_to_end(&mut bytes))
        .map_err(|error| whole(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(whole(format!("is larger than {} MiB", MAX_SIZE >> 20)));
    }
    String::from_utf8(bytes).map(Some).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let good = String::from_utf8_lossy(good);
        let line = good.matches('\n').count() + 1;
        let column = good.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        (Mark { line, column }, "no YAML: this is not UTF-8".into())
    })
}
