//! The house rules that a compiler cannot check. Each message says what to do.

use std::fs;
use std::path::{Path, PathBuf};

const VALUES: &[&str] = &["error", "model"];
const SYSTEM: &[&str] = &["error", "model", "config", "store", "host"];

/// What each module of `src/` may use, lowest layer first. A module may always
/// use itself. Changing a line here is an architecture decision: say why.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("model", &["error"]),
    ("config", VALUES),
    ("store", VALUES),
    ("host", VALUES),
    ("batch", SYSTEM),
    ("network", SYSTEM),
    ("image", SYSTEM),
    ("vm", SYSTEM),
    ("node", SYSTEM),
    (
        "ops",
        &["error", "model", "config", "store", "host", "batch", "network", "image", "vm", "node"],
    ),
    (
        "daemon",
        // Of `host`, the moments at which tests kill it.
        &[
            "error", "model", "config", "store", "host", "batch", "network", "image", "vm", "node",
            "ops",
        ],
    ),
    (
        "cli",
        &[
            "daemon", "error", "model", "config", "store", "batch", "network", "image", "vm",
            "node", "ops",
        ],
    ),
];

const MAX_LINES: usize = 500;

fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = entries
        .filter(|path| !path.join("Cargo.toml").exists())
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|ext| ext == "rs"))
        .collect();
    found.sort();
    found
}

/// The code of a file without its unit tests, which may reach further.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.split("#[cfg(test)]").next().unwrap().to_owned()
}

/// Panics with every finding at once.
fn none(findings: Vec<String>) {
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

#[test]
fn modules_only_use_the_layers_below_them() {
    let mut findings = Vec::new();
    for path in sources(Path::new("src")) {
        let name = path.strip_prefix("src").unwrap().iter().next().unwrap().to_str().unwrap();
        let module = name.trim_end_matches(".rs");
        let Some((_, allowed)) = LAYERS.iter().find(|(layer, _)| *layer == module) else {
            if !["lib", "main"].contains(&module) {
                findings.push(format!("`{module}` is not in LAYERS: add it"));
            }
            continue;
        };
        for used in code(&path).split("crate::").skip(1) {
            let used = used.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
            if used != module && !allowed.contains(&used) {
                findings.push(format!(
                    "{}: `{module}` may not use `{used}`; move the code, or pass the value in",
                    path.display()
                ));
            }
        }
    }
    none(findings);
}

#[test]
fn every_file_says_what_it_is_for_and_stays_readable() {
    let mut findings = Vec::new();
    for path in sources(Path::new("src")) {
        let lines = code(&path).lines().count();
        if !code(&path).starts_with("//!") {
            findings.push(format!("{}: start with a `//!` summary", path.display()));
        }
        if lines > MAX_LINES {
            findings.push(format!("{}: {lines} lines; split it by idea", path.display()));
        }
    }
    none(findings);
}

#[test]
fn only_out_prints_and_only_keys_builds_keys() {
    let mut findings = Vec::new();
    for path in sources(Path::new("src")) {
        let text = code(&path);
        let file = path.to_str().unwrap();
        let prints = ["println!", "print!", "io::stdout()", "anstream::"];
        if file != "src/cli/out.rs" && prints.iter().any(|word| text.contains(word)) {
            findings.push(format!("{file}: print through `cli::out`"));
        }
        if file != "src/store/keys.rs" && text.contains("\"/pavo/") {
            findings.push(format!("{file}: build keys in `store::keys`"));
        }
    }
    none(findings);
}

#[test]
fn nothing_is_left_for_later() {
    let mut findings = Vec::new();
    for dir in ["src", "tests", "benches"] {
        for path in sources(Path::new(dir)) {
            if path.ends_with("conventions.rs") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            for word in ["TODO", "FIXME", "XXX", "#[ignore]"] {
                if text.contains(word) {
                    findings.push(format!("{}: {word}: do it, or file an issue", path.display()));
                }
            }
        }
    }
    none(findings);
}
