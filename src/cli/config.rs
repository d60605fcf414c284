//! `pavo config`, and how every verb gets its configuration.

use clap::{Args, Subcommand};
use serde::Serialize;

use super::App;
use super::out::OutputArgs;
use crate::config::{self, Problem, Sources};
use crate::error::{Kind, Result};

/// Look at the configuration
#[derive(Debug, Args)]
pub struct Config {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Check(Check),
}

/// Report everything that is wrong in the configuration
///
/// Each mistake is one line, `FILE:LINE:COLUMN: KEY: what is wrong`, and the exit
/// code is 3 if there is any. This reads the site's files and yours, and looks
/// whether what templates name as `user-data` can be read.
#[derive(Debug, Args)]
struct Check {
    #[command(flatten)]
    format: OutputArgs,
}

impl Config {
    pub fn run(self, app: &App) -> Result<u8> {
        let Verb::Check(check) = self.verb;
        let sources = sources(app);
        let loaded = config::load(&sources);
        let problems = loaded.check_named_files(&sources).into_iter().chain(loaded.problems);
        let findings = Findings::new(problems, loaded.warnings);
        findings.report(app, check.format, "configuration is correct")
    }
}

/// The configuration, for a verb that needs it. Shows its warnings.
///
/// # Errors
/// [`Kind::Config`] with every mistake there is.
pub fn load(app: &App) -> Result<config::Config> {
    load_from(app, &sources(app))
}

/// As [`load`], from sources that the verb needs too.
pub fn load_from(app: &App, sources: &Sources) -> Result<config::Config> {
    let loaded = config::load(sources);
    for warning in &loaded.warnings {
        app.out.warn(&warning.to_string());
    }
    loaded.into_config()
}

/// Where the configuration lies. Says so when that may not be expected.
pub fn sources(app: &App) -> Sources {
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    let (sources, notes) = Sources::find(
        app.env.system_conf.as_deref(),
        app.env.user_conf.as_deref(),
        &app.env.home,
        &app.env.user,
        std::env::vars_os().filter_map(text).collect(),
    );
    notes.iter().for_each(|note| app.out.status(&format!("note: {note}")));
    sources
}

/// What a check has found, in the order of files and lines.
#[derive(Debug)]
pub struct Findings {
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

/// A finding, for programs.
#[derive(Serialize)]
struct Finding<'a> {
    /// `error` or `warning`.
    severity: &'static str,
    #[serde(flatten)]
    problem: &'a Problem,
}

impl Findings {
    pub fn new(problems: impl IntoIterator<Item = Problem>, warnings: Vec<Problem>) -> Self {
        let mut problems: Vec<Problem> = problems.into_iter().collect();
        problems.sort();
        Self { problems, warnings }
    }

    /// Shows them, mistakes as data and warnings beside it, or that `all_is_well`.
    /// Gives the exit code.
    pub fn report(&self, app: &App, format: OutputArgs, all_is_well: &str) -> Result<u8> {
        if format.output.is_some() {
            let finding = |severity| move |problem| Finding { severity, problem };
            let errors = self.problems.iter().map(finding("error"));
            let warnings = self.warnings.iter().map(finding("warning"));
            app.out.list(format, &errors.chain(warnings).collect::<Vec<_>>(), &[])?;
        } else {
            for warning in &self.warnings {
                app.out.warn(&warning.to_string());
            }
            let lines: String =
                self.problems.iter().map(|problem| format!("{problem}\n")).collect();
            let well = self.problems.is_empty().then(|| format!("{all_is_well}\n"));
            app.out.data(&well.unwrap_or(lines))?;
        }
        Ok(if self.problems.is_empty() { 0 } else { Kind::Config.exit_code() })
    }
}
