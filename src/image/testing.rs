//! What the tests of this module share.

use super::library::Library;
use crate::config::Repo;

/// The repositories `user` and `site`, both empty, in a folder of their own.
pub fn two_repositories() -> (tempfile::TempDir, Library) {
    let dir = tempfile::tempdir().unwrap();
    let repo = |name: &str| Repo { name: name.into(), path: dir.path().join(name) };
    let library = Library::open(&[repo("user"), repo("site")]);
    (dir, library)
}
