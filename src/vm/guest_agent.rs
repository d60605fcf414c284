//! QEMU's guest agent, where a guest runs one: asked to bring its file systems to rest, and
//! for what [`agent`](super::agent) lacks one of its own for.
//!
//! The protocol: QEMU, docs/interop/qemu-ga. One JSON value a line; a synchronising command
//! with a byte that no JSON holds before it ends whatever an earlier client left half said.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{Context, Error, Result};

/// The socket in the VM's directory that leads to its agent.
pub const SOCKET: &str = "agent.sock";

/// How long an agent may take to say that it is there.
const GREETING: Duration = Duration::from_secs(2);
/// How long a guest may take to write out what it has in memory, and to go on.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
/// The same of a command that it ran, which holds all that was written: 16 MiB at most, twice,
/// in text of 6 bits a byte.
const MAX_OUTPUT: u64 = 48 << 20;
/// Begins and ends an exchange: not JSON, and not UTF-8.
const MARK: u8 = 0xff;

/// A connection to the agent of one guest. Only one at a time is served.
#[derive(Debug)]
pub struct Agent {
    stream: BufReader<UnixStream>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Agent {
    /// Finds out whether an agent answers at the socket in `dir`.
    ///
    /// # Errors
    /// When none does within two seconds.
    pub async fn connect(dir: &Path) -> Result<Self> {
        let doing = || "asking the guest's agent".to_owned();
        let stream = super::control::connect(dir, SOCKET).while_doing(doing)?;
        // Of this moment, so that no earlier client's answer passes for ours.
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis() as u32;
        Self::over(stream, now.into()).await
    }

    /// Finds out whether an agent answers on `stream`; `id` marks the answer as ours.
    ///
    /// # Errors
    /// When none does within two seconds.
    pub async fn over(stream: UnixStream, id: u64) -> Result<Self> {
        let doing = || "asking the guest's agent".to_owned();
        let mut agent = Self { stream: BufReader::new(stream) };
        let greet = agent.greet(id);
        match timeout(GREETING, greet).await {
            Ok(greeted) => greeted.while_doing(doing)?,
            Err(_) => return Err(Error::system("it does not answer")).while_doing(doing),
        }
        Ok(agent)
    }

    async fn greet(&mut self, id: u64) -> Result<()> {
        let writing = || "greeting it".to_owned();
        let arguments = json!({ "id": id });
        let command = json!({ "execute": "guest-sync-delimited", "arguments": arguments });
        let mut line = vec![MARK];
        line.extend(command.to_string().into_bytes());
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).await.while_doing(writing)?;
        loop {
            let mut skipped = Vec::new();
            let mut bounded = (&mut self.stream).take(MAX_ANSWER);
            bounded.read_until(MARK, &mut skipped).await.while_doing(writing)?;
            if skipped.last() != Some(&MARK) {
                return Err(Error::system("it says what is no greeting"));
            }
            if self.answer(MAX_ANSWER).await?.as_u64() == Some(id) {
                return Ok(());
            }
        }
    }

    /// Brings the guest's file systems to rest, and says how many there are. Until
    /// [`thaw_after`](Self::thaw_after) the guest's programs that write wait.
    ///
    /// # Errors
    /// When the guest cannot, or takes longer than half a minute.
    pub async fn freeze(&mut self) -> Result<u64> {
        let count = self.ask("guest-fsfreeze-freeze").await?;
        count.as_u64().ok_or_else(|| Error::system("the guest's agent did not count file systems"))
    }

    /// Lets the guest go on.
    async fn thaw(&mut self) -> Result<()> {
        self.ask("guest-fsfreeze-thaw").await.map(drop)
    }

    /// Lets the guest go on after an attempt to [`freeze`](Self::freeze) it. One that could
    /// not be frozen, since its agent may not, cannot be thawed either, and need not.
    ///
    /// # Errors
    /// When the guest is at rest and stays so.
    pub async fn thaw_after(&mut self, frozen: &Result<u64>) -> Result<()> {
        let thawed = self.thaw().await;
        if frozen.is_ok() { thawed } else { Ok(()) }
    }

    async fn ask(&mut self, command: &str) -> Result<Value> {
        self.execute(command, json!({})).await
    }

