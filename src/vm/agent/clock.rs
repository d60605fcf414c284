//! What time it is: a guest that stood still for a checkpoint, or goes on from one, does not know.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pavo_agent::{Decoder, Event, Exec, Exit, Failure, Frame, Kind, Opening};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use super::{Agent, LONGEST};
use crate::error::{Context, Error, Result};
use crate::model::job::VmStatus;

impl Agent {
    /// Tells the guest what time it is, once it goes on.
    pub async fn keep_time(self, mut status: watch::Receiver<VmStatus>) {
        if status.wait_for(|now| now.state.is_up()).await.is_err() {
            return;
        }
        if let Err(error) = self.set_clock().await {
            // Most guests find out by themselves, and some have no agent.
            tracing::info!("the guest's clock is not set: {}", error.report());
        }
    }

    /// Sets the guest's clock, as soon as an agent answers.
    ///
    /// # Errors
    /// When none does, or the guest has no `date` that can.
    pub async fn set_clock(&self) -> Result<()> {
        self.hello(LONGEST).await?;
        let relay = self.connect().await?;
        let (mut ours, mut theirs) = tokio::io::duplex(64 << 10);
        // To the nearest second.
        let now = SystemTime::now() + Duration::from_millis(500);
        let now = now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let words = ["date", "-u", "-s", &format!("@{now}")];
        let argv = words.map(|word| word.as_bytes().to_vec()).into();
        let opening = Opening::Exec(Exec { argv, ..Exec::default() });
        let open = Frame::new(1, Kind::Open, opening.encode());
        ours.write_all(&open.bytes()).await.while_doing(|| "asking the agent".into())?;
        tokio::select! {
            biased;
            outcome = last_word(&mut ours) => outcome,
            () = relay.carry(&mut theirs) => Err(Error::system("the guest's agent has ended")),
        }
    }
}

/// How the command has ended; it says less than a stream's credit holds.
async fn last_word(from: &mut (impl AsyncRead + Unpin)) -> Result<()> {
    let wrong = || "reading the agent's answer".to_owned();
    let (mut decoder, mut bytes) = (Decoder::in_step(), [0; 4096]);
    loop {
        while let Some(event) = decoder.next_event().while_doing(wrong)? {
            let Event::Frame(frame) = event else { continue };
            return match frame.kind {
                Kind::Exit => match Exit::decode(&frame.payload).while_doing(wrong)? {
                    Exit::Code(0) => Ok(()),
                    other => Err(Error::system(format!("the guest's `date` ended so: {other:?}"))),
                },
                Kind::Fail => {
                    let failure = Failure::decode(&frame.payload).while_doing(wrong)?;
                    Err(Error::system(failure.why))
                }
                _ => continue,
            };
        }
        match from.read(&mut bytes).await.while_doing(wrong)? {
            0 => return Err(Error::system("the guest's agent has ended")),
            count => decoder.push(&bytes[..count]),
        }
    }
}
