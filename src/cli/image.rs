//! `pavo image`

mod build;
mod cache;
mod derive;
mod repo;

use std::cell::Cell;

use clap::{Args, Subcommand};

use super::App;
use super::out::{Column, OutputArgs};
use crate::error::Result;
use crate::image::download::Hash;
use crate::image::header::Format;
use crate::image::library::{ImageRow, Library, Source};

/// Work with the images that VMs start from
///
/// An image is named [REPO:]NAME[@REVISION]; without a revision the newest is meant.
#[derive(Debug, Args)]
pub struct Image {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(List),
    Show(Show),
    Import(Import),
    Export(derive::Export),
    Copy(derive::Copy),
    Resize(derive::Resize),
    Squash(derive::Squash),
    Delete(Delete),
    Build(build::Build),
    Repo(repo::Repo),
    Cache(cache::Cache),
}

impl Image {
    pub fn run(self, app: &App) -> Result<u8> {
        let config = super::config::load(app)?;
        let library = app.library(&config);
        let outcome = match self.verb {
            Verb::List(verb) => verb.run(app, &library),
            Verb::Show(verb) => verb.run(app, &library),
            Verb::Import(verb) => verb.run(app, &library),
            Verb::Export(verb) => verb.run(app, &library),
            Verb::Copy(verb) => verb.run(app, &library),
            Verb::Resize(verb) => verb.run(app, &library),
            Verb::Squash(verb) => verb.run(app, &library),
            Verb::Delete(verb) => verb.run(app, &library),
            Verb::Build(verb) => verb.run(app, &library),
            Verb::Repo(verb) => verb.run(app, &library),
            Verb::Cache(verb) => verb.run(app, &config, &library),
        };
        app.warn_of(&library);
        outcome.map(|()| 0)
    }
}

/// List images
#[derive(Debug, Args)]
struct List {
    /// Only of this repository
    #[arg(short = 'R', long)]
    repo: Option<String>,

    /// Only images whose name holds this; `^` and `$` tie it to the start and the end,
    /// `*` or `.*` stands for anything
    #[arg(value_name = "PATTERN")]
    pattern: Option<String>,

    #[command(flatten)]
    output: OutputArgs,
}

impl List {
    fn run(self, app: &App, library: &Library) -> Result<()> {
        let pattern = self.pattern.unwrap_or_default();
        let rows = library.list(self.repo.as_deref(), |name| matches(&pattern, name))?;
        let columns: &[Column<ImageRow>] = &[
            Column { title: "name", text: |row| row.name.clone() },
            Column { title: "type", text: |row| row.kind.as_str().into() },
            Column { title: "revision", text: |row| row.revision.to_string() },
            Column { title: "repo", text: |row| row.repo.clone() },
            Column { title: "owner", text: |row| row.owner.clone() },
            Column { title: "date", text: |row| date(row.timestamp) },
        ];
        app.out.list(self.output, &rows, columns)
    }
}

/// Show an image and its revisions
#[derive(Debug, Args)]
struct Show {
    #[arg(value_name = "IMAGE")]
    image: String,

    #[command(flatten)]
    output: OutputArgs,
}

impl Show {
    fn run(self, app: &App, library: &Library) -> Result<()> {
        let image = library.show(&self.image)?;
        let mut lines = vec![
            ("name", image.name.clone()),
            ("type", image.kind.as_str().to_owned()),
            ("repo", image.repo.clone()),
            ("owner", image.owner.clone()),
        ];
        lines.extend(image.revisions.iter().map(|row| {
            let text = format!(
                "{}  {}  {}  {}  {}",
                row.revision,
                size(row.size),
                counted(row.layers, "layer"),
                row.owner,
                date(row.timestamp)
            );
            ("revision", text)
        }));
        app.out.record(self.output, &image, &lines)
    }
}

/// Import a disk image
///
/// The disk is checked, then converted to a qcow2 of its own; the source is not needed
/// any more. It may be compressed (.gz, .xz, .zst), and lie on a web server.
#[derive(Debug, Args)]
struct Import {
    /// The format: qcow2, raw, vmdk, vdi, vpc or qed [default: by suffix or header]
    #[arg(short = 't', long = "fmt", value_name = "FORMAT")]
    format: Option<Format>,

    /// The SHA-256 that the file must have, as distributions list it
    #[arg(long, value_name = "HASH")]
    sha256: Option<Hash>,

    /// The file, or its URL; `FORMAT:PATH` says its format too
    #[arg(value_name = "SOURCE")]
    source: String,

    /// [REPO:]NAME of the new image
    #[arg(value_name = "DEST")]
    dest: String,
}

