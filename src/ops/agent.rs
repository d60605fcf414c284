//! The agents of a cluster's guests, many at once.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};

use super::reach::Pass;
use crate::error::Result;
use crate::model::job::JobRecord;
use crate::store::Store;
use crate::vm::agent::Answer;

/// How many VMs are asked at once.
pub const AT_ONCE: usize = 64;

/// Asks who answers in each of these guests, waiting so long for each; they come as they
/// answer.
pub fn hellos<'a>(
    store: Option<&'a dyn Store>,
    job: &'a JobRecord,
    ranks: &'a [u32],
    patience: Duration,
) -> impl Stream<Item = (u32, Result<Answer>)> + 'a {
    let pass = Arc::new(Pass::default());
    let ask = move |rank: u32| {
        let pass = pass.clone();
        async move { (rank, hello(&pass, store, job, rank, patience).await) }
    };
    stream::iter(ranks.iter().copied()).map(ask).buffer_unordered(AT_ONCE)
}

async fn hello(
    pass: &Pass,
    store: Option<&dyn Store>,
    job: &JobRecord,
    rank: u32,
    patience: Duration,
) -> Result<Answer> {
    pass.reach(store, job, rank).await?.connect().await?.agent_hello(patience).await
}
