//! Waiting for guests' agents that do not answer yet.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, sleep};

use super::super::App;
use super::super::agent::report;
use super::super::job::Jobs;
use crate::error::{Error, Result};
use crate::model::job::{JobRecord, VmState};
use crate::model::vmset::fold;
use crate::ops::agent::hellos;
use crate::ops::watch::{HINT, NO_AGENT};
use crate::vm::agent::{LONGEST, QEMUS};

/// How soon those are asked again that failed at once.
const AGAIN: Duration = Duration::from_secs(1);
/// How long another agent is waited for where QEMU's answers: ours may begin later.
const OURS: Duration = Duration::from_secs(10);

/// Waits until the agents of these VMs answer.
///
/// # Errors
/// When some have not within `limit`, or a VM has ended.
pub async fn wait(
    app: &App,
    known: &Jobs,
    job: &JobRecord,
    ranks: &[u32],
    limit: Duration,
) -> Result<()> {
    let begun = Instant::now();
    let mut missing = ranks.to_vec();
    let mut qemus_since = None;
    // Soon it is said who is waited for.
    let mut patience = AGAIN;
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        let asked = missing.clone();
        let (mut failed, mut qemus) = (Vec::new(), 0);
        let mut answers = pin!(hellos(known.store(), job, &asked, left.min(patience)));
        while let Some((rank, answer)) = answers.next().await {
            match answer {
                Ok(answer) if answer.agent == QEMUS => qemus += 1,
                Ok(_) => missing.retain(|other| *other != rank),
                Err(error) => failed.push((rank, error)),
            }
        }
        if qemus > 0 && qemus == missing.len() {
            let since = *qemus_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= OURS.min(limit) {
                missing.clear();
            }
        }
        if missing.is_empty() {
            app.out.end_progress();
            return Ok(());
        }
        let states = known.states(job).await?;
        // Only somebody else makes them answer.
        let is_over = |rank: u32| {
            let state = states.get(rank as usize).and_then(Option::as_ref);
            state.is_some_and(|vm| vm.state.is_down() || vm.state == VmState::Paused)
        };
        let over = failed.iter().any(|(rank, _)| is_over(*rank));
        if over || left.is_zero() {
            app.out.end_progress();
            report(app, failed);
            let (who, seconds) = (fold(&missing), begun.elapsed().as_secs());
            return Err(Error::system(format!("no agent has answered in {who} for {seconds} s"))
                .help("see what the guest says: `pavo console -l VM`"));
        }
        let seconds = begun.elapsed().as_secs();
        let mut line = format!("Waiting for the agent of {}… ({seconds} s)", fold(&missing));
        if begun.elapsed() >= HINT {
            line += ": ";
            line += NO_AGENT;
        }
        app.out.progress(&line);
        patience = LONGEST;
        sleep(AGAIN).await;
    }
}
