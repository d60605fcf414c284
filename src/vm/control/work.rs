//! What takes long: copies of disks and memory, checkpoints.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio::time::timeout;

use super::super::checkpoint::{Held, Step};
use super::super::machine::Stop;
use super::super::{display, dump, save};
use super::{Answer, Endpoint, request, say, with_progress};
use crate::error::{Context, Error, Result};
use crate::model::job::VmState;

/// How long the command of a checkpoint may be silent. It says something every few seconds,
/// unless it was stopped, or waits for a file server: guests do not stand still for that.
const SILENCE: Duration = Duration::from_secs(60);

impl Endpoint {
    pub(super) async fn dump(
        &self,
        wish: &dump::Wish,
        tell: mpsc::Sender<save::Progress>,
    ) -> Result<dump::Dumped> {
        let qmp = self.qmp()?;
        let doing = || format!("dumping the memory of {}", self.name);
        dump::dump(&qmp, wish, tell).await.while_doing(doing)
    }

    pub(super) async fn display(
        &self,
        connect: bool,
    ) -> Result<(display::Offer, Option<display::Connected>)> {
        let offer = self.screen.open(&self.qmp()?).await?;
        let connected = connect.then(|| self.screen.connect()).transpose()?;
        Ok((offer, connected))
    }

    pub(super) async fn copy(
        &self,
        wish: &save::Wish,
        tell: mpsc::Sender<save::Progress>,
    ) -> Result<save::Saved> {
        let mut number = self.turn(&tell).await?;
        *number += 1;
        let doing = || match wish.drive {
            0 => format!("copying the disk of {}", self.name),
            drive => format!("copying drive {drive} of {}", self.name),
        };
        let qmp = self.qmp()?;
        let state = self.status.borrow().state;
        let guest = (state != VmState::Off).then_some(&self.agent);
        let (dir, disk, number, paused) =
            (&*self.dir, self.disk, *number, state == VmState::Paused);
        let source = save::Source { qmp: &qmp, dir, disk, number, guest, paused };
        save::save(source, wish, tell).await.while_doing(doing)
    }
    /// Waits until no other copy is made of this VM.
    async fn turn(&self, tell: &mpsc::Sender<save::Progress>) -> Result<OwnedMutexGuard<u64>> {
        loop {
            let turn = Arc::clone(&self.saves).lock_owned();
            match timeout(save::LOOKS, turn).await {
                Ok(turn) => return Ok(turn),
                // Who waits for another copy to end is told that it does.
                Err(_) if tell.send(save::Progress::default()).await.is_ok() => {}
                Err(_) => return Err(Error::usage("nobody waits for the copy any more")),
            }
        }
    }

    pub(super) async fn checkpoint(
        &self,
        dir: &Path,
        tell: mpsc::Sender<save::Progress>,
    ) -> Result<Held> {
        if !dir.is_absolute() {
            return Err(Error::usage(format!("`{}` is not absolute", dir.display())));
        }
        let turn = (self.subject.claim()?, self.turn(&tell).await?);
        self.subject.begin(dir, self.qmp()?, self.status.clone(), turn).await
    }
}

/// What the command says in a checkpoint, step by step.
struct Steps {
    /// Of the next, as far as it has come.
    partial: Vec<u8>,
    silence: Duration,
}

