//! The inventory that commands are about, and what is said of it: a line for each record.

use std::fmt::Write;

use super::App;
use super::daemon::keeper;
use super::out::OutputArgs;
use crate::error::{Kind, Result};
use crate::model::node::Tree;
use crate::model::node::request::{Format, Noun, Outcome, Request, Verb};
use crate::model::nodeset::NodeSet;
use crate::ops::inventory;
use crate::ops::nodesets::{self, Known};

/// More lines than this are folded on a terminal.
const FOLDED: usize = 20;

pub use crate::ops::inventory::Rows;

/// The text of a set for the inventory, with what files and Slurm say in it.
async fn filled(app: &App, noun: Noun, text: &str) -> Result<String> {
    match noun {
        Noun::Node => nodesets::fill_in(text, Some(&Known::by(keeper(app)?))).await,
        _ => Ok(text.to_owned()),
    }
}

/// Changes the inventory.
pub async fn apply(app: &App, mut request: Request) -> Result<Vec<Outcome>> {
    use Verb::{Create, Delete, Update};
    if let Create { names, .. } | Update { names, .. } | Delete { names } = &mut request.verb {
        *names = filled(app, request.noun, names).await?;
    }
    keeper(app)?.apply(request).await
}

/// What is known of records.
pub async fn rows(
    app: &App,
    noun: Noun,
    names: Option<&str>,
    fields: &[String],
    own: bool,
) -> Result<Rows> {
    let names = match names {
        Some(names) => Some(filled(app, noun, names).await?),
        None => None,
    };
    keeper(app)?.rows(noun, names.as_deref(), fields, own).await
}

/// Records as a file.
pub async fn export(
    app: &App,
    noun: Noun,
    names: &str,
    format: Format,
) -> Result<(String, Vec<Outcome>)> {
    let names = filled(app, noun, names).await?;
    let (text, missing, _) = keeper(app)?.export(noun, &names, format).await?;
    Ok((text, missing))
}

/// Records as a file, their secrets sealed to a passphrase.
pub async fn export_locked(
    app: &App,
    noun: Noun,
    names: &str,
    format: Format,
    passphrase: &str,
) -> Result<(String, Vec<Outcome>)> {
    let names = filled(app, noun, names).await?;
    let (rows, missing) = keeper(app)?.opened(noun, &names).await?;
    Ok((inventory::lock(noun, rows, format, passphrase)?, missing))
}

/// Does what is asked, and says what came of it.
pub fn change(app: &App, format: OutputArgs, request: Request) -> Result<u8> {
    let dry_run = request.dry_run;
    let outcomes = app.block_on(apply(app, request))?;
    report(app, format, &outcomes, dry_run)
}

/// A line for each record, and how many have succeeded.
pub fn report(app: &App, format: OutputArgs, outcomes: &[Outcome], dry_run: bool) -> Result<u8> {
    let success = outcomes.iter().filter(|outcome| outcome.ok).count();
    if format.output.is_some() {
        app.out.list(format, outcomes, &[])?;
    } else {
        let mut text = String::new();
        if app.out.stdout_is_terminal() && outcomes.len() > FOLDED {
            fold(&mut text, outcomes);
        } else {
            for Outcome { name, text: what, .. } in outcomes {
                let _ = writeln!(text, "{name}: {what}");
            }
        }
        let _ = writeln!(text, "\nSuccess: {success}  Total: {}", outcomes.len());
        app.out.data(&text)?;
    }
    if dry_run {
        app.out.status("Dry run: nothing was changed.");
    }
    Ok(if success == outcomes.len() { 0 } else { Kind::Partial.exit_code() })
}

/// A line for all that came out alike.
fn fold(text: &mut String, outcomes: &[Outcome]) {
    let mut whats: Vec<&str> = outcomes.iter().map(|outcome| outcome.text.as_str()).collect();
    whats.sort_unstable();
    whats.dedup();
    for what in whats {
        let alike = outcomes.iter().filter(|outcome| outcome.text == what);
        let names: NodeSet = alike.map(|outcome| &outcome.name).collect();
        let _ = writeln!(text, "{names} ({}): {what}", names.len());
    }
}

/// Says which records were not there.
pub fn complain(app: &App, missing: &[Outcome]) -> u8 {
    missing.iter().for_each(|it| app.out.status(&format!("{}: {}", it.name, it.text)));
    if missing.is_empty() { 0 } else { Kind::Partial.exit_code() }
}

/// What `show` prints: JSON, unless it is told otherwise.
pub fn print_rows(
    app: &App,
    format: OutputArgs,
    noun: &str,
    rows: Vec<(String, Tree)>,
) -> Result<()> {
    let row = |(name, attr): (String, Tree)| {
        let mut row = Tree::new();
        row.insert(noun.to_owned(), name.into());
        row.insert("attr".into(), attr.into());
        row
    };
    let rows: Vec<Tree> = rows.into_iter().map(row).collect();
    let output = format.output.unwrap_or(super::out::Format::Json);
    app.out.list(OutputArgs { output: Some(output) }, &rows, &[])
}

/// What `list --fields` prints: a column for each field, or records.
pub fn print_fields(
    app: &App,
    format: OutputArgs,
    fields: &[String],
    rows: Vec<(String, Tree)>,
) -> Result<()> {
    let named = rows.into_iter().map(|(name, mut tree)| {
        tree.insert("name".into(), name.into());
        tree
    });
    let rows: Vec<Tree> = named.collect();
    if format.output.is_some() {
        return app.out.list(format, &rows, &[]);
    }
    let mut titles = vec!["name".to_owned()];
    titles.extend(fields.iter().filter(|it| *it != "name").cloned());
    let cell = |row: &Tree, title: &String| match row.get(title) {
        None => String::new(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let cells = rows.iter().map(|row| titles.iter().map(|title| cell(row, title)).collect());
    app.out.data(&app.out.cells(&titles, cells.collect()))
}
