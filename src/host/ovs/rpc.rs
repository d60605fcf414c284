//! A conversation with ovsdb-server: JSON-RPC over its Unix socket (RFC 7047).

use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::error::{Context, Error, Result};

/// The database of Open vSwitch.
const DATABASE: &str = "Open_vSwitch";

/// The largest message taken: some thousand ports fit into one.
const MAX_MESSAGE: usize = 32 << 20;

/// A connection. It has no limits of its own: callers give a whole conversation one.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
    next_id: u64,
}

impl Client {
    pub async fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).await.map_err(|error| {
            let text = format!("Open vSwitch does not answer at `{}`", socket.display());
            Error::system(text).because(error).help(super::IS_IT_RUNNING)
        })?;
        Ok(Self { stream, buffer: Vec::new(), next_id: 0 })
    }

    /// Does all of these operations or none, and returns an answer for each.
    pub async fn transact(&mut self, operations: Vec<Value>) -> Result<Vec<Value>> {
        let mut params = vec![json!(DATABASE)];
        params.extend(operations);
        let answer = self.call("transact", Value::Array(params)).await?;
        let Value::Array(answers) = answer else {
            return Err(Error::system(format!("ovsdb-server answered `{answer}`")));
        };
        // An operation that fails has its reason in its own place, one that cannot be
        // committed in a place after all others.
        match answers.iter().find(|answer| answer.get("error").is_some_and(Value::is_string)) {
            None => Ok(answers),
            Some(refusal) => {
                let word = |key: &str| refusal.get(key).and_then(Value::as_str).unwrap_or_default();
                Err(refused(format!("{}: {}", word("error"), word("details"))))
            }
        }
    }

    /// Waits until ovs-vswitchd has taken over the configuration with this number.
    pub async fn configured(&mut self, number: i64) -> Result<()> {
        let columns = json!({ DATABASE: { "columns": ["cur_cfg"] } });
        let mut news = self.call("monitor", json!([DATABASE, null, columns])).await?;
        loop {
            let rows = news.get(DATABASE).and_then(Value::as_object);
            let current = rows.into_iter().flat_map(|rows| rows.values());
            let mut current = current.filter_map(|row| row["new"]["cur_cfg"].as_i64());
            if current.any(|current| current >= number) {
                return Ok(());
            }
            news = loop {
                let mut message = self.receive().await?;
                if message["method"] == "update" {
                    break message["params"][1].take();
                }
            };
        }
    }

    async fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        let id = self.next_id;
        self.next_id += 1;
        self.send(&json!({ "id": id, "method": method, "params": params })).await?;
        loop {
            let mut message = self.receive().await?;
            if message.get("method").is_some() || message["id"] != id {
                continue;
            }
            return match message["error"].take() {
                Value::Null => Ok(message["result"].take()),
                error => Err(refused(error.to_string())),
            };
        }
    }

    async fn send(&mut self, message: &Value) -> Result<()> {
        let text = serde_json::to_vec(message).expect("a value is JSON");
        self.stream.write_all(&text).await.while_doing(|| "writing to ovsdb-server".into())
    }

    /// The next message. Probes whether we are alive are answered on the way.
    async fn receive(&mut self) -> Result<Value> {
        loop {
            let Some(mut message) = take(&mut self.buffer)? else {
                let reading = || "reading from ovsdb-server".to_owned();
                if self.buffer.len() > MAX_MESSAGE {
                    return Err(Error::system("its answer has no end")).while_doing(reading);
                }
                let got = self.stream.read_buf(&mut self.buffer).await;
                if got.while_doing(reading)? == 0 {
                    let closed = std::io::Error::from(ErrorKind::UnexpectedEof);
                    return Err(closed).while_doing(reading);
                }
                continue;
            };
            if message["method"] != "echo" {
                return Ok(message);
            }
            let (id, params) = (message["id"].take(), message["params"].take());
            self.send(&json!({ "id": id, "result": params, "error": null })).await?;
        }
    }
}

fn refused(reason: String) -> Error {
    Error::system("ovsdb-server refused").because(Error::system(reason))
}

/// The first whole message, which leaves the buffer. Nothing marks its end but its
/// own syntax.
fn take(buffer: &mut Vec<u8>) -> Result<Option<Value>> {
    let mut messages = serde_json::Deserializer::from_slice(buffer).into_iter::<Value>();
    match messages.next() {
        None => Ok(None),
        Some(Ok(message)) => {
            let end = messages.byte_offset();
            buffer.drain(..end);
            Ok(Some(message))
        }
        Some(Err(error)) if error.is_eof() => Ok(None),
        Some(Err(error)) => Err(error).while_doing(|| "reading from ovsdb-server".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let stream = br#" {"id":1,"result":["a}{"]}{"id":2}  {"id":3,"result":[]}"#;
        for step in 1..=stream.len() {
            let (mut buffer, mut found) = (Vec::new(), Vec::new());
            for piece in stream.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Some(message) = take(&mut buffer).unwrap() {
                    found.push(message["id"].as_i64().unwrap());
                }
            }
            assert_eq!(found, [1, 2, 3], "in pieces of {step} bytes");
        }
        assert!(take(&mut b"{\"id\":]".to_vec()).is_err());
    }
}
