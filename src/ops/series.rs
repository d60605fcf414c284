//! The checkpoints that a job takes of itself, one after the other, in one folder:
//!
//! ```text
//! DIR/42-1f0c9a3e.1    of job 42, the first: gone once the second is whole
//! DIR/42-1f0c9a3e.2
//! ```
//!
//! The word after the job's number was drawn when it was submitted: numbers of jobs come again.

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::checkpoint::remove;
use super::reach::is_ours;
use super::restart::Checkpoint;
use crate::error::{Context, Error, Result};

/// See the module.
#[derive(Clone, Debug)]
pub struct Series {
    dir: PathBuf,
    name: String,
}

impl Series {
    /// Those of a job in a folder, which is absolute.
    pub fn new(dir: &Path, job: u32, tag: &str) -> Self {
        Self { dir: dir.into(), name: format!("{job}-{tag}") }
    }

    /// Makes the folder if there is none.
    ///
    /// # Errors
    /// When there can be none.
    pub fn prepare(dir: &Path) -> Result<()> {
        let doing = || format!("creating the folder of checkpoints `{}`", dir.display());
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error).while_doing(doing),
            _ if !dir.is_dir() => Err(Error::usage("it is no folder")).while_doing(doing),
            _ => Ok(()),
        }
    }

    /// All of them, whole or not, oldest first.
    fn all(&self) -> Result<Vec<(u32, PathBuf)>> {
        let doing = || format!("looking for checkpoints in `{}`", self.dir.display());
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).while_doing(doing)? {
            let entry = entry.while_doing(doing)?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(&self.name));
            let number = number.and_then(|rest| rest.strip_prefix('.')?.parse().ok());
            all.extend(number.map(|number| (number, entry.path())));
        }
        all.sort();
        Ok(all)
    }

    /// The newest that is whole, and why newer ones are not gone on from.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn newest(&self) -> Result<(Option<PathBuf>, Vec<Error>)> {
        let mut others = Vec::new();
        for (_, path) in self.all()?.into_iter().rev() {
            // Where others may write, they could have put one there.
            let ours = if is_ours(&path) { Ok(()) } else { Err(foreign(&path)) };
            match ours.and_then(|()| Checkpoint::open(&path)) {
                Ok(_) => return Ok((Some(path), others)),
                Err(error) => others.push(error),
            }
        }
        Ok((None, others))
    }

    /// Where the next one is to be: nothing is there.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn next(&self) -> Result<PathBuf> {
        let last = self.all()?.last().map_or(0, |(number, _)| *number);
        Ok(self.dir.join(format!("{}.{}", self.name, last.saturating_add(1))))
    }

    /// Removes all that are older than this one, which is whole. What cannot be removed is
    /// returned.
    pub fn keep_from(&self, newest: &Path) -> Vec<Error> {
        let all = match self.all() {
            Ok(all) => all,
            Err(error) => return vec![error],
        };
        let older = all.iter().take_while(|(_, path)| path != newest);
        older.filter_map(|(_, path)| remove(path).err()).collect()
    }
}

fn foreign(path: &Path) -> Error {
    let path = path.display();
    Error::usage(format!("`{path}` is another user's: it is not gone on from"))
        .help("name a folder for checkpoints where only you may write")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::checkpoint::{MANIFEST, UNFINISHED};

    #[test]
    fn older_ones_go_once_there_is_a_newer_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("in");
        Series::prepare(&inside).unwrap();
        Series::prepare(&inside).unwrap();
        let series = Series::new(&inside, 42, "ab");
        assert_eq!(series.next().unwrap(), inside.join("42-ab.1"));
        for name in ["42-ab.1", "42-ab.9", "42-ab.10", "42-ab.x", "42-abc.3", "4-ab.11"] {
            fs::create_dir(inside.join(name)).unwrap();
        }
        for file in [MANIFEST, "vm0.memory.zst"] {
            fs::write(inside.join("42-ab.1").join(file), "").unwrap();
        }
        fs::write(inside.join("42-ab.9").join(UNFINISHED), "").unwrap();
        assert_eq!(series.next().unwrap(), inside.join("42-ab.11"));
        let (newest, others) = series.newest().unwrap();
        assert!(newest.is_none());
        let reports: Vec<String> = others.iter().map(Error::report).collect();
        assert!(reports[0].contains("42-ab.10") && reports[0].contains("it has no"), "{reports:?}");
        assert!(reports[1].contains("42-ab.9") && reports[1].contains("not finished"));
        assert!(reports[2].contains("42-ab.1`") && reports[2].contains("damaged"));

        // A link may lead to what is another's.
        std::os::unix::fs::symlink(dir.path(), inside.join("42-ab.11")).unwrap();
        let (_, others) = series.newest().unwrap();
        assert!(others[0].report().contains("42-ab.11` is another user's"), "{others:?}");
        fs::remove_file(inside.join("42-ab.11")).unwrap();

        let left = series.keep_from(&inside.join("42-ab.10"));
        assert!(left.is_empty(), "{left:?}");
        let mut names: Vec<_> =
            fs::read_dir(&inside).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["4-ab.11", "42-ab.10", "42-ab.x", "42-abc.3"]);
        // What somebody has put into one stays, and is told.
        fs::write(inside.join("42-ab.10/mine"), "").unwrap();
        let left = series.keep_from(&inside.join("42-ab.11"));
        assert_eq!(left.len(), 1);
        assert!(left[0].report().contains("42-ab.10"), "{left:?}");
        let error = Series::prepare(&inside.join("42-ab.10/mine")).unwrap_err().report();
        assert!(error.contains("it is no folder"), "{error}");
    }
}