impl Import {
    fn run(self, app: &App, library: &Library) -> Result<()> {
        let place = self.source.escape_debug().to_string();
        app.out.progress(&format!("Importing {place}"));
        let shown = Cell::new(None);
        let progress = |done: u64, total: Option<u64>| {
            // In percent, or in MiB where nobody knows how many come; in a log in larger steps.
            let (so_far, unit, pace) = match total {
                Some(total) => (done * 100 / total.max(1), "%", 10),
                None => (done >> 20, "MiB", 100),
            };
            let pace = if app.out.stderr_is_terminal() { 1 } else { pace };
            let step = so_far / pace;
            if shown.replace(Some(step)) != Some(step) {
                app.out.progress(&format!("Fetched {so_far} {unit} of {place}"));
            }
        };
        let (format, hash) = (self.format, self.sha256.as_ref());
        let source = Source { place: &self.source, format, hash, progress: &progress };
        let image = library.import(source, &self.dest, &app.env.user)?;
        app.out.status(&format!("Imported {} ({})", image.uri, size(image.virtual_size)));
        Ok(())
    }
}

/// Delete an image, or one revision of it
#[derive(Debug, Args)]
struct Delete {
    #[arg(value_name = "IMAGE[@REVISION]")]
    image: String,
}

impl Delete {
    fn run(self, app: &App, library: &Library) -> Result<()> {
        let freed = library.delete(&self.image)?;
        app.out.status(&format!(
            "Deleted {} of {}, {} freed",
            counted(freed.revisions.len(), "revision"),
            self.image,
            size(freed.bytes)
        ));
        Ok(())
    }
}

/// Whether `name` holds `pattern`, read as the part of a regular expression that names
/// need: `^`, `$`, and `*` or `.*` for anything.
fn matches(pattern: &str, name: &str) -> bool {
    let (rest, from_start) = match pattern.strip_prefix('^') {
        Some(rest) => (rest, true),
        None => (pattern, false),
    };
    let (rest, to_end) = match rest.strip_suffix('$') {
        Some(rest) => (rest, true),
        None => (rest, false),
    };
    let rest = rest.replace(".*", "*");
    let parts: Vec<&str> = rest.split('*').collect();
    let (first, last) = (parts[0], parts[parts.len() - 1]);
    if parts.len() == 1 {
        return match (from_start, to_end) {
            (true, true) => name == first,
            (true, false) => name.starts_with(first),
            (false, true) => name.ends_with(first),
            (false, false) => name.contains(first),
        };
    }
    let mut left = name;
    if from_start {
        let Some(rest) = left.strip_prefix(first) else { return false };
        left = rest;
    }
    if to_end {
        let Some(rest) = left.strip_suffix(last) else { return false };
        left = rest;
    }
    let inner = &parts[usize::from(from_start)..parts.len() - usize::from(to_end)];
    inner.iter().all(|part| match left.find(part) {
        Some(at) => {
            left = &left[at + part.len()..];
            true
        }
        None => false,
    })
}

/// `1 blob`, `2 blobs`
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 100.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// `2026-11-21 04:05` (UTC) of seconds since 1970, by Howard Hinnant's
/// `civil_from_days`.
fn date(timestamp: f64) -> String {
    // The years 1970 to 9999.
    let seconds = timestamp.clamp(0.0, 253_402_300_799.0) as u64;
    let (days, minutes) = (seconds / 86_400, seconds % 86_400 / 60);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_a_part_of_the_name() {
        for (pattern, yes) in [
            ("", true),
            ("bia", true),
            ("^deb", true),
            ("^bia", false),
            ("12$", true),
            ("deb$", false),
            ("^debian-12$", true),
            ("deb.*12", true),
            ("d*n*2", true),
            ("^d*2$", true),
            ("2*d", false),
            ("^deb*bia", false),
        ] {
            assert_eq!(matches(pattern, "debian-12"), yes, "{pattern}");
        }
    }

    #[test]
    fn sizes_and_dates_are_for_people() {
        assert_eq!(
            [0, 1023, 1536, 21_037_056, 64 << 40].map(size),
            ["0 B", "1023 B", "1.5 KiB", "20.1 MiB", "64.0 TiB"]
        );
        for (seconds, text) in [
            (0.0, "1970-01-01 00:00"),
            (951_782_399.0, "2000-02-28 23:59"),
            (951_782_400.0, "2000-02-29 00:00"),
            (1_795_233_900.9, "2026-11-21 04:05"),
            (f64::NAN, "1970-01-01 00:00"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
