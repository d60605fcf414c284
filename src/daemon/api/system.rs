//! What the daemon tells of itself.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use super::{Answer, Refusal};
use crate::daemon::{Shared, metrics};
use crate::error::Error;
use crate::model::api::{Service, Services};
use crate::store::{keys, list_all};

/// The contract, as people write it.
pub const OPENAPI: &str = include_str!("openapi.yaml");

/// All daemons of the site; of this one alone, while the store is away.
pub async fn services(State(shared): State<Arc<Shared>>) -> Result<Answer<Services>, Refusal> {
    let mut services = Vec::new();
    let store = shared.store.read().await.clone();
    if let Some(store) = store {
        for entry in list_all(&*store, &keys::services()).await?.0 {
            services.push(entry.json::<Service>()?);
        }
    } else {
        services.push(shared.me.clone());
    }
    services.sort_by(|a, b| (&a.kind, &a.host, a.pid).cmp(&(&b.kind, &b.host, b.pid)));
    Ok(Answer(Services { services }))
}

/// Whether this daemon is active; otherwise, why not.
pub async fn health(State(shared): State<Arc<Shared>>) -> Result<Answer<Service>, Refusal> {
    shared.active().await?;
    Ok(Answer(Service { active: true, ..shared.me.clone() }))
}

pub async fn openapi() -> Result<Answer<Value>, Refusal> {
    let document = serde_yaml::from_str(OPENAPI);
    Ok(Answer(document.map_err(|error| Error::bug("the contract is no YAML").because(error))?))
}

pub async fn metrics(State(shared): State<Arc<Shared>>) -> Result<Response, Refusal> {
    let text = shared.metrics.text()?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}
