//! Records of the inventory: read from memory, changed one request after the other.

use std::sync::Arc;

use axum::extract::{Extension, Path, Request, State};
use axum::http::StatusCode;
use serde::Deserialize;

use super::{Answer, Asked, Query, Refusal, body};
use crate::daemon::Shared;
use crate::daemon::caller::Caller;
use crate::error::{Error, Result};
use crate::model::api::{Change, Names, Outcomes, Row, Rows, Text};
use crate::model::node::request::{self, Format, Noun, Verb};
use crate::ops::inventory;

/// The longest file that is imported.
const MAX_FILE: usize = 256 << 20;

fn noun(kind: &str) -> Result<Noun, Refusal> {
    Noun::ALL.into_iter().find(|noun| noun.plural() == kind).ok_or_else(|| {
        let all: Vec<&str> = Noun::ALL.iter().map(|noun| noun.plural()).collect();
        let error = Error::not_found("there are no such records");
        Refusal(StatusCode::NOT_FOUND, error.help(format!("there are {}", all.join(", "))))
    })
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listed {
    /// A set; all, where there is none.
    names: Option<String>,
    /// Paths, with commas between them.
    fields: Option<String>,
    /// Without what is inherited.
    own: bool,
}

pub async fn list(
    State(shared): State<Arc<Shared>>,
    Path(kind): Path<String>,
    Query(listed): Query<Listed>,
) -> Result<Answer<Rows>, Refusal> {
    let noun = noun(&kind)?;
    let active = shared.active().await?;
    let inventory = active.inventory();
    let fields = listed.fields.iter().flat_map(|it| it.split(','));
    let fields: Vec<String> = fields.map(str::to_owned).collect();
    let names = listed.names.as_deref();
    let (rows, missing) = inventory::rows(&inventory, noun, names, &fields, listed.own)?;
    let row = |(name, settings)| Row { name, settings };
    Ok(Answer(Rows { rows: rows.into_iter().map(row).collect(), missing }))
}

pub async fn create(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Path(kind): Path<String>,
    Asked(change): Asked<Change>,
) -> Result<Answer<Outcomes>, Refusal> {
    let verb = Verb::Create { names: change.names, edits: change.edits };
    apply(shared, caller, noun(&kind)?, verb, change.dry_run).await
}

pub async fn update(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Path(kind): Path<String>,
    Asked(change): Asked<Change>,
) -> Result<Answer<Outcomes>, Refusal> {
    let verb = Verb::Update { names: change.names, edits: change.edits };
    apply(shared, caller, noun(&kind)?, verb, change.dry_run).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deleted {
    names: String,
    #[serde(default)]
    dry_run: bool,
}

pub async fn delete(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Path(kind): Path<String>,
    Query(deleted): Query<Deleted>,
) -> Result<Answer<Outcomes>, Refusal> {
    let verb = Verb::Delete { names: deleted.names };
    apply(shared, caller, noun(&kind)?, verb, deleted.dry_run).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Imported {
    format: Format,
    /// What messages call the file.
    #[serde(default)]
    what: Option<String>,
    #[serde(default)]
    dry_run: bool,
}

pub async fn import(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Path(kind): Path<String>,
    Query(imported): Query<Imported>,
    request: Request,
) -> Result<Answer<Outcomes>, Refusal> {
    let noun = noun(&kind)?;
    let text = String::from_utf8(body(request.into_body(), MAX_FILE).await?)
        .map_err(|error| Error::usage("the file is no text in UTF-8").because(error))?;
    let what = imported.what.unwrap_or_else(|| "the file".into());
    let verb = Verb::Import { format: imported.format, text, what };
    apply(shared, caller, noun, verb, imported.dry_run).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exported {
    names: String,
    format: Format,
}

pub async fn export(
    State(shared): State<Arc<Shared>>,
    Path(kind): Path<String>,
    Query(exported): Query<Exported>,
) -> Result<Answer<Text>, Refusal> {
    let noun = noun(&kind)?;
    let active = shared.active().await?;
    let inventory = active.inventory();
    let (text, missing) = inventory::export(&inventory, noun, &exported.names, exported.format)?;
    let count = inventory.names(noun, &exported.names)?.len() - missing.len();
    Ok(Answer(Text { text, missing, count }))
}

/// Records with their secrets, for who may change them: it is no GET, which everybody may.
pub async fn opened(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Path(kind): Path<String>,
    Asked(wanted): Asked<Names>,
) -> Result<Answer<Rows>, Refusal> {
    let noun = noun(&kind)?;
    let active = shared.active().await?;
    let inventory = active.inventory();
    let work = move || inventory::opened(&inventory, &active.vault, noun, &wanted.names);
    let opened = tokio::task::spawn_blocking(work).await;
    let opened = opened.map_err(|error| Error::bug("an export broke off").because(error))?;
    let (rows, missing) = opened?;
    let (caller, records) = (caller.name, rows.len());
    tracing::warn!(caller, kind, records, "secrets were given away");
    let row = |(name, settings)| Row { name, settings };
    Ok(Answer(Rows { rows: rows.into_iter().map(row).collect(), missing }))
}

/// Does it, whether or not the caller stays to hear of it.
async fn apply(
    shared: Arc<Shared>,
    caller: Caller,
    noun: Noun,
    verb: Verb,
    dry_run: bool,
) -> Result<Answer<Outcomes>, Refusal> {
    let active = shared.active().await?;
    let request = request::Request { noun, verb, dry_run };
    let work = async move {
        let mut book = active.book.lock().await;
        book.user = caller.name;
        let outcomes = book.apply(&request).await;
        if !request.dry_run {
            active.publish(&book);
        }
        shared.metrics.nodes(book.inventory.nodes.len());
        outcomes
    };
    let outcomes = tokio::spawn(work).await;
    let outcomes = outcomes.map_err(|error| Error::bug("a change broke off").because(error))?;
    Ok(Answer(Outcomes { outcomes: outcomes? }))
}
