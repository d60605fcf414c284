//! `pavo image repo`

use clap::{Args, Subcommand};

use super::{counted, size};
use crate::cli::App;
use crate::cli::out::{Column, OutputArgs};
use crate::error::Result;
use crate::image::library::Library;
use crate::image::repos::RepoRow;

/// Look after the repositories that images are kept in
#[derive(Debug, Args)]
pub(super) struct Repo {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(List),
    Gc(Gc),
}

impl Repo {
    pub(super) fn run(self, app: &App, library: &Library) -> Result<()> {
        match self.verb {
            Verb::List(verb) => verb.run(app, library),
            Verb::Gc(verb) => verb.run(app, library),
        }
    }
}

/// List repositories, in order of priority
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    output: OutputArgs,
}

impl List {
    fn run(self, app: &App, library: &Library) -> Result<()> {
        let rows = library.repositories()?;
        let columns: &[Column<RepoRow>] = &[
            Column { title: "name", text: |row| row.name.clone() },
            Column { title: "path", text: |row| row.path.display().to_string() },
            Column { title: "images", text: |row| number(row.content.map(|it| it.images)) },
            Column { title: "revisions", text: |row| number(row.content.map(|it| it.revisions)) },
            Column {
                title: "size",
                text: |row| row.content.map_or_else(|| "-".into(), |content| size(content.bytes)),
            },
            Column {
                title: "writable",
                text: |row| if row.writable { "yes" } else { "no" }.into(),
            },
        ];
        app.out.list(self.output, &rows, columns)
    }
}

fn number(count: Option<usize>) -> String {
    count.map_or_else(|| "-".into(), |count| count.to_string())
}

/// Remove what nothing in a repository needs any more
///
/// Blobs that belong to no image, and what killed programs left unfinished. What somebody
/// is importing or saving right now stays.
#[derive(Debug, Args)]
struct Gc {
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,

    /// The repository
    #[arg(value_name = "REPO")]
    repo: String,
}

impl Gc {
    fn run(self, app: &App, library: &Library) -> Result<()> {
        let found = library.collect(&self.repo, self.dry_run)?;
        let (done, freed) = match self.dry_run {
            true => ("Would remove", "would be free"),
            false => ("Removed", "freed"),
        };
        app.out.status(&format!(
            "{done} {} and {}, {} {freed}",
            counted(found.blobs, "blob"),
            counted(found.unfinished, "unfinished image"),
            size(found.bytes)
        ));
        Ok(())
    }
}
