//! Long work: ordered, watched, stopped, done again.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Path, State};
use serde::Deserialize;

use super::{Answer, Asked, Query, Refusal};
use crate::daemon::caller::Caller;
use crate::daemon::{Active, Shared};
use crate::error::{Error, Result};
use crate::model::node::operation::Operation;
use crate::model::node::request::Noun;
use crate::model::nodeset::{MAX_NAMES, NodeSet};
use crate::model::order::{Operations, Order, Results};
use crate::ops::orders;

/// The longest that an answer is kept back for news.
const MAX_WAIT: u64 = 60;

fn id(text: &str) -> Result<u64, Refusal> {
    text.parse().map_err(|_| Error::not_found("operations have numbers").into())
}

pub async fn list(State(shared): State<Arc<Shared>>) -> Result<Answer<Operations>, Refusal> {
    let operations = shared.active().await?.desk.list().await?;
    Ok(Answer(Operations { operations }))
}

pub async fn show(
    State(shared): State<Arc<Shared>>,
    Path(text): Path<String>,
) -> Result<Answer<Operation>, Refusal> {
    Ok(Answer(shared.active().await?.desk.show(id(&text)?).await?))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct News {
    after: usize,
    wait: u64,
}

pub async fn results(
    State(shared): State<Arc<Shared>>,
    Path(text): Path<String>,
    Query(news): Query<News>,
) -> Result<Answer<Results>, Refusal> {
    if news.wait > MAX_WAIT {
        return Err(Error::usage(format!("`wait` is {MAX_WAIT} at most")).into());
    }
    if news.after > MAX_NAMES {
        return Err(Error::usage(format!("`after` is {MAX_NAMES} at most")).into());
    }
    let desk = shared.active().await?.desk.clone();
    let wait = Duration::from_secs(news.wait);
    Ok(Answer(desk.results(id(&text)?, news.after, wait).await?))
}

pub async fn begin(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Asked(order): Asked<Order>,
) -> Result<Answer<Operation>, Refusal> {
    let active = shared.active().await?;
    let names = active.inventory().names(Noun::Node, &order.names)?.into_iter().collect();
    Ok(Answer(start(shared, active, caller, order, names).await?))
}

pub async fn retry(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    Path(text): Path<String>,
) -> Result<Answer<Operation>, Refusal> {
    let (active, id) = (shared.active().await?, id(&text)?);
    let (order, names) = active.desk.left(id).await?;
    Ok(Answer(start(shared, active, caller, order, names).await?))
}

pub async fn abort(
    State(shared): State<Arc<Shared>>,
    Path(text): Path<String>,
) -> Result<Answer<Operation>, Refusal> {
    Ok(Answer(shared.active().await?.desk.abort(id(&text)?).await?))
}

/// Begins it, whether or not the caller stays to hear of it.
async fn start(
    shared: Arc<Shared>,
    active: Arc<Active>,
    caller: Caller,
    order: Order,
    names: NodeSet,
) -> Result<Operation> {
    let work = async move {
        let mut plan = orders::plan(&order)?;
        if shared.jobs && order.spares_the_busy() {
            plan.guard = Some(Arc::new(orders::jobs().await?));
        }
        let inventory = active.inventory();
        let prepared = orders::prepare(order, plan, names, &inventory, &active.vault).await;
        active.desk.begin(active.ids.next(), &caller.name, prepared).await
    };
    let begun = tokio::spawn(work).await;
    begun.map_err(|error| Error::bug("an operation broke off").because(error))?
}
