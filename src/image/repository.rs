//! One object store on disk, in the layout of pcocc (version 2).
//!
//! ```text
//! REPO/.config                     "version: 2"
//! REPO/.tmp/                       what is not finished
//! REPO/data/<h2>/<sha256>          blobs, 0444, never changed
//! REPO/meta/<name>@<revision>      JSON: which blobs an image is, bottom first
//! ```
//!
//! A blob appears by rename and a revision by a link that fails if it exists, after
//! both were written through to the disk: whatever crashes, an image is there entirely
//! or not at all, and no two imports get one revision. Who writes holds a lock on
//! `.config`, so that no blob is taken for unused while its revision is being written.

mod unused;

use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{AccessFlags, access};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::scratch::Scratch;
use super::uri;
use crate::error::{Context, Error, Result};
pub use unused::{Collected, Freed};

const VERSION: &str = "2";

/// How long to wait for another program that writes to the repository, and how often to
/// look. An import holds the lock while it makes one revision appear, not while it copies.
const LOCK_LIMIT: Duration = Duration::from_secs(60);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// What a revision is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Revision {
    pub name: String,
    pub revision: u32,
    pub kind: Kind,
    pub owner: String,
    /// Seconds since 1970.
    pub timestamp: f64,
    /// SHA-256 of each blob, hexadecimal; the last one is the disk, the others lie
    /// below it.
    pub data_blobs: Vec<String>,
    #[serde(default)]
    pub custom_meta: serde_json::Value,
}

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Vm,
    /// A container image of pcocc: listed, never booted.
    Ctr,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vm => "vm",
            Self::Ctr => "ctr",
        }
    }
}

/// A disk that is to become a revision.
#[derive(Clone, Copy, Debug)]
pub struct Addition<'a> {
    pub name: &'a str,
    /// On the repository's file system; it is moved.
    pub disk: &'a Path,
    pub owner: &'a str,
    /// Whether there may be such an image, which gets one more revision.
    pub replace: bool,
    /// What the disk lies on, bottom first.
    pub below: &'a [Layer],
}

/// A blob that another lies on.
#[derive(Clone, Debug)]
pub struct Layer {
    pub hash: String,
    /// A copy, if the repository does not have it; as [`Addition::disk`].
    pub copy: Option<PathBuf>,
}

/// One repository. Opening it touches nothing; a folder that does not exist is empty.
#[derive(Clone, Debug)]
pub struct Repository {
    pub name: String,
    path: PathBuf,
}

impl Repository {
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether images may be added and deleted, as far as permissions say so.
    pub fn is_writable(&self) -> bool {
        let may = |path: &Path| access(path, AccessFlags::W_OK | AccessFlags::X_OK).is_ok();
        match self.path.join(".config").exists() {
            true => [".tmp", "data", "meta"].iter().all(|folder| may(&self.path.join(folder))),
            // Made with its first image.
            false => self.path.ancestors().find(|path| path.exists()).is_some_and(may),
        }
    }

    /// Every image with its newest revision, sorted by name.
    pub fn newest(&self) -> Result<Vec<(String, u32)>> {
        let mut newest: Vec<(String, u32)> = Vec::new();
        for (name, revision) in self.entries()? {
            match newest.last_mut().filter(|last| last.0 == name) {
                Some(last) => last.1 = revision,
                None => newest.push((name, revision)),
            }
        }
        Ok(newest)
    }

    /// The revisions of an image, oldest first; none if there is no such image.
    pub fn revisions(&self, name: &str) -> Result<Vec<u32>> {
        let entries = self.entries()?.into_iter();
        Ok(entries.filter(|entry| entry.0 == name).map(|entry| entry.1).collect())
    }

