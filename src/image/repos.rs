//! The repositories themselves: what is in them, and what nothing needs any more.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::library::Library;
use super::repository::{Collected, Repository};
use crate::error::{Context, Result};

/// One line of a list of repositories.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RepoRow {
    pub name: String,
    pub path: PathBuf,
    /// What is in it; nothing, if that cannot be read.
    #[serde(flatten)]
    pub content: Option<Content>,
    pub writable: bool,
}

/// What is in a repository.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Content {
    pub images: usize,
    pub revisions: usize,
    /// Of all blobs.
    pub bytes: u64,
}

impl Library {
    /// The configured repositories, in order of priority.
    pub fn repositories(&self) -> Result<Vec<RepoRow>> {
        let row = |repo: &Repository| {
            let content = content(repo).map_err(|error| self.warn(error.report())).ok();
            RepoRow {
                name: repo.name.clone(),
                path: repo.path().to_owned(),
                writable: content.is_some() && repo.is_writable(),
                content,
            }
        };
        Ok(self.selected(None)?.into_iter().map(row).collect())
    }

    /// The revisions that each blob is part of, `REPO:NAME@REVISION`.
    pub fn images_by_blob(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for repo in self.selected(None)? {
            for (name, number) in repo.entries()? {
                match repo.read(&name, number) {
                    Ok(revision) => {
                        let image = format!("{}:{name}@{number}", repo.name);
                        for blob in revision.data_blobs {
                            found.entry(blob).or_default().push(image.clone());
                        }
                    }
                    // Deleted in the meantime, or not ours to read: said, not fatal.
                    Err(error) => self.warn(error.report()),
                }
            }
        }
        Ok(found)
    }

    /// Removes what nothing in a repository needs any more; with `dry_run` it only looks.
    pub fn collect(&self, repo: &str, dry_run: bool) -> Result<Collected> {
        // Names are unique, and an unknown one is an error.
        let repo = self.selected(Some(repo))?[0];
        repo.collect(dry_run).while_doing(|| format!("clearing the repository `{}`", repo.name))
    }
}

fn content(repo: &Repository) -> Result<Content> {
    let read = || -> Result<Content> {
        Ok(Content {
            images: repo.newest()?.len(),
            revisions: repo.entries()?.len(),
            bytes: repo.blobs()?.values().sum(),
        })
    };
    read().while_doing(|| format!("reading the repository `{}`", repo.name))
}
