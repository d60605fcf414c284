//! Whoever keeps the inventory that commands are about: the daemon of a site, or a store of one's
//! own on this machine.

use std::path::PathBuf;

use hyper::Method;
use serde::Serialize;

use super::inventory::{self, Book};
use super::remote::Remote;
use crate::error::Result;
use crate::model::api::{Change, Names, Outcomes, Rows, Text};
use crate::model::node::operation::Operation;
use crate::model::node::request::{Format, Noun, Outcome, Request, Verb};
use crate::model::order::Operations;

/// Who keeps the inventory.
#[derive(Clone, Debug)]
pub enum Keeper {
    /// We ourselves, in the store in this folder.
    Here(PathBuf),
    Daemon(Remote),
}

/// What the daemon is asked for.
#[derive(Debug, Default, Serialize)]
struct Query<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    names: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fields: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<Format>,
    #[serde(skip_serializing_if = "Option::is_none")]
    what: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    own: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
}

impl Keeper {
    /// Does what is asked; see [`Book::apply`].
    ///
    /// # Errors
    /// When it cannot be done, or there is nobody to do it.
    pub async fn apply(&self, request: Request) -> Result<Vec<Outcome>> {
        let remote = match self {
            Self::Here(dir) => return Book::open(dir).await?.apply(&request).await,
            Self::Daemon(remote) => remote,
        };
        let Request { noun, verb, dry_run } = request;
        let path = format!("/v1/{}", noun.plural());
        let outcomes: Outcomes = match verb {
            Verb::Create { names, edits } => {
                remote.send(Method::POST, &path, &Change { names, edits, dry_run }).await?
            }
            Verb::Update { names, edits } => {
                remote.send(Method::PATCH, &path, &Change { names, edits, dry_run }).await?
            }
            Verb::Delete { names } => {
                let query = Query { names: Some(&names), dry_run, ..Query::default() };
                remote.ask(Method::DELETE, &path, &query, None).await?
            }
            Verb::Import { format, text, what } => {
                let query =
                    Query { format: Some(format), what: Some(&what), dry_run, ..Query::default() };
                remote.upload(&format!("{path}/import"), &query, text).await?
            }
        };
        Ok(outcomes.outcomes)
    }

    /// What is known of records; see [`inventory::rows`].
    ///
    /// # Errors
    /// When that cannot be told, or there is nobody to tell.
    pub async fn rows(
        &self,
        noun: Noun,
        names: Option<&str>,
        fields: &[String],
        own: bool,
    ) -> Result<inventory::Rows> {
        let remote = match self {
            Self::Here(dir) => {
                return inventory::rows(&inventory::read(dir).await?, noun, names, fields, own);
            }
            Self::Daemon(remote) => remote,
        };
        let fields = (!fields.is_empty()).then(|| fields.join(","));
        let query = Query { names, fields, own, ..Query::default() };
        let rows: Rows = remote.get(&format!("/v1/{}", noun.plural()), &query).await?;
        Ok((rows.rows.into_iter().map(|row| (row.name, row.settings)).collect(), rows.missing))
    }

    /// Records as a file, and how many; see [`inventory::export`].
    ///
    /// # Errors
    /// When that cannot be told, or there is nobody to tell.
    pub async fn export(
        &self,
        noun: Noun,
        names: &str,
        format: Format,
    ) -> Result<(String, Vec<Outcome>, usize)> {
        let remote = match self {
            Self::Here(dir) => {
                let inventory = inventory::read(dir).await?;
                let (text, missing) = inventory::export(&inventory, noun, names, format)?;
                let count = inventory.names(noun, names)?.len() - missing.len();
                return Ok((text, missing, count));
            }
            Self::Daemon(remote) => remote,
        };
        let query = Query { names: Some(names), format: Some(format), ..Query::default() };
        let text: Text = remote.get(&format!("/v1/{}/export", noun.plural()), &query).await?;
        Ok((text.text, text.missing, text.count))
    }

    /// Records with their secrets; see [`inventory::opened`].
    ///
    /// # Errors
    /// When that may not be told, or there is nobody to tell.
    pub async fn opened(&self, noun: Noun, names: &str) -> Result<inventory::Rows> {
        let remote = match self {
            Self::Here(dir) => {
                let book = Book::open(dir).await?;
                return inventory::opened(&book.inventory, book.vault(), noun, names);
            }
            Self::Daemon(remote) => remote,
        };
        let path = format!("/v1/{}/export", noun.plural());
        let rows: Rows = remote.send(Method::POST, &path, &Names { names: names.into() }).await?;
        Ok((rows.rows.into_iter().map(|row| (row.name, row.settings)).collect(), rows.missing))
    }

    /// The latest long work.
    ///
    /// # Errors
    /// When that cannot be told, or there is nobody to tell.
    pub async fn operations(&self) -> Result<Vec<Operation>> {
        match self {
            Self::Here(dir) => inventory::operations(dir).await,
            Self::Daemon(remote) => Ok(remote.get::<Operations>("/v1/ops", &()).await?.operations),
        }
    }
}