    /// Reads what a revision is made of.
    pub fn read(&self, name: &str, revision: u32) -> Result<Revision> {
        let path = self.meta_path(name, revision);
        let read = || -> Result<Revision> {
            let text = fs::read(&path).while_doing(|| "opening it".into())?;
            let found: Revision =
                serde_json::from_slice(&text).while_doing(|| "understanding it".into())?;
            if (found.name.as_str(), found.revision) != (name, revision) {
                return Err(Error::system("it is about another image"));
            }
            match found.data_blobs.iter().find(|hash| !is_hash(hash)) {
                Some(hash) => Err(Error::system(format!("`{}` is no hash", hash.escape_debug()))),
                None => Ok(found),
            }
        };
        read().while_doing(|| format!("reading the image's `{}`", path.display()))
    }

    /// Where a blob lies.
    pub fn blob(&self, hash: &str) -> PathBuf {
        self.path.join("data").join(&hash[..2]).join(hash)
    }

    /// How a layer names the blob below it, relative to itself.
    pub fn relative(hash: &str) -> String {
        format!("../../data/{}/{hash}", &hash[..2])
    }

    /// An empty file in the repository, gone unless it is [added](Self::add).
    pub fn scratch(&self) -> Result<NamedTempFile> {
        self.initialise()?;
        let tmp = self.path.join(".tmp");
        NamedTempFile::new_in(&tmp)
            .while_doing(|| format!("creating a file in `{}`", tmp.display()))
    }

    /// A folder in the repository, gone with the value. What a killed program left goes, too.
    pub fn scratch_folder(&self) -> Result<Scratch> {
        self.initialise()?;
        Scratch::make(&self.path.join(".tmp"))
    }

    /// Takes a complete disk that stands alone as the first revision of a new image.
    /// `disk` must be on the repository's file system (see [`scratch_folder`]).
    ///
    /// # Errors
    ///
    /// When the image exists; unless `replace`, then it gets one more revision.
    ///
    /// [`scratch_folder`]: Self::scratch_folder
    pub fn add(&self, name: &str, disk: &Path, owner: &str, replace: bool) -> Result<Revision> {
        self.add_on(Addition { name, disk, owner, replace, below: &[] })
    }

    /// As [`add`](Self::add), for a disk that lies on others.
    pub fn add_on(&self, addition: Addition<'_>) -> Result<Revision> {
        let Addition { name, disk, owner, replace, below } = addition;
        self.initialise()?;
        // The slow part needs no lock.
        let hash = seal(disk).while_doing(|| format!("reading `{}`", disk.display()))?;
        let top = Layer { hash, copy: Some(disk.to_owned()) };
        let layers: Vec<Layer> = below.iter().cloned().chain([top]).collect();
        let custom_meta = serde_json::json!({});
        self.store(name, replace, &layers, |revision| Revision {
            owner: owner.into(),
            custom_meta,
            ..revision
        })
    }

    /// Makes a new image of the same blobs as `source`, a revision of this repository or,
    /// with all its blobs [brought](Self::bring) here, of another.
    ///
    /// # Errors
    ///
    /// When the image exists, or a blob is gone.
    pub fn add_same(
        &self,
        name: &str,
        source: &Revision,
        blobs: &[Layer],
        owner: &str,
    ) -> Result<Revision> {
        self.initialise()?;
        self.store(name, false, blobs, |revision| Revision {
            owner: owner.into(),
            kind: source.kind,
            custom_meta: source.custom_meta.clone(),
            ..revision
        })
    }

    /// Copies a blob of another repository into `scratch`, unless there is no need to.
    ///
    /// # Errors
    ///
    /// When its content is not what its name says.
    pub fn bring(&self, from: &Self, hash: &str, scratch: &Scratch) -> Result<Layer> {
        let (source, copy) = (from.blob(hash), scratch.path().join(hash));
        let hash = hash.to_owned();
        if from.path == self.path || self.blob(&hash).exists() {
            return Ok(Layer { hash, copy: None });
        }
        let bring = || -> Result<Layer> {
            fs::copy(&source, &copy).while_doing(|| format!("writing `{}`", copy.display()))?;
            let found = seal(&copy).while_doing(|| format!("reading `{}`", copy.display()))?;
            if found != hash {
                return Err(Error::system("its content is not what its name says: it is damaged")
                    .help("import or build the image again"));
            }
            Ok(Layer { hash, copy: Some(copy) })
        };
        bring().while_doing(|| format!("copying the blob `{}`", source.display()))
    }

