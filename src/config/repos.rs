//! `repos.yaml`: image repositories in order of priority.

use super::expand::{Vars, expand};
use super::read::Item;
use super::types::Repo;

pub const KEYS: &[&str] = &["repos", "cache"];
pub const REPO: &[&str] = &["name", "path"];
pub const CACHE: &[&str] = &["path"];

/// Reads the files, the ones that take priority first.
pub fn read(files: &[Item], vars: &Vars) -> Vec<Repo> {
    let mut repos: Vec<Repo> = Vec::new();
    let mut has_cache = false;
    for file in files {
        let fields = file.fields(KEYS);
        for item in fields.get("repos").map(Item::list).unwrap_or_default() {
            let Some((name, path)) = read_one(&item) else { continue };
            if repos.iter().any(|repo| repo.name == name) {
                item.problem(format!("Duplicate repository: {name}"));
            } else {
                repos.push(Repo { name, path: expand(&path, vars).into() });
            }
        }
        // The cache of container images: pcocc's files load, nothing uses it here.
        if let Some(cache) = fields.get("cache") {
            cache.fields(CACHE).required("path").and_then(Item::text);
            if std::mem::replace(&mut has_cache, true) {
                cache.problem("Only a single cache can be configured");
            }
        }
    }
    repos
}

fn read_one(item: &Item) -> Option<(String, String)> {
    let fields = item.fields(REPO);
    let is_name = |name: &str| {
        !name.starts_with(['.', '-'])
            && !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    };
    let (name, path) = (fields.required("name"), fields.required("path"));
    let name = name.and_then(|item| item.text_like("a name of letters, digits, `_.-`", is_name));
    let path = path.and_then(Item::text);
    Some((name?, path?))
}
