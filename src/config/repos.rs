//! `repos.yaml`: image repositories in order of priority, and where hosts keep copies.

use super::expand::{Vars, expand};
use super::read::Item;
use super::recipe;
use super::types::{ImageCache, Repo};

pub const KEYS: &[&str] = &["repos", "cache"];
pub const REPO: &[&str] = &["name", "path"];
pub const CACHE: &[&str] = &["path", "size"];

/// Reads the files, the ones that take priority first.
pub fn read(files: &[Item], vars: &Vars) -> (Vec<Repo>, Option<ImageCache>) {
    let mut repos: Vec<Repo> = Vec::new();
    let (mut has_cache, mut image_cache) = (false, None);
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
        // Without a size it is the cache of container images: pcocc's files load, and nothing
        // uses that here.
        if let Some(cache) = fields.get("cache") {
            let fields = cache.fields(CACHE);
            let path = fields.required("path").and_then(Item::text);
            let size = fields.get("size").and_then(recipe::size);
            image_cache = path.zip(size).map(|(path, mib)| ImageCache {
                path: expand(&path, vars).into(),
                bytes: mib << 20,
            });
            if std::mem::replace(&mut has_cache, true) {
                cache.problem("Only a single cache can be configured");
            }
        }
    }
    (repos, image_cache)
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