    /// Makes a revision of these blobs appear, as `complete` makes it whole.
    fn store(
        &self,
        name: &str,
        replace: bool,
        layers: &[Layer],
        complete: impl FnOnce(Revision) -> Revision,
    ) -> Result<Revision> {
        if !uri::plain(name) {
            return Err(Error::usage(format!("`{}` cannot name an image", name.escape_debug())));
        }
        let _lock = self.lock()?;
        let next = match self.revisions(name)?.last() {
            None => 0,
            Some(last) if replace => last + 1,
            Some(_) => return Err(self.exists(name)),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let revision = complete(Revision {
            name: name.into(),
            revision: next,
            kind: Kind::Vm,
            owner: String::new(),
            timestamp: now.as_secs_f64(),
            data_blobs: layers.iter().map(|layer| layer.hash.clone()).collect(),
            custom_meta: serde_json::Value::Null,
        });
        let store = || -> Result<()> {
            for layer in layers {
                self.place(&layer.hash, layer.copy.as_deref())
                    .while_doing(|| format!("storing the image `{name}`"))?;
            }
            self.publish(&revision)
        };
        store().inspect_err(|_| self.drop_unused(&revision.data_blobs))?;
        Ok(revision)
    }

    /// Makes a blob appear; one that is there already is the same.
    fn place(&self, hash: &str, file: Option<&Path>) -> Result<()> {
        let blob = self.blob(hash);
        let Some(file) = file else {
            return match blob.try_exists() {
                Ok(true) => Ok(()),
                _ => Err(Error::not_found("what it lies on has been deleted meanwhile")),
            };
        };
        let place = || -> io::Result<()> {
            let folder = blob.parent().expect("a blob lies in a folder");
            fs::create_dir_all(folder)?;
            fs::rename(file, &blob)?;
            sync(folder)?;
            sync(&self.path.join("data"))
        };
        place().while_doing(|| format!("moving it to `{}`", blob.display()))
    }

    /// The error for a name that is taken; the text is pcocc's.
    pub fn exists(&self, name: &str) -> Error {
        Error::usage(format!("Image {name} already exists in repo {}", self.name))
            .help(format!("choose another name, or delete it: `pavo image delete {name}`"))
    }

    /// Makes a revision visible.
    fn publish(&self, revision: &Revision) -> Result<()> {
        let target = self.meta_path(&revision.name, revision.revision);
        let mut file = self.scratch()?;
        let text = serde_json::to_vec_pretty(revision).expect("plain data is always valid JSON");
        let write = |file: &mut NamedTempFile| -> io::Result<()> {
            file.write_all(&text)?;
            file.as_file().set_permissions(Permissions::from_mode(0o444))?;
            file.as_file().sync_all()
        };
        write(&mut file)
            .and_then(|()| file.persist_noclobber(&target).map(drop).map_err(|error| error.error))
            .and_then(|()| sync(&self.path.join("meta")))
            .while_doing(|| format!("writing `{}`", target.display()))
    }

    /// All revisions of all images, sorted.
    pub fn entries(&self) -> Result<Vec<(String, u32)>> {
        if !self.is_initialised()? {
            return Ok(Vec::new());
        }
        let meta = self.path.join("meta");
        let list = || -> io::Result<Vec<(String, u32)>> {
            let mut entries = Vec::new();
            for entry in fs::read_dir(&meta)? {
                let file = entry?.file_name();
                entries.extend(file.to_str().and_then(entry_of));
            }
            entries.sort_unstable();
            Ok(entries)
        };
        list().while_doing(|| format!("listing `{}`", meta.display()))
    }

    fn meta_path(&self, name: &str, revision: u32) -> PathBuf {
        self.path.join("meta").join(format!("{name}@{revision}"))
    }

    /// Whether there is a repository of our version.
    fn is_initialised(&self) -> Result<bool> {
        let path = self.path.join(".config");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => {
                return Err(error).while_doing(|| format!("reading `{}`", path.display()));
            }
        };
        let version = text.lines().find_map(|line| line.strip_prefix("version:")).map(str::trim);
        if version == Some(VERSION) {
            return Ok(true);
        }
        let version = version.unwrap_or("unknown").escape_debug();
        let error = format!("the repository `{}` has version {version}, not {VERSION}", self.name);
        Err(Error::system(error).help("pcocc converts it: `pcocc image repo gc REPO`"))
    }

