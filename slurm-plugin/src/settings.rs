//! The plugin's words in plugstack.conf: `required libspank_pavo.so pavo=/path limit=60`.

use std::time::Duration;

/// Where pavo is, unless the build or plugstack.conf says otherwise.
const PROGRAM: &str = match option_env!("PAVO_PATH") {
    Some(path) => path,
    None => "/usr/bin/pavo",
};
const LIMIT: u64 = 60;
const MAX_LIMIT: u64 = 3600;

#[derive(Debug, PartialEq, Eq)]
pub struct Settings {
    /// Absolute path of pavo.
    pub program: String,
    /// How long a set-up or a removal may take.
    pub limit: Duration,
}

impl Settings {
    /// Reads the words. What is wrong is said to whoever wants VMs, and hurts nobody
    /// else.
    pub fn read(arguments: &[&str]) -> Result<Self, String> {
        let mut settings = Self { program: PROGRAM.to_owned(), limit: Duration::from_secs(LIMIT) };
        for argument in arguments {
            match argument.split_once('=') {
                Some(("pavo", path)) if path.starts_with('/') => {
                    path.clone_into(&mut settings.program)
                }
                Some(("limit", text)) => match text.parse() {
                    Ok(seconds @ 1..=MAX_LIMIT) => settings.limit = Duration::from_secs(seconds),
                    _ => return Err(wrong(argument, "`limit=` takes 1 to 3600 seconds")),
                },
                Some(("pavo", _)) => {
                    return Err(wrong(argument, "`pavo=` takes an absolute path"));
                }
                _ => return Err(wrong(argument, "the words are `pavo=/path` and `limit=SECONDS`")),
            }
        }
        Ok(settings)
    }
}

fn wrong(argument: &str, help: &str) -> String {
    format!("plugstack.conf: `{argument}`: {help}; an administrator must mend it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_change_path_and_limit() {
        let read = Settings::read(&["limit=5", "pavo=/opt/pavo"]).unwrap();
        assert_eq!(read, Settings { program: "/opt/pavo".into(), limit: Duration::from_secs(5) });
        assert_eq!(Settings::read(&[]).unwrap().limit, Duration::from_secs(60));
        assert!(Settings::read(&[]).unwrap().program.starts_with('/'));
    }

    #[test]
    fn wrong_words_are_named() {
        for word in ["pavo=pavo", "pavo=", "limit=0", "limit=x", "limit=4000", "limt=5", "verbose"]
        {
            let error = Settings::read(&[word]).unwrap_err();
            assert!(error.contains(word) && error.contains("administrator"), "{error}");
        }
    }
}
