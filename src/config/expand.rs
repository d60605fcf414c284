//! The variables of paths: `%name`, `%{name}`, `%{env:VAR}`, `%%` and `~`.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What variables stand for.
///
/// pcocc's are `user`, `homedir`, `clusterdir` (the job's own folder),
/// `clusteruser`, `vm_rank`, and `env:VAR` for each variable of the environment.
#[derive(Clone, Debug, Default)]
pub struct Vars {
    own: BTreeMap<String, String>,
    /// What the above are added to: an environment is long, and VMs are many.
    below: Option<Arc<Vars>>,
}

impl Vars {
    /// None but those of `below`.
    pub fn above(below: &Arc<Self>) -> Self {
        Self { own: BTreeMap::new(), below: Some(below.clone()) }
    }

    /// Sets a variable.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.own.insert(name.into(), value.into());
        self
    }

    fn get(&self, name: &str) -> Option<&String> {
        self.own.get(name).or_else(|| self.below.as_ref()?.get(name))
    }
}

/// Replaces variables, then a `~` that begins the text. What is not known is left
/// as it is; values are not expanded again.
pub fn expand(text: &str, vars: &Vars) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        expanded += &rest[..at];
        rest = &rest[at..];
        let (name, length) = variable(&rest[1..]);
        match vars.get(name) {
            _ if rest.starts_with("%%") => {
                expanded.push('%');
                rest = &rest[2..];
            }
            Some(value) if length > 0 => {
                expanded += value;
                rest = &rest[1 + length..];
            }
            _ => {
                expanded.push('%');
                rest = &rest[1..];
            }
        }
    }
    expanded += rest;
    match (text.strip_prefix('~'), vars.get("homedir")) {
        (Some(below), Some(home)) if below.is_empty() || below.starts_with('/') => {
            home.clone() + &expanded[1..]
        }
        _ => expanded,
    }
}

/// The name that follows a `%`, and how long it is with its braces.
fn variable(text: &str) -> (&str, usize) {
    if let Some((name, _)) = text.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
        return (name, name.len() + 2);
    }
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    (&text[..end], end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vars() -> Vars {
        Vars::default()
            .with("user", "ada")
            .with("homedir", "/home/ada")
            .with("vm_rank", "3")
            .with("env:SCRATCH", "/scratch/%user")
    }

    #[test]
    fn variables_are_replaced_once_and_the_unknown_stay() {
        for (text, expanded) in [
            ("/data/%user/disk-%{vm_rank}.qcow2", "/data/ada/disk-3.qcow2"),
            ("%{env:SCRATCH}/x", "/scratch/%user/x"),
            ("100%%user", "100%user"),
            ("%clusterdir/%{env:NONE}/%/%{open", "%clusterdir/%{env:NONE}/%/%{open"),
            ("~/images", "/home/ada/images"),
            ("~", "/home/ada"),
            ("~bob/images", "~bob/images"),
            ("a~", "a~"),
            ("%user_", "%user_"),
        ] {
            assert_eq!(expand(text, &vars()), expanded, "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_without_signs_is_itself(text in "[^%~]*") {
            prop_assert_eq!(expand(&text, &vars()), text);
        }

        #[test]
        fn no_text_makes_it_panic(text in "[%{}~a:é/]*") {
            expand(&text, &vars());
        }
    }
}
