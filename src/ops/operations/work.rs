//! The work of an operation, on a thread of its own.

use futures_util::stream;
use tokio::sync::oneshot;

use super::Running;
use crate::host::crash;
use crate::model::node::operation::StoppedBy;
use crate::model::node::request::Outcome;
use crate::node::power::Hub;
use crate::node::power::fanout::{self, Stop};
use crate::ops::orders::Prepared;

/// The longest text of a result that is kept.
const MAX_TEXT: usize = 1000;

/// How the work itself ended: what stopped it, if anything did; or why it could not begin.
pub type Ended = std::result::Result<Option<StoppedBy>, String>;

/// Does the work on this thread. Who waits for its end is told by its being dropped, if it
/// panics.
pub fn on(
    thread: std::thread::Builder,
    work: impl FnOnce() -> Ended + Send + 'static,
) -> oneshot::Receiver<Ended> {
    let (end, ended) = oneshot::channel();
    match thread.spawn(move || end.send(work())) {
        Ok(_) => ended,
        Err(error) => {
            let (end, ended) = oneshot::channel();
            // It is still here.
            let _ = end.send(Err(format!("no thread for it: {error}")));
            ended
        }
    }
}

/// The work, on its own thread.
pub(super) fn run(running: &Running, work: &Prepared) -> Ended {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("no runtime for it: {error}"))?;
    let mut stop = running.stop.subscribe();
    let report = runtime.block_on(async {
        let told = stream::once(async {
            // Its sender lives as long as we do.
            let _ = stop.wait_for(|stop| *stop).await;
        });
        let hub = Hub::default();
        fanout::run(&work.bmcs, &work.plan, &hub, told, &mut |bmc, outcome| {
            let (ok, text) = match outcome {
                fanout::Outcome::Done(done) => (true, done.to_string()),
                fanout::Outcome::Failed(error) => (false, short(&error.report())),
                fanout::Outcome::NotStarted => return,
            };
            // Between what was done and what is known of it.
            let _ = crash::point("op.switched");
            running.add(Outcome { name: bmc.node.clone(), ok, text });
        })
        .await
    });
    for (bmc, outcome) in work.bmcs.iter().zip(&report.outcomes) {
        if matches!(outcome, fanout::Outcome::NotStarted) {
            running.add(Outcome { name: bmc.node.clone(), ok: false, text: "not started".into() });
        }
    }
    Ok(report.stop.map(|why| match why {
        Stop::TooManyFailed => StoppedBy::FailLimit,
        Stop::Interrupted => StoppedBy::Request,
    }))
}

/// An error's report as one result has it.
fn short(report: &str) -> String {
    report.trim_start_matches("error: ").trim_end().chars().take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_could_not_begin_says_why_and_what_broke_off_that_it_did() {
        let thread = std::thread::Builder::new;
        let ended = on(thread().stack_size(usize::MAX / 2), || Ok(None)).await.unwrap();
        assert!(ended.unwrap_err().starts_with("no thread for it: "));
        assert_eq!(on(thread(), || Ok(None)).await.unwrap(), Ok(None));
        on(thread(), || panic!("meant")).await.unwrap_err();
    }
}
