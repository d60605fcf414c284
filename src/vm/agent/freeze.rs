//! The guest's file systems at rest, for the moment that a copy of its disk is of.

use std::time::Duration;

use pavo_agent::{Decoder, Event, Exit, Failure, Frame, Kind, Opening, THAWED_BEFORE};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Agent;
use crate::error::{Context, Error, Result};

/// After so many seconds a guest goes on by itself, whatever has become of us.
const HOLD: u32 = 20;
/// How long a guest may take to write what it has to, and to say that it goes on.
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest whose file systems are at rest. Without it they go on.
#[derive(Debug)]
pub struct Frozen {
    /// How many they are.
    pub count: u64,
    stream: DuplexStream,
    decoder: Decoder,
    /// What the guest says beside.
    errors: Vec<u8>,
    _carried: JoinSet<()>,
}

impl Agent {
    /// Brings the guest's file systems to rest; `None` where there is no agent of ours.
    ///
    /// # Errors
    /// When the agent cannot; then none is at rest.
    pub async fn freeze(&self) -> Result<Option<Frozen>> {
        if !self.is_here() {
            return Ok(None);
        }
        let relay = self.connect().await?;
        let (stream, mut theirs) = tokio::io::duplex(64 << 10);
        let mut carried = JoinSet::new();
        carried.spawn(async move { relay.carry(&mut theirs).await });
        let (decoder, errors) = (Decoder::in_step(), Vec::new());
        let mut frozen = Frozen { count: 0, stream, decoder, errors, _carried: carried };
        let opening = Opening::Freeze { seconds: HOLD }.encode();
        frozen.say(Kind::Open, opening).await?;
        frozen.count = in_time(frozen.hear_count()).await?;
        Ok(Some(frozen))
    }
}

impl Frozen {
    /// Lets them go on.
    ///
    /// # Errors
    /// When they went on before, or nothing is known of them.
    pub async fn thaw(mut self) -> Result<()> {
        self.say(Kind::End, []).await?;
        let over = async {
            loop {
                if let Some(exit) = self.hear().await?.exit {
                    return Ok(exit);
                }
            }
        };
        match in_time(over).await? {
            Exit::Code(0) => Ok(()),
            Exit::Code(THAWED_BEFORE) => Err(Error::system(format!(
                "the guest went on by itself after {HOLD} s, before the copy had begun"
            ))),
            exit => Err(self.failed(exit)),
        }
    }

    async fn say(&mut self, kind: Kind, payload: impl Into<Vec<u8>>) -> Result<()> {
        let bytes = Frame::new(1, kind, payload).bytes();
        self.stream.write_all(&bytes).await.while_doing(|| "telling the guest's agent".into())
    }

    /// How many file systems are at rest.
    async fn hear_count(&mut self) -> Result<u64> {
        let mut line = Vec::new();
        loop {
            let heard = self.hear().await?;
            line.extend(heard.output);
            if let Some(exit) = heard.exit {
                return Err(self.failed(exit));
            }
            if line.contains(&b'\n') || line.len() > 20 {
                let text = String::from_utf8_lossy(&line);
                let count = text.trim_end().parse();
                return count.map_err(|_| Error::system("the agent's answer is not understood"));
            }
        }
    }

    fn failed(&self, exit: Exit) -> Error {
        let said = String::from_utf8_lossy(&self.errors[..self.errors.len().min(200)]);
        let how = match (exit, said.trim()) {
            (Exit::Code(code), "") => format!("exit code {code}"),
            (Exit::Signal(signal), "") => format!("killed by signal {signal}"),
            (_, "") => "it was left".into(),
            (_, said) => said.escape_debug().to_string(),
        };
        Error::system("the guest's agent could not bring the file systems to rest").because(how)
    }

    async fn hear(&mut self) -> Result<Heard> {
        let wrong = || "reading the agent's answer".to_owned();
        let mut bytes = [0; 4096];
        loop {
            while let Some(event) = self.decoder.next_event().while_doing(wrong)? {
                let Event::Frame(frame) = event else { continue };
                match frame.kind {
                    Kind::Data => return Ok(Heard { output: frame.payload, exit: None }),
                    Kind::Errors => self.errors.extend(frame.payload),
                    Kind::Exit => {
                        let exit = Some(Exit::decode(&frame.payload).while_doing(wrong)?);
                        return Ok(Heard { output: Vec::new(), exit });
                    }
                    Kind::Fail => {
                        let failure = Failure::decode(&frame.payload).while_doing(wrong)?;
                        return Err(Error::system(failure.why));
                    }
                    _ => {}
                }
            }
            match self.stream.read(&mut bytes).await.while_doing(wrong)? {
                0 => return Err(Error::system("the guest's agent has ended")),
                count => self.decoder.push(&bytes[..count]),
            }
        }
    }
}

/// What is heard at once.
struct Heard {
    output: Vec<u8>,
    /// The last.
    exit: Option<Exit>,
}

async fn in_time<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || Error::system(format!("the agent did not answer within {PATIENCE:?}"));
    timeout(PATIENCE, answer).await.unwrap_or_else(|_| Err(late()))
}