impl Steps {
    /// The next; `None` if the command is gone, or as silent as one that was stopped.
    async fn next(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> Option<Result<Step>> {
        loop {
            let line = request::rest_of_line(stream, &mut self.partial);
            let line = timeout(self.silence, line).await.ok()??;
            match serde_json::from_slice(&line) {
                Ok(Step::Wait) => {}
                step => {
                    let wrong = |error| Error::usage("the step is not understood").because(error);
                    return Some(step.map_err(wrong));
                }
            }
        }
    }
}

/// Does what the command says, step by step. Whoever dies, the guest goes on afterwards.
pub(super) async fn take_part(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    mut held: Held,
    endpoint: &Endpoint,
) {
    let (mut steps, mut next) = (Steps { partial: Vec::new(), silence: SILENCE }, None);
    loop {
        let step = match next.take() {
            Some(step) => Some(step),
            None => steps.next(stream).await,
        };
        let step = match step {
            Some(Ok(step)) => step,
            Some(Err(error)) => {
                let _ = say(stream, &Answer::Error(error.to_wire())).await;
                break;
            }
            None => break,
        };
        let done = match step {
            Step::Pause => held.pause().await.map(|()| Value::Null),
            Step::Write => match write(stream, &mut steps, &mut held).await {
                Some(Written::All(written)) => written,
                Some(Written::Interrupted(step)) => {
                    next = Some(step);
                    Err(Error::usage("something else was asked for meanwhile"))
                }
                None => break,
            },
            Step::Wait => continue,
            Step::Keep => {
                held.keep();
                Ok(Value::Null)
            }
            Step::Quit => {
                let asked = endpoint.stop.send(Stop::Now).await.map(|()| Value::Null);
                // It does not go on.
                let answer = asked.map_err(|_| Error::system("it is ending already"));
                let _ = say(stream, &answer_of(answer)).await;
                // And nobody lets it, until it has ended.
                let mut status = endpoint.status.clone();
                let _ = status.wait_for(|status| status.state.is_over()).await;
                return;
            }
            Step::Resume => {
                let gone_on = go_on(held, endpoint).await.map(|()| Value::Null);
                let _ = say(stream, &answer_of(gone_on)).await;
                return;
            }
        };
        if say(stream, &answer_of(done)).await.is_none() {
            break;
        }
    }
    if let Err(error) = go_on(held, endpoint).await {
        tracing::warn!("{}: {}", endpoint.name, error.report());
    }
}

/// Lets a guest go on, which is told the time then.
async fn go_on(held: Held, endpoint: &Endpoint) -> Result<()> {
    let late = held.is_late();
    held.release().await?;
    if late {
        tokio::spawn(endpoint.agent.clone().keep_time(endpoint.status.clone()));
    }
    Ok(())
}

/// How writing has ended.
enum Written {
    All(Result<Value>),
    /// By what was said before it was done.
    Interrupted(Result<Step>),
}

/// Writes, as long as somebody waits for it; `None` if nobody is there any more.
async fn write(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    steps: &mut Steps,
    held: &mut Held,
) -> Option<Written> {
    let (mut from, mut to) = tokio::io::split(stream);
    tokio::select! {
        written = with_progress(&mut to, |tell| held.write(tell)) => {
            Some(Written::All(written.map(|saved| json!(saved))))
        }
        step = steps.next(&mut from) => step.map(Written::Interrupted),
    }
}

fn answer_of(outcome: Result<Value>) -> Answer {
    match outcome {
        Ok(value) => Answer::Return(value),
        Err(error) => Answer::Error(error.to_wire()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::time::sleep;

    use super::*;

    #[tokio::test]
    async fn a_command_that_is_silent_is_not_waited_for_and_one_that_waits_is() {
        let (mut ours, mut theirs) = tokio::io::duplex(1 << 10);
        let silence = Duration::from_secs(1);
        let waits = tokio::spawn(async move {
            for _ in 0..30 {
                sleep(silence / 20).await;
                ours.write_all(b"{\"step\":\"wait\"}\n").await.unwrap();
            }
            ours.write_all(b"{\"step\":").await.unwrap();
            ours
        });
        let mut steps = Steps { partial: Vec::new(), silence };
        assert!(steps.next(&mut theirs).await.is_none());
        assert!(waits.is_finished(), "it was waited for as long as it said so");
        // What has come of a step is not lost with who has waited for it.
        let mut ours = waits.await.unwrap();
        ours.write_all(b"\"keep\"}\nx\n").await.unwrap();
        assert_eq!(steps.next(&mut theirs).await.unwrap().unwrap(), Step::Keep);
        steps.next(&mut theirs).await.unwrap().unwrap_err();
    }
}