    /// Makes the folders of an empty repository.
    fn initialise(&self) -> Result<()> {
        let make = || -> Result<()> {
            let step = || "creating it".to_owned();
            if self.is_initialised()? {
                return fs::create_dir_all(self.path.join(".tmp")).while_doing(step);
            }
            let foreign = match fs::read_dir(&self.path) {
                Ok(entries) => entries.flatten().any(|entry| {
                    // `.config` too: another one may be making the repository right now.
                    ![".config", ".tmp", "data", "meta"]
                        .iter()
                        .any(|ours| entry.file_name() == *ours)
                }),
                Err(_) => false,
            };
            if foreign {
                return Err(Error::usage("the folder is not empty, and no repository")
                    .help("give repositories folders of their own"));
            }
            for folder in [".tmp", "data", "meta"] {
                fs::create_dir_all(self.path.join(folder)).while_doing(step)?;
            }
            let tmp = self.path.join(".tmp");
            let mut config = NamedTempFile::new_in(&tmp).while_doing(step)?;
            let mode = Permissions::from_mode(0o644);
            let write = || -> io::Result<()> {
                writeln!(config, "version: {VERSION}")?;
                config.as_file().set_permissions(mode)?;
                config.as_file().sync_all()?;
                match config.persist_noclobber(self.path.join(".config")) {
                    // Another one was faster: it is the same.
                    Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Ok(()),
                    Err(error) => Err(error.error),
                    Ok(_) => sync(&self.path),
                }
            };
            write().while_doing(step)?;
            self.is_initialised().map(drop)
        };
        make().while_doing(|| {
            format!("preparing the repository `{}` in `{}`", self.name, self.path.display())
        })
    }

    /// Keeps other writers away as long as the value lives.
    ///
    /// # Errors
    /// When somebody else has kept us away for [`LOCK_LIMIT`]: whoever may read the
    /// repository can hold its lock.
    fn lock(&self) -> Result<Flock<File>> {
        let path = self.path.join(".config");
        let doing = || format!("locking the repository `{}`", self.name);
        let mut file = File::open(&path).while_doing(doing)?;
        let deadline = Instant::now() + LOCK_LIMIT;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((back, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = back,
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(Error::system("another program has held it for a minute")
                        .help(format!("`fuser -v {}` says which", path.display())))
                    .while_doing(doing);
                }
                Err((_, errno)) => return Err(errno).while_doing(doing),
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }
}

/// `name@revision`, if the file is one of ours.
fn entry_of(file: &str) -> Option<(String, u32)> {
    let (name, revision) = file.rsplit_once('@')?;
    Some((name.to_owned(), revision.parse().ok()?)).filter(|_| uri::plain(name))
}

/// Whether `hash` is one that we could have written.
fn is_hash(hash: &str) -> bool {
    hash.len() == 64 && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Makes a file ready to be a blob: unchangeable and on the disk; returns its hash.
fn seal(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    file.set_permissions(Permissions::from_mode(0o444))?;
    file.sync_all()?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a folder's entries through to the disk.
fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests;
