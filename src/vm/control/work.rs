//! What takes long: copies of disks and memory, checkpoints.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio::time::timeout;

use super::super::checkpoint::{Held, Step};
use super::super::machine::Stop;
use super::super::{display, dump, save};
use super::{Answer, Endpoint, request, say, with_progress};
use crate::error::{Context, Error, Result};

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
        let source = save::Source { qmp: &qmp, dir: &self.dir, disk: self.disk, number: *number };
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

/// Does what the command says, step by step. Whoever dies, the guest goes on afterwards.
pub(super) async fn take_part(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    mut held: Held,
    endpoint: &Endpoint,
) {
    while let Some(line) = request::line(stream).await {
        let step = match serde_json::from_slice(&line) {
            Ok(step) => step,
            Err(error) => {
                let error = Error::usage("the step is not understood").because(error);
                let _ = say(stream, &Answer::Error(error.to_wire())).await;
                break;
            }
        };
        let done = match step {
            Step::Pause => held.pause().await.map(|()| Value::Null),
            Step::Write => match write(stream, &mut held).await {
                Some(written) => written,
                None => break,
            },
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

/// Writes, as long as somebody is at the other end; `None` if nobody is any more.
async fn write(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    held: &mut Held,
) -> Option<Result<Value>> {
    let (mut from, mut to) = tokio::io::split(stream);
    tokio::select! {
        written = with_progress(&mut to, |tell| held.write(tell)) => {
            Some(written.map(|saved| json!(saved)))
        }
        // Nothing is to be said meanwhile.
        _ = from.read_u8() => None,
    }
}

fn answer_of(outcome: Result<Value>) -> Answer {
    match outcome {
        Ok(value) => Answer::Return(value),
        Err(error) => Answer::Error(error.to_wire()),
    }
}
