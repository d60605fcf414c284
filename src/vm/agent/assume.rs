//! Who a guest is: one that goes on from the memory of another has to be told.

use pavo_agent::{
    ASSUMED, ASSUMES, Decoder, Event, Exit, Failure, Frame, Hello, Identity, Kind, Opening,
};
use pavo_agent::{PIECE, WINDOW};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;

use super::{Agent, LONGEST, PONG, Presence, Relay};
use crate::error::{Context, Error, Result};

/// As much of what it says is wrong is shown.
const MAX_ERRORS: usize = 4096;

/// What came of it.
#[derive(Debug)]
pub enum Assumed {
    Done,
    /// The agent has ended meanwhile: it may be told again.
    Lost(Error),
}

impl Agent {
    /// Makes the guest the one that `identity` says. When it is that, before it is on the
    /// network, `linked` gives its interfaces their links.
    ///
    /// # Errors
    /// When the guest cannot, with its own words.
    pub async fn assume(
        &self,
        identity: impl FnOnce() -> Result<Identity>,
        linked: impl AsyncFnOnce() -> Result<()>,
    ) -> Result<Assumed> {
        let hello = match self.ours().await {
            Ok(hello) => hello,
            Err(error) => return Ok(Assumed::Lost(error)),
        };
        if !hello.features.iter().any(|feature| feature == ASSUMES) {
            return Err(lacks(&hello.agent));
        }
        let relay = Relay::begin(self)?;
        let (ours, mut theirs) = tokio::io::duplex(WINDOW as usize);
        let identity = identity()?;
        tokio::select! {
            biased;
            outcome = converse(ours, &identity, linked) => outcome,
            () = relay.carry(&mut theirs) => Ok(Assumed::Lost(ended())),
        }
    }

    /// Waits for our agent. QEMU's may answer before it, and is of no use.
    async fn ours(&self) -> Result<Hello> {
        let mut presence = self.shared.presence.subscribe();
        let here = presence.wait_for(|presence| *presence == Presence::Here);
        if timeout(LONGEST, here).await.is_err() {
            return Err(self.absence());
        }
        self.ping(PONG.1).await
    }
}

/// An agent that does not know how.
pub fn lacks(version: &str) -> Error {
    Error::system(format!("the guest's agent {version} cannot make it another"))
        .help("use an image with pavo's own agent of this version: `agent: inject` in the template")
}

fn ended() -> Error {
    Error::system("the guest's agent has ended")
}

async fn converse(
    mut line: DuplexStream,
    identity: &Identity,
    linked: impl AsyncFnOnce() -> Result<()>,
) -> Result<Assumed> {
    let mut bytes = Frame::new(1, Kind::Open, Opening::Assume.encode()).bytes();
    let encoded = identity.encode();
    let length = u32::try_from(encoded.len()).unwrap_or(u32::MAX).to_le_bytes();
    for piece in [&length[..], &encoded].concat().chunks(PIECE) {
        Frame::new(1, Kind::Data, piece).write(&mut bytes);
    }
    let lost = |_| Ok(Assumed::Lost(ended()));
    if let Err(error) = line.write_all(&bytes).await {
        return lost(error);
    }
    let (mut decoder, mut bytes) = (Decoder::in_step(), [0; 4096]);
    let (mut linked, mut said, mut errors) = (Some(linked), Vec::new(), Vec::new());
    loop {
        while let Some(event) = decoder.next_event().while_doing(wrong)? {
            let Event::Frame(frame) = event else { continue };
            match frame.kind {
                Kind::Data => said.extend(frame.payload.into_iter().take(ASSUMED.len())),
                Kind::Errors => errors.extend(frame.payload),
                Kind::Exit => return last_word(&frame.payload, linked.is_none(), &errors),
                Kind::Fail => {
                    let failure = Failure::decode(&frame.payload).while_doing(wrong)?;
                    return Ok(Assumed::Lost(Error::system(failure.why)));
                }
                _ => {}
            }
            said.truncate(ASSUMED.len());
            errors.truncate(MAX_ERRORS);
            if said == ASSUMED {
                if let Some(linked) = linked.take() {
                    linked().await?;
                    if let Err(error) = line.write_all(&Frame::new(1, Kind::End, []).bytes()).await
                    {
                        return lost(error);
                    }
                }
            }
        }
        match line.read(&mut bytes).await {
            Ok(0) | Err(_) => return Ok(Assumed::Lost(ended())),
            Ok(count) => decoder.push(&bytes[..count]),
        }
    }
}

fn wrong() -> String {
    "reading the agent's answer".into()
}

fn last_word(exit: &[u8], linked: bool, errors: &[u8]) -> Result<Assumed> {
    let exit = Exit::decode(exit).while_doing(wrong)?;
    if exit == Exit::Code(0) && linked {
        return Ok(Assumed::Done);
    }
    let text = String::from_utf8_lossy(errors);
    let text: String = text.chars().map(|it| if it.is_control() { ' ' } else { it }).collect();
    let error = Error::system("the guest cannot be another");
    Err(match text.trim() {
        "" => error.because(format!("its agent ended so: {exit:?}")),
        why => error.because(why),
    })
}
