//! A VM's process in the middle of a checkpoint, as the command sees it.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf, split};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::super::checkpoint::Step;
use super::super::save::Progress;
use super::Answer;
use super::client::{Connection, in_time, rest_of_line};
use crate::error::{Context, Error, Result};
use crate::model::checkpoint::SavedVm;

/// How often it is told that the command is still there.
const STILL_HERE: Duration = Duration::from_secs(5);

type Stream = BufReader<Box<dyn Connection>>;

/// The process of a VM that takes part.
pub struct Participant {
    from: BufReader<ReadHalf<Stream>>,
    /// Of an answer, as far as it has come.
    partial: Vec<u8>,
    /// As many steps were said whose answers have not come.
    owed: usize,
    say: mpsc::UnboundedSender<Step>,
}

impl std::fmt::Debug for Participant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Participant")
    }
}

impl Participant {
    pub(super) fn new(stream: Stream) -> Self {
        Self::speaking(stream, STILL_HERE)
    }

    fn speaking(stream: Stream, still_here: Duration) -> Self {
        let (from, to) = split(stream);
        let (say, said) = mpsc::unbounded_channel();
        // It ends with `say`, and the connection with both.
        tokio::spawn(speak(to, said, still_here));
        Self { from: BufReader::new(from), partial: Vec::new(), owed: 0, say }
    }

    /// Lets it do the next step. Who does not wait for the answer can say another: that ends
    /// what is being done.
    ///
    /// # Errors
    /// When it cannot; then it waits for another.
    pub async fn step(&mut self, step: Step) -> Result<()> {
        self.ask(step, &mut |_| {}).await.map(drop)
    }

    /// Lets it write, once its guest stands still.
    ///
    /// # Errors
    /// When there is no room, or QEMU fails; then nothing is left of it.
    pub async fn write(&mut self, told: &mut impl FnMut(Progress)) -> Result<SavedVm> {
        let value = self.ask(Step::Write, told).await?;
        serde_json::from_value(value).while_doing(|| "reading what was written".into())
    }

    async fn ask(&mut self, step: Step, told: &mut impl FnMut(Progress)) -> Result<Value> {
        // Where nobody hears it, no answer says why.
        let _ = self.say.send(step);
        self.owed += 1;
        loop {
            let answer = in_time(rest_of_line(&mut self.from, &mut self.partial)).await?;
            let answer = serde_json::from_slice(&answer);
            let answer = match answer.while_doing(|| "reading the answer".into())? {
                Answer::Progress(progress) if self.owed == 1 => {
                    told(progress);
                    continue;
                }
                Answer::Progress(_) => continue,
                Answer::Return(value) => Ok(value),
                Answer::Error(error) => Err(Error::from(error)),
            };
            self.owed -= 1;
            if self.owed == 0 {
                return answer;
            }
        }
    }
}

/// Says the steps; and, where there is none for a while, that it is still there.
async fn speak(
    mut to: WriteHalf<impl AsyncRead + AsyncWrite>,
    mut said: mpsc::UnboundedReceiver<Step>,
    still_here: Duration,
) {
    loop {
        let step = match timeout(still_here, said.recv()).await {
            Ok(Some(step)) => step,
            Ok(None) => return,
            Err(_) => Step::Wait,
        };
        let mut line = serde_json::to_vec(&step).expect("a step is always valid JSON");
        line.push(b'\n');
        if to.write_all(&line).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::io::{AsyncBufReadExt, DuplexStream, Lines};

    use super::*;

    fn pair() -> (Participant, Lines<BufReader<ReadHalf<DuplexStream>>>, WriteHalf<DuplexStream>) {
        let (ours, theirs) = tokio::io::duplex(1 << 10);
        let ours: Box<dyn Connection> = Box::new(ours);
        let (from, to) = split(theirs);
        let participant = Participant::speaking(BufReader::new(ours), Duration::from_millis(50));
        (participant, BufReader::new(from).lines(), to)
    }

    #[tokio::test]
    async fn while_the_others_work_it_says_that_it_is_there() {
        let (participant, mut said, _to) = pair();
        for _ in 0..3 {
            assert_eq!(said.next_line().await.unwrap().unwrap(), "{\"step\":\"wait\"}");
        }
        drop(participant);
        assert_eq!(said.next_line().await.unwrap(), None);
    }

    #[tokio::test]
    async fn the_answer_to_a_step_that_nobody_waited_for_is_no_others() {
        let (mut participant, _said, mut to) = pair();
        let answers = async |to: &mut WriteHalf<DuplexStream>, answers: &[Value]| {
            for answer in answers {
                to.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
            }
        };
        let far = json!({ "progress": { "done": 1, "total": 2 } });
        answers(&mut to, std::slice::from_ref(&far)).await;
        to.write_all(b"{\"progress\":{\"done").await.unwrap();
        let moment = Duration::from_millis(10);
        timeout(moment, participant.write(&mut |_| {})).await.unwrap_err();
        to.write_all(b"\":1,\"total\":2}}\n").await.unwrap();
        let error = Error::system("not any more").to_wire();
        answers(&mut to, &[far, json!({ "error": error }), json!({ "return": null })]).await;
        participant.step(Step::Resume).await.unwrap();
    }
}