    /// Asks it for anything it knows.
    ///
    /// # Errors
    /// When it refuses, or takes longer than half a minute.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let exchange = async {
            let request = json!({ "execute": command, "arguments": arguments });
            let line = request.to_string() + "\n";
            let sent = self.stream.get_mut().write_all(line.as_bytes()).await;
            sent.while_doing(|| "asking it".into())?;
            self.answer(if command == "guest-exec-status" { MAX_OUTPUT } else { MAX_ANSWER }).await
        };
        let doing = || format!("asking the guest's agent for `{command}`");
        match timeout(PATIENCE, exchange).await {
            Ok(answer) => answer.while_doing(doing),
            Err(_) => {
                Err(Error::system(format!("no answer within {PATIENCE:?}"))).while_doing(doing)
            }
        }
    }

    async fn answer(&mut self, limit: u64) -> Result<Value> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.stream).take(limit);
        bounded.read_until(b'\n', &mut line).await.while_doing(|| "listening to it".into())?;
        if line.last() != Some(&b'\n') {
            return Err(Error::system("it ended in the middle of an answer"));
        }
        // What a guest says is for nobody's terminal but quoted.
        match serde_json::from_slice(&line) {
            Ok(Answer { result: Some(value), error: None }) => Ok(value),
            Ok(Answer { error: Some(refusal), .. }) => {
                let text: String = refusal.desc.chars().take(200).collect();
                Err(Error::system(format!("it refused: {}", text.escape_debug())))
            }
            _ => Err(Error::system("its answer is not understood")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An agent that says these bytes to whatever it is told, each after one line.
    async fn agent(
        says: Vec<Vec<u8>>,
    ) -> (tempfile::TempDir, tokio::task::JoinHandle<Vec<String>>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = super::super::control::listen(dir.path(), SOCKET).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        let heard = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut heard = Vec::new();
            for say in says {
                let mut line = Vec::new();
                stream.read_until(b'\n', &mut line).await.unwrap();
                let line: Vec<u8> = line.into_iter().filter(|byte| *byte != MARK).collect();
                let value: Value = serde_json::from_slice(&line).unwrap();
                heard.push(value["execute"].as_str().unwrap().to_owned());
                let id = value["arguments"]["id"].to_string();
                let say = String::from_utf8_lossy(&say).replace("ID", &id).into_bytes();
                let say = say.iter().map(|byte| if *byte == b'M' { MARK } else { *byte });
                let mut bytes: Vec<u8> = if heard.len() == 1 { vec![MARK] } else { vec![] };
                bytes.extend(say);
                stream.get_mut().write_all(&bytes).await.unwrap();
            }
            heard
        });
        (dir, heard)
    }

    #[tokio::test]
    async fn what_an_earlier_client_left_is_passed_over() {
        // An old answer, and ours behind a mark of its own (which `agent` puts for `M`).
        let greeting = b"{\"return\": 1}\nM{\"return\": ID}\n".to_vec();
        let freeze = b"{\"return\": 2}\n".to_vec();
        let (dir, heard) = agent(vec![greeting, freeze, b"{\"return\": 2}\n".to_vec()]).await;
        let mut agent = Agent::connect(dir.path()).await.unwrap();
        let frozen = agent.freeze().await;
        assert!(matches!(frozen, Ok(2)));
        agent.thaw_after(&frozen).await.unwrap();
        let names = ["guest-sync-delimited", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];
        assert_eq!(heard.await.unwrap(), names);
    }

    #[tokio::test]
    async fn a_guest_that_may_not_rest_need_not_go_on_but_one_at_rest_must() {
        let (greeting, refusal) =
            (b"{\"return\": ID}\n", b"{\"error\": {\"desc\": \"disabled\"}}\n");
        let (dir, _heard) =
            agent(vec![greeting.to_vec(), refusal.to_vec(), refusal.to_vec()]).await;
        let mut there = Agent::connect(dir.path()).await.unwrap();
        let frozen = there.freeze().await;
        assert!(frozen.is_err());
        there.thaw_after(&frozen).await.unwrap();

        let rests = b"{\"return\": 2}\n".to_vec();
        let (dir, _heard) = agent(vec![greeting.to_vec(), rests, refusal.to_vec()]).await;
        let mut there = Agent::connect(dir.path()).await.unwrap();
        let frozen = there.freeze().await;
        let error = there.thaw_after(&frozen).await.unwrap_err().report();
        assert!(error.contains("guest-fsfreeze-thaw") && error.contains("disabled"), "{error}");
    }

    #[tokio::test]
    async fn a_hostile_agent_is_an_error_and_nothing_else() {
        let refusal = b"{\"error\": {\"class\": \"x\", \"desc\": \"\\u001b[2J no\"}}\n".to_vec();
        let (dir, _heard) = agent(vec![b"{\"return\": ID}\n".to_vec(), refusal]).await;
        let mut there = Agent::connect(dir.path()).await.unwrap();
        let error = there.freeze().await.unwrap_err().report();
        assert!(error.contains("it refused") && !error.contains('\u{1b}'), "{error}");
        for says in [&b"{\"return\": 5}\n"[..], b"\n", &[b'x'; 70_000], b"{"] {
            let (dir, _heard) = agent(vec![says.to_vec()]).await;
            let _ = Agent::connect(dir.path()).await.expect_err("no greeting of ours");
        }
    }
}
